"""Convert Persimmon weights to a folder that persimmon.py and transformers load: `python convert.py SOURCE OUTPUT`.

SOURCE is one of
    Adept's release: 8b_chat_model_release.tar (read in place), the folder unpacked from it, or its model_optim_rng.pt
    a folder from the hub: pytorch_model-0000N-of-0000M.bin with an index, or one pytorch_model.bin
    a folder with safetensors, to change dtype or shard size

Nothing in a pickle is executed: torch's weights-only unpickler reads it, with inert stand-ins for the classes it names,
and finds names, shapes and file offsets; the numbers come straight from a map of the file, a piece at a time. OUTPUT
appears when it is complete and has been read back, or not at all. Exit codes: 0; 2 for an error; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # while torch is imported

import torch
from torch import Tensor, nn

import persimmon
from persimmon import (
    SAFETENSORS_DTYPES,
    PersimmonConfig,
    PersimmonPreTrainedModel,
    QuantizedLinear,
    Tokenizer,
    safetensors_header,
    tensor_files,
)
from persimmon import _require as require

PIECE = 1 << 26  # bytes that are copied at once
MD5 = {  # of Adept's two releases, from their README
    "cd0320cba9efad9ccd18e9ec4d16ae1b": "the base model",
    "663aeace07269c44e90f4e8bcd07f32a": "the chat model",
}

# What a source may hold beside weights, by the end of its name, and why it is left out.
IGNORED = {
    "rotary_emb.inv_freq": "computed from rope_theta",
    "args": "becomes config.json",
    "iteration": "a number of the training run",
    "checkpoint_version": "a number of Megatron's",
    "tokens": "a number of the training run",
    "rng_state": "of the training run",
    "optimizer": "of the training run",
    "opt_param_scheduler": "of the training run",
}
# Megatron's names -> transformers'; what follows the part replaced is the same.
RENAMED = {
    "language_model.embedding.word_embeddings.": "model.embed_tokens.",
    "language_model.encoder.": "model.",
    "word_embeddings_for_head.": "lm_head.",
    ".self_attention.": ".self_attn.",
}
# Names in Adept's args -> in config.json. The last three are of training, and may be absent.
ARGS = {
    "padded_vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "layernorm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
    "hidden_dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "init_method_std": "initializer_range",
}
UNUSED = range(3, 70003)  # ids that stand for image patches and occur in no text


class Source(NamedTuple):
    """What is to be converted, with transformers' names."""

    kind: str
    tensors: dict[str, Tensor]  # mapped from the files: nothing is read yet
    config: PersimmonConfig
    architecture: str
    files: dict[str, bytes]  # name -> contents: tokenizer.model, perhaps tokenizer_config.json, ...


# --- reading ----------------------------------------------------------------------------------------------------------


class Inert:
    """Stands for any class or function that a pickle names: it takes what it is given, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def member_offsets(file: BinaryIO, where: str) -> set[int]:
    """Where the contents of each member of a zip archive begin; ValueError for one that is not as torch writes it."""
    offsets = set()
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                is_plain = member.compress_type == zipfile.ZIP_STORED
                require(is_plain, f"{where} is compressed: write it anew with torch.save")
                if member.filename.endswith("/byteorder"):
                    require(archive.read(member) == b"little", f"{where} has its numbers in big-endian order")
                file.seek(member.header_offset)
                header = file.read(30)  # ends with the lengths of name and extra field, which follow
                lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                offsets.add(member.header_offset + 30 + lengths)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{where} is cut off, damaged or no checkpoint: {error}") from None
    file.seek(0)
    return offsets


def read_pickle(path: Path, file: BinaryIO, start: int) -> dict[str, Any]:
    """The dict in a torch.save file that begins at byte `start` of `path`, its tensors mapped from there.

    `file` is the opened file from there on. Raises ValueError where torch can't read it safely. Under fake tensors,
    torch.load makes shapes without numbers, and notes where in the file each storage begins: by a rule, which is why
    that is compared with the archive.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    here = f"{path}{f' ({file.name})' if start else ''}"
    offsets = member_offsets(file, here)
    try:
        unknown = get_unsafe_globals_in_checkpoint(file)
        stand_ins = [(type("Inert", (Inert,), {}), name) for name in unknown if name != "argparse.Namespace"]
        file.seek(0)
        with safe_globals([(argparse.Namespace, "argparse.Namespace"), *stand_ins]), FakeTensorMode():
            loaded = torch.load(file, weights_only=True)
    except Exception as error:  # whatever a damaged or malicious pickle brings about
        told = re.search(r"(Trying to load|Unsupported|Can only) .*", str(error))  # torch says much about it
        reason = told[0] if told else (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{here} is damaged or no checkpoint that can be read safely: {reason[:200]}") from None
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)

    def stored(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: stored(inner, f"{name}.{key}" if name else f"{key}") for key, inner in value.items()}
        if not isinstance(value, Tensor):
            return value
        is_plain = value.layout == torch.strided and value.is_contiguous() and not (value.is_neg() or value.is_conj())
        require(is_plain, f"{here} has the tensor {name} with its numbers in another order or form")
        at = value.untyped_storage()._checkpoint_offset
        is_torchs = at in offsets and at % value.dtype.itemsize == 0
        require(is_torchs, f"{here} has the numbers of {name} elsewhere than torch would write them: read it with "
                "torch.load and write it anew with torch.save")
        offset = start + at + value.storage_offset() * value.dtype.itemsize
        data = mapped[offset : offset + value.nbytes]
        require(len(data) == value.nbytes, f"{here} is cut off: the tensor {name} reaches past its end")
        return data.view(value.dtype).view(value.shape)

    require(isinstance(loaded, dict), f"{here} holds no dict of tensors")
    try:
        return stored(loaded, "")
    except RecursionError:
        raise ValueError(f"{here} holds dicts in dicts without end") from None


def flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts whose keys may have dots themselves: ("a.b.c", value)."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_ignored(name: str) -> bool:
    """Whether IGNORED lists the name, alone, as the end of one, or as what holds it."""
    return any(name == key or name.endswith(f".{key}") or name.startswith(f"{key}.") for key in IGNORED)


def read_release(where: str, checkpoint: dict, tokenizer: bytes) -> Source:
    """Adept's pickle, with args for a config."""
    require(isinstance(checkpoint, dict) and isinstance(checkpoint.get("model"), dict), f"{where} has no dict 'model'")
    args = checkpoint.get("args")
    require(isinstance(args, argparse.Namespace), f"{where} has no 'args', of which config.json would be made")
    for key in checkpoint:
        require(key == "model" or is_ignored(str(key)), f"{where} has an entry {key!r}, of which nothing is known")
    tensors = {}
    for name, value in flat(checkpoint["model"]):
        if is_ignored(name):
            continue
        require(isinstance(value, Tensor), f"{where} has {name} in its model, which is no tensor")
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        require(name not in tensors, f"{where} has two tensors for {name}")
        tensors[name] = value

    missing = {*list(ARGS)[:-3], "qk_layernorm"} - vars(args).keys()
    require(not missing, f"{where} has no args.{min(missing, default='')}")
    values = {new: getattr(args, old) for old, new in ARGS.items() if hasattr(args, old)}
    config = PersimmonConfig(**values, qk_layernorm=args.qk_layernorm != "none")
    for name, only in (("tensor_model_parallel_size", (1,)), ("pipeline_model_parallel_size", (1,)),
                       ("sq_relu", (True,)), ("untie_embeddings", (True,)), ("pos_emb", ("rotary",)),
                       ("kv_channels", (None, config.head_dim)), ("qk_layernorm", ("none", "weights_per_layer"))):
        value = getattr(args, name, only[0])
        require(value in only, f"{where} has args.{name} = {value!r}, which is not supported: "
                f"{' or '.join(map(repr, only))} is")
    return Source("Adept's release", tensors, config, "PersimmonForCausalLM", {"tokenizer.model": tokenizer})


def release_checkpoint(names: Sequence[str], latest: str, where: str) -> str:
    """Which of the names is the checkpoint of the iteration that latest_checkpointed_iteration.txt gives."""
    require(latest.strip().isdigit(), f"{where}: latest_checkpointed_iteration.txt holds {latest[:40]!r} and no number")
    pattern = rf"(^|/)iter_0*{int(latest)}/mp_rank_[^/]+/model_optim_rng\.pt$"
    parts = [name for name in names if re.search(pattern, name)]
    require(bool(parts), f"{where} has no iter_{int(latest):07}/mp_rank_00/model_optim_rng.pt")
    require(len(parts) == 1, f"{where} is in {len(parts)} parts (mp_rank_*), which is not supported: Adept's is in one")
    return parts[0]


def read_source(path: Path, tokenizer: Path | None) -> Source:
    """Find out what `path` is, and read everything but the numbers."""
    if path.is_file() and tarfile.is_tarfile(path):
        try:
            tar = tarfile.open(path, "r:")  # uncompressed: the members lie in it as they are
            members = {member.name: member for member in tar.getmembers() if member.isreg()}
        except tarfile.TarError as error:
            raise ValueError(f"{path} is compressed, cut off or damaged: {error}") from None
        with tar:

            def find(end: str) -> bytes:
                names = [name for name in members if name.split("/")[-1] == end and name.count("/") <= 1]
                require(len(names) == 1, f"{path} has {len(names)} members {end}, and one is needed")
                return tar.extractfile(members[names[0]]).read()

            latest = find("latest_checkpointed_iteration.txt").decode("ascii", "replace")
            member = members[release_checkpoint(list(members), latest, str(path))]
            require(not member.issparse(), f"{path} has {member.name} as a sparse file: unpack the archive first")
            checkpoint = read_pickle(path, tar.extractfile(member), member.offset_data)
            vocabulary = tokenizer.read_bytes() if tokenizer else find("adept_vocab.model")
        return read_release(str(path), checkpoint, vocabulary)
    if path.is_file():
        require(tokenizer is not None, f"{path} comes without its tokenizer: name it with --tokenizer")
        with path.open("rb") as file:
            return read_release(str(path), read_pickle(path, file, 0), tokenizer.read_bytes())
    if not path.is_dir():
        raise FileNotFoundError(f"there is no {path}")
    if (path / "latest_checkpointed_iteration.txt").is_file():
        names = [str(file.relative_to(path)) for file in path.rglob("model_optim_rng.pt")]
        latest = (path / "latest_checkpointed_iteration.txt").read_text(errors="replace")
        return read_source(path / release_checkpoint(names, latest, str(path)), tokenizer or path / "adept_vocab.model")

    config = PersimmonConfig.from_pretrained(path)
    require(config.quantize is None, f"{path} is quantized, in {config.quantize}: start from weights in 16 or 32 bit")
    architectures = persimmon._read_json(path / "config.json").get("architectures") or ["PersimmonForCausalLM"]
    known = [cls.__name__ for cls in PersimmonPreTrainedModel.__subclasses__()]
    require(isinstance(architectures, list) and architectures[0] in known,
            f"{path}/config.json names the architectures {architectures}, of which none is known here")
    architecture = architectures[0]
    names = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
    files = {name: (path / name).read_bytes() for name in names if (path / name).is_file()}
    if tokenizer is not None:
        files["tokenizer.model"] = tokenizer.read_bytes()
    require("tokenizer.model" in files, f"{path} has no tokenizer.model: name one with --tokenizer")
    if (path / "model.safetensors").is_file() or (path / "model.safetensors.index.json").is_file():
        return Source("safetensors", read_safetensors(path), config, architecture, files)

    index = path / "pytorch_model.bin.index.json"
    where = persimmon._read_json(index).get("weight_map") if index.is_file() else {}
    require(isinstance(where, dict) and all(isinstance(shard, str) for shard in where.values()),
            f"{index} has no weight_map from tensor names to files")
    require(bool(where) or (path / "pytorch_model.bin").is_file(), f"{path} holds no weights: no .tar, .pt, .bin or "
            "safetensors of a kind that is known here")
    tensors = {}
    for shard in sorted(set(where.values())) or ["pytorch_model.bin"]:
        with (path / shard).open("rb") as file:
            for name, value in flat(read_pickle(path / shard, file, 0)):
                require(not where or where.get(name) == shard, f"{index} does not place {name} in {shard}")
                require(name not in tensors, f"{path} has the tensor {name} twice")
                if not is_ignored(name):
                    require(isinstance(value, Tensor), f"{path / shard} has {name}, which is no tensor")
                    tensors[name] = value
    missing = {name for name in where if not is_ignored(name)} - tensors.keys()
    require(not missing, f"{index} places {min(missing, default='')} in a file that has no such tensor")
    return Source("hub", tensors, config, architecture, files)


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in a folder of safetensors."""
    tensors = {}
    for path in sorted(set(tensor_files(folder).values())):
        with persimmon._open(path) as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys() if not is_ignored(name)}
    return tensors


# --- the vocabulary ---------------------------------------------------------------------------------------------------


def fields_of(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Each field of a protobuf message: number, the whole field, and what is in it if it is length-delimited."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
            if byte < 0x80:
                return value

    while at < len(message):
        begin, tag = at, varint()
        if tag & 7 == 2:
            size = varint()
            at += size
            yield tag >> 3, message[begin:at], message[at - size : at]
        else:
            if tag & 7 == 0:
                varint()
            else:
                at += {1: 8, 5: 4}[tag & 7]
            yield tag >> 3, message[begin:at], b""


def without_unused(model: bytes) -> bytes:
    """A SentencePiece model without the pieces of the ids in UNUSED; the ids after them move down.

    ModelProto.pieces is field 1, repeated; a piece is text (1), score (2) and type (3), normal where it has none.
    Refused unless the pieces are placeholders, by this rule: none is a normal piece, a byte or unknown, so that no
    segmentation of a text can contain one that does not spell it out, and all are one text around different numbers.
    """
    pieces = [piece for number, _, piece in fields_of(model) if number == 1]
    require(len(pieces) > UNUSED.stop, f"the tokenizer has {len(pieces)} pieces, and none to drop after {UNUSED.stop}")
    texts = []
    for piece in pieces[UNUSED.start : UNUSED.stop]:
        content = {number: (whole, inner) for number, whole, inner in fields_of(piece)}
        # 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte
        kind = content[3][0][-1] if 3 in content else 1
        text = content[1][1].decode("utf-8")
        require(kind in (3, 4, 5), f"--drop-unused: the piece {text!r} is one of ordinary text, and no placeholder")
        texts.append(text)
    shapes = {re.sub(r"\d+", "#", text) for text in texts}
    require(len(shapes) == 1,  # and SentencePiece has seen to it that no two texts are equal
            f"--drop-unused: the pieces from {texts[0]!r} to {texts[-1]!r} are not one text around different numbers")
    kept, index = [], 0
    for number, whole, _ in fields_of(model):
        if number != 1 or index not in UNUSED:
            kept.append(whole)
        index += number == 1
    return b"".join(kept)


# --- writing ----------------------------------------------------------------------------------------------------------


class Progress:
    """One line on stderr, where that is a terminal: what is done, GB/s, time left."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.start = self.shown = time.monotonic()

    def add(self, count: int) -> None:
        """Count bytes as done."""
        self.done += count
        now = time.monotonic()
        if sys.stderr.isatty() and (now - self.shown > 0.2 or self.done >= self.total):
            self.shown, seconds = now, now - self.start
            left = seconds * (self.total - self.done) / max(self.done, 1)
            filled = "#" * (30 * self.done // max(self.total, 1))
            print(f"\r{self.what} [{filled:30}] {self.done / 1e9:6.2f} of {self.total / 1e9:.2f} GB, "
                  f"{self.done / 1e9 / max(seconds, 1e-9):.2f} GB/s, {left:.0f} s left \x1b[K",
                  end="\n" if self.done >= self.total else "", file=sys.stderr, flush=True)

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start


def is_finite(numbers: Tensor) -> bool:
    """Whether all of them are; faster than isfinite().all(), which makes a tensor of answers."""
    low, high = numbers.aminmax()  # both are NaN if any number is
    return bool(low.isfinite() and high.isfinite())


def pieces_of(name: str, tensor: Tensor, dtype: torch.dtype, rows: Sequence[range] | None) -> Iterator[memoryview]:
    """The bytes of a tensor in another dtype, some rows at a time; ValueError for a number that is not finite."""
    step = max(1, PIECE // (4 * tensor[0].numel()))
    for block in rows or [range(len(tensor))]:
        for at in range(block.start, block.stop, step):
            piece = tensor[at : min(at + step, block.stop)]
            require(is_finite(piece), f"{name} has NaN or infinite numbers")
            cast = piece.to(dtype)
            require(cast is piece or is_finite(cast), f"{name} overflows in {dtype}")
            yield memoryview(cast.view(torch.uint8).numpy()).cast("B")


class Planned(NamedTuple):
    """A tensor to be written."""

    name: str
    source: Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: Sequence[range] | None  # of the source, where not all are wanted
    quantized: Callable[[], dict[str, Tensor]] | None = None  # makes this tensor, and the others of its matrix

    @property
    def nbytes(self) -> int:
        """In the output."""
        return self.dtype.itemsize * math.prod(self.shape)


def write_shard(file: Path, plan: list[Planned], progress: Progress) -> dict[str, int]:
    """Write a safetensors file, a piece of a tensor at a time; the CRC-32 of each tensor.

    (The safetensors library wants all tensors of a file in memory.)
    """
    sums, made = {}, {}
    with file.open("wb") as out:
        out.write(safetensors_header((item.name, item.dtype, item.shape) for item in plan))
        for item in plan:
            if item.quantized is None:
                pieces = pieces_of(item.name, item.source, item.dtype, item.rows)
            else:
                made = made if item.name in made else item.quantized()
                pieces = [memoryview(made.pop(item.name).view(torch.uint8).numpy()).cast("B")]
            checksum = 0
            for piece in pieces:
                checksum = zlib.crc32(piece, checksum)
                out.write(piece)
                progress.add(len(piece))
            sums[item.name] = checksum
        out.flush()
        os.fsync(out.fileno())
    return sums


def check_folder(folder: Path, plan: list[Planned], sums: dict[str, int], progress: Progress) -> None:
    """Read everything back; ValueError where shape, dtype or checksum is not what was meant."""
    written = read_safetensors(folder)
    require(written.keys() == {item.name for item in plan}, f"{folder} does not hold the tensors that were written")
    for item in plan:
        found, checksum = written[item.name], 0
        is_same = (found.dtype, tuple(found.shape)) == (item.dtype, item.shape)
        require(is_same, f"{item.name} was not written as it should be")
        for piece in found.flatten().view(torch.uint8).split(PIECE):
            checksum = zlib.crc32(piece.numpy(), checksum)
            progress.add(len(piece))
        require(checksum == sums[item.name], f"{item.name} reads back differently than written: is the disk sound?")


def plan_output(source: Source, args: argparse.Namespace) -> tuple[list[Planned], PersimmonConfig, bytes]:
    """What is to be written: tensors in the model's order, its config, and the tokenizer."""
    from sentencepiece import SentencePieceProcessor

    config, vocabulary = source.config, source.files["tokenizer.model"]
    with torch.device("meta"):
        model = getattr(persimmon, source.architecture)(config)
    own = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    for name, tensor in source.tensors.items():
        require(name in own, f"the source has the tensor {name}, which no {source.architecture} of this config has")
        found, shape = tuple(tensor.shape), own[name]
        require(found == shape, f"the source has {name} in shape {found}: its config makes it {shape}")
        require(tensor.dtype in SAFETENSORS_DTYPES and tensor.is_floating_point(),
                f"the source has {name} as {tensor.dtype}, which is not a dtype of weights")
    try:
        SentencePieceProcessor(model_proto=vocabulary)
    except RuntimeError:
        where = args.tokenizer or f"the tokenizer of {args.source}"
        raise ValueError(f"{where} is damaged or no SentencePiece model") from None
    pieces = sum(number == 1 for number, _, _ in fields_of(vocabulary))
    V = config.vocab_size
    require(0 < pieces <= V, f"the tokenizer has {pieces} pieces, and the model {V} rows for them")
    missing = own.keys() - source.tensors.keys()
    require(not missing, f"the source lacks the tensor {min(missing, default='')} ({len(missing)} missing in all)")
    rows = None
    if args.drop_unused:
        vocabulary = without_unused(vocabulary)
        rows = [range(UNUSED.start), range(UNUSED.stop, config.vocab_size)]
        pad = config.pad_token_id
        require(pad not in UNUSED, f"--drop-unused would drop pad_token_id = {pad}")
        pad = pad - len(UNUSED) if pad is not None and pad >= UNUSED.stop else pad
        config = replace(config, vocab_size=config.vocab_size - len(UNUSED), pad_token_id=pad)
    plan = []
    for name, shape in own.items():
        tensor = source.tensors[name]
        dtype = tensor.dtype if args.dtype == "keep" else getattr(torch, args.dtype)
        cut = rows if name in ("model.embed_tokens.weight", "embed_tokens.weight", "lm_head.weight") else None
        plan.append(Planned(name, tensor, dtype, (config.vocab_size, *shape[1:]) if cut else shape, cut))
    return plan, replace(config, dtype=str(plan[0].dtype).removeprefix("torch.")), vocabulary


def quantized(prefix: str, empty: QuantizedLinear, item: Planned) -> dict[str, Tensor]:
    """The tensors, by name, that are stored for one matrix, `item`; the layer `empty` has them without values."""
    weight = item.source
    if item.rows is not None:
        weight = torch.cat([weight[rows.start : rows.stop] for rows in item.rows])
    linear = nn.Linear(empty.in_features, empty.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(item.dtype), requires_grad=False)
    try:
        layer = type(empty)(linear, empty.group_size)
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from None
    return {f"{prefix}.{name}": tensor for name, tensor in layer.named_buffers()}


def quantized_plan(plan: list[Planned], config: PersimmonConfig, architecture: str, kind: str,
                   group_size: int) -> tuple[list[Planned], PersimmonConfig]:
    """The plan with the tensors of section 10 of persimmon.py for each matrix, and its config."""
    with torch.device("meta"):
        model = persimmon.quantize_model(getattr(persimmon, architecture)(config), kind, group_size)
    items, new = {item.name: item for item in plan}, []
    for name, empty in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        layer = model.get_submodule(prefix)
        if not isinstance(layer, QuantizedLinear) or last == "bias":
            new.append(items[name])
            continue
        matrix = items[f"{prefix}.weight"]
        dtype = matrix.dtype if empty.is_floating_point() else empty.dtype
        make = partial(quantized, prefix, layer, matrix)
        new.append(matrix._replace(name=name, dtype=dtype, shape=tuple(empty.shape), quantized=make))
    return new, model.config


def write_folder(folder: Path, source: Source, plan: list[Planned], config: PersimmonConfig, vocabulary: bytes,
                 shard_size: int) -> tuple[float, float]:
    """Write and read back everything; seconds for each."""
    (folder / "tokenizer.model").write_bytes(vocabulary)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    end = tokenizer.end_of_text
    config = replace(config, bos_token_id=end, eos_token_id=end)
    piece = tokenizer.processor.id_to_piece(end)
    settings = {"add_bos_token": True, "add_eos_token": False, "bos_token": piece, "eos_token": None,
                "unk_token": "<unk>", "model_max_length": config.max_position_embeddings,
                "tokenizer_class": "LlamaTokenizer"}
    made = {
        "config.json": {"architectures": [source.architecture], **config.to_dict()},
        "generation_config.json": {"bos_token_id": end, "eos_token_id": end},
        "tokenizer_config.json": settings,
        "special_tokens_map.json": {"bos_token": piece, "unk_token": "<unk>"},
    }
    for name, content in made.items():
        text = json.dumps(content, indent=2).encode() + b"\n"
        (folder / name).write_bytes(source.files.get(name, text))

    shards: list[list[Planned]] = [[]]
    for item in plan:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + item.nbytes > shard_size:
            shards.append([])
        shards[-1].append(item)
    total = sum(item.nbytes for item in plan)
    writing, sums, places = Progress("writing", total), {}, {}
    for n, shard in enumerate(shards, start=1):
        name = f"model-{n:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        sums |= write_shard(folder / name, shard, writing)
        places |= {item.name: name for item in shard}
    write_seconds = writing.seconds()
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    checking = Progress("checking", total)
    check_folder(folder, plan, sums, checking)
    return write_seconds, checking.seconds()


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMG]i?B)?", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    unit = (match[2] or "").upper()
    return int(float(match[1]) * (1024 if "I" in unit else 1000) ** (" KMG".index(unit[0]) if unit else 0))


def verify_md5(path: Path) -> str:
    """Which release a tar is, by its MD5; ValueError for none."""
    digest, progress = hashlib.md5(usedforsecurity=False), Progress("verifying", path.stat().st_size)
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            progress.add(len(piece))
    require(digest.hexdigest() in MD5, f"{path} has the MD5 {digest.hexdigest()}, which is not one of Adept's releases "
            f"({' or '.join(MD5)}): download it again")
    return MD5[digest.hexdigest()]


def is_left_over(folder: Path) -> bool:
    """Whether it is what a killed run leaves: a model's folder, or the beginning of one."""
    parts = (".safetensors", ".json", ".model")
    return (folder / "config.json").is_file() or (folder.is_dir() and all(f.suffix in parts for f in folder.iterdir()))


def run(args: argparse.Namespace) -> int:
    """Convert; the exit code."""
    output, source_path = Path(os.path.realpath(args.output)), Path(os.path.realpath(args.source))
    require(output.name != "", f"OUTPUT {output} can't be made: name a folder that is to be")
    scratch, replaced = (output.with_name(f"{output.name}.{what}") for what in ("unfinished", "replaced"))
    for folder in (output, scratch, replaced):
        is_apart = folder != source_path and folder not in source_path.parents
        require(is_apart, f"{folder}, which is OUTPUT or made on the way to it, is or holds the source")
        require(folder == output or not folder.exists() or is_left_over(folder),
                f"{folder} is in the way: its name is needed on the way to OUTPUT, and it holds no model")
    if replaced.exists() and not output.exists() and not args.dry_run:
        replaced.rename(output)  # a run was killed between the two renames at the end
    is_model = (output / "config.json").is_file() or (output.is_dir() and not any(output.iterdir()))
    require(not output.exists() or args.force, f"{output} exists: give another name, or --force to replace it")
    require(not output.exists() or is_model, f"{output} is not a model's folder: --force does not replace it")
    if args.verify:
        require(args.source.is_file() and tarfile.is_tarfile(args.source), "--verify is for Adept's .tar files")
        print(f"{args.source} is {verify_md5(args.source)} of Adept's release", file=sys.stderr)

    source = read_source(args.source, args.tokenizer)
    plan, config, vocabulary = plan_output(source, args)
    parameters = sum(math.prod(item.shape) for item in plan)
    if args.quantize:
        plan, config = quantized_plan(plan, config, source.architecture, args.quantize, args.group_size)
    total = sum(item.nbytes for item in plan)
    room = next(p for p in output.parents if p.exists())
    free = shutil.disk_usage(room).free
    needed = total * 1.01 + len(vocabulary)
    require(free > needed, f"{room} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed")
    dtypes = "/".join(sorted({SAFETENSORS_DTYPES[item.dtype] for item in plan}))
    print(f"source      {source.kind}, {len(source.tensors)} tensors\n"
          f"output      {parameters:,} parameters, {total / 1e9:.2f} GB in "
          f"{dtypes}, {config.vocab_size} tokens", flush=True)
    if args.dry_run:
        return 0

    for left_over in (scratch, replaced):
        if left_over.exists():
            shutil.rmtree(left_over)
    scratch.mkdir(parents=True)
    try:
        written, checked = write_folder(scratch, source, plan, config, vocabulary, args.shard_size)
        if output.exists():
            output.rename(replaced)
        scratch.rename(output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    print(f"written     {written:.1f} s, {total / 1e9 / max(written, 1e-9):.2f} GB/s\n"
          f"read back   {checked:.1f} s\n\n    python sample.py --model {args.output}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; errors become one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description="Convert Persimmon weights to safetensors.", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"convert.py: error: {message} (--help lists the options)\n")
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help="Adept's .tar, the folder unpacked from it, or its "
        "model_optim_rng.pt; a folder with pytorch_model*.bin; a folder with safetensors")
    add("output", metavar="OUTPUT", type=Path, help="folder to make")
    add("--dtype", choices=("keep", "bfloat16", "float16", "float32"), default="keep", help="(default: %(default)s)")
    add("--shard-size", metavar="SIZE", type=parse_size, default="5GB", help="of a file (default: %(default)s)")
    add("--quantize", choices=("int8", "int4"), help="store the matrices in 8 or 4 bits, for persimmon.py alone")
    add("--group-size", metavar="G", type=int, choices=(32, 64, 128), default=128, help="weights that share a scale "
        "with --quantize int4: 32, 64 or 128 (default: %(default)s)")
    add("--tokenizer", metavar="FILE", type=Path, help="adept_vocab.model or tokenizer.model, where SOURCE has none")
    add("--drop-unused", action="store_true", help="leave out the vocabulary's rows 3 to 70002, which are kept for "
        "images and never used: 1.15 GB less in 16 bit, the same text")
    add("--verify", action="store_true", help="compare the .tar with Adept's published MD5 first")
    add("--dry-run", action="store_true", help="look at everything, write nothing")
    add("--force", action="store_true", help="replace OUTPUT, if it is a model's folder")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # closed: errors have nowhere to go
    args = parser.parse_args(argv)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # torch is imported: Ctrl-C can be orderly
        return run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"convert.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
