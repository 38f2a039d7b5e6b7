"""Tests of persimmon.py, sample.py and convert.py: `pytest`. On the CPU, no download; transformers and SentencePiece
are the oracles. They follow persimmon.py's order, then come how it is built, sample.py, convert.py and tiny/train.py.

    python test_persimmon.py all                  pytest with all combinations, which takes long
    python test_persimmon.py bench [options]      speed of a model on this machine; needs requirements.txt only
    python test_persimmon.py compare [options]    speed and logits beside those of transformers

Random weights everywhere but in tiny/. Every parameter is random, norms and biases too: a norm weight of one and a bias
of zero would hide that two norms are swapped or a bias is lost. All axes of a model have different sizes.
"""

from __future__ import annotations

# ruff: noqa: E402
import argparse
import copy
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch.utils.benchmark import Timer

import persimmon
from persimmon import (
    MLP,
    PersimmonConfig,
    PersimmonForCausalLM,
    engine_for,
    generate,
    quantize_model,
)
from sample import peak_memory, progress, random_model


def config_to_dict(config: PersimmonConfig, module: ModuleType = persimmon) -> dict:
    """What config.json has after a model with this config is saved, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        module.write_config(Path(folder), SimpleNamespace(config=config, dtype=torch.float32))
        raw = json.loads((Path(folder) / "config.json").read_text())
    return {name: value for name, value in raw.items() if name != "architectures"}


# --- run as a script -------------------------------------------------------------------------------------------------


def note(text: str = "") -> None:
    """Say in a terminal what goes on, until the next note."""
    progress(argparse.Namespace(quiet=False, note=None), text)


def machine_speed(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """GB/s of reading memory and TFLOP/s of a product of matrices: the best of several tries (on a CPU also in float32,
    where many are faster than in 16 bit)."""
    data = torch.ones(2**29, device=device)  # 2.1 GB: much more than any cache
    size, repeats = (4096, 1) if device == "cpu" else (8192, 16)  # a GPU takes orders in advance
    a, b = torch.randn(2, size, size, device=device)
    products = [partial(torch.mm, a.to(t), b.to(t)) for t in {dtype, torch.float32 if device == "cpu" else dtype}]

    def best(*works: Callable) -> float:
        timers = [Timer("work()", globals={"work": f}, num_threads=torch.get_num_threads()) for f in works * 4]
        return min(timer.timeit(repeats).median for timer in timers)

    read = best(data.sum, data.view(torch.int64).sum, data.amax, data.view(torch.int32).amax)
    return data.nbytes / read / 1e9, 2 * size**3 / best(*products) / 1e12


def bytes_read(model: PersimmonForCausalLM, ids: torch.Tensor) -> float:
    """Bytes of weights that a pass reads for one token a row, ids (B, 1). That is all but the embedding, and of the
    down-projection where its zeros are skipped: in a table of the engine's, or in int8."""
    tables, skipped = getattr(engine_for(model), "tables", {}), [model.model.embed_tokens.weight.nbytes]
    downs = {m.dense_4h_to_h for m in model.modules() if isinstance(m, MLP) and (not ids.is_cuda or len(ids) == 1)}

    def count(m: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if m in downs and (m in tables or type(m) is not torch.nn.Linear):
            skipped.append(m.weight.nbytes * max(0.0, 1 - inputs[0].count_nonzero().item() / inputs[0].shape[-1]))

    with torch.nn.modules.module.register_module_forward_pre_hook(count), torch.no_grad():
        model(ids)
    return sum(x.nbytes for x in model.state_dict().values()) - sum(skipped)


def bench(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Print a row for each test, in the manner of llama-bench. ppT reads a prompt of T tokens; tgN @ S writes N tokens,
    greedily, after S that the cache holds (zeros on a CPU, which makes no difference to the time there); x B means B
    texts at once, whose tokens count together. TFLOP/s counts matrices and attention, GB/s weights and cache."""
    parser.add_argument("-m", "--model", type=Path, default=Path(__file__).with_name("tiny"))
    parser.add_argument("--random", metavar="8b[:L]", help="random weights, L layers if not 36")
    parser.add_argument("--density", type=float, default=0.5, help="activations not zero, in these")
    parser.add_argument("--dtype", default="auto", help="bfloat16, float16 or float32")
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-t", "--threads", type=int, help="CPU threads")
    parser.add_argument("--plain", action="store_true", help="without the engines of Part III")
    parser.add_argument("--n-prompt", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--n-depth", type=int, nargs="*", default=[0, 2048, 8192])
    parser.add_argument("--n-gen", type=int, default=64, help="tokens to write, 3 at least")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1])
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--probe", action="store_true", help="only measure the machine")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    dtype = getattr(torch, args.dtype.replace("auto", "bfloat16"))
    if args.probe:
        print(json.dumps(machine_speed(args.device, dtype)))
        return 0
    if not args.random and not args.model.is_dir():
        raise ValueError(f"there is no folder {args.model}")
    note("measuring the machine ...")  # in a process of its own: its 2.1 GB are not part of this one's peak
    output = subprocess.run([sys.executable, __file__, "bench", "--probe", *argv], stdout=subprocess.PIPE, check=True)
    limit = dict(zip(("GB/s", "TFLOP/s"), json.loads(output.stdout.splitlines()[-1])))
    shape = [int(args.random[3:] or 36), args.density] if args.random else [args.model]
    load = random_model if args.random else PersimmonForCausalLM.from_pretrained
    model = load(*shape, dtype=args.dtype, device=args.device, quantize=args.quantize,
                 progress=lambda part: note(f"loading {part:.0%} ..."))
    note()
    model.fast, config = not args.plain, model.config
    weight, L = model.model.embed_tokens.weight, config.num_hidden_layers
    C, F, context = config.hidden_size, config.intermediate_size, config.max_position_embeddings
    kind = (config.quantization or {}).get("quantize") or str(weight.dtype).removeprefix("torch.")
    place = f"{torch.get_num_threads()} threads" if args.device == "cpu" else args.device
    print(f"{args.random or args.model.name}, {kind}, {place}{', plain' * args.plain}\nThis machine"
          f" reads {limit['GB/s']:.1f} GB/s and multiplies {limit['TFLOP/s']:.2f} TFLOP/s.\n\n"
          f"{'test':20}{'tok/s':>10}{'+-':>8}{'that is':>18}{'of the machine':>17}", flush=True)

    def measure(T: int, S: int, n: int, B: int) -> str:  # of n tokens after a prompt of T of which S are cached
        cached = 2 * L * C * weight.itemsize * B  # bytes of a position
        if T + n > context:
            return f"left out: the context is {context}"
        if args.device == "cpu" and (size := cached * (T + n)) > persimmon.available_memory(weight.device):
            return f"left out: its cache takes {size / 1e9:.1f} GB, more than is free"
        ids, speeds = torch.full((B, T), 71), []
        try:
            cache = engine_for(model).make_cache(B, T + n)
            for block in (cache.keys, cache.values) if S else ():  # a GPU multiplies zeros faster
                block.normal_() if block.is_cuda else block.zero_()
            for _ in range(args.repetitions + 1):
                cache.crop(S)
                times = [time.perf_counter()]
                for _ in generate(model, ids, max_new_tokens=n, stop_ids=(), cache=cache):
                    times.append(time.perf_counter())
                speeds.append(B * T / (times[1] - times[0]) if n == 1 else B * (n - 2) / (times[-1] - times[2]))
        except torch.OutOfMemoryError:
            return "left out: out of memory"
        mean = statistics.mean(speeds[1:])  # the first run is to warm up
        spread = statistics.stdev(speeds[1:]) if args.repetitions > 1 else 0.0
        unit, work = "TFLOP/s", 2 * L * (4 * C * C + 2 * F * C + C * T) / 1e12  # of a token
        if n > 1:
            unit = "GB/s"
            work = (bytes_read(model, ids[:, :1].to(weight.device)) + cached * (S + n / 2)) / B / 1e9
        return f"{mean:10.2f}{spread:8.2f}{mean * work:10.2f} {unit:7}{mean * work / limit[unit]:17.0%}"

    try:
        for B in args.batch_size:
            for T, S, n in [(T, 0, 1) for T in args.n_prompt] + [(S + 1, S, args.n_gen) for S in args.n_depth]:
                title = (f"pp{T}" if n == 1 else f"tg{n} @ {S}") + f" x {B}" * (B > 1)
                note(f"{title} ...")
                row = measure(T, S, n, B)
                note()
                print(f"{title:20}{row}", flush=True)
    except KeyboardInterrupt:
        print("stopped")
        return 130
    finally:
        print(f"\npeak memory {peak_memory(args.device.startswith('cuda')) / 1e9:.2f} GB")
    return 0


def logits_of(model, ids, mask=None, room: int = 299, steps: int = 3, is_plain: bool = False) -> torch.Tensor:
    """(steps, B, V) by the model's engine, in a cache of `room`: after a prompt, and after each of the last tokens."""
    module, T = sys.modules[type(model).__module__], ids.shape[1] - steps + 1
    engine = module.Engine(model) if is_plain else module.engine_for(model)
    with torch.no_grad():
        cache = engine.make_cache(len(ids), room)
        found = [engine.prefill(ids[:, :T], mask, cache).clone()]
        return torch.stack(found + [engine.decode(x, mask, cache).clone() for x in ids[:, T:, None].unbind(1)])


@torch.no_grad()
def compare_speed(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Time our model and transformers' in turns, with the same random bfloat16 weights of full width: medians for the
    first token, which reads the prompt, and for each later one. Last, how far logits are from those of transformers."""
    import transformers

    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.vocab_size < 8:
        raise ValueError("--rounds has to be 1 or more, and --vocab-size 8 or more")
    is_cuda = args.device == "cuda"
    torch.manual_seed(0)
    note("random weights ...")
    config = PersimmonConfig(args.vocab_size, num_hidden_layers=args.layers, bos_token_id=1, eos_token_id=None)
    raw = {name: value for name, value in config_to_dict(config).items() if "type" not in name}
    with torch.device(args.device):
        theirs = transformers.PersimmonForCausalLM._from_config(
            transformers.PersimmonConfig(**raw), dtype=torch.bfloat16).eval()
    with torch.device("meta"):
        ours = PersimmonForCausalLM(config).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)  # the same tensors
    all_ids = torch.randint(6, args.vocab_size, (16, 16000), device=args.device)

    def set_density(density: float) -> None:
        """Biases that leave this part of the MLPs' activations nonzero, in all models but quantized ones."""
        for block in ours.model.layers:  # W x is 0.02 * sqrt(4096) wide, as x is normalized
            block.mlp.dense_h_to_4h.bias.fill_(0.02 * 64 * statistics.NormalDist().inv_cdf(density))

    def our_times(ids: torch.Tensor, n: int, model: PersimmonForCausalLM = ours) -> tuple[float, float]:
        cache, times = engine_for(model).make_cache(ids.shape[0], ids.shape[1] + n), [time.perf_counter()]
        times += [time.perf_counter() for _ in generate(model, ids, max_new_tokens=n, stop_ids=(), cache=cache)]
        return times[1] - times[0], (times[-1] - times[2]) / (n - 2)

    def their_times(ids: torch.Tensor, n: int, **options) -> tuple[float, float]:
        times = [time.perf_counter()]
        clock = SimpleNamespace(put=lambda ids: times.append(time.perf_counter()), end=lambda: None)
        theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0,
                        streamer=clock, **options)  # which gets the prompt, then the tokens
        return times[2] - times[0], (times[-1] - times[3]) / (n - 2)

    set_density(0.5)
    ways: dict[str, Callable] = {"transformers": their_times, "persimmon.py": our_times}
    if is_cuda:  # it compiles the model for this one
        ways["transformers, static cache"] = partial(their_times, cache_implementation="static")
        tests = [(128, 1), (2048, 1), (8192, 1), (16000, 1), (128, 16), (2048, 16)]
    else:
        plain = copy.deepcopy(ours, {id(p): p for p in ours.parameters()})  # has the same weights
        plain.fast, tests = False, [(512, 1)]
        ways["90% zeros"] = lambda *a: (set_density(0.1), our_times(*a), set_density(0.5))[1]
        ways["--plain"] = partial(our_times, model=plain)
        for kind, size in (("int8", 128), ("int4", 32), ("int4", 128)):
            note(f"quantizing in {kind} ...")
            quantized = quantize_model(copy.deepcopy(ours), kind, size)
            ways[f"{kind}, groups of {size}"] = partial(our_times, model=quantized)
    note()
    print(f"full width, {args.layers} layers, vocabulary {args.vocab_size}, random weights, bfloat16, half zeros, "
          f"{torch.cuda.get_device_name() if is_cuda else f'{torch.get_num_threads()} threads'}; torch "
          f"{torch.__version__}, transformers {transformers.__version__}; {args.rounds} rounds", flush=True)
    for T, B in tests:
        times = {name: [] for name in ways if "static" not in name or (T, B) == tests[0]}
        for n in range(args.rounds + 1):
            for name, found in times.items():
                note(f"{B} x {T}, round {n} of {args.rounds}: {name} ...")
                found.append(ways[name](all_ids[:B, :T], 33 if is_cuda else 18))
        note()
        for name, (_, *found) in times.items():  # the first round is to warm up
            first, each = map(statistics.median, zip(*found))
            ratio = statistics.median(b[1] / a[1] for a, b in zip(found, times["transformers"][1:]))
            print(f"{B:2} x {T:5}  {name:27} first token {1e3 * first:8.1f} ms, then {1e3 * each:8.2f} ms a step, "
                  f"{ratio:5.2f} x transformers", flush=True)
    note("logits ...")
    ids = all_ids[:1, :48]
    expected, whole, single = theirs(ids).logits.float(), ours(ids).logits, logits_of(ours, ids, steps=48)
    a, b = ((logits - expected).square().mean().sqrt() for logits in (single.transpose(0, 1), whole))
    note()
    print(f"logits (their standard deviation is {expected.std():.3f}), root mean square of what differs from "
          f"transformers: {a:.4f} token by token, {b:.4f} in one go")
    return 0


def main(argv: list[str]) -> int:
    command, *options = argv or [""]
    if command in ("bench", "compare"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `bench | head` ends without a traceback
        parser = argparse.ArgumentParser(prog=f"test_persimmon.py {command}", allow_abbrev=False,
                                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        try:
            return (bench if command == "bench" else compare_speed)(parser, options)
        except KeyboardInterrupt:
            note()
            return 130
        except (ValueError, OSError, subprocess.CalledProcessError) as error:
            note()
            print(f"test_persimmon.py: error: {error}", file=sys.stderr)
            return 2
    if command == "all":
        pytest_command = [sys.executable, "-m", "pytest", __file__, *options]
        return subprocess.run(pytest_command, env={**os.environ, "PERSIMMON_ALL": "1"}).returncode
    print("\n".join(line[4:] for line in __doc__.splitlines() if line.startswith("    ")))
    return 0 if command in ("", "-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

# --- what the tests share --------------------------------------------------------------------------------------------

import ast
import contextlib
import gzip
import hashlib
import importlib.util
import io
import itertools
import math
import pickle
import pty
import random
import re
import runpy
import select
import shlex
import shutil
import socket
import tarfile
import warnings
import weakref
import zipfile
from collections import Counter, OrderedDict
from dataclasses import asdict, replace
from unittest.mock import MagicMock, Mock

import numpy
import pytest
import sentencepiece
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.modeling_utils import local_torch_dtype

import convert
import sample as sample_script
from persimmon import (
    Attention, CapturedCache, CpuEngine, CudaEngine, Engine, Int4Linear, Int8Linear, Int8SparseLinear, KVCache,
    PersimmonForSequenceClassification as OfText, PersimmonForTokenClassification as OfToken, PersimmonModel,
    QuantizedLinear, StaticCache, StreamDecoder, Tokenizer, TransposedKVCache, apply_rope, attention, causal_mask,
    chat_prompt, cpu_linear, fused_attend, fused_linear, fused_sparse_linear, is_as_exact, is_unmodified, load_config,
    replaced_forward, rope_tables, sample)

HERE = Path(__file__).resolve().parent
TINY = HERE / "tiny"
SOURCE = (HERE / "persimmon.py").read_text()
ALL = "PERSIMMON_ALL" in os.environ  # every combination, which takes long
settings.register_profile("persimmon", derandomize=not ALL, deadline=None, max_examples=1000 if ALL else 100)
settings.load_profile("persimmon")
torch.set_num_threads(1)  # on small models, threads only wait for each other, and very long where others compute too

CONFIGS = {  # V, C, F, L, H and the context; no two sizes of a model are equal
    "D16": PersimmonConfig(97, 48, 80, 4, 3, 160, bos_token_id=1, eos_token_id=None, pad_token_id=5),
    "D64": PersimmonConfig(151, 128, 208, 3, 2, 180, bos_token_id=1, eos_token_id=None),
    "no QK-norm, other RoPE": PersimmonConfig(
        101, 120, 88, 2, 5, 170, bos_token_id=1, eos_token_id=None, qk_layernorm=False, rope_theta=1000.0,
        partial_rotary_factor=0.25, layer_norm_eps=1e-3)}
CONFIG = CONFIGS["D16"]
SHORT = replace(CONFIG, num_hidden_layers=1)
HEADS = PersimmonForCausalLM, OfText, OfToken
B, T = 2, 71  # longer than 64 positions, where RoPE's slow pairs have begun to turn
# What processors have of what cpu_has asks for. In float16 AMX is of no use.
PROCESSORS = {
    "AMX": ("amx_tile", "avx512_bf16", "avx2"), "Zen 4": ("avx512_bf16", "avx2"), "laptop": ("avx2",), "ARM": ()}
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"


def every(values, few):
    """All the values with PERSIMMON_ALL, else the few that show most."""
    return list(values) if ALL else few


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Fill every parameter with noise, norm weights around one; logits come out with a spread of one or so."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        scale = 0.3 if p.dim() == 1 else 3.0 if "embed" in name else 1.5 / math.sqrt(p.shape[1])
        noise = torch.randn(p.shape, generator=generator) * scale
        p.data = (noise + 1 if "norm" in name and name.endswith("weight") else noise).to(p.dtype)
    return model


def write_config(folder: Path, config: PersimmonConfig) -> None:
    """config.json as the hub had it in 2023, where a partial_rotary_factor of 0.5 was understood."""
    raw = {key: value for key, value in config_to_dict(config).items() if not re.search("rope|rotary|dtype", key)}
    raw |= {"rope_theta": config.rope_theta, "torch_dtype": "float32", "rope_scaling": None, "pretraining_tp": 1,
            "rms_norm_eps": 1e-6, "num_key_value_heads": config.num_attention_heads}
    raw |= {"partial_rotary_factor": config.partial_rotary_factor} if config.partial_rotary_factor != 0.5 else {}
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test has the same random numbers in each run, alone or among others."""
    random.seed(0), torch.manual_seed(0)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder for each config, written without save_pretrained."""
    made = {name: tmp_path_factory.mktemp("model") for name in CONFIGS}
    for name, folder in made.items():
        state = randomize(PersimmonForCausalLM(CONFIGS[name])).state_dict()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        write_config(folder, CONFIGS[name])
    return made


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A copy of a model's folder, to be damaged."""
    return Path(shutil.copytree(folders["D16"], tmp_path / "model"))


@pytest.fixture
def small(folders) -> PersimmonForCausalLM:
    return PersimmonForCausalLM.from_pretrained(folders["D16"])


def oracle(folder: Path, **options) -> transformers.PersimmonForCausalLM:
    return transformers.PersimmonForCausalLM.from_pretrained(folder, dtype="float32", **options).eval()


@pytest.fixture(scope="session", params=CONFIGS)
def models(request, folders) -> tuple[PersimmonForCausalLM, transformers.PersimmonForCausalLM]:
    """The same weights as our model and as transformers'."""
    return PersimmonForCausalLM.from_pretrained(folders[request.param]), oracle(folders[request.param])


@pytest.fixture(params=["plain", "CPU", "CUDA"])
def pair(request, models, monkeypatch) -> tuple[PersimmonForCausalLM, transformers.PersimmonForCausalLM]:
    """The same, where `generate` runs our model plainly, or with an engine in all that it can do here."""
    use_engine(monkeypatch, models[0], request.param)
    return models


def random_ids(config: PersimmonConfig, rows: int = B, length: int = T, seed: int = 0) -> torch.Tensor:
    return torch.randint(6, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def new_cache(config, rows: int, length: int, kind: type[KVCache] = KVCache, dtype=torch.float32) -> KVCache:
    """An empty cache full of NaN: nothing may be read that was not written."""
    cache = kind(config, rows, length, dtype, DEVICE if kind is StaticCache else "cpu")
    cache.keys.fill_(math.nan), cache.values.fill_(math.nan)
    return cache


def refuses(message: str, work: Callable, *args, error=ValueError, **options) -> None:
    with pytest.raises(error, match=message):
        work(*args, **options)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and (a - b).abs().max().item() <= tolerance


def use_cpu_engine(monkeypatch, processor: str = "Zen 4") -> None:
    """CpuEngine as on a processor, for matrices and caches of any size and dtype; blocks of keys are short."""
    monkeypatch.setattr(CpuEngine, "large", 0)
    monkeypatch.setattr(persimmon, "cpu_has", lambda feature: feature in PROCESSORS[processor])
    monkeypatch.setattr(TransposedKVCache, "block", 8)
    kind = KVCache if processor == "AMX" else TransposedKVCache
    monkeypatch.setattr(CpuEngine, "make_cache", lambda self, rows, N, device=None: new_cache(
        self.model.config, rows, N, kind, self.model.dtype))


def use_interpreter(module: ModuleType, monkeypatch) -> None:
    """Prepares `module`, persimmon or a copy of it, and Triton's interpreter for one another."""
    if not IS_INTERPRETED:
        pytest.skip("no GPU; test_kernels_in_the_interpreter runs it")
    from triton import language
    from triton.runtime import interpreter

    # It looks for triton.language among the globals of a kernel's file, and where it rewrites the code (so that
    # `n = 1` makes a tensor of Triton, which these kernels do not need) it knows nothing outside of the function.
    monkeypatch.setattr(module, "tl", language, raising=False)
    monkeypatch.setattr(interpreter.FunctionRewriter, "rewrite_ast", lambda self: self.fn)
    builder, wide = interpreter.InterpreterBuilder, language.float32
    dot, cast = builder.create_dot, builder.cast_impl
    # It keeps bfloat16 as integers, and would multiply these, or round an int8 to bfloat16 as if that was an integer.
    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *others: dot(
        self, *(cast(self, x, wide) if x.dtype.scalar == language.bfloat16 else x for x in (a, b)), *others))
    monkeypatch.setattr(builder, "create_si_to_fp", lambda self, x, kind: cast(self, cast(self, x, wide), kind))


class RecordedGraph(TorchDispatchMode):
    """torch.cuda.CUDAGraph on a CPU: operators and kernels are called again, with the same memory and numbers."""
    count = 0  # of captures

    def __init__(self) -> None:
        super().__init__()
        self.calls = []
        RecordedGraph.count += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a capture can't wait for a number"
        call = partial(function, *args, **(kwargs or {}))
        self.calls.append((made := call(), call))
        return made

    def replay(self) -> None:
        for made, call in self.calls:
            for old, new in zip(*map(torch.utils._pytree.tree_leaves, (made, call()))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def without_gpu(monkeypatch, module: ModuleType = persimmon) -> None:
    """CudaEngine and StaticCache take the CPU for a GPU with 3 SMs."""
    if DEVICE == "cuda":
        return
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    for name in ("device", "device_of", "stream", "current_stream", "Stream", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: MagicMock(multi_processor_count=3))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
    monkeypatch.setattr(module, "nonzero_bags", lambda *_: None)  # as off the CPU
    monkeypatch.setitem(module.ENGINES, "cpu", module.CudaEngine)


def plain_linear(linear, x, norm=None, residual=None, square=False) -> torch.Tensor:
    y = type(linear).forward(linear, x if norm is None else norm(x))
    y = y.relu().square() if square else y
    return y if residual is None else y + residual


def plain_sparse_linear(linear, table, x, residual, arrived) -> torch.Tensor:
    return x @ table + linear.bias + residual if table.dtype == x.dtype else linear(x) + residual


def plain_attend(layer, qkv, rope, mask, cache) -> torch.Tensor:
    """fused_attend; like the kernel, it finds the position in memory, when it is captured and replayed."""
    (B, T, _), N, row = qkv.shape, cache.keys.shape[3], cache.positions(*qkv.shape[:2])[0][:, None]
    q, k, v = qkv.view(B, T, layer.num_heads, 3, layer.head_dim).unbind(3)
    q, k = apply_rope(layer.q_layernorm(q), *rope), apply_rope(layer.k_layernorm(k), *rope)
    for block, new in ((cache.keys, k), (cache.values, v)):
        block[layer.layer].index_copy_(2, row[:, 0], new.transpose(1, 2))
    seen = torch.arange(N) <= row
    k, v = (x[layer.layer].where(seen[-1, :, None], 0) for x in (cache.keys, cache.values))
    seen = seen if mask is None else seen & torch.nn.functional.pad(mask, (0, N - mask.shape[-1]))
    return attention(q.transpose(1, 2), k, v, seen).transpose(1, 2).reshape(B, T, -1)


def use_cuda_engine(monkeypatch) -> Counter:
    """CudaEngine with PyTorch's operators in place of the kernels, and how often they were called."""
    calls = Counter()
    without_gpu(monkeypatch)
    monkeypatch.setattr(persimmon, "triton_kernels", lambda: {})
    for name in ("fused_attend", "fused_linear", "fused_sparse_linear"):
        monkeypatch.setattr(persimmon, name, lambda *args, _name=name, **options:
                            calls.update([_name]) or globals()[_name.replace("fused", "plain")](*args, **options))
    return calls


def use_engine(monkeypatch, model: PersimmonForCausalLM, kind: str) -> None:
    """kind is "plain", "CPU" or "CUDA"; a model forgets the engine that it had."""
    model.fast = kind != "plain"
    {"plain": lambda _: None, "CPU": use_cpu_engine, "CUDA": use_cuda_engine}[kind](monkeypatch)


# === Part I. The model ===============================================================================================
@pytest.mark.parametrize("kind", HEADS)
def test_init_weights(kind):
    """Of a new model, and of one that had other weights and norms; a parameter of one's own stays."""
    config = replace(CONFIG, initializer_range=0.05, num_labels=50)
    (other := randomize(kind(config))).gate = torch.nn.Parameter(torch.full((9,), 7.0))
    other.own_norm = randomize(torch.nn.RMSNorm(8))
    other.init_weights()
    for model in (kind(config), other):
        for name, p in model.named_parameters():
            is_new = p == (7.0 if name == "gate" else float("norm" in name and name.endswith("weight")))
            assert 0.04 < p.std() < 0.06 and abs(p.mean()) < 0.01 if p.dim() > 1 else is_new.all(), name


@torch.no_grad()
def test_logits_and_loss_are_those_of_transformers(models):
    """Of ids and embeddings, with far and other positions, and with padding on either side; in bfloat16, as exact."""
    ours, theirs = models
    assert theirs.config.rope_parameters["rope_theta"] == ours.config.rope_theta  # parity of wrong ones is none
    ids, embeds = random_ids(ours.config), torch.randn(B, T, ours.config.hidden_size)
    labels, mask = ids.clone(), torch.ones(B, T).long()
    labels[0, :20], mask[0, :13], mask[1, 60:] = -100, 0, 0
    a, b = ours(ids, labels=labels), theirs(ids, labels=labels)
    assert close(a.logits, b.logits) and close(a.loss, b.loss) and b.logits.std() > 0.3
    rms = [distance(copy.deepcopy(model).bfloat16()(ids).logits.float(), b.logits) for model in models]
    assert 0 < rms[0] <= 1.1 * rms[1], rms
    assert close(ours(ids, logits_to_keep=3).logits, b.logits[:, -3:])
    assert close(ours(inputs_embeds=embeds).logits, theirs(inputs_embeds=embeds).logits)
    far, scattered = torch.arange(16000, 16000 + T)[None], torch.arange(T)[None] * 3
    assert close(ours(ids, position_ids=far).logits, theirs(ids, position_ids=far).logits)  # where angles are rounded
    # transformers takes a jump in position_ids for a new sequence, unless there is a mask
    c = theirs(ids, position_ids=scattered, attention_mask=torch.ones_like(ids)).logits
    assert all(close(ours(ids, position_ids=p).logits, c) for p in (scattered, scattered.expand(B, T)))
    a, b = ours(ids, attention_mask=7 * mask).logits, theirs(ids, attention_mask=mask).logits  # what is not 0, is 1
    assert a.isfinite().all() and close(a[mask == 1], b[mask == 1])
    mask[0, 30:40] = 0  # positions do not count padding, wherever it is
    kept = mask[0] == 1
    assert close(ours(ids, mask).logits[:1, kept], ours(ids[:1, kept]).logits)
    exact, tables = (rope_tables(torch.tensor([[7, 4001]]), CONFIG, t) for t in (torch.float32, torch.bfloat16))
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(exact, tables))  # the angles are not rounded
    # with a cache: of chunks of nine ids, and of the last five once more
    for chunks, padding in itertools.product(((5, 1, 3), (1, 1, 7), (9,), (2, 7)), (0, 2)):
        cache, ids, mask = new_cache(ours.config, B, 9), ids[:, :9], torch.ones(B, 9).long()
        mask[1, :padding] = 0
        whole = ours(ids, mask if padding else None).logits
        for start, end in [*itertools.pairwise(itertools.accumulate(chunks, initial=0)), (4, 9)]:
            cache.crop(start)
            part = ours(ids[:, start:end], mask[:, :end] if padding else None, cache=cache).logits
            kept = mask[:, start:end] == 1
            assert close(part[kept], whole[:, start:end][kept], 1e-5) and cache.length == end
    assert all(causal_mask(torch.arange(5 - T, 5), 5, None) is None for T in (1, 5))  # which SDPA does faster
    assert causal_mask(torch.arange(9), 9, mask).any(-1).all()  # on a GPU, a row that sees nothing would be NaN


@torch.no_grad()
def test_forward_refuses_inputs_that_do_not_fit(small):
    ids, cache, zeros = random_ids(CONFIG, length=4), new_cache(CONFIG, 2, 9), torch.zeros
    small(random_ids(CONFIG, length=6), cache=cache)
    none = [None] * 4
    for message, *cases in (
            (r"attention_mask is \(2, 3\), not \(2, 4\): \(B, S\)", [ids, zeros(2, 3)]),
            ("either input_ids or inputs_embeds", [], [ids, *none[1:], zeros(2, 4, 48)]),
            (r"the embedded input is \(.*\), and has to be \(B, T, C\)",
             [ids[0]], [*none, zeros(2, 4, 47)], [*none, zeros(4, 48)]),
            (r"position_ids are \(.*\), not \(B, T\) = \(2, 4\)",
             [ids, None, zeros(2, 3)], [ids, None, zeros(1, 1)], [ids, None, zeros(3, 4)]),
            ("2 rows of 9 positions, not 2 of 10", [ids, None, None, cache]),
            ("2 rows of 9 positions, not 1 of 8", [ids[:1, :2], None, None, cache]),
            ("logits_to_keep", [ids, *none, ids, 1], [ids, *none, None, -1])):
        for arguments in cases:
            refuses(message, small, *arguments)
    assert cache.length == 6
    small(ids[:, :3], cache=cache)  # there is room for these
    refuses("float16 .* use bfloat16", small.half().train(), ids)
    assert small.eval()(ids, labels=ids).loss.dtype == torch.float32
    assert small.bfloat16().train()(ids).logits.isfinite().all()


def test_gradient_checkpointing():
    """The same gradients, dropout included, out of much less that is kept for the backward pass. Of subclasses too."""
    ids, results, kept = random_ids(CONFIG), [], []
    model = PersimmonForCausalLM(replace(CONFIG, hidden_dropout=0.3, attention_dropout=0.2)).train()
    model.model.layers[1].__class__ = type("Double", (persimmon.Block,), {
        "forward": lambda block, x, *others: 2 * persimmon.Block.forward(block, x, *others)})
    for _ in range(2):
        torch.manual_seed(0), model.zero_grad(), kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(kept.pop() + t.numel()) or t, lambda t: t):
            loss = model(ids, labels=ids).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
        model.gradient_checkpointing_enable()
    assert all(map(torch.equal, *results)) and kept[1] < kept[0] / 3


def test_shape_comments(monkeypatch):
    """A tracer compares what each commented line has assigned with what it says; a call has to agree with itself."""
    claims, checked, shape = {}, set(), r"\(((?:[0-9A-Z*/+, ]|bags|blocks)+)\)"
    for number, line in enumerate(SOURCE.splitlines(), 1):
        if found := re.match(rf" +([a-z_., ]+) = (?!tl\.)[^#]*#.*?{shape}", line):  # tl: in a kernel, nobody can look
            claims[number] = line, found[1].split(", "), [*filter(None, found[2].replace(" ", "").split(","))]
    config = replace(CONFIG, hidden_size=96, intermediate_size=160)
    sizes = dict(zip("VCFLHDR", [*vars(config).values()][:5] + [config.head_dim, config.rotary_dim]))

    def trace(frame, event, _, last=0, letters=sizes):
        """Checks what line `last` has assigned when its frame goes on; another letter keeps its first size."""
        if frame.f_code.co_filename != persimmon.__file__ or frame.f_code.co_name.startswith("<"):
            return None
        line, variables, axes = claims.get(last, ("", [], []))
        letters = {**letters, "L": getattr(frame.f_locals.get("config"), "num_hidden_layers", letters["L"])}
        for name, value in frame.f_locals.items():
            if name in ("x", "ids", "input_ids", "position_ids") and getattr(value, "ndim", 0) > 1:
                letters |= zip("BT", value.shape)
            elif name in ("self", "cache") and hasattr(value, "keys"):
                letters["N"] = value.keys.shape[3]
            elif name in ("bags", "blocks", *"BTSNPOCHLDFRV") and type(value) is int:
                letters[name] = value
        for found in (eval(variable, {}, frame.f_locals).shape for variable in variables):
            letters = {axis: size for axis, size in zip(axes, found) if axis not in "SN"} | letters
            assert [*found] == [eval(axis, {}, letters) for axis in axes], (line, found, letters)
            checked.add(last)
        return partial(trace, last=frame.f_lineno, letters=letters)

    model, *heads = [randomize(kind(config)).eval() for kind in HEADS]
    ids, mask, layer = random_ids(config, length=7), torch.ones(2, 7).long(), model.model.layers[1].self_attn
    mask[0, :3], cache, options = 0, new_cache(config, 2, 24), {"top_k": 50, "top_p": 0.9, "min_p": 0.01}
    sys.settrace(trace)
    try:
        for kind, rows in (("plain", 2), ("plain", 1), ("CPU", 2), ("CPU", 1), ("CUDA", 2)):
            with monkeypatch.context() as patch:
                use_engine(patch, model, kind)
                model.generate(ids[:rows], mask[:rows] if rows == 2 else None, max_new_tokens=18)
        model.generate(ids, temperature=0.9, repetition_penalty=1.1, max_new_tokens=2, **options)
        with torch.no_grad():
            for head in (partial(model, cache=cache), quantize_model(copy.deepcopy(model), "int8"), *heads):
                head(ids)
            model(ids[:, :5], cache=cache)
            Int4Linear(layer.query_key_value, 32)(torch.zeros(1, 96))
        without_gpu(monkeypatch)  # and with kernels that do nothing
        monkeypatch.setattr(persimmon, "triton_kernels", lambda: {"attention": {(2 * 3, 5, 1): lambda *_, **__: None}})
        rope, cache = rope_tables(torch.arange(5)[None], config, torch.float32), new_cache(config, 2, 24, StaticCache)
        fused_attend(layer, torch.zeros(2, 5, 3 * 96), rope, None, cache)
    finally:
        sys.settrace(None)
    assert len(claims) > 40 and checked == {*claims}, f"never run: lines {sorted({*claims} - checked)}"


def test_a_model_samples_in_its_own_way(small):
    """By a method of a subclass, or by a function that is assigned: here, the least likely token."""
    class Own(PersimmonForCausalLM):
        def sample(self, logits, *options):
            return logits.argmin(-1)

    own, ids = Own(small.config).eval(), random_ids(CONFIG)
    own.load_state_dict(small.state_dict())
    small.sample = lambda logits, *options: logits.argmin(-1)
    for model in (own, small):
        assert torch.equal(model.generate(ids, max_new_tokens=1)[:, -1], small(ids).logits[:, -1].argmin(-1))
    logits, [one, other] = torch.randn(1, 97), [torch.Generator().manual_seed(3) for _ in range(2)]
    assert PersimmonForCausalLM.sample(own, logits, [one], temperature=9.0, top_k=9) == sample(logits, [other], 9.0, 9)


@pytest.mark.parametrize(("V", "spread", "options"), [
    (9, 2.0, {"temperature": 0.5, "min_p": 0.3}), (5000, 2.0, {}), (5000, 0.1, {"top_k": 7, "top_p": 0.5}),
    (9, 2.0, {"temperature": 0.5, "top_k": 6, "top_p": 0.9, "min_p": 0.05}), (5000, 4.0, {"top_p": 0.9}),
    (5000, 0.1, {"top_p": 0.9}), (5000, 4.0, {"top_k": 900, "min_p": 1e-4})])
def test_sample(V, spread, options):
    """Inverse-CDF sampling from what transformers' filters leave. A row does not depend on the others."""
    logits = torch.randn(2, V) * spread
    scores, options = logits.double(), {"temperature": 1.0, **options}
    warpers = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper,
               "min_p": MinPLogitsWarper}
    for name, value in options.items():
        scores = warpers[name](value)(None, scores)
    ids = scores.argsort(descending=True) if {"top_k", "top_p"} & {*options} else torch.arange(V).expand(2, V)
    cumsum = scores.softmax(-1).gather(1, ids).cumsum(-1)
    for seed in range(20):
        random = [[torch.Generator().manual_seed(seed + b) for b in range(2)] for _ in range(3)]
        u = 1 - torch.stack([torch.rand(1, dtype=torch.float64, generator=generator) for generator in random[0]])
        expected = ids.gather(1, torch.searchsorted(cumsum, u * cumsum[:, -1:]))[:, 0]
        assert torch.equal(sample(logits, random[1], **options), expected)
        assert sample(torch.stack((logits[0], torch.zeros(V))), random[2], **options)[0] == expected[0]


def test_sample_ties_and_limits():
    """Of equal logits, top_k and top_p keep as many as they say."""
    logits, generators = torch.tensor([[0.0, 3, 3, 1, 3]] * 20), [torch.Generator().manual_seed(n) for n in range(20)]
    for temperature, options, expected in (
        (0.0, {}, {1}), (1e-50, {}, {1}), (1e-20, {}, {1, 2, 4}),  # no overflow to inf - inf
        (1.0, {"top_k": 1}, 1), (1.0, {"top_p": 0.0}, 1), (1.0, {"top_p": 1e-9}, 1), (1.0, {"top_k": 2}, 2),
        (1.0, {"top_p": 0.5}, 2), (1.0, {"min_p": 1.0}, {1, 2, 4}), (9.0, {"top_k": 99}, {0, 1, 2, 3, 4})):
        found = {*sample(logits, generators, temperature, **options).tolist()}
        assert found == expected or found < {1, 2, 4} and len(found) == expected, (temperature, options)
    assert len({*sample(torch.zeros(20, 2), generators, 1.0, top_p=0.5).tolist()}) == 1  # 0.5 is enough


def test_engines(small, monkeypatch):
    """One stays with the model; none of Part III in training, compiled, under autocast, with fast = False."""
    monkeypatch.setitem(persimmon.ENGINES, "cpu", CudaEngine)
    engine = engine_for(small)
    assert type(engine) is CudaEngine and engine_for(small) is engine and engine.model is small
    with torch.autocast("cpu", torch.bfloat16):
        assert type(engine_for(small)) is Engine
    assert type(engine_for(small.train())) is Engine and type(engine_for(small.eval())) is CudaEngine
    (compiled := copy.deepcopy(small)).compile()
    assert type(engine_for(compiled)) is Engine
    assert small.train().engine is None  # it has copies of weights, and a fused optimizer raises no _version
    engine, small.fast = weakref.ref(engine_for(small.eval())), False
    assert type(engine_for(small)) is Engine and engine() is None
    without_gpu(monkeypatch)
    for kind, how_many in ((Engine, [1, 2, 3]), (CudaEngine, [1, 3, 3])):  # a GPU computes a step ahead
        asked = []
        results = (asked.append(n) or torch.tensor([[n, 7], [5, -n]], device=DEVICE).unbind() for n in range(3))
        assert [(*result, len(asked)) for result in kind(small).to_host(results)] == [
            ([n, 7], [5, -n], asked_then) for n, asked_then in enumerate(how_many)]
    own = type("OwnCache", (KVCache,), {})  # is kept
    monkeypatch.setattr(Engine, "make_cache", lambda self, *size: own(CONFIG, *size[:2], torch.float16, "cpu"))
    assert {type(kind(small.half()).make_cache(1, 2000)) for kind in (CpuEngine, CudaEngine)} == {own}


def test_tokens(pair):
    """Greedy ones are those of transformers. A row does not depend on its batch, nor on where its padding is."""
    ours, theirs = pair
    ids = random_ids(ours.config, length=20)
    for options in ({"max_new_tokens": 60}, {"max_new_tokens": 30, "repetition_penalty": 1.3}):
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **options)
        assert torch.equal(ours.generate(ids, **options), expected)
        assert len({*expected[0, 20:].tolist()}) > 3  # not one token for ever
    hook = ours.lm_head.register_forward_hook(lambda module, inputs, logits: logits - 20)  # all below 0
    text = ours.generate(ids[:1], max_new_tokens=20, repetition_penalty=2.0)[0].tolist()
    hook.remove()
    assert len({*text}) == len({*text[:20]}) + 20
    options = dict(max_new_tokens=20, temperature=0.7, repetition_penalty=1.2, top_p=0.9)
    ids, mask, state = random_ids(ours.config, 4, 11), torch.zeros(4, 11).long(), torch.get_rng_state()
    mask[0], mask[1, 8:], mask[2, [2, 4, 5]], mask[3, :8] = 1, 1, 1, 1
    seeds = numpy.int64(4), 400, None, None
    together, *others = (list(generate(ours, ids, 7 * mask, seed=seed, **options)) for seed in seeds)
    for b in range(4):
        row = [step.tokens[b] for step in together]
        text = torch.cat((ids[b, mask[b] == 1], torch.tensor(row)))[None]
        assert row == [step.tokens[0] for step in generate(ours, text[:, :-20], seed=4 + b, **options)]
        assert len({tuple(row), *(tuple(step.tokens[b] for step in other) for other in others)}) == 4
        logprobs = ours(text).logits[0, -21:-1].log_softmax(-1)[range(20), row]  # before penalty and filters
        assert close(torch.tensor([step.logprobs[b] for step in together]), logprobs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["plain", "CPU", "CUDA"])
def test_a_conversation_computes_only_what_is_new(small, monkeypatch, kind):
    """Answers in one cache are those of fresh runs, also from a branch of it; nothing beyond the end is looked at."""
    use_engine(monkeypatch, small, kind)
    text, more, five = random_ids(CONFIG, 1, 9), random_ids(CONFIG, 3, 3), {"max_new_tokens": 5}
    cache, passes = engine_for(small).make_cache(1, 60), []
    cache.keys.fill_(math.nan), cache.values.fill_(math.nan)
    small.model.layers[0].register_forward_hook(lambda module, args, y: passes.append(y.shape[1]))
    for turn in range(3):
        passes.clear()
        answer = small.generate(text, cache=cache, **five)  # whose last token is read in the next turn
        assert kind == "CUDA" or passes == [4 if turn else 9, 1, 1, 1, 1]
        assert cache.length == answer.shape[1] - 1 and torch.equal(answer, small.generate(text, **five))
        branch, cache = cache, copy.deepcopy(cache)
        text = torch.cat((answer, more[turn : turn + 1]), 1)
        assert torch.equal(small.generate(text, cache=branch, **five), small.generate(text, **five))
    for prompt in ((text[:, :29],), (text[:, :30], torch.arange(30)[None] > 0)):
        refuses(f"a cache of 29 needs a longer, unpadded prompt: not {prompt[0].shape[1]}", small.generate, *prompt,
                cache=cache)


def test_how_a_text_ends(small):
    """From its end on, a row is padding, and the other one goes on undisturbed. Each has a context of its own."""
    ids, twelve = random_ids(CONFIG, length=7), {"max_new_tokens": 12}
    expected = list(generate(small, ids, **twelve))
    first, second = zip(*(step.tokens for step in expected))
    assert [step.finish_reasons for step in expected] == [[None, None]] * 11 + [["length", "length"]]
    stop = next(token for token in first if token not in second)
    for n, step in enumerate(expected[first.index(stop) :]):
        step.finish_reasons[0] = "stop"
        step.tokens[0], step.logprobs[0] = (5, 0.0) if n else (stop, step.logprobs[0])
    assert list(generate(small, ids, stop_ids=[torch.tensor(stop)], **twelve)) == expected
    small.config = replace(CONFIG, eos_token_id=stop)  # the default
    assert list(generate(small, ids, **twelve)) == expected
    assert small.generate(ids[:1], **twelve).shape[1] == 7 + first.index(stop) + 1
    assert small.generate(ids[:1], stop_ids=(), **twelve).shape[1] == 7 + 12
    small.config = CONFIG
    ids, mask, six = random_ids(CONFIG, length=157), torch.ones(2, 157).long(), {"max_new_tokens": 6}
    mask[1, :10] = 0
    reasons = zip(*(step.finish_reasons for step in generate(small, ids, mask)))
    assert [*map(list, reasons)] == [[None] * 2 + ["context"] * 11, [None] * 12 + ["context"]]
    full = small.generate(ids[:, :7])
    assert full.shape == small.generate(random_ids(CONFIG, length=159)).shape == (2, 160)  # not 207, by default
    assert torch.equal(small.generate(ids[:, :7].short(), max_length=12), full[:, :12])
    prompt = ids[:, :16], mask[:, :16]
    expected = list(generate(small, *prompt, **six))  # whose last token needs no room in a cache
    assert list(generate(small, *prompt, cache=new_cache(CONFIG, 2, 21), **six)) == expected
    short = list(generate(small, *prompt, cache=new_cache(CONFIG, 2, 20), **six))
    assert [s.tokens for s in short] == [s.tokens for s in expected[:5]]
    assert short[-1].finish_reasons == ["context"] * 2
    refuses("the prompt of 16 tokens fills the cache of 15", small.generate, *prompt, cache=new_cache(CONFIG, 2, 15))


def test_generate_refuses(small):
    for name, value in (
            ("max_new_tokens", 0), ("temperature", -1.0), ("temperature", math.nan), ("top_p", 1.5), ("top_k", -1),
            ("top_k", None), ("min_p", 2), ("repetition_penalty", 0), ("repetition_penalty", math.inf), ("seed", -1),
            ("seed", 2**63)):
        refuses(f"{name} = {value} is out of range", small.generate, random_ids(CONFIG), **{name: value})
    for message, ids, options in (
            (r"the prompt is \(1, 0\)", [[]], {}), (r"the prompt is \(2,\)", [7, 8], {}),
            ("ids from 1 to 97, out of 97", [[1, 97]], {}),
            ("ids from -1", [[-1, 9]], {}), ("the prompt of 160 tokens fills the context of 160", [[9] * 160], {}),
            ("the prompt of 160 .* context", [[9] * 160] * 2,
             {"attention_mask": torch.arange(160) >= torch.tensor([[150], [0]])}),
            (r"attention_mask is \(1, 4\)", [[7, 8, 9]], {"attention_mask": torch.ones(1, 4)}),
            ("row 1 of the prompt is all padding", [[7], [8]], {"attention_mask": torch.tensor([[1], [0]])}),
            *(("give max_new_tokens or a max_length, which counts the prompt too", [[7, 8, 9]], options)
              for options in ({"max_length": 3}, {"max_length": 9, "max_new_tokens": 2}))):
        refuses(message, small.generate, torch.tensor(ids), **options)
    small.lm_head.weight.data[3] = math.nan
    for dtype, cause, options in (
            ("float32", "are the", {}), ("float32", "are the", {"temperature": 1.0, "top_k": 3}),
            ("bfloat16", "are the", {"temperature": 1.0, "top_p": 0.5}), ("float16", "use bf", {"temperature": 1.0})):
        refuses(f"token 1: the logits are NaN in torch.{dtype}: {cause}", small.to(getattr(torch, dtype)).generate,
                random_ids(CONFIG), error=FloatingPointError, **options)


def test_other_defaults_and_offloaded_weights(monkeypatch):
    """Nothing is made on the default device (here "meta") or counted in the default dtype: bfloat16 knows no 257."""
    use_cpu_engine(monkeypatch)
    ids, made, models = random_ids(SHORT, 2, 700), [], [randomize(kind(SHORT)).eval() for kind in HEADS]
    ids[0, 690:], mask = SHORT.pad_token_id, (ids[:, :140] > 20).long()
    for device, dtype in (("cpu", torch.float32), ("meta", torch.bfloat16)):
        with torch.device(device), local_torch_dtype(dtype):
            made.append([m(ids[:, :n]).logits for m in models for n in (64, 258, 700)])
            made[-1] += [m(inputs_embeds=m.model.embed_tokens(ids)).logits for m in models]
            for models[0].fast, rows in itertools.product((False, True), (1, 2)):
                made[-1].append(models[0].generate(ids[:rows, :140], mask[:rows], max_new_tokens=9))
    assert all(map(torch.equal, *made))
    for part in (models[0].model, models[0].lm_head):  # on meta except while they run, as accelerate does it
        load = partial(part.load_state_dict, part.state_dict(), assign=True)
        part.register_forward_pre_hook(lambda *_, load=load: load() and None)
        part.to("meta").register_forward_hook(lambda m, *_: m.to("meta") and None)
    assert torch.equal(models[0].generate(ids[:, :140], mask, max_new_tokens=9), made[0][-1])


@torch.no_grad()
@pytest.mark.parametrize(("kind", "padded"), [*zip((HEADS[0], *HEADS), (False, True, True, False))])
def test_compiled_over_lengths(kind, padded):
    """One graph for the first length and one for all others."""
    torch._dynamo.reset()
    model, ids, graphs = randomize(kind(SHORT)).eval(), random_ids(SHORT, 2, 90), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for n in (9, 5, 17, 80):
        inputs = ids[:, :n].clone(), *[(torch.arange(n) > torch.tensor([[-1], [2]])).long()] * padded
        assert close(compiled(*inputs).logits, model(*inputs).logits)
    assert graphs.frame_count <= 3


# === Part II. Around the model =======================================================================================
@pytest.mark.parametrize("is_own", [False, True])
def test_config_survives_a_round_trip(tmp_path, is_own):
    """As the hub had it in 2023, or as we write it; then as transformers does."""
    odd = replace(CONFIG, rope_theta=1000.0, partial_rotary_factor=0.25, layer_norm_eps=1e-3, qk_layernorm=False,
                  hidden_dropout=0.6, attention_dropout=0.1, classifier_dropout=0.2, dtype="float32", num_labels=3,
                  id2label={"0": "sad", "1": "glad", "2": "mad"}, problem_type="regression", initializer_range=0.1)
    write_config(tmp_path, odd)
    if is_own:
        (tmp_path / "config.json").write_text(json.dumps(config_to_dict(odd)))
    theirs = transformers.PersimmonConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_config(tmp_path / "theirs") == load_config(tmp_path) == odd
    # the defaults are the 8B's, so transformers' but for these; null is the default, or a value of its own
    transformers.PersimmonConfig(bos_token_id=71013, eos_token_id=71013, rope_parameters={
        "rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5}).save_pretrained(tmp_path)
    assert load_config(tmp_path) == PersimmonConfig()
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "persimmon", "rope_scaling": None, "hidden_size": None, "hidden_dropout": 0, "use_cache": 1,
        "bos_token_id": None, "quantization": {"quantize": "int8"}, "rope_theta": 9,
        "rope_parameters": {"type": None, "rope_theta": None}}))
    assert load_config(tmp_path) == PersimmonConfig(bos_token_id=None, rope_theta=9)
    # fields of one's own
    old = "    hidden_size: int"
    own = edited(tmp_path, (old, f"    window: list[int] | None = None\n    act: str = 'a'\n{old}"))
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(own.PersimmonConfig(window=[9], act="b"), own)))
    assert (config := own.load_config(tmp_path)) == own.PersimmonConfig(window=[9], act="b", dtype="float32")
    for changes, message in (({"window": "a"}, "window = 'a' is not of type list"), ({"act": 1}, "act = 1 is not of")):
        refuses(message, own.checked_config, **asdict(config) | changes)


WHOLE, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors"
SAVED, TOKENIZER = {"config.json", "generation_config.json", WHOLE}, "tokenizer_config.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def change_tensors(file: Path, **changes: torch.Tensor | None) -> None:
    """Replace or add tensors of a safetensors file; None removes one."""
    state = load_file(file) | changes
    file.unlink()  # the tensors are mapped from it
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file)


def edit(file: Path, **changes) -> None:
    raw = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(raw | changes))


def shard(folder: Path) -> None:
    oracle(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / WHOLE).unlink()


CONFIG_REFUSED = [  # a part of the message; changes of config.json, each by itself
    ("no file .*config.json: ", None), ("is not valid JSON", b"{", b"\xff", b"[" * 10**5),
    ("has to hold a JSON object, not a list", b"[]"), ("a multiple of 3", {"hidden_size": 49}),
    ("not an object", {"rope_scaling": [1]}), ("= 100000 is not from 1 to 4096", {"num_hidden_layers": 100000}),
    ("config key .* is not supported, only",
     {"hidden_act": "gelu"}, {"head_dim": 32}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True},
     {"model_type": "llama"}, {"quantization_config": {}}, {"quantization_config": {"quant_method": "gptq"}},
     {"rope_scaling": {"type": "linear"}}, {"rope_parameters": {"rope_type": "yarn"}},
     {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"factor": 2.0}}),
    ("key .* = (True is not of type int|5 is not of type str)", {"hidden_size": True}, {"dtype": 5}),
    ("is not from (1|1e-30) to ", {"num_hidden_layers": 0}, {"vocab_size": 10**30}, {"rope_theta": math.inf},
     {"num_labels": 2**27}), ("RoPE can't", *({"partial_rotary_factor": factor} for factor in (0.2, 0.01, 1.5))),
    ("0 to 1", {"hidden_dropout": 1.5}, {"hidden_dropout": math.nan}, {"classifier_dropout": -0.1}),
    ("config key pad_token_id = 97 is not in the vocabulary of 97", {"pad_token_id": 97}),
    ("is none of (bfloat16, float16|regression)", {"problem_type": "guess"}, {"torch_dtype": "int8"}),
    ("key eos_token_id = .* is not", *({"eos_token_id": i} for i in (10**30, -5, [3, -5], [3, "a"], [True], [None]))),
    (r"quantize = '(\[\]|None)' for .* has int8 and int4",
     *({"quantization_config": {"quant_method": "persimmon.py", "quantize": kind}} for kind in ([], None)))]
REFUSED = [  # a file of a folder, which has shards for SHARD and INDEX; a part of the message; what is changed
    *(("config.json", *row) for row in CONFIG_REFUSED),
    (WHOLE, r"model lacks the tensor final_layernorm.bias \(1 in all\)", {"model.final_layernorm.bias": None}),
    (WHOLE, "model has the tensor x, which is not in a PersimmonForCausalLM of", {"model.x": torch.ones(9)}),
    (WHOLE, r"model has the tensor lm_head.weight in shape \(9,\): .* makes it \(97, 48\)", {"lm_head.weight": torch.ones(9)}),
    (WHOLE, "as torch.int8: config.json makes it torch.float32", {"lm_head.weight": torch.ones(97, 48).char()}),
    (WHOLE, "has tensors twice, with and without `model.`", {"final_layernorm.bias": torch.ones(48)}),
    (WHOLE, f"{WHOLE} is cut off, damaged", lambda data: data[:-100]), (SHARD, f"{SHARD} is cut off", b""),
    (WHOLE, f"no {WHOLE} or {INDEX}: convert .bin files with `python convert.py .*model .*model-safetensors`", None),
    (WHOLE, f"{WHOLE} is a pointer of Git LFS", LFS), (SHARD, f"lists {SHARD}, which is not a file of its folder", None),
    (INDEX, r"model lacks the tensor layers.\d.*in all\)", lambda data: data.replace(b"-00002-", b"-00001-")),
    (INDEX, "not a file of its", *({"weight_map": {"a": file}} for file in (f"../model/{SHARD}", f"{TINY}/{WHOLE}"))),
    (INDEX, "has no weight_map", b"{}", {"weight_map": {"a": 1}}),
    ("", r"lacks the tensor layers.4.input_layernorm.bias \(16 in all\)", {"num_hidden_layers": 5}),
    ("generation_config.json", r"eos_token_id = \[536870912\]", {"eos_token_id": [2**29]}),
    ("", "use one of bfloat16, float16, float32", {"dtype": "float8"}, {"dtype": torch.float64}, {"dtype": None}),
    ("", "hidden_dropout = 2 is not from 0 to 1", {"hidden_dropout": 2}),
    ("", "num_labels = 3, but id2label has 1 labels", {"num_labels": 3, "id2label": {"0": "a"}}),
    ("", "there is no folder no", {"folder": "no"}), ("", "'int3' .* has int8 and int4", {"quantize": "int3"}),
    ("", "has no (sparse|num_lables)=: see `load`, or model.fast", {"sparse": 0}, {"num_lables": 3})]


@pytest.mark.parametrize(("file", "message", "change"), [(*row[:2], change) for row in REFUSED for change in row[2:]])
def test_loading_refuses(folder, monkeypatch, file, message, change):
    """Other tensors, keys or bytes in a file, or a folder in its place (None); options. Config first, then a model."""
    if file in (SHARD, INDEX):
        shard(folder)
    if file.endswith("config.json"):
        monkeypatch.setattr(persimmon.Block, "__init__", Mock(side_effect=AssertionError("a model is built too early")))
    if change is None:
        (folder / file).unlink(), (folder / file).mkdir()
    elif not isinstance(change, dict):
        (folder / file).write_bytes(change if isinstance(change, bytes) else change((folder / file).read_bytes()))
    elif file:
        (change_tensors if file == WHOLE else edit)(folder / file, **change)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"\A.*{message}.*\Z"):  # in one line
        PersimmonForCausalLM.from_pretrained(**{"folder": folder, **({} if file else change)})


def test_loading_refuses_a_folder_of_integers(folder):
    edit(folder / "config.json", torch_dtype=None)
    save_file({name: tensor.int() for name, tensor in load_file(folder / WHOLE).items()}, folder / WHOLE)
    refuses("as torch.int32: config.json makes it torch.float32", PersimmonForCausalLM.from_pretrained, folder)


def test_loading_refuses_a_tensor_in_two_files(folder):
    """It could be another one in each, whichever the index means."""
    shard(folder)
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    name = min(load_file(first))
    change_tensors(second, **{name: load_file(first)[name]})
    refuses(f"{second.name} has the tensor {name}, and so has", PersimmonForCausalLM.from_pretrained, folder)


def test_links_in_a_strangers_folder(folder, small):
    """Loading moves nothing out of where one leads; saving empties nothing."""
    (mine := folder.with_name("mine") / "new").mkdir(parents=True), (mine / "thesis.tex").write_text("x")
    (folder / ".complete").symlink_to(mine), folder.with_name("new.unfinished").mkdir()
    folder.with_name("new.unfinished").joinpath("lock").symlink_to(mine / "thesis.tex")
    load_config(folder), small.save_pretrained(folder.with_name("new"))
    (folder / ".unfinished").symlink_to(mine.parent)
    refuses("is in the way", small.save_pretrained, folder)
    assert (mine / "thesis.tex").read_text() == "x" and not (folder / "thesis.tex").exists()


def test_ctrl_c_in_the_last_step_of_saving(small, folder, monkeypatch):
    def replace_file(*args, replace=Path.replace, calls=itertools.count()):
        if next(calls) == 1:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(Path, "replace", replace_file)
    (folder / "config.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        small.save_pretrained(folder)
    assert not (folder / ".complete").exists() and load_config(folder).dtype == "float32"


def test_loading(folder, small, monkeypatch):
    """From shards; mapped, so that training changes no file; without `model.` in the names; inv_freq is left out."""
    opened = Path.open
    with monkeypatch.context() as patch:  # what only its owner may read
        patch.setattr(Path, "open", lambda file, *a, **b: opened(file / ("x" * (file.suffix != ".json")), *a, **b))
        refuses("Not a directory", PersimmonForCausalLM.from_pretrained, folder, error=OSError)
    shard(folder), edit(folder / "config.json", architectures=["PersimmonModel", 5])
    ids, done, before = random_ids(CONFIG), [], (folder / SHARD).read_bytes()
    model = PersimmonForCausalLM.from_pretrained(folder, hidden_dropout=0.5, progress=done.append)
    assert torch.equal(model(ids).logits, small(ids).logits) and model.config.hidden_dropout == 0.5
    monkeypatch.chdir(folder.parent)
    assert PersimmonForCausalLM.from_pretrained("model").folder == folder  # which does not change with the directory
    assert done == sorted(done) and len(done) == len(model.state_dict()) and done[-1] == 1.0
    assert not model.training and all(p.is_contiguous() and p.requires_grad for p in model.parameters())
    assert str(folder / SHARD) in Path("/proc/self/maps").read_text()
    for p in model.parameters():
        p.data += 1
    assert (folder / SHARD).read_bytes() == before
    for prefix in ("model.", "model.layers.0.self_attn.", ""):
        bare = PersimmonModel.from_pretrained(folder)
        assert torch.equal(bare(ids).last_hidden_state, small.model(ids).last_hidden_state)
        bare.save_pretrained(folder)  # under names without `model.`
        change_tensors(folder / WHOLE, **{f"{prefix}rotary_emb.inv_freq": torch.ones(4)})


def is_saved(weights: dict[str, torch.Tensor], folder: Path, cls=PersimmonForCausalLM) -> bool:
    loaded = cls.from_pretrained(folder).state_dict()
    return all(torch.equal(tensor, loaded[name]) for name, tensor in weights.items())


def test_save_pretrained(small, tmp_path, monkeypatch):
    new, ids, files, small.folder = tmp_path / "deep" / "new", random_ids(CONFIG), ["tokenizer.model", TOKENIZER], TINY
    (tmp_path / "link").symlink_to(new)  # which is not there yet, and perhaps on another disk
    small.save_pretrained(tmp_path / "link")
    for a, b in ((new, new.parent), (new / WHOLE, new / "config.json")):  # with no temporary file's permissions
        assert a.stat().st_mode == b.stat().st_mode
    assert (8 + int.from_bytes((new / WHOLE).read_bytes()[:8], "little")) % 64 == 0  # for kernels: data begins there
    assert close(oracle(new)(ids).logits, small(ids).logits)
    assert [(new / name).read_bytes() for name in files] == [(TINY / name).read_bytes() for name in files]
    # over itself, in another dtype and memory layout, beside files that stay
    (new / TOKENIZER).write_text("{}"), (new / (notes := "tokenizer_notes.json")).touch()
    weight = small.bfloat16().lm_head.weight
    weight.data = weight.data.t().contiguous().t()
    small.save_pretrained(new)
    before = {file.name: file.read_bytes() for file in new.iterdir()}
    assert before.keys() == {*SAVED, *files, notes} and before[TOKENIZER] == b"{}"
    assert is_saved(small.state_dict(), new) and load_config(new).dtype == "bfloat16"
    # of another model, whose tokenizer has nothing but its model
    small.folder = tmp_path / "another"
    small.folder.mkdir(), (small.folder / "tokenizer.model").write_bytes(own := before["tokenizer.model"][::-1])
    (new / "tokenizer.json").touch(), (new / "special_tokens_map.json").touch(), small.save_pretrained(new)
    assert {*os.listdir(new)} == {*SAVED, "tokenizer.model", notes} and (new / "tokenizer.model").read_bytes() == own
    ids = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 5}
    assert json.loads((new / "generation_config.json").read_text()) == ids
    before = {file.name: file.read_bytes() for file in new.iterdir()}
    (small.folder / "tokenizer.model").rename(small.folder / "tokenizer.json")  # then what is there stays
    small.save_pretrained(new)
    assert {file.name: file.read_bytes() for file in new.iterdir()} == before
    # whole or not at all, and not while another process does it
    with pytest.raises(KeyboardInterrupt), persimmon.staging(new) as unfinished:
        assert new in unfinished.parents  # not beside it: it may be the mount point of a volume
        refuses("another process is writing", small.save_pretrained, new)
        raise KeyboardInterrupt
    monkeypatch.setattr(torch.Tensor, "cpu", Mock(side_effect=[torch.ones(9)] * 9 + [KeyboardInterrupt] * 2))
    for target in (new, tmp_path / "other"):
        refuses("^$", small.save_pretrained, target, error=KeyboardInterrupt)
    refuses("dtype = 'float64' is none of", copy.deepcopy(small).double().save_pretrained, new)
    assert {file.name: file.read_bytes() for file in new.iterdir()} == before
    assert {*os.listdir(tmp_path)} == {"another", "deep", "link"} and os.listdir(new.parent) == ["new"]


def test_dtype_and_quantized_folders(folders, tmp_path):
    done, load = [], PersimmonForCausalLM.from_pretrained
    model = load(folders["D64"], "bfloat16", quantize="int4", group_size=64, progress=done.append)
    assert done == sorted(done) and done[-1] == 1.0 and not model.training
    model.save_pretrained(tmp_path)
    assert is_saved(model.state_dict(), tmp_path)
    for new, old, asked, expected in (
            (None, None, "auto", "bfloat16"), (None, "float16", "auto", "float16"),
            ("float16", "float32", "auto", "float16"), ("float32", None, torch.float16, "float16")):
        edit(tmp_path / "config.json", dtype=new, torch_dtype=old)
        assert {t.dtype for t in load(tmp_path, asked).state_dict().values()} == {torch.uint8, getattr(torch, expected)}
    refuses("the model is quantized already, in int4", load, tmp_path, quantize="int8")
    assert load(tmp_path, quantize="int4").config.quantization["quantize"] == "int4"  # as it is
    edit(tmp_path / "config.json", dtype=None)
    change_tensors(tmp_path / WHOLE, **{"lm_head.weight": torch.rand(3, 128, 32)})  # codes can't have fractions
    refuses("lm_head.weight as torch.float32: config.json makes it torch.uint8", load, tmp_path)
    change_tensors(tmp_path / WHOLE, **model.double().state_dict())
    refuses("dtype float64 is not supported", load, tmp_path)


def test_folders_that_other_programs_make(folder, small):
    edit(folder / "config.json", eos_token_id=[7, 8], rope_parameters={
        "rope_type": "default", "original_max_position_embeddings": 160, "rope_theta": 25000.0})
    (folder / WHOLE).rename(folder.parent / "1f3a")
    (folder / WHOLE).symlink_to("../1f3a")  # as in the hub's cache
    (folder / "tokenizer.json").write_text("{}")  # which transformers 5 has beside its tokenizer_config.json
    edit(folder / "generation_config.json", eos_token_id=None, do_sample=True)
    model, ids = PersimmonForCausalLM.from_pretrained(folder), random_ids(CONFIG, 1, 9)
    assert torch.equal(model(ids).logits, small(ids).logits) and model.config.eos_token_id == [7, 8]
    free = [s.tokens[0] for s in generate(small, ids, max_new_tokens=20)]
    first, second = list(dict.fromkeys(free))[1:3]
    edit(folder / "generation_config.json", eos_token_id=[second, first, 96])  # counts before config.json's
    (model := PersimmonForCausalLM.from_pretrained(folder)).config.pad_token_id = None
    assert model.generate(ids)[0, 9:].tolist() == free[: free.index(first) + 1]
    assert model.generate(ids.expand(2, 9), temperature=1.0, max_new_tokens=40).shape[0] == 2  # pads with an id
    model.save_pretrained(new := folder.parent / "new")
    assert load_config(new).eos_token_id == [second, first, 96] and (new / "tokenizer.json").read_text() == "{}"


def test_an_edit_that_ties_weights(folder, tmp_path):
    """They are tied after loading, too, with or without a head in the folder."""
    tied = edited(tmp_path, ("self.init_weights(self.lm_head)", "self.lm_head.weight = self.model.embed_tokens.weight"))
    (bare := tied.PersimmonModel.from_pretrained(folder)).save_pretrained(tmp_path / "bare")
    tied.PersimmonForCausalLM.from_pretrained(tmp_path / "bare").save_pretrained(tmp_path / "own")
    for source in (tmp_path / "bare", tmp_path / "own", folder):
        model = tied.PersimmonForCausalLM.from_pretrained(source)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, bare.embed_tokens.weight)


@pytest.mark.parametrize("cls", HEADS)
def test_a_head_that_is_missing(folder, tmp_path, small, cls):
    """It is new, with a warning at the caller's line. A model's own folder has to have it, and no other."""
    head, other = ("lm_head.weight", "score.weight")[:: 1 if cls is PersimmonForCausalLM else -1]
    (bare := PersimmonModel.from_pretrained(folder)).save_pretrained(tmp_path / "bare")
    source = tmp_path / "bare" if head == "lm_head.weight" else folder
    with pytest.warns(UserWarning, match=f"has no .*{head} for a {cls.__name__}: new, random") as said:
        with torch.device("meta"):  # it stands for a GPU
            model = cls.from_pretrained(source, num_labels=50, pad_token_id=7)
        half = cls.from_pretrained(source, "bfloat16", initializer_range=0.5).get_parameter(head)
    assert [warning.filename for warning in said] == [__file__] * 2
    assert all(torch.equal(p, model.model.get_parameter(name)) for name, p in small.model.named_parameters())
    assert {(p.device.type, p.dtype, p.requires_grad) for p in model.parameters()} == {("cpu", torch.float32, True)}
    assert len(new := model.get_parameter(head)) in (50, 97) and 0.015 < new.std() < 0.025 and not model.training
    assert half.dtype == torch.bfloat16 and half.std() > 0.3 and model.config.pad_token_id == 7
    model.save_pretrained(own := tmp_path / "own")
    with warnings.catch_warnings(action="error"):
        assert is_saved(model.state_dict(), own, cls) and is_saved(bare.state_dict(), own, PersimmonModel)
    for change, message in (({other: torch.zeros(9, 48)}, f"own has the tensor {other}, which is not in"),
                            ({head: None}, f"own lacks the tensor {head}")):
        change_tensors(own / WHOLE, **change)
        refuses(message, cls.from_pretrained, own)


@pytest.mark.parametrize("old", ["nothing", "one file", "shards"])
def test_a_killed_save_leaves_a_whole_model(folder, small, old):
    """The old one or the new one, of another shape, wherever it is killed; the next save tidies up."""
    new, found, target = randomize(PersimmonForCausalLM(CONFIGS["D64"])), [], folder.with_name("target")
    if old == "shards":
        shard(folder)
    (folder / "model-of-mine.safetensors").touch()
    for change in itertools.count():
        if old != "nothing":
            shutil.copytree(folder, target)
        if (child := os.fork()) == 0:  # a process that is killed before that change of a folder's entries
            events, count = ("os.rename", "os.remove", "os.rmdir", "os.mkdir"), itertools.count()
            sys.addaudithook(lambda event, _: event in events and next(count) == change and os._exit(9))
            with contextlib.suppress(BaseException):
                new.save_pretrained(target), os._exit(0)
            os._exit(1)
        assert (status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) in (0, 9)
        if status == 0:  # it was not killed any more
            break
        if target.exists():
            shutil.copytree(target, copied := target.with_name("copied"))  # to load would be to tidy up
            found.append(load_config(copied).hidden_size)
            assert is_saved({48: small, 128: new}[found[-1]].state_dict(), copied)
            shutil.rmtree(copied)
        new.save_pretrained(target)
        assert {*os.listdir(target)} == SAVED | ({"model-of-mine.safetensors"} if old != "nothing" else set())
        assert is_saved(new.state_dict(), target)
        assert {*os.listdir(target.parent)} - {"target.unfinished"} == {"model", "target"}
        # killed as soon as `target` was there, it left its lock beside it
        assert old == "nothing" or not target.with_name("target.unfinished").exists()
        assert not any(file.stat().st_size for file in target.with_name("target.unfinished").glob("*"))
        shutil.rmtree(target)
    assert found == sorted(found) and {*found} == ({48, 128} if old != "nothing" else {128})


CORPUS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "été à la plage",
          "how vexingly quick daft zebras jump", "sphinx of black quartz, judge my vow", "To be, or not to be"] * 3
ENDOFTEXT = {"user_defined_symbols": ["|ENDOFTEXT|"]}
STYLES = [{}, ENDOFTEXT, {**ENDOFTEXT, "remove_extra_whitespaces": False},
          {**ENDOFTEXT, "add_dummy_prefix": False, "remove_extra_whitespaces": False},
          {"control_symbols": ["|ENDOFTEXT|"], "normalization_rule_name": "identity"}]


def train_sentencepiece(file: Path, **options) -> sentencepiece.SentencePieceProcessor:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(file.with_suffix("")), vocab_size=330, byte_fallback=True,
        minloglevel=2, hard_vocab_limit=False, **options)
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> list[tuple[Tokenizer, sentencepiece.SentencePieceProcessor, int]]:
    """Ours, the oracle and the id of the end of a text, in each style."""
    files = [tmp_path_factory.mktemp("tokenizer") / "tokenizer.model" for _ in STYLES]
    oracles = [train_sentencepiece(file, **style) for file, style in zip(files, STYLES)]
    ends = [oracles[0].eos_id(), *(oracle.piece_to_id("|ENDOFTEXT|") for oracle in oracles[1:])]
    return list(zip(map(Tokenizer, files), oracles, ends))


def test_tokenizer(tokenizers):
    texts = ["", "  a  b ", "the quick\n日本 🙂 fox "]  # the last one is the longest
    for tokenizer, oracle, end in tokenizers:
        batch = tokenizer(texts, return_tensors="pt")
        assert list(batch) == ["input_ids", "attention_mask"] and {t.dtype for t in batch.values()} == {torch.long}
        assert {t.device.type for t in batch.to("meta").values()} == {"meta"} and type(batch.to("meta")) is type(batch)
        for text, row, mask in zip(texts, *batch.values()):
            ids = [end, *oracle.encode(text)]
            assert tokenizer.encode(text) == ids and tokenizer.encode(text, add_bos=False) == ids[1:]
            for kind in (list, tuple, numpy.array, torch.tensor, partial(torch.tensor, dtype=torch.int16)):
                assert tokenizer.decode(kind(ids)) == oracle.decode(ids[1:])
            assert row[mask == 1].tolist() == ids and mask.sort().values.equal(mask)  # padding on the left
        assert tokenizer(text)["input_ids"].tolist() == [ids] and len(tokenizer) == len(oracle)
        for one in (ids[3], numpy.int64(ids[3]), torch.tensor(ids[3]), torch.tensor(ids[3:4])):
            assert tokenizer.decode(one) == StreamDecoder(tokenizer).push(one) == oracle.decode(ids[3:4])
        whole = oracle.id_to_piece(end) + oracle.decode(ids[1:])
        assert tokenizer.decode(ids * 2, skip_special_tokens=False) == 2 * whole
    assert {(t.shape, t.dtype) for t in tokenizer([]).values()} == {((0,), torch.long)}
    refuses("return_tensors = 'np'", tokenizer, "fox", return_tensors="np")
    refuses("not valid Unicode", tokenizer, "a\udc80")
    refuses("the ids of one text, not of several", tokenizer.decode, torch.tensor([ids]))


# Ids, pieces, and bytes that make a character, or would with one more.
BYTES = [[f"<0x{byte:02X}>" for byte in character.encode()] for character in "é日🙂\ufffd"]
RUNS = [*([i] for i in range(-2, 340)), *(["▁"], ["▁jump"], ["|ENDOFTEXT|"], *BYTES, *(b[:-1] for b in BYTES)) * 30]
tokens = st.lists(st.sampled_from(RUNS), max_size=12).map(lambda runs: [token for run in runs for token in run])


@given(sequence=tokens, prompt=tokens)
@example(sequence=["▁", "▁jump"], prompt=[])
@example(sequence=["▁", "|ENDOFTEXT|", "▁jump"], prompt=[])
@example(sequence=["<0xC3>", "<0xC3>", "▁jump", "<0xE2>", "|ENDOFTEXT|", "<0x82>", "<0xAC>"], prompt=["▁jump"])
@example(sequence=["<0xED>", "<0xA0>", "<0x80>", "<0xF4>", "<0x90>", "<0xC0>", "<0x80>"], prompt=["|ENDOFTEXT|"])
def test_streaming_equals_decoding_the_whole(tokenizers, sequence, prompt):
    for tokenizer, oracle, end in tokenizers:
        new, old = ([i if isinstance(i, int) else oracle.piece_to_id(i) for i in part] for part in (sequence, prompt))
        whole, size, decoder, text = tokenizer.decode(old + new), len(oracle), StreamDecoder(tokenizer), ""
        assert whole == oracle.decode([i if 0 <= i < size else oracle.unk_id() for i in old + new if i != end])
        for n, i in enumerate(old + new, 1):
            text += decoder.push(i)
            assert whole.startswith(text) or not text.isprintable()
            # nothing is held but what is no character, or not one yet
            assert tokenizer.decode((old + new)[:n])[len(text) :].strip("\ufffd") == ""
        assert text + decoder.finish() == whole
        if not (before := tokenizer.decode(old)).endswith("\ufffd"):  # then only what follows the prompt
            decoder = StreamDecoder(tokenizer, old)
            assert before + "".join(map(decoder.push, new)) + decoder.finish() == whole


def test_tokenizer_files_and_chat_prompt(tmp_path):
    file, config = tmp_path / "tokenizer.model", tmp_path / "tokenizer_config.json"
    ids = train_sentencepiece(file, **ENDOFTEXT).encode("|ENDOFTEXT| fox")[1:]
    for text, expected in (("{}", ids), ('{"add_bos_token": true}', ids), ('{"add_bos_token": false}', ids[1:])):
        config.write_text(text)
        assert Tokenizer(tmp_path).encode("fox") == Tokenizer(file).encode("fox") == expected
    assert Tokenizer(tmp_path).encode("fox", add_bos=True) == ids
    config.write_text('{"add_eos_token": true}')
    train_sentencepiece(tmp_path / "none.model", eos_id=-1)
    refuses("tokenizer_config.json asks for add_eos_token", Tokenizer, tmp_path)
    refuses("no file .*nothing", Tokenizer, tmp_path / "nothing", error=FileNotFoundError)
    (tmp_path / "text.model").write_text("no tokenizer")
    refuses("no SentencePiece model: .", Tokenizer, tmp_path / "text.model")  # and why
    refuses(r"none.model has no piece \|ENDOF", Tokenizer, tmp_path / "none.model")
    for content, message in ((b"not a model", "tokenizer.model is cut off"), (LFS, "model is a pointer of Git LFS")):
        file.write_bytes(content)
        refuses(message, Tokenizer, file)
    assert chat_prompt(["a", " b ", "c"]) == "human: a\n\nadept: b\n\nhuman: c\n\nadept:"
    for turns in (["a", "b"], [], "a"):
        refuses(f"ends with a human's turn, not a {type(turns).__name__} of {len(turns)}", chat_prompt, turns)


@pytest.mark.parametrize(("cls", "K", "labels", "changes"), [
    (OfText, 1, torch.tensor([0.5, -1, 2, 0]), {}), (OfText, 3, torch.tensor([2, 0, 1, 1]), {}),
    (OfText, 3, torch.tensor([2, -100, 1, 0]), {"problem_type": "single_label_classification"}),
    *((OfText, 3, torch.eye(4, 3), {"problem_type": p}) for p in (None, "regression", "multi_label_classification")),
    (OfText, 1, torch.eye(4, 1), {"problem_type": "multi_label_classification"}),
    *((OfToken, 6, torch.arange(4 * T).view(4, T) % 6, {f"{part}_dropout": 1.0, "classifier_dropout": own})
      for part, own in (("classifier", 1.0), ("hidden", None), ("hidden", 0.0), ("attention", 0.0)))])
def test_classifiers_are_those_of_transformers(tmp_path, cls, K, labels, changes):
    randomize(cls(replace(CONFIG, num_labels=K, **changes))).save_pretrained(tmp_path)
    theirs = getattr(transformers, cls.__name__).from_pretrained(tmp_path, dtype="float32")
    ours = cls.from_pretrained(tmp_path)
    ids, mask, counted = random_ids(CONFIG, rows=4), torch.ones(4, T, dtype=torch.long), slice(None)
    # padded on the left, on the right, not at all, and everywhere, as ids say and not the mask
    ids[0, :9], mask[0, :9], ids[1, 50:], mask[1, 50:], ids[3, 1:] = 5, 0, 5, 0, 5
    if cls is OfToken:
        counted, labels = mask == 1, labels.masked_fill(mask == 0, -100)
    a, b = (model(ids, mask, labels=labels) for model in (ours, theirs))
    assert close(a.logits[counted], b.logits[counted]) and close(a.loss, b.loss)
    a.loss.backward(), b.loss.backward()
    assert all(close(p.grad, theirs.get_parameter(name).grad) for name, p in ours.named_parameters())
    if cls is OfText:  # in another dtype, and as a column
        is_integer = labels.dtype == torch.long or "multi" in str(changes)  # where all are 0.0 or 1.0
        labels = labels.view(4, -1).to(torch.int if is_integer else torch.double)
        assert close(ours(ids, mask, labels=labels).loss, b.loss)
    embeds, places = torch.randn(4, T, 48), 2 * torch.arange(T)[None]  # not shifted: RoPE is relative
    assert close(ours(inputs_embeds=embeds).logits, theirs(inputs_embeds=embeds).logits)
    assert close(ours(ids, None, places).logits, theirs(ids, None, places.expand(4, T)).logits)
    kept, dropped = ours(ids).logits, ours.train()(ids).logits
    assert close(dropped, theirs.train()(ids).logits)  # a dropout of 1 is not random
    assert close(dropped, kept, 0.1) == (cls is OfText)
    refuses("float16 .* use bfloat16", ours.half().train(), ids, labels=labels)
    assert ours.eval()(ids, labels=labels).loss.dtype == torch.float32 and ours(ids).loss is None
    ours.config.pad_token_id = None
    if cls is OfText:
        ours(ids[:1])
        refuses("to find where 4 texts end, config.json needs a pad_token_id", ours, ids)


def test_persimmon_py_alone_needs_torch_only(tmp_path, monkeypatch):
    """And importing it does nothing but to define, and to enter engines and quantizers."""
    body = ast.parse(SOURCE).body[1:]
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {getattr(node, "module", node.names[0].name).split(".")[0] for node in imports}
    assert modules <= {"torch", *sys.stdlib_module_names}
    code = [ast.unparse(n) for n in body if n not in imports and not isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    names = "ENGINES: ARCHITECTURE DTYPES CONFIG_TYPES CONFIG_RANGES TOKENIZER_FILES SAFETENSORS_DTYPES QUANTIZERS: " \
        "__all__ ENGINES['cpu'] __all__ QUANTIZERS['int8'] ENGINES['cuda'] __all__"
    assert " ".join(line.split()[0] for line in code) == names and all(code[n].endswith("] = {}") for n in (0, 7))
    for name in ("numpy", "safetensors", "sentencepiece", "triton", "transformers", "sample", "convert"):
        monkeypatch.setitem(sys.modules, name, None)  # it cannot be imported
    with warnings.catch_warnings(action="error"):
        before = {**os.environ}, warnings.filters[:], torch.get_num_threads(), torch.get_rng_state().tolist()
        alone = edited(tmp_path)
        assert ({**os.environ}, warnings.filters, torch.get_num_threads(), torch.get_rng_state().tolist()) == before
        model = alone.PersimmonForCausalLM(alone.PersimmonConfig(**asdict(CONFIG))).eval()
        model.config.use_cache = True  # as transformers' Trainer has it
        assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5).shape == (1, 8)
    names = "KVCache PersimmonConfig PersimmonModel StreamDecoder Tokenizer chat_prompt generate load_config engine_for"
    assert {*names.split(), *(kind.__name__ for kind in HEADS)} <= {*alone.__all__} <= vars(alone).keys()
    assert (model.to("meta").device.type, model.bfloat16().model.dtype) == ("meta", torch.bfloat16)


def test_tiny_is_a_persimmon():
    config, tokenizer = load_config(TINY), Tokenizer(TINY)
    assert (config.head_dim, config.rotary_dim, config.rope_theta, config.qk_layernorm) == (64, 32, 25000.0, True)
    assert config.intermediate_size == 4 * config.hidden_size and config.vocab_size == len(tokenizer)
    assert config.bos_token_id == config.eos_token_id == tokenizer.processor.piece_to_id("|ENDOFTEXT|")
    assert tokenizer.decode(tokenizer.encode(text := " a  b\t\n\n c\r\n e\u0301 ﬁ ① Ａ 日本 🙂\u200d\u3000.\x7f ")) == text
    ids = tokenizer(text := "ROMEO:\nWhat light through yonder window breaks?\n")["input_ids"]
    ours = PersimmonForCausalLM.from_pretrained(TINY, dtype="float32")(ids, labels=ids)
    assert close(ours.logits, oracle(TINY)(ids).logits)
    assert ours.loss * (ids.shape[1] - 1) < 2.0 * len(text)  # nats; noise has log(1024) a token, about 3 a character


@pytest.mark.skipif("PERSIMMON_8B_CHAT" not in os.environ, reason="PERSIMMON_8B_CHAT names no folder with its weights")
def test_the_published_answer_of_the_real_chat_model():
    """From transformers' own integration test of adept/persimmon-8b-chat."""
    folder = os.environ["PERSIMMON_8B_CHAT"]
    model, tokenizer = PersimmonForCausalLM.from_pretrained(folder, "bfloat16"), Tokenizer(folder)
    ids = tokenizer(chat_prompt(["Simply put, the theory of relativity states that?"]))["input_ids"]
    assert tokenizer.decode(model.generate(ids, max_new_tokens=60)[0, ids.shape[1] :]).strip() == (
        "The theory of relativity states that the laws of physics are the same for all observers, "
        "regardless of their relative motion.")


# === Part III. Faster ================================================================================================
def test_what_engines_ask():
    layer, is_plain = torch.nn.Linear(2, 2).eval(), lambda m: is_unmodified(m, torch.nn.Linear)
    with pytest.raises(KeyboardInterrupt), replaced_forward({layer: lambda x: x + 1}):
        assert layer(3) == 4 and not is_plain(layer)
        raise KeyboardInterrupt
    layer.register_full_backward_hook(lambda *_: None)  # not in a pass without gradients
    assert is_plain(layer) and not is_unmodified(layer, torch.nn.Module) and not is_plain(layer.train())
    exact, noise = torch.randn(2, 1000)
    plain, factors = exact + 0.01 * noise, (0.01, -0.019, 0.021, math.nan)
    assert [is_as_exact(exact + factor * noise, plain, exact) for factor in factors] == [True, True, False, False]
    assert [is_as_exact(exact + error, exact, exact) for error in (1e-6, 1e-3)] == [True, False]
    assert is_as_exact(exact.bfloat16(), exact, exact) and not is_as_exact(exact.bfloat16() * 1.02, exact, exact)
    assert all(persimmon.cpu_has(name) == getattr(torch.cpu, f"_is_{name}_supported")() for name in PROCESSORS["AMX"])
    assert persimmon.cpu_has("nonsense") is False and 1e8 < persimmon.available_memory(torch.device("cpu")) < 1e14
    before = persimmon.fingerprints([weight := torch.rand(99, 99)])
    weight[5, 5] = 2  # which is not in the sample
    assert persimmon.fingerprints([weight]) != before
    with torch.inference_mode():  # what is made there has no version
        assert persimmon.fingerprints([weight := torch.rand(9, 9)]) != persimmon.fingerprints([weight.neg_()])


# === Part III a. CPU =================================================================================================
@pytest.fixture
def reads(monkeypatch) -> Counter:
    """Counts of operators, while every matrix counts as large."""
    counts, functional = Counter(), torch.nn.functional
    for name, owner, operator in (
            ("sums", functional, "embedding_bag"), ("linear", functional, "linear"), ("mv", torch, "mv"),
            ("dots", torch.ops.aten, "_embedding_bag_per_sample_weights_backward"), ("KVCache", KVCache, "attend"),
            ("blocks", persimmon, "float32_linear")):
        monkeypatch.setattr(owner, operator, lambda *args, _name=name, _function=getattr(owner, operator), **options:
                            counts.update([_name]) or _function(*args, **options))
    use_cpu_engine(monkeypatch)
    monkeypatch.setattr(persimmon, "is_unedited", lambda *functions: True)  # although KVCache.attend counts
    return counts


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_cpu_linear(monkeypatch, reads, processor, dtype, tolerance):
    """Which operator is used for how many rows, on which processor."""
    use_cpu_engine(monkeypatch, processor)
    one, few, more, many = {
        ("AMX", torch.bfloat16): ("mv", "mm", "mm", "linear"), ("Zen 4", torch.float32): ("dots", *["linear"] * 3),
        ("Zen 4", torch.bfloat16): ("dots", *["linear"] * 3),
        **dict.fromkeys([("Zen 4", torch.float16), ("laptop", torch.float16)], ("linear",) * 2 + ("blocks",) * 2),
        ("laptop", torch.bfloat16): ("mv", "linear", "blocks", "blocks")}.get((processor, dtype), ["linear"] * 4)
    for bias, (operator, *shape) in itertools.product((True, False), (
            (one, 1, 1, 24), (one, 24), (few, 0, 24), (few, 2, 1, 24), (few, 1, 15, 24), (more, 1, 16, 24),
            (more, 32, 24), (many, 1, 33, 24))):
        layer, x = torch.nn.Linear(24, 600, bias).to(dtype), torch.randn(shape).to(dtype)  # three blocks of 256
        reads.clear()
        with torch.no_grad():
            y = cpu_linear(layer, None, x)
            assert reads == Counter({operator: operator != "mm"})  # a product of matrices is not counted
            assert close(y, layer(x), tolerance) if len(x) else y.shape == (0, 600)
            exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
            assert y.is_contiguous() and (operator != "blocks" or (y == exact.to(dtype)).float().mean() > 0.999)
    reads.clear()
    for rows in (x[0, :1], x):
        cpu_linear(layer, None, rows).sum().backward()  # with gradients, or with a transposed weight
        with torch.no_grad():
            layer.weight.data = layer.weight.t().contiguous().t()
            cpu_linear(layer, None, rows)
            layer.weight.data = layer.weight.contiguous()
    assert reads == {"linear": 4}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("rows, density", [(0, 0.0), (1, 0.0), (1, 1.0), (3, 0.3), (3, 0.9), (16, 0.05), (17, 0.05)])
def test_cpu_linear_with_a_table(reads, rows, density, dtype, tolerance):
    """A row of the table that only zeros multiply is not read: here it holds NaN."""
    layer = torch.nn.Linear(397, 24, bias=rows > 1).to(dtype)  # 397 is a number that no number of bags divides
    x = ((torch.rand(rows, 1, 397) + 0.5) * (torch.rand(rows, 1, 397) < density)).to(dtype)
    x[1:2] = 0
    table = layer.weight.detach().t().where((x != 0).any(0).T, math.nan).contiguous()
    table = persimmon.Table(table, layer.weight, ())
    cpu_linear(layer, table, x)  # gradients are enabled
    assert reads["sums"] == 0
    with torch.no_grad():
        y = cpu_linear(layer, table, x)
        expected = layer.double()(x.double())
    assert y.dtype == dtype and (y - expected).norm() <= tolerance * (expected.norm() + 1e-3)
    assert reads["sums"] == (rows <= 16 and x.count_nonzero() <= 1.5 * 397)


@pytest.mark.parametrize("N, S, T", [
    (20, 1, 1), (20, 8, 1), (20, 9, 1), (20, 20, 1), (20, 24, 1), (7, 7, 1), (8, 8, 1), (20, 9, 3), (20, 9, 9)])
def test_transposed_kv_cache(reads, N, S, T):
    """What has a mask for each head or of floats is left to KVCache."""
    causal, itself = torch.ones(T, S).tril(S - T) > 0, torch.eye(S)[S - T :] > 0
    for mask in (causal[None, None] if 1 < T < S else None, torch.randn(1, 1, T, S),  # added to the scores
                 *((torch.rand(2, heads, T, S) < 0.5) & causal | itself for heads in (1, 3))):
        cache, (k, v) = new_cache(CONFIG, 2, N, TransposedKVCache), torch.randn(2, 2, 3, S, 16)
        keys, values, q = cache.keys[1], cache.values[1], torch.randn(3, 2, T, 16).transpose(0, 1)
        assert keys.shape == values.shape == (2, 3, {20: 24}.get(N, N), 16)  # blocks of 8; a shorter cache is one
        keys[:, :, : S - T], values[:, :, : S - T] = k[:, :, :-T], v[:, :, :-T]
        cache.crop(S - T)
        reads.clear()
        assert close(cache.attend(1, q, k[:, :, -T:], v[:, :, -T:], mask), attention(q, k, v, mask), 1e-6)
        is_plain = mask is not None and (mask.shape[1] == 3 or mask.is_floating_point())
        assert reads == ({"KVCache": 1} if is_plain else {"sums": 2} if T == 1 else {})
        assert torch.equal(keys[:, :, :S], k) and torch.equal(values[:, :, :S], v)
        assert keys.mT.is_contiguous() and keys[:, :, S:].isnan().all() and cache.keys[[0, 2, 3]].isnan().all()
        for n in (0, 3):  # as a part of wider ones; with more room, which is no longer a number of blocks
            wide = [torch.cat((x, x[..., :n, :], x), 3) for x in (cache.keys, cache.values)]
            cache.keys, cache.values = (x[..., : cache.keys.shape[3] + n, :] for x in wide)
            cache.crop(S - T)
            assert close(cache.attend(1, q, k[:, :, -T:], v[:, :, -T:], mask), attention(q, k, v, mask), 1e-6)
    cache, k, v = new_cache(replace(CONFIG, hidden_size=16, num_attention_heads=1), 2, N, TransposedKVCache), *(
        x[:, :1, :T] for x in (k, v))
    assert close(cache.attend(0, q, k, v, None), attention(q, k, v, None), 1e-6)  # of one head, for all of q's


@pytest.mark.parametrize("processor", PROCESSORS)
def test_cpu_engine_makes_a_cache(monkeypatch, processor):
    """Of transposed keys in 16 bit, from 4096 positions times heads on; not for bfloat16 on AMX, where SDPA is fast."""
    monkeypatch.setattr(persimmon, "cpu_has", lambda feature: feature in PROCESSORS[processor])
    model = PersimmonForCausalLM(replace(CONFIGS["D64"])).eval()  # 2 heads
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        engine, fits = CpuEngine(model.to(dtype)), dtype.itemsize == 2 and (processor, dtype) != ("AMX", torch.bfloat16)
        for N in (2047, 2048, 2049):
            cache = engine.make_cache(3, N)
            assert type(cache) is (TransposedKVCache if fits and N > 2047 else KVCache)
            assert cache.keys.dtype == dtype and cache.keys.shape[3] >= N
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *args: args[2])
        assert type(CpuEngine(model.half()).make_cache(1, 2500)) is KVCache
    assert type(CpuEngine(model).make_cache(1, 2500)) is TransposedKVCache
    monkeypatch.setattr(persimmon, "KVCache", type("Own", (KVCache,), {}))
    assert type(CpuEngine(model.half()).make_cache(1, 2500)) is persimmon.KVCache


def test_code_that_the_cpu_engine_restates(tmp_path):
    """Whatever its comments and layout: any change of the code is noticed, once, and then KVCache attends."""
    layout = [("mask, a single position", "maske, eine Position"), ("Store a layer", "Speichere einer Schicht"),
              ("return attention(q, k, v, mask)\n\n", "return attention(\n            q, k, v, mask)  # !\n\n")]
    for edits, is_edited in ((layout, False), ([("q.shape[2] > 1 else", "q.shape[2] > 2 else")], True),
                             ([("k, v = self.keys[layer, :, :, :S]", "k, v = 2 * self.keys[layer, :, :, :S]")], True),
                             ([("self.length = 0\n", "self.length = 1 - 1\n")], True),
                             ([(":, :S], self", ":S, :], self")], True), ([(":, :S], self", ":, S:], self")], True),
                             ([("return attention(q, k, v, mask)\n\n", """# \"""An edit, no text:
        v = v * 2
        # \"""
        return attention(q, k, v, mask)\n\n""")], True)):
        module = edited(tmp_path, *edits)
        model = small_model(set_processor(module, "Zen 4"), 16).bfloat16()
        with warnings.catch_warnings(record=True, action="always") as caught:
            kinds = {type(module.CpuEngine(model).make_cache(1, N)) for N in (256, 300)}
        assert kinds == {module.KVCache if is_edited else module.TransposedKVCache}, edits
        assert [str(w.message)[:29] for w in caught] == ["TransposedKVCache is not used"] * is_edited, edits
    unedited = attention.__code__, KVCache.__init__.__code__, KVCache.attend.__code__
    assert persimmon.is_unedited(*unedited)
    with pytest.warns(match="checksum is None"):  # not to be copied: functions without a source would have it too
        assert not persimmon.is_unedited((lambda *args: 0).__code__, *unedited[1:])


@pytest.mark.parametrize("function", [
    torch.relu, lambda: 0, partial(attention), wraps(attention)(lambda *args: 0), torch.compile(attention),
    type("Unhashable", (), {"__hash__": None, "__call__": staticmethod(attention)})()])
def test_attention_that_was_replaced(monkeypatch, function):
    """Whatever it is, and with whatever source."""
    model = PersimmonForCausalLM(replace(CONFIGS["D64"])).eval().half()
    persimmon.is_unedited.cache_clear()
    assert type(CpuEngine(model).make_cache(1, 2500)) is TransposedKVCache
    monkeypatch.setattr(persimmon, "attention", function)
    with pytest.warns(match="not used"):
        assert type(CpuEngine(model).make_cache(1, 2500)) is KVCache


def test_source_that_has_changed_since(tmp_path):
    """Also to what Python cannot tokenize: then KVCache attends."""
    module = edited(tmp_path)
    model = small_model(set_processor(module, "Zen 4"), 16).bfloat16()
    Path(module.__file__).write_text(SOURCE.replace("def attention(", "def attention(((("))
    with pytest.warns(match="checksum is None"):
        assert type(module.CpuEngine(model).make_cache(1, 300)) is module.KVCache


def test_torch_compile_of_the_transposed_cache():
    """In one graph: what decides about it is not traced."""
    cache = TransposedKVCache(CONFIGS["D64"], 1, 64, torch.float32, "cpu")
    q = torch.randn(1, 2, 1, 64)
    attend = torch.compile(lambda: cache.attend(0, q, q, q, None), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert close(attend(), q, 1e-6)


def test_cpu_engine_uses_the_operators(reads, small):
    """In 4 layers of 4 matrices, and the head, which reads one row of a prompt. Outside of the engine, all is plain."""
    engine, ids = engine_for(small.bfloat16()), random_ids(CONFIG, rows=1, length=11)
    cache = engine.make_cache(1, 20)
    for run, part, expected in ((engine.prefill, ids[:, :9], {"linear": 16, "dots": 1}),
                                (engine.decode, ids[:, 9:10], {"sums": 12, "dots": 13}),
                                (lambda ids, *_: small(ids), ids, {"linear": 17})):
        reads.clear()
        with torch.no_grad():
            run(part, None, cache)
        assert reads == expected


# === Part III b. int8 and int4 =======================================================================================
each_format = pytest.mark.parametrize("cls, group_size", [
    (Int8Linear, 128), (Int8SparseLinear, 128), (Int4Linear, 32), (Int4Linear, 64), (Int4Linear, 128)])


def dequantized(layer: QuantizedLinear) -> torch.Tensor:
    """W of a quantized layer, (O, C) in float64, from what is stored, by the format's description."""
    weight = layer.weight.double()
    if isinstance(layer, Int8Linear):
        return weight * layer.scale.double()[:, None]
    if isinstance(layer, Int8SparseLinear):
        scale, offset = layer.weight[:, -8:].flatten().view(torch.float32).double().view(-1, 2, 1).unbind(1)
        return (scale * weight[:, :-8] + offset).T
    codes = torch.cat((weight % 16, weight // 16), dim=2).mT.flatten(0, 1)  # (O rounded up, C)
    scale, offset = layer.scale.double().repeat_interleave(layer.group_size, dim=0).permute(2, 1, 0)
    return (scale * (codes - 8) + offset)[: layer.out_features]


@torch.no_grad()
def relative_error(layer: QuantizedLinear, x: torch.Tensor) -> float:
    y, expected = layer(x), x.double() @ dequantized(layer).T + layer.bias.double()
    assert y.shape == expected.shape and y.dtype == x.dtype
    return ((y.double() - expected).norm() / expected.norm()).item()


@each_format
@pytest.mark.parametrize("dtype, groups, tolerance", [
    (torch.float32, 130, 1e-5), (torch.bfloat16, 3, 1e-2), (torch.float16, 3, 2e-3)])
def test_quantized_layers(cls, group_size, dtype, groups, tolerance):
    """Of 130 groups of 128 inputs, 64 outputs are dequantized at a time. Sums are large, and float16 ends at 65504."""
    linear, density = torch.nn.Linear(C := groups * group_size, 130).to(dtype), 0.3 if cls is Int8SparseLinear else 1.0
    linear.weight.data.normal_().abs_()
    limit = {Int8Linear: 0.0095 if groups > 3 else 0.0074, Int8SparseLinear: 0.0035}.get(cls)
    limit = limit or {32: 0.0415, 64: 0.0475, 128: 0.052}[group_size]
    W = dequantized(layer := cls(linear, group_size))
    assert (W - linear.weight).norm() < limit * linear.weight.double().norm()
    for rows in (1, 3, 70):
        x = 60 / groups * torch.rand(rows, 1, C + 3) * (torch.rand(rows, 1, C + 3) < density)
        x, gradient = x.to(dtype)[..., 3:], torch.randn(rows, 1, 130).to(dtype)  # x is neither contiguous nor aligned
        assert relative_error(layer, x) < tolerance
        layer(x.requires_grad_()).backward(gradient)
        assert (x.grad - gradient.double() @ W).norm() < tolerance * x.grad.norm()
        if torch.cuda.is_available() and dtype == torch.bfloat16:
            assert relative_error(twin := copy.deepcopy(layer).cuda(), x.cuda()) < tolerance
            assert (not twin.packed) == (cls is not Int4Linear or rows > 64)
    empty = cls(linear.to("meta"), group_size).state_dict()
    assert all((t.shape, t.dtype) == (empty[name].shape, empty[name].dtype) for name, t in layer.state_dict().items())
    assert layer(x[:0]).shape == (0, 1, 130) and layer(x[0, 0]).shape == (130,)
    assert f"(in_features={C}, out_features=130, bias=True)" in repr(layer)
    odd = torch.nn.Linear(256, 70).to(dtype)  # rows of one sign, zeros by row and by column, a group of equal weights
    odd.weight.data[7].abs_(), odd.weight.data[8].abs_().neg_()
    odd.weight.data[3], odd.weight.data[:, 5], odd.weight.data[66, 128:] = 0, 0, 0.75
    assert (difference := dequantized(cls(odd, group_size)) - odd.weight).abs().max() < 0.01
    assert (difference[[3, 66], 128:] if cls is Int4Linear else difference[:, 5]).count_nonzero() == 0  # are exact


@pytest.mark.parametrize("cls, operator, rows, processor", [
    (Int8Linear, "_weight_int8pack_mm", 16, "Zen 4"), (Int8Linear, "_weight_int8pack_mm", 64, "laptop"),
    (Int4Linear, "_weight_int4pack_mm_for_cpu", 64, "Zen 4"),
    (Int8SparseLinear, "embedding_bag_byte_rowwise_offsets", 64, "Zen 4")])
def test_quantized_layers_use_the_kernel_or_go_without(monkeypatch, cls, operator, rows, processor):
    """Not for many rows or nonzeros, other dtypes, gradients or torch.compile; and where PyTorch has it no more."""
    use_cpu_engine(monkeypatch, processor)
    layer, is_sparse = cls(torch.nn.Linear(256, 64).bfloat16(), 64), cls is Int8SparseLinear
    namespace = torch.ops.quantized if is_sparse else torch.ops.aten
    monkeypatch.setattr(namespace, operator, kernel := Mock(side_effect=getattr(namespace, operator)))
    few, dense = torch.zeros(rows + 1, 256).bfloat16(), torch.ones(8, 256).bfloat16()  # 8 * 256 nonzeros
    few[:rows, :12] = torch.rand(rows, 12)  # 3 * 256 at most
    for x, is_used in ((few[:-1], True), (few, False), (dense, not is_sparse), (few[:3].float(), is_sparse),
                       (few[:3].half(), is_sparse)):  # for which the kernels of dense weights are not vectorized
        kernel.reset_mock()
        assert relative_error(layer, x) < 0.01 and kernel.call_count == is_used
    kernel.reset_mock()
    layer(few[:3])  # with gradients
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match=r"this PyTorch has no \w+_2"):
        patch.setattr(persimmon, "private_operator", lambda operators, name, get=persimmon.private_operator:
                      get(operators, name + "_2"))
        assert relative_error(layer, few[:3]) < 0.01
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert relative_error(layer, few[:3]) < 0.01 and not kernel.called


@pytest.mark.parametrize("cls", [Int8Linear, Int4Linear, Int8SparseLinear])
def test_quantized_layers_on_a_laptop(monkeypatch, cls):
    """Many rows are multiplied in float32; not with gradients, for which W would be kept, nor compiled or exported."""
    use_cpu_engine(monkeypatch, "laptop")
    layer, x, dtypes = cls(torch.nn.Linear(256, 64).bfloat16(), 64), torch.rand(1, 70, 256).bfloat16(), []
    with monkeypatch.context() as patch:
        patch.setattr(cls, "dequantize", lambda layer, *args, get=cls.dequantize: dtypes.append(args[-1]) or
                      get(layer, *args))
        assert relative_error(layer, x) < 0.01
        layer(x)
    assert dtypes == [torch.float32, torch.bfloat16]
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    exported = torch.export.export(layer, (x,), dynamic_shapes=({1: torch.export.Dim("T", min=2, max=99)},)).module()
    with torch.no_grad():
        for n in (70, 9, 20):
            assert close(compiled(x[:, :n]), layer(x[:, :n]), 0.05) and close(exported(x[:, :n]), layer(x[:, :n]), 0.05)


def test_int8_kernel_gets_what_it_can_read(monkeypatch):
    """It reads 16 codes at once: at other addresses it crashes, with other widths it multiplies what is beyond."""
    def strict(x, weight, scale, kernel=torch.ops.aten._weight_int8pack_mm):
        assert x.shape[1] % 16 == x.data_ptr() % 32 == weight.data_ptr() % 16 == 0 and x.is_contiguous()
        return kernel(x, weight, scale)

    monkeypatch.setattr(torch.ops.aten, "_weight_int8pack_mm", strict)
    for C, offset in itertools.product((40, 48), (0, 8)):
        layer, x = Int8Linear(torch.nn.Linear(C, 64).bfloat16(), 128), torch.rand(3, C + 3).bfloat16()
        weight = torch.empty(64 * C + offset, dtype=torch.int8)[offset:].view(64, C).copy_(layer.weight)
        layer.load_state_dict({**layer.state_dict(), "weight": weight}, assign=True)
        assert max(relative_error(layer, x[:, :C]), relative_error(layer, x.flatten()[1 : C + 1])) < 0.01
        assert bool(layer.packed) == (C == 48 and offset == 8) and layer.weight.data_ptr() == weight.data_ptr()
    load = lambda scale, **how: layer.load_state_dict({**layer.state_dict(), "scale": scale}, **how)  # noqa: E731
    for change in (lambda: load(torch.ones(64), assign=True), lambda: load(torch.ones(64) * 2, assign=True),
                   lambda: layer.scale.neg_(), lambda: load(torch.zeros(64))):
        layer.packed_copy("x", layer.scale, layer.scale.clone), change()
        assert torch.equal(layer.packed_copy("x", layer.scale, layer.scale.clone), layer.scale)
    with torch.inference_mode():  # where tensors have no version
        assert relative_error(Int4Linear(torch.nn.Linear(64, 64).bfloat16(), 64), torch.rand(2, 64).bfloat16()) < 0.01
    for change in (copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), torch.nn.Module.float,
                   lambda layer: layer.load_state_dict(layer.state_dict()) and layer, lambda layer: layer.to("meta")):
        layer.packed_copy("x", layer.scale, lambda: torch.zeros(1))
        assert layer.packed and list(layer.state_dict()) == ["bias", "weight", "scale"] and not change(layer).packed


@pytest.mark.parametrize("group_size, tiles", [(32, 2), (64, 4), (128, 8)])
def test_int4_for_other_processors(monkeypatch, group_size, tiles):
    """For CUDA as PyTorch's packing reads it, by its source: bytes (O, C/2), the even input in the high half."""
    C, operator = 3 * group_size, Mock(return_value="packed")
    layer = Int4Linear(torch.nn.Linear(C, 100).bfloat16(), group_size)
    assert layer.pack(operator, is_cuda=True) == "packed"
    (data, given), _ = operator.call_args
    high, low = (layer.codes(0, 128).T + 8).byte().unflatten(1, (-1, 2)).unbind(2)
    assert given == tiles and data.dtype == torch.uint8 and data.is_contiguous() and torch.equal(data, high * 16 + low)
    own = layer.pack(torch.ops.aten._convert_weight_to_int4pack_for_cpu, is_cuda=False)
    assert not torch.cpu._is_avx512_supported() or own.data_ptr() == layer.weight.data_ptr()  # it is no copy
    operator.side_effect = lambda codes, _: (codes[:, ::2] << 4 | codes[:, 1::2]).byte()  # not in AVX-512's order
    assert torch.equal(layer.pack(operator, is_cuda=False), data)
    operator.side_effect = lambda codes, _: (codes[1::2] << 4 | codes[::2]).byte().unflatten(0, (-1, 32)).mT.reshape(
        len(codes), -1)  # AVX-512's, but with the outputs in pairs
    assert not torch.equal(layer.pack(operator, is_cuda=False), own)
    assert operator.call_args[0][0].is_contiguous() and operator.call_args[0][0].dtype == torch.int32
    monkeypatch.setattr(layer, "small_batch_matmul", matmul := Mock(return_value=None), raising=False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    # one token a row; for a single row not beside codes_kernel, whose copy of the weight is enough
    cases = (1, 1, {}, 1), (0, 1, {}, 0), (1, 1, {"codes": 0}, 0), (2, 1, {"codes": 0}, 1), (1, 2, {}, 0)
    for has_gradients, (B, T, packed, calls) in itertools.product((False, True), cases):
        layer.packed = packed
        matmul.reset_mock()
        with torch.set_grad_enabled(has_gradients):
            layer(torch.ones(B, T, C).bfloat16())
        assert matmul.call_count == (calls and not has_gradients), (B, T, packed)


@each_format
def test_codes_by_output(cls, group_size):
    """What CUDA's kernel multiplies gives the weights back; it is made once, and a captured step depends on it."""
    layer = cls(torch.nn.Linear(256, 8200).bfloat16(), group_size).eval()
    if cls is not Int8SparseLinear:
        layer.packed = {"matmul": None} if cls is Int4Linear else {}  # a copy that is not needed beside codes
        packed, scale, offset, size = layer.codes_by_output
        codes = torch.cat((packed & 15, packed & -16), dim=1) if cls is Int4Linear else packed
        W = codes.unflatten(1, (-1, size)) * scale.double().reshape(-1, 8200).T[..., None]
        W = W + offset.T[..., None] if cls is Int4Linear else W
        assert (W.flatten(1) - dequantized(layer)).abs().max() < 1e-6
        assert packed.is_contiguous() and layer.codes_by_output[0] is packed and "matmul" not in layer.packed
    engine, cache = CudaEngine(None), new_cache(CONFIG, 1, 9)
    engine.modules = engine.quantized_linears = [layer]
    changes = ("", "weight.bitwise_not_()", "scale.data.neg_()", "scale = layer.scale.clone()")
    for change in changes[: 4 if cls is Int4Linear else 1]:
        assert cls is Int8SparseLinear or layer.codes_by_output
        key = engine.graph_key(None, cache)
        exec(f"layer.{change}" if change else "")
        engine.forget_tables([layer])
        assert len(layer.packed) == 2 * (cls is Int4Linear and not change)
        assert (engine.graph_key(None, cache) != key) == bool(change)
    if cls is Int4Linear:
        scale, layer.scale = layer.codes_by_output[1], 2 * layer.scale
        assert torch.equal(layer.codes_by_output[1], 2 * scale)


@pytest.mark.parametrize("kind, group_size", [("int8", 128), ("int4", 32), ("int4", 128)])
def test_quantize_model(folders, tmp_path, kind, group_size):
    """Logits are those of a model with the same weights dequantized, for prompts and single tokens; through folders."""
    ids, fractions, quantization = random_ids(CONFIGS["D64"]), [], {"quantize": kind, "group_size": group_size}
    plain, model, loaded = (PersimmonForCausalLM.from_pretrained(folders["D64"], **o) for o in ({}, {}, quantization))
    persimmon.QUANTIZERS[kind](model, kind, group_size, fractions.append)
    assert len(fractions) == 13 and fractions == sorted(fractions) and fractions[-1] == 1.0
    assert not any(module.training for module in model.modules())
    assert model.config == model.model.config == loaded.config == replace(plain.config, quantization=quantization)
    for name, linear in plain.named_modules():
        if isinstance(linear, torch.nn.Linear):
            cls = Int8SparseLinear if "4h_to_h" in name else {"int8": Int8Linear, "int4": Int4Linear}[kind]
            assert type(layer := model.get_submodule(name)) is cls
            linear.weight.data = dequantized(layer).float()
    cache = KVCache(model.config, B, T, torch.float32, "cpu")
    with torch.no_grad():
        expected, one_by_one = plain(ids).logits, [model(x, cache=cache).logits for x in ids.split(1, dim=1)]
        assert close(model(ids).logits, expected) and close(torch.cat(one_by_one, dim=1), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(close(model(ids[:, :n]).logits.float(), expected[:, :n], 0.1) for n in (1, T))
    model.save_pretrained(tmp_path)
    assert is_saved(loaded.state_dict(), tmp_path)
    model.model.save_pretrained(tmp_path / "inner")  # a model in its own right
    for folder in (tmp_path, tmp_path / "inner"):
        assert torch.equal(PersimmonModel.from_pretrained(folder)(ids)[0], model.model(ids)[0])
    with pytest.warns(match="has no score.weight"):
        assert OfText.from_pretrained(tmp_path).score.weight.std() > 0
    refuses("inner lacks the tensor lm_head", PersimmonForCausalLM.from_pretrained, tmp_path / "inner")  # in few bits


@each_format
def test_a_matrix_of_several_parts(cls, group_size):
    """They lie one behind the other."""
    linear, fractions = torch.nn.Linear(*((4200, 128) if cls is Int8SparseLinear else (128, 4200))), []
    error = dequantized(cls(linear, group_size, fractions.append)) - linear.weight
    assert error.norm() < (0.12 if cls is Int4Linear else 0.01) * linear.weight.norm() and fractions == [0.5, 1.0]


def test_quantizing_while_loading_frees_what_it_replaces(folders, monkeypatch):
    def checked(model, *args):
        weights = [StorageWeakRef(m.weight.untyped_storage()) for m in model.modules() if type(m) is torch.nn.Linear]
        quantize_model(model, *args)
        assert len(weights) == 13 and all(weight.expired() for weight in weights)

    monkeypatch.setitem(persimmon.QUANTIZERS, "int8", checked)
    PersimmonForCausalLM.from_pretrained(folders["D64"], "bfloat16", quantize="int8")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_shared_module_is_quantized_once(kind):
    model, ids = randomize(PersimmonForCausalLM(CONFIGS["D64"])).eval(), random_ids(CONFIGS["D64"])
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    before = model(ids).logits
    assert distance(quantize_model(model, kind, 32)(ids).logits, before) < (0.1 if kind == "int8" else 0.5)


def test_quantize_model_refuses():
    lm, model = PersimmonForCausalLM(CONFIG), OfToken(CONFIG)
    done = quantize_model(copy.deepcopy(model), "int8")
    assert type(done.score) is torch.nn.Linear
    lm.lm_head.weight.data[0, 0] = math.nan
    hooked, other, own = copy.deepcopy(lm), copy.deepcopy(lm), copy.deepcopy(model)
    hooked.lm_head.register_forward_hook(lambda module, x, y: 2 * y)
    other.lm_head.register_forward_pre_hook(lambda module, x: (2 * x[0],))
    own.model.layers[0].mlp.dense_h_to_4h.forward = torch.relu
    for part, arguments, message in (
            (model, ["int3"], "quantize = 'int3' is neither int8 nor int4"),
            (model, ["int4", 16], "group_size = 16 is none of 32, 64 and 128"),
            (model, ["int4", 128.0], "group_size = 128.0 is none of 32, 64 and 128"),
            (model, ["int4", 32], "model.layers.0.*: a matrix of 48 inputs can't be quantized in groups of 32"),
            (lm, ["int8"], "lm_head: weights that are not finite can't be quantized"),
            *((part, ["int8"], "lm_head: hooks, or a forward of its own, have to be added after this")
              for part in (hooked, other)),
            (own, ["int8"], "model.layers.0.mlp.dense_h_to_4h: hooks, or .*"),
            *((part, ["int4"], "the model is quantized already, in int8") for part in (done, done.model))):
        refuses(f"^{message}$", quantize_model, part, *arguments)


# === Part III c. CUDA ================================================================================================
# Kernels run on a GPU, or in test_kernels_in_the_interpreter; around them, PyTorch's operators are in their place.
@pytest.fixture
def kernels(monkeypatch) -> None:
    """The kernels, in whatever way they can run here; what persimmon calls is PyTorch's."""
    own = persimmon.triton_kernels
    use_cuda_engine(monkeypatch)
    monkeypatch.setattr(persimmon, "triton_kernels", own)
    if DEVICE == "cpu":
        use_interpreter(persimmon, monkeypatch)


@pytest.mark.skipif(IS_INTERPRETED or DEVICE == "cuda", reason="they run already")
def test_kernels_in_the_interpreter():
    """All tests that run a kernel, in a process where Triton interprets: their names say _runs or on_cuda."""
    is_new = torch.torch_version.TorchVersion(numpy.__version__) >= (2, 4)  # for which older interpreters are too old
    pytest.importorskip("triton", "3.7" if is_new else None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "_runs or on_cuda",
               "-W", "error::RuntimeWarning",  # but a split may have nothing but padding, which is -inf
               "-W", "ignore:divide by zero encountered in log2"]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0 and "skipped" not in result.stdout, result.stdout


@pytest.mark.parametrize("T", [1, 5])
def test_fused_attend_runs(kernels, T):
    """Against PyTorch in float32, with the same input: result, what is written to the cache, what is not."""
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # q, k, p are rounded, scores large
    cases = [*itertools.product(every((0, 1, 63, 64, 65, 200, 400, 1100), [0, 1, 65, 200]), tolerance,
                                ("none", "padding", "holes"), (False, True)[: 2 if T == 1 else 1])]
    for case in random.sample(cases, len(cases) // 3):
        (cached, dtype, kind, is_captured), (D, R) = case, random.choice(((64, 32), (32, 24), (16, 4), (128, 64)))
        config = replace(CONFIG, hidden_size=3 * D, partial_rotary_factor=R / D, qk_layernorm=random.random() < 0.7)
        S, N, width = cached + T, cached + T + 3, cached + T + 3 * is_captured  # then a mask covers the whole cache
        exact, cache = (new_cache(config, 2, N, StaticCache, kind) for kind in (torch.float32, dtype))
        exact.crop(cached), cache.crop(cached)
        cache.splits = random.choice((1, 2, 8))
        cache = CapturedCache(cache) if is_captured else cache
        layer = randomize(Attention(config, 1)).to(DEVICE, dtype)
        with torch.device(DEVICE), torch.no_grad():
            exact.keys[1, :, :, :cached], exact.values[1, :, :, :cached] = torch.randn(2, 2, 3, cached, D).to(dtype)
            cache.keys.copy_(exact.keys), cache.values.copy_(exact.values)
            qkv, input_pos = torch.randn(2, T, 9 * D).to(dtype), torch.arange(cached, S)
            seen = {"none": None, "padding": torch.arange(width) >= torch.tensor([[S // 2], [S - 1]]),
                    "holes": torch.rand(width, 2).t() < 0.5}[kind]
            mask, shift = causal_mask(input_pos, width, seen), torch.tensor([[0], [5]])[: 1 if seen is None else 2]
            rope = [table.to(dtype) for table in rope_tables(input_pos + shift, config, torch.float32)]
            ours = fused_attend(layer, qkv, rope, mask, cache)
            rope32, layer32 = [table.float() for table in rope], copy.deepcopy(layer).float()
            y = persimmon.fused_attend(layer32, qkv.float(), rope32, mask, exact)
            for tensor in (exact.keys, exact.values, cache.keys, cache.values):
                tensor.nan_to_num_(9.0)  # what was not written
            if is_captured:  # a replay too many writes nothing: it would be into the next head's keys
                cache.position.fill_(N)
                fused_attend(layer, qkv, rope, mask, cache)
        k, exact_k = cache.keys[1, :, :, cached:S], exact.keys[1, :, :, cached:S]
        for a, b, limit in ((ours, y, tolerance[dtype]), (k, exact_k, tolerance[dtype] / 4)):
            assert a.dtype == dtype and a.shape == b.shape
            assert (a.float() - b).norm() < limit * b.norm(), (*case, D, R, config.qk_layernorm, cache.splits)
        exact_k.copy_(k)
        assert torch.equal(cache.keys.float(), exact.keys) and torch.equal(cache.values.float(), exact.values), case
        assert not cache.arrived.any(), case  # ready for the next launch


def test_fused_attend_refuses_what_the_kernel_can_not_index(monkeypatch):
    """All that it reads by its own arithmetic is checked before: here nothing may be launched."""
    without_gpu(monkeypatch)
    monkeypatch.setattr(persimmon, "triton_kernels", lambda: 1 / 0)
    zeros, norm = partial(torch.zeros, device=DEVICE), torch.nn.LayerNorm
    for wrong in ({}, {"qkv": zeros(2, 1, 96)}, {"qkv": zeros(1, 1, 144)}, {"qkv": zeros(2, 1, 144).double()},
                  {"rope": zeros(2, 3, 1, 1, 4)}, {"rope": zeros(2, 1, 2, 1, 4)}, {"num_heads": 6, "head_dim": 8},
                  {"rope": (zeros(1, 1, 1, 4), zeros(1, 1, 1, 2))}, {"k_layernorm": norm(16, bias=False)},
                  {"q_layernorm": norm(48)}, {"qkv": zeros(2, 10, 144), "rope": zeros(2, 1, 10, 1, 4)}, {"arrived": 5},
                  {"is_cut": True},
                  {"head_dim": 24, "qkv": zeros(2, 1, 216), "q_layernorm": norm(24), "k_layernorm": norm(24)}):
        given = {"layer": 0, "num_heads": 3, "head_dim": 16, "q_layernorm": norm(16), "k_layernorm": norm(16),
                 "qkv": zeros(2, 1, 144), "rope": zeros(2, 1, 1, 1, 4), **wrong}
        H, D = given["num_heads"], given["head_dim"]
        cache = StaticCache(replace(CONFIG, hidden_size=H * D), 2, 9, torch.float32, DEVICE)
        cache.arrived = cache.arrived[: given.pop("arrived", 6)]
        cache.keys = cache.keys.repeat(1, 1, 1, 2, 1)[:, :, :, :9] if given.pop("is_cut", False) else cache.keys
        with pytest.raises(ValueError if wrong else ZeroDivisionError, match="kernel|division"):
            fused_attend(SimpleNamespace(**given), given["qkv"], given["rope"], None, cache)
    given |= {"head_dim": 16, "q_layernorm": norm(16), "k_layernorm": norm(16), "rope": zeros(2, 1, 1, 1, 4)}
    cache = StaticCache(replace(CONFIG, hidden_size=48), 2, 9, torch.float32, DEVICE)
    for T, mask, error in ((1, zeros(1, 1, 1, 1).bool(), ZeroDivisionError), (1, zeros(1, 1, 1, 1), ValueError),
                           (2, zeros(1, 1, 2, 2), ZeroDivisionError)):  # 0.0 is seen, which only SDPA knows
        with pytest.raises(error):
            fused_attend(SimpleNamespace(**given), zeros(2, T, 144), zeros(2, 1, T, 1, 4), mask, cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fused_linear_runs(kernels, monkeypatch, dtype):
    """With and without what can stand around a product, in int8 and int4 too, for one row and for several."""
    tolerance = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
    small = (64, 128), (1024, 48), (96, 16), (208, 36), (256, 40), (512, 16)
    sizes = itertools.cycle((*small, (512, 8192), *small, (4096, 80)))
    texts = every((1, 1, 3, 16), [1, 1, 5])
    with torch.device(DEVICE), torch.no_grad():
        for rows, has_norm, has_bias, has_residual, square in itertools.product(texts, *[(False, True)] * 4):
            (C, O), group_size = next(sizes), random.choice((32, 64, 128))  # noqa: E741
            linear, norm = torch.nn.Linear(C, O, has_bias, dtype=dtype), torch.nn.LayerNorm(C, 1e-3, dtype=dtype)
            for p in (*linear.parameters(), *norm.parameters()):
                p.normal_(std=C**-0.5 if p.dim() == 2 else 1)  # float16 would overflow
            kind = random.choice(("float", "int8", "int4")[: 2 + (C % group_size == 0)])
            linear = linear if kind == "float" else {"int8": Int8Linear, "int4": Int4Linear}[kind](linear, group_size)
            x, residual = (torch.randn(rows, 1, n).to(dtype) + 0.5 for n in (C, O))
            x[..., 7] *= 30  # an outlier: what is integer in the kernel, is coarse for the others
            residual = random.choice((residual, residual[:1].expand(rows, 1, O), residual.repeat(1, 1, 2)[..., ::2]))
            others = residual if has_residual else None, square
            y = fused_linear(linear.eval(), x, norm if has_norm else None, *others)
            linear, norm = copy.deepcopy(linear).double(), norm.double() if has_norm else None
            exact = residual.double() if has_residual else None
            expected = persimmon.fused_linear(linear, x.double(), norm, exact, square)
            assert y.dtype == dtype and y.shape == expected.shape
            assert (y - expected).norm() <= tolerance * expected.norm(), (kind, group_size, rows, linear, norm, others)
        for cls, C in ((Int8Linear, 128), (Int4Linear, 128), (Int4Linear, 64)):  # 64: a group can't be cut in two
            linear, x = torch.nn.Linear(C, 64, dtype=dtype), torch.randn(1, 1, C).to(dtype)
            x[0, 0, 7] = math.nan
            with numpy.errstate(invalid="ignore"):
                assert all(fused_linear(m, x, square=True).isnan().all() for m in (linear, cls(linear, 64)))
        linear, x = torch.nn.Linear(64, 48, dtype=dtype), torch.randn(2, 3, 64).to(dtype)
        for rows in (x, x[0], x[0, :1]):  # as an edited model may give them to lm_head
            y, expected = fused_linear(linear, rows), linear(rows)
            assert y.shape == expected.shape and (y - expected).norm() <= tolerance * expected.norm()
        monkeypatch.setattr(persimmon, "triton_kernels", lambda: 1 / 0)  # what it can't take goes to PyTorch
        for sizes, *shape in (((16, 16), 1, 17, 16), ((16, 16), 17, 1, 16), ((34, 16), 1, 1, 34), ((16, 24), 1, 1, 16)):
            linear, x = torch.nn.Linear(*sizes), torch.rand(shape)
            assert torch.equal(fused_linear(linear, x, square=True), linear(x).relu().square())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_sparse_linear_runs(kernels, monkeypatch, dtype):
    """From a table and from codes, for all inputs, some and none; weights of inputs that are zero are NaN here."""
    with torch.device(DEVICE), torch.no_grad():
        for (F, C), density, kind in itertools.product(
                ((1024, 48), (16, 512), (1536, 1024)), (0, 0.1, 1), ("", "int8")):
            linear, x = torch.nn.Linear(F, C, dtype=dtype), torch.randn(1, 1, F).to(dtype)
            x[:, :, torch.rand(F) >= density], arrived = 0, torch.zeros(9).int()
            residual = torch.randn(1, 1, C).to(dtype)
            expected = linear.double()(x.double()) + residual
            layer = Int8SparseLinear(linear.to(dtype), 128) if kind else linear.to(dtype)
            table = layer.weight.clone() if kind else layer.weight.t().contiguous()
            table.view(dtype if not kind else torch.float32)[(x == 0).flatten(), 0 if not kind else C // 4:] = math.nan
            y = fused_sparse_linear(layer, table, x, residual, arrived)
            assert y.dtype == dtype and (y - expected).norm() < (1e-2 if kind else 8e-3) * expected.norm()
            assert not arrived.any(), (F, C, density)  # ready for the next launch
        monkeypatch.setattr(persimmon, "triton_kernels", lambda: 1 / 0)
        for F, C, shape, size in ((32, 64, (1, 2, 32), 9), (32, 64, (2, 1, 32), 9), (32, 72, (1, 1, 32), 9),
                                  (40, 64, (1, 1, 40), 9), (32, 1024, (1, 1, 32), 1), (2064, 64, (1, 1, 2064), 9)):
            linear, x, zeros = torch.nn.Linear(F, C), torch.rand(shape), torch.zeros(1, 1, C)
            y = fused_sparse_linear(linear, linear.weight.t().contiguous(), x, zeros, torch.zeros(size).int())
            assert torch.equal(y, linear(x))  # by PyTorch


@pytest.mark.skipif(IS_INTERPRETED, reason="then nothing is compiled")
@pytest.mark.parametrize("capability, dtype", every(
    [(90, torch.bfloat16), (90, torch.float16), (90, torch.float32), (80, torch.bfloat16)], [(90, torch.bfloat16)]))
def test_triton_kernels_compile(capability, dtype, tmp_path, monkeypatch):
    """For GPUs that are not here: what a block of the 8B launches, in each format."""
    triton, gpu, compiled = pytest.importorskip("triton"), Mock(), []
    gpu.active.get_current_target.return_value = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    gpu.active.get_current_device.return_value = capability  # what Triton remembers kernels by
    monkeypatch.setattr(triton.runtime.jit, "driver", gpu)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.JITFunction, "__getitem__", lambda kernel, grid: lambda *args, **options:
                        compiled.append((kernel.__name__, kernel.warmup(*args, grid=grid, **options))))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Mock(multi_processor_count=132))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(persimmon, "fingerprints", lambda weights: [()] * len(weights))
    with torch.device("meta"):
        for kind in ("", "int8", "int4"):
            model = PersimmonForCausalLM(PersimmonConfig(512, num_hidden_layers=1)).to(dtype)
            block, cache = model.model.layers[0], StaticCache(model.config, 1, 99, dtype, "meta")
            x, rope, down = torch.empty(1, 2, 4096), torch.empty(2, 1, 2, 1, 16).to(dtype), block.mlp.dense_4h_to_h
            persimmon.fused_attention(block.self_attn, x.to(dtype), rope, None, cache)  # a prompt
            tables = {} if kind else {down: Mock(rows=down.weight.t().contiguous())}
            block = quantize_model(model, kind).model.layers[0] if kind else block
            step = rope[:, :, :1], torch.ones(1, 1, 1, 1) > 0, cache
            persimmon.fused_block(block, tables, x[:, :1].to(dtype), *step)
            fused_linear(block.self_attn.dense, torch.empty(16, 1, 4096, dtype=dtype))
    linear, codes = (8, 0) if dtype == torch.float32 else (5, 6)  # 16 rows of int4 are left to PyTorch
    assert Counter(name for name, _ in compiled) == Counter(
        attention_kernel=6, linear_kernel=linear, sparse_kernel=3, codes_kernel=codes)
    for _, result in compiled:
        assert len(result.asm["cubin"]) > 1000
        assert result.metadata.shared <= 64 * 1024  # what small GPUs have


@pytest.mark.filterwarnings("error")
def test_static_cache_and_triton_kernels(small, monkeypatch):
    """A cache fills 8 SMs with four programs each. Without triton, CudaEngine is a plain one."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=8))
    for heads, rows, splits in ((4, 1, 8), (3, 2, 4), (3, 3, 2), (3, 6, 1), (3, 11, 1)):
        cache = StaticCache(replace(CONFIG, num_attention_heads=heads), rows, 9, torch.float32, "cpu")
        assert cache.arrived.shape == (rows * heads,) and cache.splits == splits
    pytest.importorskip("triton")
    found = persimmon.triton_kernels.__wrapped__  # without the lru_cache
    without_gpu(monkeypatch)
    monkeypatch.setattr(persimmon, "triton_kernels", found)
    engine = CudaEngine(small.to(DEVICE))
    assert len(found()) == 4 and type(engine.make_cache(1, 9)) is StaticCache
    monkeypatch.setitem(sys.modules, "triton", None)
    cache = engine.make_cache(1, 9)
    assert found() is None and type(cache) is KVCache and engine.proven_forwards(1, None, cache) == {}


def check_is_as_plain(model: PersimmonForCausalLM, *prompt, **options) -> None:
    plain = copy.deepcopy(model)
    plain.fast = False
    expected = plain.generate(*prompt, max_new_tokens=8)
    assert torch.equal(model.generate(*prompt, max_new_tokens=8, **options), expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="here the CPU stands for a GPU")
def test_cuda_engine(models, monkeypatch):
    """One graph for a generation; blocks by kernels for up to 16 texts, attention alone for more and for a prompt."""
    calls, model, ids = use_cuda_engine(monkeypatch), models[0], random_ids(models[0].config, length=9)
    mask, holes = (torch.arange(9) >= torch.tensor([[0], [4]])).long(), torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 1]])
    L, model.engine = model.config.num_hidden_layers, None  # another test may have left one
    for case in ((ids, mask), (ids,), (ids[:1], holes), (ids[1:],), (ids[:1].repeat(17, 1),)):
        check_is_as_plain(model, *case)  # proves what it needs
        calls.clear()
        RecordedGraph.count = 0
        check_is_as_plain(model, *case)
        passes, linears = 2, (4 * L + 1) * (len(case[0]) <= 16)  # a step, and its capture; all others are replayed
        assert calls == Counter(fused_attend=(1 + passes) * L, fused_linear=passes * linears)
        assert RecordedGraph.count == 1
    with torch.no_grad():  # one row of two goes on
        model.engine.prefill(ids, None, cache := model.engine.make_cache(2, 16))
        model.engine.decode(ids[:, :1], None, cache)
        cache.keys, cache.values = cache.keys[:, :1], cache.values[:, :1]
        assert len(model.engine.decode(ids[:1, :1], None, cache)) == 1
    proven = model.engine.compared  # for a prompt or a step, one row or several, with a mask or not; and for 17 rows
    assert {*proven.values()} == {16} and len(proven) == 2 * 2 * 2 + 1 and ("block", False, True, True, 0) in proven
    model.generate(ids, max_new_tokens=20)  # a longer cache is proven anew
    assert proven["attention", True, True, False, 0] == 28


@pytest.mark.skipif(DEVICE == "cuda", reason="here the CPU stands for a GPU")
@pytest.mark.filterwarnings("error")
def test_cuda_engine_skips_zeros(monkeypatch):
    """For one text, from tables or in int8. What has changed counts, at the latest, in the next generation."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1e12, 1e12))
    calls = use_cuda_engine(monkeypatch)
    for kind in ("int8", "int4", None):
        model = quantize_model(small_model(persimmon, 8, intermediate_size=256), kind) if kind else wide_model(2)
        ids, down = random_ids(model.config, 2, 9), model.model.layers[0].mlp.dense_4h_to_h
        for rows, tables in ((2, 0), (1, 2), (-1, 2), (2, 2)):  # -1: one, after a change
            if rows == -1:
                down.weight[:, :-8].bitwise_xor_(255) if kind else down.weight.data.neg_()
            model.generate(ids[: abs(rows)], max_new_tokens=8)  # proves what it needs
            calls.clear()
            check_is_as_plain(model, ids[: abs(rows)])
            assert calls["fused_sparse_linear"] == 2 * 2 * (rows < 2)  # for two layers
            assert len(model.engine.tables) == (tables := tables * (kind is None))
        assert ("block", False, False, False, tables) in model.engine.compared
        assert {key[4] for key in model.engine.compared if key[2]} == {0}  # several texts are proven once
    engine, ids = model.engine, ids[:1]
    cache = engine.make_cache(1, 40)  # used again, with other tables, other memory and other masks
    for n, mask in enumerate((*[None] * 4, *(torch.arange(9) >= torch.tensor([[[5]], [[2]]])).long())):
        cache.crop(0)
        if n < 2:
            down.weight.data.neg_()
        elif mask is None:
            old = getattr(cache, name := ("keys", "values")[n % 2])
            setattr(cache, name, old.clone()), old.fill_(math.nan)
        check_is_as_plain(model, ids, mask, cache=cache)
    next(steps := generate(model, ids, max_new_tokens=6))
    next(steps)
    down.weight = torch.nn.Parameter(-down.weight.data)
    assert len([*steps]) == 4 and down not in engine.tables
    model.generate(ids, max_new_tokens=3)
    assert len(engine.tables) == 2
    model.model.layers = model.model.layers[:1]
    model.generate(ids, max_new_tokens=3)
    assert [*engine.tables] == [down]
    down.packed, down.is_by_input = {"codes": engine.tables[down]}, False  # as a matrix in int4 has them
    monkeypatch.setattr(MLP, "forward", lambda mlp, x: mlp.dense_4h_to_h(mlp.dense_h_to_4h(x).sigmoid()))
    with pytest.warns(match="CUDA kernels are not used"):
        model.generate(ids, max_new_tokens=3)
    assert engine.tables == {} and engine.downs == [] and down.packed == {}
    engine.tables[down] = None
    monkeypatch.setattr(StaticCache, "__init__", Mock(side_effect=[torch.OutOfMemoryError, None]))
    assert type(engine.make_cache(1, 9)) is StaticCache and engine.tables == {}  # which make room for it


# Changes of a model, by how many of the two kernels are left; how often a step is captured anew (not for a weight that
# is read where it was, nor where hooks have to run); warnings (of an Attention one each for T = 1, T > 1 and blocks).
CHANGES = {change: effects for effects, changes in {
    (0, 0, 0): ["block.train()", "block.self_attn.register_forward_hook(negate)",
                "block.self_attn.q_layernorm.register_forward_hook(negate)"],
    (1, 0, 0): ["mlp.forward = lambda x: x", "down.forward = lambda x: x @ down.weight.t()",
                "down.bias = nn.Parameter(down.bias.data.as_subclass(Packed))",
                "prune.random_unstructured(down, 'weight', 0.5)",
                "weight_norm(down).parametrizations.weight.original0.data.neg_()",
                "down.register_forward_pre_hook(lambda module, x: (0.5 * x[0],))", "mlp.register_forward_hook(negate)"],
    (1, 1, 0): ["mlp.dense_4h_to_h = nn.Sequential(down, nn.Tanh()).eval()"],
    (2, 0, 0): ["down.weight.data.neg_()", "model.lm_head.register_forward_hook(negate)",
                "model.lm_head.forward = lambda x: -x @ model.lm_head.weight.t()"],
    (2, 1, 0): ["mlp.dense_4h_to_h = nn.Linear(*down.weight.shape[::-1]).to(down.weight).eval()",
                "block.post_attention_layernorm.eps = 0.5", "model.config.rope_theta = 2.0",
                "down.weight = nn.Parameter(-down.weight.data)",
                "down.weight.data = -down.weight.data.t().clone().t()", "down.weight.detach().mul_(0.5)",
                "vector_to_parameters(0.9 * parameters_to_vector(down.parameters()), down.parameters())"],
    (0, 0, 3): ["scale(persimmon.Attention)", "persimmon.fused_attend, block.eps = None, 1"],
    (1, 1, 1): ["scale(persimmon.MLP)", "scale(persimmon.Block)"]}.items() for change in changes}


def make_change(model: PersimmonForCausalLM, change: str, monkeypatch) -> None:
    """Make one of these, in a model's first block."""
    block = model.model.layers[0]
    exec(change, globals() | {
        "model": model, "block": block, "mlp": block.mlp, "down": block.mlp.dense_4h_to_h, "nn": torch.nn,
        "negate": lambda module, x, y: -y,  # Packed: as weights of torchao's are, which no kernel can read
        "Packed": type("Packed", (torch.Tensor,), {"__deepcopy__": lambda p, _: torch.nn.Parameter(p.data.clone())}),
        "scale": lambda kind: monkeypatch.setattr(kind, "forward", lambda *a, old=kind.forward: old(*a) * 1.001)})


@pytest.mark.skipif(DEVICE == "cuda", reason="here the CPU stands for a GPU")
@pytest.mark.parametrize("change", CHANGES)
def test_cuda_engine_notices_changes(small, monkeypatch, recwarn, change):
    """After a generation, and between two of its steps: what has changed or is wrong runs plainly, and nothing else."""
    (kernels_left, captured, warned), ids = CHANGES[change], random_ids(small.config, rows=1, length=9)
    calls, run = use_cuda_engine(monkeypatch), partial(small.generate, ids, max_new_tokens=12)
    run()
    next(steps := generate(small, ids, max_new_tokens=12))
    next(steps)
    make_change(small, change, monkeypatch)
    warnings.simplefilter("always")
    found = run()
    calls.clear()
    assert torch.equal(run(), found) and len(calls) == kernels_left
    assert ["CUDA kernels are not used" in str(w.message) for w in recwarn] == [True] * warned
    RecordedGraph.count = 0
    assert len([*steps]) == 10 and RecordedGraph.count == captured
    small.fast = False
    assert torch.equal(run(), found)


@pytest.mark.skipif(DEVICE == "cuda", reason="here the CPU stands for a GPU")
@pytest.mark.parametrize("place, outside", [("layers.1.self_attn", 0), ("layers.1", 1)])
def test_another_class_that_uses_the_cache_is_not_captured(small, monkeypatch, place, outside):
    """In a block or in place of one: a graph would repeat the length that it was captured with."""
    class Own(torch.nn.Module):
        def __init__(self, attn):
            super().__init__()
            self.attn = copy.deepcopy(attn).query_key_value

        def forward(self, x, rope, mask, cache):
            qkv = self.attn(x).unflatten(2, (3, 3, 16)).transpose(1, 2).unbind(3)
            return outside * x + cache.attend(1, *qkv, mask).transpose(1, 2).flatten(2)

    use_cuda_engine(monkeypatch)
    small.model.set_submodule(place, Own(small.model.layers[1].self_attn).eval())
    for rows in (1, 2):
        with pytest.warns(match="a module that is not this file's calls cache.attend"):
            check_is_as_plain(small, random_ids(small.config, rows, 9))


@pytest.mark.skipif(DEVICE == "cuda", reason="here the CPU stands for a GPU")
@pytest.mark.parametrize("has_blocks", [True, False])
def test_a_module_that_counts_positions_is_not_captured(small, monkeypatch, has_blocks):
    """By cache.length, or, where no Block is left, by itself: a graph would repeat what there was at the capture."""
    class Own(torch.nn.Module):
        def forward(self, x, rope, mask, cache):
            self.count = 0 if x.shape[1] > 1 else self.count + 1
            places = torch.arange(48) * (9 + cache.length if has_blocks else 9 + self.count)
            return x + places.sin()

    use_cuda_engine(monkeypatch)
    small.model.layers = torch.nn.ModuleList([*small.model.layers] * has_blocks + [Own()]).eval()
    with pytest.warns(match="no attribute 'length'") if has_blocks else contextlib.nullcontext():
        check_is_as_plain(small, random_ids(small.config, 1, 9))


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_a_captured_graph_keeps_what_it_reads(small):
    """Memory that is free after the capture, filled with NaN, changes nothing."""
    ids, engine = random_ids(CONFIG, length=21).to(DEVICE), engine_for(model := small.to(DEVICE))
    for rows, mask in ((1, None), (2, torch.ones(2, 30, dtype=torch.long, device=DEVICE))):
        cache = engine.make_cache(rows, 30)
        with torch.no_grad():
            engine.prefill(ids[:rows], mask, cache)
            expected = Engine(model).next_logits(ids[:rows, :1], mask, cache).clone()
            for _ in range(2):
                cache.crop(21)
                assert close(engine.decode(ids[:rows, :1], mask, cache), expected) and cache.length == 22
                junk = [torch.full((4**n,), math.nan, device=DEVICE) for n in range(10) for _ in range(100)]
        assert len(junk) == 1000 and cache in engine.graphs


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_splits_are_combined_the_same_each_time():
    """Which program is the last differs from launch to launch, what it sees must not: 20,000 launches, equal bits."""
    config = PersimmonConfig(num_hidden_layers=1)
    for rows, cached in ((1, 3000), (2, 700)):
        with torch.device(DEVICE), torch.no_grad():
            cache = StaticCache(config, rows, cached + 1, torch.bfloat16, DEVICE)
            cache.keys.normal_(), cache.values.normal_(), cache.crop(cached)
            rope = rope_tables(cache.positions(rows, 1)[0][None], config, torch.bfloat16)
            qkv, layer = torch.randn(rows, 1, 3 * 4096).bfloat16(), Attention(config, 0).bfloat16()
            expected, different = fused_attend(layer, qkv, rope, None, cache), torch.zeros((), dtype=torch.long)
            x, residual = torch.randn(1, 1, 20480).split((16384, 4096), 2)
            down = torch.nn.Linear(16384, 4096).bfloat16()
            args = down, down.weight.t().contiguous(), x.relu().bfloat16(), residual.bfloat16(), cache.arrived
            sums, graph = fused_sparse_linear(*args), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(100):
                    different += (fused_attend(layer, qkv, rope, None, cache) != expected).any()
                    different += (fused_sparse_linear(*args) != sums).any()
        for _ in range(100):
            graph.replay()
        assert cache.splits > 1 and int(different) == 0


# === Part III d. Several devices =====================================================================================
GENERATION = """
import sys, persimmon, torch, torch.distributed as dist
from datetime import timedelta
from persimmon import *
n, rank, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", f"file://{folder}/store", timedelta(minutes=1), n, rank)  # none waits for longer
alone, model = (PersimmonForCausalLM.from_pretrained(folder) for _ in range(2))
ids, seen = torch.arange(70, 88).view(2, 9), []  # by hooks that were there before
hooks = [m.model.layers[0].mlp.register_forward_hook(lambda m, args, y: seen.append(y)) for m in (alone, model)]
parallelize(model)
alone(ids), model(ids)
assert torch.allclose(*seen[-2:], 0, 1e-2) and not any(hook.remove() for hook in hooks)
mask, options = torch.tensor([[1] * 9, [0] * 4 + [1] * 5]), {"temperature": 1.0, "top_p": 0.9, "seed": 3}
print(*[token for step in generate(model, ids, max_new_tokens=9, temperature=1.0) for token in step.tokens])  # no seed
for steps in (zip(*[generate(m, *x, max_new_tokens=12, **o) for m in (alone, model)], strict=True)
              for x in ((ids,), (ids[:1],), (ids, mask)) for o in ({}, options)):
    assert all(a.tokens == b.tokens for a, b in steps)
assert not any(p.requires_grad for p in model.parameters()) and len(model.engine.tables) == len(alone.engine.tables)
same = [torch.allclose(model(ids, m).logits, alone(ids, m).logits, 0, 1e-5) for m in (None, mask)]
print(len(model.engine.tables), all(same))
if not model.config.quantization:
    assert not model.lm_head[0]._forward_hooks  # so that an engine reads it by its operator
    assert quantize_model(model, "int8").generate(ids, max_new_tokens=2).shape == (2, 11)
attention = persimmon.attention

def alibi(q, k, v, mask, dropout=0.0):  # slopes that a share of the heads would get wrong, hardly seen on few positions
    distance = torch.arange(q.shape[2]) - torch.arange(q.shape[2])[:, None]
    slopes = 2.0 ** (-8 * torch.arange(1, q.shape[1] + 1) / q.shape[1])[:, None, None]
    return attention(q, k, v, (slopes * distance).masked_fill(distance > 0, -torch.inf)[None])

persimmon.attention = alibi
try:
    parallelize(PersimmonForCausalLM.from_pretrained(folder))
except ValueError as error:
    assert "another result" in str(error)
else:
    raise AssertionError("parallelize has not noticed another attention")
dist.destroy_process_group()  # without it, gloo's threads may abort while Python ends
"""


@pytest.mark.parametrize("n, kind", every([(2, None), (2, "int8"), (4, "int4")], [(2, None)]))
def test_several_processes(n, kind, tmp_path):
    """Each as one alone, for padded prompts too, with its tables."""
    model = randomize(PersimmonForCausalLM(replace(wide_model().config, vocab_size=512, intermediate_size=8192)))
    (quantize_model(model, kind) if kind else model).save_pretrained(tmp_path)
    options = {"stdout": subprocess.PIPE, "cwd": HERE, "text": True,
               "env": {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}}
    command = ["timeout", "120", sys.executable, "-c", GENERATION, str(n)]
    running = [subprocess.Popen([*command, str(i), tmp_path], **options) for i in range(n)]
    printed = [process.communicate()[0] for process in running]
    assert printed == printed[:1] * n and printed[0].endswith("0 True\n" if kind else "1 True\n")
    assert not any(process.returncode for process in running)


@pytest.mark.parametrize("options, stdin", [
    ("- --json --temp 1", "ROMEO:\n"), ("--chat --temp 0 -q", "Who are you?\nSay \\\nit.\n/what\nNow.\n")])
def test_sample_py_in_two_processes(options, stdin):
    """As under torchrun: process 0 reads, chooses the seed, and speaks for all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    command = ["timeout", "100", sys.executable, *f"sample.py --device cpu --dtype float32 -n 20 {options}".split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": HERE}
    second = subprocess.Popen(command, stdin=subprocess.DEVNULL, **pipes, env={**os.environ, **shared, "RANK": "1"})
    first = subprocess.run(command, input=stdin, **pipes, env={**os.environ, **shared, "RANK": "0"})
    assert second.communicate() == ("", "") and second.returncode == first.returncode == 0
    seed = json.loads(first.stdout)["seed"] if "--json" in options else 0
    alone = subprocess.run([*command, "--seed", str(seed)], input=stdin, **pipes)
    texts = [json.loads(run.stdout)["ids"] if "--json" in options else run.stdout for run in (first, alone)]
    assert texts[0] == texts[1] and len(texts[0]) >= 20 and (seed > 0 or first.stderr == alone.stderr)


def test_parallelize(monkeypatch):
    """What two processes can't share; packed weights are made anew, and nothing can be saved."""
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 0}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    refuses("takes a PersimmonForCausalLM, not a PersimmonModel", persimmon.parallelize, PersimmonModel(CONFIG))
    for sizes, error in (((98, 48, 80, 1, 3), "heads = 3 is not a multiple of 2"), ((97, 48, 80, 1, 2), "= 97"),
                         ((128, 128, 128, 1, 2), r"scale \(1, 128, 2\)"), ((200, 256, 256, 1, 2), "can't be divided")):
        model = PersimmonForCausalLM(PersimmonConfig(*sizes))
        refuses(error, persimmon.parallelize, quantize_model(model, "int4") if sizes[1] > 48 else model)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda share: None)  # a sum that lacks a share
    refuses("is another result", persimmon.parallelize, PersimmonForCausalLM(PersimmonConfig(256, 128, 512, 1, 2)))
    model = PersimmonForCausalLM(PersimmonConfig(256, 128, 512, 1, 2))
    torch.nn.utils.vector_to_parameters(torch.zeros(sum(p.numel() for p in model.parameters())), model.parameters())
    quantize_model(model, "int8").sample = lambda logits, *options: logits.argmin(-1)
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    for layer in layers:
        layer.packed_copy("x", layer.weight, layer.weight.clone)
    refuses("can't be saved after parallelize", persimmon.parallelize(model).save_pretrained, "no")
    without_gpu(monkeypatch)
    assert {kind(model).make_cache(1, 9).keys.shape[2] for kind in (Engine, CpuEngine, CudaEngine)} == {1}
    shares = [layer.packed_copy("x", layer.weight, layer.weight.clone) for layer in layers]
    assert len(layers) == 5 and all(torch.equal(share, layer.weight) for share, layer in zip(shares, layers))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda ids, source: ids.add_(source))
    assert model.sample(torch.tensor([[3.0, 1, 2]]), [], 0.0).tolist() == [1]


# === How it is built =================================================================================================
def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def small_model(module: ModuleType, heads: int, layers: int = 2, **changes) -> PersimmonForCausalLM:
    """A model with heads of 16, which the CUDA engine's kernels can have; on a CPU, 16 heads make a cache long."""
    config = module.PersimmonConfig(40, 16 * heads, 64, layers, heads, 300, eos_token_id=None)
    return randomize(module.PersimmonForCausalLM(replace(config, **changes))).eval()


def wide_model(layers: int = 1) -> PersimmonForCausalLM:
    """One whose MLPs have matrices that are large enough for the CPU engine's fast paths, in bfloat16 just so."""
    return small_model(persimmon, 32, layers, intermediate_size=4096)


def edited(folder: Path, *replacements: tuple[str, str], source: str = SOURCE) -> ModuleType:
    """A copy of persimmon.py, imported, with these strings replaced; each has to be there once."""
    for old, new in replacements:
        assert source.count(old) == 1, f"{source.count(old)} times {old!r}"
        source = source.replace(old, new)
    (file := folder / f"copy_{len(sys.modules)}.py").write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BLOCKS = {"a": "CpuEngine", "b": "Int8Linear", "c": "CudaEngine", "d": "ParallelForCausalLM"}  # a class of each
PARTS = ("I", "II", "III", *BLOCKS)


def split_source() -> dict[str, list[str]]:
    """Part -> its lines, with its banner. The header is a part without a name."""
    lines = SOURCE.splitlines(keepends=True)
    at = [n for n, line in enumerate(lines) if line.startswith("# === ")]
    assert [lines[n].split(".")[0].removeprefix("# === Part ").removeprefix("III ") for n in at] == [*PARTS]
    return {part: lines[start:stop] for part, start, stop in zip(("", *PARTS), [0, *at], [*at, None])}


def test_nothing_refers_upward():
    """No part says what only parts define that it must not know, nor what could hide that."""
    others = torch, torch.nn.Linear(1, 1), torch.Tensor, torch.finfo, list, dict, partial
    torchs = set(itertools.chain.from_iterable(map(dir, others)))
    nodes = {part: [*ast.walk(ast.parse("".join(lines)))] for part, lines in split_source().items()}
    defined = {part: {getattr(n, name) for n in nodes[part] if not isinstance(getattr(n, "ctx", None), ast.Load)
                      for name in {"name", "arg", "id", "attr"} & vars(n).keys()} for part in nodes}
    functions = {getattr(n, "name", None) for n in itertools.chain(*nodes.values())}
    for i, part in enumerate(PARTS):
        hidden = set().union(*defined.values()) - torchs.union(*(defined[p] for p in ("", *PARTS[: min(i, 3)], part)))
        words = {getattr(n, "id", None) or getattr(n, "attr", None) for n in nodes[part]}
        words |= {n.value for n in nodes[part] if isinstance(n, ast.Constant)} & functions
        assert not (wrong := words & (hidden | {"globals", "exec", "__import__"})), (part, wrong)


def test_size():
    for name, limit in (("persimmon.py", 2452), ("sample.py", 395), ("convert.py", 463)):
        lines = (HERE / name).read_text().splitlines()
        assert len(lines) <= limit and max(map(len, lines)) <= 100
    assert len(split_source()[""]) + len(split_source()["I"]) <= 594


def test_a_block_of_part_iii_can_be_cut_out(tmp_path):
    """And all: tiny/, a model with large matrices, and that in int8 give the same, by the file and by sample.py."""
    large, expected = wide_model(), {}
    large.save_pretrained(tmp_path / "large")
    quantize_model(large.bfloat16(), "int8").save_pretrained(tmp_path / "int8")
    ids, mask = random_ids(large.config, 2, 9), (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    for letters in ("", *BLOCKS, "".join(BLOCKS)):
        left = [lines for part, lines in split_source().items() if part not in [*letters]]
        module = edited(tmp_path, source="".join(itertools.chain.from_iterable(left)))
        assert [hasattr(module, name) for name in BLOCKS.values()] == [block not in letters for block in BLOCKS]
        for folder in (TINY, tmp_path / "large", tmp_path / "int8"):
            if folder.name == "int8" and "b" in letters:
                refuses(r"^[^\n]*int8[^\n]*$", module.PersimmonForCausalLM.from_pretrained, folder)
                continue
            module.PersimmonForCausalLM.from_pretrained(folder, dtype="float32").save_pretrained(tmp_path / "again")
            model = module.PersimmonForCausalLM.from_pretrained(tmp_path / "again")
            tokens = [model.generate(*case, max_new_tokens=6).tolist() for case in ((ids[:1],), (ids, mask))]
            assert bool(getattr(model.engine, "tables", None)) == (folder.name == "large" and "a" not in letters)
            logits = model(ids, mask).logits[mask > 0]
            old = expected.setdefault(folder.name, (tokens, logits))
            assert tokens == old[0] and close(logits, old[1]), (letters, folder)
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setitem(sys.modules, "persimmon", module)
            assert sample_script.main(["ROMEO:\n", "-n9", "--seed=1", "--dtype=float32", "--quiet"]) == 0
        assert out.getvalue() == expected.setdefault("sample.py", out.getvalue()), letters


def use_cuda(module: ModuleType, monkeypatch) -> ModuleType:
    """Has a copy of persimmon use its CudaEngine on DEVICE, without a GPU in Triton's interpreter."""
    if DEVICE == "cuda":
        return module
    use_interpreter(module, monkeypatch)
    from triton.runtime.interpreter import GridExecutor

    def recorded(executor, *args, launch=GridExecutor.__call__, **options) -> None:
        if isinstance(graph := _get_current_dispatch_mode(), RecordedGraph):
            graph.calls.append((None, partial(launch, executor, *args, **options)))
        with _disable_current_modes():
            launch(executor, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", recorded)
    without_gpu(monkeypatch, module)
    return module


SDPA = "return nn.functional.scaled_dot_product_attention("
UNMASKED = "input_pos.shape[0] in (1, S)", "input_pos.shape[0] in (1, S) and S <= 100"
EDITS = {  # of Part I: what a person changes who copies the file; first, which parts of the engines have to step aside
    "GELU": ("block", ("self.dense_h_to_4h(x).relu().square()", "nn.functional.gelu(self.dense_h_to_4h(x))")),
    "no MLP in every second layer": (
        "block", ("return x + self.dropout(", "return x if self.self_attn.layer % 2 else x + self.dropout(")),
    "window in attention": ("block attention cpu", (
        SDPA, """column, is_causal = torch.arange(k.shape[2], device=q.device), False
    row = column[k.shape[2] - q.shape[2] :, None]
    window = (column <= row) & (row - column < 100)
    mask = window if mask is None else mask & window
    """ + SDPA)),
    "window in causal_mask": (
        "", UNMASKED, ("(column <= row)[None, None]", "((column <= row) & (row - column < 100))[None, None]")),
    "window made from S": ("block attention", UNMASKED, (
        "(column <= row)[None, None]", "((column <= row) & (column > row - row[0] + S - len(row) - 100))[None, None]")),
    "keys of one head": (
        "block attention prefill cpu", ("B, config.num_attention_heads, N,", "B, 1, N,"),
        ("hidden_size, 3 * config.hidden_size)", "hidden_size, config.hidden_size + 2 * config.head_dim)"),
        ("self.num_heads, 3, self.head_dim).unbind(3)", "-1, self.head_dim).split((self.num_heads, 1, 1), 2)"),
        (SDPA, "k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))\n    " + SDPA)),
    "interleaved RoPE": (
        "block attention prefill", ("x[..., : R // 2], x[..., R // 2 : R]", "x[..., 0:R:2], x[..., 1:R:2]")),
    "soft cap": ("", (".logits[:, -1].float()", ".logits[:, -1].float().tanh()")),  # not in a module
    "padding that one position sees": ("cpu", (
        SDPA, "mask = torch.ones_like(mask) if mask is not None and q.shape[2] == 1 else mask\n    " + SDPA)),
    "one more term in the softmax": ("block attention cpu", (SDPA, """T, S, is_causal = q.shape[2], k.shape[2], False
    mask = torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device).tril(S - T) if mask is None else mask
    (k, v), mask = (nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v)), nn.functional.pad(mask, (0, 1), value=True)
    """ + SDPA)),
    "attend with a scale": (
        "block attention prefill cpu", ("""mask: Tensor | None) -> Tensor:
        \"\"\"Store a""", """mask: Tensor | None, scale: float = 1.0) -> Tensor:
        \"\"\"Store a"""),
        ("return attention(q, k, v, mask)\n\n    def", "return attention(q * scale, k, v, mask)\n\n    def"),
        ("cache.attend(self.layer, q, k, v, mask)", "cache.attend(self.layer, q, k, v, mask, scale=3.0)")),
    "a scale that the cache is given": ("cpu", ("self.length = 0\n", "self.length, self.scale = 0, 1.0\n"),
        ("return attention(q, k, v, mask)\n\n    def", "return attention(q * self.scale, k, v, mask)\n\n    def"),
        ("            input_pos, S = cache.positions(B, T)\n        if att",
         "            (input_pos, S), cache.scale = cache.positions(B, T), 3.0\n        if att")),
    "causal_mask of a window": (
        "block attention prefill", UNMASKED,
        ("S: int, attention_mask: Tensor | None)", "S: int, attention_mask: Tensor | None, width: int)"),
        ("causal_mask(input_pos, S, attention_mask)", "causal_mask(input_pos, S, attention_mask, 100)"),
        ("(column <= row)[None, None]", "((column <= row) & (row - column < width))[None, None]"))}


def set_processor(module: ModuleType, processor: str) -> ModuleType:
    """However small the matrices and the cache are, the products that are chosen on a processor; for a copy."""
    module.CpuEngine.large, module.TransposedKVCache.block = 0, 64
    module.cpu_has = lambda feature: feature in PROCESSORS[processor]
    module.is_unedited.cache_clear()
    return module


def check_engine(model, ids, dtype, mask=None, room: int = 299) -> tuple[int, Engine]:
    """The engine's logits are as exact as plain ones. Returns how often it warned, which it does not a second time."""
    exact, model, counts = logits_of(model, ids, mask, room, is_plain=True), copy.deepcopy(model).to(dtype), []
    limit = 2 * distance(logits_of(model, ids, mask, room, is_plain=True), exact) + 1e-5
    for _ in range(2):
        with warnings.catch_warnings(record=True, action="always") as caught:
            assert distance(logits_of(model, ids, mask, room), exact) <= limit
        counts.append(sum("not used" in str(w.message) for w in caught))
    assert counts[1] == 0 and type(model.engine) is sys.modules[type(model).__module__].ENGINES[ids.device.type]
    return counts[0], model.engine


@pytest.mark.parametrize("name", EDITS)
def test_a_cpu_follows_an_edit(tmp_path, name):
    aside, *replacements = EDITS[name]
    module = edited(tmp_path, *replacements)
    model, length = small_model(module, 16), 150 if "window" in name else 21
    ids, mask = random_ids(model.config, 2, length), torch.arange(length) >= torch.tensor([[8], [0]])
    both = (logits_of(m, ids, mask, is_plain=True) for m in (model, small_model(persimmon, 16)))
    assert distance(*both) > 0.03, "the edit changes nothing"
    for processor, dtype in every(itertools.product(PROCESSORS, (torch.float32, torch.bfloat16, torch.float16)), [
            ("AMX", torch.bfloat16), ("AMX", torch.float16), ("Zen 4", torch.float32), ("laptop", torch.bfloat16)]):
        is_transposed = dtype == torch.float16 or (dtype == torch.bfloat16 and processor != "AMX")
        set_processor(module, processor)
        count, _ = check_engine(model, ids[:1], dtype)
        assert count == ("cpu" in aside and is_transposed), (processor, dtype)
    check_engine(model, ids, torch.float16, mask, room=300)


@pytest.mark.parametrize("kind", ["on_cpu", "on_cuda"])
def test_another_function_is_noticed(tmp_path, monkeypatch, kind):
    """As in a notebook, where one is written anew after a generation, and then as it was."""
    module = edited(tmp_path)
    if kind == "on_cpu":
        model, dtype = small_model(set_processor(module, "Zen 4"), 16), torch.bfloat16
    else:
        model, dtype = small_model(use_cuda(module, monkeypatch), 2, 1).to(DEVICE), torch.float32
    ids, room = random_ids(model.config, 1, 7).to(DEVICE), 360 if kind == "on_cpu" else 60
    run = lambda x=ids, **options: logits_of(model, x, room=room, **options)  # noqa: E731
    model.to(dtype)
    before, old, engine = run(), module.attention, module.engine_for(model)
    cache = engine.make_cache(1, room)
    state, limit = module.snapshot([]), 0.03 if kind == "on_cpu" else 1e-4

    @torch.no_grad()
    def check(engine):
        cache.crop(0), engine.prefill(ids[:, :5], None, cache)  # a cache that was there already
        late, expected = engine.decode(ids[:, 5:6], None, cache), run(ids[:, :6], steps=2, is_plain=True)[1]
        assert distance(late, expected) < limit and distance(run(), run(is_plain=True)) < limit

    for attention, is_new in ((lambda q, *others: old(3 * q, *others), True), (old, False)):
        module.attention = attention
        with pytest.warns(match="not used") if is_new else contextlib.nullcontext():
            check(engine)
        assert (distance(run(), before) > 0.1) == is_new
    tables, factor = module.rope_tables, [1]
    monkeypatch.setattr(module, "rope_tables", lambda position_ids, *o: tables(factor[0] * position_ids, *o))
    check(engine)
    factor[0], model.engine = 3, None  # of a number, a new engine
    check(module.engine_for(model))
    monkeypatch.setattr(module, "rope_tables", tables)
    for place, name in ((module, "attention"), (module, "apply_rope"), (module, "rope_tables"), (module, "causal_mask"),
                        (module.KVCache, "attend")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, partial(getattr(place, name)))
            assert module.snapshot([]) != state
    assert module.snapshot([]) == state
    linear = torch.nn.Linear(3, 3)
    state, linear.weight.data = module.snapshot([linear]), linear.weight.data.t()
    assert module.snapshot([linear]) != state
    if kind == "on_cpu":
        old = module.KVCache.attend
        monkeypatch.setattr(module.KVCache, "attend", lambda cache, layer, q, *o: old(cache, layer, 3 * q, *o))
        with pytest.warns(match="not used"):
            assert distance(run(), run(is_plain=True)) < limit


@pytest.mark.parametrize("name", every(EDITS, [*EDITS][1:]))
def test_an_edit_is_followed_on_cuda(tmp_path, monkeypatch, name):
    aside, *replacements = EDITS[name]
    short = [(old, new.replace("100", "20")) for old, new in replacements]  # for the interpreter, which is slow
    model = small_model(use_cuda(edited(tmp_path, *short), monkeypatch), 2, 1 + ("layer" in name)).to(DEVICE)
    ids = random_ids(model.config, 2, 24 if "window" in name else 7).to(DEVICE)
    count, engine = check_engine(model, ids[:1], torch.float32, room=60)
    assert count == ("block" in aside) + ("attention" in aside) + ("prefill" in aside)
    if "given" in name:  # then nothing is compared
        assert engine.state is None
    else:
        assert (engine.compared["block", False, False, False, 0] < math.inf) == ("block" not in aside)
        assert (engine.compared["attention", True, False, False, 0] < math.inf) == ("prefill" not in aside)
    if ALL and name in ("GELU", "soft cap"):
        check_engine(model, ids[:1], torch.bfloat16, room=60)
    if ALL or "padding" in name:  # which is proven anew
        mask = torch.arange(ids.shape[1]).to(ids) >= ids.new_tensor([[3], [0]])
        assert check_engine(model, ids, torch.float32, mask, 40)[0] == 2 or "padding" not in name


def test_modules_that_an_edit_removes_are_not_missed_on_cuda(tmp_path, monkeypatch):
    """The norms of q and k, the head where it is tied to the embedding, a block's attention, and Block."""
    norms = re.search("        norm = partial.*?\n        self.k_layernorm[^\n]*\n", SOURCE, re.S)[0]
    for edits in ([(norms, ""), ("self.q_layernorm(q)", "q"), ("self.k_layernorm(k)", "k")],
                  [("        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)\n", ""),
                   ("        self.init_weights(self.lm_head)\n", ""),
                   ("self.lm_head(output.last_hidden_state[:, -logits_to_keep:])",
                    "output.last_hidden_state[:, -logits_to_keep:].matmul(self.model.embed_tokens.weight.T)")],
                  [("self.self_attn = ", "self.att = "), ("self.self_attn(", "self.att(")],
                  [("class ModelOutput(", """class Other(nn.Module):
    forward = Block.forward

    def __init__(self, *args):
        super().__init__()
        vars(self).update(vars(Block(*args)))


class ModelOutput("""), ("nn.ModuleList(Block(", "nn.ModuleList(Other("),
                   ("x[..., : R // 2], x[..., R // 2 : R]", "x[..., 0:R:2], x[..., 1:R:2]")]):
        model = small_model(use_cuda(edited(tmp_path, *edits), monkeypatch), 2, 1).to(DEVICE)
        check_engine(model, random_ids(model.config, 1, 7).to(DEVICE), torch.float32, room=60)


def test_what_rounding_hides_is_seen_on_cuda(tmp_path, monkeypatch):
    """A block whose MLP reads what attention does: with small weights, rounding x in 16 bit hides the difference."""
    module = use_cuda(edited(tmp_path, ("        x = x + self.self_attn(", "        y = x + self.self_attn("),
                             ("return x + self.dropout(self.mlp(", "return y + self.dropout(self.mlp(")), monkeypatch)
    model = small_model(module, 4, 1, initializer_range=0.01).to(DEVICE, torch.float16)  # the interpreter cuts bfloat16
    model.init_weights()
    with pytest.warns(UserWarning, match="block 0 computes something else"):
        logits_of(model, random_ids(model.config, 1, 7).to(DEVICE), room=60)


def test_what_random_weights_hide_is_seen_on_cuda(tmp_path, monkeypatch):
    """A gate that is open until a model's weights are loaded. A buffer that counts passes is no change."""
    gate = [("self.dense = nn.Linear(", "self.gate = nn.Parameter(torch.zeros(1))\n        self.dense = nn.Linear("),
            ("return self.dense(y.transpose(1, 2).flatten(2))", "return self.dense((1 + self.gate) * y.transpose(1, 2)"
             ".flatten(2))")]
    model = small_model(use_cuda(edited(tmp_path, *gate), monkeypatch), 2, 1).to(DEVICE)
    run = partial(logits_of, model, random_ids(model.config, 1, 7).to(DEVICE), room=60)
    for value in (0, 1):
        model.load_state_dict({n: p * 0 + value if "gate" in n else p for n, p in model.state_dict().items()})
        with pytest.warns(UserWarning, match="block 0 computes something else") if value else contextlib.nullcontext():
            assert distance(run(), run(is_plain=True)) < 1e-4
    model = small_model(use_cuda(edited(
        tmp_path, ("        self.final_layernorm = ", "        self.register_buffer('n', torch.zeros(()))\n        "
                   "self.final_layernorm = "), ("return ModelOutput(", "self.n += 1\n        return ModelOutput(")),
        monkeypatch), 1, 1).to(DEVICE)
    RecordedGraph.count = 0
    logits_of(model, random_ids(model.config, 1, 7).to(DEVICE), room=60)
    assert RecordedGraph.count == (DEVICE == "cpu")


@pytest.mark.parametrize("kind", ["on_cpu", "on_cuda"])
def test_changes_are_followed(tmp_path, monkeypatch, kind):
    """After a generation; and between two steps of one, where no change changes the largest logit."""
    module, changes = edited(tmp_path), [c for c in CHANGES if "persimmon" not in c and "Packed" not in c]
    if kind == "on_cpu":
        copied = small_model(set_processor(module, "Zen 4"), 5, hidden_dropout=1.0)
    else:
        copied = small_model(use_cuda(module, monkeypatch), 1, 1, hidden_dropout=1.0).to(DEVICE)
        if DEVICE == "cpu":  # in the interpreter, which is slow: test_cuda_engine_notices_changes has the others
            changes = ["block.train()", "down.weight = nn.Parameter(-down.weight.data)"]
    ids = random_ids(copied.config, 1, 7).to(copied.lm_head.weight.device)
    for change in changes:
        before = logits_of(model := copy.deepcopy(copied), ids, steps=2)
        make_change(model, change, monkeypatch)
        expected = logits_of(model, ids, steps=2, is_plain=True)
        assert distance(expected[0], before[0]) > 1e-2, f"{change} changes nothing"
        assert distance(logits_of(model, ids, steps=2), expected) < 1e-4, f"{change} is not followed"
    head, hooks, found = copied.lm_head, [], []
    changes = {1: lambda: setattr(copied, "fast", False), 4: lambda: setattr(copied, "fast", True),
               2: lambda: hooks.append(head.register_forward_hook(lambda _, __, y: 3 * y)),
               6: lambda: hooks[0].remove(),
               7: lambda: setattr(head, "weight", torch.nn.Parameter(5 * head.weight.detach()))}

    def recorded(logits, *options):
        found.append((logits.clone(), type(copied.engine) is module.Engine))
        changes.get(len(found), bool)()
        return module.sample(logits, *options)

    monkeypatch.setattr(copied, "sample", recorded)
    text = copied.generate(ids, max_new_tokens=10)
    plain = logits_of(copied, text[:, :-1], steps=10, is_plain=True) / 5
    for factor, (logits, _), expected in zip((1, 1, 3, 3, 3, 3, 1, 5, 5, 5), found, plain):
        assert distance(logits, factor * expected) < 1e-4
    assert [is_plain for _, is_plain in found] == [False, True, True, True, *[False] * 6]


def test_a_generation_leaves_the_model_as_it_was(tmp_path):
    """Parameters are ordinary, passes give the same bits, hooks see them, no copy or file holds an engine's table."""
    model, file, seen = wide_model().bfloat16(), tmp_path / "saved.pt", []
    ids, (up, down) = random_ids(model.config, 2, 9), model.model.layers[0].mlp.children()

    def state() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [*(model(x).logits for x in (ids, ids[:1, :1])), *(p.grad.clone() for p in model.parameters())]

    before, names, size = state(), [*model.state_dict()], sum(p.nbytes for p in model.parameters())
    for rows in (1, 2):
        model.generate(ids[:rows], max_new_tokens=3, temperature=1.0)
        assert len(model.engine.tables) == 1 and all(map(torch.equal, state(), before))
    assert [*model.state_dict()] == [name for name, _ in model.named_parameters()] == names
    assert all(type(p) is torch.nn.Parameter and p.is_contiguous() and p.requires_grad for p in model.parameters())
    for part in (model.state_dict(), twin := copy.deepcopy(model), model):
        torch.save(part, file)
        assert size <= file.stat().st_size < size + 2**17  # a table has 2**22 bytes or more
    up.register_forward_hook(lambda _, __, y: seen.append(y))
    down.register_forward_pre_hook(lambda _, x: seen.append(*x))
    answers = [m.generate(ids, max_new_tokens=3).tolist() for m in (model, twin, torch.load(file, weights_only=False))]
    assert answers[0] == answers[1] == answers[2] and [y.shape[1] for y in seen] == [9, 9, 1, 1, 1, 1]
    assert all(torch.equal(y.relu().square(), x) and (y < 0).any() for y, x in zip(seen[::2], seen[1::2]))
    # a copy that another thread makes in the middle of a pass has its own weights, and no table
    twin.model.final_layernorm.register_forward_hook(lambda *_: seen.append(copy.deepcopy(twin)))
    twin.generate(ids[:1], max_new_tokens=3)
    with torch.no_grad():
        for m in (late := seen[-1], plain := copy.deepcopy(model)):
            m.model.layers[0].mlp.dense_4h_to_h.weight.neg_()
        assert torch.equal(late(ids[:1, :1]).logits, plain(ids[:1, :1]).logits)
    late.generate(ids[:1], max_new_tokens=3)
    assert len(late.engine.tables) == 1 and not any("forward" in vars(m) for m in late.modules())


def test_tables(monkeypatch):
    """Not made before the first token is there; with progress; if there is memory; anew after changes."""
    model, fractions = wide_model(2), []
    ids, mlps = random_ids(model.config, 1, 9), [block.mlp for block in model.model.layers]
    first, second = downs = [mlp.dense_4h_to_h for mlp in mlps]
    model.generate(ids.expand(17, 9), max_new_tokens=3)  # more texts than a table is used for
    assert model.engine.tables == {}
    next(run := generate(model, ids, max_new_tokens=4))
    assert model.engine.tables == {} and model.engine.downs == downs
    assert {*model.engine.linears} == {*downs, *(mlp.dense_h_to_4h for mlp in mlps)}  # others are smaller than 4 MB
    with monkeypatch.context() as patch:
        patch.setattr(persimmon, "available_memory", lambda device: 2**24 - 1)  # two times 8 MB are needed
        next(run)
        assert model.engine.tables == {} and model.engine.downs == []
    model.engine.find_linears([*model.modules()])
    model.engine.prepare(fractions.append)
    kept, hook = model.engine.tables[second], first.register_forward_hook(lambda *_: None)
    assert fractions == [0.5, 1.0] and [*model.engine.tables] == downs
    assert kept.rows.is_contiguous() and not kept.rows.requires_grad
    first.weight.data.add_(0.01)
    with torch.no_grad():  # of two tokens' activations, a table is used
        new, old = (kind.prefill(ids[:, :2], None, KVCache(model.config, 1, 2, torch.float32, "cpu"))
                    for kind in (model.engine, Engine(model)))
    assert close(new, old) and [*model.engine.tables] == [second]
    model.generate(ids, max_new_tokens=3)
    assert [*model.engine.tables] == [second]
    hook.remove()
    model.generate(ids, max_new_tokens=2)
    assert torch.equal(model.engine.tables[first].rows, first.weight.t()) and model.engine.tables[second] is kept
    with torch.no_grad():
        model.engine.prefill(ids[:, :8], None, cache := model.engine.make_cache(1, 9))
        for change in ("first.weight = torch.nn.Parameter(-first.weight)", "first.weight.neg_()"):  # between two steps
            exec(change)
            found, _ = model.engine.decode(ids[:, 8:], None, cache), cache.crop(8)
            assert close(found, Engine(model).next_logits(ids[:, 8:], None, cache)), change
            assert torch.equal(model.engine.tables[first].rows, first.weight.t())  # made anew, once for a prompt
            first.weight.data.neg_(), cache.crop(8), model.engine.decode(ids[:, 8:], None, cache)
            assert [*model.engine.tables] == [second]
            model.engine.prefill(ids[:, :8], None, cache := model.engine.make_cache(1, 9))
            model.engine.decode(ids[:, 8:], None, cache), cache.crop(8)
            assert [*model.engine.tables] == [second, first]
            model.engine.find_linears([*model.modules()])
    options = {"max_new_tokens": 10, "temperature": 0.9, "seed": 4}  # two generations at once, by steps or in threads
    prompts = [random_ids(model.config, 1, length) for length in (9, 14)]
    expected = [model.generate(ids, **options).tolist() for ids in prompts]
    for _ in range(3):
        model.fast = True  # the tables are made anew, while both run
        both = zip(*(generate(model, ids, **options) for ids in prompts))
        assert [(*a.tokens, *b.tokens) for a, b in both] == [*zip(*(text[0][-10:] for text in expected))]
        model.fast = True
        with persimmon.ThreadPoolExecutor(2) as pool:
            assert [*pool.map(lambda ids: model.generate(ids, **options).tolist(), prompts)] == expected
    passes = [replaced_forward({model.lm_head: Mock()}) for _ in range(2)]  # as two threads may do it
    [one.__enter__() for one in passes], [one.__exit__(None, None, None) for one in passes]
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_module_of_ones_own_is_not_taken_for_an_mlp():
    """What its second Linear is given need not be mostly zero, although its Linears have the same names."""
    model = wide_model()
    up, down = model.model.layers[0].mlp.children()
    own = torch.nn.Sequential(OrderedDict(dense_h_to_4h=up, gelu=torch.nn.GELU(), dense_4h_to_h=down))
    model.model.layers[0].mlp = own.eval()
    model.generate(random_ids(model.config, 1, 9), max_new_tokens=3)
    assert down in model.engine.linears and model.engine.tables == {}
    assert type(quantize_model(model, "int4").model.layers[0].mlp.dense_4h_to_h) is Int4Linear


# === sample.py =======================================================================================================
GREEDY = ("--temp", "0", "-q", "-n")


@pytest.fixture
def cli(monkeypatch):
    """Runs the command line as a notebook may: in a thread, with any objects as streams; exit code, stdout, stderr."""
    def run(*arguments, stdin=b"", tty=False):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8", "surrogateescape"))
        monkeypatch.setattr("sys.stdout", out := io.StringIO())
        monkeypatch.setattr("sys.stderr", error := Mock(io.StringIO(), isatty=lambda: tty))
        with persimmon.ThreadPoolExecutor(1) as pool:
            code = pool.submit(sample_script.main, ["--device", "cpu", *map(str, arguments)]).result()
        return code, out.getvalue(), "".join(call.args[0] for call in error.write.mock_calls)
    return run


@pytest.fixture
def tiny(monkeypatch):
    """tiny/'s model, which the command line gets, with a short context and `The` as its end; tokenizer; greedy."""
    model, tokenizer = PersimmonForCausalLM.from_pretrained(TINY, "float32"), Tokenizer(TINY)
    model.config = replace(model.config, max_position_embeddings=150, eos_token_id=333)
    monkeypatch.setattr(PersimmonForCausalLM, "from_pretrained", lambda *_, **__: model)

    def greedy(prompt, n, **options):
        ids = tokenizer.encode(prompt, **options)
        steps = list(generate(model, torch.tensor([ids]), max_new_tokens=n))
        new = [step.tokens[0] for step in steps]
        return tokenizer.decode(ids + new), new, [step.logprobs[0] for step in steps]
    return model, tokenizer, greedy


def test_figures_and_progress(cli, tiny, monkeypatch):
    """The second step, which takes 1000 s, does not count. What takes long is prepared before, not for one token."""
    monkeypatch.setattr(sample_script.time, "perf_counter", Mock(side_effect=[0, 1, *range(1001, 2000)]))
    monkeypatch.setattr(CpuEngine, "prepare", lambda self, progress=None: progress and progress(0.5))
    error = cli("--num-samples", 3, "-n", 20, "--ignore-eos", "--json", "--seed", 7, tty=True)[2]
    *notes, figures = error.replace("\x1b[J\x1b7\x1b[?7l", "").split("\x1b[?7h\x1b8")
    assert notes[:3] == ["loading ...", "", "reading 18 tokens ..."]
    assert notes[3:6] + notes[-2:] == ["3 tokens ...", "laying out weights 50%", "6 tokens ...", "60 tokens ...", ""]
    assert re.fullmatch(r"read 18 tokens at 18.0 tok/s, first token after 1.00 s\n"
                        r"wrote 60 at 3.0 tok/s, peak memory \d{1,2}\.\d\d GB, seed 7, ended by length\n", figures)
    other = [cli("-n", *options, tty=True)[2] for options in ([1], [9, "--plain"], [9, "-q"])]
    assert "laying" not in "".join(other) and other[2] == ""


def test_options_and_batches(cli, tiny, monkeypatch, tmp_path):
    (tmp_path / "one").write_text(text := "To be, or not\n")
    for arguments in (["To be, or not"], ["-p", "To be, or not"], ["-f", tmp_path / "one"], ["-", "--plain"]):
        assert cli(*arguments, *GREEDY, 9, stdin=text.encode()) == (0, tiny[2](text[:-1], 9)[0] + "\n", "")
    assert cli("To be", *GREEDY, 9, "--no-bos")[1] == tiny[2]("To be", 9, add_bos=False)[0] + "\n"
    assert cli("-p=-To be", "--stop=-", *GREEDY, 9)[1] == tiny[2]("-To be", 9)[0] + "\n"
    short = "--temp 1.5 --repetition-penalty 1.8 -n 9 --seed 1".split()
    long = "--temperature 1.5 --repeat-penalty 1.8 --max-tokens 9 --seed 1".split()  # as fingers know them
    texts = [cli(*options)[1] for options in (short, long, short[4:], [*short[4:], "--top-k", 1])]
    assert texts[0] == texts[1] and len(set(texts)) == 3 and texts[0].startswith("ROMEO:\n")
    texts = [cli("--seed", 5, "-n", 9, *more)[1] for more in (["--num-samples", 2], [], ["--seed", 6])]
    assert texts[0] == f"{texts[1]}\n---\n\n{texts[2]}"
    run = partial(cli, "--seed", 3, "--ignore-eos")
    assert len(json.loads(run("-n", -1, "--json")[1])["ids"]) == 150 - 6
    free = run("-n", 80, "--stop", "")[1].removesuffix("\n")
    for stop, other in ((free[40:43], "not there"), (free[60:75], free[62:75]), (free[-9:-5], free[-3:])):
        assert run("-n", 80, "--stop", other, "--stop", stop)[1] == free[: free.index(stop, 7)] + "\n"
    assert cli("--seed", 2**63 - 1, "--num-samples", 17, "-n", 1)[0] == 0  # the next row of texts begins at seed 15
    assert cli("-m", shutil.copytree(TINY, tmp_path / "tiny.pt"), *GREEDY, 1)[0] == 0
    monkeypatch.setattr(torch, "set_num_threads", Mock())
    assert cli(*GREEDY, 1)[0] == cli(*GREEDY, 1, "-t", 2)[0] == 0 and torch.set_num_threads.mock_calls == [((2,),)]
    lines = b'\xef\xbb\xbf"JULIET:\\n"\r\n \r\n{"prompt": ""}\r\nTo be\r\n{"no": "prompt"}\r\n[1]\n'
    for _ in range(2):
        lines = cli("--batch", "-", "--json", *GREEDY, 3, stdin=lines)[1].encode()
        answers = [json.loads(line) for line in lines.splitlines()]
        assert [answer["prompt"] for answer in answers] == ["JULIET:\n", "", "To be", '{"no": "prompt"}', "[1]"]
        assert answers[0]["figures"]["tokens"] == sum(len(answer["ids"]) for answer in answers)
        for answer in answers:
            text, ids, logprobs = tiny[2](answer["prompt"], 3)
            assert (answer["prompt"] + answer["text"], answer["ids"]) == (text, ids)
            assert answer["logprobs"] == pytest.approx(logprobs, abs=1e-4)
    assert cli("--batch", "-", "--json", stdin=b"\n \n") == cli("--batch", "-") == (0, "", "")
    answer = json.loads(cli("--batch", "-", "--json", "-n1", stdin=rb'"\ud800"')[1])
    assert answer["prompt"] == r'"\ud800"'  # no text, and so no JSON
    long = tiny[1].decode(tiny[1].encode("word " * 150)[:150])  # which fills the context
    wide = "my lord, " * 20  # not for its 180 characters
    lines = f"To be\n{long}\nTo be\n{wide}".encode()
    code, out, error = cli("--batch", "-", "--json", "--temp=0", "-n3", stdin=lines)
    first, none, last, fits = (json.loads(line) for line in out.splitlines())
    assert none.keys() == first.keys() and (none["finish_reason"], first["ids"]) == ("too long", last["ids"])
    assert "ended by length, too long\n" in error
    assert code == 0 and fits["finish_reason"] == "length"
    assert "ended by too long\n" in cli("--batch", "-", stdin=long.encode())[2]  # nothing else tells of it
    run = partial(cli, "-n3", "--batch=-", "--num-samples=9", "--seed=5", stdin=b"JULIET:\n\nTo be")
    answers = [json.loads(line) for line in run("--json")[1].splitlines()]
    assert [answer["seed"] for answer in answers] == [*range(5, 23)]
    assert run()[1] == "\n---\n\n".join(answer["prompt"] + answer["text"] + "\n" for answer in answers)


def test_how_an_answer_ends(cli, tiny, monkeypatch):
    """At the end of text, unless that is ignored; what may be the start of a stop text is held back."""
    model, tokenizer, greedy = tiny
    model.config = replace(model.config, eos_token_id=greedy("To be", 1)[1][0])
    counts = [len(json.loads(cli("To be", *GREEDY, 5, "--json", *o)[1])["ids"]) for o in ([], ["--ignore-eos"])]
    assert counts == [1, 5]
    for reason, is_chat, shown in ((None, False, "pa"), ("length", False, "pa\n\nhum"), ("length", True, "a"),
                                   ("stop", True, "a\n\nhum")):
        answer = SimpleNamespace(prompt="p", text="a\n\nhum", finish_reason=reason)
        assert sample_script.visible(answer, SimpleNamespace(stop=["\n\nhuman:"], chat=is_chat)) == shown
    ids = tokenizer.encode("日本", add_bos=False)[:-1]  # bytes, of which the last one is missing
    steps = [persimmon.Step([i], [0.0], [None]) for i in ids]
    steps[-1].finish_reasons[0] = "length"
    monkeypatch.setattr(persimmon, "generate", lambda *_, **__: iter(steps))
    assert cli("To be")[1] == tokenizer.decode(tokenizer.encode("To be") + ids) + "\n" and len(ids) > 4


@pytest.mark.parametrize("arguments, message", [
    ("-m /nowhere", "there is no folder /nowhere"), ("--temp hot", "invalid float value: 'hot'"),
    ("--what --not", "--what is no option"), ("-n 0", "--max-new-tokens 0 is not"),
    ("--top-p 2 --chat", "top_p = 2.0 is out"), ("--seed -1", "seed = -1 is"), ("-c -3", "--ctx-size -3 is not"),
    ("--num-samples 0", "--num-samples 0 is not"), ("-t 99999", "--threads 99999 is not above 0 and up to 4096"),
    ("--density 0", "--density 0.0 is not"), ("--quantize int3", "'int3'"), ("--dtype int8", "int8 is not supported"),
    ("--device abacus", "--device abacus is not available on this machine"), ("-n " + "9" * 5000, "invalid int value"),
    ("a --chat", "only one"), ("a -p b", "only one"), ("-f a --batch b", "only one"),
    ("a b", "b is no option (see --help); a prompt of words needs quotes"),
    ("--chat --json", "none of"), ("--chat --num-samples 2", "none of"), ("--chat --random 8b", "none of"),
    ("--random 7b", "is no shape"), ("--random 8b:x", "is no shape"), ("--dtype int8 --random 8b:1", "int8 is not"),
    ("-f /nowhere", "No such file"), ("-p", "expected one argument"), ("-m .ci", "no file .ci/tokenizer.model"),
    ("-f /dev/null --no-bos", "is (1, 0)"), ("--what=4", "--what=4 is no option"),
    ("-m x.tar", "there is no folder x.tar: to make one of Adept's weights, run `python convert.py x.tar x-safetensors`"),
    ("--batch=", "Is a directory"), ("-f=", "Is a"),
    ("-m adept/8b", "run `hf download adept/8b --local-dir adept/8b` and `python convert.py adept/8b 8b-safetensors`"),
    ("-", "the prompt is not UTF-8: invalid start byte at byte 1"), ("a" * 9000, "fills the context of 1024")])
def test_errors(cli, arguments, message, monkeypatch):
    monkeypatch.chdir(HERE)
    code, _, error = cli(*arguments.split(), stdin=b"a\xff")
    assert code == 2 and message in error and len(error) < 400 and re.fullmatch("sample.py: error: .*\n", error)


def test_a_classifier_can_not_write(cli, tmp_path):
    OfText(replace(load_config(TINY), num_hidden_layers=1)).save_pretrained(tmp_path / "scores")
    shutil.copy(TINY / "tokenizer.model", tmp_path / "scores")
    code, _, error = cli("-m", tmp_path / "scores")
    assert code == 2 and error.startswith(f"sample.py: error: {tmp_path}/scores has no lm_head.weight")
    assert convert.main([str(tmp_path / "scores"), str(tmp_path / "small"), "--dtype", "float16"]) == 0
    assert "parameters" in (out := sys.stdout.getvalue()) and "sample.py" not in out  # cli's stream


def test_interrupts_and_lack_of_memory(cli, monkeypatch):
    """PyTorch raises RuntimeErrors where memory is out, and for what is a bug. After Ctrl-C nothing more is begun."""
    late = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    late.__context__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(sample_script, "write", Mock(side_effect=[
        late, MemoryError(), RuntimeError("can't allocate memory: 8 bytes"), KeyboardInterrupt,
        [SimpleNamespace(finish_reason="Ctrl-C")], torch.AcceleratorError("CUDA error: illegal access")]))
    assert all(cli("hi")[2].startswith("sample.py: error: out of memory: ") for _ in range(3))
    assert cli("hi") == cli("hi", "--num-samples", 17, "--json") == (130, "", "")
    refuses("illegal", cli, "hi", error=RuntimeError)
    monkeypatch.setattr(sample_script, "load", Mock(side_effect=KeyboardInterrupt))
    assert cli("hi", tty=True) == (130, "", "\x1b[J")  # which wipes a note


def test_random_weights(cli, monkeypatch):
    config = replace(load_config(TINY), num_hidden_layers=3, intermediate_size=1024, eos_token_id=None)
    monkeypatch.setattr(persimmon, "PersimmonConfig", lambda num_hidden_layers: config)
    for density, quantize in ((0.1, None), (0.3, "int8")):
        done, counts = [], []
        model = random_model(3, density, "float32", "cpu", quantize, done.append)
        assert isinstance(model.lm_head, Int8Linear) == (quantize is not None)
        for block in model.model.layers:
            block.mlp.dense_4h_to_h.register_forward_pre_hook(lambda _, x: counts.append((x[0] != 0).float().mean()))
        model.generate(torch.arange(40)[None], max_new_tokens=9)
        assert torch.stack(counts).mean().item() == pytest.approx(density, abs=0.05) and done[-1] == 1
    assert len(random_model(3, 0.5, "float32", "cpu").model.layers) == 3
    assert cli("hello", "--random", "8b:3", "-n", 4)[:2] == (0, "") and config.quantization is None


def test_as_programs(tmp_path):
    """Ctrl-C while torch is imported; help and errors, which do not need it; closed streams; no slow imports."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)")
    code = ("import runpy, sys; sys.argv[1:] = '-n 3 --device cpu'.split()\ntry: runpy.run_path('sample.py', "
            "run_name='__main__')\nfinally: assert not {'torch._dynamo', 'triton'} & sys.modules.keys()")
    for words, path, status, error in (
            ("sample.py", tmp_path, 130, ""), ("convert.py a b", tmp_path, 130, ""),
            ("sample.py --help", tmp_path, 0, ""), ("-I -S convert.py --help", "", 0, ""),
            ("sample.py --what", tmp_path, 2, "sample.py: error: --what is .*\n"),
            ("sample.py --chat -n1 -q --device cpu <<< $'\\xff'", "", 0, r"\(the text is not valid Unicode\)\n"),
            ("sample.py >&-", tmp_path, 2, "sample.py: error: .* is closed\n"), ('-c "$1" <&- 2>&-', "", 0, ""),
            ("sample.py -n 900 --ignore-eos --device cpu | head -c 30", "", 128 + signal.SIGPIPE, ""),
            (f"convert.py tiny {tmp_path}/out | true", "", 128 + signal.SIGPIPE, ""),
            ("-I -S convert.py a b", "", 2, "convert.py: error: torch is not installed: .*\n"),
            ("-I -S convert.py a", "", 2, "convert.py: error: .*OUTPUT.*\n")):
        command = ["bash", "-o", "pipefail", "-c", f'exec "$0" {words}', sys.executable, code]
        env = {**os.environ, "PYTHONPATH": str(path), "RANK": "7", "PYTHONIOENCODING": "ascii"}  # RANK: a scheduler's
        result = subprocess.run(command, cwd=HERE, capture_output=True, env=env)
        assert result.returncode == status and re.fullmatch(error, result.stderr.decode()), words
        if words == "sample.py --help":  # it is short and tells the defaults
            lines = result.stdout.decode().split("\n")
            assert len(lines) <= 48 and max(map(len, lines)) <= 80 and r"$'ROMEO:\n'" in "".join(lines)
            rows = itertools.chain(*(group.values() for group in sample_script.OPTIONS.values()))
            defaults = [f"{row[1]:g}" for row in rows if row[0] in (int, float) and row[1] is not None]
            assert re.findall(r"\[([\d.]+)\]", "".join(lines)) == defaults
    assert len(os.listdir(tmp_path / "out")) == 5  # whoever reads what is said


def test_chat_reads_what_is_new_and_answers_as_a_fresh_run(cli, tiny, monkeypatch):
    """Also where its cache, whose memory holds NaN, has to grow: in the second turn."""
    monkeypatch.setattr(CpuEngine, "make_cache", lambda self, rows, N, _=None: (
        sizes.append(N), new_cache(self.model.config, rows, N))[1])
    out, turns, reads, known, greedy, sizes, needs = "", [], [], [], tiny[2], [], []
    questions = ["Who are you, that speak to the king?", "What is\nyour name" + ", my lord" * 9]
    questions.append(questions[0])  # of which all is known but the last token
    lines = "{}\n{}\n\n /reset \n{}\n/exit\nnot read".format(*(line.replace("\n", "\\\n") for line in questions))
    found = cli("--chat", *GREEDY[:2], "-n", "20", stdin=lines.encode())
    made, sizes = sizes, []
    for n, question in enumerate(questions):
        turns = [*turns, question] if n < 2 else [question]
        text, new, _ = greedy(prompt := chat_prompt(turns), 20)
        turns.append(text[len(prompt) :].split("\n\nhuman:")[0].strip())
        out, ids = out + turns[-1] + "\n", tiny[1].encode(prompt)
        reads.append(str(len(ids) - len(os.path.commonprefix([known, ids[:-1]]))))
        needs.append(len(ids) + 20)
        known = ids + new
    assert found[:2] == (0, out) and "(forgotten)" in found[2] and int(reads[1]) < 60
    assert made == [1, 2 * needs[0], 150] and needs[1] > made[1]  # twice what is needed, up to the context
    assert re.findall(r"read (\d+) tokens", found[2]) == reads


def test_chat_with_a_full_context(cli, monkeypatch):
    """The oldest turns go; a turn that is too long changes nothing; of `human:` no half is left at the end."""
    answer, prompts = SimpleNamespace(text=" Ay.\n\nhum", prompt="", finish_reason="context", ids=[1, 2]), []
    monkeypatch.setattr(sample_script, "write", lambda model, new, *_: prompts.extend(new) or (
        alive.append(len({*caches})) or [answer]))
    make, caches, sizes, alive = CpuEngine.make_cache, weakref.WeakSet(), [], []
    monkeypatch.setattr(CpuEngine, "make_cache", lambda self, rows, N: (
        sizes.append(N), cache := make(self, rows, N), caches.add(cache))[1])
    both, last = chat_prompt(["Who?", "Ay.", "Why?"]), chat_prompt(["Why?"])
    need = len(Tokenizer(TINY).encode(both))
    most = next(limit for limit in range(need, 999) if need + limit // 4 <= limit)
    for limit, n, expected in ((need + 5, 5, both), (need + 4, 5, last), (most, 200, both), (most - 1, 200, last)):
        code, _, error = cli("--chat", "-c", limit, "-n", n, stdin=b"Who?\n" + b"word " * 99 + b"\n\xff\nWhy?\\")
        assert code == 0 and (prompts.pop(0), prompts.pop(0), prompts) == (chat_prompt(["Who?"]), expected, [])
        assert sizes[0] == 1 and max(sizes) <= limit and (n == 5 or sizes[1:] == [limit]) and {*alive} == {1}
        sizes.clear()
        assert ("is full: 1 answers are dropped" in error) == (expected == last) and "not valid Unicode" in error
        assert re.search(rf"\(that is too long: \d+ tokens, and the context is {limit}\)", error)


WIPED = r"\x1b\[J\x1b7\x1b\[\?7l\x1b\[\?7h\x1b8"  # an empty note


def test_chat_in_a_terminal():
    """Commands, a pasted text of two lines, one above 4096 bytes, Ctrl-C twice, Ctrl-D; notes are wiped."""
    command = [sys.executable, HERE / "sample.py", *"--chat -n 900 --ignore-eos --device cpu --temp 3 --seed 4".split()]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, command, {**os.environ, "TERM": "xterm"})
    screen = ""
    for typed, pattern in (
        ("", rf"loading \.\.\..*{WIPED}.*\(/help, /reset forgets, /exit leaves.*\)\r\n.*> "),
        ("/what now\r", r"\(there is no /what: /help lists what there is\).*> "),
        ("\x1b[200~Speak,\nspeak.\x1b[201~\r", rf"reading 23 tokens \.\.\.\x1b\[\?7h\x1b8{WIPED}.*[^\x1b]{{3}}"),
        ("\x03", r"read 23 tokens at [\d.]+ tok/s.*ended by Ctrl-C.*> "),
        ("x" * 5000 + "\r", r"\(that is too long: 5\d\d\d tokens.*> "), ("Speak, \\\r", "\n.*  "),
        ("speak.\r", r"reading \d+ tokens.*\x1b8.*[^\x1b]{3}"), ("\x03", "ended by Ctrl-C.*> "),
        ("\x03", r"\(/exit leaves\).*> "), ("\x04", "\n")):
        time.sleep(0.5 * (typed in "\x03\x04"))  # a Ctrl-C before readline waits for input would be lost
        while typed:  # a terminal takes a part of what is long
            typed = typed[os.write(terminal, typed.encode()) :]
        while not (found := re.search(pattern, screen, re.DOTALL)):
            assert select.select([terminal], [], [], 60)[0], f"no {pattern!r} in {screen!r}"
            screen += os.read(terminal, 4096).decode(errors="replace")
        screen = screen[found.end() :]
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# === convert.py ======================================================================================================
RELEASE = PersimmonConfig(400, 48, 80, 3, 3, 160, hidden_dropout=0.1)


def release_pickle(weights: dict, args: dict, **extra) -> dict:
    """What is in Adept's model_optim_rng.pt: nested and dotted keys mixed, args, numbers and states of the training."""
    encoder = {f"layers.{n}.self_attention.rotary_emb.inv_freq": torch.ones(4) for n in range(3)}
    encoder |= {name.removeprefix("model.").replace("self_attn", "self_attention"): tensor
                for name, tensor in weights.items() if "layer" in name}
    model = {"language_model.embedding": {"word_embeddings": {"weight": weights["model.embed_tokens.weight"]}},
             "language_model": {"encoder": encoder}, "word_embeddings_for_head.weight": weights["lm_head.weight"]}
    values = {
        "num_layers": 3, "hidden_size": 48, "kv_channels": 16, "ffn_hidden_size": 80, "num_attention_heads": 3,
        "rotary_pct": 0.5, "rotary_emb_base": 25000, "layernorm_epsilon": 1e-5, "padded_vocab_size": 400,
        "max_position_embeddings": 160, "qk_layernorm": "weights_per_layer", "sq_relu": True, "untie_embeddings": True,
        "pos_emb": "rotary", "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "hidden_dropout": 0.1,
        "attention_dropout": 0.0, "init_method_std": 0.02, "params_dtype": torch.bfloat16, "signal": signal.SIGINT}
    args = argparse.Namespace(**{name: value for name, value in (values | args).items() if value != "absent"})
    states = [random.getstate(), numpy.random.get_state(), torch.get_rng_state(), partial(max), Counter("ab")]
    return {"args": args, "checkpoint_version": 3.0, "model": model, "rng_state": states, **extra}


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    return randomize(PersimmonForCausalLM(RELEASE)).bfloat16().state_dict()


@pytest.fixture
def make(tmp_path, weights, tokenizers):
    """Makes sources in tmp_path, each anew: a tar as Adept made it, and a folder as on the hub."""
    vocabulary = next(oracle.serialized_model_proto() for _, oracle, end in tokenizers if end == 3)

    def tar(args={}, tensors={}, members={}, name="release", **extra) -> Path:
        torch.save(release_pickle({**weights, **tensors}, args, **extra), pickled := io.BytesIO())
        contents = {"latest_checkpointed_iteration.txt": b"1251\n", "adept_vocab.model": vocabulary,
                    "iter_0001251/mp_rank_00/model_optim_rng.pt": pickled.getvalue(), **members}
        with tarfile.open(tmp_path / f"{name}.tar", "w") as opened:
            for member, data in contents.items():
                info = tarfile.TarInfo(f"8b_chat_model_release/{member}")
                info.size = len(data)
                opened.addfile(info, io.BytesIO(data))
        return tmp_path / f"{name}.tar"

    def hub(*contents, name="hub") -> Path:
        shutil.rmtree(folder := tmp_path / name, ignore_errors=True)
        folder.mkdir()
        write_config(folder, RELEASE)
        (folder / "tokenizer.model").write_bytes(vocabulary)
        files = {f"pytorch_model{n or ''}.bin": content for n, content in enumerate(contents or [weights])}
        for file, content in files.items():
            torch.save(content, folder / file)
        if len(files) > 1:
            places = {name: file for file, content in files.items() for name in content}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
        return folder
    return SimpleNamespace(tar=tar, hub=hub)


def converted(*arguments: str | Path) -> int:
    return convert.main([str(argument) for argument in arguments])


@pytest.fixture
def refused(tmp_path, capsys):
    """Asserts that convert.py answers with one sentence and exit code 2 and leaves no trace in tmp_path."""
    def check(message: str, *arguments: str | Path) -> None:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert converted(*arguments) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.startswith("convert.py: error: "), error
        assert error.count("\n") == 1 and len(error) < 600 and sorted(tmp_path.rglob("*")) == before
    return check


@pytest.mark.parametrize("kind", ["tar", "unpacked", "pt", "hub", "thirds"])
def test_convert(tmp_path, make, weights, kind, capsys):
    """Also a matrix that is turned, and a bias at the end of a record larger than all headers may be."""
    out, folder = tmp_path / "out", tmp_path / "8b_chat_model_release"
    matrix, bias = "lm_head.weight", "model.final_layernorm.bias"
    tensors = {**weights, matrix: torch.nn.Parameter(weights[matrix].t().contiguous()).t(),
               bias: torch.nn.Parameter(torch.cat((torch.ones(2 * convert.SMALL).bfloat16(), weights[bias]))[-48:])}
    with tarfile.open(make.tar(tensors=tensors)) as opened:
        opened.extractall(tmp_path, filter="data")
    with torch.utils.serialization.config.patch({"save.storage_alignment": 1}):  # values begin at odd places
        thirds = make.hub(*(dict([*tensors.items()][n::3]) for n in range(3)), name="thirds")
        source = {"tar": [tmp_path / "release.tar"], "unpacked": [folder], "hub": [make.hub(tensors)],
                  "thirds": [thirds], "pt": [*folder.rglob("*.pt"), "--tokenizer", folder / "adept_vocab.model"]}[kind]
    assert converted(*source, out) == 0
    said = capsys.readouterr()
    assert re.fullmatch(r"90,912 parameters, 0.00 GB\npython sample.py --model .*/out\n", said.out) and said.err == ""
    ids = {} if kind in ("hub", "thirds") else {"bos_token_id": 3, "eos_token_id": 3}  # which a release does not name
    assert is_saved(weights, out) and load_config(out) == replace(RELEASE, dtype="bfloat16", **ids)
    assert json.loads((out / TOKENIZER).read_text()) == {
        "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "eos_token": None, "bos_token": "|ENDOFTEXT|",
        "add_bos_token": True, "add_eos_token": False, "model_max_length": 160}
    assert Tokenizer(out).end_of_text == 3 and {*os.listdir(out)} == {*SAVED, "tokenizer.model", TOKENIZER}


@pytest.mark.parametrize("kind, dtype, head", [("int8", "bfloat16", HEADS[0]), ("int4", "float32", OfToken)])
@pytest.mark.filterwarnings("ignore:.* has no score")
def test_convert_quantizes(tmp_path, refused, kind, dtype, head):
    """All but a classifier's head. SOURCE is of a save_pretrained killed in the end, with transformers 5's files."""
    source, out, options = tmp_path / "model", tmp_path / "out", ["--quantize", kind, "--group-size", "64"]
    (model := head.from_pretrained(TINY, num_labels=3)).save_pretrained(complete := source / ".complete")
    (complete / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    change_tensors(complete / WHOLE, **{"model.rotary_emb.inv_freq": torch.ones(4)})
    for name in (files := ("tokenizer.json", TOKENIZER)):
        (complete / name).write_text('{"add_bos_token": false}')
    assert converted(source, out, *options, "--dtype", dtype) == 0
    expected = quantize_model(model.to(getattr(torch, dtype)), kind, 64)
    assert (model := head.from_pretrained(out)).config == replace(
        expected.config, eos_token_id=[7, 8], dtype=dtype, quantization={"quantize": kind, "group_size": 64})
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert [(out / name).read_bytes() for name in files] == [(source / name).read_bytes() for name in files]
    refused(f"{out} is quantized already: start", out, tmp_path / "no")
    assert converted(source, out, *options, "--force", "--tokenizer", TINY / "tokenizer.model") == 0
    change_tensors(source / WHOLE, **{"model.final_layernorm.bias": torch.ones(256, dtype=torch.int8)})
    refused("model is damaged or not .*dtype int8 is not supported", source, tmp_path / "no", "--dtype", "bfloat16")
    assert not (out / "tokenizer.json").exists()  # which is of another tokenizer


def test_convert_reads_args_and_tensors(tmp_path, make, weights, refused, monkeypatch):
    """What is not supported, doesn't fit or is no number; then, args without what is of training, without QK-norm."""
    name, out = "model.layers.1.mlp.dense_4h_to_h", tmp_path / "out"
    for arg, value, message in (
        ("qk_layernorm", "weights_per_attention_head_and_layer", r"not supported, only \('weights_per_l"),
        ("sq_relu", False, r"args.sq_relu that are not supported, only \(True,\)"), ("kv_channels", 32, "kv_channels"),
        ("tensor_model_parallel_size", 2, "args.tensor_model_parallel_size"), ("pos_emb", torch.ones(3), "release.tar"),
        ("pipeline_model_parallel_size", 2, "pipeline"), ("untie_embeddings", False, "untie_embeddings"),
        ("rotary_pct", "absent", "no args.rotary_pct"), ("hidden_size", "x", "config key .* is not of type"),
        ("hidden_size", torch.ones(2), "no args.hidden_size, or one that is no number"),
        ("hidden_dropout", torch.ones(2), "no args.hidden_dropout, or one that is no number"),
        ("num_attention_heads", 0, "num_attention_heads = 0 is not from 1"),
        ("ffn_hidden_size", 96, r"weight is \(48, 80\), and its config makes it \(48, 96\)"),
        ("num_layers", 4, "layers.3.* is missing, and its"), ("num_layers", 2, "layers.2.* makes it no tensor"),
        ("qk_layernorm", "none", "model.layers.0.self_attn.k_layernorm.* makes it no tensor")):
        refused(message, make.tar({arg: value}), out)
    matrix = weights[f"{name}.weight"]
    nan, inf, large = (matrix.index_fill(0, torch.tensor(7), x) for x in (math.nan, -math.inf, 70000.0))
    for value, message, *options in (
        (nan, "NaN, infinite or"), (inf, "NaN, infinite or"), (inf, "not finite", "--quantize", "int8"),
        (large, "NaN, infinite or", "--dtype", "float16"), (matrix.char(), "torch CharStorage"),
        ("text", "AttributeError"), (torch._neg_view(matrix), "not a plain tensor")):
        refused(f"{name}.*{message}", make.tar(tensors={f"{name}.weight": value}), out, *options)
    small = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), weights["lm_head.weight"][:100].clone())
    refused("the tokenizer of .* has more pieces than the 100", make.tar({"padded_vocab_size": 100}, small), out)
    refused("has 2 files model_optim_rng.pt", make.tar(members={"iter_1/model_optim_rng.pt": b""}), out)
    refused("has 2 files adept_vocab.model", both := make.tar(members={"x/adept_vocab.model": b""}), out)
    assert converted(both, out, "--tokenizer", make.hub() / "tokenizer.model", "--dry-run") == 0
    for name in [name for name in weights if re.search("[qk]_layernorm", name)]:
        monkeypatch.delitem(weights, name)
    absent = dict.fromkeys(("hidden_dropout", "attention_dropout", "init_method_std"), "absent")
    assert converted(make.tar({**absent, "qk_layernorm": "none"}), out) == 0
    config = replace(RELEASE, hidden_dropout=0.0, qk_layernorm=False, bos_token_id=3, eos_token_id=3, dtype="bfloat16")
    assert load_config(out) == config


def test_convert_refuses_a_source(tmp_path, make, weights, refused, monkeypatch):
    """What is no archive, lacks a part or is not Adept's; names that are there twice; a full disk."""
    good, out, head = make.tar(name="good"), tmp_path / "out", weights["lm_head.weight"]
    release, index, no_kind = good.read_bytes(), "hub/pytorch_model.bin.index.json", "is cut off, damaged or no"
    torch.save(release_pickle(weights, {}), alone := io.BytesIO())
    for file, content, message, *options in (
        ("cut.tar", release[:200_000], "cut.tar"), ("text.pt", b"hello", f"text.pt {no_kind}"),
        ("release.tar.gz", gzip.compress(release), f"release.tar.gz {no_kind}"),
        ("alone.pt", alone.getvalue(), r"error: \S*alone.pt comes without its tokenizer: name one with"),
        ("good.tar", release, rf"error: \S*text.pt {no_kind}", "--tokenizer", tmp_path / "text.pt"),
        ("good.tar", release, r"error: there is no file \S*none", "--tokenizer", tmp_path / "none"),
        ("good.tar", release, "the MD5 of Adept's", "--verify"), ("hub/x", b"", "hub is not Adept's .tar", "--verify"),
        (index, b"{}", "hub"), (index, b'{"weight_map": {"a": 1}}', "hub"), (index, b"{nope", "hub"),
        (index, b'{"weight_map": {"a": "pytorch_model.bin", "x": "gone.bin"}}', "hub"),
        (f"hub/{TOKENIZER}", b"{nope", f"hub/{TOKENIZER} is not valid JSON", "--dry-run"),
        ("hub/pytorch_model.bin", LFS, "/pytorch_model.bin is a pointer of Git LFS"),
        ("hub/config.json", b'{"architectures": 5}', "hub is damaged"),
        ("hub/config.json", b'{"hidden_size": 268435456, "num_hidden_layers": 3}', "makes it .262144, 268435456"),
        *(("hub/config.json", b'{"architectures": %s}' % names, "hub has an architecture")
          for names in (b"[5]", b'"Persimmon"', b'["PersimmonConfig"]'))):
        make.hub()
        (tmp_path / file).write_bytes(content)
        refused(message, tmp_path / Path(file).parts[0], out, *options)
    for message, *contents in (
        ("hub", 5), ("hub", {"lm_head.weight": 5}), ("hub.*gate", {**weights, "model.layers.0.mlp.gate.weight": head}),
        ("model.norm.bias .*there are two", {"model": {"norm.bias": head}, "model.norm.bias": head}),
        ("lm_head.weight .*there are two", weights, {"lm_head.weight": head})):
        refused(message, make.hub(*contents), out)
    refused("there is no .*nothing", tmp_path / "nothing", out)
    refused("No such file", tmp_path / "nothing", out, "--verify")
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")):
        with monkeypatch.context() as patch:
            patch.setattr(zipfile.ZipExtFile, "readinto", Mock(side_effect=error))
            refused(r"good.tar needs more memory than there is\n", good, out)
    refused("no .*config.json", tmp_path, tmp_path.with_name("out"))
    monkeypatch.setattr(convert, "MD5", [hashlib.md5(release).hexdigest()])
    assert converted(good, out, "--verify", "--dry-run") == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    refused("GB free, of .* needed", good, out)


def test_nothing_in_a_pickle_is_executed(tmp_path, make, weights):
    class Evil(tuple):
        """A pickle of this calls its first element with the others when it is loaded."""
        def __reduce__(self):
            return self[0], self[1:]

    trace, out = tmp_path / "trace", tmp_path / "out"
    for attack in (Evil((os.system, f"touch {trace}")), Evil((list, [Evil((os.mkdir, str(trace)))]))):
        for code, changes in ((0, {"args": {"evil": attack}}), (0, {"rng_state": [attack]}), (2, {"model": attack}),
                              (2, {"model": {"a": attack}}), (2, {})):
            source = make.tar(**changes) if changes else make.hub({**weights, "x": attack})
            assert converted(source, out) == code and not trace.exists() and out.exists() == (code == 0)
            shutil.rmtree(out, ignore_errors=True)


def test_attacks(tmp_path, make, refused):
    """Pickles, dicts in circles, headers that claim what is not there: each ends in one sentence, in 30 s and 1 GB."""
    tree, circle, many = {}, {}, [0]
    circle["a"] = circle
    for _ in range(40):  # 2**40 paths, and as many numbers, if they are printed
        tree, many = {"a": tree, "b": tree}, [many, many]
    sources = [make.hub(tree, name="tree"), make.hub({"b": circle}, name="circle"), make.hub(name="pipe")]
    sources += [make.tar({name: many}, name=name) for name in ("sq_relu", "hidden_size")]
    (tmp_path / "pipe" / "pytorch_model.bin").unlink()
    os.mkfifo(tmp_path / "pipe" / "pytorch_model.bin")
    pickles = [b"", *(b"\x80\x02" + pickled for pickled in (
        b"})" + b"\x85" * 300_000 + b"K\x01s.", b"]q\0" + b"h\0a" * 400_000 + b".",  # tuples as a key; a growing list
        b"}(" + b"".join(b"\x8a\x0b%bN" % (n * (2**61 - 1)).to_bytes(11, "little") for n in range(1, 90_000)) + b"u.",
        b"(" + b"}" * 900_000 + b"t.", b"(K\x01K\x02i__main__\nx\n.", b"a.",  # many dicts; an opcode; an empty stack
        b"}", b"X\xff\xff\xff\xff.", b"N0" * 2_500_000 + b".",  # no end; a huge size; more than 4 MB
        b"NNR.", b"K\x01)R.",  # calls of no name, of a number; last, dicts in dicts
        b"}X\x01\0\0\0a" * 200_000 + b"N" + b"s" * 200_000 + b"."))]
    for name, data in (*(("data.pkl", data) for data in pickles), ("byteorder", b"little")):
        sources.append(tmp_path / f"attack{len(sources)}.pt")
        with zipfile.ZipFile(sources[-1], "w") as archive:
            archive.writestr(f"x/{name}", data), archive.writestr("x/version", b"3")
            if name == "byteorder":
                archive.infolist()[0].file_size = archive.infolist()[0].compress_size = 2**32
                archive.start_dir += 2**32  # the rest of the record is a hole in the file
    member = tarfile.TarInfo("8b/adept_vocab.model")
    member.pax_headers = {"GNU.sparse.size": f"{2**31}", "GNU.sparse.map": "0,9"}  # which GNU_FORMAT does not store
    for member.type, member.size, form in itertools.product(
            (b"x", b"L", b"S", b"0"), (2**31 + 512, 2**62, -512), (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        sources.append(tmp_path / f"attack{len(sources)}.tar")
        sources[-1].write_bytes(member.tobuf(form))
        os.truncate(sources[-1], 2**31 + 4096)
    for source in sources:
        start, peak = time.monotonic(), peak_memory(False)
        refused(re.escape(str(source)), source, tmp_path / "out")
        assert time.monotonic() - start < 30 and peak_memory(False) < peak + 1e9, source


def test_damaged_archives(tmp_path, make, weights, refused):
    """Encryption, a version, methods, places and sizes that are not there; another byte order; flipped bits."""
    local, central, end64 = b"PK\3\4", b"PK\1\2", b"PK\6\6"
    file, out = make.hub() / "pytorch_model.bin", tmp_path / "out"
    good, head = file.read_bytes(), weights["lm_head.weight"].view(torch.uint8).numpy().tobytes()
    for signature, offset, value in (
        (central, 8, b"\1"), (central, 6, b"\xff"), (central, 10, b"\x08"), (local, 26, b"\xff\xff"), (local, 0, b"X"),
        (central, 42, b"\xff\xff\xff\x7f"), (end64, 40, b"\xff" * 7), (central, 20, b"\0\0\0\xf0" * 2)):
        parts = re.split(b"(?=%s)" % re.escape(signature), good)
        file.write_bytes(parts[0] + b"".join(x[:offset] + value + x[offset + len(value) :] for x in parts[1:]))
        refused("pytorch_model.bin", file.parent, out)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/byteorder", b"big")
    refused("pytorch_model.bin .*big-endian", file.parent, out)
    for old, options in ((head, []), (head, ["--quantize", "int8"]), (b"lm_head", [])):
        file.write_bytes(good.replace(old, bytes([old[0] ^ 1]) + old[1:]))
        refused("pytorch_model.bin is .*Bad CRC-32 for file .*data", file.parent, out, *options)
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):  # of the latter, 5 KB took 8 GB and half a minute
        with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                new.writestr(name, old.read(name), method if name.endswith("byteorder") else None)
        refused("pytorch_model.bin .*it is compressed", file.parent, out)


def test_convert_refuses_an_output(tmp_path, refused, monkeypatch):
    model, mine = Path(shutil.copytree(TINY, tmp_path / "tiny")), tmp_path / "mine"
    monkeypatch.setattr(convert, "read_source", lambda *_: pytest.fail("it was read"))  # before that
    (tmp_path / "link").symlink_to(model)
    for folder in (mine, tmp_path / "out.unfinished"):
        folder.mkdir()
        refused(f"{folder.name} exists: give another name, or --force", model, folder)
        (folder / "thesis.tex").write_text("x")
    for source, out, message in (
            (model, tmp_path, "is or holds the source"), (tmp_path / "link", model, "is or holds the source"),
            (model, tmp_path / ("x" * 250), "File name too long"), (model, mine / "thesis.tex", "Not a directory"),
            (model, mine / "thesis.tex" / "x", "Not a directory"), (model, "/proc/out", "No such file or directory"),
            (model, mine, "is not a model's folder: --force does not"), (model, tmp_path / "out", "unfinished is in"),
            (model, tmp_path / os.fsdecode(b"\xff"), "udcff' is not UTF-8")):
        refused(message, source, out, "--force")


def test_convert_into_a_folder(tmp_path, make, weights, monkeypatch):
    """--dry-run leaves no trace, nor do files of a tar whose names lead out of it; progress is shown in a terminal."""
    tar, out, volume = make.tar(members={"../../x": b"", "/../../../x": b""}), tmp_path / "a" / "b", tmp_path / "volume"
    assert converted(tar, out, "--dry-run") == 0 and os.listdir(tmp_path) == ["release.tar"]
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO()), monkeypatch.setattr(convert, "PIECE", 1 << 20)
    terminal.isatty = lambda: True
    assert converted(TINY, out, "--dtype", "float32") == 0
    done = re.findall(r"\rwriting (\S+) of 0.02 GB\x1b\[K", terminal.getvalue())
    assert len(done) > 8 and done == sorted(done) and done[0] == "0.00" and done[-1] == "0.02"
    (out / "model-00001-of-00002.safetensors").write_text("of a model that was here before")
    (link := tmp_path / "link").symlink_to(out)
    assert converted(tar, link, "--force", "--dry-run") == 0 and load_config(out).vocab_size == 1024
    assert converted(tar, link, "--force") == 0 and link.is_symlink()
    assert is_saved(weights, out) and len(list(out.glob("*.safetensors"))) == 1
    for left_over in ("lost+found", ".unfinished/new", ".complete"):  # a new file system, and what a killed run left
        (volume / left_over).mkdir(parents=True)
    assert converted(tar, volume, "--force", "--dtype", "float32") == 0
    assert is_saved({name: tensor.float() for name, tensor in weights.items()}, volume)
    assert {*os.listdir(volume)} == {"lost+found", *os.listdir(out)}
    # an output that another program makes meanwhile stays
    monkeypatch.setattr(convert, "write_folder", lambda *_: shutil.copytree(TINY, tmp_path / "new"))
    assert converted(tar, tmp_path / "new", "--force") == 2 and not [*tmp_path.glob("new?*"), *tmp_path.rglob("x")]
    assert sorted(os.listdir(tmp_path / "new")) == sorted(os.listdir(TINY))


def test_convert_that_is_stopped(tmp_path, refused):
    """Ctrl-C and kill -9 leave no OUTPUT; meanwhile, another process can't write it. The next run succeeds."""
    out, hanging = tmp_path / "out", "import convert, signal, sys, time\n" \
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # as convert.py does\n" \
        "convert.Progress.count = lambda _, x: (print('writing', flush=True) or time.sleep(60) for _ in x)\n" \
        "sys.exit(convert.main(sys.argv[1:]))"
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen([sys.executable, "-c", hanging, TINY, out], cwd=HERE, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        next(line for line in process.stdout if line == "writing\n")
        if number == signal.SIGKILL:
            refused("another process is writing .*out", TINY, out, "--force")
        process.send_signal(number)
        assert process.communicate(timeout=50)[1] == "" and process.returncode == code and not out.exists()
        assert [*tmp_path.glob("out*")] == [tmp_path / "out.unfinished"] * (number == signal.SIGKILL)
    command = ["sh", "-c", 'exec "$0" convert.py tiny "$1" 2>&- >&-', sys.executable, out]  # with closed streams
    assert subprocess.run(command, cwd=HERE).returncode == 0 and os.listdir(tmp_path) == ["out"]
    assert is_saved(load_file(TINY / "model.safetensors"), out)


# === tiny/train.py, and this file as a script ========================================================================
def test_train_py(tmp_path, monkeypatch, capsys):
    """Resumed as if never interrupted, and fine-tuned; what it refuses. With a small model and windows of 16 tokens."""
    module = edited(tmp_path, source=(TINY / "train.py").read_text())
    sizes, handlers = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}, {}
    monkeypatch.setattr(module, "PersimmonConfig", lambda **config: PersimmonConfig(**{**config, **sizes}))
    monkeypatch.setattr(module, "WINDOW", 16), monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    (tmp_path / "text").write_text("HAMLET:\nTo be, or not to be?\n\nQUEEN:\nHow vexingly quick they jump!\n\n" * 80)

    def train(folder: str, *options: str, code: int = 0, says: str = "") -> list[str]:
        monkeypatch.setattr(sys, "argv", ["train.py", "--text", f"{tmp_path}/text", "--out", f"{tmp_path}/{folder}",
                                          "--device", "cpu", "--batch", "1", "--eval-every", "2", *options])
        result, printed = module.main(), "".join(capsys.readouterr())
        assert result == code and re.search(says, printed), printed
        return re.findall(r"step \d/\d  loss \S+", printed)

    whole, steps, clip = train("whole", "--steps", "5"), itertools.count(1), torch.nn.utils.clip_grad_norm_
    with monkeypatch.context() as patch:  # Ctrl-C in the third step
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *parameters: (
            clip(*parameters), next(steps) == 3 and handlers[signal.SIGINT]()))
        parts = train("parts", "--steps", "5", code=130, says="the same command with --resume goes on")
    train("parts", "--steps", "7", "--resume", code=2, says="--resume: the run was begun with")
    parts += train("parts", "--steps", "5", "--resume")
    assert parts == whole and len(whole) == 3
    parts, whole = ({file.name: file.read_bytes() for file in (tmp_path / run).iterdir()} for run in ("parts", "whole"))
    assert parts == whole and len(whole) == 5
    command = [sys.executable, TINY / "train.py", *sys.argv[1:-1]]  # without --resume
    again = subprocess.run(command, capture_output=True, cwd=tmp_path)
    assert again.returncode == 2 and re.fullmatch(b"train.py: error: .*holds a model.*\n", again.stderr)
    (tmp_path / "whole" / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    train("tuned", "--steps", "1", "--seed", "1", "--init", f"{tmp_path}/whole")
    assert (tmp_path / "tuned" / "tokenizer_config.json").read_text() == '{"add_bos_token": true}'
    train("broken", "--steps", "9", "--init", f"{tmp_path}/whole", "--lr", "1e30", code=2, says=r"\d: the loss is nan")
    train("new", "--init", f"{tmp_path}/none", code=2, says=f"no folder {tmp_path}/none:")
    assert not (tmp_path / "new").exists()
    (tmp_path / "whole" / "tokenizer.model").rename(tmp_path / "moved")
    train("new", "--init", f"{tmp_path}/whole", code=2, says=f"no file {tmp_path}/whole/tokenizer.model")
    assert pytest.raises(SystemExit, train, "new", "--lr", "nan").value.code == 2
    before, after = (load_file(tmp_path / run / "model.safetensors")["lm_head.weight"] for run in ("whole", "tuned"))
    assert 0 < (after - before).abs().max() < 0.01 and after.dtype == torch.bfloat16  # other seeds differ by more


def test_readme(tmp_path, monkeypatch, capsys):
    """Its examples run as they stand, one after the other, in one process; and its command lines are parsed."""
    text = (HERE / "README.md").read_text()
    (tmp_path / "tiny").symlink_to(TINY), monkeypatch.chdir(tmp_path)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)
    use, train, shard = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(use, names := {})
    assert capsys.readouterr().out.count("ROMEO:\nBut soft, what light") == 1 and names["step"].finish_reasons[0]
    old = names["model"].lm_head.weight.detach().clone()
    exec(train, names)
    loaded, labels, rows = PersimmonForCausalLM.from_pretrained("tuned"), names["labels"], names["ids"]["input_ids"]
    changed = (loaded.lm_head.weight - old).abs()
    assert changed.max() < 1e-4 and changed.count_nonzero() > 0.99 * changed.numel()
    assert is_saved(names["model"].state_dict(), tmp_path / "tuned")
    for row, expected in zip(rows, labels):  # what a text by itself would be scored for
        n = len(names["tokenizer"].encode(names["tokenizer"].decode(row)))
        assert expected.tolist() == [-100] * (len(row) - n + 1) + row[len(row) - n + 1 :].tolist()
    monkeypatch.setattr(CpuEngine, "large", 0)
    (model := names["model"].eval()).generate(rows, max_new_tokens=3)  # so it has tables
    twin = copy.deepcopy(model).bfloat16()
    exec(shard, names)
    assert len(model.engine.tables) == 6 and {type(p) for p in model.parameters()} == {torch.distributed.tensor.DTensor}
    model(rows, labels=labels).loss.backward(), twin(rows, labels=labels).loss.backward()
    assert all(distance(p.grad.full_tensor(), q.grad) < 0.1 for p, q in zip(model.parameters(), twin.parameters()))
    torch.distributed.destroy_process_group()
    assert is_saved(loaded.bfloat16().state_dict(), tmp_path / "tuned")  # the shares of all, in tiny/'s dtype
    for parse, count, line in ((convert.parse_arguments, 2, r"^python convert.py (.*)$"), (
            sample_script.parse, 7, r"^(?:\w+ .*\| |torchrun .*?|)(?:python )?sample.py (.*?)(?: > .*)?$")):
        assert len(commands := re.findall(line, text, re.MULTILINE)) == count
        for command in commands:
            parse(shlex.split(command, comments=True))


def test_run_as_a_script(monkeypatch, capsys):
    """`bench` without what only tests need: a row for each measurement, or why there is none. Else, how to use it."""
    assert main(["bench", "-m", "/no"]) == 2
    assert capsys.readouterr() == ("", "test_persimmon.py: error: there is no folder /no\n")
    for name in ("pytest", "hypothesis", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(subprocess, "run", Mock(return_value=Mock(stdout=b"[1, 0.001]")))  # the machine's speed
    monkeypatch.setattr(signal, "signal", Mock())
    options = "bench --device cpu -t 1 --batch-size 1 2 --n-prompt 8 2000 --n-depth 0 5 --n-gen 4 -r 2"
    for code, arguments in ((0, ""), (2, "benhc"), (0, options)):
        monkeypatch.setattr(sys, "argv", ["", *arguments.split()])
        with pytest.raises(SystemExit, match=str(code)):
            runpy.run_path(__file__, run_name="__main__")
        printed, errors = capsys.readouterr()
        assert errors == "" and (arguments == options or printed.count("python test_persimmon.py ") == 3)
    assert re.findall(r"(.{20})(?: +\d+\.\d\d){3} (\w+)/s +\d+%\n", printed) == [
        (f"{test}{texts}".ljust(20), unit) for texts in ("", " x 2")
        for test, unit in (("pp8", "TFLOP"), ("tg4 @ 0", "GB"), ("tg4 @ 5", "GB"))]
    assert printed.count("left out: the context is 1024\n") == 2 and re.search(r"\n\npeak memory \d", printed)


@pytest.mark.skipif(not ALL, reason="takes 20 s: PERSIMMON_ALL")
def test_compare(capsys):
    """A row for each way of both; in one go, logits in bfloat16 have the same bits as those of transformers."""
    assert [main(f"compare --layers 1 --vocab-size 512 --rounds {n}".split()) for n in (0, 1)] == [2, 0]
    *rows, last = capsys.readouterr().out.splitlines()[1:]
    assert [re.match(r" 1 x   512  (.*?)  +first token +\d+\.\d ms, then +\d+\.\d\d ms", row)[1] for row in rows] == [
        "transformers", "persimmon.py", "90% zeros", "--plain", "int8, groups of 128", "int4, groups of 32",
        "int4, groups of 128"]
    assert 0 < float(re.search(r"(0\.0\d+) token by token, 0\.0000 in one go$", last)[1]) < 0.03
