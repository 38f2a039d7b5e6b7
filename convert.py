"""Convert Persimmon weights to a folder that persimmon.py and transformers load.

No pickle is ever unpickled: `read_pickle` interprets its opcodes, builds dicts, lists and numbers,
and takes down what should be called instead of calling it. One tensor at a time is in memory.
OUTPUT appears once it is complete and has been read back, or not at all. Exit codes: 0; 2 for an
error; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import json
import math
import os
import pickletools
import re
import shutil
import signal
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; prints one sentence and exits with 2 if it is wrong."""
    parser = argparse.ArgumentParser(description="Convert Persimmon weights to safetensors.",
                                     allow_abbrev=False)
    parser.error = lambda text: parser.exit(2, f"convert.py: error: {text} (see --help)\n")
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help="Adept's .tar, the folder unpacked from it, or "
        "its model_optim_rng.pt; a folder with pytorch_model*.bin or with safetensors")
    add("output", metavar="OUTPUT", type=Path, help="folder to make")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="(default: SOURCE's)")
    add("--quantize", choices=("int8", "int4"), help="of the matrices; for persimmon.py alone")
    add("--group-size", type=int, choices=(32, 64, 128), default=128, help="of int4 (default: 128)")
    add("--tokenizer", metavar="FILE", type=Path, help="a SentencePiece model, if SOURCE has none")
    add("--verify", action="store_true", help="compare the .tar with Adept's published MD5 first")
    add("--dry-run", action="store_true", help="look at everything, write nothing")
    add("--force", action="store_true", help="replace OUTPUT, if it is a model's folder")
    for option in [a.partition("=")[0] for a in (sys.argv[1:] if argv is None else argv)]:
        if option in ("--drop-unused", "--shard-size"):
            parser.error(f"{option} is gone: all rows are kept, in files of up to 5 GB")
    args = parser.parse_args(argv)
    if find_spec("torch") is None:
        parser.error("torch is not installed: `pip install -r requirements.txt` does it")
    return args


if __name__ == "__main__":
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed: errors have nowhere to go
    parse_arguments(None)  # --help and wrong options do not wait for torch
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # while torch is imported
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import persimmon  # noqa: E402

PIECE = 1 << 26  # bytes that are copied at once
SHARD = 5 * 10**9  # bytes of a file
SMALL = 1 << 22  # bytes of a pickle, or of all headers of an archive: more is an attack
MD5 = {"cd0320cba9efad9ccd18e9ec4d16ae1b": "base", "663aeace07269c44e90f4e8bcd07f32a": "chat"}
# What a source may hold beside weights, at the end of a name. rotary_emb.inv_freq is computed from
# rope_theta, args becomes config.json, the others are of the training run.
IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|args|iteration|checkpoint_version|tokens|"
                     r"rng_state|optimizer|opt_param_scheduler)$")
RENAMED = {  # Megatron's names -> transformers'; what follows the part replaced is the same
    "language_model.embedding.word_embeddings.": "model.embed_tokens.",
    "language_model.encoder.": "model.", "word_embeddings_for_head.": "lm_head.",
    ".self_attention.": ".self_attn."}
ARGS = {  # names in Adept's args -> in config.json; the last three may be absent
    "padded_vocab_size": "vocab_size", "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size", "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads", "layernorm_epsilon": "layer_norm_eps",
    "max_position_embeddings": "max_position_embeddings", "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor", "hidden_dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout", "init_method_std": "initializer_range"}
ONLY = {  # further args, and the values that are supported; the first is meant where one is absent
    "qk_layernorm": ("weights_per_layer", "none"), "tensor_model_parallel_size": (1,),
    "pipeline_model_parallel_size": (1,), "sq_relu": (True,), "untie_embeddings": (True,),
    "pos_emb": ("rotary",)}
STORAGES = {"torch BFloat16Storage": torch.bfloat16, "torch HalfStorage": torch.float16,
            "torch FloatStorage": torch.float32}
# Weights, with transformers' names; config; class of the model; tokenizer.model and other files.
Source = tuple[dict[str, "Weight"], persimmon.PersimmonConfig, type[nn.Module], dict[str, bytes]]

# --- Reading --------------------------------------------------------------------------------------


@contextmanager
def reading(what: Path | str) -> Iterator[None]:
    """Make whatever any library raises while something is read one sentence that names it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (ValueError, OSError)) and str(what) in str(error):
            raise
        kind = type(error).__name__
        raise ValueError(f"{what} is damaged, or of no known kind: {error} ({kind})") from None


class Inert:
    """What a pickle names, or would get from a call of it; nothing is called."""

    def __init__(self, name: str, args: Any = None) -> None:
        self.name, self.args, self.state = name, args, None


def read_pickle(data: bytes) -> Any:
    """The value of a pickle as torch.save writes it, with an Inert for whatever a call would make.

    Needs time and memory in proportion to len(data), and no recursion, whatever the pickle says.
    """
    stack, marks, memo = [], [], {}
    for opcode, arg, _ in pickletools.genops(data):
        name, before = opcode.name, opcode.stack_before
        # The opcode takes what lies above the last mark and perhaps one below, or a few values.
        has_mark = pickletools.markobject in before
        start = marks.pop() - len(before) + 2 if has_mark else len(stack) - len(before)
        items = stack[start:]
        del stack[start:]
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "NONE"):
            stack.append(arg)
        elif name in ("NEWTRUE", "NEWFALSE"):
            stack.append(name == "NEWTRUE")
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(items))
        elif name in ("GLOBAL", "BINPERSID"):
            stack.append(Inert(arg) if name == "GLOBAL" else Inert("storage", items[0]))
        elif name in ("REDUCE", "NEWOBJ"):
            is_dict = items[0].name == "collections OrderedDict"
            stack.append({} if is_dict else Inert(items[0].name, items[1]))
        elif name in ("APPEND", "APPENDS", "BUILD", "SETITEM", "SETITEMS"):
            stack.append(items[0])
            if isinstance(items[0], Inert) and name == "BUILD":
                items[0].state = items[1]
            elif isinstance(items[0], list):
                items[0].extend(items[1:])
            elif isinstance(items[0], dict) and name != "BUILD":
                # A tuple could be nested without end, and large numbers can all have one hash.
                if not all(type(key) is str or type(key) is int and abs(key) < 2**31
                           for key in items[1::2]):
                    raise ValueError("a dict has keys that are no texts")
                items[0].update(zip(items[1::2], items[2::2], strict=True))
        elif name not in ("PROTO", "STOP"):
            raise ValueError(f"its pickle has the opcode {name}, which torch.save does not write")
    return items[0]


class Weight(NamedTuple):
    """A tensor of a source, not read yet. `load` raises an exception if it is damaged."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


class Window(io.FileIO):
    """A file up to byte `end` for zipfile and tarfile, which read as much as a header claims: here
    they get 2*SMALL bytes in all, until `left` is changed."""

    def __init__(self, path: Path, end: int) -> None:
        super().__init__(path)
        self.end, self.left = end, 2 * SMALL

    def read(self, size: int = -1) -> bytes:
        """As io.FileIO.read."""
        rest = max(0, self.end - self.tell())
        size = rest if size is None or size < 0 else min(size, rest)
        self.left -= size
        if self.left < 0:
            raise ValueError(f"its headers have more than {2 * SMALL} bytes")
        return super().read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """As io.FileIO.seek."""
        return super().seek(self.end + offset if whence == 2 else offset, whence % 2)


class Archive:
    """A torch.save file that ends at byte `end` of `path`: a zip of uncompressed records."""

    def __init__(self, path: Path, end: int) -> None:
        self.path = path
        with reading(path):
            window = Window(path, end)
            self.zip = zipfile.ZipFile(window)  # which skips what is in front of an archive
            self.members = {m.filename.partition("/")[2]: m for m in self.zip.infolist()}
            if any(member.compress_type != zipfile.ZIP_STORED for member in self.members.values()):
                raise ValueError("it is compressed: write it anew with torch.save")
            if not any(member.CRC for member in self.members.values()):
                # PyTorch writes zeros where it is told to (torch.serialization.set_crc32_options).
                print(f"convert.py: warning: {path} has no checksums", file=sys.stderr)
                for member in self.members.values():
                    del member.CRC  # zipfile then compares nothing
            order = self.members.get("byteorder")
            if order is not None and self.zip.open(order).read(9) != b"little":
                raise ValueError("it is in big-endian order, which is not supported")
            self.content = read_pickle(self.zip.open(self.members["data.pkl"]).read(SMALL))
            window.left = math.inf

    def weight(self, value: Any) -> Weight:
        """A tensor of the pickle; anything else raises an exception of one kind or another."""
        if value.name == "torch._utils _rebuild_parameter":
            value = value.args[0]
        if value.name != "torch._utils _rebuild_tensor_v2":
            raise ValueError("it is no plain tensor")
        storage, offset, shape, stride, _, _, *metadata = value.args
        _, kind, key, _, _ = storage.args
        dtype, member = STORAGES[kind.name], self.members[f"data/{key}"]
        is_usual = not any(metadata) and len(shape) in (1, 2) and tuple(stride) == (*shape[1:], 1)
        stop = (offset + math.prod(shape)) * dtype.itemsize
        is_inside = min(offset, *shape) >= 0 and stop <= member.file_size
        if not is_usual or not is_inside:
            raise ValueError("it is laid out in an unusual way: write it anew with torch.save")

        def load() -> Tensor:
            with reading(self.path), self.zip.open(member) as record:  # which compares the CRC-32
                data = torch.empty(member.file_size, dtype=torch.uint8)
                if sum(record.readinto(piece.numpy()) for piece in data.split(PIECE)) < len(data):
                    raise ValueError(f"it is cut off in data/{key}")
            return data[offset * dtype.itemsize : stop].view(dtype).view(shape)

        return Weight(dtype, tuple(shape), load)

    def weights(self, tree: dict) -> dict[str, Weight]:
        """The tensors in nested dicts, whose keys may have dots themselves: "a.b.c" -> weight."""
        nodes, seen, found = [("", tree)], set(), {}
        while nodes:
            prefix, node = nodes.pop()
            if id(node) in seen or len(prefix) > 300:  # there can be 2**40 paths, or an endless one
                raise ValueError(f"{self.path} has dicts nested too deep, or one in two places")
            seen.add(id(node))
            for key, value in node.items():
                name = f"{prefix}{str(key)[:300]}"
                if isinstance(value, dict) and not IGNORED.search(name):
                    nodes.append((f"{name}.", value))
                elif not IGNORED.search(name):
                    for old, new in RENAMED.items():
                        name = name.replace(old, new)
                    with reading(f"{self.path}: {name}"):
                        if name in found:
                            raise ValueError("there are two")
                        found[name] = self.weight(value)
        return found


def small_file(file: Path, start: int = 0, end: int | None = None) -> bytes:
    """The contents of a file, or a part of them, that has to be small."""
    end = file.stat().st_size if end is None else end
    if not file.is_file() or not 0 <= end - start <= 4 * SMALL:
        raise ValueError(f"{file} has {end - start} bytes where {4 * SMALL} are a lot")
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(end - start)


def read_release(path: Path) -> Source:
    """Adept's tar, which is not unpacked, or the folder unpacked from it."""
    if path.is_dir():
        found = {f.relative_to(path).as_posix(): (f, 0, f.stat().st_size) for f in path.rglob("*")}
    else:
        with Window(path, path.stat().st_size) as file, tarfile.open(fileobj=file, mode="r:") as t:
            members = [member for member in t if member.isreg() and not member.issparse()]
        found = {m.name: (path, m.offset_data, m.offset_data + m.size) for m in members}

    def find(pattern: str) -> tuple[Path, int, int]:
        names = [name for name in found if re.fullmatch(f"([^/]*/)?{pattern}", name)]
        if len(names) != 1:
            raise ValueError(f"{path} has {len(names)} files {pattern}, where one is needed")
        return found[names[0]]

    latest = int(small_file(*find("latest_checkpointed_iteration.txt"))[:20])
    file, _, end = find(f"iter_0*{latest}/mp_rank_[^/]+/model_optim_rng.pt")
    files = {"tokenizer.model": small_file(*find("adept_vocab.model"))}
    return read_checkpoint(Archive(file, end), files)


def read_checkpoint(archive: Archive, files: dict[str, bytes]) -> Source:
    """Adept's pickle, with args for a config."""
    path, checkpoint, values = archive.path, archive.content, {}
    args = checkpoint["args"].state
    if unknown := [key for key in checkpoint if key != "model" and not IGNORED.search(str(key))]:
        raise ValueError(f"{path} has an entry {unknown[0]!r}, which is not known here")
    for old, new in ARGS.items():
        if isinstance(args.get(old), (int, float, str)):
            values[new] = args[old]
        elif old in args or old not in list(ARGS)[-3:]:
            raise ValueError(f"{path} has no args.{old}, or one that is no number")
    config = persimmon.checked_config(**values, qk_layernorm=args["qk_layernorm"] != "none")
    for name, allowed in {**ONLY, "kv_channels": (None, config.head_dim)}.items():
        if args.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{path} has args.{name} that are not supported, only {allowed} are")
    return archive.weights(checkpoint["model"]), config, persimmon.PersimmonForCausalLM, files


def read_source(path: Path) -> Source:
    """Find out what `path` is, and read everything but the weights."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: SOURCE is an archive or a folder here")
    if path.is_file() and path.open("rb").read(2) == b"PK":
        return read_checkpoint(Archive(path, path.stat().st_size), {})
    if path.is_file() or (path / "latest_checkpointed_iteration.txt").is_file():
        return read_release(path)
    small_file(path / "config.json")
    config = persimmon.load_config(path)
    if config.quantization is not None:
        kind = config.quantization["quantize"]
        raise ValueError(f"{path} is quantized, in {kind}: start from weights in 16 or 32 bit")
    names = persimmon.read_json(path / "config.json").get("architectures")
    known = {cls.__name__: cls for cls in persimmon.PersimmonPreTrainedModel.__subclasses__()}
    architecture = known[names[0] if names else "PersimmonForCausalLM"]
    files = {file.name: small_file(file) for file in map(path.joinpath, (
        "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")) if file.is_file()}
    weights = {}
    if any((path / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        for shard in sorted(set(persimmon.tensor_files(path).values())):
            with reading(shard), persimmon.open_safetensors(shard) as opened:
                for name in [name for name in opened.keys() if not IGNORED.search(name)]:
                    tensor = opened.get_tensor(name)  # mapped
                    weights[name] = Weight(tensor.dtype, tuple(tensor.shape), tensor.detach)
        return weights, config, architecture, files
    index, places = path / "pytorch_model.bin.index.json", {"": "pytorch_model.bin"}
    if index.is_file():
        places = json.loads(small_file(index))["weight_map"]
    for file in [path / name for name in sorted(set(places.values()))]:
        archive = Archive(file, file.stat().st_size)
        found = archive.weights(archive.content)
        if twice := weights.keys() & found.keys():
            raise ValueError(f"{path} has {min(twice)} in two files")
        weights |= found
    return weights, config, architecture, files


# --- Writing --------------------------------------------------------------------------------------


def pieces_of(name: str, weight: Weight, dtype: torch.dtype, layer: nn.Module | None,
              made: dict[str, Tensor]) -> Iterator[Tensor]:
    """The values to write, some rows at a time; or one tensor of a matrix that is quantized as in
    `layer`, which has no values, and in `made` the others of that matrix."""
    prefix = name.rpartition(".")[0]
    if layer is not None:
        if name not in made:
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(weight.load().to(dtype), requires_grad=False)
            with reading(prefix):
                quantized = type(layer)(linear, layer.group_size)
            made |= {f"{prefix}.{last}": buffer for last, buffer in quantized.named_buffers()}
        yield made.pop(name)
        return
    tensor = weight.load()
    for piece in tensor.split(max(1, PIECE // (4 * tensor[0].numel()))):
        cast = piece.to(dtype)
        if not all(map(math.isfinite, piece.aminmax())):  # both are NaN if any number is
            raise ValueError(f"{name} has NaN or infinite values")
        if not all(map(math.isfinite, cast.aminmax())):
            raise ValueError(f"{name} overflows in {dtype}")
        yield cast


def plan_output(source: Source, args: argparse.Namespace) -> tuple[list, persimmon.PersimmonConfig]:
    """Name, dtype, shape and pieces of each tensor to write, and the config that goes with them."""
    from sentencepiece import SentencePieceProcessor
    weights, config, architecture, files = source
    path, L, plan, made = args.source, config.num_hidden_layers, [], {}
    if not L < len(weights) < 10_000:  # to make a model of more would take minutes
        raise ValueError(f"{path} has {len(weights)} tensors, and its config {L} layers")
    with torch.device("meta"):
        model = architecture(config)
    own = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    shapes = {name: weight.shape for name, weight in weights.items()}
    for name in sorted(own.keys() | shapes.keys()):
        if own.get(name) != shapes.get(name):
            raise ValueError(f"{path} has {name} in shape {shapes.get(name, 'none')}: its config "
                             f"makes it {own.get(name, 'no tensor of this model')}")
        persimmon.as_dtype(weights[name].dtype)
    if "tokenizer.model" not in files:
        raise ValueError(f"{path} comes without its tokenizer: name one with --tokenizer")
    with reading(args.tokenizer or f"the tokenizer of {path}"):
        count = len(SentencePieceProcessor(model_proto=files["tokenizer.model"]))
    if not 0 < count <= config.vocab_size:
        raise ValueError(f"{path} has {config.vocab_size} rows for a tokenizer of {count} pieces")
    if args.quantize is not None:
        persimmon.QUANTIZERS[args.quantize](model, args.group_size, None)
    for name, empty in model.state_dict().items():
        prefix, is_float = name.rpartition(".")[0], empty.is_floating_point()
        is_plain = is_float and name in own
        weight = weights[name if is_plain else f"{prefix}.weight"]
        dtype = persimmon.as_dtype(args.dtype or weight.dtype)
        layer = None if is_plain else model.get_submodule(prefix)
        plan.append((name, dtype if is_float else empty.dtype, tuple(empty.shape),
                     pieces_of(name, weight, dtype, layer, made)))
    return plan, replace(model.config, dtype=str(plan[0][1]).removeprefix("torch."))


class Progress:
    """A line on stderr, where that is a terminal, of how much is done; and the CRC-32 of it."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done, self.shown, self.checksum = what, total, 0, 0.0, 0
        self.start = time.monotonic()

    def count(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """The pieces, one after the other."""
        for piece in pieces:
            self.checksum = zlib.crc32(piece.view(torch.uint8).numpy(), self.checksum)
            yield piece
            self.done += piece.nbytes
            now, part, gigabytes = time.monotonic(), self.done / self.total, self.total / 1e9
            if sys.stderr.isatty() and (now - self.shown > 0.2 or part == 1):
                self.shown, left = now, (now - self.start) * (1 / part - 1)
                print(f"\r{self.what} {part * gigabytes:.2f} of {gigabytes:.2f} GB, {left:.0f} s"
                      " left \x1b[K", end="\n" * (part == 1), file=sys.stderr, flush=True)


def write_folder(folder: Path, source: Source, plan: list, config: persimmon.PersimmonConfig,
                 total: int) -> None:
    """Write everything, one piece of a tensor after the other, and read it back."""
    _, _, architecture, files = source

    def write_json(name: str, content: dict[str, Any]) -> None:
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    for name, content in files.items():
        (folder / name).write_bytes(content)
    tokenizer = persimmon.Tokenizer(folder)
    end = tokenizer.end_of_text
    config = replace(config, bos_token_id=end, eos_token_id=end)
    write_json("config.json", {"architectures": [architecture.__name__],
                               **persimmon.config_to_dict(config)})
    write_json("generation_config.json", {"bos_token_id": end, "eos_token_id": end})
    if "tokenizer_config.json" not in files:
        write_json("tokenizer_config.json", {
            "add_bos_token": True, "add_eos_token": False, "eos_token": None, "unk_token": "<unk>",
            "bos_token": tokenizer.processor.id_to_piece(end), "tokenizer_class": "LlamaTokenizer",
            "model_max_length": config.max_position_embeddings})
    shards, places, room = [], {}, 0
    for name, dtype, shape, pieces in plan:
        if (size := dtype.itemsize * math.prod(shape)) > room:
            shards, room = [*shards, []], SHARD
        shards[-1].append((name, dtype, shape, pieces))
        room -= size
    writing, checking = Progress("writing", total), Progress("checking", total)
    for n, shard in enumerate(shards, start=1):
        part = f"-{n:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = folder / f"model{part}.safetensors"
        persimmon.write_safetensors(file, [(*what, writing.count(each)) for *what, each in shard])
        places |= {name: file.name for name, *_ in shard}
        data = torch.from_file(str(file), False, file.stat().st_size, dtype=torch.uint8)
        start = 8 + int.from_bytes(bytes(data[:8].numpy()), "little")  # after the header
        if [*checking.count(data[start:].split(PIECE))] and checking.checksum != writing.checksum:
            raise ValueError(f"{file} reads back differently than written: is the disk sound?")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json("model.safetensors.index.json", index)


@contextmanager
def replacing(output: Path, force: bool) -> Iterator[Path]:
    """A new folder that takes the name `output` at the end, if anything is in it.

    Work is done in OUTPUT.unfinished: `new` is what is written, `old` what it replaces. Where a run
    is killed between its two renames, both are there, and the next run puts `old` back.
    """
    scratch = output.with_name(f"{output.name}.unfinished")
    scratch.mkdir(parents=True, exist_ok=True)
    old, new, handle = scratch / "old", scratch / "new", os.open(scratch, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
    except BlockingIOError:
        raise ValueError(f"another conversion is writing {output}") from None
    if not set(os.listdir(scratch)) <= {"old", "new"} or scratch.is_symlink():
        raise ValueError(f"{scratch} is in the way: OUTPUT is made there")
    try:
        if old.exists() and new.exists() and not output.exists():
            old.rename(output)
        if (exists := output.exists()) and not force:
            raise ValueError(f"{output} exists: give another name, or --force to replace it")
        if exists and any(output.iterdir()) and not (output / "config.json").is_file():
            raise ValueError(f"{output} is not a model's folder: --force does not replace it")
        for left_over in (new, old):  # in this order: half of `old` must not come back
            shutil.rmtree(left_over, ignore_errors=True)
        new.mkdir()
        if exists:  # a mounted volume can't be moved: better known now
            output.rename(old)
            old.rename(output)
        yield new
        if any(new.iterdir()):
            if exists:
                output.rename(old)
            new.rename(output)  # fails if another OUTPUT has appeared
    finally:
        if old.exists() and not output.exists():
            old.rename(output)
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(handle)


def run(args: argparse.Namespace) -> None:
    """Convert."""
    output, path = Path(os.path.realpath(args.output)), Path(os.path.realpath(args.source))
    if not output.name or output in (path, *path.parents):
        raise ValueError(f"OUTPUT {output} can't be made: it is or holds the source")
    with replacing(output, args.force) as folder:
        with reading(args.source):
            if args.verify:
                digest = hashlib.md5(usedforsecurity=False)
                data = torch.from_file(str(path), False, path.stat().st_size, dtype=torch.uint8)
                for piece in Progress("verifying", len(data)).count(data.split(PIECE)):
                    digest.update(piece.numpy())
                if (md5 := digest.hexdigest()) not in MD5:
                    raise ValueError(f"{args.source} has the MD5 {md5}, which is none of Adept's "
                                     f"releases ({' or '.join(MD5)}): download it again")
                print(f"{args.source} is Adept's {MD5[md5]} model", file=sys.stderr)
            source = read_source(args.source)
            if args.tokenizer is not None:
                source[3]["tokenizer.model"] = small_file(args.tokenizer)
            plan, config = plan_output(source, args)
        total = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape, _ in plan)
        free, needed = shutil.disk_usage(folder).free, total * 1.01 + 4 * SMALL
        if free < needed:
            raise ValueError(f"{output}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed")
        parameters = sum(math.prod(weight.shape) for weight in source[0].values())
        dtypes = "/".join(sorted({persimmon.SAFETENSORS_DTYPES[dtype] for _, dtype, *_ in plan}))
        print(f"{parameters:,} parameters, {total / 1e9:.2f} GB in {dtypes}", flush=True)
        if not args.dry_run:
            write_folder(folder, source, plan, config, total)
    if not args.dry_run:
        print(f"python sample.py --model {args.output}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; errors become one sentence and exit code 2."""
    args = parse_arguments(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        text = " ".join(str(error).split())
        print(f"convert.py: error: {text[:500]}{'...' * (len(text) > 500)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # torch is imported: in good order now
    sys.exit(main())
