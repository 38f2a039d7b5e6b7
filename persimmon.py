"""Persimmon-8B, Adept's decoder-only language model of 2023, in one file: architecture, KV cache, loading, sampling.

Copy this file into another project and it works there: importing it needs torch alone. Weights have the names that
transformers gives them, and the logits match transformers' up to rounding.

    model = PersimmonForCausalLM.from_pretrained(folder)
    tokenizer = Tokenizer(folder)
    output = model.generate(**tokenizer("The theory of relativity states"), max_new_tokens=20)
    print(tokenizer.decode(output[0]))

Shapes. One letter is one axis, here and in every comment below:

    B  batch                           H  attention heads                    C  hidden size, C = H*D
    T  positions that are new          D  head size                          F  feed-forward size, 4*C in the 8B
    S  positions cached before, + T    R  part of D that RoPE rotates        L  layers
    N  positions a cache has room for  P  positions in a block of keys       V  vocabulary

(A single matrix, of whatever layer, has O outputs and C inputs.)

What is odd about Persimmon, and easy to miss (below, "the original" is persimmon-ai-labs/adept-inference on GitHub):

 1. The rows of the fused QKV projection are ordered [head, (q, k, v), D], not [(q, k, v), head, D]. Read in the other
    order, every shape still fits, and the model writes noise.
 2. Queries and keys pass a LayerNorm over D, with weight and bias, before RoPE; the heads of a layer share it.
 3. RoPE turns only the first R = D/2 of a head, pairing dimension i with i + R/2 (not 2i with 2i + 1), theta 25000.
 4. The activation is relu(x)**2. It outgrows float16 in training: fine-tune in bfloat16.
 5. Every Linear and every norm has a bias, except lm_head; and lm_head is not the embedding, transposed or otherwise.
 6. `|ENDOFTEXT|`, id 71013, both begins and ends a text; the hub's tokenizer_config.json puts it before a prompt.
 7. Ids 3 to 70002 are reserved for images and unused: their logits exist, and stay near -17.

Left out: tensor parallelism, RoPE scaling, tied embeddings, beam search, sequences packed into one row. A
config that asks for such a thing is refused, not half followed.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# --- 1. Configuration -------------------------------------------------------------------------------------------------


def _require(condition: bool, sentence: str) -> None:
    """Raise ValueError(sentence) unless the condition holds. The sentence is made either way: that must not fail."""
    if not condition:
        raise ValueError(sentence)


def _read_json(file: Path) -> dict[str, Any]:
    """A file that holds one JSON object; errors name the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {file}: the model's folder has to hold {file.name}") from None
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, brackets without end
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    _require(isinstance(value, dict), f"{file} has to hold a JSON object, not a {type(value).__name__}")
    return value


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """float16, bfloat16 or float32, by name or as it is; ValueError for any other."""
    name, choices = str(dtype).removeprefix("torch."), ("bfloat16", "float16", "float32")
    _require(name in choices, f"dtype {name} is not supported: use one of {', '.join(choices)}")
    return getattr(torch, name)


PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True)
class PersimmonConfig:
    """The numbers of one checkpoint, named as in its config.json; the defaults are the 8B's.

    Raises ValueError for values that no model can be built from.
    """

    vocab_size: int = 262144  # V
    hidden_size: int = 4096  # C
    intermediate_size: int = 16384  # F
    num_hidden_layers: int = 36  # L
    num_attention_heads: int = 64  # H
    max_position_embeddings: int = 16384  # context in tokens, prompt and answer together
    hidden_dropout: float = 0.0  # in training, on the MLP's output
    attention_dropout: float = 0.0  # in training, on the attention weights
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02  # standard deviation of new weights
    qk_layernorm: bool = True
    rope_theta: float = 25000.0
    partial_rotary_factor: float = 0.5  # R/D
    bos_token_id: int | None = 71013
    eos_token_id: int | None = 71013
    pad_token_id: int | None = None
    dtype: str | None = None  # of the weights as stored, such as "bfloat16"; what dtype="auto" means
    num_labels: int = 2  # of a classifier; config.json lists them as id2label
    id2label: dict[str, str] | None = None  # "0", "1", ... -> name of the label
    problem_type: str | None = None  # of sequence classification; None: by the labels, see classification_loss
    classifier_dropout: float | None = None  # in training, before token classification's head; None: hidden_dropout
    quantize: str | None = None  # "int8" or "int4": how the matrices are stored, see section 10
    group_size: int = 128  # with int4, inputs that share a scale: 32, 64 or 128

    def __post_init__(self) -> None:
        # A field's type is text, by the import of annotations above.
        kinds = {"int": int, "float": (int, float), "bool": bool, "str": str, "dict[str, str]": dict}
        for field in fields(self):
            key, value, kind = f"config key {field.name}", getattr(self, field.name), field.type.removesuffix(" | None")
            if value is None and kind != field.type:
                continue
            is_right = isinstance(value, kinds[kind]) and isinstance(value, bool) == (kind == "bool")  # True is an int
            _require(is_right, f"{key} = {value!r} is not of type {kind}")
            if field.name.endswith("_dropout"):
                _require(0 <= value <= 1, f"{key} = {value} is not a probability from 0 to 1")
            elif kind in ("int", "float") and not field.name.endswith("token_id"):
                _require(0 < value < 2**28, f"{key} = {value} has to be above 0 and below 2**28")
        _require(self.hidden_size % self.num_attention_heads == 0, f"config key hidden_size = {self.hidden_size} is no "
                 f"multiple of num_attention_heads = {self.num_attention_heads}")
        _require(0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
                 f"config key partial_rotary_factor = {self.partial_rotary_factor} rotates {self.rotary_dim} of the "
                 f"{self.head_dim} dimensions of a head: it has to be an even number of them, at least 2")
        _require(self.pad_token_id is None or 0 <= self.pad_token_id < self.vocab_size,
                 f"config key pad_token_id = {self.pad_token_id} is not in the vocabulary of {self.vocab_size}")
        _require(self.id2label is None or len(self.id2label) == self.num_labels,
                 f"config key num_labels = {self.num_labels}, but id2label has {len(self.id2label or {})} labels")
        _require(self.problem_type in (None, *PROBLEM_TYPES), f"config key problem_type = {self.problem_type!r} is not "
                 f"supported: use one of {', '.join(PROBLEM_TYPES)}")
        _require(self.quantize in (None, "int8", "int4"), f"quantize = {self.quantize!r} is neither int8 nor int4")
        _require(self.group_size in (32, 64, 128), f"group_size = {self.group_size} is none of 32, 64 and 128")
        if self.dtype is not None:
            _as_dtype(self.dtype)

    @property
    def head_dim(self) -> int:
        """D"""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """R"""
        return int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PersimmonConfig:
        """Read `folder`/config.json, in the hub's form of 2023 or as transformers 5 writes it.

        Raises FileNotFoundError without such a file, and ValueError where it is no JSON object or asks for anything
        other than Persimmon. Keys that do not affect the result (architectures, use_cache, ...) are ignored.
        """
        raw = _read_json(Path(folder) / "config.json")
        rope = {}  # in 2023 rope_theta at top level and "rope_scaling": null, now all of it under rope_parameters
        for key in ("rope_scaling", "rope_parameters"):
            _require(isinstance(raw.get(key) or {}, dict), f"config key {key} = {raw.get(key)!r} is not an object")
            rope |= raw.get(key) or {}
        values = {**raw, **rope, "dtype": raw.get("dtype") or raw.get("torch_dtype"), "quantize": None}
        quantization = raw.get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") == "persimmon.py":
            values |= {"quantization_config": None, **{k: quantization.get(k) for k in ("quantize", "group_size")}}
        if isinstance(values.get("id2label"), dict):
            values["num_labels"] = len(values["id2label"])
        # A key that is absent or null takes its default, unless null is a value itself: there is no such token.
        config = cls(**{f.name: values[f.name] for f in fields(cls)
                        if values.get(f.name) is not None or (f.name in values and f.type.endswith("None"))})
        required = {"model_type": "persimmon", "hidden_act": "relu2", "tie_word_embeddings": False,
                    "rope_type": "default", "type": "default", "quantization_config": None,
                    "num_key_value_heads": config.num_attention_heads, "head_dim": config.head_dim}
        for key, value in values.items():
            _require(key not in required or value in (None, required[key]),
                     f"config key {key} = {value!r} is not supported: a Persimmon checkpoint has {required.get(key)!r}")
        extra = rope.keys() - {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
        _require(not extra, f"config key {min(extra, default='')} of RoPE is not supported: Persimmon's is plain")
        return config

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds, with RoPE and dtype spelled for old and for new versions of transformers."""
        rope = {name: getattr(self, name) for name in ("rope_theta", "partial_rotary_factor")}
        values = asdict(self)
        quantization = {"quant_method": "persimmon.py", **{key: values.pop(key) for key in ("quantize", "group_size")}}
        return {"model_type": "persimmon", "hidden_act": "relu2", "tie_word_embeddings": False, **values,
                "torch_dtype": self.dtype, "rope_scaling": None, "rope_parameters": {"rope_type": "default", **rope},
                **({"quantization_config": quantization} if self.quantize else {})}


# --- 2. Rotary positions (RoPE; Su et al., arXiv 2104.09864) ----------------------------------------------------------


def rope_tables(position_ids: Tensor, config: PersimmonConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions (B, T), each (B, T, 1, R/2) in `dtype`; the 1 stands for the heads.

    At position p, pair i turns by p * theta**(-2i/R), i = 0 ... R/2 - 1. The angle reaches 16383 radians and needs
    float32; only the table is rounded, as in transformers. (Adept's own inference has the angles in half precision.)
    """
    R = config.rotary_dim
    pair = torch.arange(0, R, 2, dtype=torch.float32, device=position_ids.device)  # (R/2)
    inv_freq = 1.0 / config.rope_theta ** (pair / R)  # (R/2)
    angle = position_ids[..., None, None].float() * inv_freq  # (B, T, 1, R/2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R dimensions of each head of x, (B, T, H, D), and keep the rest; cos and sin from rope_tables.

    (a, b) -> (a cos - b sin, b cos + a sin), where a is the first half of the R dimensions and b is the second: the
    pairing of GPT-NeoX and of `rotate_half` in transformers.
    """
    R = 2 * cos.shape[-1]
    a, b = x[..., : R // 2], x[..., R // 2 : R]  # (B, T, H, R/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., R:]), dim=-1)


# --- 3. The KV cache --------------------------------------------------------------------------------------------------


def cpu_has(feature: str) -> bool:
    """Whether this CPU has "amx_tile" (Intel's servers since 2023) or "avx512_bf16", as far as PyTorch knows."""
    return getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()  # private, so perhaps gone one day


class KVCache:
    """Keys and values of the positions seen so far, so that each forward pass computes only the new ones.

    Room for N positions is allocated at once, 2*L*B*N*C numbers (576 KiB a position for the 8B in 16 bit), and never
    grows. The cache is the one owner of the position: `length` is a Python int, `position` the same number on the
    device, where kernels read it. The model advances both, once a forward pass. For inference only: it is written in
    place, which autograd does not allow. `kernels` are those of section 12, where there is a GPU for them.

    On a CPU in 16 bit, unless it is short, or in bfloat16 with AMX, the keys lie transposed in memory, (L, B, H, D, N),
    and an N above `block` is rounded up to a multiple of it: see cpu_attention. `keys` shows them in the values' order.
    """

    block = 256  # positions
    transposed_from = {torch.bfloat16: 4096, torch.float16: 4096}  # H*N: below, and in float32, SDPA is quicker

    def __init__(self, config: PersimmonConfig, batch_size: int, max_length: int,
                 dtype: torch.dtype, device: torch.device | str) -> None:
        L, B, H = config.num_hidden_layers, batch_size, config.num_attention_heads
        N, D = max_length, config.head_dim
        is_long = torch.device(device).type == "cpu" and H * N >= self.transposed_from.get(dtype, math.inf)
        self.is_transposed = is_long and not (dtype == torch.bfloat16 and cpu_has("amx_tile"))
        if self.is_transposed and N > self.block:
            N = -(-N // self.block) * self.block
        self.values = torch.empty(L, B, H, N, D, dtype=dtype, device=device)  # (L, B, H, N, D)
        self.keys = torch.empty_like(self.values)  # (L, B, H, N, D)
        if self.is_transposed:
            self.keys = self.keys.view(L, B, H, D, N).transpose(3, 4)  # (L, B, H, N, D)
        self.length = 0
        self.position = torch.zeros((), dtype=torch.long, device=device)
        self.kernels = kernels_for(config, B, device)

    def total(self, B: int, T: int) -> int:
        """S for T new positions in each of B rows; ValueError where they do not fit."""
        _, rows, _, N, _ = self.keys.shape
        _require(B == rows, f"the cache is for a batch of {rows}, the input has {B} rows")
        _require(self.length + T <= N,
                 f"the cache has room for {N} positions: {self.length} are taken and {T} more do not fit")
        return self.length + T

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's k and v of the new positions, (B, H, T, D); return all there are now, (B, H, S, D)."""
        T = k.shape[2]
        S = self.length + T
        self.keys[layer, :, :, self.length : S] = k
        self.values[layer, :, :, self.length : S] = v
        if self.length == 0:
            return k, v
        k, v = self.keys[layer, :, :, :S], self.values[layer, :, :, :S]  # (B, H, S, D)
        return (k.contiguous() if self.is_transposed and T > 1 else k), v  # SDPA is slow with keys that lie transposed

    def advance(self, T: int) -> None:
        """Count T more positions as seen, once every layer has stored them."""
        self.seek(self.length + T)

    def seek(self, length: int) -> None:
        """Count this many positions as seen: fewer than before, to forget the rest."""
        self.length = length
        self.position.fill_(length)


# --- 4. Few tokens on a CPU -------------------------------------------------------------------------------------------
#
# Decoding a token multiplies every weight by one number, so it takes at least the time of reading the weights, and the
# best operator is the one that reads memory fastest. Measured, for a product W x with a large W:
#
#   AMX, bfloat16           W first, by mv, or mm for up to 32 rows: full speed. F.linear, which reorders W: 0.8 of it
#   AVX512-BF16 but no AMX  dot_products, for one row: full speed, in float32 too. F.linear: a half, W first: a third
#   (AMD's Zen 4)
#   all else                F.linear
#
# dot_products is the derivative, by its factors, of an operator made for recommenders, embedding_bag: the sum of some
# rows of a table, each times a factor. That sum itself is the product with weights of which only some rows count, on
# every processor (SparseLinear), and attention in 16 bit but for bfloat16 with AMX: without it, SDPA reads a long cache
# at an eighth of the memory's speed. Results are those of the plain operations up to rounding. Products whose gradients
# are wanted, and those in torch.compile, are the plain ones.


def dot_products(weight: Tensor, x: Tensor) -> Tensor:
    """W x, (O), for weight (O, C) and x (C), as the gradient of embedding_bag by its factors."""
    O = len(weight)
    rows = torch.arange(O, dtype=torch.int32, device=x.device)  # (O)
    bags = torch.zeros_like(rows)  # (O), the bag of each row: all are in bag 0, whose gradient is x
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return dots(x[None], weight, rows, bags[:1], bags, 0)  # where bags start: 0; mode 0, a sum


class Linear(nn.Linear):
    """x W^T + b; for few rows x and a large W on a CPU, by the operator that reads W fastest there."""

    large = 2**22  # bytes; F.linear is quicker with a smaller matrix, which stays in the CPU's cache

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., O)"""
        W = self.weight
        is_plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype != W.dtype  # as under autocast
        if not is_plain and x.device.type == "cpu" and W.is_contiguous() and W.nbytes >= self.large:
            y = self.few_rows(x.reshape(-1, self.in_features))
            if y is not None:
                return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], self.out_features)
        return nn.functional.linear(x, W, self.bias)

    def few_rows(self, x: Tensor) -> Tensor | None:
        """x W^T, (rows, O), for x (rows, C), by an operator that is quicker than F.linear; None where there is none."""
        rows, has_amx = len(x), cpu_has("amx_tile")
        if has_amx and x.dtype == torch.bfloat16 and rows <= 32:
            return torch.mv(self.weight, x[0])[None] if rows == 1 else (self.weight @ x.t()).t().contiguous()
        if not has_amx and cpu_has("avx512_bf16") and x.dtype != torch.float16 and rows == 1:
            return dot_products(self.weight, x[0])[None]
        return None


def nonzero_bags(x: Tensor, rows: int, limit: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """For x (..., F): the columns of its nonzeros, row after row; their values; and where their bags start, (B, bags).

    None where x has more than `rows` rows or limit*F nonzeros, off the CPU, while gradients are enabled, and in
    torch.compile, for which the count would be part of a shape.
    """
    F = x.shape[-1]
    B = x.numel() // F
    if B > rows or x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    x = x.flatten()  # (B*F)
    place = (x != 0).nonzero()[:, 0].int()  # int32 is quicker in embedding_bag
    if len(place) > limit * F:
        return None
    bags = 4 * torch.get_num_threads()  # for each row, equal parts of its columns: cores share the work by the bag
    edge = torch.arange(B * bags, device=x.device) * F // bags  # (B*bags), where among the B*F a bag begins
    start = torch.searchsorted(place, edge.int(), out_int32=True)  # (B*bags)
    return place % F, x[place], start.view(B, bags)


class SparseLinear(Linear):
    """A Linear for inputs that are mostly zero: with few rows, the weights that only zeros multiply are not read.

    The weights of one input have to be contiguous for that: see `transpose`, which `load` calls on a CPU. Before that
    this is a Linear like any other.
    """

    def transpose(self) -> None:
        """Lay a large weight out in memory as (F, C). The parameter is a view of it with the usual shape (C, F)."""
        if self.weight.nbytes >= self.large:
            self.weight.data = self.weight.data.t().contiguous().t()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """What `.to` and its like do to a module; off the CPU, the weight is laid out as usual again."""
        super()._apply(fn, recurse)
        if self.weight.device.type != "cpu":
            self.weight.data = self.weight.data.contiguous()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (..., F) -> (..., C)"""
        table = self.weight.t()  # (F, C)
        is_table = table.is_contiguous() and x.dtype == table.dtype
        bags = nonzero_bags(x, 16, 1.5) if is_table else None  # beyond, F.linear is about as quick
        if bags is None:
            return super().forward(x)
        column, value, start = bags
        y = nn.functional.embedding_bag(column, table, start.flatten(), mode="sum", per_sample_weights=value)
        y = y.view(*x.shape[:-1], start.shape[1], -1).sum(-2, dtype=torch.float32)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def cpu_attention(q: Tensor, keys: Tensor, values: Tensor, S: int, mask: Tensor | None) -> Tensor:
    """Attention of one position, q (B, H, 1, D), to the first S of keys and values (B, H, N, D) -> (B, H, 1, D).

    Both steps are sums of rows. The output is the sum over S of p times a value. The scores of P positions are the sum
    over D of an element of q times P elements of the keys, which is why these lie transposed. Scores are rounded to
    q's dtype, as in transformers' eager attention; SDPA keeps them in float32.
    """
    B, H, N, D = keys.shape
    P = min(N, KVCache.block)
    blocks = -(-S // P)  # the last one perhaps with positions beyond S
    table = keys.transpose(2, 3).reshape(-1, P)  # (B*H*D*N/P, P)
    steps = partial(torch.arange, dtype=torch.int32, device=q.device)  # int32 is quicker than int64
    row = steps(B * H * D).view(B * H, 1, D) * (N // P) + steps(blocks)[:, None]  # (B*H, blocks, D)
    factor = q.view(B * H, 1, D).expand_as(row)  # (B*H, blocks, D)
    score = nn.functional.embedding_bag(
        row.view(-1, D), table, mode="sum", per_sample_weights=factor.reshape(-1, D))  # (B*H*blocks, P)
    score = score.view(B, H, blocks * P)[:, :, :S].float() * D**-0.5  # (B, H, S)
    if mask is not None:
        score = score.masked_fill(~mask[:, :, 0], -math.inf)  # (B, H, S)
    p = score.softmax(-1).to(q.dtype).view(B * H, S)  # (B*H, S)
    row = steps(B * H)[:, None] * N + steps(S)  # (B*H, S)
    y = nn.functional.embedding_bag(row, values.view(-1, D), mode="sum", per_sample_weights=p)  # (B*H, D)
    return y.view(B, H, 1, D)


# --- 5. Attention, MLP, block -----------------------------------------------------------------------------------------


def causal_mask(place: Tensor, S: int, attention_mask: Tensor | None) -> Tensor | None:
    """Which of S positions each of T new ones may look at: bool, (1, 1, T, S) or (B, 1, T, S); None as below.

    place (T) says where among the S the new ones are: behind what is cached, S - T ... S - 1 (but see FixedShapes).

    Without padding there are three cases:
        T = S      the text so far is all new: plain causal attention, which SDPA does by itself (`is_causal`): None
        T = 1      one new position may look at everything: None
        1 < T < S  a chunk after a prefix: row t may look at columns 0 ... S - T + t. `is_causal` is wrong here, since
                   it starts its triangle at the top left corner, where the triangle has to end at the bottom right.
    Padding, zeros in attention_mask (B, S), hides columns in each of them. A padded position may still look at itself:
    a row that sees nothing would be 0/0 in the softmax, and the NaN would spread.
    """
    if attention_mask is None and len(place) in (1, S):
        return None
    row = place[:, None]  # (T, 1)
    column = torch.arange(S, device=place.device)  # (S)
    mask = (column <= row)[None, None]  # (1, 1, T, S)
    if attention_mask is not None:
        mask = mask & (attention_mask.bool()[:, None, None] | (column == row))  # (B, 1, T, S)
    return mask


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D)) v for each head, with q, k = RoPE(LayerNorm(.)); the original's transformer.py."""

    def __init__(self, config: PersimmonConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout, self.eps = layer, config.attention_dropout, config.layer_norm_eps
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.q_layernorm = nn.LayerNorm(config.head_dim, self.eps) if config.qk_layernorm else nn.Identity()
        self.k_layernorm = nn.LayerNorm(config.head_dim, self.eps) if config.qk_layernorm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C); rope from rope_tables, mask from causal_mask."""
        B, T, C = x.shape
        qkv = self.query_key_value(x)  # (B, T, 3*C)
        if cache is not None and cache.kernels is not None and not (self.training or torch.is_grad_enabled()):
            return self.dense(cache.kernels.attention(qkv, self, rope, mask, cache))  # on a GPU: section 12
        qkv = qkv.view(B, T, self.num_heads, 3, self.head_dim)  # (B, T, H, 3, D)
        q, k, v = qkv.unbind(3)  # (B, T, H, D)
        q = apply_rope(self.q_layernorm(q), *rope)  # (B, T, H, D)
        k = apply_rope(self.k_layernorm(k), *rope)  # (B, T, H, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, S, D)
        if cache is not None and cache.is_transposed and T == 1:
            y = cpu_attention(q, cache.keys[self.layer], cache.values[self.layer], k.shape[2], mask)  # (B, H, T, D)
        else:
            y = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, dropout_p=self.dropout * self.training
            )  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return self.dense(y)


class MLP(nn.Module):
    """W2 relu(W1 x + b1)**2 + b2; the original's fused_bias_sqrelu.py.

    relu makes zeros that are exact, and in the trained model about 90% of the F activations of a token are zero: while
    decoding, SparseLinear does not read the weights that they multiply.
    """

    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = SparseLinear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        h = self.dense_h_to_4h(x).relu_()  # (B, T, F)
        h = h.square() if torch.is_grad_enabled() else h.square_()  # (B, T, F), for a prompt new memory costs 5%
        return self.dense_4h_to_h(h)


class Block(nn.Module):
    """x + Attention(norm(x)), then x + MLP(norm(x)): a pre-norm decoder layer, dropout on the MLP's output only."""

    def __init__(self, config: PersimmonConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None,
                keep: int = 0) -> Tensor:
        """x (B, T, C) -> (B, T, C), or with keep = n only the last n positions, (B, n, C)."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)  # (B, T, C)
        x = x[:, -keep:]  # -0 is 0: all of them
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


# --- 6. The models ----------------------------------------------------------------------------------------------------


class ModelOutput(NamedTuple):
    """What PersimmonModel returns: the hidden states after the final norm, (B, T, C)."""

    last_hidden_state: Tensor


class HeadOutput(NamedTuple):
    """What a model with a head returns: logits, and with labels the mean loss in float32 (cross-entropy in nats)."""

    loss: Tensor | None
    logits: Tensor


class PersimmonPreTrainedModel(nn.Module):
    """What the models have in common: new weights, and reading and writing a folder of them."""

    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__()
        self.config = config

    def init_weights(self, part: nn.Module) -> None:
        """New weights in `part`: matrices normal, std initializer_range; biases 0; norms as they are.

        Not on the meta device: there is nothing to fill, and normal_ would import torch._dynamo and triton, for 1.3 s.
        """
        if next(part.parameters()).is_meta:
            return
        for module in part.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight.data[module.padding_idx] = 0

    def gradient_checkpointing_enable(self) -> None:
        """Keep only each block's input for the backward pass and recompute the rest: less memory, about a third more
        time, the same result (Chen et al., arXiv 1604.06174)."""
        for block in self.modules():
            if isinstance(block, Block):
                block.forward = partial(checkpoint, partial(Block.forward, block), use_reentrant=False)

    def logits_for_loss(self, logits: Tensor) -> Tensor:
        """The logits in float32. Raises ValueError when the model is being trained in float16."""
        _require(not (self.training and logits.dtype == torch.float16), "training in float16 turns Persimmon's weights "
                 "into NaN: use bfloat16, as Adept did")
        return logits.float()

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: str | torch.dtype = "auto",
                        device: str | torch.device | None = None,
                        progress: Callable[[float], None] | None = None, sparse: bool = True,
                        quantize: str | None = None, group_size: int = 128, **changes: Any) -> PersimmonPreTrainedModel:
        """The model in `folder`, which holds config.json and safetensors, in eval mode.

        On the CPU, in the file's own dtype, weights are memory-mapped: pages are read on first use, and training never
        changes the file. With `sparse`, those of large SparseLinear layers, a quarter of all, are not: they are
        transposed into memory. quantize = "int8" or "int4" (with groups of group_size inputs) quantizes 16-bit weights,
        one matrix after the other; a folder that is quantized already needs no such argument. dtype "auto" is
        config.json's, else the file's; device None is the CPU. progress is called with the fraction that is done.
        changes replace values of config.json, as in num_labels=3. A classifier that is loaded from a language model's
        folder gets a new head, with a warning.

        Raises FileNotFoundError for what is not there, and ValueError, naming file and tensor, for a file that is
        damaged, or whose tensors are not exactly the model's (but for the exceptions that `load` lists).
        """
        if quantize is None:
            return load(cls, Path(folder), dtype, device, progress, sparse, changes)
        model = load(cls, Path(folder), dtype, device, None, False, changes)
        return quantize_model(model, quantize, group_size, progress)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which from_pretrained and transformers read.

        A new folder appears only once it is complete; in an existing one, each file of the same name is replaced by the
        whole new one, and the others are kept.
        """
        save(self, Path(folder))


class PersimmonModel(PersimmonPreTrainedModel):
    """Token ids to hidden states: embedding, L blocks, a final norm. Weights are new, as init_weights makes them."""

    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__(config)
        # padding_idx: no gradient reaches that row. from_pretrained, for nn.Embedding() would fill the matrix once more.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.init_weights(self)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, cache: KVCache | None = None,
                inputs_embeds: Tensor | None = None, keep: int = 0) -> ModelOutput:
        """Hidden states (B, T, C) of T new tokens, given by input_ids (B, T) or by inputs_embeds (B, T, C).

        With keep = n, only those of the last n positions, (B, n, C): the last MLP then skips the others.

        attention_mask (B, S), 1 for a token and 0 for padding on either side, covers what `cache` holds and what is
        new; at padding, results are finite and mean nothing. position_ids (B, T) or (1, T) are the tokens' places for
        RoPE, by default the number of tokens before each, padding not counted.

        Raises ValueError for inputs that do not fit each other, or a cache without room for them.
        """
        _require((input_ids is None) != (inputs_embeds is None), "give either input_ids or inputs_embeds, and not both")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        _require(x.dim() == 3 and x.shape[2] == self.config.hidden_size, f"input_ids have to be (B, T), inputs_embeds "
                 f"(B, T, C) with C = {self.config.hidden_size}: this makes {tuple(x.shape)} as (B, T, C)")
        B, T, _ = x.shape
        place, S = torch.arange(T, device=x.device), T  # of the new positions among all S
        if cache is not None:
            place, S = place + cache.position, cache.total(B, T)  # on the device: a recorded pass would keep `length`
        if attention_mask is not None:
            shape = tuple(attention_mask.shape)
            _require(shape == (B, S), f"attention_mask has shape {shape} and has to have (B, S) = ({B}, {S})")
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, place]  # (B, T)
        elif position_ids is None:
            position_ids = place.expand(B, T)  # (B, T)
        shape = tuple(position_ids.shape)
        _require(shape in ((B, T), (1, T)), f"position_ids have shape {shape} and have to have (B, T) = ({B}, {T})")
        rope = rope_tables(position_ids, self.config, x.dtype)
        mask = causal_mask(place, S, attention_mask)
        for block in self.layers[:-1]:
            x = block(x, rope, mask, cache)  # (B, T, C)
        x = self.layers[-1](x, rope, mask, cache, keep)  # (B, keep or T, C)
        if cache is not None:
            cache.advance(T)
        return ModelOutput(self.final_layernorm(x))


class PersimmonForCausalLM(PersimmonPreTrainedModel):
    """The language model: PersimmonModel, and a Linear without bias from hidden states to logits."""

    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__(config)
        self.model = PersimmonModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights(self.lm_head)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, cache: KVCache | None = None, inputs_embeds: Tensor | None = None,
                labels: Tensor | None = None, logits_to_keep: int = 0) -> HeadOutput:
        """Logits (B, T, V), or with logits_to_keep = n those of the last n positions, (B, n, V); 0 means all.

        labels (B, T) are the ids at the same positions, -100 where a token does not count; the logits at t are scored
        against the label at t + 1, in float32. The other arguments and errors are those of PersimmonModel.forward.
        """
        _require(logits_to_keep >= 0, f"logits_to_keep = {logits_to_keep} is negative")
        _require(labels is None or logits_to_keep == 0, "a loss needs all logits: logits_to_keep has to be 0")
        output = self.model(input_ids, attention_mask, position_ids, cache, inputs_embeds, keep=logits_to_keep)
        logits = self.lm_head(output.last_hidden_state)
        loss = None
        if labels is not None:
            shifted = self.logits_for_loss(logits)[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(shifted, labels[:, 1:].flatten())
        return HeadOutput(loss, logits)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int | None = None,
                 max_length: int | None = None, **options: Any) -> Tensor:
        """The prompts input_ids (B, T) and what follows them, (B, T + new tokens), the token that stops included.

        Rows that stop early are filled up with pad_token_id (else eos_token_id). max_length, in tokens, counts the
        prompt with its padding; without either limit, 200 new tokens are generated. For options and errors see
        `generate` below.
        """
        _require(max_new_tokens is None or max_length is None, "give max_new_tokens or max_length, and not both")
        if max_length is not None:
            max_new_tokens = max_length - input_ids.shape[1]
            _require(max_new_tokens > 0, f"max_length = {max_length} leaves no room: the prompt has "
                     f"{input_ids.shape[1]} tokens")
        limit = 200 if max_new_tokens is None else max_new_tokens
        steps = generate(self, input_ids, attention_mask, max_new_tokens=limit, **options)
        new = torch.tensor([step.tokens for step in steps], device=input_ids.device).T  # (B, new tokens)
        return torch.cat((input_ids, new), dim=1)


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """The loss of logits (B, K) for K labels, as transformers chooses it (loss/loss_utils.py there).

    regression                   mean squared error, labels (B, K), for K = 1 also (B). The default for K = 1
    single_label_classification  cross-entropy, labels (B) from 0 to K - 1. The default for labels of integers
    multi_label_classification   mean binary cross-entropy, labels (B, K) from 0.0 to 1.0. The default otherwise
    """
    if problem_type is None:
        is_single = labels.dtype in (torch.long, torch.int)
        problem_type = "single_label_classification" if is_single else "multi_label_classification"
        problem_type = "regression" if logits.shape[1] == 1 else problem_type
    if problem_type == "regression":
        return nn.functional.mse_loss(logits.flatten(), labels.flatten().float())
    if problem_type == "single_label_classification":
        return nn.functional.cross_entropy(logits, labels.flatten().long())
    return nn.functional.binary_cross_entropy_with_logits(logits, labels.float())


class PersimmonForSequenceClassification(PersimmonPreTrainedModel):
    """A label for each text: a Linear without bias on the hidden state of its last token."""

    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__(config)
        self.model = PersimmonModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)  # not Linear, so never quantized
        self.init_weights(self.score)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
                labels: Tensor | None = None) -> HeadOutput:
        """Logits (B, num_labels); labels as in classification_loss, the other arguments as in PersimmonModel.forward.

        The last token is the rightmost that is not pad_token_id, whatever attention_mask says (as in transformers), and
        with inputs_embeds simply the last. Raises ValueError for B > 1 without a pad_token_id in the config.
        """
        x = self.model(input_ids, attention_mask, position_ids, None, inputs_embeds).last_hidden_state  # (B, T, C)
        (B, T, _), pad = x.shape, self.config.pad_token_id
        _require(B == 1 or pad is not None, f"to find where {B} texts end, config.json has to have a pad_token_id")
        is_token = torch.ones(B, T, device=x.device) if pad is None or input_ids is None else input_ids != pad  # (B, T)
        last = (torch.arange(T, device=x.device) * is_token).argmax(-1, keepdim=True)  # (B, 1)
        logits = self.score(x.take_along_dim(last[..., None], dim=1)[:, 0])
        loss = None
        if labels is not None:
            loss = classification_loss(self.logits_for_loss(logits), labels, self.config.problem_type)
        return HeadOutput(loss, logits)


class PersimmonForTokenClassification(PersimmonPreTrainedModel):
    """A label for each token: dropout in training, then a Linear with bias on each hidden state."""

    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__(config)
        self.model = PersimmonModel(config)
        p = config.hidden_dropout if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(p)
        self.score = nn.Linear(config.hidden_size, config.num_labels)  # not Linear, so never quantized
        self.init_weights(self.score)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
                labels: Tensor | None = None) -> HeadOutput:
        """Logits (B, T, num_labels); labels (B, T), -100 where none counts; the rest as in PersimmonModel.forward."""
        x = self.model(input_ids, attention_mask, position_ids, None, inputs_embeds).last_hidden_state  # (B, T, C)
        logits = self.score(self.dropout(x))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(self.logits_for_loss(logits).flatten(0, 1), labels.flatten())
        return HeadOutput(loss, logits)


# --- 7. Loading and saving --------------------------------------------------------------------------------------------


SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32",
                      torch.uint8: "U8", torch.int8: "I8"}  # the integers are of quantized matrices


def _open(file: Path) -> Any:
    """A safetensors file, mapped into memory; ValueError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is cut off, damaged or no safetensors file: {error}") from None


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it: a folder has one for all, or shards and an index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.is_file():
        hint = f"only pickles (.bin): convert them with `python convert.py {folder} {folder}-safetensors`"
        hint = hint if any(folder.glob("*.bin")) else f"no {single.name} and no {index.name}"
        raise FileNotFoundError(f"{folder} holds no weights in safetensors, {hint}")
    shards = _read_json(index).get("weight_map")
    _require(isinstance(shards, dict) and all(isinstance(shard, str) for shard in shards.values()),
             f"{index} has no weight_map from tensor names to files")
    for name, shard in shards.items():
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{index} says that {name} is in {shard}, and there is no such file")
    return {name: folder / shard for name, shard in shards.items()}


def load(cls: type[PersimmonPreTrainedModel], folder: Path, dtype: str | torch.dtype, device: str | torch.device | None,
         progress: Callable[[float], None] | None, sparse: bool, changes: dict[str, Any]) -> PersimmonPreTrainedModel:
    """PersimmonPreTrainedModel.from_pretrained, described there."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: a model is loaded from a folder on this machine")
    device, progress = device or "cpu", progress or (lambda fraction: None)
    config = replace(PersimmonConfig.from_pretrained(folder), **changes)
    with torch.device("meta"):  # shapes without memory: the tensors of the file become the weights, uncopied
        model = cls(replace(config, quantize=None))
        if config.quantize is not None:
            quantize_model(model, config.quantize, config.group_size)

    # The files have to hold exactly the model's tensors, with these exceptions: names that may be left over there, the
    # `model.` in front of names, which PersimmonModel does without, and a classifier's head, which they may lack.
    files = tensor_files(folder)
    own = {name.removeprefix("model."): (name, p) for name, p in model.state_dict().items()}
    head = {name for name in own if name.startswith("score.") and not any(n.startswith("score.") for n in files)}
    ignored = ["rotary_emb.inv_freq"]  # computed here; some older versions store it
    if head or cls is PersimmonModel:
        ignored += ["lm_head.weight", "lm_head.scale"]
    if head:
        warnings.warn(f"{folder} has no classifier: {', '.join(sorted(head))} is new, random, and to be trained; "
                      "lm_head.weight is not used", stacklevel=3)
    names = [name for name in files if not name.endswith(tuple(ignored))]
    stored = {name.removeprefix("model."): name for name in names}
    _require(len(stored) == len(names), f"{folder} has tensors twice, with and without `model.` in front")
    missing, extra = own.keys() - stored.keys() - head, stored.keys() - own.keys()
    _require(not missing, f"{folder} lacks the tensor {min(missing, default='')} ({len(missing)} missing in all)")
    _require(not extra, f"{folder} has the tensor {min(extra, default='')}, which is not in a {cls.__name__} of this "
             f"config.json ({len(extra)} unexpected in all)")

    target = _as_dtype(dtype) if dtype != "auto" else _as_dtype(config.dtype) if config.dtype else None
    is_on_cpu = torch.device(device).type == "cpu"
    to_transpose = [m for m in model.modules() if isinstance(m, SparseLinear)] if sparse and is_on_cpu else []
    opened = {file: _open(file) for file in set(files.values())}
    state = {}
    for bare_name, name in stored.items():
        (own_name, empty), file = own[bare_name], files[name]
        _require(name in opened[file].keys(), f"{file} lacks the tensor {name}, which the index places there")
        tensor = opened[file].get_tensor(name)  # mapped: nothing is read yet
        found, shape, is_float = tuple(tensor.shape), tuple(empty.shape), empty.is_floating_point()
        _require(found == shape, f"{file} has the tensor {name} in shape {found}: config.json makes it {shape}")
        _require(tensor.is_floating_point() == is_float and (is_float or tensor.dtype == empty.dtype),
                 f"{file} has the tensor {name} as {tensor.dtype}: config.json makes it {empty.dtype}")
        target = target or (tensor.dtype if is_float else None)
        state[own_name] = tensor.to(device, target if is_float else tensor.dtype)
        progress(len(state) / (len(stored) + len(to_transpose)))
    for name in head:
        state[name] = torch.zeros(own[name][1].shape, dtype=target, device=device)
        if name.endswith("weight"):
            state[name].normal_(std=config.initializer_range)
    model.load_state_dict(state, assign=True)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for done, _ in enumerate(pool.map(SparseLinear.transpose, to_transpose), start=len(stored) + 1):
            progress(done / (len(stored) + len(to_transpose)))
    return model.eval()


def safetensors_header(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> bytes:
    """What stands in front of the numbers in a safetensors file of these tensors, (name, dtype, shape), in this order.

    That is the length of the rest, in 8 bytes, and a JSON object (https://github.com/huggingface/safetensors#format),
    padded so that a map of the file can be used as it is: PyTorch's int8 kernel crashes where weights do not begin at a
    multiple of 16 bytes, and the library's own writer aligns to 8 only.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def save(model: PersimmonPreTrainedModel, folder: Path) -> None:
    """PersimmonPreTrainedModel.save_pretrained, described there."""
    state = model.state_dict()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = {"architectures": [type(model).__name__], **replace(model.config, dtype=dtype).to_dict()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.unfinished-") as scratch:
        new = Path(scratch, "new")  # on the same disk, so that moving it is one step; with the usual permissions
        new.mkdir()
        with (new / "model.safetensors").open("wb") as file:
            file.write(safetensors_header((name, tensor.dtype, tensor.shape) for name, tensor in state.items()))
            for tensor in state.values():
                file.write(tensor.contiguous().cpu().view(torch.uint8).numpy())
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if not folder.exists():
            new.rename(folder)
        else:
            for file in new.iterdir():
                file.replace(folder / file.name)


# --- 8. Tokens and text -----------------------------------------------------------------------------------------------


class Tokenizer:
    """SentencePiece (unigram, bytes for what it has no piece for) and the `|ENDOFTEXT|` that Persimmon puts in front.

    `path` is a model's folder with tokenizer.model, or such a file (`adept_vocab.model` in Adept's release). Whether
    `|ENDOFTEXT|` is put in front is add_bos_token of the tokenizer_config.json beside it; by default it is.

    Raises FileNotFoundError, and ValueError for a file that is not SentencePiece's or has no token to end a text with.
    """

    def __init__(self, path: str | Path) -> None:
        from sentencepiece import SentencePieceProcessor

        file = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}: the tokenizer is a SentencePiece model")
        try:
            self.processor = SentencePieceProcessor(model_file=str(file))
        except RuntimeError:
            raise ValueError(f"{file} is damaged or no SentencePiece model") from None
        self.end_of_text = self.processor.piece_to_id("|ENDOFTEXT|")  # id of the unknown piece where there is none
        if self.processor.id_to_piece(self.end_of_text) != "|ENDOFTEXT|":
            self.end_of_text = self.processor.eos_id()
        _require(self.end_of_text >= 0, f"{file} has no piece |ENDOFTEXT| and no other end of text")
        config = file.with_name("tokenizer_config.json")
        settings = _read_json(config) if config.is_file() else {}
        _require(not settings.get("add_eos_token"), f"{config} asks for add_eos_token, which is not supported")
        self.add_bos = settings.get("add_bos_token") is not False

    def __len__(self) -> int:
        """Number of pieces."""
        return len(self.processor)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Ids of a text, `|ENDOFTEXT|` in front if add_bos, which by default is what tokenizer_config.json says."""
        _require(not re.search("[\ud800-\udfff]", text), "the text is not valid Unicode")
        add_bos = self.add_bos if add_bos is None else add_bos
        return [self.end_of_text] * add_bos + self.processor.encode(text)

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Text of ids; `|ENDOFTEXT|` gives nothing, bytes that are no UTF-8 give U+FFFD, ids without a piece U+2047."""
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        unknown = self.processor.unk_id()
        return self.processor.decode([i if 0 <= i < len(self) else unknown for i in ids if i != self.end_of_text])

    def __call__(self, text: str | Sequence[str], return_tensors: str = "pt") -> dict[str, Tensor]:
        """input_ids and attention_mask, both (B, T), of one text or several, the shorter ones padded on the left."""
        _require(return_tensors == "pt", f"return_tensors = {return_tensors!r} is not supported: use 'pt'")
        rows = [self.encode(t) for t in ([text] if isinstance(text, str) else text)]
        T = max(map(len, rows), default=0)
        ids = [[self.end_of_text] * (T - len(row)) + row for row in rows]
        mask = [[0] * (T - len(row)) + [1] * len(row) for row in rows]
        return {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}


class StreamDecoder:
    """Text of ids that come one by one: what `push` and then `finish` return, joined, is the decoding of the whole.

    Decoding each id alone would lose spaces and tear characters apart: SentencePiece drops the space in front of the
    first word, so it matters what came before (`prompt_ids`, whose text is not repeated), and a character that has no
    piece is up to four byte pieces, which only together mean something.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.context: list[int] = []  # decoded in front of what is new; its text has been returned already
        self.pending: list[int] = []  # not returned yet: perhaps the first bytes of a character
        for i in prompt_ids:
            self.push(i)

    def push(self, token: int) -> str:
        """The text that is certain once `token` is known, often a word, sometimes nothing."""
        self.pending.append(token)
        processor, end = self.tokenizer.processor, b""  # the last bytes: of a torn character there are three at most
        for i in [i for i in self.pending if i != self.tokenizer.end_of_text][-3:]:
            is_byte = 0 <= i < len(self.tokenizer) and processor.is_byte(i)  # a piece like <0xE2>
            end = end + bytes.fromhex(processor.id_to_piece(i)[3:5]) if is_byte else b""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(end)
        is_torn = decoder.getstate()[0] != b""  # what waits for more bytes
        return "" if is_torn else self.finish()

    def finish(self) -> str:
        """The rest, with U+FFFD for bytes that never became a character."""
        before = self.tokenizer.decode(self.context)
        text = self.tokenizer.decode(self.context + self.pending)[len(before) :]
        if not before:
            # Only the first text loses its leading space; after it, any text will do as the context.
            self.context = [self.tokenizer.processor.unk_id()] if text else self.context + self.pending
        self.pending = []
        return text


def chat_prompt(turns: Sequence[str]) -> str:
    """What the chat model continues with its answer: turns are human, adept, human, ..., the last one a human's.

    Format: footnote 1 of Adept's README. Raises ValueError unless the last turn is the human's.
    """
    _require(len(turns) % 2 == 1, f"a chat prompt ends with a human's turn: turns are odd in number, not {len(turns)}")
    return "".join(f" {turn.strip()}\n\n" if n % 2 else f"human: {turn}\n\nadept:" for n, turn in enumerate(turns))


# --- 9. Sampling and generation ---------------------------------------------------------------------------------------


def ranked(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Logits (B, V) and their ids, the largest first, equal ones by id; or only the first of them, where the filters
    keep no others.

    On a CPU, to sort 262,144 numbers takes 30 ms; to find the 1024 largest of them, mostly enough, takes one. From a
    GPU, Python would have to wait to know whether they are enough.
    """
    k = 1024
    if logits.device.type == "cpu" and k < logits.shape[1]:
        ids = logits.topk(k).indices.sort().values
        largest = logits.gather(1, ids)
        is_certain = largest > largest.amin(-1, keepdim=True)  # of those as large as the smallest, some are missing
        if top_k > 0:
            is_enough = is_certain.sum(-1) >= top_k
        else:
            is_enough = (largest.exp() * is_certain).sum(-1) >= top_p * logits.exp().sum(-1)
        if is_enough.all():
            largest, order = largest.sort(dim=-1, descending=True, stable=True)
            return largest, ids.gather(1, order)
    return logits.sort(dim=-1, descending=True, stable=True)


def sample(logits: Tensor, generators: Sequence[torch.Generator], temperature: float, top_k: int = 0,
           top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """One id a row, (B), from logits (B, V), row b with generators[b]; the filters apply in transformers' order.

    temperature  divides the logits; 0 (or what rounds to it) is greedy: the largest logit, of equal ones the lowest id
    top_k        keeps the k most likely tokens; 0 keeps all
    top_p        keeps the fewest tokens, most likely first, whose probabilities reach p (Holtzman et al., 1904.09751)
    min_p        keeps tokens at least min_p times as likely as the most likely one (Nguyen et al., 2407.01082)
    """
    if temperature < 1e-30:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # (B, V), the largest is 0
    ids = None
    if top_k > 0 or top_p < 1:
        total = logits.exp().sum(-1, keepdim=True)  # (B, 1)
        logits, ids = ranked(logits, top_k, top_p)
        if top_k > 0:
            logits[:, top_k:] = -math.inf
            total = logits.exp().sum(-1, keepdim=True)  # (B, 1)
        if top_p < 1:
            p = logits.exp() / total
            is_outside = p.cumsum(-1) - p >= top_p  # the tokens before this one reach it already
            is_outside[:, 0] = False
            logits = logits.masked_fill(is_outside, -math.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < math.log(min_p), -math.inf)
    # Token i is drawn when a random number from ]0, total] lies above the sum of the i weights before and not above the
    # next sum. In 64 bits, for there are many small weights. Unlike torch.multinomial this never waits for the device.
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    sums = logits.exp().cumsum(-1, dtype=dtype)
    random = [torch.rand(1, dtype=dtype, device=logits.device, generator=g) for g in generators]
    number = 1 - torch.stack(random)  # (B, 1)
    choice = torch.searchsorted(sums, number * sums[:, -1:])  # (B, 1)
    choice = choice.clamp(max=sums.shape[1] - 1)  # (B, 1), where all is NaN, for `generate` to report
    return (choice if ids is None else ids.gather(-1, choice))[:, 0]


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits (B, V) by `penalty` where seen (B, V); Keskar et al., 1909.05858."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


class Step(NamedTuple):
    """One step of `generate`, for each of B rows; a row that has stopped goes on with padding, 0.0 and its reason."""

    tokens: list[int]  # the ids chosen
    logprobs: list[float]  # their log-probabilities, in nats, by the model alone: before penalty, temperature, filters
    finish_reasons: list[str | None]  # "stop": a stop id; "length": max_new_tokens; "context": the context is full


def on_host(pairs: Iterable[tuple[Tensor, Tensor]], lag: int) -> Iterator[tuple[list, list]]:
    """Pairs of tensors as lists, `lag` pairs late: with 1, a GPU computes the next while Python sees to this one.

    The first pair is not late: what comes next may take long, when kernels are compiled.
    """

    def fetched(x: Tensor, y: Tensor, is_copied: torch.cuda.Event | None) -> tuple[list, list]:
        if is_copied is not None:
            is_copied.synchronize()
        return x.tolist(), y.tolist()

    waiting: deque[tuple[Tensor, Tensor, torch.cuda.Event | None]] = deque()
    for n, pair in enumerate(pairs):
        is_cuda = pair[0].is_cuda
        x, y = (tensor.to("cpu", non_blocking=is_cuda) for tensor in pair)
        waiting.append((x, y, torch.cuda.current_stream(pair[0].device).record_event() if is_cuda else None))
        if len(waiting) > (lag if n > 0 else 0):
            yield fetched(*waiting.popleft())
    for late in waiting:
        yield fetched(*late)


@torch.no_grad()
def generate(model: PersimmonForCausalLM, input_ids: Tensor, attention_mask: Tensor | None = None, *,
             max_new_tokens: int = 200, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
             min_p: float = 0.0, repetition_penalty: float = 1.0, seed: int = 0,
             stop_ids: Iterable[int] | None = None, cache: KVCache | None = None) -> Iterator[Step]:
    """Continue prompts, one token a row and step, until every row has stopped; n steps are n forward passes.

    The prompts are input_ids (B, T), with zeros in attention_mask (B, T) where there is padding, on either side; apart
    from rounding, rows do not influence each other. Row b draws from its own generator, seeded seed + b, and stops at
    one of stop_ids, by default eos_token_id. repetition_penalty is for ids that the row holds already, prompt included.
    A `cache` that holds the first positions of an unpadded prompt, as in a conversation, saves computing them again;
    its capacity limits the context. The other options are those of `sample`. On CUDA a pass is computed while Python
    looks at the token before: when all rows have stopped, the cache holds that token too; and a pass is recorded, which
    works in one thread at a time.

    Raises ValueError, at the first step, for options out of range, ids outside the vocabulary, and a prompt that is
    empty or leaves no room for a token in the context of max_position_embeddings; FloatingPointError for logits that
    are not numbers, which float16 can bring about.
    """
    config, embedding = model.config, model.model.embed_tokens.weight
    device = embedding.device
    limit = config.max_position_embeddings
    if cache is not None:
        limit = min(limit, cache.keys.shape[3])
    for name, value, least, most in (
        ("max_new_tokens", max_new_tokens, 1, math.inf), ("temperature", temperature, 0, math.inf),
        ("top_k", top_k, 0, math.inf), ("top_p", top_p, 0, 1), ("min_p", min_p, 0, 1),
        ("repetition_penalty", repetition_penalty, 1e-3, 1e3), ("seed", seed, 0, 2**63 - 1),
    ):
        _require(least <= value <= most, f"{name} = {value} is out of range: it goes from {least} to {most}")
    _require(input_ids.dim() == 2 and input_ids.numel() > 0,
             f"the prompt has shape {tuple(input_ids.shape)}: it has to be (B, T) with a token at least")
    _require(0 <= input_ids.min() and input_ids.max() < config.vocab_size,
             f"the prompt has ids from {input_ids.min()} to {input_ids.max()}: the model's vocabulary has "
             f"{config.vocab_size}")
    B, T = input_ids.shape
    ids = input_ids.to(device, torch.long)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(ids)  # (B, T)
    _require(mask.shape == ids.shape, f"attention_mask has shape {tuple(mask.shape)}, the prompt {tuple(ids.shape)}")
    order = mask.argsort(dim=1, stable=True)  # (B, T), padding in front: every row's next token then comes at T
    ids, mask = ids.gather(1, order), mask.gather(1, order)  # (B, T)
    lengths = mask.sum(1).tolist()
    _require(min(lengths) > 0, f"row {lengths.index(min(lengths))} of the prompt is nothing but padding")
    _require(max(lengths) < limit, f"the prompt has {max(lengths)} tokens and leaves no room for another one: the "
             f"context limit is {limit}")

    stop_ids = {config.eos_token_id} if stop_ids is None else set(map(int, stop_ids))
    pad = config.pad_token_id if config.pad_token_id is not None else config.eos_token_id or 0
    generators = [torch.Generator(device).manual_seed(seed + b) for b in range(B)]
    steps = min(max_new_tokens, limit - min(lengths))
    is_padded = min(lengths) < T
    if cache is None:
        cache = KVCache(config, B, T + steps - 1, embedding.dtype, device)
    elif is_padded or cache.length >= T:
        raise ValueError(f"a cache that holds {cache.length} positions is for a prompt that is longer, and not padded: "
                         f"this one has {T} positions")
    mask = torch.cat((mask, mask.new_ones(B, steps - 1)), dim=1)  # (B, T + steps - 1), for the last token is not read
    seen = torch.zeros(B, config.vocab_size, dtype=torch.bool, device=device)  # (B, V)
    seen.scatter_(1, torch.where(mask[:, :T] > 0, ids, ids[:, -1:]), True)  # in place of padding, the row's last id
    reasons: list[str | None] = [None] * B

    def forward(ids: Tensor) -> Tensor:
        """Logits (B, 1, V) after the new positions `ids`."""
        S = cache.length + ids.shape[1]
        return model(ids, mask[:, :S] if is_padded else None, cache=cache, logits_to_keep=1).logits

    def passes(ids: Tensor, forward: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each step's ids (B) and their log-probabilities (B), on the device, which nothing in here waits for."""
        ids = ids[:, cache.length :]  # the first pass is over what the cache has not seen, the others over one position
        for step in range(1, steps + 1):
            if step == 2 and cache.kernels is not None:  # section 11
                forward = recorded_step(model, cache, mask if is_padded else None) or forward
            logits = forward(ids)[:, 0].float()  # (B, V)
            penalized = logits  # (B, V)
            if repetition_penalty != 1:
                penalized = apply_repetition_penalty(logits, seen, repetition_penalty)  # (B, V)
            ids = sample(penalized, generators, temperature, top_k, top_p, min_p)[:, None]  # (B, 1)
            seen.scatter_(1, ids, True)
            yield ids[:, 0], logits.gather(1, ids)[:, 0] - logits.logsumexp(-1)  # log_softmax is slower

    for step, (tokens, logprobs) in enumerate(on_host(passes(ids, forward), lag=int(device.type == "cuda")), start=1):
        if any(map(math.isnan, logprobs)):
            raise FloatingPointError(f"token {step}: the logits are not numbers; in float16 use bfloat16 instead")
        for b, token in enumerate(tokens):
            if reasons[b] is not None:
                tokens[b], logprobs[b] = pad, 0.0
            elif token in stop_ids:
                reasons[b] = "stop"
            elif step == max_new_tokens:
                reasons[b] = "length"
            elif lengths[b] + step == limit:
                reasons[b] = "context"
        yield Step(tokens, logprobs, list(reasons))
        if None not in reasons:
            return


# --- 10. Quantization -------------------------------------------------------------------------------------------------
#
# Matrices in 8 or 4 bits: a fraction of the memory and, since decoding is bound by reading weights, a multiple of the
# speed. Every Linear but a classifier's head is replaced; the embedding, of which a pass reads one row a token, norms
# and biases stay as they are. Stored, readable with numpy (O outputs, C inputs, groups of g = group_size inputs):
#
#   int8  weight int8 (O, C), scale (O):
#             W[o, c] = scale[o] * weight[o, c]
#   int4  weight uint8 (O/64, C, 32), scale (C/g, O, 2), O rounded up to a multiple of 64. Byte [n, c, j] holds the
#         numbers, 0 ... 15, of outputs 64*n + j (low half) and 64*n + 32 + j (high half), the order in which PyTorch's
#         AVX-512 kernel reads them:
#             W[o, c] = scale[c//g, o, 0] * (number - 8) + scale[c//g, o, 1]
#   both  dense_4h_to_h: weight uint8 (F, C + 8). Row f, of which most are not read for a token, holds C bytes, a
#         float32 scale and a float32 offset:
#             W[c, f] = scale * byte + offset


class QuantizedLinear(nn.Module):
    """x W^T + b with W in few bits: by a kernel of PyTorch's for few rows on a CPU, else by blocks of plain numbers.

    What the kinds below differ in is what they store and how they multiply:

        quantized(weight)  the tensors to store for weight (O, C); `empty` gives such tensors without values
        few_rows(x)        x W^T by a kernel that reads W as it is stored; None where that does not work or is slow, as
                           those of Int8Linear and Int4Linear are on x86 in all but bfloat16
        product(x)         x W^T with W turned into plain numbers, block by block of outputs

    Raises ValueError, when it is made from a Linear, for weights that are not finite or do not fit.
    """

    few = 16  # rows; up to here, few_rows is quicker than product
    block = 2**22  # weights that are plain numbers at the same time

    def __init__(self, linear: nn.Linear, group_size: int) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.group_size, self.bias = group_size, linear.bias
        weight = linear.weight.detach()
        is_finite = weight.is_meta or all(map(math.isfinite, weight.aminmax()))
        _require(is_finite, "weights that are not finite can't be quantized")
        for name, tensor in (self.empty(weight) if weight.is_meta else self.quantized(weight)).items():
            self.register_buffer(name, tensor)

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """Ranges of outputs, start and stop, with memory for their weights in this dtype, (stop - start, C).

        It is the same memory each time, which stays in the CPU's cache, unless autograd keeps it for the backward pass.
        """
        O, C = self.out_features, self.in_features
        size = min(O, max(64, self.block // C // 64 * 64))  # outputs
        empty = partial(torch.empty, dtype=dtype, device=self.weight.device)
        memory = empty(size * C)
        for start in range(0, O, size):
            n = min(size, O - start)
            yield start, start + n, empty(n, C) if torch.is_grad_enabled() else memory[: n * C].view(n, C)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., O)"""
        is_few = x.numel() <= self.few * self.in_features and x.device.type == "cpu" and not torch.is_grad_enabled()
        y = self.few_rows(x) if is_few else None
        y = self.product(x) if y is None else y  # (..., O)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)


def private_operator(name: str) -> Callable[..., Tensor] | None:
    """One of PyTorch's, like "aten._weight_int8pack_mm"; None, and a warning, where it is gone."""
    namespace, _, operator = name.partition(".")
    found = getattr(getattr(torch.ops, namespace), operator, None)
    if found is None:
        warnings.warn(f"this PyTorch has no {name}: quantized weights are used without it, slowly", stacklevel=2)
    return found


class Int8Linear(QuantizedLinear):
    """8 bits, symmetric, a scale for each output."""

    def empty(self, weight: Tensor) -> dict[str, Tensor]:
        """weight int8 (O, C) and scale (O)"""
        return {"weight": torch.empty_like(weight, dtype=torch.int8), "scale": weight.new_empty(len(weight))}

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """weight (O, C) -> weight int8 (O, C) and scale (O)."""
        least, most = weight.aminmax(dim=1)
        scale = torch.maximum(-least, most) / 127  # rounded to the weight's dtype, in float16 perhaps a lot
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # of a row of zeros
        number = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for part, w, s in zip(number.split(128), weight.split(128), scale.float().split(128)):
            part.copy_((w / s[:, None]).round_().clamp_(-127, 127))
        return {"weight": number, "scale": scale}

    def product(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., O)"""
        small = x / 128  # or sums of x times up to 127 overflow in float16; a power of two rounds nothing
        parts = [small @ block.copy_(self.weight[start:stop]).t() for start, stop, block in self.blocks(x.dtype)]
        return torch.cat(parts, dim=-1) * (self.scale.to(x.dtype) * 128)

    def few_rows(self, x: Tensor) -> Tensor | None:
        """x (..., C) -> (..., O)"""
        operator = private_operator("aten._weight_int8pack_mm")
        if operator is None or x.dtype != torch.bfloat16 or self.in_features % 16 != 0:
            return None
        # It takes 16 numbers at a time, without a look, and crashes where they don't lie as the processor wants them.
        if self.weight.data_ptr() % 16 != 0:  # mapped from a file that another program wrote
            self.weight = self.weight.clone()
        rows = x.reshape(-1, self.in_features).contiguous()
        rows = rows if rows.data_ptr() % 32 == 0 else rows.clone()
        return operator(rows, self.weight, self.scale.to(x.dtype)).view(*x.shape[:-1], -1)


class Int4Linear(QuantizedLinear):
    """4 bits, a scale and an offset for each group of inputs and each output."""

    few = 64
    packed: Tensor | None = None  # the weight as PyTorch's kernel on this machine wants it

    def empty(self, weight: Tensor) -> dict[str, Tensor]:
        """weight uint8 (O/64, C, 32) and scale (C/g, O, 2), with O rounded up to a multiple of 64."""
        (O, C), g = weight.shape, self.group_size
        _require(C % g == 0, f"a matrix of {C} inputs can't be quantized in groups of {g}")
        blocks = -(-O // 64)
        return {"weight": weight.new_empty(blocks, C, 32, dtype=torch.uint8),
                "scale": weight.new_empty(C // g, 64 * blocks, 2)}

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """weight (O, C) -> what is in `empty`"""
        stored = self.empty(weight)
        (O, C), g = weight.shape, self.group_size
        weight = nn.functional.pad(weight, (0, 0, 0, -O % 64)) if O % 64 else weight
        for n, rows in enumerate(weight.split(64)):
            number, scale = self.quantized_groups(rows.unflatten(1, (-1, g)))
            low, high = number.flatten(1).split(32)  # (32, C)
            stored["weight"][n] = (low | high << 4).t()
            stored["scale"][:, 64 * n : 64 * n + 64] = scale.transpose(0, 1)
        return stored

    def quantized_groups(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight (64, C/g, g) -> numbers 0 ... 15 as uint8 (64, C/g, g) and scale (64, C/g, 2).

        To make the squared error small, start from the whole range of a group and from 0.9 of it, and from each fit
        a straight line through (number, weight) twice. The best of the six scales and offsets is kept.
        """
        w = weight.float()
        least, most = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        best: tuple[Tensor, ...] | None = None
        for part in (1.0, 0.9):
            scale, offset = (most - least) * part / 15, least * part
            for fit in range(3):
                if fit > 0:
                    centered = number - number.mean(-1, keepdim=True)
                    scale = (centered * w).sum(-1, keepdim=True) / centered.square_().sum(-1, keepdim=True)
                    offset = w.mean(-1, keepdim=True) - scale * number.mean(-1, keepdim=True)
                # What is stored is rounded, and the offset belongs to number 8. Weights that are all equal have scale
                # 0, numbers that are all equal have no slope: NaN then, and never the best.
                scale = scale.to(weight.dtype).float()
                offset = (offset + 8 * scale).to(weight.dtype).float() - 8 * scale
                number = ((w - offset) / torch.where(scale > 0, scale, torch.ones_like(scale))).round_().clamp_(0, 15)
                error = (number * scale).add_(offset).sub_(w).square_().sum(-1, keepdim=True)
                if best is None:
                    best = error, scale, offset, number
                else:
                    best = tuple(torch.where(error < best[0], new, old)
                                 for new, old in zip((error, scale, offset, number), best))
        _, scale, offset, number = best
        return number.to(torch.uint8), torch.cat((scale, offset + 8 * scale), dim=-1).to(weight.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., O)"""
        scale, offset = self.scale[:, : self.out_features].to(x.dtype).permute(2, 0, 1).contiguous()  # (C/g, O)
        parts = []
        for start, stop, block in self.blocks(x.dtype):
            groups = block.view(-1, self.group_size, stop - start)  # (C/g, g, outputs)
            groups.copy_(self.numbers(start, stop).view(groups.shape))
            torch.addcmul(offset[:, None, start:stop], groups, scale[:, None, start:stop], out=groups)
            parts.append(x @ groups.flatten(0, 1))
        return torch.cat(parts, dim=-1)

    def numbers(self, start: int, stop: int) -> Tensor:
        """The numbers of outputs start ... stop less 8, so from -8 to 7, by input: int8 (C, stop - start)."""
        packed = self.weight[start // 64 : -(-stop // 64)] ^ 0x88  # number ^ 8 is number - 8, as 4 bits with a sign
        packed = packed.view(torch.int8).transpose(0, 1)  # (C, blocks, 32)
        upper = torch.stack((packed << 4, packed), dim=2)  # (C, blocks, 2, 32), a number in the upper half of each byte
        return upper.bitwise_right_shift_(4).flatten(1)[:, : stop - start]  # this shift keeps the sign

    def few_rows(self, x: Tensor) -> Tensor | None:
        """x (..., C) -> (..., O)"""
        operator = private_operator("aten._weight_int4pack_mm_for_cpu")
        if operator is None or x.dtype != torch.bfloat16:
            return None
        if self.packed is None:  # without AVX-512 another order is wanted: pack a probe to see, and then keep a copy
            pack = private_operator("aten._convert_weight_to_int4pack_for_cpu")
            if pack is None:
                return None
            probe = torch.arange(128 * 64, dtype=torch.int32).view(128, 64) * 7 % 16
            halves = probe.to(torch.uint8).view(2, 2, 32, 64)
            is_own_order = torch.equal(pack(probe, 1).view(2, 64, 32), (halves[:, 0] | halves[:, 1] << 4).mT)
            self.packed = self.weight
            if not is_own_order:
                self.packed = pack(self.numbers(0, len(self.weight) * 64).t().to(torch.int32).contiguous() + 8, 1)
        rows = x.reshape(-1, self.in_features).contiguous()
        y = operator(rows, self.packed.view(-1, self.in_features // 2), self.group_size, self.scale.to(x.dtype))
        return y[:, : self.out_features].view(*x.shape[:-1], -1)

    def _load_from_state_dict(self, *args: Any) -> None:
        """As in nn.Module; what was packed is the weight from before."""
        super()._load_from_state_dict(*args)
        self.packed = None


class Int8SparseLinear(QuantizedLinear):
    """8 bits, a scale and an offset for each input, stored by input: the rows that only zeros multiply are not read."""

    few = 64

    def empty(self, weight: Tensor) -> dict[str, Tensor]:
        """weight uint8 (F, C + 8)"""
        return {"weight": weight.new_empty(self.in_features, self.out_features + 8, dtype=torch.uint8)}

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """weight (C, F) -> weight uint8 (F, C + 8): C bytes, then a float32 scale and a float32 offset."""
        parts = []
        for w in weight.split(128, dim=1):
            w = w.t().float()  # 128 inputs by C
            offset = w.amin(1, keepdim=True)
            scale = (w.amax(1, keepdim=True) - offset) / 255
            number = (w - offset) / torch.where(scale > 0, scale, torch.ones_like(scale))
            number = number.round().clamp(0, 255).to(torch.uint8)
            parts.append(torch.cat((number, scale.view(torch.uint8), offset.view(torch.uint8)), dim=1))
        return {"weight": torch.cat(parts)}

    def product(self, x: Tensor) -> Tensor:
        """x (..., F) -> (..., C)"""
        # W = scale * (byte - 128) + middle: in 16 bit byte - 128 is exact, and of the size of the result
        scale, offset = self.weight[:, -8:].flatten().clone().view(torch.float32).view(-1, 2).unbind(1)  # (F)
        scaled = x * scale.to(x.dtype)  # (..., F)
        middle = (offset + 128 * scale).to(x.dtype)  # (F)
        parts = []
        for start, stop, block in self.blocks(x.dtype):
            number = (self.weight[:, start:stop] ^ 128).view(torch.int8)  # byte - 128, (F, stop - start)
            parts.append(scaled @ block.view(number.shape).copy_(number))
        return torch.cat(parts, dim=-1) + (x @ middle)[..., None]

    def few_rows(self, x: Tensor) -> Tensor | None:
        """x (..., F) -> (..., C)"""
        operator = private_operator("quantized.embedding_bag_byte_rowwise_offsets")
        bags = nonzero_bags(x, self.few, 6)  # beyond, plain numbers are quicker
        if operator is None or bags is None:
            return None
        column, value, start = bags
        y = operator(self.weight, column, start.flatten(), mode=0, per_sample_weights=value.float())
        return y.view(*x.shape[:-1], start.shape[1], -1).sum(-2)


def quantize_model(model: PersimmonPreTrainedModel, kind: str, group_size: int = 128,
                   progress: Callable[[float], None] | None = None) -> PersimmonPreTrainedModel:
    """Replace, one after the other, each Linear of `model` but a classifier's head; the model itself is returned.

    kind is "int8" or "int4". Raises ValueError for a model that is quantized already, and for weights that can't be:
    the model is then quantized in part, and of no use.
    """
    _require(model.config.quantize is None, f"the model is quantized already, in {model.config.quantize}")
    config = replace(model.config, quantize=kind, group_size=group_size)
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]
    dense = Int8Linear if kind == "int8" else Int4Linear
    for done, (name, linear) in enumerate(linears, start=1):
        cls = Int8SparseLinear if isinstance(linear, SparseLinear) else dense
        parent, _, child = name.rpartition(".")
        try:
            setattr(model.get_submodule(parent), child, cls(linear, group_size))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if progress is not None:
            progress(done / len(linears))
    for part in model.modules():
        if isinstance(part, PersimmonPreTrainedModel):
            part.config = config
    return model


# --- 11. Decoding as a CUDA graph -------------------------------------------------------------------------------------
#
# An H200 reads the weights of a layer in a tenth of a millisecond, and Python takes longer than that to ask for what
# there is to do in it. So from the second token on, where there are the kernels of section 12, what the GPU is told in
# one pass is recorded and replayed.


class FixedShapes(KVCache):
    """A view of a KVCache for a pass that is recorded: S is always N, all that there is room for.

    Only the kernels can use it, which look up `position` on the GPU and read no more than that: it has no `length`.
    """

    def __init__(self, cache: KVCache) -> None:
        self.keys, self.values, self.position, self.kernels = cache.keys, cache.values, cache.position, cache.kernels

    def total(self, B: int, T: int) -> int:
        """N"""
        return self.keys.shape[3]

    def advance(self, T: int) -> None:
        """Do nothing: a replay would not change Python's `length`."""


@lru_cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which passes are recorded, one for a device: libraries keep memory for each that they have seen."""
    return torch.cuda.Stream(device)


def record(forward: Callable[[Tensor], Tensor], ids: Tensor) -> Callable[[Tensor], Tensor]:
    """A function like `forward`, from ids to logits, that has the GPU do again what it does in forward(ids).

    All is done in the memory where it was: new ids are copied into `ids`, the next call overwrites the logits.
    """
    with torch.cuda.device(ids.device):
        stream, graph = recording_stream(ids.device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward(ids)  # kernels are compiled, libraries get their memory: not to be recorded
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            logits = forward(ids)

    def replay(new: Tensor) -> Tensor:
        ids.copy_(new)
        graph.replay()
        return logits

    replay.reads = forward  # the tensors that it holds have to stay where they are
    return replay


def recorded_step(model: PersimmonForCausalLM, cache: KVCache,
                  mask: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """A function from the ids of one more position, (B, 1), to logits, (B, 1, V), as model(ids, mask, cache=cache) has.

    mask is None or the attention_mask (B, S) of all positions that there may be. The next call overwrites the logits.
    Hooks of modules run while the pass is recorded, and not again. To record takes 20 ms on an H200, little enough to
    do it anew for each text: so no recording outlives a cache, or weights that have been replaced.

    None in training, for the kernels know no dropout, and under autocast, which frees the weights that it has cast.
    """
    is_training = any(part.training for part in model.modules() if isinstance(part, (Attention, nn.Dropout)))
    if is_training or torch.is_autocast_enabled(cache.keys.device.type):
        return None
    B, N = cache.keys.shape[1], cache.keys.shape[3]
    fixed, ids = FixedShapes(cache), torch.zeros(B, 1, dtype=torch.long, device=cache.keys.device)
    whole_mask = None if mask is None else nn.functional.pad(mask, (0, N - mask.shape[1]))
    tables = rope_tables(torch.arange(N, device=ids.device)[None], model.config, cache.keys.dtype)
    is_alone = B == 1 and mask is None and is_plain(model)

    def forward(ids: Tensor) -> Tensor:
        if is_alone:
            return decode_one(model, ids, fixed, tables)
        return model(ids, whole_mask, cache=fixed, logits_to_keep=1).logits

    replay = record(forward, ids)

    def step(ids: Tensor) -> Tensor:
        logits = replay(ids)
        cache.advance(1)
        return logits

    return step


# --- 12. Kernels for a GPU --------------------------------------------------------------------------------------------
#
# Two Triton kernels: `attend`, for all that lies between the QKV projection and the output of attention, and `product`,
# for one row times a matrix with what stands before and after it. For a token, a layer is then five kernels, where
# PyTorch's would be twenty, each of which lets the memory wait. Everything works without them, as with cache.kernels =
# None. To leave them out, delete this section and section 11, `kernels` in KVCache and in `generate`, the branch of
# Attention.forward and the import of lru_cache.


@lru_cache
def gpu_kernels() -> tuple[Any, Any] | None:
    """The kernels `attend` and `product`; None without triton 3.4 or newer. Numbers are float32 in both, but q, k, v
    and p have the model's dtype.

    The programs of a launch of `attend` share the work by rows and heads, and by up to `SPLITS` parts of the keys. Each
    takes M queries q (M, D) past its keys k and values v (P, D), block by block, with the online softmax (Milakov and
    Gimelshein, arXiv 1805.02867; FlashAttention, Dao et al., 2205.14135). The largest score so far is m (M); the sum of
    weights, l (M), and of weighted values, y (M, D), are kept as if m had been subtracted from all scores:

        s  = q k^T / sqrt(D)                    (M, P), -inf where a query must not look
        m' = max(m, max(s))
        p  = exp(s - m')
        l' = l exp(m - m') + sum(p)
        y' = y exp(m - m') + p v

    A part's result is y / l, and its weight among the parts is softmax(m + log l), since exp(m + log l) is its sum of
    exp(s). Whichever program of a head is the last to finish puts the parts together.
    """
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None
    if not hasattr(triton.JITFunction, "get_capture_scope"):  # before 3.4 a kernel could not be inside a function
        return None

    @triton.jit
    def turned_head(x, weight, bias, eps, cos, sin, t, is_row, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
        """RoPE(LayerNorm(.)) of a head's q or k at new positions t: float32 (t, D). Pointers are to t = 0."""
        d = tl.arange(0, D)
        pair = tl.where(d < R // 2, d + R // 2, tl.where(d < R, d - R // 2, d))  # what RoPE turns dimension d with
        row = x + t[:, None] * (3 * H * D)
        x = tl.load(row + d[None, :], mask=is_row[:, None], other=0.0).to(tl.float32)
        y = tl.load(row + pair[None, :], mask=is_row[:, None], other=0.0).to(tl.float32)
        if weight is not None:
            mean = tl.sum(x, 1)[:, None] / D
            scale = 1 / tl.sqrt(tl.sum((x - mean) * (x - mean), 1)[:, None] / D + eps)
            x = (x - mean) * scale * tl.load(weight + d)[None, :] + tl.load(bias + d)[None, :]
            y = (y - mean) * scale * tl.load(weight + pair)[None, :] + tl.load(bias + pair)[None, :]
        angle = t[:, None] * (R // 2) + (d % (R // 2))[None, :]
        is_turned = is_row[:, None] & (d < R)[None, :]
        c = tl.load(cos + angle, mask=is_turned, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=is_turned, other=0.0).to(tl.float32)
        return x * c + y * tl.where(d < R // 2, -s, s)

    @triton.jit
    def absorb(q, k, v, is_seen, mask, m, l, y):
        """One step of the recurrence above, with 2**x for exp(x): m counts in units of log 2."""
        if mask is not None:
            is_seen &= tl.load(mask, mask=is_seen, other=0) != 0
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (1.4426950408889634 / q.shape[1] ** 0.5)
        s = tl.where(is_seen, s, -float("inf"))
        new_m = tl.maximum(m, tl.max(s, 1))
        base = tl.where(new_m == -float("inf"), 0.0, new_m)  # nothing to look at so far: -inf - -inf would be NaN
        p, keep = tl.exp2(s - base[:, None]), tl.exp2(m - base)
        y = y * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        return new_m, l * keep + tl.sum(p, 1), y

    @triton.jit(do_not_specialize=["rope_stride", "mask_stride", "mask_width", "B", "T", "N"])  # compiled once for all
    def attend(qkv, q_weight, q_bias, k_weight, k_bias, eps, cos, sin, rope_stride, mask, mask_stride, mask_width,
               keys, values, position, out, parts, lse, arrived, B, T, N,
               H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, M: tl.constexpr, P: tl.constexpr,
               SPLITS: tl.constexpr):
        """Program (b*H + h, i, split): the i-th M new positions of head h in row b, and a part of the old ones.

        It writes keys and values to the cache and, to out (B, T, H, D), the result of attention for T <= M; with
        SPLITS = 0, for any T, only q. From the cache it reads old positions alone, so that no program waits for what
        another one writes. Strides are those of the batch, mask_width is S. What programs tell each other: parts
        (SPLITS, B, T, H, D), y / l; lse, m + log2 l, the same without D; arrived (B*H), how many have finished.
        """
        b, h, split = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H, tl.program_id(2)
        length = tl.load(position).to(tl.int32)
        used = tl.maximum(tl.minimum(tl.cdiv(length, 128), SPLITS), 1)  # parts, of 128 old positions at least
        if split < used:
            dtype = qkv.dtype.element_ty
            qkv += (b * T * H + h) * 3 * D
            cos, sin = cos + b * rope_stride, sin + b * rope_stride
            keys, values = keys + (b * H + h) * N * D, values + (b * H + h) * N * D
            d, block = tl.arange(0, D)[None, :], tl.arange(0, P)
            t = tl.program_id(1) * M + tl.arange(0, M)
            is_new = t < T
            row = (b * T + t) * H + h
            mask_row = None if mask is None else mask + b * mask_stride + t[:, None] * mask_width
            q = turned_head(qkv, q_weight, q_bias, eps, cos, sin, t, is_new, H, D, R).to(dtype)
            m = tl.full((M,), -float("inf"), tl.float32)
            l = tl.zeros((M,), tl.float32)
            y = tl.zeros((M, D), tl.float32)
            if SPLITS == 0:
                tl.store(out + row[:, None] * D + d, q, mask=is_new[:, None])
            else:
                part = tl.cdiv(tl.cdiv(length, used), P) * P
                end = tl.minimum(split * part + part, length)
                for first in range(split * part, end, P):
                    column = first + block
                    is_key = column < end
                    k = tl.load(keys + column[:, None] * D + d, mask=is_key[:, None], other=0.0)
                    v = tl.load(values + column[:, None] * D + d, mask=is_key[:, None], other=0.0)
                    is_seen = is_new[:, None] & is_key[None, :]
                    m, l, y = absorb(q, k, v, is_seen, None if mask is None else mask_row + column[None, :], m, l, y)
            if split == 0:
                k = turned_head(qkv + D, k_weight, k_bias, eps, cos, sin, t, is_new, H, D, R).to(dtype)
                v = tl.load(qkv + 2 * D + t[:, None] * (3 * H * D) + d, mask=is_new[:, None], other=0.0)
                column = length + t
                fits = (is_new & (column < N))[:, None]
                tl.store(keys + column[:, None] * D + d, k, mask=fits)
                tl.store(values + column[:, None] * D + d, v, mask=fits)
                if SPLITS > 0:
                    is_seen = is_new[:, None] & (t[None, :] <= t[:, None])
                    m, l, y = absorb(q, k, v, is_seen, None if mask is None else mask_row + column[None, :], m, l, y)
            if SPLITS > 0:
                l = tl.where(l > 0, l, 1.0)  # in a part without any key to look at, m stays -inf
                y = y / l[:, None]
                if used == 1:
                    tl.store(out + row[:, None] * D + d, y.to(dtype), mask=is_new[:, None])
                else:
                    size = B * T * H
                    tl.store(parts + (split * size + row)[:, None] * D + d, y, mask=is_new[:, None])
                    tl.store(lse + split * size + row, m + tl.log2(l), mask=is_new)
                    tl.debug_barrier()  # all threads have written before one of them says so
                    if tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") == used - 1:
                        tl.store(arrived + tl.program_id(0), 0)  # for the next launch
                        # .cg reads past this core's own cache, which may be older than what other cores have written
                        m = tl.full((M,), -float("inf"), tl.float32)
                        for i in tl.static_range(SPLITS):
                            at = tl.minimum(i, used - 1) * size + row
                            m = tl.maximum(m, tl.load(lse + at, mask=is_new, other=0.0, cache_modifier=".cg"))
                        base = tl.where(m == -float("inf"), 0.0, m)
                        l = tl.zeros((M,), tl.float32)
                        y = tl.zeros((M, D), tl.float32)
                        for i in tl.static_range(SPLITS):
                            at = tl.minimum(i, used - 1) * size + row
                            p = tl.exp2(tl.load(lse + at, mask=is_new, other=0.0, cache_modifier=".cg") - base)
                            p = tl.where(i < used, p, 0.0)
                            l += p
                            y += p[:, None] * tl.load(parts + at[:, None] * D + d, mask=is_new[:, None], other=0.0,
                                                      cache_modifier=".cg")
                        y = y / tl.where(l > 0, l, 1.0)[:, None]
                        tl.store(out + row[:, None] * D + d, y.to(dtype), mask=is_new[:, None])

    @triton.jit
    def normed(x, weight, bias, mean, scale, c):
        """Elements c of LayerNorm(x), or of x where there is no weight, in float32."""
        x = tl.load(x + c).to(tl.float32)
        if weight is not None:
            x = (x - mean) * scale * tl.load(weight + c).to(tl.float32) + tl.load(bias + c).to(tl.float32)
        return x

    @triton.jit
    def product(x, weight, bias, norm_weight, norm_bias, eps, others, y, O, C: tl.constexpr,
                ROWS: tl.constexpr, COLUMNS: tl.constexpr, SQUARE: tl.constexpr):
        """y (O) = f(W LayerNorm(x) + b) + others, where f is relu(.)**2 if SQUARE; what is None is left out.

        Each program takes ROWS outputs at a time, and W in blocks of (ROWS, COLUMNS). A block is asked for before the
        one in front of it is used, the first one before all else: the memory is never without work.
        """
        o, c = tl.arange(0, ROWS).to(tl.int64), tl.arange(0, COLUMNS)
        first, step = tl.program_id(0) * ROWS, tl.num_programs(0) * ROWS
        w = tl.load(weight + (first + o)[:, None] * C + c[None, :], eviction_policy="evict_first")
        mean, scale = 0.0, 1.0
        if norm_weight is not None:
            total = tl.zeros((COLUMNS,), tl.float32)
            for column in tl.static_range(0, C, COLUMNS):
                total += tl.load(x + column + c).to(tl.float32)
            mean = tl.sum(total, 0) / C
            total = tl.zeros((COLUMNS,), tl.float32)
            for column in tl.static_range(0, C, COLUMNS):
                distance = tl.load(x + column + c).to(tl.float32) - mean
                total += distance * distance
            scale = 1 / tl.sqrt(tl.sum(total, 0) / C + eps)
        v = normed(x, norm_weight, norm_bias, mean, scale, c)
        for start in range(first, O, step):
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for column in tl.static_range(0, C, COLUMNS):
                if column + COLUMNS < C:
                    ahead = tl.load(weight + (start + o)[:, None] * C + (column + COLUMNS + c)[None, :],
                                    eviction_policy="evict_first")
                else:
                    ahead = tl.load(weight + (start + step + o)[:, None] * C + c[None, :],
                                    mask=(start + step + o < O)[:, None], eviction_policy="evict_first")
                if C > COLUMNS:
                    v = normed(x, norm_weight, norm_bias, mean, scale, column + c)
                sums += w.to(tl.float32) * v[None, :]
                w = ahead
            result = tl.sum(sums, 1)
            if bias is not None:
                result += tl.load(bias + start + o).to(tl.float32)
            if SQUARE:
                result = tl.maximum(result, 0.0)
                result = result * result
            if others is not None:
                result += tl.load(others + start + o).to(tl.float32)
            tl.store(y + start + o, result.to(y.dtype.element_ty))

    return attend, product


class Kernels:
    """How the kernels are started on one GPU, for a cache of B rows."""

    def __init__(self, rows: int, heads: int, device: torch.device | str) -> None:
        self.cores = torch.cuda.get_device_properties(device).multi_processor_count
        # A core has room for four programs; to join more than 8 parts costs more than it saves
        self.splits = next(n for n in (8, 4, 2, 1) if n == 1 or n * rows * heads <= 4 * self.cores)
        self.arrived = torch.zeros(rows * heads, dtype=torch.int32, device=device)

    def attention(self, qkv: Tensor, layer: Attention, rope: tuple[Tensor, Tensor], mask: Tensor | None,
                  cache: KVCache) -> Tensor:
        """What Attention.forward does between its projections: qkv (B, T, 3*C) -> (B, T, C), keys and values stored.

        For up to 16 new positions all of it is one kernel (a GPU's product of matrices has 16 rows at least). For more,
        the kernel does what comes before attention, and SDPA attends, which is quicker then.
        """
        (B, T, _), H, D = qkv.shape, layer.num_heads, layer.head_dim
        keys, values, N = cache.keys[layer.layer], cache.values[layer.layer], cache.keys.shape[3]
        M, splits = (16, self.splits) if T <= 16 else (32, 0)
        P = min(64, 8192 // (D * keys.itemsize))  # 8 KiB of keys
        norms = [*layer.q_layernorm.parameters(), *layer.k_layernorm.parameters()] or [None] * 4
        qkv, cos, sin = (x.contiguous() for x in (qkv.to(keys.dtype), *rope))  # another dtype: that of autocast
        seen = mask.contiguous() if mask is not None and T <= 16 else None
        rope_stride = 0 if len(cos) == 1 else cos[0].numel()
        mask_stride, width = (0, 0) if seen is None else (seen[0].numel() * (len(seen) > 1), seen.shape[3])
        out = qkv.new_empty(B, T, H, D)
        parts = qkv.new_empty(splits, B, T, H, D, dtype=torch.float32)
        lse = qkv.new_empty(splits, B, T, H, dtype=torch.float32)
        attend, _ = gpu_kernels()
        with torch.cuda.device_of(qkv):
            attend[B * H, -(-T // M), max(splits, 1)](
                qkv, *norms, layer.eps, cos, sin, rope_stride, seen, mask_stride, width, keys, values, cache.position,
                out, parts, lse, self.arrived, B, T, N, H, D, 2 * cos.shape[3], M, P, splits,
                enable_fp_fusion=True)  # the default, of which Triton 3.9 warns that it will change
        if T <= 16:
            return out.flatten(2)
        S = cache.length + T
        y = nn.functional.scaled_dot_product_attention(
            out.transpose(1, 2), keys[:, :, :S], values[:, :, :S], attn_mask=mask, is_causal=mask is None)
        return y.transpose(1, 2).reshape(B, T, H * D)

    def linear(self, x: Tensor, linear: Linear, norm: nn.LayerNorm | None = None, others: Tensor | None = None,
               square: bool = False) -> Tensor:
        """f(linear(norm(x))) + others, (1, 1, O), for one row x (1, 1, C), where f is relu(.)**2 if `square`."""
        O, C = linear.weight.shape
        # Powers of two that divide O and C. The sizes, warps and programs are the quickest of many tried on an H200
        rows, columns = min(2 if C <= 4096 else 1, O & -O), min(4096, C & -C)
        y = x.new_empty(1, 1, O)
        _, product = gpu_kernels()
        with torch.cuda.device_of(x):
            product[min(4 * self.cores, O // rows),](
                x, linear.weight, linear.bias, *((None, None) if norm is None else (norm.weight, norm.bias)),
                0.0 if norm is None else norm.eps, others, y, O, C, rows, columns, square, num_warps=8,
                enable_fp_fusion=True)
        return y


def kernels_for(config: PersimmonConfig, batch_size: int, device: torch.device | str) -> Kernels | None:
    """The kernels for a cache; None where they do not work, as on a CPU."""
    if torch.device(device).type != "cuda" or gpu_kernels() is None or config.head_dim not in (16, 32, 64, 128):
        return None
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # of many kinds: it builds a library, which needs a C compiler and Python's headers
        warnings.warn(f"Triton does not work here ({error}): decoding is slower without its kernels", stacklevel=3)
        return None
    return Kernels(batch_size, config.num_attention_heads, device)


def is_plain(model: PersimmonForCausalLM) -> bool:
    """Whether the model is this file's, so that decode_one computes the same: no part quantized, replaced or hooked.

    Nor may a matrix lie transposed, or be of a width for which `product` has many blocks, and takes long to compile.
    """
    parts = {PersimmonForCausalLM, PersimmonModel, Block, Attention, MLP, Linear, SparseLinear,
             nn.ModuleList, nn.Embedding, nn.LayerNorm, nn.Identity, nn.Dropout}

    def is_known(part: nn.Module) -> bool:
        is_ours = type(part) in parts and all(type(p) is nn.Parameter for p in part.parameters(recurse=False))
        is_hooked = part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)
        return is_ours and not is_hooked

    linears = [part for part in model.modules() if isinstance(part, Linear)]
    return all(map(is_known, model.modules())) and all(
        x.weight.is_contiguous() and x.in_features // min(4096, x.in_features & -x.in_features) <= 16 for x in linears)


def decode_one(model: PersimmonForCausalLM, ids: Tensor, cache: KVCache, tables: tuple[Tensor, Tensor]) -> Tensor:
    """model(ids, cache=cache).logits for one token of one text, ids (1, 1), in five kernels a layer: (1, 1, V).

    tables are rope_tables of all positions that there may be, each (1, N, 1, R/2).
    """
    kernels = cache.kernels
    x = model.model.embed_tokens(ids)  # (1, 1, C)
    rope = [table.index_select(1, cache.position[None]) for table in tables]
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        qkv = kernels.linear(x, attention.query_key_value, norm=block.input_layernorm)  # (1, 1, 3*C)
        y = kernels.attention(qkv, attention, rope, None, cache)  # (1, 1, C)
        x = kernels.linear(y, attention.dense, others=x)  # (1, 1, C)
        h = kernels.linear(x, mlp.dense_h_to_4h, norm=block.post_attention_layernorm, square=True)  # (1, 1, F)
        x = kernels.linear(h, mlp.dense_4h_to_h, others=x)  # (1, 1, C)
    return kernels.linear(x, model.lm_head, norm=model.model.final_layernorm)
