"""Write text with a Persimmon model: `python sample.py` uses the small one in tiny/, `--model FOLDER` any other.

Text, or JSON, goes to stdout and everything else to stderr. Exit codes: 0; 2 for a wrong argument or a damaged file;
130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

if TYPE_CHECKING:  # importing torch takes seconds: --help and a wrong argument need not wait for it
    import torch

    from persimmon import KVCache, PersimmonConfig, PersimmonForCausalLM, Tokenizer

DEFAULT_PROMPT = "ROMEO:\n"
ROWS = 16  # texts written at once: a pass reads the same weights for all of them


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 128,512")
    return [int(part) for part in text.split(",")]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with exactly one of prompt, --file, --batch and --chat."""
    parser = Parser(description="Write text with a Persimmon model.")
    add = parser.add_argument_group("what to write").add_argument
    add("prompt", nargs="?", help=f"text to continue, - for standard input (default: {DEFAULT_PROMPT!r})")
    add("-f", "--file", metavar="FILE", type=Path, help="continue the text in FILE, less one line break at its end")
    add("--batch", metavar="FILE", type=Path, help="continue each line of FILE: a JSON string, or the line as it is")
    add("--chat", action="store_true", help="talk, in the prompt format of Adept's chat model; /reset forgets, /exit "
        "leaves, Ctrl-C stops an answer")
    add("-n", "--max-tokens", metavar="N", type=int, default=200, help="tokens to write at most (default: %(default)s)")
    add("--num-samples", metavar="N", type=int, default=1, help="texts for each prompt (default: %(default)s)")
    add("--stop", metavar="TEXT", action="append", default=[], help="end before TEXT; may be repeated")
    add("--no-bos", action="store_true", help="do not put |ENDOFTEXT| in front of the prompt")
    add("--ignore-eos", action="store_true", help="go on after |ENDOFTEXT|")
    add = parser.add_argument_group("how to choose tokens").add_argument
    add("--temp", metavar="T", type=float, default=0.8, help="temperature; 0 is greedy (default: %(default)s)")
    add("--top-k", metavar="K", type=int, default=0, help="choose among the K likeliest; 0: all (default: %(default)s)")
    add("--top-p", metavar="P", type=float, default=0.95,
        help="choose among the likeliest that have P together; 1 is all (default: %(default)s)")
    add("--min-p", metavar="P", type=float, default=0.0,
        help="choose among those at least P times as likely as the likeliest (default: %(default)s)")
    add("--repetition-penalty", metavar="X", type=float, default=1.0,
        help="make tokens that are there already less likely; 1 is off (default: %(default)s)")
    add("--seed", metavar="N", type=int, help="same seed, same text; the k-th text has N + k - 1 (default: a new "
        "one each time, shown at the end)")
    add = parser.add_argument_group("model and machine").add_argument
    add("-m", "--model", metavar="FOLDER", type=Path, default=Path(__file__).resolve().parent / "tiny",
        help="config.json, safetensors and tokenizer.model (default: tiny/, 5 million parameters of Shakespeare)")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto",
        help="of weights and arithmetic (default: what config.json says)")
    add("--quantize", choices=("int8", "int4"), help="turn weights into 8 or 4 bits while loading: smaller and "
        "faster; `convert.py --quantize` does it once and for all")
    add("--group-size", metavar="G", type=int, choices=(32, 64, 128), default=128, help="weights that share a scale "
        "with --quantize int4: 32, 64 or 128 (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: cuda where there is one, else cpu)")
    add("-t", "--threads", metavar="N", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--dense", action="store_true", help="on a CPU, read also weights that only zeros multiply, and keep all "
        "of them mapped from the file")
    add("-c", "--ctx-size", metavar="N", type=int, help="tokens that --chat remembers (default: the model's context)")
    add = parser.add_argument_group("output").add_argument
    add("--logprobs", action="store_true", help="write each new token on a line, after its log-probability in nats")
    add("--json", action="store_true", help="write a JSON object for each text: prompt, text, ids, logprobs, "
        "finish_reason, seed, figures")
    add("-q", "--quiet", action="store_true", help="no figures and no progress")
    add = parser.add_argument_group("benchmark").add_argument
    add("--bench", action="store_true", help="instead of text, a table: tokens/s for prompts and for 64 new tokens "
        "after a context, and what part of this machine's speed that is")
    add("--n-prompt", metavar="N,...", type=numbers, default="128,512",
        help="lengths of prompts (default: %(default)s)")
    add("--n-depth", metavar="N,...", type=numbers, default="0,2048,8192",
        help="lengths of contexts (default: %(default)s)")
    add("--batch-size", metavar="N,...", type=numbers, default="1", help="texts at once (default: %(default)s)")
    add("--random", metavar="8b[:L]", help="for --bench: random weights in the 8B's shape, with L layers if not 36")
    add("--density", metavar="P", type=float, default=0.5, help="with --random, the part of the MLP's activations that "
        "is not zero; about 0.1 in the trained model (default: %(default)s)")
    add("-r", "--repetitions", metavar="N", type=int, default=3, help="runs of each test (default: %(default)s)")
    args = parser.parse_args(argv)
    sources = [args.prompt is not None, args.file is not None, args.batch is not None, args.chat, args.bench]
    if sum(sources) > 1:
        parser.error("give only one of a prompt, --file, --batch, --chat and --bench")
    shape, _, layers = (args.random or "8b").partition(":")
    if shape != "8b" or not (layers or "36").isdecimal() or len(layers) > 3 or int(layers or 36) == 0:
        parser.error(f"--random {args.random} is no shape: give 8b, or 8b:L for L layers")
    if args.random and not args.bench:
        parser.error("--random is for --bench: random weights write nothing")
    args.layers = int(layers or 36)
    if args.chat and (args.json or args.logprobs or args.num_samples != 1):
        parser.error("--chat goes with neither --json nor --logprobs nor --num-samples")
    if args.json and args.logprobs:
        parser.error("--json has the log-probabilities: leave --logprobs out")
    for name, least, most in (
        ("num_samples", 1, 100_000), ("threads", 1, 4096), ("ctx_size", 2, math.inf), ("max_tokens", 1, math.inf),
        ("temp", 0, math.inf), ("top_k", 0, math.inf), ("top_p", 0, 1), ("min_p", 0, 1), ("seed", 0, 2**62),
        ("repetition_penalty", 0.001, 1000), ("density", 0.001, 0.999), ("repetitions", 1, math.inf),
        ("n_prompt", 1, math.inf), ("n_depth", 0, math.inf), ("batch_size", 1, math.inf),
    ):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not least <= value <= most:
                parser.error(f"--{name.replace('_', '-')} {value} is out of range: it goes from {least} to {most}")
    return args


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The texts to continue; ValueError for one that is not UTF-8."""
    source = "standard input" if args.prompt == "-" else args.file or args.batch
    if source is None:
        return [DEFAULT_PROMPT if args.prompt is None else args.prompt]
    data = sys.stdin.buffer.read() if args.prompt == "-" else source.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8: {error.reason} at byte {error.start}") from None
    if not args.batch:
        return [text.removesuffix("\n")]
    prompts = []
    for line in filter(str.strip, text.replace("\r\n", "\n").split("\n")):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = line
        prompts.append(value if isinstance(value, str) else line)
    if not prompts:
        raise ValueError(f"{source} has no line to continue")
    return prompts


class Sample:
    """A text in the making: a prompt, and what has been generated after it."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, args: argparse.Namespace, stops: Sequence[str] = ()) -> None:
        from persimmon import StreamDecoder

        self.prompt = prompt
        self.prompt_ids = tokenizer.encode(prompt, add_bos=False if args.no_bos else None)
        self.decoder = StreamDecoder(tokenizer, self.prompt_ids)
        self.stops = [stop for stop in (*args.stop, *stops) if stop]
        self.text = ""
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: str | None = None

    def push(self, token: int, logprob: float, reason: str | None) -> None:
        """Take one more token, whatever `reason` generation has to stop there; a stop text is a reason too."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        before = len(self.text)
        self.text += self.decoder.push(token) + (self.decoder.finish() if reason else "")
        found = [self.text.find(stop, max(0, before - len(stop))) for stop in self.stops]
        if any(at >= 0 for at in found):
            self.text = self.text[: min(at for at in found if at >= 0)]
            reason = "stop"
        self.finish_reason = reason

    def certain(self) -> str:
        """The text, less an end that may turn out to be the beginning of a stop text."""
        if self.finish_reason:
            return self.text
        ends = (n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return self.text[: len(self.text) - max(ends, default=0)]


class Density:
    """Counts the activations that are not zero in front of each SparseLinear, while single tokens pass.

    Only on a CPU, where it matters.
    """

    def __init__(self, model: PersimmonForCausalLM) -> None:
        from persimmon import Int8SparseLinear, SparseLinear

        self.nonzero = self.total = 0
        self.layers = [layer for layer in model.modules() if isinstance(layer, (SparseLinear, Int8SparseLinear))]
        is_on_cpu = model.model.embed_tokens.weight.device.type == "cpu"
        self.hooks = [layer.register_forward_pre_hook(self.count) for layer in self.layers if is_on_cpu]

    def count(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        """A hook in front of a layer."""
        if inputs[0].shape[-2] == 1:
            self.nonzero += int(inputs[0].count_nonzero())
            self.total += inputs[0].numel()

    def stop(self) -> float | None:
        """Count no longer; the part of the activations that was not zero."""
        for hook in self.hooks:
            hook.remove()
        return self.nonzero / self.total if self.total else None

    def weights_read(self, model: PersimmonForCausalLM, rows: int) -> float:
        """Bytes of weights that a pass over one token for each of `rows` texts reads: all that are not skipped."""
        import torch

        all_of_them = sum(x.nbytes for x in model.state_dict().values()) - model.model.embed_tokens.weight.nbytes
        skipped = max(0.0, 1 - rows * self.nonzero / self.total) if self.total else 0.0
        tables = [x.weight.nbytes for x in self.layers if x.weight.dtype == torch.uint8 or not x.weight.is_contiguous()]
        return all_of_them - skipped * sum(tables)


class Figures(NamedTuple):
    """What a run took."""

    prompt_tokens: int
    prompt_tokens_per_second: float
    seconds_to_first_token: float
    tokens: int
    tokens_per_second: float  # after the first token, and on CUDA after the second, when a pass has been recorded
    gigabytes_per_second: float  # of weights read, at that speed
    density: float | None  # part of the MLP's activations that were not zero, in single-token passes on a CPU


def write(model: PersimmonForCausalLM, samples: list[Sample], args: argparse.Namespace, seed: int,
          show: Callable[[], None], cache: KVCache | None = None) -> Figures:
    """Generate all samples side by side, calling show() after each step, until all have ended or Ctrl-C."""
    import torch

    from persimmon import generate

    T = max(len(sample.prompt_ids) for sample in samples)
    missing = [T - len(sample.prompt_ids) for sample in samples]
    ids = torch.tensor([[0] * n + sample.prompt_ids for n, sample in zip(missing, samples)])
    mask = torch.tensor([[0] * n + [1] * (T - n) for n in missing])
    prompt_tokens = int(mask.sum()) - (cache.length if cache else 0)
    note = f"reading {prompt_tokens} tokens ..." if sys.stderr.isatty() and not args.quiet else ""

    def wipe() -> None:
        nonlocal note
        if note:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        note = ""

    print(note, end="", file=sys.stderr, flush=True)
    density = Density(model)
    start = time.perf_counter()
    steps: list[tuple[float, int]] = []  # of each step: when it ended, tokens so far
    try:
        for step in generate(
            model, ids, mask, max_new_tokens=args.max_tokens, temperature=args.temp, top_k=args.top_k, top_p=args.top_p,
            min_p=args.min_p, repetition_penalty=args.repetition_penalty, seed=seed,
            stop_ids=() if args.ignore_eos else None, cache=cache,
        ):
            wipe()
            now = time.perf_counter()
            for sample, *values in zip(samples, *step):
                if sample.finish_reason is None:
                    sample.push(*values)
            steps.append((now, sum(len(sample.ids) for sample in samples)))
            show()
            if all(sample.finish_reason for sample in samples):
                break
    except KeyboardInterrupt:
        for sample in samples:
            sample.finish_reason = sample.finish_reason or "Ctrl-C"
        show()
    finally:
        wipe()
        share = density.stop()
    prefill = steps[0][0] - start if steps else 0.0
    passes, speed = 0, 0.0
    first = int(model.model.embed_tokens.weight.is_cuda)  # from the end of this step on, speed is measured
    if len(steps) > first + 1:
        (since, before), (now, count), passes = steps[first], steps[-1], len(steps) - first - 1
        speed = (count - before) / (now - since)
    weights = density.weights_read(model, len(samples))
    return Figures(
        prompt_tokens, round(prompt_tokens / prefill, 2) if prefill else 0.0, round(prefill, 3),
        sum(len(sample.ids) for sample in samples), round(speed, 2),
        round(passes * weights / (now - since) / 1e9, 2) if passes else 0.0, share and round(share, 4),
    )


def printer(samples: list[Sample], tokenizer: Tokenizer, args: argparse.Namespace) -> Callable[[], None]:
    """A function that prints what is new: the first sample as it comes, each other one once those before it ended."""
    current, done = 0, 0  # sample, and how much of it is printed: characters, or tokens with --logprobs

    def show() -> None:
        nonlocal current, done
        while current < len(samples):
            sample = samples[current]
            if args.logprobs:
                new = ""
                for i, logprob in zip(sample.ids[done:], sample.logprobs[done:]):
                    piece = tokenizer.processor.id_to_piece(i) if i < len(tokenizer) else f"<{i}>"
                    new += f"{logprob:9.4f}  {piece!r}\n"
                done = len(sample.ids)
            else:
                new = (sample.prompt + sample.certain())[done:] if sample.ids else ""
                done += len(new)
            print(new, end="", flush=True)
            if sample.finish_reason is None:
                return
            current, done = current + 1, 0
            end = "" if args.logprobs else "\n"
            print(end if current == len(samples) else f"{end}\n---\n\n", end="", flush=True)

    return show


def ids_in_context(tokenizer: Tokenizer, known_ids: list[int], known_text: str, text: str, ids: list[int]) -> list[int]:
    """`ids` of `text`, but beginning with known_ids where the text begins with theirs.

    There are many ways to split a text, and an answer need not be split as the tokenizer would have done it. Without
    this, the cache would be of no use from the first such place on.
    """
    for k in range(len(ids) if known_ids else 0, 0, -1):
        before = tokenizer.decode(ids[:k])
        if before == known_text:
            return known_ids + ids[k:]
        if len(before) < len(known_text):
            break
    return ids


def chat(model: PersimmonForCausalLM, tokenizer: Tokenizer, args: argparse.Namespace, seed: int) -> int:
    """Talk until /exit or the end of input; the exit code. The cache lasts: a turn costs its own tokens only."""
    from persimmon import KVCache, chat_prompt

    weight = model.model.embed_tokens.weight
    limit = min(args.ctx_size or model.config.max_position_embeddings, model.config.max_position_embeddings)
    cache = KVCache(model.config, 1, limit, weight.dtype, weight.device)
    turns: list[str] = []
    ids: list[int] = []  # of the conversation so far, of which the cache holds the first cache.length
    text = ""  # the same, as chat_prompt writes it

    def say(note: str) -> None:
        print(f"({note})", file=sys.stderr, flush=True)

    def answer(line: str) -> None:
        nonlocal turns, ids, text, seed
        kept, forgotten = [*turns, line], 0
        while True:
            sample = Sample(tokenizer, chat_prompt(kept), args, stops=("\n\nhuman:",))
            sample.prompt_ids = ids_in_context(tokenizer, ids, text, sample.prompt, sample.prompt_ids)
            if len(sample.prompt_ids) + min(args.max_tokens, limit // 4) <= limit or len(kept) == 1:
                break
            del kept[:2]
            forgotten += 1
        if len(sample.prompt_ids) >= limit:
            return say(f"that is too long: {len(sample.prompt_ids)} tokens, and the context is {limit}")
        if forgotten:
            say(f"the context of {limit} tokens is full: the oldest {forgotten} questions and answers are dropped")
        common = 0
        while (common < min(cache.length, len(ids), len(sample.prompt_ids) - 1)
               and ids[common] == sample.prompt_ids[common]):
            common += 1
        cache.seek(common)
        ids, text = sample.prompt_ids, sample.prompt  # right also if Ctrl-C comes before the end
        printed = 0

        def show() -> None:
            nonlocal printed
            new = sample.certain().lstrip()[printed:]
            printed += len(new)
            print(new, end="", flush=True)

        figures = write(model, [sample], args, seed, show, cache)
        print(flush=True)
        seed += 1
        turns = [*kept, sample.text]
        ids, text = sample.prompt_ids + sample.ids, f"{sample.prompt} {sample.text.strip()}"
        # Ends that are not of the conversation: |ENDOFTEXT|, a stop text, spaces.
        while ids[-1] == tokenizer.end_of_text or len(tokenizer.decode(ids)) > len(text):
            ids.pop()
        if not args.quiet:
            say(f"{figures.prompt_tokens} tokens read at {figures.prompt_tokens_per_second:.1f} tok/s, "
                f"{figures.tokens} written at {figures.tokens_per_second:.1f} tok/s, stopped by {sample.finish_reason}")

    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
            line.encode("utf-8")
            if line == "/exit":
                return 0
            if line == "/reset":
                turns = []
                say("forgotten")
            elif line:
                answer(line)
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print(file=sys.stderr)
            say("/exit leaves")
        except UnicodeError:
            say("that line is not UTF-8")


def load_model(args: argparse.Namespace, device: str, progress: Callable[[float], None]) -> PersimmonForCausalLM:
    """The model that the command line asks for."""
    from persimmon import PersimmonForCausalLM

    return PersimmonForCausalLM.from_pretrained(args.model, args.dtype, device, progress, not args.dense, args.quantize,
                                                args.group_size)


def random_model(config: PersimmonConfig, density: float, dtype: torch.dtype, device: str, sparse: bool,
                 quantize: str | None, progress: Callable[[float], None]) -> PersimmonForCausalLM:
    """Random weights, the same in each layer, and biases that leave `density` of the MLP's activations nonzero."""
    import torch

    from persimmon import PersimmonForCausalLM, SparseLinear, quantize_model

    with torch.device("meta"):
        model = PersimmonForCausalLM(config).to(dtype)
    row = torch.randn(1, config.hidden_size, dtype=dtype, device=device)
    model.model.embed_tokens.weight = torch.nn.Parameter(row.expand(config.vocab_size, -1), False)  # takes no memory
    model.lm_head.to_empty(device=device)
    model.init_weights(model.lm_head)
    model.model.final_layernorm.to_empty(device=device).reset_parameters()
    first, *others = model.model.layers
    for module in first.to_empty(device=device).modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.reset_parameters()
    model.init_weights(first)
    spread = config.initializer_range * math.sqrt(config.hidden_size)  # of W x, where x has been normalized
    torch.nn.init.constant_(first.mlp.dense_h_to_4h.bias, spread * statistics.NormalDist().inv_cdf(density))
    if quantize is not None:
        quantize_model(model, quantize, config.group_size)
    for n, block in enumerate(others, start=1):
        block.to_empty(device=device).load_state_dict(first.state_dict())
        progress(n / config.num_hidden_layers)
    for layer in model.modules():
        if isinstance(layer, SparseLinear) and device == "cpu" and sparse:
            layer.transpose()
    progress(1.0)
    return model.eval()


def machine_speed(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """GB/s at which memory can be read, and TFLOP/s of a product of matrices: the best of several tries of each."""
    import torch

    data = torch.ones(2**29, device=device)  # 2.1 GB
    size, repeats = (4096, 1) if device == "cpu" else (8192, 16)  # a GPU takes orders in advance
    a, b = torch.randn(2, size, size, device=device).to(dtype)

    def best(*works: Callable[[], torch.Tensor]) -> float:
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


def bench(args: argparse.Namespace, device: str, progress: Callable[[float], None]) -> int:
    """Print a table in the manner of llama-bench; the exit code.

    ppT reads a prompt of T tokens; tg64 @ S writes 64 tokens, greedily, after S that the cache holds already (on a CPU
    they are zeros, which makes no difference to the time there); x B means B texts at once, whose tokens count
    together. A prompt's time is that of arithmetic: TFLOP/s counts matrices and attention. A token's time is that of
    reading memory: GB/s counts the weights and the cache.
    """
    import torch

    from persimmon import KVCache, PersimmonConfig, PersimmonForCausalLM, generate

    dtype = getattr(torch, "bfloat16" if args.dtype == "auto" else args.dtype)
    limits = machine_speed(device, dtype)
    if args.random:
        config = PersimmonConfig(num_hidden_layers=args.layers, group_size=args.group_size)
        model = random_model(config, args.density, dtype, device, not args.dense, args.quantize, progress)
    else:
        model = load_model(args, device, progress)
    config, weight = model.config, model.model.embed_tokens.weight
    with torch.device("meta"):
        params = sum(p.numel() for p in PersimmonForCausalLM(config).parameters())
    size = sum(x.nbytes for x in model.state_dict().values())
    name = f"{args.random} random" if args.random else args.model.name
    kind = {None: str(weight.dtype).removeprefix("torch."), "int8": "int8", "int4": f"int4 g{config.group_size}"}
    place = f"{torch.get_num_threads()} threads" if device == "cpu" else device
    place = torch.cuda.get_device_name(device) if device.startswith("cuda") else place
    facts = f"{name} | {size / 1e9:.2f} GB | {params / 1e9:.2f} B | {kind[config.quantize]} | {place}"
    rows: list[tuple[str, list[float], float, str, float | None]] = []  # test, tok/s, work a token, unit, not zero

    def note(text: str, stays: bool = False) -> None:
        if sys.stderr.isatty() and not args.quiet:
            print(f"\r\x1b[K{text}", end="\n" if stays else "", file=sys.stderr, flush=True)
        elif stays and not args.quiet:
            print(text, file=sys.stderr, flush=True)

    def test(T: int, S: int, n: int, B: int) -> None:
        """Write n tokens after a prompt of T of which the cache holds S, B times; the time is that of all passes."""
        title = (f"pp{T}" if n == 1 else f"tg{n} @ {S}") + (f" x {B}" if B > 1 else "")
        per_position = 2 * config.num_hidden_layers * config.hidden_size * weight.itemsize * B  # bytes of cache
        if T + n - 1 > config.max_position_embeddings:
            return note(f"{title} left out: the context is {config.max_position_embeddings}", stays=True)
        if per_position * (T + n) > free_memory(device):
            gigabytes = per_position * (T + n) / 1e9
            return note(f"{title} left out: its cache takes {gigabytes:.1f} GB, more than is free", stays=True)
        speeds, density = [], Density(model)
        ids = torch.full((B, T), 71)
        try:
            cache = KVCache(config, B, T + n, weight.dtype, weight.device)
            for block in (cache.keys, cache.values) if S else ():
                block.normal_() if block.is_cuda else block.zero_()  # a GPU is quicker with zeros, at least at products
            for run in range(-1, args.repetitions):  # the first one is to warm up
                note(f"{title}, run {run + 1} of {args.repetitions} ..." if run >= 0 else f"{title} ...")
                cache.seek(S)
                times = [time.perf_counter()]
                for _ in generate(model, ids, max_new_tokens=n if run >= 0 else min(n, 4), stop_ids=(), cache=cache):
                    times.append(time.perf_counter())
                if run >= 0 and n == 1:
                    speeds.append(B * T / (times[1] - times[0]))
                elif run >= 0:  # from the second token on: before that, a GPU's work is recorded
                    speeds.append(B * (n - 2) / (times[-1] - times[2]))
        except torch.OutOfMemoryError:
            return note(f"{title} left out: out of memory", stays=True)
        share = density.stop()
        if n == 1:
            C, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
            work = 2 * L * (4 * C * C + 2 * F * C + C * T) - 4 * F * C  # of the last block's MLP one token is wanted
            rows.append((title, speeds, work / 1e12, "TFLOP/s", None))
        else:
            read = density.weights_read(model, B) + per_position * (S + n / 2)
            rows.append((title, speeds, read / B / 1e9, "GB/s", share))

    for B in args.batch_size:
        for T in args.n_prompt:
            test(T, 0, 1, B)
        for S in args.n_depth:
            test(S + 1, S, 64, B)
    note("")
    limit = dict(zip(("GB/s", "TFLOP/s"), map(max, limits, machine_speed(device, dtype))))
    print("| model | size | params | dtype | on | test | tok/s | that is | of what is possible | not zero |")
    print("|---|--:|--:|---|---|--:|--:|--:|--:|--:|")
    for title, speeds, work, unit, share in rows:
        mean, spread = statistics.mean(speeds), statistics.stdev(speeds) if len(speeds) > 1 else 0.0
        rate = f"{mean * work:.2f} {unit} | {mean * work / limit[unit]:.0%}"
        rate += f" | {share:.0%}" if share is not None else " | "
        print(f"| {facts} | {title} | {mean:.2f} ± {spread:.2f} | {rate} |")
    print(f"\nThis machine reads memory at {limit['GB/s']:.2f} GB/s and multiplies matrices at {limit['TFLOP/s']:.2f} "
          f"TFLOP/s, the best of several tries before and after. Peak memory {peak_memory(device)}.")
    return 0


def free_memory(device: str) -> float:
    """Bytes of memory that are free or hold nothing but files; infinity where the system does not say."""
    import torch

    if device.startswith("cuda"):
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device != "cpu":
        return math.inf
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return float(next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), math.inf)) * 1024


def peak_memory(device: str) -> str:
    """The most memory this process has had: resident, and on a GPU what PyTorch took there."""
    import torch

    if device.startswith("cuda"):
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"


def run(args: argparse.Namespace) -> int:
    """Load the model, and complete or chat; the exit code."""
    prompts = [] if args.chat or args.bench else read_prompts(args)
    import torch

    from persimmon import Tokenizer

    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(f"--device {device} is not available on this machine") from None
    is_shown, start = sys.stderr.isatty() and not args.quiet, time.monotonic()

    def progress(fraction: float) -> None:
        if is_shown and time.monotonic() - start > 2:
            end = "\r\x1b[K" if fraction == 1 else ""
            print(f"\rloading {fraction:4.0%}{end}", end="", file=sys.stderr, flush=True)

    if args.bench:
        return bench(args, device, progress)
    model = load_model(args, device, progress)
    tokenizer = Tokenizer(args.model)
    seed = random.randrange(2**32) if args.seed is None else args.seed
    if args.chat:
        return chat(model, tokenizer, args, seed)

    samples = [Sample(tokenizer, prompt, args) for prompt in prompts for _ in range(args.num_samples)]
    show = (lambda: None) if args.json else printer(samples, tokenizer, args)
    for at in range(0, len(samples), ROWS):
        group = samples[at : at + ROWS]
        figures = write(model, group, args, seed + at, show)
        for row, sample in enumerate(group):
            if args.json:
                facts = {name: getattr(sample, name) for name in ("prompt", "text", "ids", "logprobs", "finish_reason")}
                print(json.dumps({**facts, "seed": seed + at + row, "figures": figures._asdict()}), flush=True)
        if not args.quiet:
            reasons = ", ".join(sorted({str(sample.finish_reason) for sample in group}))
            print(
                f"prompt    {figures.prompt_tokens:6} tokens {figures.prompt_tokens_per_second:9.1f} tok/s, "
                f"first token after {figures.seconds_to_first_token:.2f} s\n"
                f"generated {figures.tokens:6} tokens {figures.tokens_per_second:9.1f} tok/s, "
                f"{figures.gigabytes_per_second:.1f} GB/s of weights read"
                + (f", {figures.density:.0%} of activations not zero\n" if figures.density is not None else "\n") +
                f"peak memory {peak_memory(device)}, seed {seed + at}, stopped by {reasons}",
                file=sys.stderr,
            )
        if any(sample.finish_reason == "Ctrl-C" for sample in group):
            return 130
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; errors become one sentence and exit code 2."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `sample.py | head` ends like any other command
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # closed: figures and errors have nowhere to go
    args = parse(argv)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch then asks for large pages, which are quicker to fill
    for stream, is_needed in (("stdin", args.prompt == "-" or args.chat), ("stdout", True)):
        if getattr(sys, stream) is None and is_needed:
            print(f"sample.py: error: {stream} is closed", file=sys.stderr)
            return 2
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        return run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, FloatingPointError, ImportError, RecursionError) as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:
        text = f"{error} {error.__context__}"  # while a GPU's work is recorded, the reason is in the context
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", text):
            raise
        print("sample.py: error: out of memory: try a smaller --ctx-size, --max-tokens or --num-samples, or another "
              "--dtype", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
