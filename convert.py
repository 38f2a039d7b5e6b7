"""Convert Persimmon weights to a folder that persimmon.py and transformers load.

No pickle is ever unpickled: `read_pickle` interprets its opcodes, builds dicts, lists and numbers,
and notes what should be called instead of calling it. One tensor at a time is in memory.
OUTPUT appears once it is complete, or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import pickletools
import shutil
import signal
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; prints one sentence and exits with 2 if it is wrong."""
    parser = argparse.ArgumentParser(usage="python convert.py SOURCE OUTPUT [options]",
                                     description="Convert Persimmon weights to safetensors.")
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
    add("--force", action="store_true", help="replace the model in OUTPUT, or fill an empty folder")
    args = parser.parse_args(argv)
    for module in ("torch", "numpy", "sentencepiece", "safetensors"):
        if find_spec(module) is None:
            parser.error(f"{module} is not installed: `pip install -r requirements.txt` does it")
    return args


if __name__ == "__main__":
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed: errors have nowhere to go
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `convert.py ... | head` ends as usual
    parse_arguments(None)  # --help and wrong options do not wait for torch
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # while torch is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave others the cores
import torch  # noqa: E402
from sentencepiece import SentencePieceProcessor  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import persimmon  # noqa: E402

PIECE = 1 << 26  # bytes that are copied at once
COMPUTED = "rotary_emb.inv_freq"  # stored by some versions, made from rope_theta here
SMALL = 1 << 22  # bytes of a pickle; an archive's headers may have 4 times as many, JSON 16 times
MD5 = ("cd0320cba9efad9ccd18e9ec4d16ae1b", "663aeace07269c44e90f4e8bcd07f32a")  # base and chat
RENAMED = {"language_model.embedding.word_embeddings.": "model.embed_tokens.",  # from Megatron's
           "language_model.encoder.": "model.", "word_embeddings_for_head.": "lm_head.",
           ".self_attention.": ".self_attn."}
ARGS = {  # names in Adept's args -> in config.json; the last three may be absent
    "padded_vocab_size": "vocab_size", "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size", "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads", "layernorm_epsilon": "layer_norm_eps",
    "max_position_embeddings": "max_position_embeddings", "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor", "hidden_dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout", "init_method_std": "initializer_range"}
ONLY = {  # further args, and the values that are supported; the first is the default
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
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise MemoryError(f"{what} needs more memory than there is") from None
        if isinstance(what, Path) and what.is_file():
            raise persimmon.unreadable(what, "supported kind of file", repr(error)) from None
        raise ValueError(f"{what} is damaged or not supported: {error!r}") from None


class Inert:
    """What a pickle names, or would get from a call of it; nothing is called."""

    def __init__(self, name: str, args: Any = None) -> None:
        self.name, self.args, self.state = name, args, None


def read_pickle(data: bytes) -> Any:
    """The value of a pickle as torch.save writes it, with an Inert for whatever a call would make.
    Needs time and memory in proportion to len(data), and no recursion, whatever the pickle says."""
    stack, marks, memo = [], [], {}
    for opcode, arg, _ in pickletools.genops(data):
        # The opcode takes what lies above the last mark and perhaps one below, or a few values.
        before, has_mark = opcode.stack_before, pickletools.markobject in opcode.stack_before
        start = marks.pop() - len(before) + 2 if has_mark else len(stack) - len(before)
        items = stack[start:]
        del stack[start:]
        match opcode.name, items:
            case "MARK", _:
                marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT", _:
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET", _:
                stack.append(memo[arg])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "NONE", _:
                stack.append(arg)
            case "NEWTRUE" | "NEWFALSE", _:
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_DICT" | "EMPTY_LIST", _:
                stack.append({} if opcode.name == "EMPTY_DICT" else [])
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3", _:
                stack.append(tuple(items))
            case "GLOBAL", _:  # the name of something in a module
                stack.append(Inert(arg))
            case "REDUCE" | "NEWOBJ", [Inert(name=name), args]:
                stack.append({} if name == "collections OrderedDict" else Inert(name, args))
            case "BUILD" | "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS", [Inert() as obj, *state]:
                obj.state = state
                stack.append(obj)
            case "BINPERSID" | "BUILD", [value, *_]:  # of an OrderedDict: its state
                stack.append(value)
            case "APPEND" | "APPENDS", [list() as values, *new]:
                values.extend(new)
                stack.append(values)
            case "SETITEM" | "SETITEMS", [dict() as values, *new]:
                # A tuple could be nested without end, and large numbers can all have one hash.
                if not all(type(k) is str or type(k) is int and abs(k) < 2**31 for k in new[::2]):
                    raise ValueError("a dict has keys that are no texts")
                values.update(zip(new[::2], new[1::2], strict=True))
                stack.append(values)
            case "STOP", [value]:
                return value
            case name, _ if name != "PROTO":
                raise ValueError(f"its pickle has {name}, where torch.save does not write it")


class Weight(NamedTuple):
    """A tensor of a source, not read yet. `load` raises an exception if it is damaged."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


class Window(io.FileIO):
    """A file of which `left` bytes can be read: zipfile and tarfile read what a header claims."""

    def __init__(self, path: Path, left: int = 4 * SMALL) -> None:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError(f"there is no file {path}")
        super().__init__(path)
        self.left = left

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(self.left + 1 if size is None or size < 0 else min(size, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"{self.name} has a header or record that is too large")
        return data


class Archive:
    """A torch.save file: a zip of uncompressed records. It can be a part of what `window` reads."""

    def __init__(self, window: Window, part: IO[bytes] | None = None) -> None:
        self.path = window.name
        with reading(self.path):
            self.zip = zipfile.ZipFile(part or window)
            self.members = {m.filename.partition("/")[2]: m for m in self.zip.infolist()}
            if any(member.compress_type for member in self.members.values()):  # 4 KB can be 4 GB
                raise ValueError("it is compressed: save it again with torch.save")
            order = self.members.get("byteorder")
            if order is not None and self.zip.open(order).read(9) != b"little":
                raise ValueError("it is in big-endian order, which is not supported")
            self.content = read_pickle(self.zip.open(self.members["data.pkl"]).read(SMALL))
            window.left = math.inf

    def weight(self, value: Any) -> Weight:
        """A tensor of the pickle; anything else raises an exception of one kind or another."""
        if value.name == "torch._utils _rebuild_parameter":
            value = value.args[0]
        if value.name != "torch._utils _rebuild_tensor_v2" or any(value.args[6:]):
            raise ValueError("it is not a plain tensor")
        (_, kind, key, _, _), offset, shape, stride, *_ = value.args
        dtype, member = STORAGES[kind.name], self.members[f"data/{key}"]

        def load() -> Tensor:
            with reading(self.path), self.zip.open(member) as record:  # which compares the CRC-32
                data = torch.empty(member.file_size, dtype=torch.uint8)
                if sum(record.readinto(piece.numpy()) for piece in data.split(PIECE)) < len(data):
                    raise ValueError(f"its record {member.filename} is cut off")
                return data.view(dtype).as_strided(shape, stride, offset)
        return Weight(dtype, tuple(shape), load)

    def add_weights(self, found: dict[str, Weight], tree: dict, prefix: str = "") -> None:
        """Find the tensors in nested dicts, whose keys may have dots themselves: "a.b.c"."""
        for key, value in tree.items():
            name = f"{prefix}{str(key)[:300]}"
            if isinstance(value, dict):
                self.add_weights(found, value, f"{name}.")  # RecursionError: a dict in itself
                value.clear()  # it can be in many places, with 2**40 paths to it
            elif not name.endswith(COMPUTED):
                for old, new in RENAMED.items():
                    name = name.replace(old, new)
                with reading(f"{self.path}: {name}"):
                    if name in found:
                        raise ValueError("there are two")
                    found[name] = self.weight(value)


def read_release(path: Path, files: dict[str, bytes]) -> Source:
    """Adept's tar, which is not unpacked, or the folder unpacked from it."""
    if path.is_dir():
        found = [(file.name, file) for file in path.rglob("*")]
    else:
        window = Window(path)
        tar = tarfile.open(fileobj=window, mode="r:")
        found = [(member.name.rpartition("/")[2], member) for member in tar
                 if member.isreg() and not member.issparse()]

    def find(name: str) -> list[IO[bytes]]:
        places = [place for last, place in found if last == name]
        if len(places) != 1:
            raise ValueError(f"{path} has {len(places)} files {name}, where one is needed")
        return [Window(places[0])] if path.is_dir() else [window, tar.extractfile(places[0])]
    files = files or {"tokenizer.model": find("adept_vocab.model")[-1].read()}
    return read_checkpoint(Archive(*find("model_optim_rng.pt")), files)


def read_checkpoint(archive: Archive, files: dict[str, bytes]) -> Source:
    """Adept's pickle, with args for a config."""
    path, checkpoint, values = archive.path, archive.content, {}
    args = checkpoint["args"].state[0]
    for old, new in ARGS.items():
        if isinstance(args.get(old), (int, float, str)):
            values[new] = args[old]
        elif old in args or old not in list(ARGS)[-3:]:
            raise ValueError(f"{path} has no args.{old}, or one that is no number")
    config = persimmon.checked_config(**values, qk_layernorm=args["qk_layernorm"] != "none",
                                      bos_token_id=None, eos_token_id=None)  # see write_folder
    for name, allowed in {**ONLY, "kv_channels": (None, config.head_dim)}.items():
        if args.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{path} has args.{name} that are not supported, only {allowed} are")
    archive.add_weights(weights := {}, checkpoint["model"])
    return weights, config, persimmon.PersimmonForCausalLM, files


def read_source(path: Path, files: dict[str, bytes]) -> Source:
    """Everything but the values of the weights; `files` come in place of SOURCE's own."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: SOURCE is an archive or a folder here")
    if path.is_file() and Window(path).read(2) == b"PK":
        return read_checkpoint(Archive(Window(path)), files)
    if path.is_file() or any(path.rglob("model_optim_rng.pt")):
        return read_release(path, files)
    if (tokenizer_config := path / "tokenizer_config.json").exists():
        persimmon.read_json(tokenizer_config)  # refuses what is no JSON
    config, raw = persimmon.load_config(path), persimmon.read_json(path / "config.json")
    if config.quantization is not None:
        raise ValueError(f"{path} is quantized already: start from weights in 16 or 32 bit")
    known = {cls.__name__: cls for cls in persimmon.PersimmonPreTrainedModel.__subclasses__()}
    architecture = known.get((raw.get("architectures") or ["PersimmonForCausalLM"])[0])
    if architecture is None:
        raise ValueError(f"{path} has an architecture that is none of {', '.join(known)}")
    files = {name: Window(path / name, 16 * SMALL).read() for name in persimmon.TOKENIZER_FILES
             if (path / name).is_file() and not (files and name == "tokenizer.json")} | files
    weights: dict[str, Weight] = {}
    if any((path / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        for name, tensor in persimmon.read_safetensors(path).items():
            if not name.endswith(COMPUTED):
                dtype = persimmon.as_dtype(tensor.dtype)  # ValueError for integers
                weights[name] = Weight(dtype, tuple(tensor.shape), tensor.detach)
        return weights, config, architecture, files
    index, names = path / "pytorch_model.bin.index.json", ["pytorch_model.bin"]
    if index.is_file():
        names = sorted(set(persimmon.read_json(index)["weight_map"].values()))
    for name in names:
        archive = Archive(Window(path / name))
        archive.add_weights(weights, archive.content)
    return weights, config, architecture, files


# --- Writing --------------------------------------------------------------------------------------


def empty_model(path: Path, source: Source, args: argparse.Namespace) -> nn.Module:
    """The model to write, without values; the weights' dtype becomes what they are written in."""
    weights, config, architecture, files = source
    for name, weight in weights.items():
        weights[name] = weight._replace(dtype=persimmon.as_dtype(args.dtype or weight.dtype))
    with torch.device("meta"):
        model = architecture(config)
        found = {name: torch.empty(w.shape, dtype=w.dtype) for name, w in weights.items()}
    own = model.state_dict()
    for name in sorted(own.keys() | found.keys()):
        has, needs = (tuple(each[name].shape) if name in each else None for each in (found, own))
        if has != needs:
            raise ValueError(f"{path}: {name} is {has or 'missing'}, and its config makes it "
                             f"{needs or 'no tensor of the model'}")
    model.load_state_dict(found, assign=True)  # for the dtypes
    if "tokenizer.model" not in files:
        raise ValueError(f"{path} comes without its tokenizer: name one with --tokenizer")
    with reading(args.tokenizer or f"the tokenizer of {path}"):
        if len(SentencePieceProcessor(model_proto=files["tokenizer.model"])) > config.vocab_size:
            raise ValueError(f"it has more pieces than the {config.vocab_size} of the weights")
    if args.quantize is not None:
        persimmon.quantize_model(model, args.quantize, args.group_size)
    return model


@lru_cache(maxsize=1)  # the tensors of a layer are asked for one after the other
def quantized(layer: nn.Module, weight: Weight) -> dict[str, Tensor]:
    """What a quantized layer, here one without values, stores for its matrix."""
    linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
    linear.weight = nn.Parameter(weight.load().to(weight.dtype), requires_grad=False)
    return dict(type(layer)(linear, layer.group_size).named_buffers())


def pieces_of(name: str, model: nn.Module, weights: dict[str, Weight]) -> Iterator[Tensor]:
    """The values of a tensor to write: some rows at a time, or all that quantization makes."""
    prefix, _, last = name.rpartition(".")
    layer = model.get_submodule(prefix)
    if last in dict(layer.named_buffers()):
        with reading(prefix):
            yield quantized(layer, weights[f"{prefix}.weight"])[last]
        return
    tensor = weights[name].load()
    with reading(name):
        for piece in tensor.split(max(1, PIECE // (4 * tensor[0].numel()))):
            cast = piece.to(weights[name].dtype).contiguous()
            if not all(map(math.isfinite, cast.aminmax())):  # both are NaN if any number is
                raise ValueError(f"{name} has values that are NaN, infinite or too large")
            yield cast


class Progress:
    """How many of `total` bytes are done, on stderr where that is a terminal."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0

    def count(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """The pieces, one after the other."""
        for piece in pieces:
            yield piece
            self.done += piece.nbytes
            if sys.stderr.isatty():
                text = f"\r{self.what} {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB\x1b[K"
                print(text, end="\n" * (self.done == self.total), file=sys.stderr, flush=True)


def write_folder(folder: Path, model: nn.Module, weights: dict[str, Weight],
                 files: dict[str, bytes]) -> None:
    """Write everything, one piece of a tensor after the other."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    tokenizer = persimmon.Tokenizer(folder)
    end = tokenizer.end_of_text
    if model.config.eos_token_id is None:  # Adept's args don't have it
        model.config = replace(model.config, bos_token_id=end, eos_token_id=end)
    persimmon.write_config(folder, model)
    writing = Progress("writing", sum(tensor.nbytes for tensor in model.state_dict().values()))
    persimmon.write_safetensors(folder / "model.safetensors", [
        (name, tensor.dtype, tensor.shape, writing.count(pieces_of(name, model, weights)))
        for name, tensor in model.state_dict().items()])
    if "tokenizer_config.json" not in files:
        content = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "eos_token": None,
                   "bos_token": tokenizer.processor.id_to_piece(end), "add_bos_token": True,
                   "model_max_length": model.config.max_position_embeddings, "add_eos_token": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")


def check_output(args: argparse.Namespace) -> Path:
    """Refuse an OUTPUT that can't be made; else, what exists of its path."""
    output, source = (Path(os.path.realpath(path)) for path in (args.output, args.source))
    parent = next(folder for folder in (output, *output.parents) if folder.exists())
    files = {*os.listdir(output)} if parent == output else set()
    if str(output) != str(output).encode(errors="replace").decode():
        raise ValueError(f"OUTPUT {str(output)!r} is not UTF-8: no tokenizer loads from there")
    if output in (source, *source.parents):
        raise ValueError(f"OUTPUT {output} can't be made: it is or holds the source")
    if parent == output and not args.force:
        raise ValueError(f"{output} exists: give another name, or --force to replace it")
    # The latter are what a killed run leaves, and a new file system has.
    if "config.json" not in files and not files <= {".unfinished", ".complete", "lost+found"}:
        raise ValueError(f"{output} is not a model's folder: --force does not replace it")
    return parent


def run(args: argparse.Namespace) -> None:
    """Convert."""
    path, parent = args.source, check_output(args)
    files = {"tokenizer.model": Window(args.tokenizer).read()} if args.tokenizer else {}
    with nullcontext() if args.dry_run else persimmon.staging(args.output) as folder:
        with reading(path):
            if args.verify and path.is_dir():
                raise ValueError(f"{path} is not Adept's .tar, which --verify is for")
            if args.verify:
                md5 = hashlib.md5(usedforsecurity=False)
                data = torch.from_file(str(path), False, path.stat().st_size, dtype=torch.uint8)
                for piece in Progress("verifying", len(data)).count(data.split(PIECE)):
                    md5.update(piece.numpy())
                if md5.hexdigest() not in MD5:
                    raise ValueError(f"{path} does not have the MD5 of Adept's, {' or '.join(MD5)}")
            weights, *_, files = source = read_source(path, files)
        model = empty_model(path, source, args)
        total = sum(tensor.nbytes for tensor in model.state_dict().values())
        free, needed = shutil.disk_usage(parent).free, total * 1.01 + 4 * SMALL
        if free < needed:
            raise ValueError(f"{parent} has {free / 1e9:.3g} GB free, of {needed / 1e9:.3g} needed")
        if not args.dry_run:
            write_folder(folder, model, weights, files)
    parameters = sum(math.prod(weight.shape) for weight in weights.values())
    print(f"{parameters:,} parameters, {total / 1e9:.2f} GB", flush=True)
    if not args.dry_run and hasattr(model, "lm_head"):  # a classifier can't write
        print(f"python sample.py --model {args.output}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; errors become one sentence and exit code 2."""
    try:
        run(parse_arguments(argv))
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, MemoryError) as error:
        text = textwrap.shorten(str(error) or "out of memory", 480, placeholder=" ...")
        wipe = "\r\x1b[K" * sys.stderr.isatty()
        print(f"{wipe}convert.py: error: {text}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # torch is imported: in good order now
    sys.exit(main())
