"""Tests of persimmon.py, sample.py and convert.py: `pytest`. On the CPU, no download; transformers and SentencePiece
are the oracles. They follow persimmon.py's order, then come how it is built, sample.py, convert.py and tiny/train.py.

    python test_persimmon.py all                  pytest with all combinations, which takes long
    python test_persimmon.py bench [options]      speed of a model on this machine; needs requirements.txt only
    python test_persimmon.py compare [options]    speed and logits beside those of transformers

Random weights everywhere but in tiny/. Every parameter is random, norms and biases too: a norm weight of one and a bias
of zero would hide that two norms are swapped or a bias is lost. All axes of a model have different sizes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import persimmon
from persimmon import (
    MLP,
    PersimmonConfig,
    PersimmonForCausalLM,
    config_to_dict,
    engine_for,
    generate,
    quantize_model,
)
from sample import peak_memory, random_model

# --- run as a script -------------------------------------------------------------------------------------------------


def machine_speed(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """GB/s of reading memory and TFLOP/s of a product of matrices: the best of several tries."""
    data = torch.ones(2**29, device=device)  # 2.1 GB: much more than any cache
    size, repeats = (4096, 1) if device == "cpu" else (8192, 16)  # a GPU takes orders in advance
    a, b = torch.randn(2, size, size, device=device).to(dtype)

    def best(*works) -> float:
        """Seconds of the quickest of these, tried four times each."""
        seconds = []
        for work in works * 4:
            start = time.perf_counter()
            for _ in range(repeats):
                result = work()
            result.flatten()[0].item()  # waits for the device
            seconds.append((time.perf_counter() - start) / repeats)
        return min(seconds)

    read = best(data.sum, data.view(torch.int64).sum, data.amax, data.view(torch.int32).amax)
    return data.nbytes / read / 1e9, 2 * size**3 / best(lambda: a @ b) / 1e12


def bytes_read(model: PersimmonForCausalLM, ids: torch.Tensor) -> float:
    """Bytes of weights that a pass reads for one token a row, ids (B, 1).

    That is all but the embedding, and of the down-projection where its zeros are skipped: in a
    table of the engine's, or in int8.
    """
    nonzero: dict[torch.nn.Module, float] = {}
    downs = [m.dense_4h_to_h for m in model.modules() if isinstance(m, MLP)]
    hooks = [m.register_forward_pre_hook(lambda m, x: nonzero.update(
        {m: x[0].count_nonzero().item() / x[0].shape[-1]})) for m in downs]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    tables = getattr(engine_for(model), "tables", {})
    total = sum(x.nbytes for x in model.state_dict().values())
    total -= model.model.embed_tokens.weight.nbytes
    for m in downs:
        is_sparse = m in tables or (type(m) is not torch.nn.Linear and ids.device.type == "cpu")
        total -= m.weight.nbytes * max(0.0, 1 - nonzero[m]) * is_sparse
    return total


def bench(argv: list[str]) -> int:
    """Print a row for each test, as it has been measured, in the manner of llama-bench.

    ppT reads a prompt of T tokens; tgN @ S writes N tokens, greedily, after S that the cache holds
    (zeros on a CPU, which makes no difference to the time there); x B means B texts at once, whose
    tokens count together. A prompt's time is that of arithmetic: TFLOP/s counts matrices and
    attention. A token's time is that of reading memory: GB/s counts weights and cache.
    """
    parser = argparse.ArgumentParser(prog="test_persimmon.py bench", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
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
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype.replace("auto", "bfloat16"))
    if args.probe:
        print(json.dumps(machine_speed(args.device, dtype)))
        return 0
    # In a process of its own, so that its 2.1 GB are not part of this one's peak.
    probe = [sys.executable, __file__, "bench", "--probe", *argv]
    output = subprocess.run(probe, stdout=subprocess.PIPE, check=True).stdout
    limit = dict(zip(("GB/s", "TFLOP/s"), json.loads(output.splitlines()[-1])))
    options = {"dtype": args.dtype, "device": args.device, "quantize": args.quantize}
    if args.random:
        model = random_model(int(args.random[3:] or 36), args.density, **options)
    else:
        model = PersimmonForCausalLM.from_pretrained(args.model, **options)
    model.fast, config = not args.plain, model.config
    weight, L = model.model.embed_tokens.weight, config.num_hidden_layers
    C, F, context = config.hidden_size, config.intermediate_size, config.max_position_embeddings
    kind = (config.quantization or {}).get("quantize") or str(weight.dtype).removeprefix("torch.")
    place = f"{torch.get_num_threads()} threads" if args.device == "cpu" else args.device
    print(f"{args.random or args.model.name}, {kind}, {place}{', plain' * args.plain}\nThis machine"
          f" reads {limit['GB/s']:.1f} GB/s and multiplies {limit['TFLOP/s']:.2f} TFLOP/s.\n\n"
          f"{'test':20}{'tok/s':>10}{'+-':>8}{'that is':>18}{'of the machine':>17}", flush=True)

    def measure(T: int, S: int, n: int, B: int) -> None:
        """Time and print: n tokens after a prompt of T of which the cache holds S, B times."""
        title = (f"pp{T}" if n == 1 else f"tg{n} @ {S}") + f" x {B}" * (B > 1)
        cached = 2 * L * C * weight.itemsize * B  # bytes of a position
        reason, size = "", cached * (T + n)
        if T + n > context:
            reason = f"the context is {context}"
        elif args.device == "cpu" and size > persimmon.available_memory():
            reason = f"its cache takes {size / 1e9:.1f} GB, more than is free"
        if reason:
            return print(f"{title:20}left out: {reason}", flush=True)
        ids, speeds = torch.full((B, T), 71), []
        try:
            cache = engine_for(model).make_cache(B, T + n)
            for block in (cache.keys, cache.values) if S else ():  # a GPU multiplies zeros faster
                block.normal_() if block.is_cuda else block.zero_()
            for run in range(args.repetitions + 1):  # the first one is to warm up
                cache.crop(S)
                times = [time.perf_counter()]
                for _ in generate(model, ids, max_new_tokens=n, stop_ids=(), cache=cache):
                    times.append(time.perf_counter())
                seconds = times[1] - times[0] if n == 1 else (times[-1] - times[2]) / (n - 2)
                speeds += [B * (T if n == 1 else 1) / seconds] * (run > 0)
        except torch.OutOfMemoryError:
            return print(f"{title:20}left out: out of memory", flush=True)
        mean = statistics.mean(speeds)
        spread = statistics.stdev(speeds) if len(speeds) > 1 else 0.0
        unit, work = "TFLOP/s", 2 * L * (4 * C * C + 2 * F * C + C * T) / 1e12  # of a token
        if n > 1:
            read = bytes_read(model, ids[:, :1].to(weight.device)) + cached * (S + n / 2)
            unit, work = "GB/s", read / B / 1e9
        print(f"{title:20}{mean:10.2f}{spread:8.2f}{mean * work:10.2f} {unit:7}"
              f"{mean * work / limit[unit]:17.0%}", flush=True)

    try:
        for B in args.batch_size:
            for T in args.n_prompt:
                measure(T, 0, 1, B)
            for S in args.n_depth:
                measure(S + 1, S, args.n_gen, B)
    except KeyboardInterrupt:
        print("stopped")
        return 130
    finally:
        peak = peak_memory(args.device.startswith("cuda"))
        print(f"\npeak memory {peak / 1e9:.2f} GB")
    return 0


def compare_speed(argv: list[str]) -> int:
    """Time our model and transformers' in turns, with the same random bfloat16 weights of full width.

    Prints medians over the rounds: of the time to the first token, which reads the prompt, and of each later one. Last,
    how far logits are from those of transformers.
    """
    import transformers

    parser = argparse.ArgumentParser(prog="test_persimmon.py compare", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    is_cuda = args.device == "cuda"
    torch.manual_seed(0), torch.set_grad_enabled(False)
    config = PersimmonConfig(num_hidden_layers=args.layers, vocab_size=args.vocab_size, bos_token_id=1,
                             eos_token_id=None)
    raw = {name: value for name, value in config_to_dict(config).items() if "type" not in name}
    with torch.device(args.device):
        theirs = transformers.PersimmonForCausalLM._from_config(
            transformers.PersimmonConfig(**raw), dtype=torch.bfloat16).eval()  # fmt: skip
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
        seconds = []
        for tokens in (1, n):
            start = time.perf_counter()
            theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                            pad_token_id=0, **options).sum().item()  # fmt: skip
            seconds.append(time.perf_counter() - start)
        return seconds[0], (seconds[1] - seconds[0]) / (n - 1)

    set_density(0.5)
    ways: dict[str, Callable] = {"transformers": their_times, "persimmon.py": our_times}
    if is_cuda:  # it compiles the model for this one
        ways["transformers, static cache"] = lambda *a: their_times(*a, cache_implementation="static")
        tests = [(128, 1), (2048, 1), (8192, 1), (16000, 1), (128, 16), (2048, 16)]
    else:
        plain = copy.deepcopy(ours, {id(p): p for p in ours.parameters()})  # has the same weights
        plain.fast = False
        others = {"--plain": plain}
        for kind, size in (("int8", 128), ("int4", 32), ("int4", 128)):
            others[f"{kind}, groups of {size}"] = quantize_model(copy.deepcopy(ours), kind, size)
        ways["90% zeros"] = lambda *a: (set_density(0.1), our_times(*a), set_density(0.5))[1]
        ways |= {name: lambda *a, model=model: our_times(*a, model) for name, model in others.items()}
        tests = [(512, 1)]
    print(f"full width, {args.layers} layers, vocabulary {args.vocab_size}, random weights, bfloat16, half zeros, "
          f"{torch.cuda.get_device_name() if is_cuda else f'{torch.get_num_threads()} threads'}; "
          f"torch {torch.__version__}, transformers {transformers.__version__}; {args.rounds} rounds",
          flush=True)  # fmt: skip
    for T, B in tests:
        names = [name for name in ways if "static" not in name or (T, B) == tests[0]]
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in range(args.rounds + 1):  # the first one is to warm up
            for name in names:
                times[name].append(ways[name](all_ids[:B, :T], 33 if is_cuda else 18))
        for name in names:
            first, each = map(statistics.median, zip(*times[name][1:]))
            ratio = statistics.median(b[1] / a[1] for a, b in zip(times[name][1:], times["transformers"][1:]))
            print(f"{B:2} x {T:5}  {name:27} first token {1e3 * first:8.1f} ms, then {1e3 * each:8.2f} ms a step, "
                  f"{ratio:5.2f} x transformers", flush=True)  # fmt: skip
    engine, ids = engine_for(ours), all_ids[:1, :48]
    cache = engine.make_cache(1, 300)
    single = [engine.prefill(ids[:, :1], None, cache).clone()]
    engine.prepare()
    single += [engine.decode(ids[:, n : n + 1], None, cache).clone() for n in range(1, 48)]
    expected, whole = theirs(ids).logits.float(), ours(ids).logits.float()
    a, b = ((logits - expected).square().mean().sqrt() for logits in (torch.stack(single, 1), whole))
    print(f"logits (their standard deviation is {expected.std():.3f}), root mean square of what differs from "
          f"transformers: {a:.4f} token by token, {b:.4f} in one go")  # fmt: skip
    return 0


def main(argv: list[str]) -> int:
    command, *options = argv or [""]
    if command in ("bench", "compare"):
        if hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `bench | head` ends without a traceback
        return (bench if command == "bench" else compare_speed)(options)
    if command == "all":
        pytest_command = [sys.executable, "-m", "pytest", __file__, *options]
        return subprocess.run(pytest_command, env={**os.environ, "PERSIMMON_ALL": "1"}).returncode
    print("\n".join(line[4:] for line in __doc__.splitlines() if line.startswith("    ")))
    return 0 if command in ("", "-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

# --- what the tests share --------------------------------------------------------------------------------------------

# ruff: noqa: E402

import ast
import contextlib
import enum
import fcntl
import gc
import gzip
import importlib.util
import io
import itertools
import math
import pickle
import pty
import random
import re
import select
import shutil
import struct
import tarfile
import termios
import threading
import warnings
import weakref
import zipfile
from collections import Counter
from dataclasses import asdict, fields, replace
from functools import partial
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from unittest.mock import Mock

import numpy
import pytest
import sentencepiece
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import convert
import sample as sample_script
from persimmon import (
    Attention,
    CpuEngine,
    CudaEngine,
    Engine,
    Int4Linear,
    Int8Linear,
    Int8SparseLinear,
    KVCache,
    PersimmonForSequenceClassification,
    PersimmonForTokenClassification,
    PersimmonModel,
    QuantizedLinear,
    StaticCache,
    StreamDecoder,
    Tokenizer,
    TransposedKVCache,
    apply_rope,
    attention,
    causal_mask,
    chat_prompt,
    checked_config,
    cpu_linear,
    dot_products,
    fused_attend,
    is_as_exact,
    is_unmodified,
    load_config,
    matvec,
    nonzero_bags,
    pad_left,
    replaced_forward,
    rope_tables,
    sample,
    small_batch_matmul,
    sparse_linear,
    write_safetensors,
)

HERE = Path(__file__).resolve().parent
TINY = HERE / "tiny"
SOURCE = (HERE / "persimmon.py").read_text()
ALL = "PERSIMMON_ALL" in os.environ  # every combination, which takes long
settings.register_profile("quick", derandomize=True, deadline=None, max_examples=100)
settings.register_profile("all", deadline=None, max_examples=1000)
settings.load_profile("all" if ALL else "quick")
torch.set_num_threads(1)  # on small models, threads only wait for each other, and very long where others compute too

# name: (config, length of the test sequence). Longer than 64 positions, where RoPE's slow pairs have begun to turn.
CONFIGS = {
    "D16": PersimmonConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=3,
        max_position_embeddings=160, bos_token_id=1, eos_token_id=None, pad_token_id=5,
    ),
    "D64": PersimmonConfig(
        vocab_size=151, hidden_size=128, intermediate_size=208, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=180, bos_token_id=1, eos_token_id=None,
    ),
    "no QK-norm, other RoPE": PersimmonConfig(
        vocab_size=101, hidden_size=120, intermediate_size=88, num_hidden_layers=2, num_attention_heads=5,
        max_position_embeddings=170, bos_token_id=1, eos_token_id=None, qk_layernorm=False, rope_theta=1000.0,
        partial_rotary_factor=0.25, layer_norm_eps=1e-3,
    ),
}  # fmt: skip
CONFIG = CONFIGS["D16"]
B, T = 2, 71


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


def write_config(folder: Path, config: PersimmonConfig, form: str) -> None:
    """config.json as the hub had it in 2023, or as transformers 5 writes it."""
    raw = config_to_dict(config)
    for key in ("rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor", "dtype", "torch_dtype"):
        del raw[key]
    if form == "2023":
        raw |= {"rope_theta": config.rope_theta, "rope_scaling": None, "torch_dtype": "float32", "pretraining_tp": 1,
                "num_key_value_heads": config.num_attention_heads, "rms_norm_eps": 1e-6}  # fmt: skip
        if config.partial_rotary_factor != 0.5:
            raw["partial_rotary_factor"] = config.partial_rotary_factor
    else:
        rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
        raw |= {"rope_parameters": {**rope, "partial_rotary_factor": config.partial_rotary_factor}, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test has the same random numbers in each run, alone or among others."""
    random.seed(0), torch.manual_seed(0)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """A folder for each config and form of config.json, written without save_pretrained."""
    made = {}
    for name, config in CONFIGS.items():
        state = randomize(PersimmonForCausalLM(config)).state_dict()
        for form in ("2023", "transformers 5"):
            folder = made[name, form] = tmp_path_factory.mktemp("model")
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
            write_config(folder, config, form)
    return made


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A copy of a model's folder, to be damaged."""
    return Path(shutil.copytree(folders["D16", "2023"], tmp_path / "model"))


@pytest.fixture
def small(folders) -> PersimmonForCausalLM:
    return PersimmonForCausalLM.from_pretrained(folders["D16", "2023"])


@pytest.fixture(scope="session", params=CONFIGS)
def models(request, folders) -> tuple[PersimmonForCausalLM, transformers.PersimmonForCausalLM]:
    """The same weights as our model and as transformers'."""
    folder = folders[request.param, "transformers 5"]
    return PersimmonForCausalLM.from_pretrained(folder), oracle(folder)


@pytest.fixture(params=["plain", "CPU", "CUDA"])
def pair(request, models, monkeypatch):
    """The same, where `generate` runs our model plainly, or with an engine in all that it can do here."""
    models[0].fast = request.param != "plain"  # also forgets the engine of another test
    if request.param == "CPU":
        use_cpu_engine(monkeypatch)
    elif request.param == "CUDA":
        use_cuda_engine(monkeypatch)
    return models


def oracle(folder: Path, **options) -> transformers.PersimmonForCausalLM:
    return transformers.PersimmonForCausalLM.from_pretrained(folder, dtype="float32", **options).eval()


def random_ids(config: PersimmonConfig, rows: int = B, length: int = T, seed: int = 0) -> torch.Tensor:
    return torch.randint(6, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def new_cache(config, rows: int, length: int, kind: type[KVCache] = KVCache, dtype=torch.float32) -> KVCache:
    """An empty cache full of NaN: nothing may be read that was not written."""
    cache = kind(config, rows, length, dtype, DEVICE if kind is StaticCache else "cpu")
    cache.keys.fill_(math.nan), cache.values.fill_(math.nan)
    return cache


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and (a - b).abs().max().item() <= tolerance


# What processors have of what cpu_has asks for. In float16 AMX is of no use.
PROCESSORS = {"AMX": ("amx_tile", "avx512_bf16"), "Zen 4": ("avx512_bf16",), "other": ()}


def use_cpu_engine(monkeypatch, processor: str = "Zen 4") -> None:
    """CpuEngine as on a processor, for matrices and caches of any size and dtype; blocks of keys are short."""
    monkeypatch.setattr(CpuEngine, "large", 0)
    monkeypatch.setattr(persimmon, "cpu_has", lambda feature: feature in PROCESSORS[processor])
    monkeypatch.setattr(TransposedKVCache, "block", 8)
    monkeypatch.setattr(CpuEngine, "make_cache", lambda self, rows, N: new_cache(
        self.model.config, rows, N, KVCache if processor == "AMX" else TransposedKVCache,
        self.model.lm_head.weight.dtype))


IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"


runs_kernel = pytest.mark.skipif(DEVICE == "cpu" and not IS_INTERPRETED, reason="no GPU; in the interpreter they do")


def use_interpreter(module: ModuleType, monkeypatch) -> None:
    """Prepares `module`, persimmon or a copy of it, and Triton's interpreter for one another."""
    from triton import language
    from triton.runtime import interpreter

    # It looks for triton.language among the globals of a kernel's file, and where it rewrites the code (so that
    # `n = 1` makes a tensor of Triton, which these kernels do not need) it knows nothing outside of the function.
    monkeypatch.setattr(module, "tl", language, raising=False)
    monkeypatch.setattr(interpreter.FunctionRewriter, "rewrite_ast", lambda self: self.fn)
    builder, dot = interpreter.InterpreterBuilder, interpreter.InterpreterBuilder.create_dot

    def widened(handle):  # it keeps bfloat16 as integers, and its product would multiply these
        if handle.dtype.scalar != language.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype("uint32") << 16).view("float32"), language.float32)

    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *others: dot(self, widened(a), widened(b), *others))


class RerunGraph:
    """A CUDA graph without a GPU: its replay runs the captured step of Python once more, where calls can be counted."""

    def __init__(self, graph=None, stream=None) -> None:
        self.captured = graph

    def __enter__(self) -> None:  # of torch.cuda.graph(graph) in capture_cuda_graph
        self.captured.frame = sys._getframe(1)

    def __exit__(self, *_) -> None:
        RerunGraph.count += 1

    def replay(self) -> None:
        found = self.frame.f_locals
        found["cache"].is_captured = True
        with replaced_forward(found["forwards"]):
            found["logits"].copy_(found["step"]())
        found["cache"].is_captured = False


class FakeStream:
    def __init__(self, device=None) -> None:
        pass

    def wait_stream(self, other) -> None:
        pass

    def record_event(self) -> Mock:
        return Mock()


def without_gpu(monkeypatch) -> None:
    """CudaEngine and StaticCache take the CPU for a GPU with 3 SMs."""
    if DEVICE == "cuda":
        return
    RerunGraph.count = 0
    for name in ("device", "device_of", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=3))
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RerunGraph)
    monkeypatch.setattr(torch.cuda, "graph", RerunGraph)
    monkeypatch.setitem(persimmon.ENGINES, "cpu", CudaEngine)


def use_cuda_engine(monkeypatch) -> Counter:
    """CudaEngine with PyTorch's operators in place of the kernels, and how often they were called."""
    calls = Counter()

    def attend(layer, qkv, rope, mask, cache):
        """fused_attend; like the kernel, it looks up the position itself."""
        calls["fused_attend"] += 1
        (B, T, _), start = qkv.shape, int(cache.position)
        q, k, v = qkv.view(B, T, layer.num_heads, 3, layer.head_dim).unbind(3)
        q, k = apply_rope(layer.q_layernorm(q), *rope), apply_rope(layer.k_layernorm(k), *rope)
        for stored, new in ((cache.keys, k), (cache.values, v)):
            stored[layer.layer, :, :, start : start + T] = new.transpose(1, 2)
        mask = causal_mask(torch.arange(start, start + T), start + T, None) if mask is None else mask[..., : start + T]
        k, v = cache.keys[layer.layer, :, :, : start + T], cache.values[layer.layer, :, :, : start + T]
        return attention(q.transpose(1, 2), k, v, mask).transpose(1, 2).reshape(B, T, -1)

    def product(linear, x, norm=None, residual=None, square=False):
        calls["matvec"] += 1
        return plain_matvec(linear, x, norm, residual, square)

    without_gpu(monkeypatch)
    monkeypatch.setattr(persimmon, "triton_kernels", lambda: (None, None))
    monkeypatch.setattr(persimmon, "fused_attend", attend)
    monkeypatch.setattr(persimmon, "matvec", product)
    return calls


def plain_matvec(linear, x, norm, residual, square) -> torch.Tensor:
    y = torch.nn.functional.linear(x if norm is None else norm(x), linear.weight, linear.bias)
    y = y.relu().square() if square else y
    return y if residual is None else y + residual


def count_passes(model) -> list[int]:
    """New positions of each forward pass from now on."""
    passes = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: passes.append(output.shape[1]))
    return passes


# === Part I. The model ===============================================================================================
# --- config ----------------------------------------------------------------------------------------------------------


def test_config():
    assert (PersimmonConfig().head_dim, PersimmonConfig().rotary_dim) == (64, 32)
    assert (CONFIGS["no QK-norm, other RoPE"].head_dim, CONFIGS["no QK-norm, other RoPE"].rotary_dim) == (24, 6)
    with pytest.raises(TypeError):
        PersimmonConfig(hidden_sise=4)
    with pytest.raises(AttributeError):  # frozen
        PersimmonConfig().hidden_size = 4


# --- RoPE ------------------------------------------------------------------------------------------------------------


def test_rope_tables():
    cos, sin = rope_tables(torch.tensor([[0, 1, 16383], [5, 6, 7]]), PersimmonConfig(), torch.float32)
    assert cos.shape == sin.shape == (2, 3, 1, 16)
    angles = 16383 * 25000.0 ** (-torch.arange(16).double() / 16)  # float32 holds an angle of 16383 to 1e-3
    assert close(cos[0, 2, 0].double(), angles.cos(), 2e-3) and close(sin[0, 2, 0].double(), angles.sin(), 2e-3)
    rounded = rope_tables(torch.tensor([[0, 1, 16383], [5, 6, 7]]), PersimmonConfig(), torch.bfloat16)
    assert all(map(torch.equal, rounded, (cos.bfloat16(), sin.bfloat16())))  # the tables are rounded, not the angles


def test_apply_rope_rotates_the_first_R_of_D_only():
    x = torch.randn(1, 3, 2, 64)
    y = apply_rope(x, *rope_tables(torch.tensor([[0, 1, 16383]]), PersimmonConfig(), torch.float32))
    assert torch.equal(y[..., 32:], x[..., 32:]) and torch.equal(y[:, 0], x[:, 0])
    for t, p in enumerate((0, 1, 16383)):
        for i in range(16):
            angle = p * 25000.0 ** (-2 * i / 32)
            a, b = x[0, t, 1, i].double(), x[0, t, 1, i + 16].double()
            expected = torch.stack((a * math.cos(angle) - b * math.sin(angle),
                                    b * math.cos(angle) + a * math.sin(angle)))
            assert close(y[0, t, 1, [i, i + 16]].double(), expected, 1e-5 if p < 2 else 6e-3)


# --- mask, attention, cache ------------------------------------------------------------------------------------------


def test_causal_mask():
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    mask = causal_mask(torch.arange(2, 5), 5, padding)[:, 0].int().tolist()
    assert mask == [[[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]],
                    [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]]
    mask = causal_mask(torch.arange(2, 5), 5, None)[0, 0].int().tolist()
    assert mask == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert causal_mask(torch.arange(5), 5, None) is causal_mask(torch.tensor([4]), 5, None) is None


def test_attention():
    """By its equation, in the three cases, where None is plain causal attention or all there is."""
    for T, S, padding in ((5, 5, None), (1, 5, None), (3, 5, None), (5, 5, 2), (3, 5, 2), (1, 5, 2)):
        q, k, v = torch.randn(2, 3, T, 16), torch.randn(2, 3, S, 16), torch.randn(2, 3, S, 16)
        seen = None if padding is None else (torch.arange(S) >= padding).long().expand(2, S)
        allowed = torch.ones(T, S).tril(S - T).bool()
        if padding is not None:
            allowed = allowed & (seen[:, None, None].bool() | torch.eye(S).bool()[S - T :])
        weights = (q @ k.mT / 4).masked_fill(~allowed, -math.inf).softmax(-1)
        assert close(attention(q, k, v, causal_mask(torch.arange(S - T, S), S, seen)), weights @ v, 1e-5)
    assert (attention(q, k, v, None, dropout=1.0) == 0).all()


CHUNKS = [(5, 1, 3), (1, 1, 7), (9,), (2, 7)]


def check_chunks(model, kind: type[KVCache], chunks: tuple[int, ...], is_padded: bool) -> None:
    """The logits of chunks of nine ids, each after what is cached, are those of one pass without a cache."""
    ids = random_ids(model.config, length=9)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with torch.no_grad():
        whole = model(ids, mask if is_padded else None).logits
        cache, parts = new_cache(model.config, B, 9, kind), []
        for n in chunks:
            seen = cache.length
            part_mask = mask[:, : seen + n] if is_padded else None
            parts.append(model(ids[:, seen : seen + n], part_mask, cache=cache).logits)
            assert cache.length == seen + n
        kept = mask == 1 if is_padded else mask >= 0
        assert close(torch.cat(parts, 1)[kept], whole[kept], 1e-5)
        cache.crop(4)  # and what comes after four of them again
        again = model(ids[:, 4:], mask if is_padded else None, cache=cache).logits
        assert close(again[kept[:, 4:]], whole[:, 4:][kept[:, 4:]], 1e-5)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("is_padded", [False, True])
def test_kv_cache_chunks_equal_one_pass(models, chunks, is_padded):
    check_chunks(models[0], KVCache, chunks, is_padded)


def test_kv_cache_refuses_what_does_not_fit(small):
    cache = KVCache(small.config, B, 9, torch.float32, "cpu")
    with torch.no_grad():
        small(random_ids(small.config, length=6), cache=cache)
        with pytest.raises(ValueError, match="2 rows of 9 positions, not 2 of 10"):
            small(random_ids(small.config, length=4), cache=cache)
        with pytest.raises(ValueError, match="2 rows of 9 positions, not 1 of 8"):
            small(random_ids(small.config, rows=1, length=2), cache=cache)
        assert cache.length == 6  # an error moves nothing
        small(random_ids(small.config, length=3), cache=cache)


def test_a_copied_cache_is_a_branch(small):
    cache, ids = KVCache(small.config, B, 9, torch.float32, "cpu"), random_ids(small.config, length=7)
    with torch.no_grad():
        small(ids[:, :5], cache=cache)
        branch = copy.deepcopy(cache)
        expected = small(ids[:, 5:], cache=cache).logits
        small(ids[:, :3], cache=cache.crop(5) or cache)
        assert branch.length == 5 and torch.equal(small(ids[:, 5:], cache=branch).logits, expected)


# --- parity with transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["2023", "transformers 5"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_loss(folders, name, form):
    ours, theirs = PersimmonForCausalLM.from_pretrained(folders[name, form]), oracle(folders[name, form])
    assert theirs.config.rope_parameters["rope_theta"] == CONFIGS[name].rope_theta  # parity of wrong ones is none
    ids = random_ids(CONFIGS[name])
    labels = ids.clone()
    labels[0, :20] = -100
    with torch.no_grad():
        a, b = ours(ids, labels=labels), theirs(ids, labels=labels)
        assert b.logits.std() > 0.3
        assert close(a.logits, b.logits) and close(a.loss, b.loss)
        assert close(ours(ids, logits_to_keep=3).logits, b.logits[:, -3:])
        embeds = torch.randn(B, T, CONFIGS[name].hidden_size)
        assert close(ours(inputs_embeds=embeds).logits, theirs(inputs_embeds=embeds).logits)
        assert close(ours.model(ids).last_hidden_state, theirs.model(ids).last_hidden_state)


def test_gradients(models):
    ours, theirs = models
    ids = random_ids(ours.config)
    ids[1, 30:35] = 5  # pad_token_id of D16, whose embedding gets no gradient
    for model in models:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        # Without QK-norm nothing holds back the gradients: they are in the hundreds there.
        assert close(p.grad, expected[name].grad, 1e-4 * max(1.0, expected[name].grad.abs().max().item())), name
        assert expected[name].grad.abs().max() > 1e-4, name
    assert (ours.model.embed_tokens.weight.grad[5].abs().sum() == 0) == (ours.config.pad_token_id == 5)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding(models, side):
    ours, theirs = models
    ids = random_ids(ours.config)
    mask = torch.ones_like(ids)
    if side != "right":
        mask[0, :13] = 0
    if side != "left":
        mask[1, 60:] = 0
    with torch.no_grad():
        a, b = ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits
        alone = ours(ids[:1][mask[:1] == 1][None]).logits
    assert a.isfinite().all()
    assert close(a[mask == 1], b[mask == 1])
    assert close(a[0][mask[0] == 1], alone[0])


def test_bfloat16_is_as_exact_as_transformers(models):
    ours, theirs = models
    ids = random_ids(ours.config)
    with torch.no_grad():
        truth = theirs(ids).logits
        a = PersimmonForCausalLM(ours.config).eval()
        a.load_state_dict(ours.state_dict())
        b = type(theirs)(theirs.config).eval()
        b.load_state_dict(theirs.state_dict())
        a, b = (m.bfloat16()(ids).logits.float() for m in (a, b))
    assert truth.numel() >= 10_000
    rms = [(x - truth).square().mean().sqrt().item() for x in (a, b)]
    assert 0 < rms[0] <= 1.1 * rms[1], rms


@pytest.mark.parametrize("which", ["hidden_dropout", "attention_dropout"])
def test_dropout_is_where_transformers_has_it(folders, tmp_path, which):
    """p = 1 drops everything, so training is deterministic, and differs from evaluation."""
    source = folders["D64", "2023"]
    write_config(tmp_path, replace(CONFIGS["D64"], **{which: 1.0}), "2023")
    shutil.copy(source / "model.safetensors", tmp_path)
    ours, theirs = PersimmonForCausalLM.from_pretrained(tmp_path), oracle(tmp_path)
    ids = random_ids(CONFIGS["D64"])
    with torch.no_grad():
        assert close(ours.train()(ids).logits, theirs.train()(ids).logits)
        dropped = ours(ids).logits
        assert not close(dropped, ours.eval()(ids).logits, 0.1)
        assert close(ours(ids).logits, theirs.eval()(ids).logits)


def test_position_ids(models):
    """Far positions agree with transformers, and differ from near ones: rounding at 16000 is part of the model."""
    ours, theirs = models
    ids, far = random_ids(ours.config), torch.arange(16000, 16000 + T)[None]
    scattered = torch.arange(T)[None] * 3
    with torch.no_grad():
        assert close(ours(ids, position_ids=far).logits, theirs(ids, position_ids=far).logits)
        # transformers takes a jump in position_ids for a new sequence, unless there is a mask
        b = theirs(ids, position_ids=scattered, attention_mask=torch.ones_like(ids)).logits
        assert close(ours(ids, position_ids=scattered).logits, b)
        assert close(ours(ids, position_ids=scattered.expand(B, T)).logits, b)
        assert not close(ours(ids).logits, b, 1e-2)


def test_positions_do_not_count_padding(small, monkeypatch):
    """The example in PersimmonModel.forward: "a b c" behind two of padding has positions 0 0 0 1 2."""
    seen = []
    monkeypatch.setattr(persimmon, "rope_tables", lambda ids, *a: seen.append(ids.tolist()) or rope_tables(ids, *a))
    ids = random_ids(small.config, rows=2, length=5)
    mask, cache = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]), KVCache(small.config, 2, 5, torch.float32, "cpu")
    with torch.no_grad():
        small(ids, mask)
        small(ids)
        small(ids[:, :3], mask[:, :3], cache=cache)
        small(ids[:, 3:], mask, cache=cache)
    assert seen == [[[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]], [[0, 1, 2, 3, 4]], [[0, 0, 0], [0, 1, 2]], [[1, 2], [3, 3]]]


# --- model and loss --------------------------------------------------------------------------------------------------


def test_forward_refuses_inputs_that_do_not_fit(small):
    ids = random_ids(small.config, length=4)
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 3\), not \(2, 4\): \(B, S\)"):
        small(ids, attention_mask=torch.ones(2, 3))
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(2, 4, 48)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            small(**arguments)
    for options in ({"labels": ids, "logits_to_keep": 1}, {"logits_to_keep": -1}):
        with pytest.raises(ValueError, match="logits_to_keep"):
            small(ids, **options)
    for arguments in ({"input_ids": ids[0]}, {"inputs_embeds": torch.zeros(2, 4, 47)},
                      {"inputs_embeds": torch.zeros(4, 48)}):
        with pytest.raises(ValueError, match=r"the input has the shape .*, and must have \(B, T, C\)"):
            small(**arguments)
    for shape in ((2, 3), (1, 1), (3, 4)):
        with pytest.raises(ValueError, match=r"position_ids are \(.*\), not \(B, T\) = \(2, 4\)"):
            small(ids, position_ids=torch.zeros(shape).long())


def test_init_weights():
    config = replace(CONFIG, initializer_range=0.05)
    for name, p in PersimmonForCausalLM(config).named_parameters():
        if p.dim() == 2:
            assert 0.04 < p.std() < 0.06 and abs(p.mean()) < 0.01, name
        else:
            assert (p == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name
    assert (PersimmonForCausalLM(config).model.embed_tokens.weight[5] == 0).all()


def test_training_in_float16_is_refused(small):
    ids = random_ids(small.config)
    model = small.half()
    with pytest.raises(ValueError, match="float16 .* use bfloat16"):
        model.train()(ids, labels=ids)
    assert model.eval()(ids, labels=ids).loss.dtype == torch.float32
    assert model.bfloat16().train()(ids, labels=ids).loss.isfinite()


def test_gradient_checkpointing(small):
    """The same gradients, dropout included, out of much less that is kept for the backward pass."""
    ids, results = random_ids(small.config), []
    for is_on in (False, True):
        model = PersimmonForCausalLM(replace(small.config, hidden_dropout=0.3, attention_dropout=0.2))
        model.load_state_dict(small.state_dict())
        if is_on:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = model.train()(ids, labels=ids).loss
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters()}, sum(kept)))
    (loss, grads, kept), (same_loss, same_grads, kept_less) = results
    assert loss == same_loss and all(torch.equal(grads[name], same_grads[name]) for name in grads)
    assert kept_less < kept / 3


# --- the shape comments, executed ------------------------------------------------------------------------------------

SHAPE = re.compile(r"#.*?\(((?:[0-9A-Z*/+, ]|bags|blocks)+)\)")


def shape_comments() -> dict[int, tuple[int, list[str], list[str]]]:
    """First line of an assignment -> (its last line, the names it assigns, the axes that the comment there claims)."""
    source, found = Path(persimmon.__file__).read_text().splitlines(), {}
    nodes = [node for node in ast.parse("\n".join(source)).body if getattr(node, "name", "") != "triton_kernels"]
    for node in itertools.chain.from_iterable(map(ast.walk, nodes)):
        claim = SHAPE.search(source[node.end_lineno - 1]) if isinstance(node, ast.Assign) else None
        if claim:
            target = node.targets[0]
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            axes = [axis.strip() for axis in claim[1].split(",") if axis.strip()]
            found[node.lineno] = node.end_lineno, [ast.unparse(name) for name in names], axes
    return found


def test_shape_comments(small, monkeypatch):
    """Run the model under a tracer that compares what each commented line has assigned with what it says.

    Letters are looked up in the config, as local variables, and as the caller's; no two sizes are equal.
    """
    claims, checked, c = shape_comments(), set(), small.config
    sizes = {"C": c.hidden_size, "F": c.intermediate_size, "L": c.num_hidden_layers, "V": c.vocab_size,
             "H": c.num_attention_heads, "D": c.head_dim, "R": c.rotary_dim}  # fmt: skip
    assert len(set(sizes.values()) | {2, 7, 5, 12, 14}) == len(sizes) + 5

    def letters_in(frame) -> dict[str, int]:
        scope, name = frame.f_locals, frame.f_code.co_name
        x, self = scope.get("x"), scope.get("self")
        own = {"N": scope["cache"].keys.shape[3]} if isinstance(scope.get("cache"), KVCache) else {}
        own |= dict(zip("BT", x.shape)) if isinstance(x, torch.Tensor) and x.dim() == 3 else {}
        if isinstance(self, QuantizedLinear):
            own |= {"C": self.in_features, "O": self.out_features, "blocks": len(getattr(self, "weight", ()))}
        if isinstance(self, KVCache) and name == "__init__" and "batch_size" in scope:
            own |= {"B": scope["batch_size"], "N": scope["max_length"], "L": scope["config"].num_hidden_layers,
                    "H": scope["config"].num_attention_heads}  # fmt: skip
        own |= {letter: scope[letter]
                for letter in ("blocks", "bags", *"BTSNPOCHLDFR") if isinstance(scope.get(letter), int)}
        if name == "forward" and scope.get("input_ids") is not None:
            own |= dict(zip("BT", scope["input_ids"].shape))
        if name == "rope_tables":
            own |= dict(zip("BT", scope["position_ids"].shape))
        if name in ("pad_left", "generate") and "ids" in scope:
            own |= dict(zip("BT", scope["ids"].shape))
        if name == "dot_products":
            own |= dict(zip("OC", scope["weight"].shape))
        return own

    def check(frame, line):
        end, names, axes = claims[line]
        scope, letters = frame, {}
        while scope is not None:
            letters = letters_in(scope) | letters
            scope = scope.f_back
        letters = sizes | letters
        expected = tuple(int(eval(axis, {}, letters)) for axis in axes)
        for name in names:
            shape = tuple(eval(name, {}, frame.f_locals).shape)
            assert shape == expected, f"line {line}: {name} is {shape}, the comment says {axes} = {expected}"
        checked.add(line)

    def tracer(frame, event, _):
        if frame.f_code.co_filename != persimmon.__file__ or frame.f_code.co_name.startswith("<"):
            return None
        last = None

        def lines(frame, event, _):
            nonlocal last
            if last in claims and (event == "return" or not last <= frame.f_lineno <= claims[last][0]):
                check(frame, last)
            if event == "line" and not (last in claims and last <= frame.f_lineno <= claims[last][0]):
                last = frame.f_lineno
            return lines

        return lines

    def run():
        ids = random_ids(c, rows=2, length=7)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        small.fast = False
        options = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
        list(generate(small, ids, mask, max_new_tokens=5, **options))
        list(generate(small, ids, max_new_tokens=5))
        cache = KVCache(c, 2, 14, torch.float32, "cpu")
        with torch.no_grad():
            small(ids, cache=cache)
            small(ids[:, :5], cache=cache)
            small(ids, labels=ids)
        small.generate(ids, max_new_tokens=5)
        for cls in (PersimmonForSequenceClassification, PersimmonForTokenClassification):
            cls(c).eval()(ids)
        with monkeypatch.context() as patch:  # Part III a
            use_cpu_engine(patch)
            small.fast = True
            list(generate(small, ids, mask, max_new_tokens=5))
            list(generate(small, ids[:1], max_new_tokens=5))
        quantize_model(copy.deepcopy(small), "int8")(ids)  # III b
        with torch.no_grad():
            Int4Linear(torch.nn.Linear(64, 128), 32)(torch.zeros(1, 64))
        with monkeypatch.context() as patch:  # III c
            use_cuda_engine(patch)
            list(generate(small, ids, mask, max_new_tokens=5))
        with monkeypatch.context() as patch:  # and with kernels that do nothing
            without_gpu(patch)
            patch.setattr(persimmon, "triton_kernels", lambda: [{(2 * 3, 5, 1): lambda *_, **__: None}] * 2)
            cache = StaticCache(c, 2, 14, torch.float32, "cpu")
            rope = rope_tables(torch.arange(5)[None], c, torch.float32)
            fused_attend(small.model.layers[1].self_attn, torch.zeros(2, 5, 3 * c.hidden_size), rope, None, cache)

    sys.settrace(tracer)
    try:
        run()
    finally:
        sys.settrace(None)
    assert len(claims) > 40
    assert checked == set(claims), f"never run: lines {sorted(set(claims) - checked)}"
    # every comment that begins with a shape stands on such a line, but for those in Triton's kernels
    source = Path(persimmon.__file__).read_text()
    kernels = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "triton_kernels")
    fields = [node.lineno
              for node in ast.walk(ast.parse(source)) if isinstance(node, ast.AnnAssign) and node.value is None]
    code = [n for n, line in enumerate(source.splitlines(), 1)
            if re.search("[^ ] +" + SHAPE.pattern.replace(".*?", " "), line)
            and not kernels.lineno <= n <= kernels.end_lineno and n not in fields]
    assert sorted(end for end, _, _ in claims.values()) == code


# --- sampling --------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([2.0, 1.0, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0])


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(n)]


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2},
     {"temperature": 0.7, "top_k": 6, "top_p": 0.9, "min_p": 0.05}],
)  # fmt: skip
def test_sample_has_the_exact_probabilities(options):
    """A chi-square test against the probabilities that transformers' filters leave."""
    options = {"temperature": 1.0, **options}
    scores = TemperatureLogitsWarper(options["temperature"])(None, LOGITS[None])
    for name, warper in {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}.items():
        scores = warper(options[name])(None, scores) if name in options else scores
    p = scores.softmax(-1)[0]
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    drawn = sample(LOGITS.expand(n, -1), [generator] * n, **options)
    count = torch.bincount(drawn, minlength=len(LOGITS)).double()
    kept = p > 0
    assert count[~kept].sum() == 0
    chi_square = ((count[kept] - n * p[kept]) ** 2 / (n * p[kept])).sum().item()
    # 99.9% quantiles of chi-square for 0 to 7 degrees of freedom
    assert chi_square < (0.0001, 10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32)[int(kept.sum()) - 1]


@pytest.mark.parametrize("top_k, top_p, spread, is_short", [
    (0, 0.9, 4.0, True), (0, 0.9, 0.1, False), (7, 0.5, 0.1, True), (300, 1.0, 4.0, True),
    (700, 1.0, "whole numbers", False),
])  # fmt: skip
def test_sample_from_a_large_vocabulary(top_k, top_p, spread, is_short, monkeypatch):
    """A sorted part is as good as all, with ties too, which are many in 16 bit; a row does not depend on the others."""
    torch.manual_seed(0)
    logits = torch.randn(2, 5000)
    logits = logits.round() if spread == "whole numbers" else (logits * spread).bfloat16().float()
    sizes, sort = [], torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda x, *a, **b: sizes.append(x.shape[-1]) or sort(x, *a, **b))
    options = {"temperature": 1.0, "top_k": top_k, "top_p": top_p}
    shares, ids = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k:
        shares[:, top_k:] = 0
        shares /= shares.sum(-1, keepdim=True)
    shares[shares.cumsum(-1) - shares >= top_p] = 0
    beside_a_flat_row = torch.stack((logits[0], torch.zeros(5000)))
    for seed in range(30):
        sizes.clear()
        random = [torch.Generator().manual_seed(seed) for _ in range(4)]
        drawn = sample(logits, random[:2], **options)
        assert (5000 in sizes) != is_short
        for b in range(2):
            u = 1 - torch.rand(1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            cumsum = shares[b].double().cumsum(0)
            assert drawn[b] == ids[b, torch.searchsorted(cumsum, u * cumsum[-1])]
        assert sample(beside_a_flat_row, random[2:], **options)[0] == drawn[0]


def test_sample_ties_and_limits():
    tied = torch.tensor([[0.0, 3.0, 3.0, 1.0, 3.0]] * 20)
    assert sample(tied, [], 0.0).tolist() == [1] * 20
    for options in ({"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-9}):
        assert sample(tied, generators(20), 1.0, **options).tolist() == [1] * 20  # greedy, ties included
    assert set(sample(tied, generators(20), 1.0, min_p=1.0).tolist()) == {1, 2, 4}
    assert sample(tied, generators(20), 1e-50).tolist() == [1] * 20
    assert set(sample(tied, generators(20), 1e-20).tolist()) == {1, 2, 4}  # no overflow to inf - inf
    assert set(sample(tied, generators(20), 1.0, top_k=2).tolist()) == {1, 2}
    assert sample(tied, generators(20), 1.0, top_k=99).max() <= 4


# --- generation ------------------------------------------------------------------------------------------------------


def test_engine_for(small, monkeypatch):
    """One engine stays with the model; none of Part III in training, under autocast, with fast = False, in copies."""
    class Fast(Engine):
        pass

    monkeypatch.setitem(persimmon.ENGINES, "cpu", Fast)
    engine = engine_for(small)
    assert type(engine) is Fast and engine.model is small and engine_for(small) is engine
    assert copy.deepcopy(small).engine is pickle.loads(pickle.dumps(small)).engine is None
    with torch.autocast("cpu", torch.bfloat16):
        assert type(engine_for(small)) is Engine
    assert type(engine_for(small.train())) is Engine and type(engine_for(small.eval())) is Fast
    kept = weakref.ref(engine_for(small))
    del engine
    small.fast = False
    assert kept() is None and small.engine is None and type(engine_for(small)) is Engine
    small.fast = True
    assert type(engine_for(small)) is Fast
    monkeypatch.delitem(persimmon.ENGINES, "cpu")
    assert type(engine_for(small)) is Engine


def test_pad_left():
    ids, mask = torch.tensor([[7, 8, 9, 6], [6, 7, 8, 9]]), torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1]])
    ids, mask = pad_left(ids, mask, 97)
    assert mask.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]] and ids.tolist() == [[9, 6, 7, 8], [6, 8, 7, 9]]
    assert pad_left(ids, None, 97)[0].equal(ids)


def test_greedy_tokens_over_100_steps(pair):
    ours, theirs = pair
    ids = random_ids(ours.config, length=20)
    ones = torch.ones_like(ids)
    expected = theirs.generate(ids, attention_mask=ones, max_new_tokens=100, do_sample=False, pad_token_id=0)
    assert len(set(expected[0, 20:].tolist())) > 3  # not one token for ever
    assert torch.equal(ours.generate(ids, max_new_tokens=100), expected)
    penalty = {"max_new_tokens": 60, "repetition_penalty": 1.3}
    expected = theirs.generate(ids, attention_mask=ones, do_sample=False, pad_token_id=0, **penalty)
    assert torch.equal(ours.generate(ids, **penalty), expected)


def test_n_tokens_are_n_passes(small):
    passes = count_passes(small)
    steps = list(generate(small, random_ids(small.config, length=7), max_new_tokens=6))
    assert len(steps) == 6 and passes == [7, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "repetition_penalty": 1.2, "top_p": 0.9}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_depend_on_its_batch(pair, side, options):
    model, lengths = pair[0], (11, 3, 1, 8)
    rows = [random_ids(model.config, 1, n, seed=n)[0] for n in lengths]
    ids, mask = torch.full((4, 11), 5), torch.zeros(4, 11, dtype=torch.long)
    for b, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(11 - len(row), 11)
        ids[b, at], mask[b, at] = row, 1
    together = list(generate(model, ids, mask, max_new_tokens=30, seed=4, **options))
    for b, row in enumerate(rows):
        alone = list(generate(model, row[None], max_new_tokens=30, seed=4 + b, **options))
        assert [s.tokens[b] for s in together] == [s.tokens[0] for s in alone]
    if options:
        other = list(generate(model, ids, mask, max_new_tokens=30, seed=400, **options))
        assert [s.tokens for s in other] != [s.tokens for s in together]


@pytest.mark.parametrize("kind", ["plain", "CPU", "CUDA"])
def test_a_conversation_computes_only_what_is_new(small, monkeypatch, kind):
    """Answers in one cache are those of fresh runs, also from a branch of it; nothing beyond the end is looked at."""
    if kind != "plain":
        (use_cpu_engine if kind == "CPU" else use_cuda_engine)(monkeypatch)
    small.fast = kind != "plain"
    text, more, passes = random_ids(small.config, rows=1, length=9), random_ids(small.config, rows=3, length=3), []
    cache = engine_for(small).make_cache(1, 60)
    cache.keys.fill_(math.nan), cache.values.fill_(math.nan)
    small.model.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
    for turn in range(3):
        answer = small.generate(text, max_new_tokens=5, cache=cache)
        if kind != "CUDA":
            assert passes == [9 if turn == 0 else 4, 1, 1, 1, 1]  # the last token of an answer is not read in its turn
        assert cache.length == answer.shape[1] - 1
        branch, cache = cache, copy.deepcopy(cache)
        assert torch.equal(answer, small.generate(text, max_new_tokens=5))
        text = torch.cat((answer, more[turn : turn + 1]), 1)
        expected = small.generate(text, max_new_tokens=5)
        assert torch.equal(small.generate(text, max_new_tokens=5, cache=branch), expected)
        passes.clear()
    with pytest.raises(ValueError, match="a cache of 37 needs a longer, unpadded prompt: not 20"):
        next(generate(small, text[:, :20], cache=branch))
    assert [s.finish_reasons for s in generate(small, text, cache=cache)][-1] == ["context"]  # that of the cache: 60
    assert 59 <= cache.length <= cache.keys.shape[3]


def test_logprobs_are_the_models(small):
    ids = random_ids(small.config, length=7)
    steps = list(generate(small, ids, max_new_tokens=5, temperature=0.7, top_k=3, repetition_penalty=1.5))
    new = torch.tensor([s.tokens for s in steps]).T
    with torch.no_grad():
        logprobs = small(torch.cat((ids, new), 1)).logits.log_softmax(-1)[:, 6:-1].gather(2, new[..., None])[..., 0]
    assert close(torch.tensor([s.logprobs for s in steps]).T, logprobs, 1e-5)


def test_stop_ids_and_padding(small):
    ids = random_ids(small.config, length=7)
    free = list(generate(small, ids, max_new_tokens=12))
    rows = [[s.tokens[b] for s in free] for b in range(2)]
    assert [s.finish_reasons for s in free] == [[None, None]] * 11 + [["length", "length"]]
    stop = next(t for t in rows[0] if t not in rows[1])
    at = rows[0].index(stop)
    steps = list(generate(small, ids, max_new_tokens=12, stop_ids=[stop]))
    assert [s.tokens[1] for s in steps] == rows[1]  # the other row goes on undisturbed
    assert [s.tokens[0] for s in steps] == rows[0][: at + 1] + [5] * (11 - at)
    assert [s.finish_reasons[0] for s in steps] == [None] * at + ["stop"] * (12 - at)
    assert all(s.logprobs[0] == 0.0 for s in steps[at + 1 :])
    assert len(list(generate(small, ids[:1], max_new_tokens=12, stop_ids=[stop]))) == at + 1
    small.config = replace(small.config, eos_token_id=stop)  # the default
    output = small.generate(ids, max_new_tokens=12)
    assert len(list(generate(small, ids[:1], max_new_tokens=12))) == at + 1
    assert len(list(generate(small, ids[:1], max_new_tokens=12, stop_ids=()))) == 12
    assert output.tolist() == [ids[0].tolist() + rows[0][: at + 1] + [5] * (11 - at), ids[1].tolist() + rows[1]]


def test_the_context_limit(small):
    limit = small.config.max_position_embeddings
    ids, mask = random_ids(small.config, length=limit - 3), torch.ones(2, limit - 3, dtype=torch.long)
    mask[1, :10] = 0
    steps = list(generate(small, ids, mask, max_new_tokens=50))
    assert [s.finish_reasons[0] for s in steps] == [None] * 2 + ["context"] * 11  # each row has a context of its own
    assert [s.finish_reasons[1] for s in steps] == [None] * 12 + ["context"]
    assert [s.finish_reasons for s in generate(small, ids, max_new_tokens=3)][-1] == ["length", "length"]
    assert len(list(generate(small, random_ids(small.config, length=limit - 1)))) == 1
    with pytest.raises(ValueError, match="the prompt of 160 tokens fills the context of 160"):
        next(generate(small, random_ids(small.config, length=limit)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_new_tokens": 0}, "max_new_tokens = 0 is out of range"), ({"temperature": -1.0}, "temperature = -1.0"),
     ({"temperature": math.nan}, "temperature = nan"), ({"top_p": 1.5}, "top_p = 1.5"), ({"top_k": -1}, "top_k = -1"),
     ({"min_p": 2}, "min_p = 2"), ({"repetition_penalty": 0}, "repetition_penalty = 0"),
     ({"repetition_penalty": math.inf}, "repetition_penalty = inf"), ({"seed": -1}, "seed = -1"),
     ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"the prompt is \(1, 0\)"),
     ({"input_ids": torch.tensor([[1, 97]])}, "ids from 1 to 97, of 97"),
     ({"input_ids": torch.tensor([[-1, 9]])}, "ids from -1"),
     ({"attention_mask": torch.ones(1, 4)}, r"attention_mask is \(1, 4\)"),
     ({"attention_mask": torch.zeros(1, 3)}, "row 0 of the prompt is all padding")],
)  # fmt: skip
def test_generate_refuses(small, arguments, message):
    with pytest.raises(ValueError, match=message):
        next(generate(small, **{"input_ids": torch.tensor([[1, 2, 3]]), **arguments}))


def test_generate_takes_ids_of_other_kinds(small):
    ids = torch.tensor([[1, 2, 3]])
    expected = small.generate(ids, max_new_tokens=6)
    assert torch.equal(small.generate(ids.to(torch.int16), max_new_tokens=6), expected)
    third = expected[0, 5]  # a tensor
    at = (expected[0, 3:] == third).nonzero()[0, 0]
    assert small.generate(ids, max_new_tokens=6, stop_ids=[third]).shape[1] == 4 + at


def test_model_generate_lengths(small):
    ids = random_ids(small.config, length=7)
    assert torch.equal(small.generate(ids, max_length=12), small.generate(ids, max_new_tokens=5))
    assert small.generate(ids).shape == (2, 160)  # 200 by default, and the context is 160
    with pytest.raises(ValueError, match="max_new_tokens = 0 is out of range"):
        small.generate(ids, max_length=7)
    with pytest.raises(ValueError, match="not both"):
        small.generate(ids, max_length=9, max_new_tokens=2)


def test_generate_reports_nan(small):
    small.lm_head.weight.data[3] = math.nan
    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}, {"temperature": 1.0, "top_p": 0.5}):
        with pytest.raises(FloatingPointError, match="token 1: the logits are NaN"):
            next(generate(small, random_ids(small.config), **options))


def test_another_default_device(folder, monkeypatch):
    """A model that is loaded onto the CPU stays and works there ("meta" stands for a GPU)."""
    use_cpu_engine(monkeypatch)
    models = []
    for place in ("cpu", "meta"):
        with torch.device(place), pytest.warns(UserWarning, match="has no classifier"):
            head = PersimmonForTokenClassification.from_pretrained(folder).score
            models.append(PersimmonForCausalLM.from_pretrained(folder))
        assert head.weight.device.type == head.bias.device.type == "cpu"
    ids, prompt = random_ids(models[0].config, rows=1), {"max_new_tokens": 9, "stop_ids": ()}
    with torch.device("meta"):
        found = models[1].generate(ids, **prompt).tolist()
    assert found == models[0].generate(ids, **prompt).tolist()


# === Part II. Around the model =======================================================================================
# --- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported: a Persimmon checkpoint has 'relu2'"),
     ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "config key type = 'linear' is not supported"),
     ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type = 'yarn'"),
     ({"rope_parameters": {"rope_theta": 1e4, "factor": 2.0}}, "config key factor = 2.0 is not supported"),
     ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"factor": 2.0}}, "config key factor = 2.0"),
     ({"rope_parameters": [1]}, r"rope_parameters = \[1\] is not an object"),
     ({"num_key_value_heads": 1}, "num_key_value_heads = 1 is not supported: a Persimmon checkpoint has 3"),
     ({"head_dim": 32}, "head_dim = 32"), ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
     ({"model_type": "llama"}, "model_type = 'llama'"), ({"quantization_config": {}}, "quantization_config"),
     ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = .*gptq"),
     ({"hidden_size": 49}, "hidden_size = 49 is no multiple of"),
     ({"hidden_size": "big"}, "hidden_size = 'big' is not of type int"),
     ({"num_hidden_layers": 0}, "has to be above 0"),
     ({"hidden_size": True}, "hidden_size = True is not of type int"), ({"rope_theta": "1e4"}, "is not of type float"),
     ({"qk_layernorm": 1}, "qk_layernorm = 1 is not of type bool"),
     ({"hidden_dropout": 1.5}, "hidden_dropout = 1.5 is not a probability"),
     ({"classifier_dropout": -0.1}, "classifier_dropout = -0.1"),
     ({"hidden_dropout": math.nan}, "hidden_dropout = nan"),
     ({"eos_token_id": [1, 2]}, r"eos_token_id = \[1, 2\] is not of type int"),
     ({"pad_token_id": 97}, "pad_token_id = 97 is not in the vocabulary of 97"),
     ({"pad_token_id": -1}, "pad_token_id = -1"),
     ({"partial_rotary_factor": 0.2}, "partial_rotary_factor.* 3 of .*16.*an even number"),
     ({"partial_rotary_factor": 0.01}, "partial_rotary_factor.* 0 of .*16"),
     ({"rope_theta": 0}, "rope_theta = 0 has to be above 0"), ({"rope_theta": math.inf}, "rope_theta = inf"),
     ({"partial_rotary_factor": math.inf}, "partial_rotary_factor = inf"),
     ({"vocab_size": 10**30}, "vocab_size = 10+ has to be above 0 and below"),
     ({"problem_type": "guess"}, "problem_type = 'guess' is not supported: use one of regression, single"),
     ({"id2label": 3}, "id2label = 3 is not of type dict"),
     ({"torch_dtype": "int8"}, "dtype = 'int8' is not supported"),
     ({"dtype": 5}, "dtype = 5 is not of type str")],
)  # fmt: skip
def test_config_refuses(folders, tmp_path, change, message):
    raw = json.loads((folders["D16", "2023"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(ValueError, match=message) as caught:
        load_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_config_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*config.json: "):
        load_config(tmp_path)
    for text, message in (("{", "not valid JSON"), ("[]", "has to hold a JSON object, not a list"), ("\xff", "JSON"),
                          ("[" * 100_000, "not valid JSON")):  # fmt: skip
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=message):
            load_config(tmp_path)
    # null is the default, or a value of its own; what changes no result is ignored
    (tmp_path / "config.json").write_text(
        '{"model_type": "persimmon", "rope_scaling": null, "bos_token_id": null, "hidden_size": null, "use_cache": 1,'
        ' "quantize": "int8", "quantization": {"quantize": "int8"}, "hidden_dropout": 0,'
        ' "rope_parameters": {"type": null}}'
    )
    assert load_config(tmp_path) == PersimmonConfig(bos_token_id=None)


def test_config_checks_every_field():
    """What __post_init__ does not: a field that is new in PersimmonConfig needs a row in CONFIG_FIELDS."""
    listed = [name for names, *_ in persimmon.CONFIG_FIELDS for name in names.split()]
    assert sorted(listed) == sorted(field.name for field in fields(PersimmonConfig))
    for field in fields(PersimmonConfig):
        with pytest.raises(ValueError, match=f"config key {field.name} = .* is not of type"):
            checked_config(**{field.name: ()})
    assert checked_config(**asdict(CONFIG)) == CONFIG
    with pytest.raises(ValueError, match="num_labels = 3, but id2label has 2 labels"):
        checked_config(num_labels=3, id2label={"0": "a", "1": "b"})
    with pytest.raises(TypeError, match="hidden_sise"):
        checked_config(hidden_sise=4)


@pytest.mark.parametrize("form", ["2023", "transformers 5", "own"])
def test_config_survives_a_round_trip(tmp_path, form):
    odd = replace(CONFIG, rope_theta=1000.0, partial_rotary_factor=0.25, layer_norm_eps=1e-3, qk_layernorm=False,
                  dtype="float32", hidden_dropout=0.6, attention_dropout=0.1, classifier_dropout=0.2, num_labels=3,
                  initializer_range=0.1, id2label={"0": "sad", "1": "glad", "2": "mad"},
                  problem_type="regression")  # fmt: skip
    if form == "own":
        odd = replace(odd, quantization={"quantize": "int4", "group_size": 32})
        (tmp_path / "config.json").write_text(json.dumps(config_to_dict(odd)))
        assert config_to_dict(odd)["quantization_config"] == {"quant_method": "persimmon.py", **odd.quantization}
        theirs = transformers.PersimmonConfig.from_dict(config_to_dict(replace(odd, quantization=None)))
        rope = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.25}
        assert theirs.rope_parameters == config_to_dict(odd)["rope_parameters"] == rope
    else:
        write_config(tmp_path, odd, form)
        theirs = transformers.PersimmonConfig.from_pretrained(tmp_path)
        assert theirs.rope_parameters["rope_theta"] == 1000.0 and theirs.num_labels == 3
        assert theirs.rope_parameters["partial_rotary_factor"] == 0.25
        theirs.save_pretrained(tmp_path / "theirs")
        assert load_config(tmp_path / "theirs") == odd
    assert load_config(tmp_path) == odd


# --- loading and saving ----------------------------------------------------------------------------------------------


def shard(folder: Path) -> dict:
    """Split model.safetensors in two with an index; return the index."""
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return index


def test_shards(folder, small):
    shard(folder)
    done = []
    state = PersimmonForCausalLM.from_pretrained(folder, progress=done.append).state_dict()
    assert all(torch.equal(state[name], p) for name, p in small.state_dict().items())
    assert done == sorted(done) and len(done) == len(state) and done[-1] == 1.0


def damage(folder: Path, kind: str) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    if kind == "missing":
        del state["model.layers.2.mlp.dense_h_to_4h.bias"]
    elif kind == "unexpected":
        state["model.layers.4.mlp.dense_h_to_4h.bias"] = torch.zeros(80)
    elif kind == "misshapen":
        state["model.layers.2.self_attn.dense.bias"] = torch.zeros(47)
    elif kind == "integers":
        state["lm_head.weight"] = state["lm_head.weight"].to(torch.int8)
    elif kind == "twice":
        state["final_layernorm.bias"] = torch.zeros(48)
    if kind in ("missing", "unexpected", "misshapen", "integers", "twice"):
        file.unlink()
        save_file(state, file)
    elif kind == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "not safetensors":
        file.write_bytes(b"PK\x03\x04 something else entirely")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "only .bin":
        file.rename(folder / "pytorch_model-00001-of-00002.bin")
    elif kind == "no weights":
        file.unlink()
    elif kind == "shard missing":
        shard(folder)
        (folder / "model-00002-of-00002.safetensors").unlink()
    elif kind == "shard cut off":
        shard(folder)
        (folder / "model-00002-of-00002.safetensors").write_bytes(b"\x09" * 50)
    elif kind == "wrong shard":
        index = shard(folder)
        index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind in ("no weight_map", "odd weight_map"):
        shard(folder)
        (folder / "model.safetensors.index.json").write_text("{}" if kind[0] == "n" else '{"weight_map": {"a": 1}}')
    elif kind == "no folder":
        shutil.rmtree(folder)


DAMAGES = {
    "missing": r"lacks the tensor layers.2.mlp.dense_h_to_4h.bias \(1 in all\)",
    "unexpected": "has the tensor layers.4.mlp.dense_h_to_4h.bias, which is not in a PersimmonForCausalLM",
    "misshapen": r"safetensors has the tensor model.layers.2.self_attn.dense.bias in shape \(47,\).* makes it \(48,\)",
    "integers": "model.safetensors has the tensor lm_head.weight as torch.int8: config.json makes it torch.float32",
    "twice": "has tensors twice, with and without `model.`",
    "cut off": "model.safetensors is cut off, damaged or no safetensors file",
    "not safetensors": "model.safetensors is cut off, damaged or no safetensors file",
    "empty": "model.safetensors is cut off, damaged or no safetensors file",
    "only .bin": "convert .bin files with `python convert.py .*model .*model-safetensors`",
    "no weights": "holds no model.safetensors or model.safetensors.index.json",
    "shard missing": "index.json says that .* is in model-00002-of-00002.safetensors, which is not there",
    "shard cut off": "model-00002-of-00002.safetensors is cut off, damaged",
    "wrong shard": "model-00002-of-00002.safetensors lacks the tensor lm_head.weight",
    "no weight_map": "index.json has no weight_map",
    "odd weight_map": "index.json has no weight_map",
    "no folder": "there is no folder .*model",
}


def test_load_names_what_replaces_sparse():
    with pytest.raises(ValueError, match="no sparse= any more: see model.fast"):
        PersimmonForCausalLM.from_pretrained(TINY, sparse=False)


@pytest.mark.parametrize("kind", DAMAGES)
def test_loading_is_strict(folder, kind):
    damage(folder, kind)
    with pytest.raises((ValueError, FileNotFoundError), match=DAMAGES[kind]) as caught:
        PersimmonForCausalLM.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_the_exceptions_to_strictness(folder, small):
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    state["model.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(state, folder / "model.safetensors")
    ids = random_ids(small.config)
    with torch.no_grad():
        expected = small.model(ids).last_hidden_state
        assert torch.equal(PersimmonForCausalLM.from_pretrained(folder)(ids).logits, small(ids).logits)
        bare = PersimmonModel.from_pretrained(folder)
        assert torch.equal(bare(ids).last_hidden_state, expected)
        bare.save_pretrained(folder)  # now without `model.` in front of the names
        assert "layers.0.mlp.dense_h_to_4h.bias" in load_file(folder / "model.safetensors")
        assert torch.equal(PersimmonModel.from_pretrained(folder)(ids).last_hidden_state, expected)
    with pytest.raises(ValueError, match="lacks the tensor lm_head.weight"):
        PersimmonForCausalLM.from_pretrained(folder)


def test_changes_to_the_config_are_checked(folder):
    assert PersimmonForCausalLM.from_pretrained(folder, hidden_dropout=0.5).config.hidden_dropout == 0.5
    for change, message in (({"hidden_dropout": 2}, "hidden_dropout = 2 is not a probability"),
                            ({"num_labels": 0}, "above 0"),
                            ({"pad_token_id": 97}, "pad_token_id = 97"),
                            ({"hidden_size": "48"}, "not of type int")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            PersimmonForCausalLM.from_pretrained(folder, **change)
    with pytest.raises(TypeError, match="num_lables"):
        PersimmonForCausalLM.from_pretrained(folder, num_lables=3)


def test_dtype(folder):
    def dtype_of(config_dtype, tensors, dtype="auto"):
        state = {name: t.to(tensors) for name, t in load_file(folder / "model.safetensors").items()}
        save_file(state, folder / "model.safetensors")
        raw = json.loads((folder / "config.json").read_text())
        raw.pop("torch_dtype", None), raw.pop("dtype", None)
        (folder / "config.json").write_text(json.dumps(raw | config_dtype))
        model = PersimmonForCausalLM.from_pretrained(folder, dtype)
        (found,) = {p.dtype for p in model.parameters()}
        return found

    assert dtype_of({}, torch.float32) == torch.float32
    assert dtype_of({"torch_dtype": "bfloat16"}, torch.float32) == torch.bfloat16
    assert dtype_of({"dtype": "float16", "torch_dtype": "bfloat16"}, torch.float32) == torch.float16
    assert dtype_of({"torch_dtype": "bfloat16"}, torch.float32, "float32") == torch.float32
    assert dtype_of({"torch_dtype": "bfloat16"}, torch.float32, torch.float16) == torch.float16
    assert dtype_of({}, torch.bfloat16) == torch.bfloat16
    for dtype in ("float8", torch.float64, None):
        with pytest.raises(ValueError, match="dtype .* is not supported: use one of bfloat16, float16, float32"):
            PersimmonForCausalLM.from_pretrained(folder, dtype)


def test_weights_are_mapped_and_training_leaves_the_file(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = PersimmonForCausalLM.from_pretrained(folder)
    assert not model.training and str(folder / "model.safetensors") in Path("/proc/self/maps").read_text()
    assert all(p.is_contiguous() and p.requires_grad for p in model.parameters())
    ids = random_ids(model.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert (folder / "model.safetensors").read_bytes() == before


def test_save_pretrained(folder, tmp_path, monkeypatch):
    model, ids = PersimmonForCausalLM.from_pretrained(folder), random_ids(CONFIG)
    new = tmp_path / "deep" / "new"
    model.save_pretrained(new)
    assert sorted(os.listdir(new)) == ["config.json", "model.safetensors"] and os.listdir(new.parent) == ["new"]
    (tmp_path / "plain").mkdir()
    assert new.stat().st_mode == (tmp_path / "plain").stat().st_mode  # and not a temporary folder's
    (tmp_path / "plain").rmdir()
    assert (new / "model.safetensors").stat().st_mode == (new / "config.json").stat().st_mode
    assert json.loads((new / "config.json").read_text())["architectures"] == ["PersimmonForCausalLM"]
    with torch.no_grad():
        expected = model(ids).logits
        theirs = oracle(new)
        assert torch.equal(PersimmonForCausalLM.from_pretrained(new)(ids).logits, expected)
        assert close(theirs(ids).logits, expected)
        theirs.save_pretrained(tmp_path / "theirs")  # and back
        assert torch.equal(PersimmonForCausalLM.from_pretrained(tmp_path / "theirs")(ids).logits, expected)
    assert load_config(tmp_path / "theirs") == load_config(new)
    # over itself, in another dtype, beside a file that stays
    (new / "tokenizer.model").write_bytes(b"x")
    model.bfloat16().save_pretrained(new)
    assert (new / "tokenizer.model").exists() and load_config(new).dtype == "bfloat16"
    assert next(PersimmonForCausalLM.from_pretrained(new).parameters()).dtype == torch.bfloat16
    # weights in another memory layout are stored like others
    model.lm_head.weight.data = model.lm_head.weight.data.t().contiguous().t()
    model.save_pretrained(new)
    assert all(torch.equal(p, load_file(new / "model.safetensors")[name]) for name, p in model.state_dict().items())
    # whole or not at all
    before = {file.name: file.read_bytes() for file in new.iterdir()}
    cpu, copied = torch.Tensor.cpu, []

    def fails(tensor):
        if len(copied) == 10:
            raise KeyboardInterrupt
        copied.append(tensor)
        return cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", fails)
    for target in (new, tmp_path / "other"):
        with pytest.raises(KeyboardInterrupt):
            model.float().save_pretrained(target)
    with pytest.raises(ValueError, match="dtype = 'float64' is not supported"):
        model.double().save_pretrained(new)
    assert len(copied) == 10
    assert {file.name: file.read_bytes() for file in new.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["deep", "model", "theirs"] and os.listdir(new.parent) == ["new"]


def test_write_safetensors_piece_by_piece(tmp_path):
    file, asked = tmp_path / "some.safetensors", []
    whole = {"a" * n: torch.randn(n + 1, 3).to(dtype) for n, dtype in enumerate(persimmon.SAFETENSORS_DTYPES, 1)}

    def pieces(tensor):
        for row in tensor:
            asked.append(file.exists())  # only when it is its turn
            yield row

    write_safetensors(file, [(name, t.dtype, t.shape, pieces(t)) for name, t in whole.items()])
    found = load_file(file)
    assert asked == [True] * 20 and list(found) == list(whole)
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in whole.items())
    for length in range(1, 9):  # of the name: the header has another length, and the data begins at a multiple of 64
        write_safetensors(file, [("n" * length, torch.float32, (2,), [torch.ones(2)])])
        start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert start % 64 == 0 and start + 8 == file.stat().st_size
    write_safetensors(file, [])
    assert load_file(file) == {}


def halve(model, group_size: int, progress) -> None:
    """A quantizer for tests: lm_head as int8, half of its values, with a scale."""
    if model.config.quantization is not None:
        raise ValueError("the model is quantized already, in halves")
    layer = torch.nn.Module()
    codes = torch.empty(97, 48, dtype=torch.int8, device="meta")
    if not model.lm_head.weight.is_meta:
        codes = (model.lm_head.weight / 2).to(torch.int8)
    layer.register_buffer("weight", codes)
    layer.register_buffer("weight_scale", torch.full((97,), float(group_size), device=codes.device))
    layer.forward = lambda x: x @ layer.weight.T.to(x.dtype) * layer.weight_scale
    model.lm_head = layer
    for part in (model, model.model):
        part.config = replace(model.config, quantization={"quantize": "halves", "group_size": group_size})
    if progress is not None:
        progress(1.0)


def test_quantized_folders(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(persimmon, "QUANTIZERS", {"halves": halve})
    ids, done = random_ids(CONFIG), []
    model = PersimmonForCausalLM.from_pretrained(folder, quantize="halves", group_size=64, progress=done.append)
    assert done == [1.0] and not model.training
    model.save_pretrained(tmp_path / "small")
    again = PersimmonForCausalLM.from_pretrained(tmp_path / "small")
    assert again.config.quantization == {"quantize": "halves", "group_size": 64}
    assert again.lm_head.weight.dtype == torch.int8
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        again = PersimmonForCausalLM.from_pretrained(tmp_path / "small", "bfloat16")
        assert (again.lm_head.weight.dtype, again.lm_head.weight_scale.dtype) == (torch.int8, torch.bfloat16)
    # without a dtype in config.json, the first float in the file decides
    state = {name: t.clone() for name, t in again.state_dict().items()}  # not mapped from the file that is written
    raw = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(raw | {"dtype": None, "torch_dtype": None}))
    first = sorted(state.items(), key=lambda item: item[1].is_floating_point())
    write_safetensors(tmp_path / "small" / "model.safetensors", [(n, t.dtype, t.shape, [t]) for n, t in first])
    again = PersimmonForCausalLM.from_pretrained(tmp_path / "small")
    assert {t.dtype for t in again.state_dict().values()} == {torch.int8, torch.bfloat16}
    with pytest.raises(ValueError, match="the model is quantized already, in halves"):
        PersimmonForCausalLM.from_pretrained(tmp_path / "small", quantize="halves")
    with pytest.raises(ValueError, match="quantize = 'int3' for .*model: this copy of persimmon.py has halves$"):
        PersimmonForCausalLM.from_pretrained(folder, quantize="int3")
    file = tmp_path / "small" / "model.safetensors"
    state = load_file(file)
    for dtype in (torch.float32, torch.uint8):
        save_file({**state, "lm_head.weight": state["lm_head.weight"].to(dtype)}, file)
        with pytest.raises(ValueError, match=f"lm_head.weight as {dtype}: config.json makes it torch.int8"):
            PersimmonForCausalLM.from_pretrained(tmp_path / "small")
    monkeypatch.setattr(persimmon, "QUANTIZERS", {})
    with pytest.raises(ValueError, match="quantize = 'halves' for .*small: .* has neither int8 nor int4"):
        PersimmonForCausalLM.from_pretrained(tmp_path / "small")
    for kind in ([], None):  # in config.json, anything
        raw = json.loads((folder / "config.json").read_text())
        raw["quantization_config"] = {"quant_method": "persimmon.py", "quantize": kind}
        (folder / "config.json").write_text(json.dumps(raw))
        with pytest.raises(ValueError, match="has neither int8 nor int4"):
            PersimmonForCausalLM.from_pretrained(folder)


# --- tokenizer, streaming, chat prompt -------------------------------------------------------------------------------

CORPUS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs",
          "To be, or not to be",
          "how vexingly quick daft zebras jump", "sphinx of black quartz, judge my vow",
          "été à la plage"] * 3  # fmt: skip


def train_sentencepiece(file: Path, **options) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=330, byte_fallback=True, minloglevel=2,
        hard_vocab_limit=False, **options,
    )  # fmt: skip
    file.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


ENDOFTEXT = {"user_defined_symbols": ["|ENDOFTEXT|"]}
STYLES = {
    "as SentencePiece makes it": ENDOFTEXT,
    "control": {"control_symbols": ["|ENDOFTEXT|"], "normalization_rule_name": "identity"},
    "spaces kept": {**ENDOFTEXT, "remove_extra_whitespaces": False},
    "no space in front": {**ENDOFTEXT, "add_dummy_prefix": False, "remove_extra_whitespaces": False},
}


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for style, options in STYLES.items():
        file = folder / f"{style}.model"
        oracle = train_sentencepiece(file, **options)
        made[style] = Tokenizer(file), oracle
    return made


words = st.sampled_from(["the", " quick", "  ", "\n", "é", "日本", "🙂", "fox "])
texts = st.text(max_size=40) | st.lists(words).map("".join)


@given(text=texts, style=st.sampled_from(list(STYLES)))
@example(text="", style="as SentencePiece makes it")
@example(text="  a  b ", style="spaces kept")
def test_tokenizer_is_sentencepiece(tokenizers, text, style):
    tokenizer, oracle = tokenizers[style]
    ids = oracle.encode(text)
    assert tokenizer.encode(text, add_bos=False) == ids
    assert tokenizer.encode(text) == [oracle.piece_to_id("|ENDOFTEXT|"), *ids]
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.decode(torch.tensor(ids)) == oracle.decode(ids)


@st.composite
def token_sequences(draw):
    """Any ids, but often bytes, and often bytes that make characters."""
    byte = st.integers(0, 255).map(lambda value: f"<0x{value:02X}>")
    characters = st.characters(min_codepoint=0x80, exclude_categories=["Cs"])
    character = characters.map(lambda c: [f"<0x{b:02X}>" for b in c.encode()])
    piece = st.integers(-2, 340)
    runs = st.one_of(piece.map(lambda i: [i]), byte.map(lambda b: [b]), character, character.map(lambda c: c[:-1]),
                     st.sampled_from([["▁"], ["|ENDOFTEXT|"], ["▁jump"], ["</s>"]]))  # fmt: skip
    return [token for run in draw(st.lists(runs, max_size=12)) for token in run]


@given(sequence=token_sequences(), prompt=token_sequences(), style=st.sampled_from(list(STYLES)))
@example(sequence=["▁jump", "▁jump"], prompt=["|ENDOFTEXT|"], style="as SentencePiece makes it")
@example(sequence=["▁jump"], prompt=["▁jump"], style="as SentencePiece makes it")
@example(sequence=["▁", "▁jump"], prompt=[], style="as SentencePiece makes it")
@example(sequence=["▁", "▁jump"], prompt=[], style="spaces kept")
@example(sequence=["<0xC3>", "<0xC3>", "▁jump", "<0xA9>"], prompt=[], style="spaces kept")
@example(sequence=["<0xE2>", "|ENDOFTEXT|", "<0x82>", "<0xAC>"], prompt=[], style="control")
@example(sequence=["<0xED>", "<0xA0>", "<0x80>", "<0xF4>", "<0x90>", "<0xC0>", "<0x80>"], prompt=["▁"], style="control")
def test_streaming_equals_decoding_the_whole(tokenizers, sequence, prompt, style):
    tokenizer, oracle = tokenizers[style]
    assert oracle.piece_to_id("▁jump") != oracle.unk_id() != oracle.piece_to_id("▁")
    new, old = ([i if isinstance(i, int) else oracle.piece_to_id(i) for i in part] for part in (sequence, prompt))
    whole = tokenizer.decode(old + new)
    eot, unknown = tokenizer.end_of_text, oracle.unk_id()
    assert whole == oracle.decode([i if 0 <= i < len(oracle) else unknown for i in old + new if i != eot])
    decoder, text = StreamDecoder(tokenizer, []), ""
    for n, i in enumerate(old + new, 1):
        text += decoder.push(i)
        assert whole.startswith(text) or not text.isprintable()
        # nothing is held but what is no character, or not one yet
        assert tokenizer.decode((old + new)[:n])[len(text) :].strip("\ufffd") == ""
    assert text + decoder.finish() == whole
    # after a prompt that ends where a character ends, only what follows it
    before = tokenizer.decode(old)
    if not before.endswith("\ufffd"):
        decoder = StreamDecoder(tokenizer, old)
        assert before + "".join(map(decoder.push, new)) + decoder.finish() == whole


def test_no_incomplete_character_is_shown(tokenizers):
    tokenizer, oracle = tokenizers["spaces kept"]
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in tokenizer.encode("日🙂é fox", add_bos=False)]
    assert "\ufffd" not in "".join(pieces) and "".join(pieces) == "日🙂é fox"
    assert pieces.count("") >= 2 + 3  # the bytes before the last one of 日 and of 🙂
    # a character that is U+FFFD itself is complete, and is not repeated
    character = [oracle.piece_to_id(f"<0x{byte:02X}>") for byte in "\ufffd".encode()]
    assert tokenizer.decode(character * 2) == "\ufffd\ufffd"
    decoder = StreamDecoder(tokenizer, character * 2)
    assert decoder.pending == []
    assert "".join(map(decoder.push, tokenizer.encode("日", add_bos=False))).strip() == "日"


def test_tokenizer_files(tmp_path):
    oracle = train_sentencepiece(tmp_path / "tokenizer.model", **ENDOFTEXT)
    bos = [oracle.piece_to_id("|ENDOFTEXT|")]
    for config, expected in (({}, bos), ({"add_bos_token": True}, bos), ({"add_bos_token": False}, [])):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert Tokenizer(tmp_path).encode("fox") == expected + oracle.encode("fox")
        assert Tokenizer(tmp_path / "tokenizer.model").encode("fox") == expected + oracle.encode("fox")
    assert Tokenizer(tmp_path).encode("fox", add_bos=True) == bos + oracle.encode("fox")
    (tmp_path / "tokenizer_config.json").write_text('{"add_eos_token": true}')
    with pytest.raises(ValueError, match="tokenizer_config.json asks for add_eos_token"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert len(Tokenizer(tmp_path)) == len(oracle)
    oracle = train_sentencepiece(tmp_path / "plain.model")
    assert Tokenizer(tmp_path / "plain.model").end_of_text == oracle.eos_id() == 2
    train_sentencepiece(tmp_path / "none.model", eos_id=-1)
    with pytest.raises(ValueError, match=r"none.model has no piece \|ENDOFTEXT\|"):
        Tokenizer(tmp_path / "none.model")
    with pytest.raises(FileNotFoundError, match="no file .*nothing"):
        Tokenizer(tmp_path / "nothing")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="bad.model is damaged or no SentencePiece model"):
        Tokenizer(tmp_path / "bad.model")


def test_tokenizer_batches(tokenizers):
    tokenizer, oracle = tokenizers["spaces kept"]
    batch = tokenizer(["the fox", "the lazy dog jumps"], return_tensors="pt")
    assert list(batch) == ["input_ids", "attention_mask"] and {t.dtype for t in batch.values()} == {torch.long}
    lengths = batch["attention_mask"].sum(1).tolist()
    for ids, mask, text in zip(*batch.values(), ["the fox", "the lazy dog jumps"]):
        assert ids[mask == 1].tolist() == tokenizer.encode(text)
        assert mask.sort().values.equal(mask)  # padding on the left
    assert lengths[0] < lengths[1] == batch["input_ids"].shape[1]
    assert tokenizer("the fox")["input_ids"].tolist() == [tokenizer.encode("the fox")]
    with pytest.raises(ValueError, match="return_tensors = 'np'"):
        tokenizer("fox", return_tensors="np")
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer("a\udc80")


def test_chat_prompt():
    assert chat_prompt(["Hi, there"]) == "human: Hi, there\n\nadept:"
    assert chat_prompt(["a", " b ", "c"]) == "human: a\n\nadept: b\n\nhuman: c\n\nadept:"
    for turns in (["a", "b"], []):
        with pytest.raises(ValueError, match=f"ends with a human's turn: {len(turns)} is an even number"):
            chat_prompt(turns)


# --- classifiers -----------------------------------------------------------------------------------------------------


def classifier(tmp_path: Path, kind: str, **changes):
    """Random weights as our classifier and as transformers', with gradients to compare."""
    ours = {"sequence": PersimmonForSequenceClassification, "token": PersimmonForTokenClassification}[kind]
    theirs = getattr(transformers, ours.__name__)
    randomize(ours(replace(CONFIG, **changes))).save_pretrained(tmp_path)
    return ours.from_pretrained(tmp_path), theirs.from_pretrained(tmp_path, dtype="float32").eval()


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Four rows, padded with id 5 on the left, on the right, not at all and everywhere."""
    ids, mask = random_ids(CONFIG, rows=4), torch.ones(4, T, dtype=torch.long)
    ids[0, :9], mask[0, :9], ids[1, 50:], mask[1, 50:], ids[3, 1:] = 5, 0, 5, 0, 5
    return ids, mask


def compare(ours, theirs, *inputs, **options):
    a, b = ours(*inputs, **options), theirs(*inputs, **options)
    assert close(a.logits, b.logits) and close(a.loss, b.loss)
    a.loss.backward(), b.loss.backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert close(p.grad, expected[name].grad), name


@pytest.mark.parametrize(
    ("K", "problem_type", "labels"),
    [(1, None, torch.randn(4)), (1, None, torch.randn(4, 1)), (3, "regression", torch.randn(4, 3)),
     (3, None, torch.tensor([2, 0, 1, 1])), (3, "single_label_classification", torch.tensor([2, -100, 1, 0])),
     (3, None, torch.rand(4, 3)), (3, "multi_label_classification", torch.rand(4, 3).round())],
)  # fmt: skip
def test_sequence_classification(tmp_path, K, problem_type, labels):
    ours, theirs = classifier(tmp_path, "sequence", num_labels=K, problem_type=problem_type)
    assert theirs.config.num_labels == K
    ids, mask = padded_batch()
    compare(ours, theirs, ids, attention_mask=mask, labels=labels)
    with torch.no_grad():
        alone = torch.cat([ours(ids[b : b + 1, mask[b] == 1]).logits for b in range(3)])
        assert close(ours(ids, mask).logits[:3], alone)  # the padding is not what is judged
        embeds, places = torch.randn(4, T, 48), 2 * torch.arange(T)[None]  # not shifted: RoPE is relative
        assert close(ours(inputs_embeds=embeds).logits, theirs(inputs_embeds=embeds).logits)
        shifted = ours(ids, mask, places).logits
        assert close(shifted, theirs(ids, mask, places.expand(4, T)).logits)


def test_sequence_classification_without_padding_token(tmp_path):
    ours, theirs = classifier(tmp_path, "sequence", num_labels=3, pad_token_id=None)
    ids = random_ids(CONFIG, rows=1)
    compare(ours, theirs, ids, labels=torch.tensor([2]))
    with pytest.raises(ValueError, match="to find where 2 texts end, config.json has to have a pad_token_id"):
        ours(ids.expand(2, -1))


def test_the_last_token_of_a_long_text_in_half_precision(tmp_path):
    """Positions above 256 are not counted in bfloat16, even if that is the default dtype."""
    model = randomize(PersimmonForSequenceClassification(replace(CONFIG, max_position_embeddings=600)))
    ids = random_ids(CONFIG, rows=2, length=515)
    ids[0, 514:], ids[1, 400:] = 5, 5
    with torch.no_grad():
        expected = model(ids).logits
        try:
            torch.set_default_dtype(torch.bfloat16)
            assert torch.equal(model(ids).logits, expected)
        finally:
            torch.set_default_dtype(torch.float32)
        assert close(model(ids[:1, :514]).logits, expected[:1])


def test_classifiers_compile_with_dynamic_shapes():
    for cls in (PersimmonForSequenceClassification, PersimmonForTokenClassification):
        model = randomize(cls(replace(CONFIG, num_hidden_layers=1))).eval()
        dynamic = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
        for rows, length in ((2, 9), (3, 17)):
            ids = random_ids(CONFIG, rows, length)
            with torch.no_grad():
                assert close(dynamic(ids).logits, model(ids).logits)


def test_token_classification(tmp_path):
    ours, theirs = classifier(tmp_path, "token", num_labels=6)
    ids, mask = padded_batch()
    labels = torch.randint(6, (4, T))
    labels[mask == 0] = -100
    labels[2, 10:20] = -100
    a, b = ours(ids, mask), theirs(ids, mask)
    assert close(a.logits[mask == 1], b.logits[mask == 1]) and a.loss is None
    compare(ours, theirs, ids[2:], labels=labels[2:])
    assert close(ours(ids, mask, labels=labels).loss, theirs(ids, mask, labels=labels).loss)
    embeds = torch.randn(2, T, 48)
    assert close(ours(inputs_embeds=embeds).logits, theirs(inputs_embeds=embeds).logits)


@pytest.mark.parametrize("changes", [{"classifier_dropout": 1.0}, {"hidden_dropout": 1.0},
                                     {"hidden_dropout": 1.0, "classifier_dropout": 0.0}])  # fmt: skip
def test_token_classification_dropout(tmp_path, changes):
    ours, theirs = classifier(tmp_path, "token", num_labels=6, **changes)
    ids = random_ids(CONFIG)
    trained = ours.train()(ids).logits
    assert close(trained, theirs.train()(ids).logits) and not close(trained, ours.eval()(ids).logits, 0.1)
    is_all_bias = close(trained, ours.score.bias.expand_as(trained), 1e-6)
    assert is_all_bias == (changes.get("classifier_dropout") != 0.0)


@pytest.mark.parametrize("cls", [PersimmonForSequenceClassification, PersimmonForTokenClassification])
def test_a_classifier_from_a_language_model(folder, tmp_path, cls, small):
    with pytest.warns(UserWarning,
                      match="has no classifier: score.*weight is new, random.*lm_head.weight is not used") as said:
        with torch.device("meta"):  # "meta" stands for a GPU as the default device
            model = cls.from_pretrained(folder, num_labels=50, pad_token_id=7)
    assert said[0].filename == __file__  # the caller's line, not the loader's
    assert model.config.num_labels == 50 and model.config.pad_token_id == 7 and not model.training
    assert torch.equal(model.model.layers[1].mlp.dense_4h_to_h.bias, small.model.layers[1].mlp.dense_4h_to_h.bias)
    assert model.score.weight.shape == (50, 48) and 0.015 < model.score.weight.std() < 0.025
    assert {(p.device.type, p.dtype, p.requires_grad) for p in model.parameters()} == {("cpu", torch.float32, True)}
    assert model.score.bias is None or (model.score.bias == 0).all()
    with pytest.warns(UserWarning, match="has no classifier"):
        half = cls.from_pretrained(folder, "bfloat16", initializer_range=0.5)
    assert half.score.weight.dtype == torch.bfloat16 and half.score.weight.std() > 0.3
    # a classifier's own folder is strict again
    model.save_pretrained(tmp_path / "own")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = cls.from_pretrained(tmp_path / "own")
    assert torch.equal(again.score.weight, model.score.weight) and again.config.num_labels == 50
    file = tmp_path / "own" / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": torch.zeros(97, 48)}, file)
    with pytest.raises(ValueError, match="has the tensor lm_head.weight, which is not in"):
        cls.from_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"score.\w+ in shape \(50"):
        model.save_pretrained(tmp_path / "own")
        cls.from_pretrained(tmp_path / "own", num_labels=3, id2label=None)


def test_label_names_are_kept(tmp_path):
    names = {"0": "sad", "1": "glad", "2": "mad"}
    model = PersimmonForTokenClassification(replace(CONFIG, num_labels=3, id2label=names))
    model.save_pretrained(tmp_path)
    assert load_config(tmp_path).id2label == names
    theirs = transformers.PersimmonForTokenClassification.from_pretrained(tmp_path)
    assert list(theirs.config.id2label.values()) == list(names.values())


def test_classifiers_refuse_training_in_float16(small):
    ids = random_ids(small.config)
    for cls in (PersimmonForSequenceClassification, PersimmonForTokenClassification):
        model = cls(small.config).half()
        labels = {"labels": torch.zeros(2, dtype=torch.long) if "Sequence" in cls.__name__ else ids * 0}
        with pytest.raises(ValueError, match="float16 .* use bfloat16"):
            model.train()(ids, **labels)
        assert model.eval()(ids, **labels).loss.dtype == torch.float32
        assert model.bfloat16().train()(ids, **labels).loss.isfinite()


# --- the file alone, the well-known snippet, tiny/, the real weights -------------------------------------------------


def test_persimmon_py_alone_needs_torch_only(tmp_path):
    shutil.copy(HERE / "persimmon.py", tmp_path)
    code = """
import sys
class Block:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("safetensors", "sentencepiece", "triton", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch
threads, state = torch.get_num_threads(), torch.get_rng_state()
import persimmon
assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
config = persimmon.PersimmonConfig(vocab_size=50, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                                   num_attention_heads=2)
model = persimmon.PersimmonForCausalLM(config).eval()
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5).shape)
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "torch.Size([1, 8])\n", result.stderr
    assert result.stderr == ""


def test_the_snippet_of_transformers_documentation():
    """With its imports changed, and this project's model for Adept's."""
    path = TINY
    tokenizer = Tokenizer(path)
    model = PersimmonForCausalLM.from_pretrained(path, dtype="auto")
    inputs = tokenizer("Plants create energy through a process known as photosynthesis.", return_tensors="pt")
    outputs = model.generate(**inputs, max_length=50)
    text = tokenizer.decode(outputs[0])
    assert text.startswith("Plants create energy through a process known as photosynthesis.") and len(outputs[0]) <= 50


def test_tiny_is_a_persimmon():
    config, tokenizer = load_config(TINY), Tokenizer(TINY)
    assert (config.head_dim, config.rotary_dim, config.rope_theta) == (64, 32, 25000.0) and config.qk_layernorm
    assert config.intermediate_size == 4 * config.hidden_size and config.vocab_size == len(tokenizer)
    assert config.bos_token_id == config.eos_token_id == tokenizer.end_of_text
    assert tokenizer.processor.id_to_piece(tokenizer.end_of_text) == "|ENDOFTEXT|"
    assert sum(file.stat().st_size for file in TINY.iterdir() if file.is_file()) <= 11e6
    theirs = oracle(TINY)
    ids = tokenizer("ROMEO:\nWhat light through yonder window breaks?\n")["input_ids"]
    with torch.no_grad():
        ours = PersimmonForCausalLM.from_pretrained(TINY, "float32")
        assert close(ours(ids).logits, theirs(ids).logits)
        loss = ours(ids, labels=ids).loss.item() * (ids.shape[1] - 1) / len(tokenizer.decode(ids[0]))
    assert loss < 2.0  # nats a character; noise has log(1024) a token, about 3


@given(text=st.text(max_size=60) | st.text("ab \n\t.", max_size=60))
def test_tiny_tokenizer_loses_nothing(text):
    tokenizer = Tokenizer(TINY)
    text = text.replace("\0", "")  # SentencePiece's own end of string
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")  # its own sign for a space



@pytest.mark.skipif("PERSIMMON_8B_CHAT" not in os.environ,
                    reason="PERSIMMON_8B_CHAT names no folder with Adept's weights")
def test_the_published_answer_of_the_real_chat_model():
    """From transformers' own integration test of adept/persimmon-8b-chat."""
    folder = os.environ["PERSIMMON_8B_CHAT"]
    model, tokenizer = PersimmonForCausalLM.from_pretrained(folder, "bfloat16"), Tokenizer(folder)
    ids = torch.tensor([tokenizer.encode(chat_prompt(["Simply put, the theory of relativity states that?"]))])
    answer = tokenizer.decode(model.generate(ids, max_new_tokens=60)[0, ids.shape[1] :])
    assert answer.strip() == (
        "The theory of relativity states that the laws of physics are the same for all observers, "
                              "regardless of their relative motion.")  # fmt: skip
    with torch.no_grad():
        means = model(torch.tensor([[1, 306, 4658, 278, 6593, 310, 2834, 338]])).logits.float().mean(-1)
    expected = [-11.4726, -11.1495, -11.2694, -11.2223, -10.9452, -11.0663, -11.0031, -11.1028]
    assert close(means, torch.tensor([expected]), 0.3)  # those were computed in 8 bits


# === Part III. Faster ================================================================================================


def test_is_unmodified():
    layer = torch.nn.Linear(8, 8).eval()
    assert is_unmodified(layer, torch.nn.Linear) and not is_unmodified(layer, torch.nn.LayerNorm)
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
                     "register_full_backward_pre_hook"):  # fmt: skip
        handle = getattr(layer, register)(lambda *_: None)
        assert not is_unmodified(layer, torch.nn.Linear)
        handle.remove()
    with replaced_forward([(layer, lambda x: x)]):
        assert not is_unmodified(layer, torch.nn.Linear)
    assert is_unmodified(layer, torch.nn.Linear)
    layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(Packed))
    assert not is_unmodified(layer, torch.nn.Linear)
    assert not is_unmodified(type("Lora", (torch.nn.Linear,), {})(8, 8).eval(), torch.nn.Linear)
    assert not is_unmodified(torch.nn.Linear(8, 8), torch.nn.Linear)  # in training


class Packed(torch.Tensor):
    """As weights of torchao's are, which no kernel can read."""

    def __deepcopy__(self, memo) -> torch.nn.Parameter:
        return torch.nn.Parameter(self.data.clone())


def test_replaced_forward():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    with pytest.raises(KeyboardInterrupt), replaced_forward([(a, lambda x: x + 1), (b, lambda x: x * 2)]):
        assert a(3) == 4 and b(3) == 6
        raise KeyboardInterrupt
    assert "forward" not in {**vars(a), **vars(b)}


def test_is_as_exact():
    exact, noise = torch.randn(1000), torch.randn(1000)
    plain = exact + 0.01 * noise
    assert is_as_exact(plain, plain, exact) and is_as_exact(exact - 0.019 * noise, plain, exact)
    assert not is_as_exact(exact + 0.021 * noise, plain, exact) and not is_as_exact(plain * math.nan, plain, exact)
    assert is_as_exact(exact + 1e-6, exact, exact) and not is_as_exact(exact + 1e-3, exact, exact)


@pytest.mark.parametrize("rows, density", [(1, 0.0), (1, 0.1), (3, 0.3), (4, 0.05)])
def test_nonzero_bags(rows, density):
    x = torch.randn(rows, 1, 397) * (torch.rand(rows, 1, 397) < density)  # a number that no number of bags divides
    with torch.no_grad():
        column, value, start = nonzero_bags(x, 4, 1.5)
        assert nonzero_bags(x, rows - 1, 1.5) is None and nonzero_bags(torch.ones(2, 397), 4, 1.5) is None
    assert nonzero_bags(x, 4, 1.5) is None  # gradients are enabled
    edges = [*start.flatten().tolist(), len(column)]
    again, bags = torch.zeros(rows, 397), start.shape[1]
    for n, (a, b) in enumerate(itertools.pairwise(edges)):
        again[n // bags, column[a:b]] = value[a:b]
        assert all(n % bags * 397 // bags <= f <= (n % bags + 1) * 397 // bags for f in column[a:b].tolist())
    assert torch.equal(again, x[:, 0]) and edges == sorted(edges)


# === Part III a. CPU =================================================================================================


@pytest.fixture
def reads(monkeypatch) -> Counter:
    """Counts of the operators that are for one row, while every matrix counts as large."""
    counts = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    bag, dots = torch.nn.functional.embedding_bag, torch.ops.aten._embedding_bag_per_sample_weights_backward
    monkeypatch.setattr(torch.nn.functional, "embedding_bag", counted("sums", bag))
    monkeypatch.setattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", counted("dots", dots))
    monkeypatch.setattr(torch, "mv", counted("mv", torch.mv))
    monkeypatch.setattr(torch.nn.functional, "linear", counted("linear", torch.nn.functional.linear))
    use_cpu_engine(monkeypatch)
    return counts


def test_cpu_has():
    assert all(persimmon.cpu_has(name) == getattr(torch.cpu, f"_is_{name}_supported")() for name in PROCESSORS["AMX"])
    assert persimmon.cpu_has("nonsense") is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dot_products(dtype):
    weight, x = torch.randn(56, 24).to(dtype), torch.randn(24).to(dtype)
    assert close(dot_products(weight, x).double(), weight.double() @ x.double(),
                 1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_linear(monkeypatch, reads, processor, dtype):
    """And small_batch_matmul: which operator is used for how many rows, on which processor."""
    use_cpu_engine(monkeypatch, processor)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for bias, shape in itertools.product((True, False), ((1, 1, 24), (24,), (2, 1, 24), (1, 32, 24), (1, 33, 24))):
        layer = torch.nn.Linear(24, 56, bias).to(dtype)
        rows, x = math.prod(shape[:-1]), torch.randn(shape).to(dtype)
        is_dots = processor == "Zen 4" and dtype != torch.float16 and rows == 1
        is_amx = processor == "AMX" and dtype == torch.bfloat16 and rows <= 32
        reads.clear()
        with torch.no_grad():
            y = cpu_linear(layer, x)
            assert reads == ({"dots": 1} if is_dots else {"mv": 1} if is_amx and rows == 1 else {} if is_amx
                             else {"linear": 1})
            assert close(y, layer(x), tolerance) and y.is_contiguous()
            assert (small_batch_matmul(layer.weight, x.view(rows, 24)) is not None) == (is_dots or is_amx)
    reads.clear()
    x = torch.randn(1, 24).to(dtype)
    cpu_linear(layer, x).sum().backward()
    with torch.no_grad():
        layer.weight.data = layer.weight.t().contiguous().t()
        cpu_linear(layer, x)
        with torch.autocast("cpu", torch.bfloat16):
            cpu_linear(layer.float(), x.bfloat16())
    assert reads == {"linear": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, density", [(1, 0.0), (1, 0.1), (1, 1.0), (3, 0.2), (3, 0.6), (16, 0.05), (17, 0.05)])
def test_sparse_linear(reads, rows, density, dtype):
    layer = torch.nn.Linear(397, 24).to(dtype)  # a number that no number of bags divides
    table = layer.weight.detach().t().contiguous()
    x = (torch.rand(rows, 1, 397) + 0.5) * (torch.rand(rows, 1, 397) < density)
    x[rows // 2] = 0  # a row without anything
    x = x.to(dtype)
    with torch.no_grad():
        expected = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double()).to(dtype)
        y = sparse_linear(layer, table, x)
    assert y.dtype == dtype and close(y, expected, 1e-5 if dtype == torch.float32 else 0.13)
    assert reads["sums"] == (rows <= 16 and x.count_nonzero() <= 1.5 * 397)
    layer.bias = None
    with torch.no_grad():
        assert close(sparse_linear(layer, table, x), layer(x), 1e-5 if dtype == torch.float32 else 0.13)


def test_sparse_linear_reads_only_what_it_needs(reads):
    """A weight that only zeros multiply may be anything, even NaN."""
    layer = torch.nn.Linear(40, 24)
    layer.weight.data[:, 7] = math.nan
    table, x = layer.weight.detach().t().contiguous(), torch.rand(2, 40)
    x[:, 7:20] = 0
    with torch.no_grad():
        assert sparse_linear(layer, table, x).isfinite().all()
        x[1, 7] = 1
        y = sparse_linear(layer, table, x)
        assert y[0].isfinite().all() and y[1].isnan().all()


@pytest.mark.parametrize("N, S", [(20, 1), (20, 7), (20, 8), (20, 9), (20, 20), (20, 24), (7, 1), (7, 7), (8, 8)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_transposed_kv_cache(reads, N, S, is_masked):
    cache = new_cache(CONFIG, 2, N, TransposedKVCache)
    keys, values = cache.keys[1], cache.values[1]
    rounded = {20: 24}.get(N, N)  # to blocks of 8, of which a shorter cache is one
    assert keys.shape == values.shape == (2, 3, rounded, 16) and keys.stride(3) == rounded
    k, v, q = torch.randn(2, 3, S, 16), torch.randn(2, 3, S, 16), torch.randn(2, 3, 1, 16)
    keys[:, :, : S - 1], values[:, :, : S - 1] = k[:, :, :-1], v[:, :, :-1]
    cache.crop(S - 1)
    mask = torch.rand(2, 1, 1, S) < 0.5 if is_masked else None
    if is_masked:
        mask[..., S - 1] = True
    assert close(cache.attend(1, q, k[:, :, -1:], v[:, :, -1:], mask), attention(q, k, v, mask), 1e-6)
    assert reads["sums"] == 2
    assert torch.equal(keys[:, :, :S], k) and torch.equal(values[:, :, :S], v)
    assert keys[:, :, S:].isnan().all() and cache.keys[[0, 2, 3]].isnan().all()


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("is_padded", [False, True])
def test_transposed_kv_cache_chunks(models, reads, chunks, is_padded):
    check_chunks(models[0], TransposedKVCache, chunks, is_padded)
    assert reads["sums"] == 2 * chunks.count(1) * models[0].config.num_hidden_layers


def test_transposed_kv_cache_leaves_other_shapes_to_kv_cache(reads):
    """A mask for each head, and keys of fewer heads than queries, are not what it restates."""
    cache, (q, k, v) = new_cache(CONFIG, 2, 9, TransposedKVCache), torch.randn(3, 2, 3, 1, 16)
    mask = torch.tensor([True]).expand(2, 3, 1, 1)
    assert close(cache.attend(0, q, k, v, mask), v, 1e-6)
    assert close(cache.attend(0, q.expand(2, 3, 1, 16), k, v, None), v, 1e-6) and reads["sums"] == 2
    with pytest.raises(RuntimeError):  # as in KVCache
        cache.attend(0, torch.randn(2, 6, 1, 16), k, v, None)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("dtype, N, expected", [
    (torch.bfloat16, 64, True), (torch.float16, 64, True), (torch.bfloat16, 63, False), (torch.float32, 9000, False),
])  # fmt: skip
def test_cpu_engine_makes_a_cache(monkeypatch, processor, dtype, N, expected):
    """Keys are transposed in 16 bit from 64 positions on, with 64 heads; others, and bfloat16 on AMX, are SDPA's."""
    monkeypatch.setattr(persimmon, "cpu_has", lambda feature: feature in PROCESSORS[processor])
    expected &= processor != "AMX" or dtype == torch.float16
    config = PersimmonConfig(vocab_size=8, hidden_size=512, intermediate_size=64, num_hidden_layers=1,
                             num_attention_heads=64)
    engine = CpuEngine(PersimmonForCausalLM(config).to(dtype).eval())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = engine.make_cache(3, N)
    assert type(cache) is (TransposedKVCache if expected else KVCache) and engine.proven == N * expected
    assert cache.keys.dtype == dtype and cache.keys.shape[:2] == (1, 3) and cache.keys.shape[3] >= N


def soft_capped(q, k, v, mask, dropout=0.0):
    """An edit of `attention` that only large scores show."""
    s = 50 * torch.tanh(q @ k.mT / q.shape[-1] ** 0.5 / 50)
    return (s if mask is None else s.masked_fill(~mask, -math.inf)).softmax(-1) @ v


def window_in_odd_layers(self, layer, q, k, v, mask, attend=KVCache.attend):
    """An edit of KVCache.attend that layer 0 does not show, for one position."""
    y = attend(self, layer, q, k, v, mask)
    if layer % 2 == 0 or q.shape[2] > 1:
        return y
    seen = slice(max(0, self.length - 9), self.length + 1)
    return attention(q, self.keys[layer, :, :, seen], self.values[layer, :, :, seen], None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cpu_engine_proof_sees_every_layer_and_large_scores(small, monkeypatch, dtype):
    engine = CpuEngine(small)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine.is_proven(300, dtype)
    for owner, name, other in ((persimmon, "attention", soft_capped), (KVCache, "attend", window_in_odd_layers)):
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="does not attend as this file's KVCache"):
            patch.setattr(owner, name, other)
            assert not engine.is_proven(300, dtype)


def test_a_prompt_in_a_transposed_cache_is_attended_by_kv_cache(monkeypatch):
    """Its own keys are at hand, and need not be read back from where they are transposed."""
    cache, (q, k, v) = new_cache(CONFIG, 2, 9, TransposedKVCache), torch.randn(3, 2, 3, 5, 16)
    monkeypatch.setattr(KVCache, "attend", Mock(return_value=q))
    assert cache.attend(0, q, k, v, None) is q and KVCache.attend.call_count == 1


def test_cpu_engine_proves_its_attention(small, monkeypatch):
    """With another attention in Part I, it is that which runs, with a warning."""
    model, ids = small.half(), random_ids(small.config, length=9)
    monkeypatch.setattr(CpuEngine, "is_proven", Mock(side_effect=partial(CpuEngine.is_proven, engine_for(model))))
    engine_for(model).make_cache(2, 1400)
    engine_for(model).make_cache(2, 1366)
    assert CpuEngine.is_proven.call_count == 1 and engine_for(model).proven == 1400
    engine_for(model).make_cache(2, 1401)
    assert CpuEngine.is_proven.call_count == 2
    monkeypatch.setattr(persimmon, "attention",
                        lambda q, k, v, mask, dropout=0.0: attention(q / 2, k, v, mask, dropout))
    with pytest.warns(UserWarning, match="does not attend as this file's KVCache") as said:
        assert type(engine_for(model).make_cache(2, 1402)) is KVCache
    assert len(said) == 1
    model.fast = False
    expected = model.generate(ids, max_new_tokens=5)
    model.fast = True
    cache = engine_for(model).make_cache(2, 15)
    assert torch.equal(model.generate(ids, max_new_tokens=5, cache=cache), expected)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_cpu_engine_uses_the_operators(monkeypatch, reads, small, processor):
    use_cpu_engine(monkeypatch, processor)
    model = small.bfloat16()
    engine, L = engine_for(model), model.config.num_hidden_layers
    ids, counts = random_ids(model.config, rows=1, length=11), []
    with torch.no_grad():
        cache = engine.make_cache(1, 20)
        for step in (partial(engine.prefill, ids[:, :9]), partial(engine.decode, ids[:, 9:10])):
            reads.clear()
            assert step(None, cache).shape == (1, 97)
            counts.append(dict(reads))
            engine.prepare()
        reads.clear()
        engine.decode(ids[:, 10:], None, cache)
    assert counts[0] == {"AMX": {"mv": 1}, "Zen 4": {"linear": 4 * L, "dots": 1},
                         "other": {"linear": 4 * L + 1}}[processor]
    assert counts[1] == {"AMX": {"sums": L, "mv": 3 * L + 1}, "Zen 4": {"sums": 3 * L, "dots": 3 * L + 1},
                         "other": {"sums": 3 * L, "linear": 3 * L + 1}}[processor] == reads  # fmt: skip
    with torch.no_grad():  # outside of the engine, the model is plain
        reads.clear()
        model(ids)
        model(ids[:, :1])
    assert reads == {"linear": 2 * (4 * L + 1)}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_cpu_engine_in_bfloat16(folders, monkeypatch, processor):
    """Its error against float32 is at most 1.35 times that of plain operators: biases and scores are rounded."""
    model = PersimmonForCausalLM.from_pretrained(folders["D64", "2023"])
    ids = random_ids(model.config, rows=1, length=100)

    def logits(engine: Engine) -> torch.Tensor:
        with torch.no_grad():
            cache = engine.make_cache(1, 100)
            found = [engine.prefill(ids[:, :1], None, cache)]
            engine.prepare()
            return torch.cat(found + [engine.decode(ids[:, t : t + 1], None, cache) for t in range(1, 100)])

    truth = logits(Engine(model))
    model = model.bfloat16()
    plain = (logits(Engine(model)) - truth).square().mean().sqrt()
    use_cpu_engine(monkeypatch, processor)
    fast = (logits(CpuEngine(model)) - truth).square().mean().sqrt()
    assert 0 < fast <= 1.35 * plain, (fast, plain)


def test_cpu_engine_notices_changes_in_inference_mode(small, monkeypatch):
    """Parameters that are made there have no version."""
    use_cpu_engine(monkeypatch)
    ids, downs = random_ids(small.config, rows=1, length=9), [block.mlp.dense_4h_to_h for block in small.model.layers]
    with torch.inference_mode():
        for down in downs:
            down.weight = torch.nn.Parameter(down.weight.clone(), requires_grad=False)
    small.generate(ids, max_new_tokens=3)
    assert len(engine_for(small).tables) == 4
    with torch.inference_mode():
        for down in downs:
            down.weight.copy_(-down.weight)
    found = small.generate(ids, max_new_tokens=20)
    small.fast = False
    assert torch.equal(found, small.generate(ids, max_new_tokens=20))


@pytest.mark.parametrize("rows", [1, 2])
def test_autocast(monkeypatch, small, rows):
    """Engines and kernels step aside: their operators are not among what PyTorch casts."""
    use_cpu_engine(monkeypatch)
    ids = random_ids(small.config, rows=rows, length=6)
    with torch.no_grad():
        expected = small(ids).logits
    for model in (small, quantize_model(copy.deepcopy(small), "int8")):
        cache = KVCache(small.config, rows, 6, torch.float32, "cpu")
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            logits = [model(ids[:, :3], cache=cache).logits,
                      *(model(ids[:, t : t + 1], cache=cache).logits for t in (3, 4, 5))]
            assert len(list(generate(model, ids, max_new_tokens=4))) == 4
        assert close(torch.cat(logits, 1).float(), expected, 0.1)


def test_available_memory(monkeypatch):
    assert 1e8 < persimmon.available_memory() < 1e14
    monkeypatch.setattr(Path, "read_text", lambda self: "MemTotal: 5 kB\nMemAvailable:   3 kB\n")
    assert persimmon.available_memory() == 3072
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=OSError))
    assert persimmon.available_memory() == math.inf


# === Part III b. int8 and int4 =======================================================================================

def dequantized(layer: torch.nn.Module) -> torch.Tensor:
    """W of a quantized layer, (O, C) in float64, from what is stored, with numpy and by the format's description."""
    stored = {name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
              for name, tensor in layer.named_buffers()}  # fmt: skip
    weight = stored["weight"]
    if isinstance(layer, Int8Linear):
        return torch.from_numpy(weight.astype(numpy.float64) * stored["scale"][:, None])
    W = numpy.zeros((layer.out_features, layer.in_features))
    if isinstance(layer, Int8SparseLinear):
        for f, row in enumerate(weight):
            scale, offset = numpy.frombuffer(row[-8:].tobytes(), numpy.float32)
            W[:, f] = row[:-8] * float(scale) + float(offset)
        return torch.from_numpy(W)
    for o in range(layer.out_features):
        byte = weight[o // 64, :, o % 32]
        code = byte >> 4 if o % 64 >= 32 else byte & 15
        scale = numpy.repeat(stored["scale"][:, o].astype(numpy.float64), layer.group_size, axis=0)
        W[o] = scale[:, 0] * (code.astype(numpy.float64) - 8) + scale[:, 1]
    return torch.from_numpy(W)


QUANTIZED = [(Int8Linear, 128), (Int8SparseLinear, 128), (Int4Linear, 32), (Int4Linear, 64), (Int4Linear, 128)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("cls", "group_size"), QUANTIZED)
@pytest.mark.parametrize(("O", "C"), [(64, 256), (100, 256), (100, 32768)])
def test_quantized_layers(cls, group_size, O, C, dtype):  # noqa: E741
    """Of 32768 inputs, a CPU dequantizes 64 outputs at a time, so 100 outputs are two blocks."""
    if C > 256 and (dtype == torch.float16 or group_size == 32):
        pytest.skip("long")
    torch.manual_seed(0)
    linear = torch.nn.Linear(C, O).to(dtype)
    layer, W = cls(linear, group_size), linear.weight.double()
    off = ((dequantized(layer) - W).norm() / W.norm()).item()
    assert off < {Int8Linear: 0.006, Int8SparseLinear: 0.006}.get(cls, 0.065)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for rows in (1, 3, 70):
        x = torch.rand(rows, 1, C)
        if cls is Int8SparseLinear:
            x *= torch.rand(rows, 1, C) < 0.3
        expected = x.to(dtype).double() @ dequantized(layer).T + linear.bias.double()
        with torch.no_grad():
            y = layer(x.to(dtype))
        error = (y.double() - expected).norm() / expected.norm()
        assert y.dtype == dtype and y.shape == (rows, 1, O)
        assert error < tolerance
        x, gradient = x.to(dtype).requires_grad_(), torch.randn(y.shape).to(dtype)
        layer(x).backward(gradient)
        expected = gradient.double() @ dequantized(layer)
        assert (x.grad.double() - expected).norm() / expected.norm() < tolerance
    empty = cls(torch.nn.Linear(C, O, device="meta", dtype=dtype), group_size).state_dict()
    for name, tensor in layer.state_dict().items():
        assert (empty[name].shape, empty[name].dtype) == (tensor.shape, tensor.dtype) and tensor.is_contiguous()
    with torch.no_grad():
        assert layer(torch.zeros(2, 0, C, dtype=dtype)).shape == (2, 0, O) and layer(x[0, 0].detach()).shape == (O,)


def test_stored_bytes_stay():
    """Of weights without rounding of their own, for each format: a folder that was quantized earlier has to load."""
    weight = (torch.arange(64 * 128).view(64, 128) * 37 % 101 - 50) / 64
    linear = torch.nn.Linear(128, 64).bfloat16()
    linear.weight.data = weight.bfloat16()
    for cls, expected in EXPECTED_BYTES.items():
        layer = globals()[cls](linear, 64)
        for name, tensor in layer.named_buffers():
            data = tensor.contiguous().flatten().view(torch.uint8).numpy().astype(numpy.uint64)
            found = int((data * (numpy.arange(len(data), dtype=numpy.uint64) % 65521 + 1)).sum()), len(data)
            assert found == expected[name], (cls, name, found)


EXPECTED_BYTES = {  # of the release before: a sum of position * byte, and how many bytes
    "Int8Linear": {"weight": (4252918658, 8192), "scale": (1072832, 128)},
    "Int8SparseLinear": {"weight": (5354410396, 9216)},
    "Int4Linear": {"weight": (1073472893, 4096), "scale": (13314838, 512)},
}


@pytest.mark.parametrize(("cls", "group_size"), QUANTIZED)
def test_quantizing_small_float16(cls, group_size):
    """Where scales are hardly numbers any more, signs stay."""
    linear = torch.nn.Linear(128, 64).half()
    linear.weight.data = (torch.randn(64, 128) * 1e-4).half()
    linear.weight.data[:, 0] = 2e-4
    linear.weight.data[5] = 3e-8  # less than any scale
    w, W = linear.weight.double(), dequantized(cls(linear, group_size))
    assert (W - w)[:5].abs().max() < 1e-4 and (W[:5] * w[:5] >= 0)[w[:5].abs() > 5e-5].all() and W.isfinite().all()


@pytest.mark.parametrize(("cls", "group_size"), QUANTIZED)
def test_quantized_layers_do_not_overflow(cls, group_size):
    """In float16 numbers end at 65504: what is summed has to be of the size of the result."""
    linear = torch.nn.Linear(4096, 64, bias=False)
    linear.weight.data.abs_()
    x = torch.rand(100, 4096) * 20
    layer, expected = cls(linear.half(), group_size), linear.double()(x.double())
    assert 300 < expected.min()
    for rows in (2, 100):
        with torch.no_grad():
            assert (layer(x[:rows].half()).double() / expected[:rows] - 1).abs().max() < 0.02


@pytest.mark.parametrize(("cls", "group_size"), QUANTIZED)
def test_quantized_layers_take_any_layout_and_new_weights(cls, group_size):
    torch.manual_seed(0)
    layer, other = (cls(torch.nn.Linear(128, 64).bfloat16(), group_size) for _ in range(2))
    wide = (torch.rand(3, 4, 131) * (torch.rand(3, 4, 131) < 0.3)).bfloat16()
    with torch.no_grad():
        for x in (wide[..., :128], wide[:, -1:, 3:], wide[1, 2, :128], wide[0, :, :128].t().contiguous().t()):
            assert torch.equal(layer(x), layer(x.clone(memory_format=torch.contiguous_format)))
        x = wide[..., :128]
        assert not torch.equal(layer(x), other(x))
        layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
        assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("cls", [Int8Linear, Int8SparseLinear])
def test_quantized_layers_of_one_input(cls):
    linear = torch.nn.Linear(1, 50)
    layer, x = cls(linear, 128), torch.rand(40, 1)
    assert close(layer(x), x.double() @ dequantized(layer).T + linear.bias.double(), 1e-5)


@pytest.mark.parametrize("group_size", [32, 128])
def test_int4_is_better_than_the_range_of_a_group(group_size):
    torch.manual_seed(0)
    w = torch.randn(128, 256)
    groups = w.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = (((groups - low) / step).round() * step + low - groups).square().sum()
    linear = torch.nn.Linear(256, 128)
    linear.weight.data = w
    assert (dequantized(Int4Linear(linear, group_size)) - w).square().sum() < 0.9 * plain


@pytest.mark.parametrize(("cls", "group_size"), QUANTIZED)
def test_quantizing_odd_weights(cls, group_size):
    linear = torch.nn.Linear(256, 70).bfloat16()
    weight = linear.weight.data
    weight[3], weight[:, 5], weight[66, 128:] = 0, 0, 0.75  # zeros by row and by column; a group of equal weights
    layer = cls(linear, group_size)
    W = dequantized(layer)
    assert W.isfinite().all() and (W[3].abs() < 1e-2).all() and (W[66, 128:] - 0.75).abs().max() < 0.02
    if cls is not Int4Linear:
        assert (W[:, 5] == 0).all()
    if cls is Int4Linear:
        assert (W[3] == 0).all() and (W[66, 128:] == 0.75).all()  # groups that are all equal are exact
    x = torch.randn(100, 256).bfloat16()
    x[:, 5] = 300  # times 0, whatever the others are
    expected = (x.double() @ W.T + linear.bias.double()).detach()
    for rows in (2, 100):
        with torch.no_grad():
            limit = (0.01 if cls is Int8Linear else 0.03) * expected[:rows].norm()
            assert (layer(x[:rows]) - expected[:rows]).norm() < limit
    for bad in (math.inf, -math.inf, math.nan):
        weight[4, 4] = bad
        with pytest.raises(ValueError, match="weights that are not finite can't be quantized"):
            cls(linear, group_size)


@pytest.mark.parametrize(("cls", "operator", "rows"), [
    (Int8Linear, "_weight_int8pack_mm", 16), (Int4Linear, "_weight_int4pack_mm_for_cpu", 64),
    (Int8SparseLinear, "embedding_bag_byte_rowwise_offsets", 64)])  # fmt: skip
def test_quantized_layers_use_the_kernel_or_go_without(monkeypatch, cls, operator, rows):
    layer, calls = cls(torch.nn.Linear(256, 64).bfloat16(), 64), []
    namespace = torch.ops.quantized if cls is Int8SparseLinear else torch.ops.aten
    original = getattr(namespace, operator)
    monkeypatch.setattr(namespace, operator, lambda *a, **k: calls.append(1) or original(*a, **k))
    x = (torch.rand(2, 256) * (torch.rand(2, 256) < 0.3)).bfloat16()
    with torch.no_grad():
        y = layer(x)
        few = torch.zeros(rows, 256).bfloat16()
        few[:, :12] = torch.rand(rows, 12)  # 3 * 256 nonzeros at most
        assert close(layer(few), few.double() @ dequantized(layer).T + layer.bias.double(), 0.01) and len(calls) == 2
        layer(torch.cat((few, few[:1])))
        assert len(calls) == 2
        layer(torch.ones(8, 256).bfloat16())  # 8 * 256 nonzeros
        assert len(calls) == 2 + (cls is not Int8SparseLinear)
        calls.clear()
        for dtype in (torch.float32, torch.float16):  # for which the kernels of dense weights are not vectorized
            layer(x.to(dtype))
            assert len(calls) == (cls is Int8SparseLinear)
            calls.clear()
        layer(x)
        layer(x.requires_grad_())
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        layer(x)
        monkeypatch.undo()
    assert len(calls) == 2
    monkeypatch.setattr(namespace, operator, lambda *a, **k: calls.append(1) or original(*a, **k))
    layer(x).sum().backward()
    assert len(calls) == 2 and x.grad.abs().sum() > 0
    monkeypatch.setattr(persimmon, "private_operator", lambda name: None)
    with torch.no_grad():
        assert close(layer(x), y, 0.01)


def test_int8_kernel_gets_what_it_can_read(monkeypatch):
    """It reads 16 codes at once: at other addresses it crashes, with other widths it multiplies what is beyond."""
    original, calls = torch.ops.aten._weight_int8pack_mm, []

    def strict(x, weight, scale):
        assert x.shape[1] % 16 == x.data_ptr() % 32 == weight.data_ptr() % 16 == 0 and x.is_contiguous()
        calls.append(1)
        return original(x, weight, scale)

    monkeypatch.setattr(torch.ops.aten, "_weight_int8pack_mm", strict)
    for C, is_used in ((40, False), (48, True)):
        layer = Int8Linear(torch.nn.Linear(C, 64).bfloat16(), 128)
        x = torch.rand(3 * C + 1).bfloat16()[1:].view(3, C)
        expected = x.double() @ dequantized(layer).T + layer.bias.double()
        with torch.no_grad():
            assert close(layer(x), expected, 0.02)
            layer(torch.rand(3, C + 3).bfloat16()[:, :C])
            weight = torch.empty(64 * C + 8, dtype=torch.int8)[8:].view(64, C)
            layer.load_state_dict({**layer.state_dict(), "weight": weight.copy_(layer.weight)}, assign=True)
            assert close(layer(x), expected, 0.02)
        assert len(calls) == 3 * is_used and layer.weight.data_ptr() == weight.data_ptr()


def test_a_kernel_that_is_gone_is_reported():
    with pytest.warns(UserWarning, match="this PyTorch has no aten._weight_int3pack_mm"):
        assert persimmon.private_operator("aten._weight_int3pack_mm") is None
    assert persimmon.private_operator("aten._weight_int8pack_mm") is not None


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_int4_on_other_processors(capability):
    """PyTorch's kernel orders the codes by the processor's abilities, which this variable hides."""
    code = f"""if True:
        import copy, pickle, torch, {persimmon.__name__} as persimmon
        torch.manual_seed(0)
        layer, x = persimmon.Int4Linear(torch.nn.Linear(256, 100).bfloat16(), 64), torch.randn(2, 256).bfloat16()
        with torch.no_grad():
            y = layer(x)
            assert layer.packed.data_ptr() != layer.weight.data_ptr()
            for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert twin.packed is None and torch.equal(twin(x), y)
                assert list(twin.state_dict()) == ["bias", "weight", "scale"]
            layer.load_state_dict(persimmon.Int4Linear(torch.nn.Linear(256, 100).bfloat16(), 64).state_dict())
            assert layer.packed is None and (layer(x) - y).abs().max() > 0.1
            y = layer(x)
            persimmon.private_operator = lambda name: None
            assert (layer(x) - y).abs().max() < 0.02, (layer(x) - y).abs().max()
        print("fine")"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, timeout=120,
                            env={**os.environ, "ATEN_CPU_CAPABILITY": capability})  # fmt: skip
    assert result.returncode == 0 and result.stdout == "fine\n", result.stderr


@pytest.mark.parametrize("cls", [Int8Linear, Int4Linear])
def test_packed_copies_are_private(cls):
    layer, x = cls(torch.nn.Linear(256, 100).bfloat16(), 64), torch.randn(2, 256).bfloat16()
    size = len(pickle.dumps(layer))
    with torch.no_grad():
        y = layer(x)
        layer.packed = layer.packed.clone()
        assert layer.packed is not None and list(layer.state_dict()) == ["bias", "weight", "scale"]
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin.packed is None and torch.equal(twin(x), y)
        assert abs(len(pickle.dumps(layer)) - size) < 100
        for change in (layer.float, lambda: layer.to("meta")):
            layer.packed = torch.zeros(1)
            change()
            assert layer.packed is None


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_is_packed_for_cuda(group_size):
    """What PyTorch's CUDA packing reads, by its source: bytes (O, C/2), the even input in the high half."""
    calls, C = [], 3 * group_size
    layer = Int4Linear(torch.nn.Linear(C, 100), group_size)
    assert layer.pack(lambda *arguments: calls.append(arguments) or "packed", is_cuda=True) == "packed"
    (data, tiles), = calls
    assert data.dtype == torch.uint8 and data.shape == (128, C // 2) and data.is_contiguous() and C % (16 * tiles) == 0
    assert tiles == {32: 2, 64: 4, 128: 8}[group_size]
    codes = torch.stack((data >> 4, data & 15), dim=-1).flatten(1)[:100].double()
    scale = layer.scale[:, :100].double().repeat_interleave(group_size, dim=0).permute(2, 1, 0)
    assert torch.equal(scale[0] * (codes - 8) + scale[1], dequantized(layer))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("cls", "group_size"), QUANTIZED)
def test_quantized_layers_on_a_gpu(cls, group_size):
    for C, O in ((3 * group_size, 100), (1024, 256)):
        layer = cls(torch.nn.Linear(C, O).bfloat16(), group_size)
        for rows in (1, 17, 64, 65):
            x = torch.randn(rows * C + 1).bfloat16()[1:].view(rows, C)
            expected = x.double() @ dequantized(layer.cpu()).T + layer.bias.double()
            with torch.no_grad():
                y = layer.cuda()(x.cuda())
            assert (layer.packed is not None) == (cls is Int4Linear and rows <= 64)
            assert (y.cpu().double() - expected).norm() / expected.norm() < 0.01


def test_quantize_model(monkeypatch):
    config = PersimmonConfig(
        vocab_size=151, hidden_size=128, intermediate_size=208, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=180, bos_token_id=1, eos_token_id=None)  # fmt: skip
    for kind, group_size in (("int8", 128), ("int4", 64)):
        torch.manual_seed(0)
        model = PersimmonForCausalLM(config).eval()
        plain, fractions = copy.deepcopy(model), []
        persimmon.QUANTIZERS[kind](model, group_size, fractions.append)
        assert fractions == sorted(fractions) and fractions[-1] == 1 and len(fractions) == 13
        types = Counter(type(module).__name__ for module in model.modules())
        assert types[f"I{kind[1:]}Linear"] == 10 and types["Int8SparseLinear"] == 3 and types["Linear"] == 0
        assert model.config == model.model.config == replace(
            config, quantization={"quantize": kind, "group_size": group_size})  # fmt: skip
        assert not any(module.training for module in model.modules())
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                target = plain.get_submodule(name)
                assert close(target.weight.double(), dequantized(module), 0.3)
                target.weight.data = dequantized(module).float()
                assert isinstance(module, Int8SparseLinear) == name.endswith("dense_4h_to_h")
        ids = torch.randint(6, 151, (2, 50))
        with torch.no_grad():
            assert close(model(ids).logits, plain(ids).logits)
        with torch.device("meta"):
            empty = persimmon.PersimmonForCausalLM(config)
            persimmon.QUANTIZERS[kind](empty, group_size, None)
        found = {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()}
        assert found == {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
        model.load_state_dict(plain_state := copy.deepcopy(model.state_dict()), assign=True)
        for part in (model, model.model):  # which is a model in its own right
            with pytest.raises(ValueError, match=f"^the model is quantized already, in {kind}$"):
                quantize_model(part, "int8")
        assert all(torch.equal(t, plain_state[name]) for name, t in model.state_dict().items())
    lines = repr(model).splitlines()
    assert "          (dense): Int4Linear(in_features=128, out_features=128, group_size=64)" in lines
    assert "          (dense_4h_to_h): Int8SparseLinear(in_features=208, out_features=128)" in lines


def test_quantize_model_refuses():
    config = PersimmonConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3)  # fmt: skip
    model = PersimmonForTokenClassification(config)
    for arguments, message in (
            (("int3",), "quantize = 'int3' is neither int8 nor int4"),
            (("int4", 16), "group_size = 16 is none of 32, 64 and 128"),
            (("int4", 32), "model.layers.0.self_attn.query_key_value: a matrix of 48 inputs can't be quantized in "
                           "groups of 32")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{message}$"):
            quantize_model(model, *arguments)
    model.model.layers[1].mlp.dense_4h_to_h.weight.data[1, 1] = math.nan
    with pytest.raises(ValueError,
                       match="^model.layers.1.mlp.dense_4h_to_h: weights that are not finite can't be quantized$"):
        quantize_model(model, "int8")
    model = quantize_model(PersimmonForTokenClassification(config), "int8")
    assert type(model.score) is torch.nn.Linear and model.config.quantization == model.model.config.quantization
    lm = PersimmonForCausalLM(config)
    lm.lm_head.weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match="^lm_head: weights"):
        quantize_model(lm, "int8")


@pytest.mark.parametrize(("kind", "group_size"), [("int8", 128), ("int4", 64), *every([("int4", 32)], [])])
def test_quantized_model(folders, tmp_path, kind, group_size):
    """Through folders: logits are those of a model with the same weights dequantized, for prompts and single tokens."""
    folder, fractions = folders["D64", "2023"], []
    model = PersimmonForCausalLM.from_pretrained(folder, quantize=kind, group_size=group_size,
                                                 progress=fractions.append)
    plain = PersimmonForCausalLM.from_pretrained(folder)
    assert fractions == sorted(fractions) and fractions[-1] == 1
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            plain.get_submodule(name).weight.data = dequantized(module).float()
    ids = random_ids(model.config, length=50)
    with torch.no_grad():
        expected = plain(ids).logits
        assert close(model(ids).logits, expected)
        cache = KVCache(model.config, 2, 50, torch.float32, "cpu")
        one_by_one = [model(ids[:, t : t + 1], cache=cache).logits for t in range(50)]
        assert close(torch.cat(one_by_one, dim=1), expected)
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["quantization_config"] == {"quant_method": "persimmon.py", "quantize": kind, "group_size": group_size}
    again = PersimmonForCausalLM.from_pretrained(tmp_path)
    assert again.config == replace(model.config, dtype="float32")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(again.generate(ids, max_new_tokens=9), plain.generate(ids, max_new_tokens=9))
    with pytest.raises(RuntimeError):  # it warns that it does not know this method, and then the shapes do not fit
        transformers.PersimmonForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"the model is quantized already, in {kind}"):
        PersimmonForCausalLM.from_pretrained(tmp_path, quantize="int8")
    again.model.save_pretrained(tmp_path / "inner")  # a model in its own right
    with torch.no_grad(), pytest.warns(UserWarning, match="has no classifier"):
        expected = again.model(ids).last_hidden_state
        classifier = PersimmonForSequenceClassification.from_pretrained(tmp_path)
        bare = [PersimmonModel.from_pretrained(place) for place in (tmp_path, tmp_path / "inner")]
        for other in (classifier.model, *bare):
            assert torch.equal(other(ids).last_hidden_state, expected)
    for dtype in (torch.float32, torch.int16):
        state = {**model.state_dict(), "lm_head.weight": model.lm_head.weight.to(dtype)}
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"lm_head.weight as {dtype}: config.json makes it torch.u?int8"):
            PersimmonForCausalLM.from_pretrained(tmp_path)


def test_quantized_loading_refuses(folders):
    with pytest.raises(ValueError, match="lm_head: a matrix of 48 inputs can't be quantized in groups of 32"):
        PersimmonForCausalLM.from_pretrained(folders["D16", "2023"], quantize="int4", group_size=32)
    for changes, message in (({"quantize": "int3"},
                              "quantize = 'int3' for .*: this copy of persimmon.py has int8 and int4"),
                             ({"group_size": 16}, "group_size = 16 is none of 32")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            PersimmonForCausalLM.from_pretrained(folders["D64", "2023"], **{"quantize": "int4", **changes})


def test_int8_from_files_of_any_alignment(folders, tmp_path):
    """What this file writes is aligned and used in place; what another program writes is not always."""
    ids = torch.tensor([[1, 2, 3]])
    model = PersimmonForCausalLM.from_pretrained(folders["D64", "2023"], "bfloat16", quantize="int8")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 64 == 0
    for spaces in (0, 1, 8):
        size = (start - 8 + spaces).to_bytes(8, "little")
        file.write_bytes(size + content[8:start] + b" " * spaces + content[start:])
        with torch.no_grad():
            again = PersimmonForCausalLM.from_pretrained(tmp_path)
            assert torch.equal(again(ids).logits, model(ids).logits)
            layer = again.model.layers[0].mlp.dense_h_to_4h
            assert layer.packed is None or (layer.packed.data_ptr() == layer.weight.data_ptr()) == (spaces == 0)


@pytest.mark.parametrize(("kind", "group_size", "limit"),
                         [("int8", 128, 0.004), ("int4", 32, 0.02), ("int4", 128, 0.04)])
def test_quantized_loss_of_the_embedded_model(kind, group_size, limit):
    """On lines of Shakespeare, which the model may have seen: more than the bars for its validation text leave."""
    text = ("KING HENRY V:\nOnce more unto the breach, dear friends, once more;\nOr close the wall up with our English "
            "dead.\nIn peace there's nothing so becomes a man\nAs modest stillness and humility.\n\nJULIET:\nO Romeo, "
            "Romeo! wherefore art thou Romeo?\nDeny thy father and refuse thy name.\n")  # fmt: skip
    ids = Tokenizer(TINY)(text)["input_ids"]
    with torch.no_grad():
        plain, quantized = (PersimmonForCausalLM.from_pretrained(TINY, **options)(ids, labels=ids).loss.item()
                            for options in ({}, {"quantize": kind, "group_size": group_size}))  # fmt: skip
    assert quantized != plain and abs(quantized / plain - 1) < limit, (plain, quantized)


# === Part III c. CUDA ================================================================================================
#
# The kernels run on a GPU where there is one, else in Triton's interpreter, which has to be chosen before triton is
# imported: test_kernels_in_the_interpreter starts the tests that need it in a process where it is. What is around them
# is tested with PyTorch's operators in their place.

on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")


@pytest.fixture
def kernels(monkeypatch) -> None:
    """The kernels, in whatever way they can run here."""
    without_gpu(monkeypatch)
    if IS_INTERPRETED:
        use_interpreter(persimmon, monkeypatch)


def test_kernels_in_the_interpreter():
    """All tests that run a kernel, in a process where Triton interprets: their names say _runs or on_cuda."""
    import triton

    if IS_INTERPRETED or DEVICE == "cuda":
        pytest.skip("they run already")
    triton_version, numpy_version = ([*map(int, p.__version__.split(".")[:2])] for p in (triton, numpy))
    if triton_version < [3, 7] and numpy_version >= [2, 4]:
        pytest.skip("the interpreter of Triton before 3.7 needs NumPy before 2.4")
    arguments = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "_runs or on_cuda",
                 "-W", "error::RuntimeWarning",  # but a split may have nothing but padding, which is -inf
                 "-W", "ignore:divide by zero encountered in log2")
    result = subprocess.run([sys.executable, *arguments], env={**os.environ, "TRITON_INTERPRET": "1"},
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert re.search(r"\b21 passed, \d+ deselected", result.stdout), result.stdout


@runs_kernel
@pytest.mark.parametrize("T", [1, 5])
def test_fused_attend_runs(kernels, T):
    """Against Attention in float32, with the same input: result, what is written to the cache, what is not."""
    random.seed(T), torch.manual_seed(T)
    # q, k and p are rounded, and scores are large.
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
    lengths = every((0, 1, 63, 64, 65, 200, 400, 1100), [0, 1, 65, 400])
    kinds = ("none", "padding", "holes")
    for cached, dtype, kind, is_captured in itertools.product(lengths, tolerance, kinds, (False, True)):
        if not ALL and random.random() < 0.6 or is_captured and T > 1:
            continue
        S, rows, splits = T + cached, 2, random.choice((1, 2, 8))
        H, D, R = 3, *random.choice(((64, 32), (32, 16), (32, 24), (16, 4), (128, 64)))
        config = PersimmonConfig(
            hidden_size=H * D, num_attention_heads=H, intermediate_size=8, vocab_size=8, num_hidden_layers=2,
            partial_rotary_factor=R / D, qk_layernorm=random.random() < 0.7)  # fmt: skip
        plain = Attention(config, 1).to(DEVICE).eval()
        plain.dense = torch.nn.Identity()
        for p in (*plain.q_layernorm.parameters(), *plain.k_layernorm.parameters()):
            p.data = torch.randn_like(p).to(dtype).float()
        fused = copy.deepcopy(plain).to(dtype)
        qkv = torch.randn(rows, T, 3 * H * D, device=DEVICE).to(dtype)
        plain.query_key_value.forward = lambda _, qkv=qkv: qkv.float()
        seen = None
        if kind == "padding":
            seen = (torch.arange(S) >= torch.tensor([[S // 2], [S - 1]])).long().to(DEVICE)
        elif kind == "holes":
            seen = torch.randint(2, (S, rows), device=DEVICE).t()
        input_pos = torch.arange(cached, S, device=DEVICE)
        mask = causal_mask(input_pos, S, seen)
        position_ids = (input_pos[:, None] + torch.tensor([0, 5], device=DEVICE)[: 1 if kind == "none" else rows]).t()
        rope = tuple(table.to(dtype).float() for table in rope_tables(position_ids, config, torch.float32))
        exact = KVCache(config, rows, S + 3, torch.float32, DEVICE)
        cache = new_cache(config, rows, S + 3, StaticCache, dtype)
        cache.splits = splits
        exact.crop(cached), cache.crop(cached)
        for stored, other in ((exact.keys, cache.keys), (exact.values, cache.values)):
            stored.copy_(stored.normal_().to(dtype))
            other[1, :, :, :cached] = stored[1, :, :, :cached]
        before = cache.keys.clone(), cache.values.clone()
        cache.is_captured, wide = is_captured, mask
        if is_captured:  # then the mask covers all that the cache has room for
            wide = causal_mask(input_pos, S + 3, None if seen is None else torch.nn.functional.pad(seen, (0, 3)))
        with torch.no_grad():
            y = plain(torch.empty(rows, T, H * D, device=DEVICE), rope, mask, exact)
            ours = fused_attend(fused, qkv, rope, wide, cache)
        case = f"{cached} cached, {dtype}, D = {D}, R = {R}, mask: {kind}, {splits} splits, captured: {is_captured}"
        assert ours.dtype == dtype and ours.shape == y.shape
        assert (ours.float() - y).norm() < tolerance[dtype] * y.norm(), case
        assert torch.equal(cache.values[1, :, :, cached:S].float(), exact.values[1, :, :, cached:S]), case
        k = exact.keys[1, :, :, cached:S]
        assert (cache.keys[1, :, :, cached:S].float() - k).norm() < tolerance[dtype] / 4 * k.norm(), case
        for stored, old in zip((cache.keys, cache.values), before):
            assert torch.equal(stored[1, :, :, :cached], old[1, :, :, :cached]), case
            assert stored[1, :, :, S:].isnan().all() and stored[0].isnan().all(), case
        assert not cache.arrived.any() and cache.length == cached, case  # ready for the next launch


@runs_kernel
def test_fused_attend_runs_within_the_cache(kernels):
    """What there is no room for is not written, which would be into the next head's keys."""
    config = CONFIGS["D64"]
    cache, layer = StaticCache(config, 2, 9, torch.float32, DEVICE), Attention(config, 0).to(DEVICE)
    cache.keys.normal_(), cache.values.normal_()
    before = cache.keys.clone(), cache.values.clone()
    cache.crop(8)
    for T, position in ((1, 9), (3, 8)):
        qkv = torch.randn(2, T, 3 * config.hidden_size, device=DEVICE)
        rope = rope_tables(torch.arange(8, 8 + T, device=DEVICE)[None], config, torch.float32)
        cache.position.fill_(position)  # of a replay too many
        with torch.no_grad(), pytest.raises(ValueError) if T > 1 else contextlib.nullcontext():
            fused_attend(layer, qkv, rope, None, cache)
        assert torch.equal(cache.keys, before[0]) and torch.equal(cache.values, before[1])


def test_fused_attend_refuses_what_the_kernel_can_not_index(small, monkeypatch):
    """All that it reads by its own arithmetic is checked before: here nothing may be launched."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=3))
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(persimmon, "triton_kernels", lambda: 1 / 0)
    layer, cache = small.model.layers[0].self_attn, StaticCache(CONFIG, 2, 9, torch.float32, "cpu")
    good, rope, norm = torch.zeros(2, 1, 144), torch.zeros(1, 1, 1, 4), torch.nn.LayerNorm
    with pytest.raises(ZeroDivisionError):
        fused_attend(layer, good, (rope, rope), None, cache)

    def changed(**values):
        other = copy.deepcopy(layer)
        for name, value in values.items():
            setattr(other, name, value)
        return other

    odd = CONFIGS["no QK-norm, other RoPE"]  # D = 24
    cases = [(layer, x, rope, rope) for x in (torch.zeros(2, 1, 96), torch.zeros(1, 1, 144), good.double())]
    cases += [(layer, good, *tables) for tables in (
        (rope.expand(3, 1, 1, 4),) * 2, (rope, rope[..., :2]), (rope.expand(1, 2, 1, 4),) * 2)]  # fmt: skip
    cases += [(changed(**values), good, rope, rope) for values in (
        {"num_heads": 6, "head_dim": 8}, {"q_layernorm": norm(48)}, {"k_layernorm": norm(16, bias=False)},
        {"k_layernorm": norm(16, elementwise_affine=False)})]  # fmt: skip
    cases += [(layer, torch.zeros(2, 10, 144), *(rope.expand(1, 10, 1, 4),) * 2)]
    cases += [(Attention(odd, 0), torch.zeros(1, 1, 360), rope[..., :3], rope[..., :3])]
    for n, (part, qkv, cos, sin) in enumerate(cases):
        cache = StaticCache(odd, 1, 9, torch.float32, "cpu") if n == len(cases) - 1 else cache
        with pytest.raises(ValueError, match="shapes or dtypes are not those of the kernel"):
            fused_attend(part, qkv, (cos, sin), None, cache)


@runs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matvec_runs(kernels, dtype):
    """With and without what can stand around a product; sizes that powers of two divide often, seldom, not at all."""
    torch.manual_seed(0)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    shapes = itertools.cycle(((64, 128), (96, 40), (208, 33), (13, 8), (4096, 24), (8192, 6), (16, 2)))
    around = [*itertools.product((0, 1), repeat=4)] * (1 + ALL)
    for (C, O), (has_norm, has_bias, others, square) in zip(shapes, around):  # noqa: E741
        linear = torch.nn.Linear(C, O, bias=has_bias).to(DEVICE, dtype)
        norm = torch.nn.LayerNorm(C, 1e-3).to(DEVICE, dtype) if has_norm else None
        for p in (*linear.parameters(), *(norm.parameters() if has_norm else ())):
            p.data = torch.randn_like(p)
        linear.weight.data /= C**0.5  # float16 would overflow
        x, r = (torch.randn(1, 1, n, device=DEVICE).to(dtype) + 0.5 for n in (C, O))
        is_possible = C <= 16 * (C & -C) and (not has_norm or C & (C - 1) == 0 and C <= 4096)
        raises = pytest.raises(ValueError, match="not those of the kernel")
        refusal = contextlib.nullcontext() if is_possible else raises
        with torch.no_grad(), refusal:
            y = matvec(linear, x, norm, r if others else None, square)
        if is_possible:
            exact = [m and copy.deepcopy(m).double() for m in (linear, norm)]
            expected = plain_matvec(exact[0], x.double(), exact[1], r if others else None, square)
            assert y.dtype == dtype and y.shape == expected.shape
            assert (y - expected).norm() <= tolerance * expected.norm(), (C, O, has_norm, has_bias, others, square)
    for wrong in (torch.zeros(1, 2, 16), torch.zeros(2, 1, 16), torch.zeros(1, 1, 15), torch.zeros(1, 16)):
        with pytest.raises(ValueError, match="shapes are not those of the kernel"):
            matvec(torch.nn.Linear(16, 2).to(DEVICE), wrong.to(DEVICE))


@runs_kernel
@pytest.mark.parametrize("C, F", [(64, 96), (96, 64)])
def test_cuda_engine_runs(kernels, tmp_path, monkeypatch, C, F):
    """Greedy tokens as those of transformers, sampled ones as those of the plain engine; C = 96 has no matvec."""
    config = replace(CONFIGS["D64"], vocab_size=50, hidden_size=C, intermediate_size=F, num_hidden_layers=2,
                     num_attention_heads=C // 32)  # fmt: skip
    randomize(PersimmonForCausalLM(config)).save_pretrained(tmp_path)
    model = PersimmonForCausalLM.from_pretrained(tmp_path, device=DEVICE)
    theirs, calls = oracle(tmp_path).to(DEVICE), Counter()
    for f in (fused_attend, matvec):
        monkeypatch.setattr(persimmon, f.__name__, lambda *a, f=f, **b: calls.update([f.__name__]) or f(*a, **b))
    ids = random_ids(model.config, length=9).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    few = 4 if DEVICE == "cpu" else 7  # the interpreter is slow
    options = {"max_new_tokens": few, "do_sample": False, "pad_token_id": 5}
    assert torch.equal(model.generate(ids, mask, max_new_tokens=few),
                       theirs.generate(ids, attention_mask=mask, **options))
    assert calls["fused_attend"] >= (few + 1) * model.config.num_hidden_layers and not calls["matvec"]
    with contextlib.nullcontext() if C == 64 else pytest.warns(UserWarning, match="are not used: shapes are not those"):
        assert torch.equal(model.generate(ids[:1], max_new_tokens=few), theirs.generate(ids[:1], **options))
    assert (calls["matvec"] > few * model.config.num_hidden_layers) == (C == 64)
    if not ALL:
        return
    for other, x in ((quantize_model(copy.deepcopy(model), "int8"), ids), (model, ids[:1])):
        options = {"max_new_tokens": few, "temperature": 0.8, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.2}
        found = other.generate(x, **options)
        other.fast = False
        assert torch.equal(found, other.generate(x, **options))


TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
COMPILED = every([(*pair, False) for pair in itertools.product(TARGETS, ("bf16", "fp16", "fp32"))],
                 [("sm_90", "bf16", False), ("sm_80", "fp32", True), ("gfx942", "fp16", True)])  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux" or IS_INTERPRETED,
                    reason="Triton compiles on Linux, without its interpreter")
@pytest.mark.parametrize(("target", "dtype", "is_short"), COMPILED)
def test_triton_kernels_compile(target, dtype, is_short, tmp_path, monkeypatch):
    """For GPUs that are not here: all that the 8B's shape uses, and other head sizes and widths."""
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    attend, product = persimmon.triton_kernels()
    norms, norm = ("q_weight", "q_bias", "k_weight", "k_bias"), ("norm_weight", "norm_bias")
    heads = [(64, 8, ("mask",)), (64, 0, ("mask",)), (64, 8, ())]
    heads += every([(64, 4, ()), (64, 2, ("mask",)), (64, 1, ()), (16, 4, norms), (32, 1, (*norms, "mask")),
                    (128, 0, (*norms, "mask")), (128, 2, norms)], [])  # fmt: skip
    wide = [(4096, 2, 4096, False, ("residual",)), (16384, 1, 4096, False, norm)]
    wide += every([(4096, 2, 4096, False, norm), (4096, 2, 4096, True, ("residual",)),
                   (4096, 2, 4096, False, ("bias", "residual")), (96, 1, 32, False, ())], [])  # fmt: skip
    cases = [(attend, {"H": 64, "D": D, "R": D // 2, "P": min(64, 8192 // (D * int(dtype[2:]) // 8)), "SPLITS": splits},
              absent)
             for D, splits, absent in heads[: 1 if is_short else None]]  # fmt: skip
    cases += [(product, {"C": C, "ROWS": rows, "COLUMNS": n, "SQUARE": square}, absent)
              for C, rows, n, square, absent in wide[: 1 if is_short else None]]  # fmt: skip
    for kernel, constants, absent in cases:
        constants |= dict.fromkeys(absent)
        kinds = {"mask": "*i1", "position": "*i64", "split_out": "*fp32", "split_lse": "*fp32", "arrived": "*i32"}
        kinds |= dict.fromkeys(("T", "N", "O", "rope_stride", "mask_stride"), "i32")
        kinds |= dict.fromkeys(("eps", "q_eps", "k_eps"), "fp32")
        signature = {name: "constexpr" if name in constants else kinds.get(name, f"*{dtype}")
                     for name in kernel.arg_names}
        aligned = {(n,): [["tt.divisibility", 16]] for n, kind in enumerate(signature.values()) if kind.startswith("*")}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        options = {"num_warps": 8 if kernel is product else 4 if constants["SPLITS"] else 1}
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
        assert len(compiled.asm["cubin" if target.startswith("sm") else "hsaco"]) > 1000
        assert compiled.metadata.shared <= 64 * 1024  # what small GPUs have


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_triton_kernels(small, monkeypatch):
    """Not without triton, and not with an old one: then CudaEngine is a plain one."""
    import triton

    def found():
        persimmon.triton_kernels.cache_clear()
        return persimmon.triton_kernels()

    try:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "triton", None)
            assert found() is None and type(CudaEngine(small).make_cache(1, 9)) is KVCache
            cache = CudaEngine(small).make_cache(1, 9)
            assert CudaEngine(small).proven_forwards(1, None, cache) == []
        with monkeypatch.context() as patch:
            patch.setattr(triton, "JITFunction", object)  # an old one's has no get_capture_scope
            assert found() is None
        assert len(found()) == 2
        without_gpu(monkeypatch)
        assert type(CudaEngine(small).make_cache(1, 9)) is StaticCache
    finally:
        persimmon.triton_kernels.cache_clear()


def test_static_cache(monkeypatch):
    without_gpu(monkeypatch)
    if DEVICE == "cpu":  # an SM takes four programs, and no more than 8 splits are combined
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
        config = replace(CONFIGS["D64"], num_hidden_layers=1)
        for rows, splits in ((1, 8), (33, 8), (34, 4), (132, 2), (133, 1), (300, 1)):
            cache = StaticCache(config, rows, 2, torch.float32, "cpu")
            assert cache.splits == copy.deepcopy(cache).splits == splits and cache.arrived.shape == (rows * 2,)
    cache = StaticCache(CONFIG, 2, 9, torch.float32, DEVICE)
    assert cache.positions(2, 5)[0].tolist() == [0, 1, 2, 3, 4] and cache.positions(2, 5)[1] == 5
    cache.crop(5)
    assert cache.length == int(cache.position) == 5
    with pytest.raises(ValueError, match="9 positions, not 2 of 10"):
        cache.positions(2, 5)
    cache.is_captured = True
    cache.crop(6)  # this is up to the replay
    assert cache.length == 5 and cache.positions(2, 1)[0].tolist() == [5] and cache.positions(2, 1)[1] == 9
    cache.position.fill_(7)
    assert cache.positions(2, 1)[0].tolist() == [7]
    cache.is_captured = False
    cache.crop(3)
    assert cache.length == int(cache.position) == 3


@pytest.mark.parametrize("chunks", every(CHUNKS, [(5, 1, 3)]))
@pytest.mark.parametrize("is_padded", [False, True])
def test_static_cache_chunks(small, monkeypatch, chunks, is_padded):
    without_gpu(monkeypatch)
    check_chunks(small.to(DEVICE), StaticCache, chunks, is_padded) if DEVICE == "cpu" else None


@pytest.fixture
def calls(monkeypatch) -> Counter:
    if DEVICE == "cuda":
        pytest.skip("this is about the CPU that stands for a GPU")
    return use_cuda_engine(monkeypatch)


def plainly(model, *arguments, **options) -> torch.Tensor:
    other = copy.deepcopy(model)
    other.fast = False
    return other.generate(*arguments, **options)


def test_cuda_engine(models, calls):
    """One graph for a generation; attention by its kernel for texts together, blocks by five for one text alone."""
    model, options = models[0], {"max_new_tokens": 8, "repetition_penalty": 1.2}
    model.fast, L, ids = True, model.config.num_hidden_layers, random_ids(models[0].config, length=9)
    model.engine = None
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    holes = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 1]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in ((ids, mask), (ids,), (ids[:1], holes), (ids[1:],)):
            expected = plainly(model, *case, **options)
            assert torch.equal(model.generate(*case, **options), expected)  # proves what it needs
            calls.clear()
            RerunGraph.count = 0
            assert torch.equal(model.generate(*case, **options), expected)
            passes = 7 + 2  # a capture is two more, and the prompt is not captured
            is_alone = case[-1].shape[0] == 1 and len(case) == 1
            assert calls == Counter(fused_attend=(passes + 1) * L, matvec=passes * (4 * L + 1) * is_alone)
            assert RerunGraph.count == 1
    proven = dict(model.engine.proven)
    assert set(proven) == {("attention", True), ("attention", False), ("block", False)} and set(proven.values()) == {16}
    model.generate(ids, max_new_tokens=20)  # a longer cache is proven anew
    assert model.engine.proven["attention", True] == 28
    calls.clear()
    model.train().generate(ids, max_new_tokens=3)
    with torch.autocast("cpu", torch.bfloat16):
        model.eval().generate(ids, max_new_tokens=3)
    model.fast = False
    model.generate(ids, max_new_tokens=3)
    model.fast = True
    assert not calls


SPECIAL = {
    "quantized": lambda model, mlp: quantize_model(model, "int8"),
    "Sequential": lambda model, mlp: setattr(mlp, "dense_h_to_4h", torch.nn.Sequential(mlp.dense_h_to_4h).eval()),
    "hook": lambda model, mlp: mlp.register_forward_hook(lambda module, inputs, output: output / 2),
    "forward": lambda model, mlp: setattr(mlp, "forward", lambda x: x),
    "tensor subclass": lambda model, mlp: setattr(
        mlp.dense_4h_to_h, "bias", torch.nn.Parameter(mlp.dense_4h_to_h.bias.data.as_subclass(Packed))),
    "attention hook": lambda model, mlp: model.model.layers[0].self_attn.register_forward_hook(lambda m, x, y: y / 2),
    "norm hook": lambda model, mlp:
        model.model.layers[0].self_attn.q_layernorm.register_forward_hook(lambda m, x, y: y / 2),
    "another hook": lambda model, mlp: model.model.final_layernorm._forward_hooks.clear() or (
        model.model.final_layernorm.register_forward_hook(lambda m, x, y: -y)),
    "head": lambda model, mlp: model.lm_head.register_forward_hook(lambda m, x, y: -y),
    "in place": lambda model, mlp: mlp.dense_4h_to_h.weight.data.neg_(),
    "eps": lambda model, mlp: setattr(model.model.layers[0].post_attention_layernorm, "eps", 0.5),
    "Parameter": lambda model, mlp:
        setattr(mlp.dense_4h_to_h, "weight", torch.nn.Parameter(-mlp.dense_4h_to_h.weight.data)),
}  # fmt: skip


@pytest.mark.parametrize("change", SPECIAL)
def test_cuda_engine_notices_changes(small, calls, change):
    """After a generation, and between two of its steps: what a user has changed is run plainly, the rest is not."""
    ids = random_ids(small.config, rows=1, length=9)
    if change == "another hook":
        small.model.final_layernorm.register_forward_hook(lambda m, x, y: y * 2)
    small.generate(ids, max_new_tokens=12)
    steps = generate(small, ids, max_new_tokens=12)
    early = [next(steps).tokens[0] for _ in range(3)]  # to the host goes step n when n + 1 is done
    SPECIAL[change](small, small.model.layers[0].mlp)
    calls.clear()
    found = small.generate(ids, max_new_tokens=12)
    plain_attention = {"attention hook", "norm hook"}
    plain_block = {*SPECIAL} - {"head", "in place", "eps", "Parameter", "another hook"}
    assert (calls["fused_attend"] == 0) == (change in plain_attention)
    assert (calls["matvec"] == 0) == (change in plain_block)
    assert torch.equal(found, plainly(small, ids, max_new_tokens=12))
    RerunGraph.count = 0
    late = [step.tokens[0] for step in steps]
    # It is captured anew, but for a weight that it reads where it was; and not at all where hooks have to run.
    assert RerunGraph.count == (change in {"quantized", "Sequential", "eps", "Parameter"})
    text = torch.cat((ids, torch.tensor([early + late])), 1)
    with torch.no_grad():
        expected = small(text).logits[0, 8:-1].argmax(-1).tolist()
    assert len(late) == 9
    if change in ("head", "another hook"):  # on which the cache does not depend; one step is late
        assert late[1:] == expected[4:]


@pytest.mark.parametrize("part", ["attention", "MLP", "Block", "wrong kernel", "wrong product", "no compiler"])
def test_cuda_engine_proves_itself(small, calls, monkeypatch, part):
    """Where Part I is edited, or a kernel is wrong, what differs is run plainly, with one warning for each way."""
    ids, gelu = random_ids(small.config, rows=1, length=9), torch.nn.functional.gelu
    small.generate(ids, max_new_tokens=5)
    attend, product = persimmon.fused_attend, persimmon.matvec
    if part == "attention":
        forward = Attention.forward
        monkeypatch.setattr(Attention, "forward", lambda self, x, *a: forward(self, x * 1.5, *a))
    elif part == "MLP":
        monkeypatch.setattr(persimmon.MLP, "forward", lambda self, x: self.dense_4h_to_h(gelu(self.dense_h_to_4h(x))))
    elif part == "Block":
        monkeypatch.setattr(persimmon.Block, "forward", lambda self, x, rope, mask, cache: x + self.self_attn(
            self.input_layernorm(x), rope, mask, cache) + 0.5 * self.mlp(self.post_attention_layernorm(x)))
    elif part == "wrong kernel":
        monkeypatch.setattr(persimmon, "fused_attend", lambda *a: attend(*a) * 1.01)
    elif part == "wrong product":
        monkeypatch.setattr(persimmon, "matvec", lambda *a, **b: product(*a, **b) * 1.001)
    else:
        monkeypatch.setattr(persimmon, "fused_attend", Mock(side_effect=RuntimeError("Failed to find C compiler")))
    if "wrong" in part or "no" in part:
        small.fast = False  # kernels do not change while a model runs
        small.fast = True
    calls.clear()
    with pytest.warns(UserWarning, match="persimmon.py's CUDA kernels are not used") as said:
        found = small.generate(ids, max_new_tokens=12)
    assert torch.equal(found, plainly(small, ids, max_new_tokens=12))
    is_attention_left = part in ("MLP", "Block", "wrong product")
    assert len(said) == (1 if is_attention_left else 3)  # of a block, and of attention for one token and for more
    assert {key for key, length in engine_for(small).proven.items() if length} == (
        {("attention", True), ("attention", False)} if is_attention_left else set())
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(small.generate(ids, max_new_tokens=12), found)
    assert bool(calls["fused_attend"]) == is_attention_left and not calls["matvec"]


def test_capture_cuda_graph(small, monkeypatch):
    """Once to prepare and once to capture, then only replays; what the pass reads stays in memory. Without a GPU."""
    use_cuda_engine(monkeypatch)
    graph = Mock()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    engine, cache = CudaEngine(small), StaticCache(CONFIG, 2, 9, torch.float32, "cpu")
    ids, mask, passes = random_ids(small.config, length=5), torch.ones(2, 8, dtype=torch.long), count_passes(small)
    with torch.no_grad():
        engine.next_logits(ids, mask, cache)
        forwards = [*engine.find_forwards("attention"), (small.lm_head, lambda x: x.sum(-1, keepdim=True))]
        replay = engine.capture_cuda_graph(ids[:, :1], mask, cache, forwards)
        assert passes == [5, 1, 1] and cache.length == int(cache.position) == 5 and not cache.is_captured
        assert replay.mask.shape == (2, 9) and replay(ids[:, 1:2]).shape == (2, 1) and graph.replay.call_count == 1
        assert small.lm_head(torch.zeros(1, 48)).shape == (1, 97)
        monkeypatch.setattr(PersimmonModel, "forward", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.capture_cuda_graph(ids[:, :1], mask, cache, [])
    assert not cache.is_captured


def test_to_host_is_one_step_late(small, monkeypatch):
    """Step n + 1 is asked for before the result of step n is seen, but for the first; tokens and ends are the same."""
    without_gpu(monkeypatch)
    events = []

    def steps():
        for n in range(3):
            events.append(f"step {n}")
            yield torch.tensor([n, 7], device=DEVICE), torch.tensor([0.5, -float(n)], device=DEVICE)

    for engine in (Engine(small), CudaEngine(small)):
        for tokens, logprobs in engine.to_host(steps()):
            assert tokens[1] == 7 and logprobs == [0.5, -tokens[0]]
            events.append(f"result {tokens[0]}")
    assert events[:6] == ["step 0", "result 0", "step 1", "result 1", "step 2", "result 2"]
    assert events[6:] == ["step 0", "result 0", "step 1", "step 2", "result 1", "result 2"]

    ids, options = random_ids(small.config, length=9), {"max_new_tokens": 30, "temperature": 0.7}
    small.fast = False
    free = list(generate(small, ids, **options))
    for stop_ids in ((), [step.tokens[0] for step in free[9:11]]):
        small.fast = False
        expected = list(generate(small, ids[:1], stop_ids=stop_ids, **options))
        small.fast = True
        monkeypatch.setattr(CudaEngine, "prefill", Engine.prefill)
        monkeypatch.setattr(CudaEngine, "decode", Engine.decode)
        cache = KVCache(small.config, 1, 40, torch.float32, "cpu")
        assert list(generate(small, ids[:1], stop_ids=stop_ids, cache=cache, **options)) == expected
        assert cache.length == 9 + min(30, len(expected) + 1) - 1


@on_a_gpu
def test_a_captured_graph_keeps_what_it_reads(folders):
    """Memory that is free after the capture, filled with NaN, changes nothing."""
    model = PersimmonForCausalLM.from_pretrained(folders["D64", "2023"], device=DEVICE)
    ids, engine = random_ids(model.config, length=21).to(DEVICE), engine_for(model)
    for rows, mask in ((1, None), (2, torch.ones(2, 30, dtype=torch.long, device=DEVICE))):
        cache = engine.make_cache(rows, 30)
        with torch.no_grad():
            engine.prefill(ids[:rows], mask, cache)
            expected = Engine(model).next_logits(ids[:rows, :1], mask, cache).clone()
            cache.crop(21)
            for _ in range(2):
                assert close(engine.decode(ids[:rows, :1], mask, cache), expected, 1e-4) and cache.length == 22
                cache.crop(21)
                junk = [torch.full((n,), math.nan, device=DEVICE)
                        for n in (1, 8, 64, 128, 256, 512, 1024, 4096, 10**5) * 100]
        assert len(junk) == 900 and cache.graph is not None


@on_a_gpu
def test_splits_are_combined_the_same_each_time():
    """Which program is the last differs from launch to launch, what it sees must not: 20,000 launches, equal bits."""
    config = PersimmonConfig(num_hidden_layers=1)
    layer = Attention(config, 0).to(DEVICE, torch.bfloat16)
    for rows, cached in ((1, 3000), (2, 700)):
        cache = StaticCache(config, rows, cached + 1, torch.bfloat16, DEVICE)
        cache.keys.normal_(), cache.values.normal_()
        cache.crop(cached)
        qkv = torch.randn(rows, 1, 3 * config.hidden_size, device=DEVICE, dtype=torch.bfloat16)
        others = rope_tables(cache.positions(rows, 1)[0][None], config, torch.bfloat16), None, cache
        different = torch.zeros((), dtype=torch.long, device=DEVICE)
        with torch.no_grad():
            expected, graph = fused_attend(layer, qkv, *others), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(100):
                    different += (fused_attend(layer, qkv, *others) != expected).any()
        for _ in range(100):
            graph.replay()
        assert cache.splits > 1 and int(different) == 0


# === How it is built =================================================================================================


def wide_model(layers: int = 2) -> PersimmonForCausalLM:
    """A model whose matrices are large enough for the fast paths: an MLP's have 16 MB in float32."""
    config = dict(vocab_size=200, hidden_size=512, intermediate_size=8192, num_attention_heads=8, eos_token_id=None)
    return randomize(PersimmonForCausalLM(PersimmonConfig(num_hidden_layers=layers, **config))).eval()


def small_model(module: ModuleType, heads: int, layers: int = 2, **changes) -> PersimmonForCausalLM:
    """A model with heads of 16, which the CUDA engine's kernels can have; on a CPU, 16 heads make a cache long."""
    config = dict(vocab_size=90, hidden_size=16 * heads, intermediate_size=64, num_hidden_layers=layers,
                  num_attention_heads=heads, max_position_embeddings=300, eos_token_id=None)  # fmt: skip
    return randomize(module.PersimmonForCausalLM(module.PersimmonConfig(**(config | changes)))).to(DEVICE).eval()


def few_ids(V: int = 200, rows: int = 1, length: int = 9) -> torch.Tensor:
    return torch.randint(6, V, (rows, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


class RecordedGraph(TorchDispatchMode):
    """torch.cuda.CUDAGraph and torch.cuda.graph on a CPU: operators and kernels are called again, in the same memory.

    Like the real one, it looks at no number of Python again, and what would wait for the GPU is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a capture can't wait for a number"
        made = function(*args, **(kwargs or {}))

        def again() -> None:
            new = function(*args, **(kwargs or {}))
            for old, value in zip(*(x if isinstance(x, (tuple, list)) else [x] for x in (made, new))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != value.data_ptr():
                    old.copy_(value)

        self.calls.append(again)
        return made

    def replay(self) -> None:
        for again in self.calls:
            again()


@pytest.fixture
def cuda(monkeypatch):
    """cuda(module) has `module`, persimmon or a copy, use its CudaEngine on DEVICE; it returns counts of launches.

    On a GPU nothing is replaced. Without one, kernels run in Triton's interpreter (mark the test with runs_kernel, have
    "on_cuda" in its name), the graph is a RecordedGraph, and what else asks torch.cuda for something gets it from here.
    """

    class Counted:
        def __init__(self, name: str, kernel, launches: Counter) -> None:
            self.name, self.kernel, self.launches = name, kernel, launches

        def __getitem__(self, grid):
            return partial(self.launch, grid)

        def launch(self, grid, *args, **options) -> None:
            self.launches[self.name] += 1
            with _disable_current_modes():
                self.kernel[grid](*args, **options)
            if isinstance(graph := _get_current_dispatch_mode(), RecordedGraph):
                graph.calls.append(lambda: self.kernel[grid](*args, **options))

    def prepare(module: ModuleType) -> Counter:
        launches, set_to = Counter(), monkeypatch.setattr
        counted = [Counted(*pair, launches) for pair in zip(("attention", "matvec"), module.triton_kernels())]
        set_to(module, "triton_kernels", lambda: counted)
        if DEVICE == "cuda":
            return launches
        use_interpreter(module, monkeypatch)
        for name in ("device", "device_of", "stream"):
            set_to(torch.cuda, name, lambda *_: contextlib.nullcontext())
        for name in ("current_stream", "Stream"):
            set_to(torch.cuda, name, lambda *_: Mock())
        set_to(torch.cuda, "CUDAGraph", RecordedGraph)
        set_to(torch.cuda, "graph", lambda graph, stream: graph)
        set_to(torch.cuda, "get_device_properties", lambda device: Mock(multi_processor_count=3))
        set_to(module, "nonzero_bags", lambda *_: None)  # as off the CPU
        monkeypatch.setitem(module.ENGINES, "cpu", module.CudaEngine)
        return launches

    return prepare


# --- structure -------------------------------------------------------------------------------------------------------

BANNERS = dict(zip(("I", "II", "III", "a", "b", "c"), (
    "# === Part I.", "# === Part II.", "# === Part III.", "# === Part III a.", "# === Part III b.",
    "# === Part III c.")))
MAY_NAME = {"I": {"I"}, "II": {"I", "II"}, "III": {"I", "II", "III"}, **{x: {"I", "II", "III", x} for x in "abc"}}


def part_lines(source: str) -> dict[str, range]:
    """Part -> its lines, from 0, with its banner. The header is a part without a name."""
    lines = source.splitlines()
    at = [n for n, line in enumerate(lines) if line.startswith("# === ")]
    assert len(at) == len(BANNERS) and all(lines[n].startswith(banner) for n, banner in zip(at, BANNERS.values()))
    return dict(zip(("", *BANNERS), map(range, [0, *at], [*at, len(lines)])))


def cut(source: str, *letters: str) -> str:
    """The file without these blocks of Part III, each from its banner to the next one."""
    lines = source.splitlines(keepends=True)
    return "".join(lines[n] for part, numbers in part_lines(source).items() if part not in letters for n in numbers)


def upward_names(source: str) -> set[str]:
    """Where a part uses a name, an attribute or a string that only a part has which it must not know: "part: name"."""
    ranges = part_lines(source)
    nodes = {part: [node for node in ast.parse(source).body if node.lineno - 1 in ranges[part]] for part in BANNERS}
    names: dict[str, set] = {}  # what each part defines, at its top level
    attributes: dict[str, set] = {}  # and what it gives its objects
    for part, found in nodes.items():
        every = [n for node in found for n in ast.walk(node)]
        targets = [t for node in found for t in getattr(node, "targets", [getattr(node, "target", None)])]
        names[part] = {getattr(n, "name", None) for n in found} | {getattr(t, "id", None) for t in targets}
        fields = [f for n in every if isinstance(n, ast.ClassDef) for f in n.body]
        targets = [t for f in fields for t in getattr(f, "targets", [getattr(f, "target", f)])]
        attributes[part] = {getattr(t, "id", getattr(t, "name", None)) for t in targets}
        attributes[part] |= {n.attr for n in every if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    torchs = {None, *dir(torch), *dir(torch.nn.Linear(1, 1)), *dir(torch.Tensor), *dir(list), *dir(dict)}
    wrong = set()
    for part, found in nodes.items():
        own = torchs.union(*(names[p] | attributes[p] for p in MAY_NAME[part]))
        hidden, hidden_too = (set().union(*(kind[p] for p in BANNERS)) - own for kind in (names, attributes))
        for node in found:
            every = [*ast.walk(node)]
            local = {n.arg for n in every if isinstance(n, ast.arg)}
            local |= {n.id for n in every if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            ends = [f for f in every if getattr(f, "name", "") in ("from_pretrained", "save_pretrained")
                    and part == "I"]
            at_ends = {id(n) for f in ends
                       for n in ast.walk(f) if getattr(n, "id", "") in ("load_config", "load", "save")}
            used = {n.id for n in every if isinstance(n, ast.Name) and id(n) not in at_ends}
            wrong |= {f"{part}: {name}" for name in used & (hidden - local | {"globals", "eval", "exec", "__import__"})}
            used = {n.attr for n in every if isinstance(n, ast.Attribute)}
            wrong |= {f"{part}: .{name}" for name in used & (hidden | hidden_too)}
            strings = {n.value for n in every if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            wrong |= {f"{part}: {name!r}" for name in strings & hidden}
    return wrong


def test_nothing_refers_upward():
    assert upward_names(SOURCE) == set()


@pytest.mark.parametrize("part, line, found", [
    ("I", "x: QuantizedLinear", "QuantizedLinear"), ("I", "y = lambda cache: cache.is_captured", ".is_captured"),
    ("I", "y = lambda: read_json", "read_json"), ("I", "y = lambda: getattr(torch, 'cpu_has')", "'cpu_has'"),
    ("I", "y = lambda: load_config", "load_config"), ("II", "y = lambda: cpu_has", "cpu_has"),
    ("II", "y = lambda: globals()['x']", "globals"), ("III", "y = lambda: CpuEngine", "CpuEngine"),
    ("a", "y = lambda: QuantizedLinear", "QuantizedLinear"), ("b", "y = lambda engine: engine.tables", ".tables"),
    ("c", "y = lambda: cpu_has", "cpu_has"),
])  # fmt: skip
def test_what_refers_upward_is_found(part, line, found):
    lines = SOURCE.splitlines()
    lines.insert(part_lines(SOURCE)[part].start + 1, line)
    assert upward_names("\n".join(lines)) == {f"{part}: {found}"}


def test_size():
    assert max(map(len, SOURCE.splitlines())) <= 100
    assert part_lines(SOURCE)["I"].stop <= 600 and len(SOURCE.splitlines()) <= 2060


def test_importing_does_nothing_but_enter_engines_and_quantizers():
    """Two tables, empty where they are made; whatever else is bound is a function, a class or a constant of Part II."""
    ranges, entered = part_lines(SOURCE), []
    for node in ast.parse(SOURCE).body:
        part = next(part for part, numbers in ranges.items() if node.lineno - 1 in numbers)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)) or part == "":
            continue
        assert isinstance(node, (ast.Assign, ast.AnnAssign)), ast.unparse(node)
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        if isinstance(target, ast.Subscript):
            entered.append((part, target.value.id))
        else:
            is_empty = isinstance(node.value, ast.Dict) and not node.value.keys
            assert is_empty == (target.id in ("ENGINES", "QUANTIZERS")) and (part, target.id) != ("II", "ENGINES")
            assert target.id.isupper() and (part == "II" or target.id == "ENGINES")
    assert entered == [("a", "ENGINES"), ("b", "QUANTIZERS"), ("b", "QUANTIZERS"), ("c", "ENGINES")]
    code = ("import sys, os, warnings, torch; old = set(sys.modules), dict(os.environ), warnings.filters[:]; "
            "import persimmon; assert old[1:] == (dict(os.environ), warnings.filters); "
            "print(*{m.split('.')[0] for m in set(sys.modules) - old[0]} - sys.stdlib_module_names)")  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("persimmon", "")


RUN = r"""
import contextlib, io, json, sys, tempfile
from pathlib import Path
import torch
import persimmon
from persimmon import *
assert PersimmonForCausalLM is persimmon.PersimmonForCausalLM
torch.manual_seed(0)
found, is_entered = {}, {}
ids = torch.randint(6, 150, (2, 9))
for folder in map(Path, sys.argv[2:]):
    try:
        model = PersimmonForCausalLM.from_pretrained(folder, dtype="float32")
    except ValueError as error:
        found[folder.name] = str(error)
        continue
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[1, :4], right[1, 5:] = 0, 0
    options = dict(max_new_tokens=6)
    sampled = dict(options, temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.1, seed=3)
    runs = [model.generate(ids[:1], **options), model.generate(ids, **options), model.generate(ids, **sampled),
            *(model.generate(ids, mask, **options)[:, 9:] for mask in (left, right))]
    is_entered[folder.name] = bool(getattr(model.engine, "tables", None))
    with torch.no_grad():
        logits = [model(ids, mask).logits[mask == 1] for mask in (left, right)] + [model(ids[:1]).logits[0]]
    with tempfile.TemporaryDirectory() as new:
        model.save_pretrained(new)
        again = PersimmonForCausalLM.from_pretrained(new)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    runs.append(again.generate(ids[:1], **options))
    found[folder.name] = ([run.tolist() for run in runs], logits)
import sample
for options in (["--temp", "0"], ["--seed", "1"]):
    out = io.StringIO()
    out.reconfigure = lambda **_: None
    with contextlib.redirect_stdout(out):
        code = sample.main(["ROMEO:\n", "-n", "12", "--dtype", "float32", "--quiet", "--model", sys.argv[2], *options])
    found["sample.py", *options] = code, out.getvalue()
torch.save((found, is_entered, sorted(vars(persimmon))), sys.argv[1])
"""


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A function that has a source do RUN with tiny/, wide_model and that in int8, and what the whole file made."""
    root, model = tmp_path_factory.mktemp("cut"), wide_model()
    folders = [HERE / "tiny", root / "wide", root / "int8"]
    model.save_pretrained(folders[1])
    persimmon.quantize_model(model.bfloat16(), "int8").save_pretrained(folders[2])

    def run(source: str, name: str):
        (folder := root / name).mkdir()
        texts = {"persimmon.py": source, "sample.py": (HERE / "sample.py").read_text(), "run.py": RUN}
        for file, text in texts.items():
            (folder / file).write_text(text)
        result = subprocess.run([sys.executable, "run.py", "found.pt", *map(str, folders)], cwd=folder,
                                capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})  # fmt: skip
        assert (result.returncode, result.stderr) == (0, ""), result.stderr[-3000:]
        return torch.load(folder / "found.pt")

    return run, run(SOURCE, "whole")


@pytest.mark.parametrize("letters", ["a", "b", "c", "abc"])
def test_a_block_of_part_iii_can_be_cut_out(whole, letters):
    run, (expected, is_entered, names) = whole
    assert is_entered == {"tiny": False, "wide": True, "int8": False}  # an int8 matrix is fast by itself
    found, _, names_left = run(cut(SOURCE, *letters), letters)
    gone = {"a": "CpuEngine", "b": "Int8Linear", "c": "CudaEngine"}
    assert {*gone.values()} & {*names} - {*names_left} == {gone[letter] for letter in letters}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if name == "int8" and "b" in letters:
            assert re.fullmatch(r"[^\n]*int8[^\n]*", value)
        elif isinstance(name, tuple):  # sample.py
            assert value == expected[name] and value[0] == 0
        else:
            assert value[0] == expected[name][0], name
            assert all((a - b).abs().max() <= 1e-4 for a, b in zip(value[1], expected[name][1])), name


# --- copy and change -------------------------------------------------------------------------------------------------

SDPA = "return nn.functional.scaled_dot_product_attention("
EDITS = {  # of Part I: what a person changes who copies the file; and which parts of the engines have to step aside
    "GELU": ([("self.dense_h_to_4h(x).relu().square()", "nn.functional.gelu(self.dense_h_to_4h(x))")], "block"),
    "window in attention": ([
        (SDPA, """column, is_causal = torch.arange(k.shape[2], device=q.device), False
    row = column[k.shape[2] - q.shape[2] :, None]
    window = (column <= row) & (row - column < 100)
    mask = window if mask is None else mask & window
    """ + SDPA)], "block attention cpu"),
    "window in causal_mask": ([
        ("input_pos.shape[0] in (1, S)", "input_pos.shape[0] in (1, S) and S <= 100"),
        ("(column <= row)[None, None]", "((column <= row) & (row - column < 100))[None, None]")], ""),
    "grouped queries": ([
        ("hidden_dropout: float = 0.0", "num_key_value_heads: int = 1\n    hidden_dropout: float = 0.0"),
        ("batch_size, config.num_attention_heads, max_length", "batch_size, config.num_key_value_heads, max_length"),
        ("nn.Linear(config.hidden_size, 3 * config.hidden_size)",
         "nn.Linear(config.hidden_size, config.hidden_size + 2 * config.num_key_value_heads * config.head_dim)"),
        ("qkv.view(B, T, self.num_heads, 3, self.head_dim).unbind(3)",
         "qkv.view(B, T, -1, self.head_dim).tensor_split((self.num_heads, "
         "(self.num_heads + qkv.shape[2] // self.head_dim) // 2), 2)"),
        (SDPA, "k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))\n    " + SDPA)],
        "block attention prefill cpu"),
    "no MLP in every second layer": ([
        ("return x + self.dropout(", "return x if self.self_attn.layer % 2 else x + self.dropout(")], "block"),
    "scaled residual": ([("x = x + self.self_attn(", "x = x + 0.5 * self.self_attn(")], "block"),
    "scaled final norm": ([("ModelOutput(self.final_layernorm(x))", "ModelOutput(1.5 * self.final_layernorm(x))")], ""),
    "scaled scores": ([(SDPA, "q = 2 * q\n    " + SDPA)], "block attention cpu"),
    "interleaved RoPE": ([("x[..., : R // 2], x[..., R // 2 : R]", "x[..., 0:R:2], x[..., 1:R:2]")],
                         "block attention prefill"),
}  # fmt: skip


def edited(folder: Path, *replacements: tuple[str, str]) -> ModuleType:
    """A copy of persimmon.py, imported, with these strings of Part I replaced; each has to be there once."""
    part_i, banner, rest = SOURCE.partition(BANNERS["II"])
    for old, new in replacements:
        assert part_i.count(old) == 1, f"Part I has {part_i.count(old)} times {old!r}"
        part_i = part_i.replace(old, new)
    (file := folder / f"edited_{len(sys.modules)}.py").write_text(part_i + banner + rest)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def set_processor(module: ModuleType, processor: str) -> ModuleType:
    """However small the matrices and the cache are, the products that are chosen on a processor; for a copy."""
    module.CpuEngine.large, module.TransposedKVCache.block = 0, 64
    module.cpu_has = lambda feature: feature in PROCESSORS[processor]
    return module


def with_fast_off(model, function):
    """function() with the engine switched off, which is then there again with what it holds."""
    engine, model.fast = model.engine, False
    try:
        return function()
    finally:
        model.fast, model.engine = True, engine


def steps_of(module: ModuleType, model, ids, steps: int, tokens=None, mask=None, room: int = 299):
    """The first steps of a generation whose cache has `room`: tokens, logits (steps, B, V), and warnings of its file.

    With `tokens`, these are taken instead of the model's own.
    """
    found, sample, given = [], module.sample, iter(tokens or [])

    def recorded(logits, *arguments):
        found.append(logits.clone())
        return sample(logits, *arguments) if tokens is None else torch.tensor(next(given, tokens[-1]), device=DEVICE)

    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("default")
        patch.setattr(module, "sample", recorded)
        run = module.generate(model, ids, mask, max_new_tokens=room + 1 - ids.shape[1], stop_ids=())
        result = [step.tokens for step in itertools.islice(run, steps)]
    return result, torch.stack(found[:steps]), [w for w in caught if w.filename.startswith(module.__file__)]


def check_engine(module: ModuleType, model, ids, dtype, mask=None, launches=None, room: int = 299) -> int:
    """Compares an engine's logits with the plain path's, for the same tokens; returns how often it warned.

    A second generation warns of nothing, gives the same, and leaves its launches of kernels in the Counter `launches`.
    """
    tokens, exact, _ = with_fast_off(model, lambda: steps_of(module, model, ids, 3, None, mask, room))
    model = copy.deepcopy(model).to(dtype)
    run = partial(steps_of, module, model, ids, 3, tokens, mask, room)
    expected, (_, found, caught) = with_fast_off(model, run)[1], run()
    assert type(model.engine) is module.ENGINES[DEVICE]
    error, limit = (found - exact).norm(), 2 * (expected - exact).norm() + 1e-5 * exact.norm()
    assert error <= limit, f"{error / exact.norm()} with the engine, {limit / exact.norm()} allowed"
    assert dtype != torch.float32 or found.argmax(-1).tolist() == tokens
    if launches is not None:
        launches.clear()
    _, again, more = run()
    assert (again - found).abs().max() <= (1e-4 if dtype == torch.float32 else 0.2) and more == []
    return len(caught)


@pytest.mark.parametrize("name", EDITS)
def test_a_cpu_follows_an_edit(tmp_path, name):
    module = edited(tmp_path, *EDITS[name][0])
    model, ids = small_model(module, 16), few_ids(90, 1, 150 if "window" in name else 21)
    unchanged, changed = small_model(persimmon, 16)(ids).logits, model(ids).logits
    assert (unchanged - changed).norm() > 0.03 * unchanged.norm(), "the edit changes nothing"
    for processor, dtype in itertools.product(PROCESSORS, (torch.float32, torch.bfloat16, torch.float16)):
        warned = check_engine(set_processor(module, processor), model, ids, dtype)
        is_transposed = dtype == torch.float16 or (dtype == torch.bfloat16 and processor != "AMX")
        assert warned == ("cpu" in EDITS[name][1] and is_transposed), (processor, dtype)
    mask = torch.arange(21) >= torch.tensor([[8], [0]])
    check_engine(module, model, few_ids(90, 2, 21), torch.float16, mask, room=300)


def test_a_new_config_field_has_to_be_listed(tmp_path):
    """Or a model that is saved with it would be loaded without."""
    module = edited(tmp_path, ("hidden_dropout: float = 0.0", "window: int = 9\n    hidden_dropout: float = 0.0"))
    with pytest.raises(ValueError, match="PersimmonConfig has window, and CONFIG_FIELDS does not"):
        module.load_config(TINY)


@runs_kernel
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_followed_on_cuda(tmp_path, cuda, name):
    module, aside = edited(tmp_path, *EDITS[name][0]), EDITS[name][1].split()
    launches, model = cuda(module), small_model(module, 2)
    ids = few_ids(90, 1, 105 if "window" in name else 7)
    assert check_engine(module, model, ids, torch.float32, None, launches) == ("block" in aside)
    assert bool(launches["matvec"]) == ("block" not in aside)
    assert bool(launches["attention"]) == ("prefill" not in aside)
    if ALL:
        check_engine(module, model, ids, torch.bfloat16)
        mask = torch.arange(21, device=DEVICE) >= torch.tensor([[8], [0]], device=DEVICE)
        check_engine(module, model, few_ids(90, 2, 21), torch.float32, mask, room=40)


def swapped(owner, name: str, value):
    """Sets an attribute; returns how to undo it."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, old)


def own_forward(module: torch.nn.Module, forward):
    module.forward = forward
    return lambda: delattr(module, "forward")


class Halved(torch.nn.Sequential):
    """A module in the place of another one: half of what that gives."""

    def forward(self, x):
        return 0.5 * super().forward(x)


CHANGES = {  # of a model that has generated. Some return how to undo it
    "hook": lambda block, mlp, down: mlp.register_forward_hook(lambda _, __, y: 0.5 * y).remove,
    "hook on a Linear": lambda block, mlp, down:
        mlp.dense_h_to_4h.register_forward_hook(lambda _, __, y: y - 0.3).remove,
    "pre-hook": lambda block, mlp, down: down.register_forward_pre_hook(lambda _, x: (0.5 * x[0],)).remove,
    "hook on attention": lambda block, mlp, down:
        block.self_attn.register_forward_hook(lambda _, __, y: 0.5 * y).remove,
    "other module": lambda block, mlp, down: swapped(mlp, "dense_4h_to_h", Halved(down).eval()),
    "other Linear": lambda block, mlp, down: swapped(
        mlp, "dense_4h_to_h", torch.nn.Linear(down.in_features, down.out_features, device=DEVICE).eval()),
    "MLP": lambda block, mlp, down: swapped(block, "mlp", Halved(mlp).eval()),
    "QK-norm": lambda block, mlp, down: swapped(block.self_attn, "q_layernorm", torch.nn.Identity().eval()),
    "forward": lambda block, mlp, down: own_forward(mlp, lambda x: 0.5 * x),
    "forward of a Linear": lambda block, mlp, down: own_forward(down, lambda x: x @ down.weight.t() * 0.5),
    "class": lambda block, mlp, down:
        swapped(mlp, "__class__", type("Other", (type(mlp),), {"forward": lambda self, x: x})),
    "in place": lambda block, mlp, down: down.weight.detach().mul_(0.5),
    ".data": lambda block, mlp, down: down.weight.data.add_(down.weight.data.flip(0)),
    ".data of a bias": lambda block, mlp, down: down.bias.data.mul_(-3),
    ".data, transposed": lambda block, mlp, down:
        swapped(down.weight, "data", down.weight.t().contiguous().t().data * 0.5),
    "parameter": lambda block, mlp, down: swapped(down, "weight", torch.nn.Parameter(0.5 * down.weight.detach())),
    "norm's eps": lambda block, mlp, down: swapped(block.post_attention_layernorm, "eps", 3.0),
    "pruned": lambda block, mlp, down: prune.random_unstructured(down, "weight", 0.5),
    "parametrized": lambda block, mlp, down: weight_norm(down).parametrizations.weight.original0.data.mul_(0.5),
}  # fmt: skip


@pytest.fixture(params=["on_cpu", pytest.param("on_cuda", marks=runs_kernel)])
def engine(request, tmp_path, cuda):
    """A copy of persimmon.py with its CpuEngine, or with its CudaEngine, and a small model of it."""
    module = edited(tmp_path)
    if request.param == "on_cpu":
        return set_processor(module, "Zen 4"), small_model(module, 4)
    cuda(module)
    return module, small_model(module, 2, 1)


def test_a_change_after_a_generation_is_followed(engine):
    """By the next one; and where it can be undone, so is that."""
    (module, model), ids, steps = engine, few_ids(90, 1, 5), 2
    before = steps_of(module, model, ids, steps)[1]
    assert getattr(model.engine, "tables", True)
    is_quick = type(model.engine) is module.CudaEngine and not ALL
    for name in ("hook", ".data", "parameter", "QK-norm") if is_quick else CHANGES:
        old, block = copy.deepcopy(model.state_dict()), model.model.layers[0]
        undo = CHANGES[name](block, block.mlp, block.mlp.dense_4h_to_h)
        tokens, expected, _ = with_fast_off(model, lambda: steps_of(module, model, ids, steps))
        assert (expected[0] - before[0]).norm() > 1e-2 * before[0].norm(), f"{name} changes nothing"
        logits = steps_of(module, model, ids, steps, tokens)[1]
        assert (logits - expected).norm() <= 1e-4 * expected.norm(), f"{name} is not followed"
        if isinstance(undo, (FunctionType, MethodType)):
            undo()
        else:
            model = small_model(module, model.config.num_attention_heads, model.config.num_hidden_layers)
            model.load_state_dict(old)
        again = steps_of(module, model, ids, steps)[1]
        assert (again - before).norm() <= 1e-4 * before.norm(), f"the end of {name} is not followed"


def test_a_change_between_two_steps_is_followed(engine):
    """`fast` is switched, a hook added and removed, and the head's weight replaced."""
    (module, model), ids, factor, found = engine, few_ids(90, 1, 7), 1.0, []
    tokens, expected, _ = with_fast_off(model, lambda: steps_of(module, model, ids, 12))
    given = iter(tokens)

    def recorded(logits, *_):
        found.append((logits / factor, factor, type(model.engine)))
        return torch.tensor(next(given, tokens[-1]), device=DEVICE)

    module.sample = recorded
    for step, _ in enumerate(module.generate(model, ids, max_new_tokens=12, stop_ids=()), start=1):
        if step in (2, 6):
            model.fast = step == 6
        elif step == 3:
            hook, factor = model.lm_head.register_forward_hook(lambda _, __, y: 3 * y), 3.0
        elif step == 8:
            factor = hook.remove() or 1.0
        elif step == 9:
            model.lm_head.weight, factor = torch.nn.Parameter(5 * model.lm_head.weight.detach()), 5.0
    _, factors, kinds = zip(*found)
    assert {*kinds} == {module.Engine, module.ENGINES[DEVICE]} and {*factors} == {1.0, 3.0, 5.0}
    assert all((logits - plain).norm() <= 1e-4 * plain.norm() for (logits, *_), plain in zip(found, expected))


# --- ordinary parameters ---------------------------------------------------------------------------------------------


def large_model(when: str) -> PersimmonForCausalLM:
    """A model whose MLP has matrices of 16 MB, fresh, or after it has generated and made a table."""
    model = wide_model(1)
    if when == "used":
        model.generate(few_ids(), max_new_tokens=3)
        assert [t.shape for t in model.engine.tables.values()] == [(8192, 512)]
    return model


@pytest.mark.parametrize("when", ["fresh", "used"])
def test_parameters_are_ordinary(when, tmp_path):
    model, ids = large_model(when), few_ids()
    with torch.device("meta"):
        expected = {n: p.shape for n, p in PersimmonForCausalLM(model.config).named_parameters()}
    assert {n: p.shape for n, p in model.named_parameters()} == expected
    assert model.state_dict().keys() == expected.keys()
    assert all(type(p) is torch.nn.Parameter and p.is_contiguous() and p.requires_grad for p in model.parameters())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(p, stored[n]) for n, p in model.named_parameters())
    vector, size = parameters_to_vector(model.parameters()), sum(p.nbytes for p in model.parameters())
    assert vector.nbytes == size
    engine, twin, answer = model.engine, copy.deepcopy(model), model.generate(ids, max_new_tokens=4)
    assert twin.engine is None and model.engine is (engine or model.engine)
    for part in (model, twin, model.state_dict()):
        torch.save(part, tmp_path / "model.pt")
        assert size <= (tmp_path / "model.pt").stat().st_size < size + 2**17  # a table has 2**24 bytes
        part = torch.load(tmp_path / "model.pt", weights_only=False)
        assert isinstance(part, dict) or torch.equal(part.generate(ids, max_new_tokens=4), answer)
    down, head = model.model.layers[0].mlp.dense_4h_to_h, model.lm_head
    for change in (lambda: vector_to_parameters(vector * 0.9, model.parameters()),
                   lambda: prune.l1_unstructured(down, "weight", 0.6),
                   lambda: prune.l1_unstructured(head, "weight", 0.6),
                   lambda: prune.remove(head, "weight")):  # fmt: skip
        change()
        answer = model.generate(ids, max_new_tokens=4)
        assert torch.equal(answer, with_fast_off(model, lambda: model.generate(ids, max_new_tokens=4)))


@pytest.mark.parametrize("when", ["fresh", "used"])
def test_hooks_see_what_was_computed(when):
    model, seen, gradients = large_model(when), [], []
    up, down = model.model.layers[0].mlp.dense_h_to_4h, model.model.layers[0].mlp.dense_4h_to_h
    hooks = (up.register_forward_hook(lambda _, __, y: seen.append(y)),
             down.register_forward_pre_hook(lambda _, x: seen.append(*x)))  # fmt: skip
    model(few_ids())
    model.generate(few_ids(), max_new_tokens=3)
    assert [y.shape[1] for y in seen] == [9, 9, 9, 9, 1, 1, 1, 1]
    for y, x in zip(seen[::2], seen[1::2]):  # nothing has been written over what the hook got
        assert (y < 0).any() and torch.equal(y.relu().square(), x)
    for hook in hooks:
        hook.remove()
    for module in (up, down):
        module.register_full_backward_hook(lambda _, x, y: gradients.append((x[0].shape[2], y[0].shape[2])))
    model(few_ids(), labels=few_ids()).loss.backward()
    assert gradients == [(8192, 512), (512, 8192)]
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_generation_changes_no_bit_of_a_forward_pass(dtype):
    model, ids = wide_model(1).to(dtype), few_ids(rows=2)

    def passes() -> list:
        with torch.no_grad():
            rows = [model(x).logits for x in (ids, ids[:1], ids[:1, :1])]
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [*rows, *(p.grad.clone() for p in model.parameters())]

    before = passes()
    for rows in (1, 2):
        model.generate(ids[:rows], max_new_tokens=3, temperature=1.0)
        assert model.engine.tables and all(map(torch.equal, passes(), before))


def test_fully_shard(tmp_path):
    """FSDP2 of blocks and model on one process, with a backward pass, before and after a generation."""
    code = f"""
import sys, torch
sys.path.insert(0, {str(HERE)!r})
from persimmon import PersimmonConfig, PersimmonForCausalLM
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
mesh, grads, ids = init_device_mesh("cpu", (1,)), [], torch.arange(6, 15)[None]
config = PersimmonConfig(vocab_size=200, hidden_size=512, intermediate_size=8192, num_hidden_layers=1,
                         num_attention_heads=8, eos_token_id=None)
for when in ("fresh", "used"):
    torch.manual_seed(0)
    model = PersimmonForCausalLM(config).eval()
    if when == "used":
        model.generate(ids, max_new_tokens=3)
        assert len(model.engine.tables) == 1
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    model(ids, labels=ids).loss.backward()
    grads.append([p.grad.full_tensor() for p in model.parameters()])
assert all(map(torch.equal, *grads)) and len(grads[0]) == 20
torch.distributed.destroy_process_group()
print("done")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.endswith("done\n"), result.stderr[-3000:]


# --- engines, with models of large matrices, or in edited copies -----------------------------------------------------


def test_when_tables_are_made(monkeypatch):
    """Not before the first token is there, nor for one token; with progress; if there is memory; anew after changes."""
    model, ids, fractions = wide_model(), few_ids(), []
    first, second = downs = [block.mlp.dense_4h_to_h for block in model.model.layers]
    answer = with_fast_off(model, lambda: model.generate(ids, max_new_tokens=4))
    model.generate(ids, max_new_tokens=1)
    assert model.engine.tables == {}
    next(run := generate(model, ids, max_new_tokens=4))
    assert model.engine.tables == {}
    with monkeypatch.context() as patch:
        patch.setattr(persimmon, "available_memory", lambda: 2**25 - 1)  # two times 16 MB are needed
        next(run)
        assert torch.equal(model.generate(ids, max_new_tokens=4), answer)
        assert model.engine.tables == {} and model.engine.linears  # the engine is used without them
    for _ in range(2):
        model.engine.prepare(fractions.append)
    assert fractions == [0.5, 1.0] and [*model.engine.tables] == downs
    tables = {down: weakref.ref(table) for down, table in model.engine.tables.items()}
    for down in downs:
        table = tables[down]()
        assert torch.equal(table, down.weight.t()) and table.is_contiguous() and not table.requires_grad
    assert torch.equal(model.generate(ids, max_new_tokens=4), answer)
    for change in (lambda p: p.data.add_(0.01), lambda p: p.detach().mul_(0.5),
                   lambda p: setattr(p, "data", p.data * 2),
                   lambda p: setattr(first, "weight", torch.nn.Parameter(0.5 * p.detach()))):  # fmt: skip
        assert model.engine.tables[second] is tables[second]()
        change(first.weight)
        model.generate(ids, max_new_tokens=1)
        assert [*model.engine.tables] == [second]
        model.generate(ids, max_new_tokens=2)
        assert torch.equal(model.engine.tables[first], first.weight.t())
    del table, run
    model.fast = False
    gc.collect()
    assert tables[second]() is None
    model.generate(ids, max_new_tokens=3)
    assert not hasattr(model.engine, "tables")


def test_no_table_for_what_is_small_hooked_or_replaced():
    model, ids = wide_model(), few_ids()
    first, second = (block.mlp for block in model.model.layers)
    hook = first.dense_4h_to_h.register_forward_hook(lambda *_: None)
    second.dense_4h_to_h = torch.nn.Sequential(second.dense_4h_to_h).eval()
    for expected in ([], [first.dense_4h_to_h]):
        model.generate(ids, max_new_tokens=3)
        assert [*model.engine.tables] == expected
        hook.remove()
    model = small_model(persimmon, 16, intermediate_size=4095)  # one row less than 4 MB
    model.generate(ids % 90, max_new_tokens=3)
    assert model.engine.tables == {} and model.engine.linears == []


def test_generations_side_by_side():
    """Two at once, step by step or in two threads, give the same tokens as one after the other."""
    model, prompts = wide_model(), [few_ids(length=9), few_ids(length=14).flip(1)]

    def steps(ids):
        return generate(model, ids, max_new_tokens=10, temperature=0.9, seed=4)

    expected = [[step.tokens for step in steps(ids)] for ids in prompts]
    assert expected[0] != expected[1] and model.engine.tables
    for _ in range(3):
        model.fast = True  # the tables are made anew, while both run
        pairs = [*zip(*map(steps, prompts))]
        assert [[pair[n].tokens for pair in pairs] for n in (0, 1)] == expected
        model.fast, found = True, {}
        threads = [threading.Thread(target=lambda n=n: found.update({n: [step.tokens for step in steps(prompts[n])]}))
                   for n in (0, 1)]  # fmt: skip
        for act in (threading.Thread.start, threading.Thread.join):
            [*map(act, threads)]
        assert [found.get(n) for n in (0, 1)] == expected
        assert not any("forward" in vars(m) for m in model.modules())
    passes = [persimmon.replaced_forward([(model.lm_head, Mock())]) for _ in range(2)]
    [one.__enter__() for one in passes], [one.__exit__(None, None, None) for one in passes]  # as two threads may do it
    assert "forward" not in vars(model.lm_head)


@runs_kernel
def test_a_step_is_replayed_on_cuda(tmp_path, cuda, monkeypatch):
    """Python runs the model for the prompt and twice to capture it, whatever follows; int8; conversations, branches."""
    module, calls = edited(tmp_path), []
    launches, forward = cuda(module), module.PersimmonModel.forward
    model, ids, mask = small_model(module, 2, 1), few_ids(90, 2, 6), torch.ones(2, 6, dtype=torch.long, device=DEVICE)
    mask[0, :2] = 0
    monkeypatch.setattr(module.PersimmonModel, "forward", lambda *a, **b: calls.append(1) or forward(*a, **b))
    for x, m, options in ((ids[:1], None, {}), (ids, mask, {}), (ids, mask.flip(1), {"temperature": 0.9, "seed": 2})):
        expected = with_fast_off(model, lambda: model.generate(x, m, max_new_tokens=5, **options))
        calls.clear()
        assert torch.equal(model.generate(x, m, max_new_tokens=5, **options), expected) and len(calls) == 3
    quantized = module.quantize_model(copy.deepcopy(model), "int8")
    expected = with_fast_off(quantized, lambda: quantized.generate(ids, max_new_tokens=3))
    assert torch.equal(quantized.generate(ids, max_new_tokens=3), expected)
    cache, launched = model.engine.make_cache(1, 60), launches["matvec"]

    def answer(text, cache):
        expected = with_fast_off(model, lambda: model.generate(text, max_new_tokens=3))
        assert torch.equal(found := model.generate(text, max_new_tokens=3, cache=cache), expected)
        return found

    text = answer(ids[:1], cache)
    branch = copy.deepcopy(cache)
    answer(torch.cat((text, ids[1:, :2]), 1), branch)  # which must not touch the cache it was copied from
    answer(torch.cat((text, ids[1:, 2:5]), 1), cache)
    cache.crop(4)
    answer(torch.cat((text[:, :6], ids[1:, :2]), 1), cache)
    assert cache.length == int(cache.position) and launches["matvec"] > launched


@runs_kernel
def test_training_of_a_part_is_followed_on_cuda(tmp_path, cuda):
    """A block in training mode has dropout, which no kernel knows, also when it was proven before."""
    module = edited(tmp_path)
    launches, model, ids = cuda(module), small_model(module, 2, 1, hidden_dropout=0.9), few_ids(90, 1, 5)
    model.generate(ids, max_new_tokens=3)
    assert launches["matvec"]
    model.model.layers[0].train()
    first, second = (steps_of(module, model, ids, 3, [[7]] * 3)[1] for _ in range(2))
    assert not torch.equal(first[1:], second[1:])


# === sample.py =======================================================================================================

ON_CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # for sample.py, which would take a GPU


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs the command line in this process, on the CPU; returns exit code, stdout and stderr."""
    def run(*arguments, stdin=b""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code = sample_script.main([*map(str, arguments), "--device", "cpu"])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def tiny():
    return PersimmonForCausalLM.from_pretrained(TINY, "float32"), Tokenizer(TINY)


def greedy_text(tiny, prompt, n, **options):
    """What the model writes after a prompt, and why it stops."""
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer.encode(prompt, **options)])
    steps = list(generate(model, ids, max_new_tokens=n))
    text = tokenizer.decode(ids[0].tolist() + [step.tokens[0] for step in steps])
    return text, [step.tokens[0] for step in steps], steps[-1].finish_reasons[0]


GREEDY = ("--temp", "0", "--dtype", "float32", "-q", "-n")


def test_text_and_figures(cli):
    code, text, figures = cli("--seed", 7, "-n", 30)
    assert code == 0 and text.startswith("ROMEO:\n") and len(text) > 40
    assert cli("--seed", 7, "-n", 30)[1] == text != cli("--seed", 8, "-n", 30)[1]
    lines = figures.splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= 80
    assert re.match(r"read 6 tokens at [\d.]+ tok/s, first token after [\d.]+ s$", lines[0])
    figures = r"wrote 30 at [\d.]+ tok/s, peak memory [\d.]+ GB, seed 7, ended by length$"
    assert re.match(figures, lines[1])


def test_options_reach_the_model(cli, tiny, tmp_path):
    text, *_ = greedy_text(tiny, "To be, or not", 20)
    for arguments in (["To be, or not"], ["-p", "To be, or not"], ["-", "--plain"]):
        found = cli(*arguments, *GREEDY, 20, "-t", 1, stdin=b"To be, or not\n")
        assert found == (0, text + "\n", "")
    assert cli("To be, or not", *GREEDY, 20, "--no-bos")[1] == greedy_text(
        tiny, "To be, or not", 20, add_bos=False)[0] + "\n"
    # The names that fingers know from elsewhere.
    short = ["--temp", "1.5", "--repetition-penalty", "1.8", "-n", "9", "--seed", "1"]
    long = ["--temperature", "1.5", "--repeat-penalty", "1.8", "--max-tokens", "9", "--seed", "1"]
    assert cli(*short, "-q") == cli(*long, "-q") != cli("--seed", "1", "-n", "9", "-q")
    several = cli("--num-samples", "3", "--seed", "5", "-n", "12", "--dtype", "float32", "-q")[1]
    alone = [cli("--seed", s, "-n", "12", "--dtype", "float32", "-q")[1] for s in (5, 6, 7)]
    assert several == "\n---\n\n".join(alone)


def test_no_limit_is_the_context(cli):
    (line,) = cli("-n", "-1", "--ignore-eos", "--json", "-q")[1].splitlines()
    answer = json.loads(line)
    assert answer["finish_reason"] == "context" and len(answer["ids"]) == 1024 - 6


def test_stop_texts(cli):
    options = ["--seed", "3", "-n", "80", "-q", "--dtype", "float32", "--ignore-eos"]
    free = cli(*options)[1].removesuffix("\n")
    for stop in (free[40:43], free[60:75], free[90]):
        stopped = cli(*options, "--stop", "never there", "--stop", stop)[1].removesuffix("\n")
        written = free.removeprefix("ROMEO:\n")
        assert stopped == "ROMEO:\n" + written[: written.index(stop)]
    assert cli(*options, "--stop", "never there", "--stop", "")[1].removesuffix("\n") == free


def test_files_from_elsewhere(cli, tmp_path):
    """CR LF, a byte order mark, blank lines, JSON, and this program's own output."""
    (tmp_path / "one").write_bytes(b"\xef\xbb\xbfJULIET:\r\nAy me.\r\n")
    (one,) = cli("-f", tmp_path / "one", "--json", *GREEDY, 3)[1].splitlines()
    assert json.loads(one)["prompt"] == "JULIET:\nAy me."
    lines = b'\xef\xbb\xbf"JULIET:\\n"\r\n\r\nTo be\r\n{"no": "prompt"}\r\n[1]\n'
    out = cli("--batch", "-", "--json", *GREEDY, 3, stdin=lines)[1]
    answers = [json.loads(line) for line in out.splitlines()]
    prompts = ["JULIET:\n", "", "To be", '{"no": "prompt"}', "[1]"]
    assert [answer["prompt"] for answer in answers] == prompts
    assert [answer["finish_reason"] for answer in answers][1] == "blank line"
    assert [len(answer["ids"]) for answer in answers] == [3, 0, 3, 3, 3]
    again = cli("--batch", "-", "--json", *GREEDY, 3, stdin=out.encode())[1]
    assert [json.loads(line)["text"] for line in again.splitlines()] == [a["text"] for a in answers]
    texts = cli("--batch", "-", *GREEDY, 3, stdin=lines)[1].split("\n---\n\n")
    assert texts == [answer["prompt"] + answer["text"] + "\n" for answer in answers]


def test_json(cli, tiny):
    model, tokenizer = tiny
    lines = b"JULIET:\nTo be, or not\n"
    for line in cli("--batch", "-", "--json", *GREEDY, 9, stdin=lines)[1].splitlines():
        answer = json.loads(line)
        steps = list(generate(model, tokenizer(answer["prompt"])["input_ids"], max_new_tokens=9))
        assert answer["ids"] == [step.tokens[0] for step in steps]
        expected = [step.logprobs[0] for step in steps]
        assert answer["logprobs"] == pytest.approx(expected, abs=1e-4)
        assert answer["text"] == tokenizer.decode(answer["ids"])
        assert {"prompt_tokens", "tokens_per_second", "peak_gigabytes"} <= answer["figures"].keys()
    options = ["-n", "3", "--json", "--dtype", "float32", "-q"]
    seeds = cli("--batch", "-", "--num-samples", "9", "--seed", "5", *options, stdin=lines)[1]
    seeds = [json.loads(line) for line in seeds.splitlines()]  # 18: written in two groups
    assert [answer["seed"] for answer in seeds] == list(range(5, 23))
    (alone,) = cli(seeds[17]["prompt"], "--seed", "22", *options)[1].splitlines()
    assert json.loads(alone)["ids"] == seeds[17]["ids"]
    assert len({tuple(answer["ids"]) for answer in seeds}) > 9


@pytest.mark.parametrize("arguments, message", [
    ("-m /nowhere", "there is no folder /nowhere"), ("--temp -1", "temperature = -1.0 is out of"),
    ("--temp hot", "invalid float value: 'hot'"), ("--what", "there is no option --what"),
    ("-n 0", "max_new_tokens = 0 is out of range"), ("--top-p 2 --chat", "top_p = 2.0 is out of"),
    ("--num-samples 0", "--num-samples 0 is not above 0"), ("--threads 99999", "up to 4096"),
    ("--ctx-size -3", "--ctx-size -3 is not above 0"), ("--density 0", "--density 0.0 is not above"),
    ("--dtype int8", "dtype int8 is not supported"), ("--quantize int3", "'int3'"),
    ("--device abacus", "--device abacus is not available on this machine"),
    ("a --chat", "only one of"), ("a -p b", "only one of"), ("--chat --json", "with none of"),
    ("--random 7b", "7b is no shape"), ("--random 8b:x", "8b:x is no shape"), ("a b", "no option b"),
    ("-n " + "9" * 5000, "invalid int value"), ("-f /nowhere", "No such file"),
    ("--seed -1", "seed = -1 is out of range"), ("-m requirements.txt", "python convert.py"),
    ("-m adept/persimmon-8b-chat", "hf download adept/persimmon-8b-chat --local-dir adept/per"),
    ("--bench", "use python test_persimmon.py bench"), ("--n-prompt 1,2", "test_persimmon.py bench"),
    ("--n-depth=4", "bench"), ("--batch-size 4", "bench"), ("-r 3", "bench"),
    ("--repetitions 3", "bench"), ("--group-size 32", "convert.py"), ("--logprobs", "use --json"),
    ("--dense", "use --plain"), ("-", "standard input is not UTF-8: invalid start byte at byte 1"),
])  # fmt: skip
def test_errors(cli, arguments, message, monkeypatch):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sample_script, "random_model", Mock(side_effect=AssertionError))
    arguments = arguments.split() + ["--device", "abacus"] * ("abacus" in arguments)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        code = sample_script.main(arguments)
    text = error.getvalue()
    assert code == 2 and message in text, text
    assert text.startswith("sample.py: error: ") and text.count("\n") == 1 and len(text) < 400


def test_prompts_that_do_not_fit(cli):
    for prompt, message in (("word " * 3000, "the context"), ("a\udc80", "not valid Unicode")):
        code, out, error = cli(prompt)
        assert (code, out) == (2, "") and message in error
    code, _, error = cli("", "--no-bos")
    assert code == 2 and error.count("\n") == 1


def test_help(cli, capsys):
    """It fits a screen and a half, names each option, and says what the defaults are."""
    with pytest.raises(SystemExit) as end:
        sample_script.main(["--help"])
    text = capsys.readouterr().out
    assert not end.value.code and text.count("\n") <= 48 and max(map(len, text.split("\n"))) <= 80
    for group in sample_script.OPTIONS.values():
        for names, (_, default, *_) in group.items():
            line = next(line for line in text.splitlines() if line.startswith(f"  {names.split()[0]}"))
            if isinstance(default, (int, float)) and not isinstance(default, bool):
                assert re.search(rf"\[{default:g}\]$", line), line
    assert r"$'ROMEO:\n'" in text and text.count("python sample.py ") == 4


def test_which_errors_mean_that_memory_is_out(monkeypatch, capsys):
    """PyTorch raises RuntimeErrors for it, and for what is a bug."""
    late = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    late.__context__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    errors = [late, MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")]
    for error in errors:
        monkeypatch.setattr(sample_script, "run", Mock(side_effect=error))
        assert sample_script.main(["hi"]) == 2 and "error: out of memory: " in capsys.readouterr().err
    bug = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(sample_script, "run", Mock(side_effect=bug))
    with pytest.raises(RuntimeError, match="illegal"):
        sample_script.main(["hi"])


def test_in_a_notebook_and_in_a_thread(monkeypatch):
    """Where stdout is any object with `write`, and signals can't be set."""
    out, codes = io.StringIO(), []
    monkeypatch.setattr("sys.stdout", out)
    arguments = ["-n", "3", "-q", "--device", "cpu"]
    thread = threading.Thread(target=lambda: codes.append(sample_script.main(arguments)))
    thread.start()
    thread.join()
    assert codes == [0] and out.getvalue().startswith("ROMEO:\n")


def test_what_takes_long_is_prepared_after_the_first_token(cli, monkeypatch):
    """And never for one token; the seconds that it takes do not count as the answer's."""
    calls = []

    def prepare(self, progress=None):
        if progress is not None:
            calls.append(sys.stdout.getvalue() if hasattr(sys.stdout, "getvalue") else "")
            time.sleep(2)
            progress(1.0)

    monkeypatch.setattr(persimmon.CpuEngine, "prepare", prepare)
    assert cli("-n", "1")[0] == 0 and calls == []
    answer = json.loads(cli("-n", "20", "--ignore-eos", "--json")[1])
    assert len(calls) == 1 and answer["figures"]["tokens_per_second"] > 12
    assert cli("-n", "20", "--ignore-eos", "--plain")[0] == 0 and len(calls) == 1


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_random_weights(monkeypatch, quantize):
    """Nonzero activations are the part that was asked for; all is finite; progress ends at 1."""
    small = persimmon.PersimmonConfig(vocab_size=300, hidden_size=128, intermediate_size=1024,
                                      num_hidden_layers=3, num_attention_heads=2)
    monkeypatch.setattr(persimmon, "PersimmonConfig", lambda num_hidden_layers: small)
    for density in (0.1, 0.5):
        done, counts = [], []
        model = sample_script.random_model(3, density, "float32", "cpu", quantize, done.append)
        for block in model.model.layers:
            block.mlp.dense_4h_to_h.register_forward_pre_hook(
                lambda _, x: counts.append((x[0] != 0).float().mean().item()))
        steps = list(generate(model, torch.arange(40)[None], max_new_tokens=9, stop_ids=()))
        assert sum(counts) / len(counts) == pytest.approx(density, abs=0.05) and done[-1] == 1
        assert all(map(torch.isfinite, torch.tensor([step.logprobs[0] for step in steps])))
    code = sample_script.main(["hello", "--random", "8b:3", "-n", "4", "--device", "cpu", "--json"])
    assert code == 0


def test_command_line_in_a_process_of_its_own():
    """Modules that PyTorch and Triton would need seconds for, Ctrl-C, and a closed pipe."""
    check = "import sys, sample; sample.main(['-n', '3']); assert not {'torch._dynamo', 'triton'} & "
    subprocess.run([sys.executable, "-c", f"{check}sys.modules.keys()"], cwd=HERE, env=ON_CPU,
                   check=True, timeout=120, capture_output=True)
    command = [sys.executable, HERE / "sample.py", "-n", "1000", "--ignore-eos"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ON_CPU}
    for seconds in (0.3, 0.7, None):  # while modules are imported, and while it writes
        process = subprocess.Popen(command, **pipes)
        process.stdout.read(30) if seconds is None else time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode in (130, -signal.SIGINT) and b"Traceback" not in error, error
    assert process.returncode == 130 and error.endswith(b"ended by Ctrl-C\n")
    process = subprocess.Popen(command, **pipes)
    process.stdout.read(30)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == -signal.SIGPIPE
    for redirect, code in (("<&-", 0), ("2>&-", 0), (">&-", 2)):
        shell = f'exec "$0" sample.py hi -n 3 -q {redirect}'
        result = subprocess.run(["sh", "-c", shell, sys.executable], cwd=HERE, env=ON_CPU,
                                capture_output=True, timeout=120)
        assert result.returncode == code and result.stderr.count(b"\n") == (code == 2)


# Chat


def talk(monkeypatch, lines):
    """Give --chat these lines, and then the end of input."""
    lines = iter(lines)

    def read(prompt=""):
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)


def test_chat_reads_only_what_is_new_and_answers_as_a_fresh_run(monkeypatch, cli, tiny):
    model, tokenizer = tiny
    questions = ["Who are you, that speak to the king?", "What is your name?", "Where is Juliet?"]
    talk(monkeypatch, [*questions[:2], "/reset", questions[2], "/exit"])
    passes = []
    monkeypatch.setattr(PersimmonForCausalLM, "from_pretrained", lambda *_, **__: model)
    hook = model.model.register_forward_pre_hook(lambda _, x: passes.append(x[0][0].tolist()))
    code, out, error = cli("--chat", "--temp", "0", "-n", "30", "--seed", "0")
    hook.remove()
    starts = [n for n, ids in enumerate(passes) if len(ids) > 1]
    one, two, three = [sum(passes[a:b], []) for a, b in zip(starts, [*starts[1:], len(passes)])]
    reads = [int(n) for n in re.findall(r"read (\d+) tokens", error)]
    assert code == 0 and reads == [len(passes[n]) for n in starts] and "(forgotten)" in error

    def fresh(ids):
        new = [step.tokens[0] for step in generate(model, torch.tensor([ids]), max_new_tokens=30)]
        return tokenizer.decode(new).split("\n\nhuman:")[0].strip()

    first = tokenizer.encode(chat_prompt(questions[:1]))
    assert passes[starts[0]] == first
    # What the cache holds, and what is new, is the whole conversation, and the tokens are those
    # that the tokenizer makes of the new part of it.
    answers = [fresh(first)]
    whole = one
    conversation = chat_prompt([questions[0], answers[0], questions[1]])
    while not conversation.startswith(tokenizer.decode(whole)):
        whole = whole[:-1]
    whole = whole + passes[starts[1]]
    assert tokenizer.decode(whole) == conversation
    assert tokenizer.encode(conversation)[-len(passes[starts[1]]):] == passes[starts[1]]
    assert tokenizer.end_of_text not in passes[starts[1]]
    answers += [fresh(whole), fresh(tokenizer.encode(chat_prompt(questions[2:])))]
    assert out == "".join(f"{answer}\n" for answer in answers)


def test_chat_with_a_full_context(monkeypatch, cli):
    """The oldest turns go, a turn that is too long changes nothing, and an answer that the context
    cuts off shows no half of the next `human:`."""
    talk(monkeypatch, ["Speak, speak.", "What is it?", "Tell me more of it.", "word " * 200, "And now?"])
    code, _, error = cli("--chat", "--ctx-size", "90", "-n", "20", "--seed", "1")
    assert code == 0 and "(the context of 90 tokens is full: the first 1 answers" in error
    assert re.search(r"\(that is too long: \d+ tokens, and the context is 90\)", error)
    assert error.count("wrote ") == 4
    tokenizer = Tokenizer(TINY)
    written = tokenizer.encode(" Ay.\n\nhum", add_bos=False)

    def steps(model, ids, mask, cache, **_):
        cache.length = ids.shape[1] + len(written) - 1
        for n, token in enumerate(written, start=1):
            yield persimmon.Step([token], [0.0], ["context" if n == len(written) else None])

    prompts, init = [], sample_script.Sample.__init__
    monkeypatch.setattr(persimmon, "generate", steps)
    monkeypatch.setattr(sample_script.Sample, "__init__", lambda self, prompt, ids, *more: (
        prompts.append(tokenizer.decode(ids)), init(self, prompt, ids, *more))[1])
    talk(monkeypatch, ["Who?", "Why?"])
    assert cli("--chat", "-q")[1] == "Ay.\nAy.\n"
    assert prompts[1] == chat_prompt(["Who?", "Ay.", "Why?"])


def test_chat_with_a_tokenizer_that_puts_a_space_in_front(monkeypatch, cli, tmp_path):
    """As Adept's does, and tiny/'s does not: the space does not get into the conversation."""
    lines = ["Who are you that speak to me", "human: Who?", "adept: I am the king of men"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300,
        byte_fallback=True, normalization_rule_name="identity", hard_vocab_limit=False,
        user_defined_symbols=["|ENDOFTEXT|"], minloglevel=2)
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    written, prompts = tokenizer.encode("I am the king", add_bos=False), []
    assert tokenizer.processor.id_to_piece(tokenizer.encode("\n\nhuman", False)[0])[0] == "\u2581"

    def steps(model, ids, mask, cache, **_):
        prompts.append(tokenizer.decode(ids[0]))
        cache.length = ids.shape[1] + len(written) - 1
        for n, token in enumerate(written, start=1):
            yield persimmon.Step([token], [0.0], ["length" if n == len(written) else None])

    monkeypatch.setattr(persimmon, "generate", steps)
    monkeypatch.setattr(persimmon, "Tokenizer", lambda _: tokenizer)
    talk(monkeypatch, ["Who?", "Why?"])
    assert cli("--chat", "-q")[1] == "I am the king\nI am the king\n"
    assert prompts == [chat_prompt(["Who?"]), chat_prompt(["Who?", "I am the king", "Why?"])]


def test_a_long_turn_is_prepared_in_linear_time(monkeypatch, cli):
    """Not the model's time: that is left out here."""
    def steps(model, ids, mask, cache, **_):
        cache.length = ids.shape[1]
        yield persimmon.Step([71], [0.0], ["length"])

    monkeypatch.setattr(persimmon, "generate", steps)
    monkeypatch.setattr(persimmon.CpuEngine, "make_cache", lambda *_: Mock(length=0))
    config = persimmon.load_config(TINY)
    model = PersimmonForCausalLM.from_pretrained(TINY)
    model.config = replace(config, max_position_embeddings=100_000)
    monkeypatch.setattr(PersimmonForCausalLM, "from_pretrained", lambda *_, **__: model)
    talk(monkeypatch, ["Good morrow.", "word and word " * 2000, "And then?"])
    start = time.monotonic()
    assert cli("--chat", "-q")[0] == 0 and time.monotonic() - start < 6


class Terminal:
    """sample.py on a pseudo-terminal of 80 columns."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.screen = ""

        def take_terminal():
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches the program

        command = [sys.executable, HERE / "sample.py", *arguments]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave,
                                        preexec_fn=take_terminal, env={**ON_CPU, "TERM": "xterm"})
        os.close(slave)

    def expect(self, pattern: str) -> str:
        """Read until the pattern appears; return what came before it, and drop both."""
        end = time.monotonic() + 60
        while not (found := re.search(pattern, self.screen)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.screen!r}"
            if select.select([self.master], [], [], 1)[0]:
                self.screen += os.read(self.master, 4096).decode(errors="replace")
        before, self.screen = self.screen[: found.start()], self.screen[found.end() :]
        return before

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_chat_in_a_terminal():
    """Commands, a pasted text of two lines, one above 4096 bytes, Ctrl-C twice, Ctrl-D."""
    terminal = Terminal("--chat", "-n", "900", "--ignore-eos", "--seed", "1", "--stop", "\n")
    terminal.expect(r"\(/help, /reset forgets, /exit leaves.*\)\r\n")
    terminal.expect("> ")
    terminal.send("/what now\r")
    terminal.expect(r"\(there is no /what: /help lists what there is\)")
    terminal.send("\x1b[200~Speak,\nspeak.\x1b[201~\r")
    terminal.expect(r"read 23 tokens at [\d.]+ tok/s")  # one turn
    terminal.expect("ended by stop")
    terminal.expect("> ")
    terminal.send("x" * 5000 + "\r")
    terminal.expect(r"that is too long: 50\d\d tokens")
    terminal.send("Speak, \\\r")
    terminal.expect("  ")
    terminal.send("speak.\r")
    terminal.expect("ended by stop")
    terminal.send("/reset\r")
    terminal.expect(r"\(forgotten\)")
    terminal.expect("> ")
    time.sleep(0.3)  # until it waits for a line
    terminal.send("\x03")
    terminal.expect(r"\(/exit leaves\)")
    terminal.expect("> ")
    time.sleep(0.3)
    terminal.send("\x04")
    assert terminal.process.wait(timeout=30) == 0


def test_ctrl_c_stops_an_answer_and_notes_are_wiped():
    terminal = Terminal("--chat", "-n", "900", "--ignore-eos", "--seed", "1")
    before = terminal.expect("> ")
    assert before.index("loading ...") < before.index("\x1b[J\x1b7\x1b8")
    terminal.send("Speak, speak.\r")
    terminal.expect(r"reading \d+ tokens \.\.\.\x1b8\x1b\[J\x1b7\x1b8")
    terminal.expect("[^\x1b]{3}")
    terminal.send("\x03")
    terminal.expect("ended by (Ctrl-C|stop)")
    terminal.expect("> ")
    terminal.send("/exit\r")
    assert terminal.process.wait(timeout=30) == 0


def test_sample_is_short():
    lines = (HERE / "sample.py").read_text().splitlines()
    assert len(lines) <= 413 and max(map(len, lines)) <= 100


# === convert.py ======================================================================================================

RELEASE = PersimmonConfig(
    vocab_size=400, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=3,
    max_position_embeddings=160, hidden_dropout=0.1, layer_norm_eps=1e-5,
)  # fmt: skip


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory) -> bytes:
    file = tmp_path_factory.mktemp("vocabulary") / "adept_vocab.model"
    train_sentencepiece(file, **ENDOFTEXT)
    return file.read_bytes()


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    return randomize(PersimmonForCausalLM(RELEASE)).bfloat16().state_dict()


def release_pickle(weights: dict, changes: dict | None = None, config: PersimmonConfig = RELEASE, **extra) -> dict:
    """What is in Adept's model_optim_rng.pt: nested and dotted keys mixed, args, numbers and states of the training."""
    encoder = {f"layers.{n}.self_attention.rotary_emb.inv_freq": torch.ones(4) for n in range(config.num_hidden_layers)}
    for name, tensor in weights.items():
        if "layer" in name:
            encoder[name.removeprefix("model.").replace("self_attn", "self_attention")] = tensor
    model = {
        "language_model": {
            "embedding": {"word_embeddings": {"weight": weights.get("model.embed_tokens.weight")}}, "encoder": encoder,
        },
        "word_embeddings_for_head": {"weight": weights.get("lm_head.weight")},
    }  # fmt: skip
    args = {
        "num_layers": config.num_hidden_layers, "hidden_size": config.hidden_size, "kv_channels": config.head_dim,
        "ffn_hidden_size": config.intermediate_size, "num_attention_heads": config.num_attention_heads,
        "rotary_pct": 0.5, "rotary_emb_base": 25000, "layernorm_epsilon": 1e-5, "padded_vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings, "qk_layernorm": "weights_per_layer", "sq_relu": True,
        "untie_embeddings": True, "pos_emb": "rotary", "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "hidden_dropout": 0.1, "attention_dropout": 0.0, "init_method_std": 0.02, "params_dtype": torch.bfloat16,
        "iteration": 1251, "sample_temp_type": SomeEnum.first, **(changes or {}),
    }  # fmt: skip
    args = argparse.Namespace(**{name: value for name, value in args.items() if value != "absent"})
    states = {"random_rng_state": random.getstate(), "np_rng_state": numpy.random.get_state(),
              "torch_rng_state": torch.get_rng_state(), "of": SomeClass()}  # fmt: skip
    return {"args": args, "checkpoint_version": 3.0, "iteration": 1251, "tokens": 0, "model": model,
            "rng_state": [states], **extra}  # fmt: skip


class SomeEnum(enum.Enum):
    """Stands for a class of megatron's that a pickle names."""

    first = 1


class SomeClass:
    """Another one, with state of an unusual kind."""

    def __reduce__(self):
        return SomeClass, (), ("a", 5)


def release_tar(file: Path, checkpoint, vocabulary: bytes, members: dict[str, bytes] | None = None) -> Path:
    """A tar as Adept made it, and `members` beside."""
    pickled = io.BytesIO()
    torch.save(checkpoint, pickled)
    folder = "8b_chat_model_release"
    contents = {"latest_checkpointed_iteration.txt": b"1251\n", "adept_vocab.vocab": b"<unk>\t0\n",
                "adept_vocab.model": vocabulary,
                "iter_0001251/mp_rank_00/model_optim_rng.pt": pickled.getvalue()}  # fmt: skip
    with tarfile.open(file, "w") as tar:
        for name, data in ({f"{folder}/{name}": data for name, data in contents.items()} | (members or {})).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def hub_folder(folder: Path, weights: dict, vocabulary: bytes, shards: int) -> Path:
    folder.mkdir()
    write_config(folder, RELEASE, "2023")
    (folder / "tokenizer.model").write_bytes(vocabulary)
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true, "eos_token": null}')
    names = sorted(weights)
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    places = {name: f"pytorch_model-0000{1 + n * shards // len(names)}-of-0000{shards}.bin"
              for n, name in enumerate(names)}
    for file in set(places.values()):
        torch.save({name: weights[name] for name in names if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def make_source(kind: str, folder: Path, weights: dict, vocabulary: bytes) -> list[str | Path]:
    """A source of one of the kinds; the arguments that name it."""
    if kind == "safetensors":
        model = PersimmonForCausalLM(RELEASE).bfloat16()
        model.load_state_dict(weights)
        model.save_pretrained(folder / "source")
        (folder / "source" / "tokenizer.model").write_bytes(vocabulary)
        return [folder / "source"]
    if kind.startswith("hub"):
        return [hub_folder(folder / "source", weights, vocabulary, int(kind[-1]))]
    tar = release_tar(folder / "release.tar", release_pickle(weights), vocabulary)
    if kind == "tar":
        return [tar]
    with tarfile.open(tar) as opened:
        opened.extractall(folder, filter="data")
    release = folder / "8b_chat_model_release"
    if kind == "unpacked":
        return [release]
    return [release / "iter_0001251/mp_rank_00/model_optim_rng.pt", "--tokenizer", release / "adept_vocab.model"]


KINDS = ["tar", "unpacked", "pt", "hub 1", "hub 3", "safetensors"]


def rewritten(file: Path, changes: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A torch.save file with other records, by name, checksums included."""
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, changes.get(name.partition("/")[2], content))
    return file


def converted(*arguments: str | Path) -> int:
    return convert.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("kind", KINDS)
def test_convert(tmp_path, weights, vocabulary, kind, capsys, monkeypatch):
    monkeypatch.setattr(convert, "SHARD", 30_000)
    source = make_source(kind, tmp_path, weights, vocabulary)
    assert converted(*source, tmp_path / "out") == 0
    said = capsys.readouterr()
    assert f"python sample.py --model {tmp_path / 'out'}" in said.out and said.err == ""
    shards = sorted(file.name for file in (tmp_path / "out").glob("model-*"))
    assert len(shards) > 3 and all((tmp_path / "out" / name).stat().st_size < 45_000 for name in shards)
    model = PersimmonForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(weights[name], p) and p.dtype == torch.bfloat16 for name, p in model.state_dict().items())
    tokenizer = Tokenizer(tmp_path / "out")
    end = tokenizer.end_of_text
    assert load_config(tmp_path / "out") == replace(RELEASE, bos_token_id=end, eos_token_id=end, dtype="bfloat16")
    files = {"config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"}
    files |= {*shards, "model.safetensors.index.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    theirs = transformers.PersimmonForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert theirs.dtype == torch.bfloat16 and theirs.config.rope_parameters["rope_theta"] == 25000.0
    assert theirs.config.hidden_dropout == 0.1 and theirs.config.eos_token_id == end
    ids = random_ids(RELEASE)
    with torch.no_grad():
        assert close(model.float()(ids).logits, theirs.float()(ids).logits)
    if kind != "hub 3":
        return
    # and once more, from there to another dtype in one file
    monkeypatch.undo()
    assert converted(tmp_path / "out", tmp_path / "again", "--dtype", "float32") == 0
    again = PersimmonForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(weights[name].float(), p) and p.dtype == torch.float32
               for name, p in again.state_dict().items())
    assert (tmp_path / "again" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_convert_quantizes(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(convert, "SHARD", 1_000_000)
    out = tmp_path / "out"
    assert converted(TINY, out, "--quantize", kind, "--group-size", "64") == 0
    assert len(list(out.glob("model-0000?-of-0000?.safetensors"))) > 1
    expected = PersimmonForCausalLM.from_pretrained(TINY, quantize=kind, group_size=64)
    model = PersimmonForCausalLM.from_pretrained(out)
    assert model.config.quantization == {"quantize": kind, "group_size": 64}
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    size = sum(file.stat().st_size for file in out.glob("*.safetensors")) / (TINY / "model.safetensors").stat().st_size
    assert size < {"int8": 0.56, "int4": 0.43}[kind]
    assert converted(out, tmp_path / "no") == 2 and os.listdir(tmp_path) == ["out"]
    assert f"convert.py: error: {out} is quantized, in {kind}: start" in capsys.readouterr().err


def test_convert_quantizes_a_classifier(tmp_path, capsys):
    """All but its head, in another dtype."""
    with pytest.warns(UserWarning, match="has no classifier"):
        model = PersimmonForTokenClassification.from_pretrained(TINY, num_labels=3)
    model.save_pretrained(tmp_path / "model")
    shutil.copy(TINY / "tokenizer.model", tmp_path / "model")
    arguments = [tmp_path / "model", tmp_path / "out", "--quantize", "int4", "--dtype", "float32"]
    assert converted(*arguments) == 0 and "5,003,523 parameters" in capsys.readouterr().out
    expected = quantize_model(model.float(), "int4").state_dict()
    state = PersimmonForTokenClassification.from_pretrained(tmp_path / "out").state_dict()
    assert state.keys() == expected.keys() and state["score.weight"].shape == (3, 256)
    assert all(torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype
               for name, tensor in state.items())
    PersimmonForCausalLM.from_pretrained(TINY).bfloat16().save_pretrained(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.layers.1.self_attn.dense.weight"][3, 3] = -math.inf
    save_file(state, tmp_path / "model" / "model.safetensors")
    assert converted(*arguments, "--force") == 2
    assert "model.layers.1.self_attn.dense" in (error := capsys.readouterr().err) and "not finite" in error


def test_convert_without_args_of_training(tmp_path, weights, vocabulary):
    changes = dict.fromkeys(("hidden_dropout", "attention_dropout", "init_method_std"), "absent")
    tar = release_tar(tmp_path / "release.tar", release_pickle(weights, changes), vocabulary)
    assert converted(tar, tmp_path / "out") == 0
    config = load_config(tmp_path / "out")
    assert (config.hidden_dropout, config.attention_dropout, config.initializer_range) == (0.0, 0.0, 0.02)


def nested(depth: int) -> list:
    """A list in a list in a list ..."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"qk_layernorm": "weights_per_attention_head_and_layer"},
      r"args.qk_layernorm that are not supported, only \('weights_per_l"),
     ({"sq_relu": False}, r"args.sq_relu that are not supported, only \(True,\)"),
     ({"kv_channels": 32}, "args.kv_channels"),
     ({"tensor_model_parallel_size": 2}, "args.tensor_model_parallel_size"),
     ({"pos_emb": torch.ones(3)}, "args.pos_emb"),
     ({"rotary_pct": "absent"}, "no args.rotary_pct"), ({"rotary_pct": nested(150)}, "no args.rotary_pct"),
     ({"hidden_size": torch.ones(2)}, "no args.hidden_size, or one that is no number"),
     ({"hidden_size": "x"}, "config key .* is not of type"), ({"num_attention_heads": 0}, "config key .* above 0"),
     ({"ffn_hidden_size": 96}, "in shape .* its config makes it"),
     ({"num_layers": 100_000}, "and its config 100000 layers"),
     ({"num_layers": 4}, "has model.layers.3.* in shape none"),
     ({"num_layers": 2}, "has model.layers.2.* makes it no tensor"),
     ({"qk_layernorm": "none"}, "has model.layers.0.self_attn.k_layernorm.* no tensor")],
)  # fmt: skip
def test_convert_checks_args(tmp_path, weights, vocabulary, changes, message, capsys):
    tar = release_tar(tmp_path / "release.tar", release_pickle(weights, changes), vocabulary)
    assert converted(tar, tmp_path / "out") == 2
    said = capsys.readouterr()
    assert re.search(message, said.err) and said.err.count("\n") == 1 and said.out == ""
    assert os.listdir(tmp_path) == ["release.tar"]


def test_convert_without_qk_layernorm(tmp_path, weights, vocabulary):
    few = {name: t for name, t in weights.items() if "q_layernorm" not in name and "k_layernorm" not in name}
    tar = release_tar(tmp_path / "release.tar", release_pickle(few, {"qk_layernorm": "none"}), vocabulary)
    assert converted(tar, tmp_path / "out") == 0
    assert not load_config(tmp_path / "out").qk_layernorm


@pytest.fixture
def refused(tmp_path, capsys):
    """Asserts that convert.py answers with one sentence and exit code 2 and leaves no trace in tmp_path."""
    def check(message: str, *arguments: str | Path) -> None:
        before = sorted(os.listdir(tmp_path))
        capsys.readouterr()
        assert converted(*arguments) == 2
        said = capsys.readouterr()
        assert re.search(message, said.err) and said.err.startswith("convert.py: error: "), said.err
        assert said.err.count("\n") == 1 and len(said.err) < 600
        assert sorted(os.listdir(tmp_path)) == before

    return check


def test_convert_refuses(tmp_path, weights, vocabulary, refused, monkeypatch):
    out = tmp_path / "out"
    good = release_tar(tmp_path / "good.tar", release_pickle(weights), vocabulary)

    def tar(name, checkpoint, **options):
        return release_tar(tmp_path / f"{name}.tar", checkpoint, vocabulary, **options)

    refused("nothing", tmp_path / "nothing", out)
    refused("an entry 'ema', which is not known", tar("unknown", release_pickle(weights, ema={})), out)
    second = "8b_chat_model_release/iter_0001251/mp_rank_01/model_optim_rng.pt"
    refused("has 2 files .*mp_rank_", tar("parts", release_pickle(weights), members={second: b"x"}), out)
    for content, message in ((b"7", "has 0 files iter_0.7/mp_rank_"), (b"release", "invalid literal .* b'release'")):
        members = {"8b_chat_model_release/latest_checkpointed_iteration.txt": content}
        refused(message, tar("latest", release_pickle(weights), members=members), out)
    name = "model.layers.1.mlp.dense_4h_to_h.bias"
    broken = weights[name].clone()
    for number in (math.nan, -math.inf):
        broken[7] = number
        refused(f"{name} has NaN or infinite values", tar("nan", release_pickle({**weights, name: broken})), out)
    broken[7] = 70000
    refused(f"{name} overflows in torch.float16", tar("big", release_pickle({**weights, name: broken})), out, "--dtype",
            "float16")
    extra = {**weights, "model.layers.0.mlp.gate.weight": weights[name]}
    refused("has model.layers.0.mlp.gate.weight .* no tensor of this model", tar("more", release_pickle(extra)), out)
    matrix = "model.layers.0.mlp.dense_h_to_4h.weight"
    for value in (weights[matrix].t().contiguous().t(), torch._neg_view(weights[matrix])):
        refused(f"{matrix}.* laid out in an unusual way", tar("turned", release_pickle({**weights, matrix: value})),
                out)
    for value, message in ((torch.zeros(48, dtype=torch.int8), "torch CharStorage"), ("text", "AttributeError")):
        refused(f"{name}.*{message}", tar("integers", release_pickle({**weights, name: value})), out)
    (tmp_path / "cut.tar").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    refused("cut.tar", tmp_path / "cut.tar", out)
    (tmp_path / "text.pt").write_text("hello")
    refused("text.pt is damaged, or of no known kind", tmp_path / "text.pt", out)
    with gzip.open(tmp_path / "release.tar.gz", "wb") as file:
        file.write(good.read_bytes())
    refused("release.tar.gz is damaged, or of no known kind", tmp_path / "release.tar.gz", out)
    (tmp_path / "bad.model").write_bytes(b"hello")
    refused("bad.model is damaged", good, out, "--tokenizer", tmp_path / "bad.model")
    torch.save(release_pickle(weights), tmp_path / "alone.pt")
    refused("comes without its tokenizer: name one with --tokenizer", tmp_path / "alone.pt", out)
    refused("is none of Adept's releases", good, out, "--verify")
    refused("no .*config.json", tmp_path, tmp_path.with_name("out"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    refused("GB free, .* GB needed", good, out)


def test_convert_refuses_folders(tmp_path, weights, vocabulary, refused):
    out, folder = tmp_path / "out", hub_folder(tmp_path / "hub", weights, vocabulary, 1)
    for content in (5, {"lm_head.weight": 5}):
        torch.save(content, folder / "pytorch_model.bin")
        refused("hub", folder, out)
    with torch.utils.serialization.config.patch({"save.storage_alignment": 1}):
        torch.save(weights, folder / "pytorch_model.bin")  # values that begin at odd places
    assert converted(folder, out) == 0
    assert all(torch.equal(weights[name], p)
               for name, p in PersimmonForCausalLM.from_pretrained(out).state_dict().items())
    shutil.rmtree(out)
    index = folder / "pytorch_model.bin.index.json"
    for content in ("{}", "[1]", '{"weight_map": 5}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": {}}}', "{nope"):
        index.write_text(content)
        refused("hub", folder, out)
    torch.save(weights, folder / "pytorch_model.bin")
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(weights, "pytorch_model.bin"), "x": "gone.bin"}}))
    refused("No such file.*gone.bin", folder, out)
    index.unlink()
    config = json.loads((folder / "config.json").read_text())
    for names in (5, [5], "PersimmonForCausalLM", ["PersimmonConfig"]):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": names}))
        refused("hub is damaged, or of no known kind", folder, out)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 100_000}))
    refused("and its config 100000 layers", folder, out)


def test_a_tensor_that_is_there_twice(tmp_path, weights, vocabulary, refused):
    checkpoint = release_pickle(weights)
    checkpoint["model"]["lm_head.weight"] = weights["lm_head.weight"]
    refused("lm_head.weight .*there are two", release_tar(tmp_path / "twice.tar", checkpoint, vocabulary),
            tmp_path / "out")
    folder = hub_folder(tmp_path / "hub", weights, vocabulary, 3)
    file = folder / "pytorch_model-00002-of-00003.bin"
    torch.save({**torch.load(file), "lm_head.weight": weights["lm_head.weight"]}, file)
    refused("has lm_head.weight in two files", folder, tmp_path / "out")


def test_convert_of_options_that_are_gone(capsys):
    for arguments in (["--drop-unused"], ["--shard-size", "5GB"], ["--shard-size=5GB"]):
        with pytest.raises(SystemExit) as stopped:
            converted(TINY, "out", *arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1
        assert error.startswith(f"convert.py: error: {arguments[0][:12].rstrip('=')}") and "is gone: " in error


def test_convert_help_does_not_need_torch(tmp_path):
    shutil.copy(HERE / "convert.py", tmp_path)
    shutil.copy(HERE / "persimmon.py", tmp_path)
    command = [sys.executable, "-I", "-S", tmp_path / "convert.py"]  # -S: no installed packages
    told = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60)
    assert told.returncode == 0 and "--group-size" in told.stdout and told.stderr == ""
    told = subprocess.run([*command, "a", "b"], capture_output=True, text=True, timeout=60)
    assert told.returncode == 2 and told.stdout == ""
    assert told.stderr.startswith("convert.py: error: torch is not installed") and told.stderr.count("\n") == 1


def test_convert_notices_what_reads_back_differently(tmp_path, weights, vocabulary, monkeypatch, refused):
    tar, write = release_tar(tmp_path / "release.tar", release_pickle(weights), vocabulary), persimmon.write_safetensors

    def bad_disk(file, tensors):
        write(file, tensors)
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(persimmon, "write_safetensors", bad_disk)
    refused("reads back differently", tar, tmp_path / "out")


# Attacks: each ends in one sentence, in a process of its own that may use 30 s and 1 GB of memory.


class Evil:
    """A pickle of this calls something when it is loaded."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["args", "model", "rng_state", "entry", "tensor"])
def test_nothing_in_a_pickle_is_executed(tmp_path, weights, vocabulary, where):
    trace = tmp_path / "trace"
    for attack in (Evil(os.system, f"touch {trace}"), Evil(eval, f"open({str(trace)!r}, 'w')"),
                   Evil(open, str(trace), "w"),
                   Evil(Evil, Evil(getattr, Evil(__import__, "os"), "mkdir"), Evil(os.mkdir, str(trace)))):  # fmt: skip
        checkpoint = release_pickle(weights, {"evil": attack} if where == "args" else None)
        if where == "model":
            checkpoint["model"]["language_model"]["evil"] = attack
        elif where == "tensor":
            checkpoint["model"]["word_embeddings_for_head"]["weight"] = attack
        elif where == "rng_state":
            checkpoint["rng_state"] = [attack]
        elif where == "entry":
            checkpoint["evil"] = attack
        tar = release_tar(tmp_path / "release.tar", checkpoint, vocabulary)
        code = converted(tar, tmp_path / "out", "--force")
        assert not trace.exists()
        assert code == (0 if where in ("args", "rng_state") else 2)  # what is ignored may be anything
        assert (tmp_path / "out").exists() == (code == 0)
    assert converted(hub_folder(tmp_path / "hub", {**weights, "x": attack}, vocabulary, 1), tmp_path / "out2") == 2
    assert not trace.exists()


ATTACK = f"""
import resource, sys, time
sys.path.insert(0, {str(HERE)!r})
import convert
for source in sys.argv[2:]:
    start = time.monotonic()
    code = convert.main([source, sys.argv[1]])
    print(code, time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
"""


def attacked(*sources: Path) -> list[str]:
    """What convert.py says to each source, in a process of its own, within 30 s and 1 GB."""
    out = sources[0].with_name("attack-out")
    # A new process of Linux begins with its parent's ru_maxrss; sh has little.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", ATTACK, out, *sources]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    results = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert all(code == 2 and seconds < 30 and kilobytes < 1e6 for code, seconds, kilobytes in results), results
    errors = done.stderr.splitlines()
    assert len(errors) == len(sources) and all(error.startswith("convert.py: error: ") and len(error) < 600
                                               for error in errors)
    assert not out.exists() and not out.with_name("attack-out.unfinished").exists()
    return errors


def shared_dicts(depth: int = 40) -> dict:
    """Each dict holds the next one twice: 2**depth paths."""
    tree: dict = {}
    for _ in range(depth):
        tree = {"a": tree, "b": tree}
    return tree


PICKLES = {
    "tuples in a tuple as a key": b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.",
    "keys with one hash": b"\x80\x02}(" + b"".join(
        b"\x8a\x0b" + (n * (2**61 - 1)).to_bytes(11, "little") + b"N" for n in range(1, 250_000)) + b"u.",
    "a list that grows": b"\x80\x02]q\0" + b"h\0a" * 1_300_000 + b".",
    "many dicts": b"\x80\x02(" + b"}" * 4_000_000 + b"t.",
    "an opcode": b"\x80\x02(K\x01K\x02i__main__\nx\n.",
    "an empty stack": b"\x80\x02a.", "no end": b"\x80\x02}", "nothing": b"",
    "a huge size": b"\x80\x02X\xff\xff\xff\xff.",
    "five megabytes": b"\x80\x02" + b"N0" * 2_500_000 + b".",
    "calls of no name": b"\x80\x02NNR.", "a number called": b"\x80\x02K\x01)R.",
    "dicts in dicts": b"\x80\x02" + b"}X\x01\0\0\0a" * 500_000 + b"N" + b"s" * 500_000 + b".",
}  # fmt: skip


def test_attacks_in_a_pickle(tmp_path, weights, vocabulary):
    folders = [hub_folder(tmp_path / f"hub {name}", weights, vocabulary, 1) for name in PICKLES]
    for folder, data in zip(folders, PICKLES.values()):
        rewritten(folder / "pytorch_model.bin", {"data.pkl": data})
    errors = attacked(*folders)
    assert all(str(folder) in error for folder, error in zip(folders, errors)), errors


def test_attacks_in_dicts_and_args(tmp_path, weights, vocabulary):
    circle: dict = {}
    circle["a"] = circle
    folders = [hub_folder(tmp_path / f"hub{n}", weights, vocabulary, 1) for n in range(2)]
    for folder, tree in zip(folders, (shared_dicts(), {"b": circle})):
        torch.save(tree, folder / "pytorch_model.bin")
    many = [0]
    for _ in range(40):
        many = [many, many]  # 2**40 numbers, if they are printed
    tars = [release_tar(tmp_path / f"{name}.tar", release_pickle(weights, {name: many}), vocabulary)
            for name in ("sq_relu", "hidden_size")]  # fmt: skip
    *errors, other, size = attacked(*folders, *tars)
    assert all("nested too deep, or one in two places" in error for error in errors), errors
    assert "args.sq_relu that are not supported" in other and "no args.hidden_size, or one that is no number" in size


def zip_edited(file: Path, signature: bytes, offset: int, value: bytes) -> Path:
    """The file with other bytes in each structure of a zip that begins with the signature."""
    data = bytearray(file.read_bytes())
    for match in re.finditer(re.escape(signature), bytes(data)):
        data[match.start() + offset : match.start() + offset + len(value)] = value
    file.write_bytes(data)
    return file


def test_attacks_in_a_zip(tmp_path, weights, vocabulary, refused):
    """Encryption, a version, methods, places and sizes that are not there, a byteorder of 4 GB."""
    local, central, end64 = b"PK\3\4", b"PK\1\2", b"PK\6\6"
    for signature, offset, value in (
        (central, 8, b"\1"), (central, 6, b"\xff"), (central, 10, b"\x08"), (central, 10, b"\x63"),
        (local, 26, b"\xff\xff"),
        (local, 0, b"XX"), (central, 42, b"\xff\xff\xff\x7f"), (end64, 40, b"\xff" * 7),
        (central, 20, b"\0\0\0\xf0" * 2),
    ):
        folder = hub_folder(tmp_path / "hub", weights, vocabulary, 1)
        zip_edited(folder / "pytorch_model.bin", signature, offset, value)
        refused("pytorch_model.bin", folder, tmp_path / "out")
        shutil.rmtree(folder)


def test_archives_by_another_program(tmp_path, weights, vocabulary, refused):
    for changes, compression, message in (
        ({"byteorder": b"big"}, zipfile.ZIP_STORED, "big-endian"),
        ({"byteorder": b"little" * 1_000_000}, 0, "big-endian"),
        ({}, zipfile.ZIP_DEFLATED, "compressed"),
    ):  # fmt: skip
        folder = hub_folder(tmp_path / "hub", weights, vocabulary, 1)
        rewritten(folder / "pytorch_model.bin", changes, compression)
        refused(f"pytorch_model.bin.*{message}", folder, tmp_path / "out")
        shutil.rmtree(folder)


def tar_header(name: str, kind: bytes, size: int) -> bytes:
    """512 bytes that claim a member of a size, in the form for large numbers."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157], header[148:156] = b"\x80" + size.to_bytes(11, "big", signed=True), kind, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_attacks_in_a_tar(tmp_path):
    """Headers of a size, in a file that has as many bytes, and of one that leads back to the header itself."""
    tars = []
    for kind in (b"x", b"L", b"S", b"0"):
        for size in (2**31 + 512, 2**62, -512):
            tars.append(tmp_path / f"attack{len(tars)}.tar")
            tars[-1].write_bytes(tar_header("8b/latest_checkpointed_iteration.txt", kind, size))
            if size == 2**31 + 512:
                os.truncate(tars[-1], size + 4096)
    errors = attacked(*tars)
    assert all(str(tar) in error for tar, error in zip(tars, errors)), errors


def test_a_sparse_member(tmp_path, weights, vocabulary, refused):
    tar = release_tar(tmp_path / "release.tar", release_pickle(weights), vocabulary)
    with tarfile.open(tar) as source, tarfile.open(tmp_path / "sparse.tar", "w", format=tarfile.PAX_FORMAT) as made:
        for member in source.getmembers():
            if member.name.endswith(".pt"):
                member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1",
                                      "GNU.sparse.map": f"0,{member.size}",
                                      "GNU.sparse.size": str(member.size)}  # fmt: skip
            made.addfile(member, source.extractfile(member))
    refused("has 0 files iter_0.1251/mp_rank", tmp_path / "sparse.tar", tmp_path / "out")


def test_a_tar_is_not_unpacked(tmp_path, weights, vocabulary, refused):
    members = {"../escaped": b"x", "/tmp/escaped-by-test": b"x", "8b_chat_model_release/../../escaped": b"x"}
    inside = tmp_path / "deep" / "deeper"
    inside.mkdir(parents=True)
    tar = release_tar(inside / "release.tar", release_pickle(weights), vocabulary, members)
    with tarfile.open(tar, "a") as opened:
        for name, target in (("link", "/etc/passwd"), ("8b_chat_model_release/adept_vocab2.model", "/etc/passwd")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            opened.addfile(info)
    assert converted(tar, inside / "out") == 0
    assert sorted(os.listdir(inside)) == ["out", "release.tar"] and os.listdir(tmp_path) == ["deep"]
    assert os.listdir(tmp_path / "deep") == ["deeper"] and not Path("/tmp/escaped-by-test").exists()
    # the tokenizer as a link to a file of this machine
    with tarfile.open(tar) as source, tarfile.open(inside / "linked.tar", "w") as opened:
        for member in source.getmembers():
            if member.name.endswith("release/adept_vocab.model"):
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "adept_vocab.vocab", 0
            opened.addfile(member, source.extractfile(member) if member.isreg() else None)
    refused("has 0 files adept_vocab.model", inside / "linked.tar", inside / "other")


def test_a_flipped_bit_is_noticed(tmp_path, weights, vocabulary, refused, capsys):
    """In a tensor, also of a matrix that is quantized, and in the pickle; without checksums there is a warning."""
    file = hub_folder(tmp_path / "hub", weights, vocabulary, 1) / "pytorch_model.bin"
    whole = file.read_bytes()
    head = weights["lm_head.weight"].view(torch.uint8).numpy().tobytes()
    for place in (whole.index(head) + 1000, whole.index(b"lm_head")):
        data = bytearray(whole)
        data[place] ^= 1
        file.write_bytes(data)
        for options in ([], ["--dtype", "float32"], ["--quantize", "int8"]):
            refused("pytorch_model.bin is damaged.* Bad CRC-32 for file .*data", file.parent, tmp_path / "out",
                    *options)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, file)
    finally:
        torch.serialization.set_crc32_options(True)
    capsys.readouterr()
    assert converted(file.parent, tmp_path / "out") == 0
    assert re.fullmatch(r"convert.py: warning: .*pytorch_model.bin has no checksums.*\n", capsys.readouterr().err)


# OUTPUT: whole or not at all.


def test_convert_refuses_an_output(tmp_path, weights, vocabulary, refused):
    good, out, model = tmp_path / "good.tar", tmp_path / "out", tmp_path / "tiny"
    release_tar(good, release_pickle(weights), vocabulary)
    shutil.copytree(TINY, model)
    refused("is or holds the source", good, tmp_path)
    refused("is or holds the source", model, model, "--force")
    (tmp_path / "link").symlink_to(model)
    refused("is or holds the source", tmp_path / "link", model, "--force")
    refused("can't be made", TINY, "/")
    refused("File name too long", TINY, tmp_path / ("x" * 250))
    refused("Not a directory|File exists", TINY, good / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    refused("exists: give another name, or --force", good, tmp_path / "mine")
    refused("is not a model's folder: --force does not", good, tmp_path / "mine", "--force")
    (tmp_path / "mine").rename(tmp_path / "out.unfinished")
    refused("out.unfinished is in the way", good, out)
    assert (tmp_path / "out.unfinished" / "thesis.tex").exists()
    shutil.rmtree(tmp_path / "out.unfinished")
    assert converted(good, out, "--dry-run") == 0 and not out.exists()
    assert converted(good, out) == 0
    refused("exists: give another name, or --force", good, out)
    (out / "left over").write_text("x")
    (tmp_path / "other").symlink_to(out)
    assert converted(good, tmp_path / "other", "--force", "--dtype", "float32") == 0  # to where the link leads
    assert not (out / "left over").exists() and load_config(out).dtype == "float32"
    assert (tmp_path / "other").is_symlink()


def test_an_output_that_can_not_be_moved(tmp_path, monkeypatch, refused):
    """As a mounted volume: said before anything is written."""
    rename = Path.rename

    def busy(self, target):
        if self == tmp_path / "volume":
            raise OSError(16, "Device or resource busy", str(self))
        return rename(self, target)

    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(Path, "rename", busy)
    monkeypatch.setattr(convert, "write_folder", lambda *_: pytest.fail("it was written"))
    refused("Device or resource busy: .*volume", TINY, tmp_path / "volume", "--force")


def test_an_output_that_appears(tmp_path, monkeypatch, refused):
    """While a conversion runs, by another program: it stays."""
    write = convert.write_folder

    def slowly(*arguments):
        write(*arguments)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("mine")

    monkeypatch.setattr(convert, "write_folder", slowly)
    for options in ([], ["--force"]):
        assert converted(TINY, tmp_path / "out", *options) == 2
        assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out" / "config.json").read_text() == "mine"
        shutil.rmtree(tmp_path / "out")


SLOW = f"""
import sys, time
sys.path.insert(0, {str(HERE)!r})
import convert
pieces = convert.pieces_of
def slowly(*arguments):
    print("writing", flush=True)
    for piece in pieces(*arguments):
        time.sleep(0.02)
        yield piece
convert.pieces_of = slowly
sys.exit(convert.main(sys.argv[1:]))
"""


def test_two_conversions_to_one_output(tmp_path, refused):
    process = subprocess.Popen([sys.executable, "-c", SLOW, TINY, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert "writing" in "".join(process.stdout.readline() for _ in range(2))
    for options in ([], ["--force"]):
        refused("another conversion is writing .*out", TINY, tmp_path / "out", *options)
    assert "python sample.py" in process.communicate(timeout=60)[0] and process.returncode == 0
    PersimmonForCausalLM.from_pretrained(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_convert_killed_at_any_moment(tmp_path, weights, vocabulary):
    """kill -9 leaves no OUTPUT, and the next run succeeds."""
    tar = release_tar(tmp_path / "release.tar", release_pickle(weights), vocabulary)
    for delay in (0, 0.4):  # of about a second that it writes
        command = [sys.executable, "-c", SLOW, tar, tmp_path / "out"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert any("writing" in line for line in process.stdout)
        time.sleep(delay)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert sorted(os.listdir(tmp_path)) == ["out.unfinished", "release.tar"]
    assert converted(tar, tmp_path / "out") == 0 and sorted(os.listdir(tmp_path)) == ["out", "release.tar"]


def test_convert_killed_between_its_renames(tmp_path, refused):
    """The old folder comes back; one that was being deleted does not."""
    out, scratch = tmp_path / "out", tmp_path / "out.unfinished"
    shutil.copytree(TINY, scratch / "old")
    shutil.copytree(TINY, scratch / "new")
    assert converted(TINY, out) == 2 and os.listdir(tmp_path) == ["out"]
    assert (out / "train.py").exists()  # TINY's own, which no conversion writes
    out.rename(tmp_path / "moved by its owner")
    (scratch / "old").mkdir(parents=True)
    (scratch / "old" / "config.json").write_text("what is left of a folder")
    assert converted(TINY, out) == 0 and not scratch.exists()
    PersimmonForCausalLM.from_pretrained(out)


def test_convert_ctrl_c_at_any_moment(tmp_path):
    """While torch is imported, too."""
    for seconds in (0.3, 1.5):
        command = [sys.executable, HERE / "convert.py", TINY, tmp_path / "out", "--force"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode in (0, 130, -signal.SIGINT) and error == b"", error
        assert not (tmp_path / "out.unfinished").exists()


def test_convert_with_closed_streams(tmp_path):
    for arguments, code in (("tiny {out}", 0), ("nothing {out}", 2)):
        arguments = arguments.format(out=tmp_path / "out")
        result = subprocess.run(["sh", "-c", f'exec "$0" convert.py {arguments} 2>&-', sys.executable], cwd=HERE,
                                capture_output=True, text=True, timeout=120)  # fmt: skip
        assert (result.returncode, result.stderr) == (code, "")
    assert (tmp_path / "out").exists()


def test_convert_is_short():
    lines = (HERE / "convert.py").read_text().splitlines()
    assert len(lines) <= 567 and max(map(len, lines)) <= 100


# === tiny/train.py ===================================================================================================


def train_py(folder: Path, *arguments: str) -> list[str | Path]:
    """A command line for tiny/train.py, on a text made here."""
    (folder / "text").write_text("".join(f"{line}\n" for line in CORPUS * 30))
    options = ["--text", folder / "text", "--out", folder / "out", "--batch", "1", "--eval-every", "1"]
    return [sys.executable, TINY / "train.py", *options, "--device", "cpu", *arguments]


def losses_of(*outputs: str) -> list[str]:
    return [line for output in outputs for line in re.findall(r"step \d+/\d+  loss \S+", output)]


def test_training_resumed_equals_uninterrupted(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    done = subprocess.run(train_py(whole, "--steps", "6"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(os.listdir(whole / "out")) == files

    process = subprocess.Popen(train_py(parts, "--steps", "6"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    process.stdout.readline()  # the first validation loss
    process.send_signal(signal.SIGINT)
    _, first = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command with --resume goes on" in first and "Traceback" not in first
    other = subprocess.run(train_py(parts, "--steps", "7", "--resume"), capture_output=True, text=True, timeout=120)
    assert other.returncode == 2 and "--resume: the run was begun with" in other.stderr
    second = subprocess.run(train_py(parts, "--steps", "6", "--resume"), capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    assert 1 <= len(losses_of(first)) <= 5
    assert losses_of(first, second.stderr) == losses_of(done.stderr) and len(losses_of(done.stderr)) == 6
    assert sorted(os.listdir(parts / "out")) == files
    assert all((whole / "out" / file).read_bytes() == (parts / "out" / file).read_bytes() for file in files)
    model = PersimmonForCausalLM.from_pretrained(whole / "out")
    assert next(model.parameters()).dtype == torch.bfloat16
    oracle(whole / "out")
    again = subprocess.run(train_py(whole, "--steps", "6"), capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and "holds a model" in again.stderr and again.stderr.count("\n") == 1


def test_fine_tuning_and_a_loss_that_is_not_finite(tmp_path):
    tuned = subprocess.run(train_py(tmp_path, "--steps", "1", "--init", TINY), capture_output=True, text=True,
                           timeout=120)
    assert tuned.returncode == 0, tuned.stderr
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (TINY / "tokenizer.model").read_bytes()
    before, after = (load_file(f / "model.safetensors") for f in (TINY, tmp_path / "out"))
    change = [(after[name] - before[name]).abs().max().item() for name in before]
    assert 0 < max(change) < 0.1
    shutil.rmtree(tmp_path / "out")
    command = train_py(tmp_path, "--steps", "9", "--init", TINY, "--lr", "1e30")
    broken = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert broken.returncode == 2 and re.search(r"error: step \d: the loss is nan", broken.stderr), broken.stderr
    assert "Traceback" not in broken.stderr


# === run as a script =================================================================================================


def test_run_as_a_script(tmp_path):
    """`bench` without what only tests need: a row for each measurement, or why there is none. Else, how to use it."""
    code = """
import runpy, subprocess, sys, types
sys.modules.update(dict.fromkeys(("pytest", "hypothesis", "transformers")))
subprocess.run = lambda *_, **__: types.SimpleNamespace(stdout=b"[1, 0.001]")  # for what the machine can do
sys.path.insert(0, ".")
runpy.run_path("test_persimmon.py", run_name="__main__")
"""
    options = ["--n-prompt", "8", "2000", "--n-depth", "0", "5", "--n-gen", "4", "-r", "2"]
    for arguments in (["bench", "--device", "cpu", "-t", "1", "--batch-size", "1", "2", *options], [], ["benhc"]):
        result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=HERE, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (2 if arguments == ["benhc"] else 0, ""), result.stderr
        if len(arguments) < 2:
            assert result.stdout.count("python test_persimmon.py ") == 3
            continue
        rows = [line for line in result.stdout.splitlines() if re.match("pp|tg", line)]
        assert [row[:20].strip() for row in rows] == [
            test + texts for texts in ("", " x 2") for test in ("pp8", "pp2000", "tg4 @ 0", "tg4 @ 5")]
        for row in rows:
            is_left_out = row.endswith("left out: the context is 1024")
            assert is_left_out == ("pp2000" in row)
            assert is_left_out or re.search(r"\d\.\d\d +\d+\.\d\d +\d+\.\d\d (TFLOP|GB)/s +\d+%$", row), row
        assert "peak memory " in result.stdout
