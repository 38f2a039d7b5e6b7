"""Persimmon-8B, Adept's decoder-only language model of 2023, in one file.

To use it in another project, copy this file. Importing it needs only torch; loading weights also
needs safetensors, saving numpy, and Tokenizer sentencepiece. Weights are named as in transformers,
and logits match up to rounding.

    model, tokenizer = PersimmonForCausalLM.from_pretrained(folder), Tokenizer(folder)
    output = model.generate(**tokenizer("The theory of relativity states"), max_new_tokens=20)
    print(tokenizer.decode(output[0]))

    Part I    the model, sampling, generate. Read it from the top; you can stop where it ends.
    Part II   around the model: config.json, weights, tokenizer, chat prompt, classifiers.
    Part III  the same model, faster: a. CPUs, b. int8 and int4, c. CUDA, d. several devices. You
              can delete any of a to d, from its banner to the next: the rest still runs.

Shapes. Each letter means the same axis everywhere:

    B  batch                           H  attention heads                C  hidden size, C = H*D
    T  new positions (or a prompt)     D  head size                      F  feed-forward size, 4*C
    S  cached + new positions          R  part of D that RoPE rotates    L  layers
    N  positions a cache has room for  O  outputs of one Linear          V  vocabulary

What is odd about Persimmon and easy to miss (see megatron/model/transformer.py in the original,
persimmon-ai-labs/adept-inference):

 1. The rows of the fused QKV projection are ordered [head, (q, k, v), D], not [(q, k, v), head, D].
    If you read them in the other order, every shape still fits, but the model writes noise.
 2. Before RoPE, queries and keys each go through a LayerNorm over D, with weight and bias. All
    heads of a layer share these two norms.
 3. RoPE rotates only the first R = D/2 dimensions of a head. It pairs dimension i with i + R/2
    (not 2i with 2i + 1), and its theta is 25000.
 4. The activation is relu(x)**2, which overflows float16 from x = 256 on: use bfloat16.
 5. Every Linear and every norm has a bias, except lm_head, which is not tied to the embedding.
 6. `|ENDOFTEXT|`, id 71013, marks both the beginning and the end of a text. Tokenizer prepends it.
 7. Ids 3 to 70002 are reserved for images, and unused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# === Part I. The model ============================================================================


@dataclass
class PersimmonConfig:
    """The keys of config.json, with the 8B's values. If you add one, see CONFIG_RANGES."""

    vocab_size: int = 262144  # V
    hidden_size: int = 4096  # C
    intermediate_size: int = 16384  # F
    num_hidden_layers: int = 36  # L
    num_attention_heads: int = 64  # H
    max_position_embeddings: int = 16384  # the context: tokens of prompt and answer together
    hidden_dropout: float = 0.0  # in training, on the MLP's output
    attention_dropout: float = 0.0  # in training without a cache, on the attention weights
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02  # standard deviation of new weights
    qk_layernorm: bool = True
    rope_theta: float = 25000.0
    partial_rotary_factor: float = 0.5  # R/D
    bos_token_id: int | None = 71013
    eos_token_id: int | list[int] | None = 71013  # generation stops at any of them
    pad_token_id: int | None = None
    dtype: str | None = None  # of stored weights, e.g. "bfloat16"; from_pretrained's default
    num_labels: int = 2  # of a classifier; if config.json has id2label, its length
    id2label: dict[str, str] | None = None  # "0", "1", ... -> the label's name
    problem_type: str | None = None  # of sequence classification; None: see classification_loss
    classifier_dropout: float | None = None  # of token classification; None: hidden_dropout
    quantization: dict[str, Any] | None = None  # of a quantized folder or model; see quantize_model

    @property
    def head_dim(self) -> int:
        """D"""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """R"""
        return int(self.head_dim * self.partial_rotary_factor)


def rope_tables(position_ids: Tensor, config: PersimmonConfig,
                dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions (B, T), each (B, T, 1, R/2): the 1 broadcasts over heads.

    Rotary position embedding (RoPE; Su et al., arXiv 2104.09864): position p rotates pair i by the
    angle p * theta**(-2i/R), i = 0 ... R/2 - 1. In the 8B, the slowest pair turns once in 2 pi
    theta**(1 - 2/R) = 83,000 positions, or five contexts (two with the usual theta 10000). Angles
    are in float32, as bfloat16 rounds position 257 to 256. Only the tables are rounded to `dtype`.
    """
    R = config.rotary_dim
    two_i = torch.arange(0, R, 2, dtype=torch.float32, device=position_ids.device)  # (R/2)
    inv_freq = 1.0 / config.rope_theta ** (two_i / R)  # (R/2)
    angle = position_ids[..., None, None].float() * inv_freq  # (B, T, 1, R/2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of each head of x, (B, T, H, D): their halves a and b become
    a cos - b sin and b cos + a sin, as in GPT-NeoX. The other dimensions stay."""
    R = 2 * cos.shape[-1]
    a, b = x[..., : R // 2], x[..., R // 2 : R]  # (B, T, H, R/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., R:]), dim=-1)


def causal_mask(input_pos: Tensor, S: int, attention_mask: Tensor | None) -> Tensor | None:
    """Which of S positions each of T new ones sees: bool (1, 1, T, S) or (B, 1, T, S), or None.

    Rows are the new positions, at the cache indices input_pos (T); columns are all cache indices.
    A position sees itself and all before it. Without padding, only the last case needs a mask:
        T = S      nothing is cached: `attention` sets SDPA's `is_causal`, so None
        T = 1      the one new position sees everything, so None
        1 < T < S  new positions after cached ones: row t sees columns 0 ... S - T + t. `is_causal`
                   is wrong here: its triangle starts at the top left, not at the bottom right.
    Zeros in attention_mask (B, S) hide padding, in all three cases. But padding sees itself: a row
    without any True would be 0/0 in the softmax, and SDPA may return NaN.
    For another pattern, like a sliding window, delete the `if` below and make `mask` of row and
    column, not of S: CUDA may pass N. A float mask, in q's dtype, is added to the scores: slower.
    """
    if attention_mask is None and input_pos.shape[0] in (1, S):
        return None
    row = input_pos[:, None]  # (T, 1)
    column = torch.arange(S, device=input_pos.device)  # (S)
    mask = (column <= row)[None, None]  # (1, 1, T, S)
    if attention_mask is not None:
        mask = mask & (attention_mask.bool()[:, None, None] | (column == row))  # (B, 1, T, S)
    return mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D). Without a
    mask, a single position sees all S; several (then T = S) see themselves and those before."""
    is_causal = True if mask is None and q.shape[2] > 1 else False  # torch.compile wants a bool
    return nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)


class KVCache:
    """Keys (after RoPE) and values of all positions so far, so that a pass computes only new ones.

    Memory for N positions is allocated up front: 2*L*C elements per position and row, 576 KiB for
    the 8B in 16 bit. Only the first `length` are in use. Use it under torch.no_grad(), or it keeps
    every graph, and backward fails. Tokens one by one round differently from all at once.
    """

    def __init__(self, config: PersimmonConfig, B: int, N: int, dtype: torch.dtype,
                 device: torch.device | str) -> None:
        shape = (config.num_hidden_layers, B, config.num_attention_heads, N, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)  # (L, B, H, N, D)
        self.values = torch.empty_like(self.keys)  # (L, B, H, N, D)
        self.length = 0

    def positions(self, B: int, T: int) -> tuple[Tensor, int]:
        """The cache indices (T) of T new tokens, and S. ValueError if they do not fit."""
        _, rows, _, N, _ = self.keys.shape
        S = self.length + T
        if B != rows or S > N:
            raise ValueError(f"the cache is for {rows} rows of {N} positions, not {B} of {S}")
        return torch.arange(self.length, S, device=self.keys.device), S

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Store a layer's new k and v, (B, H, T, D), then let q attend to all positions so far."""
        S = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : S] = k
        self.values[layer, :, :, self.length : S] = v
        k, v = self.keys[layer, :, :, :S], self.values[layer, :, :, :S]  # (B, H, S, D)
        return attention(q, k, v, mask)

    def crop(self, length: int) -> None:
        """Set `length`: lower, to forget the last positions; higher, once every layer has stored
        new ones. Do not assign `length` itself: on CUDA, a copy on the GPU has to follow."""
        self.length = length


class Attention(nn.Module):
    """Self-attention. Without the LayerNorms of q and k, scores can grow in training until the
    softmax saturates (Dehghani et al., arXiv 2302.05442)."""

    def __init__(self, config: PersimmonConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, config.attention_dropout  # layer: an index into the cache
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        norm = partial(nn.LayerNorm, config.head_dim, config.layer_norm_eps)
        self.q_layernorm = norm() if config.qk_layernorm else nn.Identity()
        self.k_layernorm = norm() if config.qk_layernorm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None,
                cache: KVCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C); rope from rope_tables, mask from causal_mask."""
        B, T, _ = x.shape
        qkv = self.query_key_value(x)  # (B, T, 3*C), ordered [head, (q, k, v), D]
        q, k, v = qkv.view(B, T, self.num_heads, 3, self.head_dim).unbind(3)  # (B, T, H, D)
        q = apply_rope(self.q_layernorm(q), *rope)  # (B, T, H, D)
        k = apply_rope(self.k_layernorm(k), *rope)  # (B, T, H, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if cache is None:
            y = attention(q, k, v, mask, self.dropout * self.training)  # (B, H, T, D)
        else:
            y = cache.attend(self.layer, q, k, v, mask)  # (B, H, T, D)
        return self.dense(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """W2 h + b2, with h = relu(W1 x + b1)**2. In the 8B, 90% of h is reported to be 0."""

    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        h = self.dense_h_to_4h(x).relu().square()  # (B, T, F)
        return self.dense_4h_to_h(h)


class Block(nn.Module):
    """A pre-norm decoder layer: x + Attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: PersimmonConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None,
                cache: KVCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)  # (B, T, C)
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class ModelOutput(NamedTuple):
    """What PersimmonModel returns: a tuple of one, whose field is named as in transformers."""
    last_hidden_state: Tensor  # (B, T, C), after the final norm


class HeadOutput(NamedTuple):
    """What a model with a head returns."""
    loss: Tensor | None  # the mean, in nats, float32; None without labels
    logits: Tensor  # (B, T, V); of classifiers (B, num_labels) or (B, T, num_labels)


class PersimmonPreTrainedModel(nn.Module):
    """What all models share: initial weights, from_pretrained, save_pretrained."""

    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__()
        self.config, self.folder = config, None  # folder: where it was loaded from

    device = property(lambda self: next(self.parameters()).device, doc="of the embedding")
    dtype = property(lambda self: next(self.parameters()).dtype, doc="of the embedding")

    def init_weights(self, part: nn.Module | None = None) -> None:
        """Initialize Linears and embeddings: matrices normal, with standard deviation
        initializer_range, biases 0. Other modules, like norms, by their reset_parameters()."""
        for m in (self if part is None else part).modules():
            if not isinstance(m, (nn.Linear, nn.Embedding)):
                getattr(m, "reset_parameters", lambda: None)()
            elif not m.weight.is_meta:  # on meta, the first normal_ takes 2 s
                nn.init.normal_(m.weight, std=self.config.initializer_range)
                if getattr(m, "bias", None) is not None:
                    nn.init.zeros_(m.bias)

    def gradient_checkpointing_enable(self) -> None:
        """Save memory: recompute blocks in backward (arXiv 1604.06174). `del block.forward`, for
        each of them, undoes it."""
        for block in self.modules():
            if isinstance(block, Block):
                block.forward = partial(torch.utils.checkpoint.checkpoint,
                                        partial(type(block).forward, block), use_reentrant=False)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: str | torch.dtype = "auto",
                        device: str | torch.device | None = None, **options: Any) -> Any:
        """The model in `folder`, from config.json and safetensors, in eval mode. See `load`."""
        return load(cls, Path(folder), dtype, device, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which transformers can read. See `save`."""
        save(self, Path(folder))


class PersimmonModel(PersimmonPreTrainedModel):
    """From token ids to hidden states: embedding, L blocks, a final norm."""

    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__(config)
        # nn.Embedding() itself is slow on meta (see `load`). Row padding_idx gets no gradient.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False,
            padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.init_weights()

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, cache: KVCache | None = None,
                inputs_embeds: Tensor | None = None) -> ModelOutput:
        """Hidden states of T new tokens, input_ids (B, T) or inputs_embeds (B, T, C).

        attention_mask (B, S) is 1 at tokens and 0 at padding, on either side. It covers cached and
        new positions: with padding in `cache`, pass it every time; without any, leave it out, which
        is faster. Outputs at padding mean nothing. position_ids, (B, T) or (1, T), are only for
        RoPE. By default they count the tokens before each one: 0 0 0 1 2 for a mask 0 0 1 1 1.
        (0 1 2 3 4, as in transformers, does as well: RoPE is relative.)
        Raises ValueError if inputs do not fit each other or the cache, and in float16 training.
        """
        if self.training and self.dtype == torch.float16:
            raise ValueError("training in float16 rounds AdamW's eps to 0: use bfloat16, or eval()")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        if x.dim() != 3 or x.shape[2] != self.config.hidden_size:
            raise ValueError(f"the embedded input is {tuple(x.shape)}, and has to be (B, T, C)")
        B, T, _ = x.shape
        if cache is None:
            input_pos, S = torch.arange(T, device=x.device), T
        else:
            input_pos, S = cache.positions(B, T)
        if attention_mask is not None and attention_mask.shape != (B, S):
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, not {B, S}: (B, S)")
        if position_ids is None and attention_mask is None:
            position_ids = input_pos[None]  # (1, T)
        elif position_ids is None:
            tokens_before = (attention_mask.bool().cumsum(1) - 1).clamp(min=0)  # (B, S)
            position_ids = tokens_before[:, input_pos]  # (B, T)
        elif position_ids.shape not in ((B, T), (1, T)):
            raise ValueError(f"position_ids are {tuple(position_ids.shape)}, not (B, T) = {B, T}")
        rope = rope_tables(position_ids, self.config, x.dtype)
        mask = causal_mask(input_pos, S, attention_mask)
        for block in self.layers:
            x = block(x, rope, mask, cache)  # (B, T, C)
        if cache is not None:
            cache.crop(S)  # all layers have stored their keys and values
        return ModelOutput(self.final_layernorm(x))


class PersimmonForCausalLM(PersimmonPreTrainedModel):
    """The language model: PersimmonModel and a Linear from hidden states to logits."""

    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__(config)
        self.model = PersimmonModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights(self.lm_head)
        self.fast = True  # False: `generate` runs this code alone, without Part III's engines
        self.engine = None  # see engine_for

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, cache: KVCache | None = None,
                inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
                logits_to_keep: int = 0) -> HeadOutput:
        """Logits (B, T, V); with logits_to_keep = n > 0, only those of the last n positions.

        labels (B, T) are input_ids, not shifted: logits at t predict the label at t + 1. Set those
        of padding and of a text's first token to -100: no label. The rest is as in PersimmonModel.
        """
        if logits_to_keep < 0 or (labels is not None and logits_to_keep > 0):
            raise ValueError(f"logits_to_keep = {logits_to_keep}: 0 is all, and a loss needs all")
        output = self.model(input_ids, attention_mask, position_ids, cache, inputs_embeds)
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])  # [:, -0:] is all
        loss = None
        if labels is not None:
            predicted = logits[:, :-1].flatten(0, 1).float()
            loss = nn.functional.cross_entropy(predicted, labels[:, 1:].flatten())
        return HeadOutput(loss, logits)

    def sample(self, *args: Any, **options: Any) -> Tensor:
        """How `generate` draws ids: override or assign it. Do not change the logits in place."""
        return sample(*args, **options)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                 max_length: int | None = None, **options: Any) -> Tensor:
        """The prompts input_ids (B, T) and their continuations: (B, T + new tokens), padded after a
        row's end. Options are those of the function `generate`; max_length counts the prompt."""
        if max_length is not None:
            if "max_new_tokens" in options or max_length <= input_ids.shape[1]:
                raise ValueError("give max_new_tokens or a max_length, which counts the prompt too")
            options["max_new_tokens"] = max_length - input_ids.shape[1]
        new = [step.tokens for step in generate(self, input_ids, attention_mask, **options)]
        return torch.cat((input_ids, torch.tensor(new, device=input_ids.device).T), dim=1)

    def train(self, mode: bool = True) -> PersimmonForCausalLM:
        """As in nn.Module. Training drops the engine, whose copies of weights become stale."""
        self.engine = None if mode else self.engine
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, without the engine, which belongs to this model alone."""
        return {**self.__dict__, "engine": None}


def sample(logits: Tensor, generators: Sequence[torch.Generator], temperature: float,
           top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Draw ids (B) from logits (B, V), row b with generators[b]. Options, in transformers' order:

    temperature  divides the logits; 0 is greedy: the largest logit, the first if several are equal
    top_k        keeps the k likeliest tokens; 0: all (Fan et al., arXiv 1805.04833)
    top_p        keeps the fewest likeliest tokens that add up to top_p (arXiv 1904.09751). On a
                 CPU, give top_k as well: sorting all the 8B's logits takes 20 ms a row
    min_p        keeps those at least min_p times as likely as the likeliest (arXiv 2407.01082)
    """
    if temperature < 1e-30:  # float32 would round a tiny one to 0, and 0 / 0 is NaN
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # (B, V), at most 0
    V = logits.shape[1]
    ids = torch.arange(V, device=logits.device).expand_as(logits)  # (B, V)
    if top_k > 0 or top_p < 1:
        logits, ids = logits.topk(min(top_k or V, V))  # (B, k), the likeliest first
    if top_p < 1:
        p = logits.softmax(-1)  # (B, k)
        is_outside = p.cumsum(-1) - p >= top_p  # the likelier tokens already reach it
        logits = logits.masked_fill(is_outside, -math.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < math.log(min_p), -math.inf)
    # Inverse-CDF sampling: the first i with cumsum[i] >= u * total. u is in (0, 1], as 0 would pick
    # i = 0 even at weight 0. float64 keeps small weights. (torch.multinomial syncs the GPU.)
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    cumsum = logits.exp().cumsum(-1, dtype=dtype)
    random = [torch.rand(1, dtype=dtype, device=logits.device, generator=g) for g in generators]
    u = 1 - torch.stack(random)  # (B, 1)
    choice = torch.searchsorted(cumsum, u * cumsum[:, -1:])  # (B, 1); NaN logits: past the end
    return ids.gather(-1, choice.clamp(max=cumsum.shape[1] - 1))[:, 0]


class Step(NamedTuple):
    """One token for each of B rows; a row that has stopped gets padding and logprob 0.0."""
    tokens: list[int]
    logprobs: list[float]  # by the model alone, in nats: before penalty, temperature and filters
    finish_reasons: list[str | None]  # "stop", "length" or "context": see generate; None: not yet


class Engine:
    """How `generate` runs a model. This one just calls it; Part III's are faster."""

    def __init__(self, model: PersimmonForCausalLM) -> None:
        self.model = model

    def make_cache(self, B: int, N: int, device: torch.device | None = None) -> KVCache:
        """An empty cache for B rows of N positions or more, by default on the model's device."""
        return KVCache(self.model.config, B, N, self.model.dtype, device or self.model.device)

    def next_logits(self, ids: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """Logits (B, V) in float32 after the last of ids (B, T); the next call may overwrite them.
        mask is (B, S) or wider."""
        mask = None if mask is None else mask[:, : cache.positions(*ids.shape)[1]]
        return self.model(ids, mask, cache=cache, logits_to_keep=1).logits[:, -1].float()

    # `prefill` reads the prompt, `decode` one more token per row. Here both are next_logits: edit
    # it to change them, in Part III's engines too. A subclass has to override each by itself.
    prefill = decode = next_logits

    def prepare(self, progress: Callable[[float], None] | None = None) -> None:
        """Do the slow work of the first `decode` now (here: none). progress gets the fraction."""

    def to_host(self, results: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[list, list]]:
        """Each step's ids (B) and log-probabilities (B) as lists. CUDA's yields one step late."""
        for tokens, logprobs in results:
            yield tokens.tolist(), logprobs.tolist()


ENGINES: dict[str, type[Engine]] = {}  # by device; Part III's register themselves


def engine_for(model: PersimmonForCausalLM) -> Engine:
    """The device's engine; plain in training, under autocast, if compiled, or if not model.fast."""
    device, is_compiled = model.device.type, model._compiled_call_impl is not None  # by .compile()
    is_fast = device in ENGINES and model.fast and not model.training and not is_compiled
    kind = ENGINES[device] if is_fast and not torch.is_autocast_enabled(device) else Engine
    if type(model.engine) is not kind:
        model.engine = kind(model)
    return model.engine


def check_options(**options: float) -> None:
    """Raise ValueError for an option of `generate` that is out of range."""
    ranges = {"top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (1e-3, 1e3),
              "seed": (0, 2**63 - 1), "max_new_tokens": (1, math.inf)}
    for name, value in options.items():
        low, high = ranges.get(name, (0, math.inf))
        if value is None or not low <= value <= high:
            raise ValueError(f"{name} = {value} is out of range: it goes from {low} to {high}")


def pad_left(ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Prompts (B, T) and mask with padding moved to the front. ValueError for unusable prompts."""
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(f"the prompt is {tuple(ids.shape)}: it has to be (B, T), with T > 0")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"the prompt has ids from {ids.min()} to {ids.max()}, out of {vocab_size}")
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.bool().to(ids)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask is {tuple(mask.shape)}, the prompt {tuple(ids.shape)}")
    if not mask.any(1).all():
        raise ValueError(f"row {mask.any(1).tolist().index(False)} of the prompt is all padding")
    order = mask.argsort(dim=1, stable=True)  # (B, T): padding first, tokens in their old order
    return ids.gather(1, order), mask.gather(1, order)


@torch.no_grad()
def generate(model: PersimmonForCausalLM, input_ids: Tensor, attention_mask: Tensor | None = None,
             *, max_new_tokens: int = 200, temperature: float = 0.0, top_k: int = 0,
             top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
             seed: int | None = None, stop_ids: Iterable[int] | None = None,
             cache: KVCache | None = None) -> Iterator[Step]:
    """Continue prompts by one token per row and step, until every row has stopped.

    The prompts are input_ids (B, T); attention_mask (B, T) is 0 at padding, on either side. Except
    for rounding, rows do not depend on each other. Row b uses seed + b; without a seed, each call
    draws one (not by torch.manual_seed). Make a `cache` with engine_for(model).make_cache(B, N). If
    it holds the start of unpadded prompts, still pass these whole: only the rest is computed. Ids
    are not compared: first crop it to the start that they share. A row ends for these reasons:
        "stop"     it has one of stop_ids, by default eos_token_id
        "length"   it has max_new_tokens
        "context"  it has max_position_embeddings tokens, or `cache` is full

    The first step raises ValueError for options out of range and for prompts that are empty, have
    ids outside the vocabulary, or fill the context. Any step: FloatingPointError for NaN logits.
    """
    seed = torch.Generator().seed() % 2**62 if seed is None else seed  # room for + b
    check_options(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                  min_p=min_p, repetition_penalty=repetition_penalty, seed=seed)
    config, context = model.config, model.config.max_position_embeddings
    device = model.device if model.device.type != "meta" else input_ids.device  # meta: offloaded
    ids, mask = pad_left(input_ids.to(device, torch.long), attention_mask, config.vocab_size)
    B, T = ids.shape
    lengths = mask.sum(1).tolist()  # of the prompts, without padding
    is_padded = min(lengths) < T
    steps = min(max_new_tokens, context - min(lengths))  # until the shortest fills the context
    N = T + steps - 1 if cache is None else cache.keys.shape[3]  # the last token is not stored
    steps = min(steps, N + 1 - T)
    if max(lengths) >= context or steps < 1:
        room = f"context of {context}" if max(lengths) >= context else f"cache of {N}"
        raise ValueError(f"the prompt of {T} tokens fills the {room}")
    if cache is None:
        cache = engine_for(model).make_cache(B, N, device)
    elif cache.length >= T or (is_padded and cache.length > 0):
        raise ValueError(f"a cache of {cache.length} needs a longer, unpadded prompt: not {T}")
    eos, pad = config.eos_token_id, config.pad_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else eos
    stop_ids = set(eos if stop_ids is None else map(int, stop_ids))
    pad = pad if pad is not None else eos[0] if eos else 0
    generators = [torch.Generator(device).manual_seed(s) for s in range(seed, seed + B)]
    seen = torch.zeros(B, config.vocab_size, dtype=torch.bool, device=device)  # (B, V), to penalize
    seen.scatter_(1, torch.where(mask > 0, ids, ids[:, -1:]), True)  # padding: the last id again
    mask = torch.cat((mask, mask.new_ones(B, steps - 1)), dim=1) if is_padded else None
    reasons: list[str | None] = [None] * B

    def results() -> Iterator[tuple[Tensor, Tensor]]:
        """Each step's ids (B) and their log-probabilities (B), still on the device."""
        new = ids[:, cache.length :]  # what the cache lacks of the prompt; later, one token per row
        for step in range(1, steps + 1):
            engine = engine_for(model)  # the caller may change the model between steps
            next_logits = engine.prefill if step == 1 else engine.decode
            logits = next_logits(new, mask, cache)  # (B, V)
            penalized = logits
            if (r := repetition_penalty) != 1:  # of ids in prompt and answer (arXiv 1909.05858)
                penalized = torch.where(logits > 0, logits / r, logits * r)  # (B, V)
                penalized = torch.where(seen, penalized, logits)  # (B, V)
            new = model.sample(penalized, generators, temperature, top_k, top_p, min_p)[:, None]
            seen.scatter_(1, new, True)
            yield new[:, 0], logits.gather(1, new)[:, 0] - logits.logsumexp(-1)

    for step, (tokens, logprobs) in enumerate(engine_for(model).to_host(results()), start=1):
        if any(map(math.isnan, logprobs)):
            cause = "use bfloat16" if model.dtype == torch.float16 else "are the weights damaged?"
            raise FloatingPointError(f"token {step}: the logits are NaN in {model.dtype}: {cause}")
        for b, token in enumerate(tokens):
            if reasons[b] is not None:
                tokens[b], logprobs[b] = pad, 0.0  # in the output; the model reads what it drew
            elif token in stop_ids:
                reasons[b] = "stop"
            elif step == max_new_tokens:
                reasons[b] = "length"
            elif lengths[b] + step == context or step == steps:
                reasons[b] = "context"
        yield Step(tokens, logprobs, list(reasons))
        if None not in reasons:
            return


# === Part II. Around the model ====================================================================

import json
import os
import re
import shutil
import warnings
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import chain
from typing import get_args, get_origin, get_type_hints

# --- config.json ----------------------------------------------------------------------------------
# Stored in config.json. If you edit the model, change a value, so that others refuse your folders.
ARCHITECTURE = {"model_type": "persimmon", "hidden_act": "relu2", "tie_word_embeddings": False}
DTYPES = ("bfloat16", "float16", "float32")
# Each field's types: of `int | list[int] | None`, they are [int, list, NoneType].
CONFIG_TYPES = {name: [get_origin(kind) or kind for kind in get_args(hint) or (hint,)]
                for name, hint in get_type_hints(PersimmonConfig, vars()).items()}
CONFIG_RANGES = {  # lowest and highest, or all strings; other numbers go from 1e-30 to 2**28
    "hidden_dropout": (0, 1), "attention_dropout": (0, 1), "classifier_dropout": (0, 1),
    "bos_token_id": (0, 2**28), "pad_token_id": (0, 2**28), "eos_token_id": (0, 2**28),
    "num_hidden_layers": (1, 2**12), "num_labels": (1, 2**16), "dtype": DTYPES,
    "problem_type": ("regression", "single_label_classification", "multi_label_classification")}


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError, and ValueError for any other content."""
    if not file.is_file():  # reading a pipe could wait forever
        raise FileNotFoundError(f"no file {file}: a model's folder has to hold it")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, brackets nested too deep
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} has to hold a JSON object, not a {type(value).__name__}")
    return value


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch.dtype of a name in DTYPES, or of itself; ValueError for any other."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {name} is not supported: use one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def checked_config(**values: Any) -> PersimmonConfig:
    """PersimmonConfig(**values); ValueError if a value's type is wrong or no model can have it."""
    config = PersimmonConfig(**values)
    for name, types in CONFIG_TYPES.items():
        value, allowed = getattr(config, name), CONFIG_RANGES.get(name, (1e-30, 2**28))
        kind, key = type(value), f"config key {name} = {value!r}"
        if kind not in types and (kind, types[0]) != (int, float):  # and True is not an int
            raise ValueError(f"{key} is not of type {types[0].__name__}")
        if kind is str and name in CONFIG_RANGES and value not in allowed:
            raise ValueError(f"{key} is none of {', '.join(allowed)}")
        numbers = value if kind is list else [value] if kind in (int, float) else []
        if not all(type(x) in (int, types[0]) and allowed[0] <= x <= allowed[1] for x in numbers):
            raise ValueError(f"{key} is not from {allowed[0]} to {allowed[1]}")
    C, H, D, R = config.hidden_size, config.num_attention_heads, config.head_dim, config.rotary_dim
    if C != H * D:
        raise ValueError(f"config key hidden_size = {C} is not a multiple of {H} attention heads")
    if R not in range(2, D + 1, 2):
        raise ValueError(f"config key partial_rotary_factor: RoPE can't pair {R} of {D} dimensions")
    pad, V, labels, K = config.pad_token_id, config.vocab_size, config.id2label, config.num_labels
    if pad is not None and pad >= V:
        raise ValueError(f"config key pad_token_id = {pad} is not in the vocabulary of {V}")
    if labels is not None and len(labels) != K:
        raise ValueError(f"config key num_labels = {K}, but id2label has {len(labels)} labels")
    return config


def load_config(folder: str | Path) -> PersimmonConfig:
    """The config in config.json, as the hub had it in 2023 or as transformers 5 writes it. An
    eos_token_id in generation_config.json wins. ValueError for fields and keys of `required` with
    values that a Persimmon can't have; other keys (use_cache, ...) are ignored."""
    settle(Path(folder))  # a save may have been interrupted
    values, rope = read_json(Path(folder) / "config.json"), {}
    for key in ("rope_scaling", "rope_parameters"):  # 2023's, often null, and transformers 5's
        if not isinstance(values.get(key) or {}, dict):
            raise ValueError(f"config key {key} = {values[key]!r} is not an object")
        rope |= {k: v for k, v in (values.get(key) or {}).items() if v is not None}
    values |= {**rope, "quantization": None,  # it comes from quantization_config, below
               "dtype": values.get("dtype") or values.get("torch_dtype")}
    generation = Path(folder) / "generation_config.json"
    if generation.is_file() and (stop := read_json(generation).get("eos_token_id")) is not None:
        values["eos_token_id"] = stop
    method = values.get("quantization_config")
    if isinstance(method, dict) and method.get("quant_method") == "persimmon.py":
        values |= {"quantization_config": None, "quantization": {
            "quantize": str(method.get("quantize")), "group_size": method.get("group_size", 128)}}
    if isinstance(values.get("id2label"), dict):
        values["num_labels"] = len(values["id2label"])
    # null means the default, unless it has a meaning of its own, such as "no such token".
    config = checked_config(**{
        name: values[name] for name, types in CONFIG_TYPES.items()
        if name in values and (values[name] is not None or type(None) in types)})
    harmless = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    required = {key: None for key in rope if key not in harmless}  # others change RoPE
    required |= {**ARCHITECTURE, "rope_type": "default", "type": "default",
                 "quantization_config": None, "head_dim": config.head_dim,
                 "num_key_value_heads": config.num_attention_heads}
    for key, value in required.items():
        if values.get(key) not in (None, value):
            raise ValueError(f"config key {key} = {values[key]!r} is not supported, only {value!r}")
    return config


def write_config(folder: Path, model: PersimmonPreTrainedModel) -> None:
    """Write config.json, for this file and for old and new versions of transformers, and
    generation_config.json, with the dtype that the weights have."""
    dtype = str(model.dtype).removeprefix("torch.")
    values = asdict(checked_config(**asdict(model.config) | {"dtype": dtype}))
    rope = {name: values[name] for name in ("rope_theta", "partial_rotary_factor")}
    if quantization := values.pop("quantization"):
        values["quantization_config"] = {"quant_method": "persimmon.py", **quantization}
    raw = {"architectures": [type(model).__name__], **ARCHITECTURE, **values, "torch_dtype": dtype,
           "rope_scaling": None, "rope_parameters": {"rope_type": "default", **rope}}
    ids = {name: value for name, value in raw.items() if name.endswith("_token_id")}
    for name, content in ("config.json", raw), ("generation_config.json", ids):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- Loading and saving ---------------------------------------------------------------------------
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                   "special_tokens_map.json")
SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32",
                      torch.uint8: "U8", torch.int8: "I8"}  # the integers: quantized matrices
QUANTIZERS: dict[str, Callable[..., Any]] = {}  # by kind, Part III's quantize_model


def unreadable(file: Path, kind: str, reason: object) -> ValueError:
    """The ValueError for a file that a library can't read as a file of this kind."""
    with file.open("rb") as opened:
        if opened.read(99).startswith(b"version https://git-lfs"):
            return ValueError(f"{file} is a pointer of Git LFS: fetch the file with `git lfs pull`")
    return ValueError(f"{file} is cut off, damaged or no {kind}: {reason}")


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in model.safetensors, or in the shards that its index lists, by their names. They
    are mapped into memory: pages are read when first used, and changes never reach the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not single.is_file() and not index.is_file():
        raise FileNotFoundError(f"{folder} holds no {single.name} or {index.name}: convert .bin "
                                f"files with `python convert.py {folder} {folder}-safetensors`")
    shards = {"": single.name} if single.is_file() else read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to files")
    tensors: dict[str, Tensor] = {}
    for shard in sorted({*shards.values()}):
        file = folder / shard
        if Path(shard).name != shard or not file.is_file():
            raise FileNotFoundError(f"{index} lists {shard}, which is not a file of its folder")
        file.open("rb").close()  # PermissionError: load_file would say that there is no such file
        try:
            new = load_file(file)
        except SafetensorError as error:
            raise unreadable(file, "safetensors file", error) from None
        if twice := tensors.keys() & new.keys():
            raise ValueError(f"{file} has the tensor {min(twice)}, and so has another file")
        tensors |= new
    return tensors


def load(cls: type[PersimmonPreTrainedModel], folder: Path, dtype: str | torch.dtype,
         device: str | torch.device | None, progress: Callable[[float], None] | None = None,
         quantize: str | None = None, group_size: int = 128,
         **changes: Any) -> PersimmonPreTrainedModel:
    """Implements from_pretrained. Raises FileNotFoundError for what is missing; ValueError, naming
    the file or tensor, for what is damaged or does not fit. A missing head is new, with a warning.

    dtype     "auto" is config.json's, else the file's own. On a CPU, weights in the file's dtype
              are mapped: pages are read when first used, and training never changes the file
    progress  is called with the fraction that is done
    quantize  "int8", or "int4" in groups of group_size inputs; a quantized folder stays as it is
    changes   replace values of config.json, as in num_labels=3"""
    if unknown := changes.keys() - CONFIG_TYPES.keys():
        raise ValueError(f"from_pretrained has no {min(unknown)}=: see `load`, or model.fast")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: a model is a folder on this disk")
    config = checked_config(**(asdict(load_config(folder)) | changes))
    stored_kind = (config.quantization or {}).get("quantize")
    if unknown := {stored_kind, quantize} - {None, *QUANTIZERS}:
        raise ValueError(f"quantize = {min(unknown)!r} for {folder}: this copy of persimmon.py has "
                         f"{' and '.join(QUANTIZERS) or 'neither int8 nor int4'}")
    quantize = None if quantize == stored_kind else quantize
    tensors = read_safetensors(folder)
    with torch.device("meta"):  # without memory: the tensors of the file become the weights
        model = cls(config)
        if stored_kind is not None:
            QUANTIZERS[stored_kind](model, stored_kind, config.quantization["group_size"])

    # The files have to hold exactly the model's tensors, with two exceptions: a bare model's names
    # may lack `model.`, so compare all names without it; and the folder's model may have another
    # head, or none: then skip that head, and make a new one.
    state, heads = model.state_dict(), ("score.", "lm_head.")
    full_names = {name.removeprefix("model."): name for name in state}
    new = {name for name in full_names if name.startswith(heads)}
    is_own = cls.__name__ in str(read_json(folder / "config.json").get("architectures"))
    if new and (is_own or new & tensors.keys() or (stored_kind and cls is PersimmonForCausalLM)):
        new, heads = set(), ()  # the head has to be there; a new one would not be quantized
    stored = {name.removeprefix("model."): tensor for name, tensor in tensors.items()
              if not (name.startswith(heads) or name.endswith("inv_freq"))}  # in some old files
    if any(f"model.{name}" in tensors for name in tensors):
        raise ValueError(f"{folder} has tensors twice, with and without `model.` in front")
    if missing := full_names.keys() - stored.keys() - new:
        raise ValueError(f"{folder} lacks the tensor {min(missing)} ({len(missing)} in all)")
    if extra := stored.keys() - full_names.keys():
        raise ValueError(f"{folder} has the tensor {min(extra)}, which is not in a {cls.__name__} "
                         f"of this config.json ({len(extra)} unexpected in all)")

    if dtype == "auto":
        dtypes = (t.dtype for t in stored.values() if t.is_floating_point())
        dtype = config.dtype or next(dtypes, torch.float32)  # without any, all are refused below
    target = as_dtype(dtype)
    for count, (name, tensor) in enumerate(stored.items(), 1):
        empty, what = state[full_names[name]], f"{folder} has the tensor {name}"
        if tensor.shape != empty.shape:
            raise ValueError(f"{what} in shape {tuple(tensor.shape)}: config.json makes it "
                             f"{tuple(empty.shape)}")
        is_float = empty.is_floating_point()
        if tensor.dtype != empty.dtype and not (is_float and tensor.is_floating_point()):
            raise ValueError(f"{what} as {tensor.dtype}: config.json makes it {empty.dtype}")
        state[full_names[name]] = tensor.to(device or "cpu", target if is_float else tensor.dtype)
        if progress is not None and quantize is None:  # else the quantizer reports progress
            progress(count / len(stored))
    state |= {n: torch.zeros_like(state[n], dtype=target, device=device or "cpu") for n in new}
    first: dict[nn.Parameter, nn.Parameter] = {}  # an edited model may tie parameters
    for name, p in model.named_parameters(remove_duplicate=False):
        state[name] = first.setdefault(p, nn.Parameter(state[name], p.requires_grad))
    model.load_state_dict(state, assign=True)
    del state, stored, tensors, tensor, first  # so that a quantizer frees what it replaces
    if new := new & dict(model.named_parameters()).keys():  # a tied head is not new
        model.init_weights(model.get_submodule(min(new).split(".")[0]))
        warnings.warn(f"{folder} has no {' and '.join(sorted(new))} for a {cls.__name__}: new, "
                      "random, and to be trained", stacklevel=3)
    if quantize is not None:
        QUANTIZERS[quantize](model, quantize, group_size, progress)
    model.folder = folder.absolute()
    return model.eval()


def write_safetensors(file: Path, tensors: Sequence[tuple]) -> None:
    """Write a safetensors file (https://github.com/huggingface/safetensors#format). Each tensor is
    given as (name, dtype, shape, pieces): tensors of that dtype which hold its values in order."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape, _ in tensors:
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    # Mapped weights are used in place, and PyTorch's int8 kernel needs them aligned to 16 bytes: so
    # the data begins at a multiple of 64. (The safetensors library only aligns to 8.)
    text += b" " * (-(8 + len(text)) % 64)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for piece in chain.from_iterable(pieces for *_, pieces in tensors):
            out.write(piece.contiguous().cpu().view(torch.uint8).numpy())  # numpy has no bfloat16
        out.flush()
        os.fsync(out.fileno())


def settle(folder: Path) -> None:
    """Finish a `staging` that was interrupted in its last step: move the files, all complete."""
    complete = folder / ".complete"
    with suppress(FileNotFoundError, NotADirectoryError):  # nothing to do, or just done
        for file in [] if complete.is_symlink() else list(complete.iterdir()):
            with suppress(FileNotFoundError):  # another process has just moved it
                file.replace(folder / file.name)
        complete.rmdir()


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yields an empty folder. When the block ends, its files move to `folder`: all, or after an
    error none. A new `folder` appears complete; in an old one, they replace files of the same name,
    all other weights, and with a tokenizer.model the rest of another tokenizer. ValueError if
    another process is saving there; OSError is passed on."""
    folder = Path(os.path.realpath(folder))  # follows a link: a rename can't go to another disk
    exists = folder.exists()
    scratch = folder / ".unfinished" if exists else folder.with_name(f"{folder.name}.unfinished")
    new = scratch / "new"
    scratch.mkdir(parents=True, exist_ok=True)
    if scratch.is_symlink() or not {*os.listdir(scratch)} <= {"new", "lock"}:
        raise ValueError(f"{scratch} is in the way: files are first written there")
    with (scratch / "lock").open("a") as lock:  # not "w", which would empty a link's target
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        except BlockingIOError:
            raise ValueError(f"another process is writing {folder}") from None
        except (ImportError, OSError):
            pass  # Windows has no such locks, nor do some network disks
        try:
            shutil.rmtree(new, ignore_errors=True)  # left by a process that was killed
            new.mkdir()
            yield new
            if not exists:
                new.rename(folder)  # fails if something is there by now
                return
            settle(folder)
            names = {*os.listdir(new)}
            new.rename(folder / ".complete")  # from here on, the new files count
            try:
                settle(folder)
            finally:  # after Ctrl-C
                settle(folder)
            old = r"model-\d+-of-\d+.safetensors|model.*.safetensors.*index.json"
            old += "|".join(("", *TOKENIZER_FILES)) * ("tokenizer.model" in names)
            for name in filter(re.compile(old).fullmatch, {*os.listdir(folder)} - names):
                (folder / name).unlink()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def save(model: PersimmonPreTrainedModel, folder: Path) -> None:
    """Implements save_pretrained, by `staging`. The tokenizer's files are copied from the folder
    that the model was loaded from, if `folder` has no tokenizer.model or another than that one."""
    tensors = [(name, t.dtype, t.shape, [t]) for name, t in model.state_dict().items()]
    with staging(folder) as new:
        write_config(new, model)
        write_safetensors(new / "model.safetensors", tensors)
        own, old = ((place or folder) / "tokenizer.model" for place in (model.folder, folder))
        is_kept = old.is_file() and (not own.is_file() or old.read_bytes() == own.read_bytes())
        for name in TOKENIZER_FILES if not is_kept else ():
            if model.folder and (model.folder / name).is_file():
                shutil.copyfile(model.folder / name, new / name)


# --- Tokenizer, streaming, chat prompt ------------------------------------------------------------
class Inputs(dict[str, Tensor]):
    """Arguments for a model, as in model(**inputs)."""

    def to(self, device: torch.device | str) -> Inputs:
        """The same on another device."""
        return Inputs({name: tensor.to(device) for name, tensor in self.items()})


class Tokenizer:
    """SentencePiece (unigram with byte fallback). Each text begins with `|ENDOFTEXT|`, unless
    add_bos_token is false in tokenizer_config.json. `path` is a folder with tokenizer.model, or
    the SentencePiece file itself, such as `adept_vocab.model` in Adept's release."""

    def __init__(self, path: str | Path) -> None:
        from sentencepiece import SentencePieceProcessor
        file = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}: the tokenizer is a SentencePiece model")
        try:
            self.processor = SentencePieceProcessor(model_file=str(file))
        except RuntimeError as error:
            raise unreadable(file, "SentencePiece model", error) from None
        end = self.processor.piece_to_id("|ENDOFTEXT|")
        self.end_of_text = self.processor.eos_id() if self.processor.is_unknown(end) else end
        if self.end_of_text < 0:
            raise ValueError(f"{file} has no piece |ENDOFTEXT| and no other end of text")
        config = file.with_name("tokenizer_config.json")
        settings = read_json(config) if config.is_file() else {}
        if settings.get("add_eos_token"):
            raise ValueError(f"{config} asks for add_eos_token, which is not supported")
        self.add_bos = settings.get("add_bos_token") is not False

    def __len__(self) -> int:
        """Number of pieces."""
        return len(self.processor)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Ids of a text, `|ENDOFTEXT|` first if add_bos (None: as tokenizer_config.json says)."""
        if re.search("[\ud800-\udfff]", text):  # surrogates, which UTF-8 can't encode
            raise ValueError("the text is not valid Unicode")
        add_bos = self.add_bos if add_bos is None else add_bos
        return [self.end_of_text] * add_bos + self.processor.encode(text)

    def decode(self, ids: Iterable[int] | Tensor | int, skip_special_tokens: bool = True) -> str:
        """The text of one list of ids. Invalid UTF-8 becomes U+FFFD and an unknown id U+2047;
        skip_special_tokens leaves out `|ENDOFTEXT|`."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids  # a tensor, or numpy's array
        end, unk = self.end_of_text, self.processor.unk_id()
        texts: list[list[int]] = [[]]  # the ids between two |ENDOFTEXT|
        for i in [ids] if isinstance(ids, int) else ids:
            if isinstance(i, list):
                raise ValueError("decode takes the ids of one text, not of several")
            if i == end and not skip_special_tokens:
                texts.append([])
            elif i != end:
                texts[-1].append(int(i) if 0 <= i < len(self) else unk)
        return self.processor.id_to_piece(end).join(map(self.processor.decode, texts))

    def __call__(self, text: str | Sequence[str], return_tensors: str = "pt") -> Inputs:
        """input_ids and attention_mask, both (B, T), of one or more texts, padded on the left."""
        if return_tensors != "pt":
            raise ValueError(f"return_tensors = {return_tensors!r} is not supported: use 'pt'")
        rows = [self.encode(t) for t in ([text] if isinstance(text, str) else text)]
        T = max(map(len, rows), default=0)
        ids = [[self.end_of_text] * (T - len(row)) + row for row in rows]
        mask = [[0] * (T - len(row)) + [1] * len(row) for row in rows]
        return Inputs(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())


class StreamDecoder:
    """Decodes ids one by one: what `push` and `finish` return adds up to the text of all the ids.
    Decoding each id alone would break characters of several byte pieces, and lose spaces, as
    SentencePiece drops a leading one. (Hence prompt_ids, whose text is not returned.)"""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.context: list[int] = []  # the text's first ids; decoded again in front of `pending`
        self.pending: list[int] = []  # not returned yet: they may end within a character
        for i in prompt_ids:
            self.push(i)

    def push(self, token: int | Tensor) -> str:
        """The text that `token` completes: often a word, sometimes nothing."""
        self.pending.append(int(token))
        # A character of several byte pieces is U+FFFD as long as its last bytes are missing.
        is_cut = self.tokenizer.decode(self.pending[-8:]).endswith("\ufffd")
        return "" if is_cut else self.finish()

    def finish(self) -> str:
        """The rest of the text, with U+FFFD for bytes that never became a character."""
        before = self.tokenizer.decode(self.context)
        text = self.tokenizer.decode(self.context + self.pending)[len(before) :]
        if not before:  # only a text's first piece loses its space: after it, any context will do
            self.context += self.pending
        self.pending = []
        return text


def chat_prompt(turns: Sequence[str]) -> str:
    """The prompt for an answer to turns of human, adept, ..., human (Adept's README, note 1)."""
    if isinstance(turns, str) or len(turns) % 2 == 0:
        raise ValueError("turns have to be a list that ends with a human's turn, not a "
                         f"{type(turns).__name__} of {len(turns)}")
    return "".join(f" {turn.strip()}\n\n" if n % 2 else f"human: {turn}\n\nadept:"
                   for n, turn in enumerate(turns))


# --- Classifiers ----------------------------------------------------------------------------------
def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """The loss of logits (B, K) for K labels, chosen as in transformers (loss/loss_utils.py).

    regression                   mean squared error; labels (B, K). Default for K = 1, then also (B)
    single_label_classification  cross-entropy; labels (B), 0 to K - 1. Default for integer labels
    multi_label_classification   mean binary cross-entropy; labels (B, K), 0.0 to 1.0"""
    default, is_integer = problem_type is None, labels.dtype in (torch.long, torch.int)
    if problem_type == "regression" or (default and logits.shape[1] == 1):
        return nn.functional.mse_loss(logits.flatten(), labels.flatten().float())
    if problem_type == "single_label_classification" or (default and is_integer):
        return nn.functional.cross_entropy(logits, labels.flatten().long())
    return nn.functional.binary_cross_entropy_with_logits(logits, labels.float())


class PersimmonForSequenceClassification(PersimmonPreTrainedModel):
    """A label for each text: a Linear without bias on the hidden state of its last token."""

    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__(config)
        self.model = PersimmonModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.init_weights(self.score)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
                labels: Tensor | None = None) -> HeadOutput:
        """Logits (B, num_labels); labels as in classification_loss, the rest as in PersimmonModel.
        As in transformers, a text ends with the rightmost id that is not pad_token_id, whatever
        attention_mask says; inputs_embeds end at T. ValueError for B > 1 without pad_token_id."""
        x = self.model(input_ids, attention_mask, position_ids, None, inputs_embeds)[0]  # (B, T, C)
        (B, T, _), pad = x.shape, self.config.pad_token_id
        if pad is None and B > 1:
            raise ValueError(f"to find where {B} texts end, config.json needs a pad_token_id")
        position = torch.arange(T, device=x.device).expand(B, T)  # (B, T)
        if pad is not None and input_ids is not None:
            position = position * (input_ids != pad)  # (B, T)
        last = position.argmax(-1)  # (B)
        logits = self.score(x[torch.arange(B, device=x.device), last])
        loss = None if labels is None else classification_loss(
            logits.float(), labels, self.config.problem_type)
        return HeadOutput(loss, logits)


class PersimmonForTokenClassification(PersimmonPreTrainedModel):
    """A label for each token: dropout in training, then a Linear with bias on each hidden state."""

    def __init__(self, config: PersimmonConfig) -> None:
        super().__init__(config)
        self.model = PersimmonModel(config)
        p = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout if p is None else p)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights(self.score)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
                labels: Tensor | None = None) -> HeadOutput:
        """Logits (B, T, num_labels); labels (B, T), -100 is ignored; the rest as PersimmonModel."""
        x = self.model(input_ids, attention_mask, position_ids, None, inputs_embeds)[0]  # (B, T, C)
        logits = self.score(self.dropout(x))
        loss = None if labels is None else nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten())
        return HeadOutput(loss, logits)


__all__ = ["PersimmonConfig", "PersimmonModel", "PersimmonForCausalLM", "KVCache", "generate",
           "sample", "Step", "engine_for", "load_config", "Tokenizer", "StreamDecoder",
           "chat_prompt", "PersimmonForSequenceClassification", "PersimmonForTokenClassification"]


# === Part III. Faster =============================================================================
#
# An engine replaces the `forward` of modules, but only during its own passes, and only if they are
# unmodified. Code that repeats what Part I computes first finds out whether it still does, so you
# can edit Part I: on CUDA it is compared with the model's own blocks, by `parallelize` with the
# attention and MLP of the first two, and on CPUs a checksum tells if attention was edited.

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache


def is_unmodified(module: Any, *kinds: type) -> bool:
    """Whether it is of one of these very classes, in eval mode, with plain parameters, unhooked."""
    return (type(module) in kinds and not module.training
            and not (module._forward_hooks or module._forward_pre_hooks)
            and isinstance(vars(module).get("forward"), (PassForward, type(None)))
            and all(type(p) is nn.Parameter for p in module._parameters.values() if p is not None))


class PassForward(partial):
    """A module's `forward` in a pass. If another thread copies the module, it is plain there."""

    def __reduce__(self) -> tuple[Any, ...]:
        return PassForward, (type(self.args[0]).forward, self.args[0])


@contextmanager
def replaced_forward(forwards: dict[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """A context in which each of these modules runs the given function as its `forward`."""
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)


def is_as_exact(fast: Tensor, plain: Tensor, exact: Tensor) -> bool:
    """Whether the error of `fast` against `exact`, in float32, is at most twice that of `plain`."""
    rounding = max(1e-5, torch.finfo(fast.dtype).eps) * exact.norm()
    return bool((fast - exact).norm() <= 2 * (plain - exact).norm() + rounding)  # False for NaN


def nonzero_bags(x: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """The nonzeros of x (B, F) for embedding_bag: their columns, row by row; their values; and
    where bags start, (B, bags): a row is cut into bags for all cores. None if there are more than
    limit*F. Not for torch.compile, as shapes depend on x."""
    (B, F), x = x.shape, x.flatten()  # (B*F)
    index = (x != 0).nonzero()[:, 0].int()  # int32 is faster in embedding_bag
    if len(index) > limit * F:
        return None
    bags = 4 * torch.get_num_threads()
    edge = torch.arange(B * bags, device=x.device) * F // bags  # (B*bags), where a bag begins
    start = torch.searchsorted(index, edge.int(), out_int32=True)  # (B*bags)
    return index % F, x[index], start.view(B, bags)


def fingerprints(weights: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Values that change when a weight does. `_version` misses changes by .data: hence the sample,
    which in turn misses changes to a few rows or columns (then set model.engine = None)."""
    samples = [w.as_strided((61,), (w.numel() // 61,)).to(weights[0].device) for w in weights]
    values = torch.stack(samples).tolist() if samples else []  # stacked, to wait for a GPU once
    return [(w.data_ptr(), w.stride(), None if w.is_inference() else w._version, sample)
            for w, sample in zip(weights, values)]


def cpu_has(feature: str) -> bool:
    """Whether this CPU has "avx2", "avx512_bf16" or "amx_tile" (Intel's servers since 2023)."""
    return getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()  # private to PyTorch


def is_faster_in_float32(x: Tensor) -> bool:
    """Whether x (rows, C) is multiplied faster in float32: 16 rows or more on an x86 CPU without
    AVX512-BF16, like Intel's in laptops and AMD's before Zen 4, or, in float16, without AMX."""
    feature = "avx512_bf16" if x.dtype == torch.bfloat16 else "amx_tile"
    is_slow = cpu_has("avx2") and not cpu_has(feature)
    return x.is_cpu and len(x) >= 16 and x.itemsize == 2 and is_slow


def available_memory(device: torch.device) -> float:
    """Free memory in bytes; on a GPU half of it, to leave KV caches room; infinity if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + unused) / 2
    with suppress(OSError, TypeError):  # not on Linux
        return 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])
    return math.inf


class Table(NamedTuple):
    """A weight in another layout; of a down-projection, transposed."""
    rows: Tensor  # (F, C)
    weight: Tensor  # what it was made from
    fingerprint: tuple[Any, ...]  # of the weight at that time


class TableEngine(Engine):
    """An engine that reads only the columns of a down-projection whose activations are not zero.
    For that it keeps the transposed weight in a table, whose rows are contiguous: 4.8 GB in all for
    the 8B in 16 bit. Tables are made before the second token, if there is memory (on a GPU only for
    a single text), and again at the next prompt after a weight has changed."""

    large = 2**22  # bytes; a smaller matrix stays in a CPU's cache, where F.linear is fastest

    def __init__(self, model: PersimmonForCausalLM) -> None:
        super().__init__(model)
        self.linears: list[nn.Linear] = []  # those with a large weight
        self.downs: list[nn.Linear] = []  # the down-projections among them that are to get a table
        self.tables: dict[nn.Linear, Table] = {}

    def find_linears(self, modules: Sequence[nn.Module]) -> None:
        """Find the Linears with a large weight, and those for which `prepare` makes tables."""
        self.linears = [m for m in modules if type(m) is nn.Linear and m.weight.is_contiguous()
                        and m.weight.nbytes >= self.large]
        downs = [getattr(m, "dense_4h_to_h", None) for m in modules if isinstance(m, MLP)]
        self.downs = [m for m in self.linears if m in downs]

    def forget_tables(self, modules: Iterable[nn.Module]) -> None:
        """Forget tables of other modules, and tables and packed copies of weights that changed."""
        modules = {*modules}
        copies = [(m, t) for m in modules for t in vars(m).get("packed", {}).values()]
        copies += self.tables.items()
        for (m, table), now in zip(copies, fingerprints([table.weight for _, table in copies])):
            is_own = any(table.weight is t for t in (*m._parameters.values(), *m._buffers.values()))
            if m not in modules or not is_own or now != table.fingerprint:
                self.tables.pop(m, None)  # another thread may have done it
                if "packed" in vars(m):
                    m.packed = {}

    def prepare(self, progress: Callable[[float], None] | None = None) -> None:
        """Make the missing tables; progress is called with the fraction that is done."""
        new = [m for m in self.downs if m not in self.tables and is_unmodified(m, nn.Linear)]
        self.downs = []  # once in a generation
        if not new or sum(m.weight.nbytes for m in new) > available_memory(new[0].weight.device):
            return
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            every = map if new[0].weight.is_cuda else pool.map
            tables = every(lambda m: m.weight.detach().t().contiguous(), new)
            for done, (linear, rows) in enumerate(zip(new, tables), start=1):
                self.tables[linear] = Table(rows, linear.weight, *fingerprints([linear.weight]))
                if progress is not None:
                    progress(done / len(new))


# === Part III a. CPU ==============================================================================
#
# Each token reads every weight once, so the best operator is the one that reads memory fastest. For
# W x with a large W, that is:
#
#   AMX, bfloat16           W @ x, for up to 32 rows. (F.linear, which reorders W: 0.8 of the speed)
#   AVX512-BF16 but no AMX  dot_products, for one row. (F.linear: a half; W @ x: a third)
#   AVX2 alone, bfloat16    torch.mv, for one row. (F.linear: 0.55 with AVX-512, else 0.95)
#
# With AVX2 alone, products in 16 bit are also slow for many rows (and without AMX in float16): a
# prompt of hundreds of tokens takes a third of the time with W in float32, block by block.
#
# dot_products is a gradient of embedding_bag, which recommender systems use: it sums some rows of a
# table, each times a factor. We also use the sum itself: where most inputs are zero, and without
# AMX for attention in 16 bit, as SDPA reads a long cache at an eighth of the speed.

import ast
import inspect
import textwrap
import zlib


def dot_products(weight: Tensor, x: Tensor) -> Tensor:
    """W x, (O), for weight (O, C) and x (C). If all rows of W are in one bag, y = sum factor_o W_o,
    and if x is the gradient of y, then that of factor_o is W_o x."""
    rows = torch.arange(len(weight), dtype=torch.int32, device=x.device)  # (O)
    bags = torch.zeros_like(rows)  # (O), the bag of each row
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return backward(x[None], weight, rows, bags[:1], bags, 0)  # bag 0 starts at 0; mode 0 is sum


def float32_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(x), x (rows, C) -> (rows, O), in float32. W is converted by blocks, into the same
    memory, as new memory is slow. (Blocks of 512 are slower for 16 to 32 rows.)"""
    W, block = linear.weight, x.new_empty(256, linear.in_features, dtype=torch.float32)
    bias = W.new_zeros(len(W)) if linear.bias is None else linear.bias
    parts, rows = zip(W.split(256), bias.float().split(256)), x.float()
    return torch.cat([torch.addmm(b, rows, block[: len(w)].copy_(w).t()).to(x.dtype)
                      for w, b in parts], dim=-1)


def cpu_linear(linear: nn.Linear, table: Table | None, x: Tensor) -> Tensor:
    """linear(x), x (..., C) -> (..., O); for few rows, by an operator faster than F.linear. With
    a table, it reads only the weights of inputs that are not zero."""
    W, bias, rows = linear.weight, linear.bias, x.reshape(-1, linear.in_features)  # (rows, C)
    if x.dtype != W.dtype or not W.is_contiguous() or torch.is_grad_enabled():
        return nn.functional.linear(x, W, bias)
    is_one, is_bf16, has_amx = len(rows) == 1, x.dtype == torch.bfloat16, cpu_has("amx_tile")
    has_table = table is not None and len(rows) <= 16 and not torch.compiler.is_compiling()
    if has_table and (bags := nonzero_bags(rows, 1.5)):  # beyond, others are as fast
        column, value, start = bags
        y = nn.functional.embedding_bag(column, table.rows, start.flatten(), mode="sum",
                                        per_sample_weights=value)
        y = y.view(*start.shape, len(W)).sum(1, dtype=torch.float32)  # (rows, O)
    elif is_one and x.dtype != torch.float16 and cpu_has("avx512_bf16") and not has_amx:
        y = dot_products(W, rows[0])
    elif is_one and is_bf16 and cpu_has("avx2"):
        y = torch.mv(W, rows[0])
    elif len(rows) <= 32 and is_bf16 and has_amx:
        y = (W @ rows.t()).t().contiguous()
    elif is_faster_in_float32(rows):
        y, bias = float32_linear(linear, rows), None
    else:
        return nn.functional.linear(x, W, bias)
    y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], len(W))


@lru_cache
def is_unedited(*codes: Any) -> bool:
    """Whether functions of Part I, given by their __code__, do what TransposedKVCache restates,
    whatever their comments and layout; if not, it warns, once. After an edit that changes no
    result, correct the number below: the warning has the new one."""
    text, checksum = "", None
    with suppress(Exception):  # no function, no source, or one that has changed since
        for code in codes:
            tree: Any = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]
            tree.body = tree.body[ast.get_docstring(tree) is not None :]
            text += ast.unparse(tree)
        checksum = zlib.crc32(text.encode())
    if checksum != 1503821543:
        warnings.warn("TransposedKVCache is not used, and long caches are slower: attention or "
                      f"KVCache was edited, or has no source (the code's checksum is {checksum})")
    return checksum == 1503821543


class TransposedKVCache(KVCache):
    """A KVCache with its keys in memory as (L, B, H, D, N), for attention by embedding_bag. An N
    above `block` is rounded up to a multiple of it."""

    block = 256  # positions

    def __init__(self, config: PersimmonConfig, B: int, N: int, *others: Any) -> None:
        N = N if N <= self.block else -(-N // self.block) * self.block
        super().__init__(config, B, N, *others)
        L, B, H, N, D = self.keys.shape
        self.keys = self.keys.view(L, B, H, D, N).transpose(3, 4)  # (L, B, H, N, D)
        self.functions = attention, KVCache.attend  # which you may replace

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """As in KVCache; but one new position (T = 1) takes two embedding_bags. The scores of P
        positions are the sum over d of q[d] / sqrt(D) times the row k[d] of their transposed keys,
        in q's dtype. The output is the sum over s of p[s] times the row v[s]."""
        (B, H, N, D), T, S = self.keys.shape[1:], q.shape[2], self.length + q.shape[2]
        P = min(N, self.block)  # N is no multiple of it if somebody has replaced `keys`
        is_known = self.functions == (attention, KVCache.attend)
        fits = N % P == 0 and q.shape == k.shape == v.shape == (B, H, T, D) and (
            mask is None or (mask.shape[1:], mask.dtype) == ((1, T, S), torch.bool))
        if not (is_known and fits):
            return super().attend(layer, q, k, v, mask)
        keys, values = self.keys[layer], self.values[layer]  # (B, H, N, D)
        keys[:, :, self.length : S], values[:, :, self.length : S] = k, v
        if T > 1:  # SDPA is slow with transposed keys; those of a prompt are at hand
            k = k if T == S else keys[:, :, :S].contiguous()  # (B, H, S, D)
            return attention(q, k, values[:, :, :S], mask)
        blocks = -(-S // P)  # the last one may hold positions beyond S
        table = keys.transpose(2, 3).reshape(-1, P)  # (B*H*D*N/P, P)
        arange = partial(torch.arange, dtype=torch.int32, device=q.device)  # faster than int64
        row = arange(B * H * D).view(B * H, 1, D) * (N // P) + arange(blocks)[:, None]
        factor = (q * D**-0.5).reshape(B * H, 1, D).expand_as(row)  # (B*H, blocks, D)
        score = nn.functional.embedding_bag(row.view(-1, D), table, mode="sum",
                                            per_sample_weights=factor.reshape(-1, D))
        score = score.view(B, H, blocks * P)[:, :, :S]  # (B, H, S)
        if mask is not None:
            score = score.masked_fill(~mask[:, :, 0], -math.inf)  # (B, H, S)
        p = score.softmax(-1).view(B * H, S)  # (B*H, S)
        row = arange(B * H)[:, None] * N + arange(S)  # (B*H, S)
        y = nn.functional.embedding_bag(row, values.flatten(0, 2), mode="sum", per_sample_weights=p)
        return y.view(B, H, 1, D)


class CpuEngine(TableEngine):
    """Matrix products and attention by the operators that read memory fastest on this CPU."""

    def make_cache(self, B: int, N: int, device: torch.device | None = None) -> KVCache:
        """A TransposedKVCache in 16 bit, unless the cache is short, yours, or SDPA is faster."""
        config, dtype, cache = self.model.config, self.model.dtype, super().make_cache(B, N, device)
        has_fast_sdpa = dtype == torch.bfloat16 and cpu_has("amx_tile")
        is_yours = type(cache) not in TransposedKVCache.__bases__
        is_short = config.num_attention_heads * N < 4096
        is_patched = not inspect.isbuiltin(nn.functional.scaled_dot_product_attention)
        if is_yours or is_short or is_patched or dtype.itemsize > 2 or has_fast_sdpa:
            return cache
        codes = [getattr(function, "__code__", None)
                 for function in (attention, KVCache.__init__, KVCache.attend)]
        return TransposedKVCache(config, B, N, dtype, "cpu") if is_unedited(*codes) else cache

    def prefill(self, ids: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """As in Engine; first finds out what has changed."""
        modules = [*self.model.modules()]
        self.forget_tables(modules)
        self.find_linears(modules)
        return self.next_logits(ids, mask, cache)

    def decode(self, ids: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """As in Engine; first makes the tables, and forgets those of weights that have changed."""
        self.forget_tables(self.linears)
        if len(ids) <= 16:  # as in cpu_linear
            self.prepare()
        return self.next_logits(ids, mask, cache)

    def next_logits(self, ids: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """As in Engine, with the products above."""
        forwards = {m: PassForward(cpu_linear, m, self.tables.get(m))
                    for m in self.linears if is_unmodified(m, nn.Linear)}
        with replaced_forward(forwards):
            return super().next_logits(ids, mask, cache)


ENGINES["cpu"] = CpuEngine


# === Part III b. int8 and int4 ====================================================================
#
# Matrices in 8 or 4 bits take a fraction of the memory, and decode faster, as most of the time goes
# into reading weights. Every Linear but a classifier's head is replaced. The embedding stays: a
# token reads only one row of it. Formats, for O outputs, C inputs and groups of g inputs:
#
#   int8  weight int8 (O, C), scale (O): W[o, c] = scale[o] * weight[o, c]
#   int4  weight uint8 (O/64, C, 32), scale (C/g, O, 2), O rounded up to a multiple of 64. Byte
#         [n, c, j] holds the codes, 0 ... 15, of outputs 64*n + j (low half) and 64*n + 32 + j
#         (high half), the order that PyTorch's AVX-512 kernel reads:
#             W[o, c] = scale[c//g, o, 0] * (code - 8) + scale[c//g, o, 1]
#   both  dense_4h_to_h: weight uint8 (F, C + 8). Row f holds C codes of a byte each, a float32
#         scale and a float32 offset. Most activations are zero, and their rows are not read:
#             W[c, f] = scale * code + offset


class QuantizedLinear(nn.Module):
    """x W^T + b with W in few bits; ValueError for weights that are not finite or don't fit.

    quantize_weight     the tensors to store for a weight; on meta only empty ones, which is fast
    dequantize          W^T, or its codes, for outputs start ... stop: (C, stop - start)
    small_batch_matmul  x W^T, (rows, C) -> (rows, O), by a PyTorch kernel that reads the codes;
                        None if there is none, or it is slow: for dense W, in all but bfloat16"""

    axes: tuple[dict[str, int], ...]  # stored tensor -> axis of the outputs; -> of the inputs
    is_by_input = False  # whether a row of `weight` is of one input, and not of one output
    extra_repr = nn.Linear.extra_repr

    def __init__(self, linear: nn.Linear, group_size: int,
                 progress: Callable[[float], None] = lambda part: None) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.group_size, self.bias = group_size, linear.bias
        self.packed: dict[Any, Table] = {}  # private copies, as kernels want them
        weight = linear.weight.detach()
        if not (weight.is_meta or all(map(math.isfinite, weight.aminmax()))):
            raise ValueError("weights that are not finite can't be quantized")
        names, side = ("weight", "scale"), int(self.is_by_input)
        for name, empty in zip(names, self.quantize_weight(weight.to("meta"))):
            self.register_buffer(name, torch.empty_like(empty, device=weight.device))
        parts = () if weight.is_meta else weight.split(4096, side)  # outputs, or inputs
        starts = dict.fromkeys(names, 0)
        for done, part in enumerate(parts, start=1):
            pieces = zip(*map(self.quantize_weight, part.split(64, side)))  # what fits a cache
            for name, tensors in zip(names, pieces):
                axis, start = self.axes[side][name], starts[name]
                starts[name] += sum(tensor.shape[axis] for tensor in tensors)
                target = getattr(self, name).narrow(axis, start, starts[name] - start)
                torch.cat(tensors, axis, out=target)
            progress(done / len(parts))
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., O)"""
        rows, y = x.reshape(-1, self.in_features), None
        has_kernel = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if x.is_cuda:  # its copy of W pays only for T = 1, and for B = 1 not beside codes_kernel's
            has_kernel &= len(x) == len(rows) and (len(x) > 1 or "codes" not in self.packed)
        in_float32 = has_kernel and is_faster_in_float32(rows)
        if has_kernel and 0 < len(rows) <= 64:  # beyond, dequant_matmul is faster
            if not rows.is_contiguous() or rows.data_ptr() % 32 != 0:  # as kernels need it
                rows = rows.clone(memory_format=torch.contiguous_format)
            y = self.small_batch_matmul(rows)
        if y is None:
            y = self.dequant_matmul(rows.float() if in_float32 else rows)
        y = y if self.bias is None else y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def dequant_matmul(self, x: Tensor) -> Tensor:
        """x (rows, C) -> (rows, O) with W dequantized, on a CPU block by block."""
        O, C = self.out_features, self.in_features
        n = max(64, 2 ** (27 if x.is_cuda else 21) // C // 64 * 64)  # what fits a CPU's cache
        starts = range(0, O, n)
        return torch.cat([x @ self.dequantize(i, min(i + n, O), x.dtype) for i in starts], dim=-1)

    def packed_copy(self, key: Any, stored: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """make(), a copy of a stored tensor for kernels: private, and made when first used."""
        copy, version = self.packed.get(key), None if stored.is_inference() else stored._version
        if copy is None or copy.weight is not stored or copy.fingerprint[2] != version:
            copy = self.packed[key] = Table(make(), stored, *fingerprints([stored]))
        return copy.rows

    def __getstate__(self) -> dict[str, Any]:  # what deepcopy and pickle call
        return {**self.__dict__, "packed": {}}

    def _load_from_state_dict(self, *args: Any) -> None:
        self.packed = {}
        super()._load_from_state_dict(*args)

    def _apply(self, *args: Any, **options: Any) -> QuantizedLinear:  # what .to(device) calls
        self.packed = {}
        return super()._apply(*args, **options)


def private_operator(operators: Any, name: str) -> Callable[..., Tensor] | None:
    """A private operator, of torch.ops.aten for example; None, with a warning, if it is gone."""
    found = getattr(operators, name, None)
    if found is None:
        warnings.warn(f"this PyTorch has no {name}: quantized weights are used without it, slowly")
    return found


class Int8Linear(QuantizedLinear):
    """8 bits, symmetric, one scale per output."""

    axes = {"weight": 0, "scale": 0}, {"weight": 1}

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight (O, C) -> weight int8 (O, C) and scale (O)"""
        if weight.is_meta:
            return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(len(weight))
        low, high = weight.aminmax(dim=1)
        scale = torch.maximum(-low, high) / 127  # coarse in float16 if small: codes need clamp
        scale = torch.where(scale > 0, scale, 1)  # for a row of zeros
        codes = (weight / scale.float()[:, None]).round_().clamp_(-127, 127)
        return codes.to(torch.int8), scale

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.weight[start:stop].to(dtype).t()  # codes: dequant_matmul scales their sums

    def dequant_matmul(self, x: Tensor) -> Tensor:  # sums of 127 x would overflow float16
        return super().dequant_matmul(x / 128) * (self.scale.to(x.dtype) * 128)

    def small_batch_matmul(self, x: Tensor) -> Tensor | None:
        operator = private_operator(torch.ops.aten, "_weight_int8pack_mm")
        is_fastest = len(x) <= 16 or is_faster_in_float32(x)  # where dequant_matmul is slower
        fits = x.is_cpu and x.dtype == torch.bfloat16 and x.shape[1] % 16 == 0
        if not (operator and is_fastest and fits):
            return None
        # It crashes unless 16 divides the address; in a file by another program it may not.
        weight = self.weight
        if weight.data_ptr() % 16 != 0:
            weight = self.packed_copy("aligned", weight, weight.clone)
        return operator(x, weight, self.scale.to(x.dtype))

    # For CUDA's codes_kernel: codes, scale, offset and group size.
    codes_by_output = property(lambda self: (self.weight, self.scale, None, self.in_features))


class Int4Linear(QuantizedLinear):
    """4 bits, a scale and an offset per output and group of inputs."""

    axes = {"weight": 0, "scale": 1}, {"weight": 1, "scale": 0}

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight (O, C) -> weight uint8 (O/64, C, 32) and scale (C/g, O, 2). Each group gets the
        best of six lines: its full range, 0.9 of it, and for both two least-squares fits."""
        (O, C), g, dtype = weight.shape, self.group_size, weight.dtype
        if C % g != 0:
            raise ValueError(f"a matrix of {C} inputs can't be quantized in groups of {g}")
        if weight.is_meta:
            blocks, empty = -(-O // 64), weight.new_empty
            return empty(blocks, C, 32, dtype=torch.uint8), empty(C // g, 64 * blocks, 2)
        w = nn.functional.pad(weight.float(), (0, 0, 0, -O % 64)).unflatten(1, (-1, g))
        low, high, best = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True), None
        for part in (1.0, 0.9):
            scale, offset = (high - low) * part / 15, low * part  # offset: the weight of code 0
            for _ in range(3):
                # Equal weights have scale 0. A fit to equal codes is NaN, which is never the best.
                codes = ((w - offset) / torch.where(scale > 0, scale, 1)).round_().clamp_(0, 15)
                error = (codes * scale).add_(offset).sub_(w).square_().sum(-1, keepdim=True)
                new = error, scale, offset, codes
                best = best or new
                best = tuple(torch.where(error < best[0], *pair) for pair in zip(new, best))
                mean = codes.mean(-1, keepdim=True)
                d = codes - mean
                scale = (d * w).sum(-1, keepdim=True) / d.square().sum(-1, keepdim=True)
                offset = w.mean(-1, keepdim=True) - scale * mean
        _, scale, offset, codes = best
        low, high = codes.to(torch.uint8).view(-1, 2, 32, C).unbind(1)
        scale = torch.cat((scale, offset + 8 * scale), dim=-1).to(dtype)
        return (low | high << 4).mT, scale.transpose(0, 1)

    def codes(self, start: int, stop: int) -> Tensor:
        """code - 8, from -8 to 7, of outputs start ... stop as int8 (C, stop - start)."""
        pairs = self.weight[start // 64 : -(-stop // 64)] ^ 0x88  # code - 8 as signed 4 bits
        pairs = pairs.view(torch.int8).transpose(0, 1)  # (C, blocks, 32)
        upper = torch.stack((pairs << 4, pairs), dim=2)  # a code in the upper half of each byte
        return upper.bitwise_right_shift_(4).flatten(1)[:, : stop - start]  # keeps the sign

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        scale, offset = self.scale[:, start:stop].to(dtype).permute(2, 0, 1).contiguous()
        groups = self.codes(start, stop).to(dtype).unflatten(0, (-1, self.group_size))
        return torch.addcmul(offset[:, None], groups, scale[:, None], out=groups).flatten(0, 1)

    def small_batch_matmul(self, x: Tensor) -> Tensor | None:
        is_ampere = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)
        suffix = "_for_cpu" if x.is_cpu else ""
        operator = private_operator(torch.ops.aten, f"_weight_int4pack_mm{suffix}")
        pack = private_operator(torch.ops.aten, f"_convert_weight_to_int4pack{suffix}")
        if not (operator and pack and (x.is_cpu or is_ampere) and x.dtype == torch.bfloat16):
            return None
        packed = self.packed_copy("matmul", self.weight, lambda: self.pack(pack, x.is_cuda))
        y = operator(x, packed, self.group_size, self.scale.to(x.dtype))
        return y[:, : self.out_features]

    def pack(self, operator: Callable[..., Tensor], is_cuda: bool) -> Tensor:
        """The weight as the kernel reads it: with AVX-512 the stored one, (O, C/2), else a copy."""
        O, C = 64 * len(self.weight), self.in_features
        if is_cuda:  # from bytes (O, C/2), even inputs in the high half
            codes = self.codes(0, O).add(8).view(torch.uint8).t()
            tiles = next(n for n in (8, 4, 2) if C % (16 * n) == 0)  # of 16 inputs, read at once
            return operator((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), tiles)
        # Does this CPU's kernel read the order that we store? Pack random codes to find out.
        random = torch.Generator().manual_seed(0)
        probe = torch.randint(16, (64, 64), generator=random, dtype=torch.int32, device="cpu")
        low, high = probe.to(torch.uint8).split(32)
        if torch.equal(operator(probe, 1).view(64, 32), (low | high << 4).t()):
            return self.weight.view(O, C // 2)
        return operator(self.codes(0, O).t().int().contiguous() + 8, 1)

    def pack_by_output(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """Codes, scale, offset and group size for codes_kernel. codes are int8 (O, C/2): byte
        [o, j] & 15 is the code of input j, and byte [o, j] & -16 is 16 (code - 8) of input C/2 + j.
        scale and offset, float32 (C/g, O), allow for that. C has to be a multiple of 2g."""
        O = self.out_features

        def pack() -> Tensor:
            self.packed.pop("matmul", None)  # lm_head's, from the first prompt
            blocks = (self.codes(n, min(n + 4096, O)).chunk(2) for n in range(0, O, 4096))
            return torch.cat([(low + 8 | high << 4).t() for low, high in blocks]).contiguous()

        def fold() -> Tensor:
            scale, offset = both = self.scale[:, :O].permute(2, 0, 1).float().contiguous()
            offset.chunk(2)[0].sub_(scale.chunk(2)[0], alpha=8)
            scale.chunk(2)[1].div_(16)
            return both

        scale, offset = self.packed_copy("scale", self.scale, fold)
        return self.packed_copy("codes", self.weight, pack), scale, offset, self.group_size

    codes_by_output = property(pack_by_output)


class Int8SparseLinear(QuantizedLinear):
    """8 bits, a scale and an offset per input. Rows of inputs that are zero are not read."""

    is_by_input = True
    axes = {}, {"weight": 0}

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor]:
        """weight (C, F) -> weight uint8 (F, C + 8): C codes, a float32 scale, a float32 offset"""
        if weight.is_meta:
            return (weight.new_empty(weight.shape[1], len(weight) + 8, dtype=torch.uint8),)
        w = weight.t().float()
        offset = w.amin(1, keepdim=True)
        scale = (w.amax(1, keepdim=True) - offset) / 255
        codes = ((w - offset) / torch.where(scale > 0, scale, 1)).round()  # 0 ... 255
        tail = torch.cat((scale, offset), dim=1).view(torch.uint8)
        return (torch.cat((codes.to(torch.uint8), tail), dim=1),)

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return (self.weight[:, start:stop] ^ 128).view(torch.int8).to(dtype)  # code - 128

    def dequant_matmul(self, x: Tensor) -> Tensor:  # W = scale * (code - 128) + middle
        scale, offset = self.weight[:, -8:].contiguous().view(torch.float32).unbind(1)  # (F)
        middle = (offset + 128 * scale).to(x.dtype)  # (F)
        return super().dequant_matmul(x * scale.to(x.dtype)) + (x @ middle)[..., None]

    def small_batch_matmul(self, x: Tensor) -> Tensor | None:
        bags = nonzero_bags(x, 6) if x.is_cpu else None  # with more, dequant_matmul is faster
        operator = private_operator(torch.ops.quantized, "embedding_bag_byte_rowwise_offsets")
        if bags is None or operator is None:
            return None
        column, value, start = bags
        y = operator(self.weight, column, start.flatten(), per_sample_weights=value.float())
        return y.view(*start.shape, self.out_features).sum(1)


def quantize_model(model: PersimmonPreTrainedModel, kind: str, group_size: int = 128,
                   progress: Callable[[float], None] | None = None) -> PersimmonPreTrainedModel:
    """Quantize a model in place, in int8 or int4: each Linear, one by one, but neither a
    classifier's head nor subclasses of Linear. Returns the model. ValueError if a weight can't be
    quantized, or a Linear has hooks, which would be lost: then discard the model."""
    quantization, old = {"quantize": kind, "group_size": group_size}, model.config.quantization
    if old not in (None, quantization):
        raise ValueError(f"the model is quantized already, in {old['quantize']}")
    if kind not in ("int8", "int4"):
        raise ValueError(f"quantize = {kind!r} is neither int8 nor int4")
    if type(group_size) is not int or group_size not in (32, 64, 128):
        raise ValueError(f"group_size = {group_size} is none of 32, 64 and 128")
    linears = [(path, parent, child, m.weight.nbytes) for path, parent in model.named_modules()
               for child, m in parent.named_children() if type(m) is nn.Linear and child != "score"]
    done, total = 0, sum(size for *_, size in linears)
    progress = progress or (lambda fraction: None)
    for path, parent, child, size in linears:
        is_sparse = isinstance(parent, MLP) and child == "dense_4h_to_h"
        cls = Int8SparseLinear if is_sparse else Int8Linear if kind == "int8" else Int4Linear
        linear = getattr(parent, child)
        try:
            if linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
                raise ValueError("hooks, or a forward of its own, have to be added after this")
            setattr(parent, child, cls(linear, group_size,
                                       lambda part: progress((done + part * size) / total)))
        except ValueError as error:
            raise ValueError(f"{path}.{child}: {error}".lstrip(".")) from None
        done += size
    for part in model.modules():
        if isinstance(part, PersimmonPreTrainedModel):  # after parallelize, each has its own config
            part.config = replace(part.config, quantization=quantization)
    return model


__all__ += ["quantize_model"]
QUANTIZERS["int8"] = QUANTIZERS["int4"] = quantize_model


# === Part III c. CUDA =============================================================================
#
# A GPU reads the weights of a layer in a tenth of a millisecond, and Python takes longer to launch
# its kernels. So a step is captured as a CUDA graph and replayed, with four kernels in Triton.
# (With torch.compile for linear_kernel and sparse_kernel, a token took 15% longer on an H200.)
#
#   attention_kernel  all that lies between the QKV projection and the output projection
#   linear_kernel     a matrix times a few rows, the norm before it, activation or residual after it
#   sparse_kernel     the down-projection of one row, for which it skips inputs that are zero
#   codes_kernel      what linear_kernel does, for one row and a matrix in int8 or int4

import copy
from weakref import WeakKeyDictionary


@lru_cache
def triton_kernels() -> dict[str, Any] | None:
    """The four kernels, which sum in float32 or in integers; None without Triton.

    Attention is split-KV (Flash-Decoding) with the online softmax (Milakov and Gimelshein, arXiv
    1805.02867; FlashAttention, Dao et al., 2205.14135). A program has one query q and one split of
    the keys and values, which it reads in blocks k and v (P, D). m_i is the largest score so far;
    the weights exp(score - m_i) add up to l_i, and the values times their weights to acc (D):

        s    = q k^T / sqrt(D)                     (P), -inf where the query must not look
        m_i' = max(m_i, max(s))
        p    = exp(s - m_i')
        l_i' = l_i exp(m_i - m_i') + sum(p)
        acc' = acc exp(m_i - m_i') + p v

    A split's result is acc / l_i, and its weight among the splits softmax(m_i + log l_i). The last
    program of a head to finish combines them. tl.dot needs 16 rows, so q has 16 equal ones."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def norm_rope(x, weight, bias, eps, cos, sin, D: tl.constexpr, R: tl.constexpr):
        """RoPE(LayerNorm(x)) of one head's q or k, (D)."""
        d = tl.arange(0, D)
        pair = tl.where(d < R // 2, d + R // 2, tl.where(d < R, d - R // 2, d))
        a, b = tl.load(x + d).to(tl.float32), tl.load(x + pair).to(tl.float32)
        if weight is not None:
            mean = tl.sum(a, 0) / D
            scale = 1 / tl.sqrt(tl.sum((a - mean) * (a - mean), 0) / D + eps)
            a = (a - mean) * scale * tl.load(weight + d) + tl.load(bias + d)
            b = (b - mean) * scale * tl.load(weight + pair) + tl.load(bias + pair)
        c = tl.load(cos + d % (R // 2), mask=d < R, other=1.0).to(tl.float32)
        s = tl.load(sin + d % (R // 2), mask=d < R, other=0.0).to(tl.float32)
        return a * c + b * tl.where(d < R // 2, -s, s)

    @triton.jit(do_not_specialize=["rope_stride", "mask_stride", "T", "N"])  # compiled once for all
    def attention_kernel(qkv, q_weight, q_bias, k_weight, k_bias, q_eps, k_eps, cos, sin,
                         rope_stride, mask, mask_stride, keys, values, position, out, split_out,
                         split_lse, arrived, T, N, H: tl.constexpr, D: tl.constexpr,
                         R: tl.constexpr, P: tl.constexpr, SPLITS: tl.constexpr):
        """Program (b*H + h, t, split) serves head h of row b at its t-th new position: it stores k
        and v in the cache, and attention's result in out (B, T, H, D). That needs T = 1. With
        SPLITS = 0, for any T, out is only q after norm and RoPE. Strides lead from row to row of
        the batch. A head's splits share split_out (B*H, SPLITS, D), acc / l_i; split_lse (B*H,
        SPLITS), m_i + log2 l_i; and arrived (B*H), how many have finished."""
        head, t, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        b, h, d = (head // H).to(tl.int64), head % H, tl.arange(0, D)
        length = tl.load(position).to(tl.int32) + t  # positions before this one
        dtype = qkv.dtype.element_ty
        qkv += ((b * T + t) * H + h) * 3 * D
        out += ((b * T + t) * H + h) * D
        cos, sin = cos + b * rope_stride + t * (R // 2), sin + b * rope_stride + t * (R // 2)
        keys, values = keys + (b * H + h) * N * D, values + (b * H + h) * N * D
        q = norm_rope(qkv, q_weight, q_bias, q_eps, cos, sin, D, R).to(dtype)
        k_new = norm_rope(qkv + D, k_weight, k_bias, k_eps, cos, sin, D, R).to(dtype)
        v_new = tl.load(qkv + 2 * D + d)
        used = tl.maximum(tl.minimum(tl.cdiv(length, 128), SPLITS), 1)  # splits of 128 keys or more
        if split < used:
            if split == 0 and length < N:
                tl.store(keys + length * D + d, k_new)
                tl.store(values + length * D + d, v_new)
            if SPLITS == 0:
                tl.store(out + d, q)
            else:
                # Scores are in units of log 2, for 2**x in place of exp(x). The first split begins
                # with the new position, from registers: no program waits for another's store.
                scale, is_first = 1.4426950408889634 / D**0.5, split == 0
                own = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 0) * scale
                zero = tl.zeros((16,), tl.float32)
                m_i = zero + tl.where(is_first, own, -float("inf"))
                l_i = zero + tl.where(is_first, 1.0, 0.0)
                acc = zero[:, None] + tl.where(is_first, v_new.to(tl.float32), 0.0)[None, :]
                queries = tl.broadcast_to(q[None, :], (16, D))
                share = tl.cdiv(tl.cdiv(length, used), P) * P
                end = tl.minimum(split * share + share, length)
                for first in range(split * share, end, P):
                    column = first + tl.arange(0, P)
                    at, is_seen = column[:, None] * D + d[None, :], column < end
                    k = tl.load(keys + at, mask=is_seen[:, None], other=0.0)
                    v = tl.load(values + at, mask=is_seen[:, None], other=0.0)
                    if mask is not None:
                        seen = tl.load(mask + b * mask_stride + column, mask=is_seen, other=0)
                        is_seen &= seen != 0
                    s = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale  # (16, P)
                    s = tl.where(is_seen[None, :], s, -float("inf"))
                    m_new = tl.maximum(m_i, tl.max(s, 1))
                    base = tl.where(m_new == -float("inf"), 0.0, m_new)  # -inf - -inf is NaN
                    p, decay = tl.exp2(s - base[:, None]), tl.exp2(m_i - base)
                    l_i = l_i * decay + tl.sum(p, 1)
                    acc = acc * decay[:, None] + tl.dot(p.to(dtype), v, input_precision="ieee")
                    m_i = m_new
                m_max, l_max = tl.max(m_i, 0), tl.max(l_i, 0)  # the 16 rows are equal
                y = tl.max(acc, 0) / tl.where(l_max > 0, l_max, 1.0)  # (D)
                if used == 1:
                    tl.store(out + d, y.to(dtype))
                else:
                    i = tl.arange(0, SPLITS)
                    tl.store(split_out + (head * SPLITS + split) * D + d, y)
                    tl.store(split_lse + head * SPLITS + split, m_max + tl.log2(l_max))
                    tl.debug_barrier()  # all threads have stored before one of them counts
                    if tl.atomic_add(arrived + head, 1, sem="acq_rel") == used - 1:
                        tl.store(arrived + head, 0)  # for the next launch
                        # .cg goes past this SM's own cache, which may hold older values
                        lse = tl.load(split_lse + head * SPLITS + i, mask=i < used,
                                      other=-float("inf"), cache_modifier=".cg")
                        p = tl.exp2(lse - tl.max(lse, 0))
                        at = (head * SPLITS + i)[:, None] * D + d[None, :]
                        y = tl.load(split_out + at, mask=(i < used)[:, None], other=0.0,
                                    cache_modifier=".cg")
                        y = tl.sum(p[:, None] * y, 0) / tl.sum(p, 0)
                        tl.store(out + d, y.to(dtype))

    @triton.jit(do_not_specialize=["B"])
    def linear_kernel(x, weight, scale, bias, norm_weight, norm_bias, eps, residual, y, B, O,
                      C: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
                      SQUARE: tl.constexpr):
        """y (B, O) = f(scale * W LayerNorm(x) + b) + residual for x (B, C), B <= 16 (with a norm,
        B = 1); f = relu(.)**2 if SQUARE. What is None is left out. W may be int8. A program makes
        COLUMNS outputs, from K inputs at a time. Loads are pipelined: a block of W is requested two
        blocks before it is used."""
        o, b = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, 16)[:, None]
        c = tl.arange(0, K)
        dtype = x.dtype.element_ty
        if norm_weight is not None:
            row = tl.load(x + tl.arange(0, C)).to(tl.float32)
            mean = tl.sum(row, 0) / C
            rstd = 1 / tl.sqrt(tl.sum((row - mean) * (row - mean), 0) / C + eps)
        acc = tl.zeros((16, COLUMNS), tl.float32)
        weight += o.to(tl.int64)[None, :] * C + c[:, None]
        for first in tl.range(0, C, K, num_stages=3):
            w = tl.load(weight + first, eviction_policy="evict_first")  # (K, COLUMNS)
            if norm_weight is None:
                rows = tl.load(x + b * C + (first + c)[None, :], mask=b < B, other=0.0)
            else:
                v = (tl.load(x + first + c).to(tl.float32) - mean) * rstd
                v = v * tl.load(norm_weight + first + c) + tl.load(norm_bias + first + c)
                rows = tl.where(b == 0, v[None, :], 0.0).to(dtype)  # (16, K)
            acc = tl.dot(rows, w.to(dtype), acc, input_precision="ieee")
        if scale is not None:
            acc *= tl.load(scale + o).to(tl.float32)[None, :]
        if bias is not None:
            acc += tl.load(bias + o).to(tl.float32)[None, :]
        if SQUARE:
            acc = tl.where(acc < 0, 0.0, acc * acc)  # NaN stays, and tl.maximum would drop it
        at = b * O + o[None, :]
        if residual is not None:
            acc += tl.load(residual + at, mask=b < B, other=0.0).to(tl.float32)
        tl.store(y + at, acc.to(dtype), mask=b < B)

    @triton.jit
    def sparse_kernel(x, weight, scale, bias, residual, y, nonzero, split_out, arrived, O,
                      STRIDE: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
                      K: tl.constexpr, SPLITS: tl.constexpr):
        """y (O) = W x + b + residual, with W stored by input, (F, STRIDE), F = INPUTS*SPLITS. Rows
        of inputs that are zero are not read. Program (block, split) makes COLUMNS outputs from
        INPUTS inputs. It lists the other inputs in nonzero (F), as all blocks do, with equal
        results, and reads the rows of K of them at a time. With scale, a row holds codes, and scale
        and scale + 1 point to the first row's float32 scale and offset."""
        block, split = tl.program_id(0), tl.program_id(1)
        o, f = block * COLUMNS + tl.arange(0, COLUMNS), split * INPUTS + tl.arange(0, INPUTS)
        is_nonzero = tl.load(x + f) != 0
        rank = tl.cumsum(is_nonzero.to(tl.int32), 0)
        nonzero += split * INPUTS
        tl.store(nonzero + rank - 1, f, mask=is_nonzero)
        tl.debug_barrier()  # all threads have stored before one of them loads
        count, sums, offset = tl.max(rank, 0), tl.zeros((K, COLUMNS), tl.float32), 0.0
        for first in range(0, count, K):
            is_in = first + tl.arange(0, K) < count
            row = tl.load(nonzero + first + tl.arange(0, K), mask=is_in, other=0).to(tl.int64)
            w = tl.load(weight + row[:, None] * STRIDE + o[None, :], mask=is_in[:, None], other=0)
            v = tl.load(x + row, mask=is_in, other=0.0).to(tl.float32)
            if scale is not None:
                at = scale + row * (STRIDE // 4)
                offset += tl.sum(v * tl.load(at + 1, mask=is_in, other=0.0), 0)
                v *= tl.load(at, mask=is_in, other=0.0)
            sums += v[:, None] * w.to(tl.float32)
        tl.store(split_out + split * O + o, tl.sum(sums, 0) + offset)
        tl.debug_barrier()
        if tl.atomic_add(arrived + block, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(arrived + block, 0)
            result = tl.load(residual + o).to(tl.float32)
            if bias is not None:
                result += tl.load(bias + o).to(tl.float32)
            for n in tl.static_range(SPLITS):
                result += tl.load(split_out + n * O + o, cache_modifier=".cg")
            tl.store(y + o, result.to(y.dtype.element_ty))

    @triton.jit
    def codes_kernel(x, codes, scale, offset, bias, norm_weight, norm_bias, eps, residual, y, O,
                     C: tl.constexpr, BYTES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
                     K: tl.constexpr, SQUARE: tl.constexpr):
        """What linear_kernel does, for one row x (C) and W in codes, as codes_by_output gives them.
        To convert codes to 16 bits takes longer than to read them. So x is made integer, step *
        (128 high + low), for tensor cores that multiply integers of 8 bits. These 15 bits lose
        about as little as bfloat16 would, as |x| <= sqrt(C) rms, and far less than W has lost. In
        the right operand, each group of inputs has a column of high and one of low digits, zero
        elsewhere: so each group gets its own sum, to be scaled. A program makes ROWS outputs; for
        each it reads BYTES, K at a time, and requests a block three blocks before it is used."""
        GROUPS: tl.constexpr = K // GROUP if GROUP < K else 1
        o, k, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, K), tl.arange(0, C)
        is_high, group = tl.arange(0, 2 * GROUPS) < GROUPS, tl.arange(0, 2 * GROUPS) % GROUPS
        # Small loads come first, and are used while the first codes are on their way.
        row, result = tl.load(x + c).to(tl.float32), tl.zeros((ROWS,), tl.float32)
        if norm_weight is not None:
            g, h = tl.load(norm_weight + c), tl.load(norm_bias + c)
        if offset is not None:
            z = tl.load(offset + tl.arange(0, C // GROUP)[:, None] * O + o[None, :])
        if bias is not None:
            result += tl.load(bias + o).to(tl.float32)
        if residual is not None:
            r = tl.load(residual + o).to(tl.float32)
        mean, rstd, step, acc = 0.0, 1.0, 1.0, tl.zeros((ROWS, 2 * GROUPS), tl.float32)
        codes += o.to(tl.int64)[:, None] * BYTES + k[None, :]
        for first in tl.range(0, BYTES, K, num_stages=4):
            w = tl.load(codes + first, eviction_policy="evict_first")  # (ROWS, K)
            if first == 0:
                if norm_weight is not None:
                    mean = tl.sum(row, 0) / C
                    rstd = 1 / tl.sqrt(tl.sum((row - mean) * (row - mean), 0) / C + eps)
                    row = (row - mean) * rstd * g + h
                top = tl.max(tl.where(row == row, tl.abs(row), float("inf")), 0)  # NaN: y is NaN
                step = tl.maximum(top, 1e-30) / (127 * 128)
                if offset is not None:
                    sums = tl.sum(tl.reshape(row, (C // GROUP, GROUP)), 1)
                    result += tl.sum(z * sums[:, None], 0)
            for half in tl.static_range(C // BYTES):  # int4: low halves of bytes, high halves
                n = first + half * BYTES
                v = tl.load(x + n + k).to(tl.float32)
                if norm_weight is not None:
                    v = (v - mean) * rstd * tl.load(norm_weight + n + k)
                    v += tl.load(norm_bias + n + k)
                v = tl.floor(v / step + 0.5).to(tl.int32)
                digits = tl.where(is_high[:, None], (v >> 7)[None, :], (v & 127)[None, :])
                digits = tl.where(group[:, None] == (k // GROUP)[None, :], digits, 0)
                part = w if C == BYTES else (w & 15 if half == 0 else w & -16)
                sums = tl.dot(part, tl.trans(digits.to(tl.int8)), out_dtype=tl.int32)
                at = (n // GROUP + group)[None, :] * O + o[:, None]
                acc += sums.to(tl.float32) * tl.load(scale + at).to(tl.float32)
        acc *= tl.where(is_high, 128.0, 1.0)[None, :] * step
        result += tl.sum(acc, 1)
        if SQUARE:
            result = tl.where(result < 0, 0.0, result * result)
        if residual is not None:
            result += r
        tl.store(y + o, result.to(y.dtype.element_ty))

    return {"attention": attention_kernel, "linear": linear_kernel, "sparse": sparse_kernel,
            "codes": codes_kernel}


class StaticCache(KVCache):
    """A KVCache that has its length on the GPU too, as `position`, where kernels read it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        heads, device = self.keys.shape[1] * self.keys.shape[2], self.keys.device
        self.position = torch.zeros((), dtype=torch.long, device=device)
        # Measured: four programs per SM are enough; combining more than 8 splits costs too much.
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.splits = next((n for n in (8, 4, 2) if n * heads <= 4 * sms), 1)
        self.arrived = torch.zeros(heads, dtype=torch.int32, device=device)

    def crop(self, length: int) -> None:
        """As in KVCache, on the GPU too."""
        super().crop(length)
        self.position.fill_(length)


class CapturedCache(StaticCache):
    """A StaticCache, in the same memory, in a pass that is captured. It has no `length`, which each
    replay changes: positions come from `position`, S is N, and only the kernel can attend."""

    def __init__(self, cache: StaticCache) -> None:
        vars(self).update((name, x) for name, x in vars(cache).items() if name != "length")

    def positions(self, B: int, T: int) -> tuple[Tensor, int]:
        """As in KVCache, but computed on the GPU: a replay does it anew."""
        return self.position + torch.arange(T, device=self.position.device), self.keys.shape[3]

    def crop(self, length: int) -> None:
        """Does nothing: `decode` crops the StaticCache after each replay."""

    def attend(self, *args: Any) -> Tensor:
        """Fails, as it would need the length; then the model is not captured."""
        raise RuntimeError("a module that is not this file's calls cache.attend")


def fused_attend(attn: Attention, qkv: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None,
                 cache: StaticCache) -> Tensor:
    """What Attention.forward does between its projections: qkv (B, T, 3*C) -> (B, T, C). For T = 1
    this is one kernel. For T > 1, the kernel only does norms, RoPE and the cache, and SDPA attends,
    as it is faster. Raises ValueError for shapes that the kernel would misread."""
    (B, T, _), (_, rows, H, N, D), (cos, sin) = qkv.shape, cache.keys.shape, rope
    keys, values = cache.keys[attn.layer], cache.values[attn.layer]  # (B, H, N, D)
    S, splits = N if isinstance(cache, CapturedCache) else cache.length + T, cache.splits * (T == 1)
    norms = [attn.q_layernorm, attn.k_layernorm]
    weights = [p for norm in norms for p in norm.parameters()] or [None] * 4
    if not all((qkv.shape == (rows, T, 3 * H * D), (attn.num_heads, attn.head_dim) == (H, D),
                S <= N, D in (16, 32, 64, 128), qkv.dtype == keys.dtype, len(weights) == 4,
                len(cache.arrived) >= B * H, keys.is_contiguous(), values.is_contiguous(),
                cos.shape == sin.shape == (len(cos), T, 1, cos.shape[3]), len(cos) in (1, B),
                *(p is None or p.shape == (D,) for p in weights),
                mask is None or T > 1 or mask.dtype == torch.bool)):
        raise ValueError("shapes or dtypes are not those of the kernel")
    seen = None if mask is None or T > 1 else mask.expand(B, 1, 1, S).contiguous()
    out = qkv.new_empty(B, T, H, D)
    split_out = qkv.new_empty(B * H, splits, D, dtype=torch.float32)
    split_lse = qkv.new_empty(B * H, splits, dtype=torch.float32)
    triton_kernels()["attention"][B * H, T, max(splits, 1)](
        qkv.contiguous(), *weights, *(getattr(norm, "eps", 0.0) for norm in norms),
        cos.contiguous(), sin.contiguous(), 0 if len(cos) == 1 else cos[0].numel(), seen, S,
        keys, values, cache.position, out, split_out, split_lse, cache.arrived, T, N, H, D,
        2 * cos.shape[3], max(16, min(32, 4096 // (D * qkv.itemsize))), splits, num_warps=1,
        enable_fp_fusion=True)  # the default; Triton 3.9 warns that it will change
    if T > 1:
        q, k, v = out.transpose(1, 2), keys[:, :, :S], values[:, :, :S]  # (B, H, T or S, D)
        out = attention(q, k, v, mask).transpose(1, 2)  # (B, T, H, D)
    return out.reshape(B, T, H * D)


def fused_attention(attn: Attention, x: Tensor, *others: Any) -> Tensor:
    """Attention.forward with a cache; `others` are rope, mask and cache."""
    return attn.dense(fused_attend(attn, attn.query_key_value(x), *others))


def fused_linear(linear: nn.Module, x: Tensor, norm: nn.LayerNorm | None = None,
                 residual: Tensor | None = None, square: bool = False) -> Tensor:
    """f(linear(norm(x))) + residual, (..., O), for x (..., C); f is relu(.)**2 or x."""
    C, O, B = x.shape[-1], linear.out_features, x.numel() // x.shape[-1]  # B rows
    is_row = B == 1 and C & -C == C  # and C a power of 2; C & -C is its largest factor 2**n
    if norm is not None and not is_row:
        x, norm = norm(x), None
    fits = B <= 16 and O % 16 == 0 and C % 16 == 0 and all(
        t is None or t.is_contiguous() for t in (linear.weight, x, residual))
    has_codes = fits and is_row and x.itemsize == 2 and C > getattr(linear, "group_size", C)
    is_ampere = torch.cuda.get_device_capability(x.device) >= (8, 0)  # multiplies integers
    codes = getattr(linear, "codes_by_output", None) if has_codes and is_ampere else None
    if not (codes or fits and linear.weight.shape == (O, C)):
        # By PyTorch: int4 for several texts, dense_4h_to_h in 8 bits, rare sizes.
        y = type(linear).forward(linear, x if norm is None else norm(x))
        y = y.relu().square() if square else y
        return y if residual is None else y + residual
    # The fastest on an H200 of those within 64 KiB of shared memory (int4, g < 128: 85 KiB).
    rows, size, num_warps = (
        (64, 512, 4) if O >= 8192 and linear.weight.itemsize == 1
        else (32, 512, 2) if O >= 8192 or codes else (16, 1024, 2))
    y, rows = x.new_empty(*x.shape[:-1], O), min(rows, O & -O)
    around = linear.bias, *((norm.weight, norm.bias, norm.eps) if norm else (None, None, 0.0))
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    if codes:
        (*weights, group), n = codes, codes[0].shape[1]  # n bytes per output
        triton_kernels()["codes"][O // rows,](
            x, *weights, *around, residual, y, O, C, n, group, rows, min(256, n), square, **options)
    else:
        triton_kernels()["linear"][O // rows,](
            x, linear.weight, getattr(linear, "scale", None), *around, residual, y, B, O, C,
            rows, min(size // x.itemsize, C & -C), square, **options)
    return y


def fused_sparse_linear(linear: nn.Module, table: Tensor, x: Tensor, residual: Tensor,
                        arrived: Tensor) -> Tensor:
    """linear(x) + residual, (1, 1, O), for one row x (1, 1, F). table is W^T (F, O), or the codes
    of an Int8SparseLinear. If a third of x is zero, this is as fast as fused_linear."""
    (F, stride), O = table.shape, linear.out_features
    columns, inputs = min(512, O & -O), min(512, F & -F)  # the fastest of some on an H200
    is_quantized = table.dtype == torch.uint8
    is_contiguous = all(t.is_contiguous() for t in (table, x, residual))
    if (x.shape != (1, 1, F) or stride != O + 8 * is_quantized or not is_contiguous
            or O // columns > len(arrived) or min(inputs, columns) < 16 or F // inputs > 128):
        return fused_linear(linear, x, residual=residual)
    y, nonzero = torch.empty_like(residual), x.new_empty(F, dtype=torch.int32)
    split_out = x.new_empty(F // inputs, O, dtype=torch.float32)
    scale = table.view(torch.float32)[:, O // 4 :] if is_quantized else None
    triton_kernels()["sparse"][O // columns, F // inputs](
        x, table, scale, linear.bias, residual, y, nonzero, split_out, arrived, O, stride,
        columns, inputs, 16, F // inputs, num_warps=4, enable_fp_fusion=True)
    return y


def fused_block(block: Block, tables: dict[nn.Linear, Table], x: Tensor,
                rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: StaticCache) -> Tensor:
    """Block.forward for a token of each text, x (B, 1, C), B <= 16. For B = 1, five kernels."""
    attn, mlp, down = block.self_attn, block.mlp, block.mlp.dense_4h_to_h
    qkv = fused_linear(attn.query_key_value, x, norm=block.input_layernorm)
    x = fused_linear(attn.dense, fused_attend(attn, qkv, rope, mask, cache), residual=x)
    h = fused_linear(mlp.dense_h_to_4h, x, norm=block.post_attention_layernorm, square=True)
    table = tables.get(down)
    rows = table.rows if table else down.weight if getattr(down, "is_by_input", False) else None
    if rows is None or len(x) > 1:
        return fused_linear(down, h, residual=x)
    return fused_sparse_linear(down, rows, h, x, cache.arrived)


def snapshot(modules: list[nn.Module]) -> list[Any]:
    """A value that changes when a module, a hook, a parameter, a buffer, a config or a function
    of Part I does."""
    return [rope_tables, apply_rope, causal_mask, attention, KVCache.attend] + [(
        type(m), type(m).forward, "forward" in vars(m), m.training, vars(m).get("eps"),
        *m._forward_hooks, *m._forward_pre_hooks, *map(id, m._modules.values()),
        repr(vars(m).get("config")),
        *[p is None or p.is_inference() or p._version for p in m._parameters.values()],
        *[p is None or (type(p), p.data_ptr(), p.stride())
          for p in (*m._parameters.values(), *m._buffers.values())]) for m in modules]


class CudaEngine(TableEngine):
    """The kernels above, and decoding by replaying a CUDA graph. A block runs in one of two ways:
    "block", by fused_block, for one token of each of up to 16 texts; else "attention", with only
    fused_attention. Both are compared with the plain block first, and after a module changes."""

    stream: torch.cuda.Stream | None = None  # only one, as libraries keep memory for each
    modules: Sequence[nn.Module] = ()
    state: list[Any] | None = None  # their snapshot; what follows belongs to it
    quantized_linears: list[nn.Module]
    forwards: dict[str, dict[nn.Module, Callable]]  # by way
    # (way, T > 1, B > 1, has mask, number of tables) -> longest cache tried; infinity: it differed
    compared: dict[tuple[str, bool, bool, bool, int], float]
    # cache -> its captured step and what that depends on; None: no step can be captured
    graphs: WeakKeyDictionary[StaticCache, tuple[Any, ...]] | None

    def make_cache(self, B: int, N: int, device: torch.device | None = None) -> KVCache:
        """A StaticCache, if there is Triton. If memory is short, the tables make room for it."""
        device = device or self.model.device
        make = partial(super().make_cache, B, N, device)
        if triton_kernels() is not None and type(super().make_cache(1, 1)) is KVCache:  # not yours
            make = partial(StaticCache, self.model.config, B, N, self.model.dtype, device)
        try:
            return make()
        except torch.OutOfMemoryError:
            self.tables.clear()
            return make()

    def find_forwards(self) -> None:
        """Find the fast forwards of blocks and their attention, if all that they read is known."""
        self.modules = list(self.model.modules())
        self.state, self.compared = snapshot(self.modules), {}
        self.forget_tables(self.modules)
        self.quantized_linears = [m for m in self.modules if hasattr(m, "is_by_input")]
        is_unhooked = all(is_unmodified(m, type(m)) for m in self.modules)
        self.graphs = WeakKeyDictionary() if is_unhooked else None  # hooks run in each pass
        kinds = {Block, Attention, MLP, nn.Linear, nn.LayerNorm, nn.Identity, nn.Dropout}
        kinds.update(map(type, self.quantized_linears))
        blocks = [m for m in self.modules if isinstance(m, Block)]
        inside = [m for block in blocks for m in block.modules()]
        layers = [m for m in inside if isinstance(m, Attention)]
        norms = [getattr(m, f"{name}_layernorm", None) for m in layers for name in "qk"]
        self.forwards = {"block": {}, "attention": {}}
        if all(is_unmodified(m, *kinds) for m in layers + norms):
            self.forwards["attention"] = {m: PassForward(fused_attention, m) for m in layers}
        if blocks and all(is_unmodified(m, *kinds) for m in inside):  # a head alone is not compared
            self.forwards["block"] = {m: PassForward(fused_block, m, self.tables) for m in blocks}
            if is_unmodified(head := getattr(self.model, "lm_head", None), *kinds):
                self.forwards["block"][head] = PassForward(fused_linear, head)

    def proven_forwards(self, T: int, mask: Tensor | None, cache: KVCache) -> dict:
        """The fast forwards for a pass over T positions; {} for a plain pass."""
        if not isinstance(cache, StaticCache) or len(vars(cache)) > 6:  # one is yours, and not here
            return {}
        if snapshot(self.modules) != self.state:
            self.find_forwards()
        B, N = cache.keys.shape[1], cache.keys.shape[3]
        for way in ("block", "attention") if T == 1 and B <= 16 else ("attention",):
            if not (found := self.forwards[way]):
                continue
            tables = len(self.tables) * (way == "block" and B == 1)
            key = way, T > 1, B > 1, mask is not None, tables
            if self.compared.get(key, 0) < N:
                is_proven = self.is_proven(found, cache, min(T, 17, N), mask is not None)
                self.compared[key] = N if is_proven else math.inf
            if self.compared[key] < math.inf:
                return found
            if way == "block":  # until a module changes, tables and codes are of no use
                self.forwards[way], self.downs = {}, []
                self.tables.clear()
                for m in self.quantized_linears:
                    m.packed = {}
        return {}

    def is_proven(self, forwards: dict, cache: StaticCache, T: int, has_mask: bool) -> bool:
        """Whether each block adds to x what it adds plainly, for T positions at a cache's end and
        at its start, as few positions show what many hide, like one more term in the softmax, and a
        small x what rounding hides. A step, T = 1, is run as it will be captured."""
        config, (L, B, _, N, _) = replace(self.model.config, num_hidden_layers=1), cache.keys.shape
        B, device, dtype = min(B, 2), cache.keys.device, cache.keys.dtype
        random = torch.Generator(device).manual_seed(0)
        static, *_ = caches = [kind(config, B, N, t, device) for kind, t in (
            (StaticCache, dtype), (KVCache, dtype), (KVCache, torch.float32))]
        keys, values = (x.normal_(generator=random) for x in (static.keys, static.values))
        for one in caches:  # all layers share the memory of one
            one.keys = one.keys.copy_(keys).expand(L, -1, -1, -1, -1)
            one.values = one.values.copy_(values).expand(L, -1, -1, -1, -1)
        noise = torch.randn(B, T, config.hidden_size, generator=random, device=device).to(dtype)
        padding = torch.ones(B, N, dtype=torch.long, device=device)
        padding[-1:, : N // 3] = 0

        def arguments(cache: KVCache, length: int) -> tuple[Any, ...]:
            """What PersimmonModel passes to its blocks, with x, after `length` positions."""
            cache.crop(length)
            cache = CapturedCache(cache) if cache is static and T == 1 else cache
            input_pos, S = cache.positions(B, T)
            mask = causal_mask(input_pos, S, padding[:, :S] if has_mask else None)
            return rope_tables(input_pos[None], config, cache.keys.dtype), mask, cache

        last = max(0, N - T - 1)  # where S is not N but in a captured pass
        try:
            for length, scale in (last, 1), (min(last, 3), 0.02):
                x = scale * noise
                fast_args, plain_args, exact_args = (arguments(one, length) for one in caches)
                for n, block in enumerate(m for m in self.model.modules() if isinstance(m, Block)):
                    with torch.cuda.device_of(x), replaced_forward(forwards):
                        fast = block(x, *fast_args) - x
                    plain = block(x, *plain_args) - x
                    exact = copy.deepcopy(block).float()(x.float(), *exact_args) - x.float()
                    if not is_as_exact(fast, plain, exact):
                        raise ValueError(f"block {n} computes something else")
            if T == 1 and self.graphs is not None:  # do modules outside of blocks attend?
                with torch.cuda.device_of(x), replaced_forward(forwards):
                    self.next_logits(padding[:, :1], padding if has_mask else None, fast_args[-1])
        except Exception as error:  # also: other shapes in an edited block, no C compiler
            warnings.warn(f"persimmon.py's CUDA kernels are not used: {error}")
            return False
        return True

    def prefill(self, ids: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """As in Engine, with the kernels."""
        self.forget_tables(self.modules)
        forwards = self.proven_forwards(ids.shape[1], mask, cache)
        is_single = len(ids) == 1 and self.state and self.forwards["block"]
        self.find_linears(self.modules if is_single else ())
        with torch.cuda.device_of(ids), replaced_forward(forwards):
            return self.next_logits(ids, mask, cache)

    def decode(self, ids: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """As in Engine, by replaying a graph; the next replay overwrites the logits."""
        self.prepare()
        forwards = self.proven_forwards(1, mask, cache)
        if not forwards or self.graphs is None:
            with torch.cuda.device_of(ids), replaced_forward(forwards):
                return self.next_logits(ids, mask, cache)
        key, captured = self.graphs.get(cache, (None, ()))
        if key != self.graph_key(mask, cache):
            captured = self.capture_cuda_graph(ids, mask, cache, forwards)
            self.graphs[cache] = self.graph_key(mask, cache), captured  # now with packed weights
        graph, own_ids, logits, *_ = captured
        own_ids.copy_(ids)
        graph.replay()
        cache.crop(cache.length + 1)
        return logits

    def graph_key(self, mask: Tensor | None, cache: StaticCache) -> list[Any]:
        """What a captured graph depends on, beside `state`."""
        packed = chain.from_iterable(m.packed.values() for m in self.quantized_linears)
        own = cache.keys, cache.values, *(t.rows for t in (*self.tables.values(), *packed))
        return [id(mask), cache.keys.shape, *(tensor.data_ptr() for tensor in own)]

    def capture_cuda_graph(self, ids: Tensor, mask: Tensor | None, cache: StaticCache,
                           forwards: dict) -> tuple[Any, ...]:
        """Capture next_logits(ids) as a CUDA graph. Returns it; what it reads, ids (B, 1), and
        writes, logits (B, V); and the masks, only to keep their memory."""
        if self.stream is None or self.stream.device != ids.device:
            self.stream = torch.cuda.Stream(ids.device)
        own_ids, N = ids.clone(), cache.keys.shape[3]
        wide_mask = None if mask is None else nn.functional.pad(mask, (0, N - mask.shape[1]))
        step = partial(self.next_logits, own_ids, wide_mask, CapturedCache(cache))
        with torch.cuda.device(ids.device), replaced_forward(forwards):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                step()  # first without capture: kernels compile, libraries allocate memory
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                logits = step()
        return graph, own_ids, logits, mask, wide_mask

    def to_host(self, results: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[list, list]]:
        """As in Engine, one step late: the GPU computes a step while Python handles the one before.
        The first comes at once, since the second may take long, to compile kernels."""
        waiting: list[tuple[list[Tensor], torch.cuda.Event]] = []
        for step, result in enumerate(chain(results, [None])):
            if result is not None:
                copies = [tensor.to("cpu", non_blocking=True) for tensor in result]
                waiting.append((copies, torch.cuda.current_stream(result[0].device).record_event()))
            if waiting and step != 1:
                copies, is_copied = waiting.pop(0)
                is_copied.synchronize()
                yield tuple(tensor.tolist() for tensor in copies)


ENGINES["cuda"] = CudaEngine


# === Part III d. Several devices ==================================================================
#
# Tensor parallelism (Shoeybi et al., arXiv 1909.08053) for generation, with a process per device.
# Each of n processes has H/n heads and F/n activations of every block, and V/n rows of lm_head. The
# outputs of attention and MLP are summed. All run the same program, as under torchrun:
#
#     model = parallelize(PersimmonForCausalLM.from_pretrained(folder)).to(device)
#     model.generate(ids, temperature=0.8)  # ids are the same in each, and so is the result

from datetime import timedelta

import torch.distributed as dist


def summed(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    """A forward hook that returns the sum of all processes' results."""
    y = y.clone()
    dist.all_reduce(y)
    return y


def gathered(module: nn.Module, args: Any, own: Tensor) -> Tensor:
    """A forward hook that returns the logits (B, T, V) of all processes' rows of lm_head."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts, dim=-1)


def sample_together(draw: Callable[..., Tensor], *args: Any) -> Tensor:
    """What process 0 samples: the others may have another seed, or round in another way."""
    ids = draw(*args)
    dist.broadcast(ids, 0)
    return ids


class ParallelForCausalLM(PersimmonForCausalLM):
    """A model after parallelize: a process has only its share of the weights, and can't save."""

    def save_pretrained(self, folder: str | Path) -> None:
        raise ValueError("a model can't be saved after parallelize")


def parallelize(model: PersimmonForCausalLM) -> ParallelForCausalLM:
    """Cut the model down to this process's share, in place; it then has no gradients. Before that,
    keep weights on the CPU, mapped from the file: then only the share is ever in memory. ValueError
    if sizes are no multiples of n, or if the first two blocks compute something else afterwards, as
    after an edit of MLP; discard the model then, as it may be half cut. model.config has the
    share's sizes afterwards, model.model.config the whole ones."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=20))  # others wait while you type
    n, rank, config = dist.get_world_size(), dist.get_rank(), model.config
    if type(model) is not PersimmonForCausalLM:
        raise ValueError(f"parallelize takes a PersimmonForCausalLM, not a {type(model).__name__}")
    model.eval().requires_grad_(False)  # the sum has no derivative, and dropout differs each time
    for name in ("num_attention_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % n != 0:
            raise ValueError(f"{name} = {getattr(config, name)} is not a multiple of {n} processes")

    def results() -> list[Tensor]:
        """What attention and MLP of the first two blocks make of 64 positions."""
        x = torch.arange(64.0 * config.hidden_size, device=model.device).sin()
        x = x.view(1, 64, -1).to(model.dtype)
        rope = rope_tables(torch.arange(64, device=x.device)[None], config, x.dtype)
        return [y for block in model.model.layers[:2]
                for y in (block.self_attn(x, rope, None, None), block.mlp(x))]

    def cut(linear: nn.Module, dim: int) -> None:
        """Keep this process's share of the outputs of a Linear, dim = 0, or of its inputs, 1."""
        side = ("out_features", "in_features")[dim]
        axes = getattr(linear, "axes", ({"weight": 0}, {"weight": 1}))[dim]
        if dim == 0 and linear.bias is not None:
            axes = {**axes, "bias": 0}
        elif rank > 0:
            linear.bias = None  # process 0 adds it
        for name, axis in axes.items():
            tensor = getattr(linear, name).detach()
            size = tensor.shape[axis]  # with int4's padding, more than the layer has
            if size % n != 0 or size > getattr(linear, side):
                raise ValueError(f"{name} {tuple(tensor.shape)} can't be divided by {n} processes")
            part = tensor.chunk(n, axis)[rank]
            is_parameter = name in linear._parameters  # its rows stay mapped: nothing is copied
            part = nn.Parameter(part.contiguous(), False) if is_parameter else part.clone()
            setattr(linear, name, part)
        setattr(linear, side, getattr(linear, side) // n)

    whole = results()
    for block in model.model.layers:
        layer, mlp = block.self_attn, block.mlp
        if (type(layer), type(mlp)) != (Attention, MLP):
            raise ValueError("parallelize knows no subclasses of Attention and MLP")
        layer.num_heads //= n  # the rows of query_key_value are ordered by head
        cut(layer.query_key_value, 0), cut(layer.dense, 1)
        cut(mlp.dense_h_to_4h, 0), cut(mlp.dense_4h_to_h, 1)
        for module in layer, mlp:
            module.register_forward_hook(summed, prepend=True)
    cut(model.lm_head, 0)
    model.sample = partial(sample_together, model.sample)
    model.lm_head = nn.Sequential(model.lm_head)
    model.lm_head.register_forward_hook(gathered)  # engines leave a Linear with hooks as it is
    model.config = replace(config, num_attention_heads=config.num_attention_heads // n,
                           hidden_size=config.hidden_size // n)  # for the cache
    model.__class__ = ParallelForCausalLM
    with suppress(RuntimeError):  # a group of NCCL's alone can't sum what is on the CPU
        for one, total in zip(whole, results()):
            if one.isfinite().all() and not (total - one).norm() <= 0.05 * one.norm():
                raise ValueError("the sum of shares is another result: parallelize knows only the "
                                 "Attention and MLP that persimmon.py had")
    return model


__all__ += ["parallelize"]
