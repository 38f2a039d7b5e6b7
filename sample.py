"""usage: python sample.py [PROMPT] [options]

Writes text with a Persimmon model: with the small one in tiny/, or any other.

  python sample.py "To be, or not to be" -n 100 --temp 0.5
  python sample.py -m persimmon-8b-chat --quantize int8 --chat
  python sample.py --batch prompts.txt --json > answers.jsonl

Type a line break as $'a\\nb'. What is in brackets is the default.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # importing torch takes seconds: --help and a wrong argument do not wait for it
    from persimmon import KVCache, PersimmonForCausalLM

ROWS = 16  # texts written at once: a pass reads the same weights for all of them
SMALL = 64e6  # bytes of weights; below, a second thread costs more than it gives
CHAT_HELP = "/help, /reset forgets, /exit leaves, Ctrl-C interrupts, \\ continues a line"
TINY = Path(__file__).with_name("tiny")
SAMPLING = "max_new_tokens temperature top_k top_p min_p repetition_penalty".split()
FACTS = "prompt text ids logprobs finish_reason seed figures".split()  # what --json writes
OPTIONS = {  # heading: {names: (type, or bool for a flag; default; placeholder; help)}
    "what to write": {
        "-p --prompt": (str, None, "TEXT", r"text to continue, - for standard input [$'ROMEO:\n']"),
        "-f --file": (str, None, "FILE", "continue the text in FILE"),
        "--batch": (str, None, "FILE", "continue each line: text, JSON, or what --json wrote"),
        "--chat": (bool, False, "", "talk, in the format of Adept's chat model"),
        "-n --max-new-tokens --max-tokens": (int, 200, "N", "tokens at most; -1: no limit [200]"),
        "--num-samples": (int, 1, "N", "texts a prompt [1]"),
        "--stop": (str, [], "TEXT", "end before TEXT; may be repeated"),
        "--no-bos": (bool, False, "", "do not put |ENDOFTEXT| in front of the prompt"),
        "--ignore-eos": (bool, False, "", "go on after |ENDOFTEXT|")},
    "how to choose tokens": {
        "--temperature --temp": (float, 0.8, "T", "0 is greedy [0.8]"),
        "--top-k": (int, 0, "K", "among the K likeliest; 0: all [0]"),
        "--top-p": (float, 0.95, "P", "among the likeliest that have P together [0.95]"),
        "--min-p": (float, 0.0, "P", "those at least P times as likely as the first [0]"),
        "--repetition-penalty --repeat-penalty": (float, 1.0, "X", "1 is off [1]"),
        "--seed": (int, None, "N", "same seed, same text; text k has N + k - 1 [random]")},
    "model and machine": {
        "-m --model": (Path, TINY, "FOLDER", "what convert.py wrote [tiny/]"),
        "--dtype": (str, "auto", "TYPE", "bfloat16, float16, float32 [what config.json says]"),
        "--quantize": (str, None, "KIND", "int8 or int4, while loading; see also convert.py"),
        "--device": (str, None, "NAME", "cpu, cuda, cuda:1, mps [cuda if there is one]"),
        "-t --threads": (int, None, "N", "CPU threads [1 for a small model, else all cores]"),
        "-c --ctx-size": (int, None, "N", "tokens that --chat remembers [the model's context]"),
        "--plain": (bool, False, "", "run the model as written, without what is faster"),
        "--random": (str, None, "8b[:L]", "random weights of the 8B's shape, L layers: no text"),
        "--density": (float, 0.5, "P", "with --random, activations that are not zero [0.5]")},
    "output": {
        "--json": (bool, False, "", "a JSON object a text: prompt, ids, logprobs, ..."),
        "-q --quiet": (bool, False, "", "no figures and no progress"),
        "-h --help": (bool, False, "", "show this")}}
GONE = {  # options of earlier versions, and what to use now
    **dict.fromkeys("--bench --n-prompt --n-depth --batch-size -r --repetitions".split(),
                    "python test_persimmon.py bench"), "--logprobs": "--json", "--dense": "--plain",
    "--group-size": "python convert.py FOLDER OUTPUT --quantize int4 --group-size G"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises ValueError for what is wrong with it."""
    def fail(message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")
    parser, help_text = argparse.ArgumentParser(add_help=False, allow_abbrev=False), __doc__ or ""
    parser.error = fail
    parser.add_argument("text", nargs="?")
    for heading, group in OPTIONS.items():
        help_text += f"\n{heading}:\n"
        for names, (kind, default, placeholder, about) in group.items():
            options = {"action": "store_true"} if kind is bool else {"type": kind}
            options |= {"action": "append"} if default == [] else {}
            parser.add_argument(*names.split(), default=default, **options)
            left = ", ".join(names.split()[: 1 if names.startswith("--") else 2])
            help_text += f"  {f'{left} {placeholder}':26}{about}\n"
    args, unknown = parser.parse_known_args(argv)
    if args.help:
        sys.exit(print(help_text, end=""))
    for name in [word.split("=")[0] for word in unknown]:
        fail(f"{name} is gone: use {GONE[name]}" if name in GONE else f"there is no option {name}")
    if [args.text, args.prompt, args.file, args.batch, args.chat or None].count(None) < 4:
        fail("give only one of a prompt, --file, --batch and --chat")
    if args.chat and (args.json or args.num_samples > 1 or args.random):
        fail("--chat goes with none of --json, --num-samples and --random")
    if args.random and not re.fullmatch("8b(:[1-9][0-9]{0,2})?", args.random):
        fail(f"--random {args.random} is no shape: give 8b, or 8b:L for L layers")
    for name, high in ("num_samples", 1e5), ("threads", 4096), ("ctx_size", 2**28), ("density", 1):
        if (value := getattr(args, name)) is not None and not 0 < value <= high:
            fail(f"--{name.replace('_', '-')} {value} is not above 0 and up to {high:.0f}")
    args.max_new_tokens = sys.maxsize if args.max_new_tokens == -1 else args.max_new_tokens
    args.prompt = args.text if args.prompt is None else args.prompt
    args.add_bos = False if args.no_bos else None  # None: as the tokenizer's config says
    args.sampling = {name: getattr(args, name) for name in SAMPLING}
    return args


def read_prompts(args: argparse.Namespace) -> list[str | None]:
    """The texts to continue; None for a blank line of a batch. ValueError for what is not UTF-8."""
    source = args.file or args.batch or args.prompt
    if source in (None, args.prompt) and source != "-":
        return ["ROMEO:\n" if source is None else source]
    data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        name = "standard input" if source == "-" else source
        raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None
    prompts: list[str | None] = []
    for line in text.split("\n") if args.batch else []:
        value = line if line.strip() else ""
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
        value = value.get("prompt") if isinstance(value, dict) else value
        prompts.append((value if isinstance(value, str) else line) or None)
    return prompts or [text]


def progress(args: argparse.Namespace, note: str = "") -> None:
    """Show in a terminal what goes on and how much of it is done, in place of the last note."""
    if sys.stderr.isatty() and not args.quiet:
        print(f"\x1b[J\x1b7{note}\x1b8", end="", file=sys.stderr, flush=True)


class Sample:
    """A text in the making: a prompt, and what has been generated after it."""

    def __init__(self, prompt: str | None, ids: list[int], args: argparse.Namespace) -> None:
        from persimmon import StreamDecoder
        self.prompt, self.prompt_ids, self.is_chat = prompt or "", ids, args.chat
        self.decoder = args.tokenizer and StreamDecoder(args.tokenizer, ids)
        self.stops = [stop for stop in (*args.stop, *["\n\nhuman:"] * args.chat) if stop]
        self.text, self.ids, self.logprobs = "", [], []
        self.ends = [0]  # length of the text before the first token, and after each
        self.finish_reason = "blank line" if prompt is None else None
        self.seed, self.figures, self.printed = None, None, 0  # printed: of prompt and text

    def push(self, token: int, logprob: float, reason: str | None) -> None:
        """Add a token, and `generate`'s reason to stop there; a stop text is another reason."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        if self.decoder:
            self.text += self.decoder.push(token) + (self.decoder.finish() if reason else "")
        starts = [self.text.find(stop, max(0, self.ends[-1] - len(stop))) for stop in self.stops]
        self.ends.append(len(self.text))
        if found := [start for start in starts if start >= 0]:
            self.text, reason = self.text[: min(found)], "stop"
        self.finish_reason = reason

    def news(self) -> str:
        """What can be printed since the last call: not what may be the beginning of a stop text."""
        cut = [n for s in self.stops for n in range(1, len(s)) if self.text.endswith(s[:n])]
        text = self.text[: len(self.text) - max(cut, default=0)]
        if self.finish_reason:
            text = self.text = text.rstrip() if self.is_chat else self.text
        text = text.strip() if self.is_chat else self.prompt + text
        new = (text + "\n" * bool(self.finish_reason))[self.printed :]
        self.printed += len(new)
        return new


def write(model: PersimmonForCausalLM, samples: list[Sample], args: argparse.Namespace,
          show: Callable[[], None], cache: KVCache | None = None) -> None:
    """Generate samples side by side until all have ended or Ctrl-C; calls show() as they grow."""
    import torch
    from persimmon import engine_for, generate
    T = max(len(sample.prompt_ids) for sample in samples)
    padding = [T - len(sample.prompt_ids) for sample in samples]
    ids = torch.tensor([[0] * n + sample.prompt_ids for n, sample in zip(padding, samples)])
    mask = torch.tensor([[0] * n + [1] * (T - n) for n in padding])
    steps = generate(model, ids, mask, **args.sampling, seed=args.seed, cache=cache,
                     stop_ids=() if args.ignore_eos or args.random else None)
    read, ends = int(mask.sum()) - (cache.length if cache else 0), []  # seconds and tokens so far
    progress(args, f"reading {read} tokens ...")
    start = time.perf_counter()
    try:
        for step in steps:
            seconds = time.perf_counter() - start
            for sample, *values in zip(samples, *step):
                if sample.finish_reason is None:
                    sample.push(*values)
            if not ends:
                progress(args)
            ends.append((seconds, sum(len(sample.ids) for sample in samples)))
            show()
            if all(sample.finish_reason for sample in samples):
                break
            if len(ends) == 1:  # what takes long, and is of use for the tokens that follow
                engine_for(model).prepare(lambda x: progress(args, f"laying out weights {x:.0%}"))
                progress(args)
                start = time.perf_counter() - seconds
    except KeyboardInterrupt:
        progress(args)
        for sample in samples:
            sample.finish_reason = sample.finish_reason or "Ctrl-C"
    first, speed, is_cuda = ends[0][0] if ends else 0.0, 0.0, model.lm_head.weight.is_cuda
    if len(ends) > is_cuda + 1:  # CUDA's second token is slow: a graph is captured
        speed = (ends[-1][1] - ends[is_cuda][1]) / (ends[-1][0] - ends[is_cuda][0])
    figures = {"prompt_tokens": read, "prompt_tokens_per_second": read / first if ends else 0.0,
               "seconds_to_first_token": first, "tokens": sum(len(s.ids) for s in samples),
               "tokens_per_second": speed, "peak_gigabytes": peak_memory(is_cuda) / 1e9}
    for sample in samples:
        sample.seed, sample.figures = args.seed, {k: round(v, 3) for k, v in figures.items()}
        args.seed += 1
    show()
    if not args.quiet:
        reasons = ", ".join(sorted({sample.finish_reason for sample in samples}))
        print("read {} tokens at {:.1f} tok/s, first token after {:.2f} s\nwrote {} at {:.1f} tok/s"
              ", peak memory {:.2f} GB, ".format(*figures.values()), end="", file=sys.stderr)
        print(f"seed {samples[0].seed}, ended by {reasons}", file=sys.stderr)


def peak_memory(is_cuda: bool) -> float:
    """The most bytes this process has had: on a GPU what PyTorch took there; 0 if unknown."""
    if is_cuda:
        import torch
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):  # Linux, where ru_maxrss begins with that of the parent process
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    with suppress(ImportError):  # Windows has no resource
        import resource
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return resident if sys.platform == "darwin" else 1024 * resident
    return 0.0


def chat(model: PersimmonForCausalLM, args: argparse.Namespace) -> int:
    """Talk until /exit or the end of input. A turn costs its own tokens only: the cache holds the
    conversation, in the tokens that the model wrote."""
    from persimmon import chat_prompt, engine_for
    limit = min(args.ctx_size or 2**28, model.config.max_position_embeddings)
    note = lambda text: print(f"({text})", file=sys.stderr, flush=True)  # noqa: E731
    cache, encode = engine_for(model).make_cache(1, limit), args.tokenizer.encode
    turns: list[str] = []  # human, adept, human, ...
    ids: list[int] = []  # of the turns; empty if those do not end where a token ends

    def answer(line: str) -> None:
        nonlocal turns, ids
        # SentencePiece puts a space in front of a text: what continues one is encoded after an x.
        x, new = (encode(text, False) for text in ("x", f"x\n\nhuman: {line}\n\nadept:"))
        known, new, kept = len(ids) * (new[: len(x)] == x), ids + new[len(x) :], turns
        while not known or (kept and len(new) + min(args.max_new_tokens, limit // 4) > limit):
            known, kept = -1, kept[2:] if known else kept
            new = encode(chat_prompt([*kept, line]), args.add_bos)
        if len(new) >= limit:
            return note(f"that is too long: {len(new)} tokens, and the context is {limit}")
        if dropped := (len(turns) - len(kept)) // 2:
            note(f"the context of {limit} tokens is full: the first {dropped} answers are dropped")
        cache.crop(min(cache.length, max(known, 0)))
        s = Sample("", new, args)
        write(model, [s], args, lambda: print(s.news(), end="", flush=True), cache)
        turns = [*kept, line, s.text]
        ids = new + s.ids[: s.ends.index(len(s.text))] if len(s.text) in s.ends else []

    if is_terminal := sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):  # Windows
            import readline  # input() can then be edited, and be longer than 4096 bytes
            readline.parse_and_bind("set enable-bracketed-paste on")
        note(CHAT_HELP)
    while True:
        try:
            line = input("> " if is_terminal else "")
            while line.endswith("\\"):
                line = line[:-1] + "\n" + input("  " if is_terminal else "")
            line.encode()  # UnicodeError
            word = (line.split() or [""])[0]
            if word == "/exit":
                return 0
            if word == "/reset":
                turns, ids = [], []
            if re.fullmatch(r"/\w*", word):
                replies = {"/reset": "forgotten", "/help": CHAT_HELP}
                note(replies.get(word, f"there is no {word}: /help lists what there is"))
            elif word:
                answer(line.strip())
        except EOFError:
            print(end="\n" * is_terminal, file=sys.stderr)
            return 0
        except KeyboardInterrupt:
            note("/exit leaves")
        except UnicodeError:
            note("that line is not UTF-8")


def random_model(layers: int, density: float, dtype: str, device: str, quantize: str | None = None,
                 progress: Callable[[float], None] = float) -> PersimmonForCausalLM:
    """An 8B with so many layers, all with the same random weights, and biases that leave the part
    `density` of the MLP's activations nonzero."""
    import torch
    from persimmon import PersimmonConfig, PersimmonForCausalLM, quantize_model
    config = PersimmonConfig(num_hidden_layers=layers)
    with torch.device("meta"):
        model = PersimmonForCausalLM(config).to(getattr(torch, dtype.replace("auto", "bfloat16")))
    first, *others = model.model.layers
    for part in model.lm_head, model.model.final_layernorm, first:
        part.to_empty(device=device).apply(lambda m: getattr(m, "reset_parameters", bool)())
    row = torch.randn_like(model.lm_head.weight[:1]).expand(config.vocab_size, -1)  # one for all
    model.model.embed_tokens.weight = torch.nn.Parameter(row, requires_grad=False)
    bias = NormalDist(0, 3**-0.5).inv_cdf(density)  # W x has this spread where x is normalized
    torch.nn.init.constant_(first.mlp.dense_h_to_4h.bias, bias)
    if quantize is not None:
        quantize_model(model, quantize)
    for done, block in enumerate(others, start=2):
        block.to_empty(device=device).load_state_dict(first.state_dict())
        progress(done / layers)
    return model.eval()


def run(args: argparse.Namespace) -> int:
    """Load the model, and complete or chat; the exit code."""
    prompts = [] if args.chat else read_prompts(args)
    source, new = str(args.model), f"{args.model.stem}-safetensors"
    convert = f"`python convert.py {source} {new}` and `python sample.py -m {new}`"
    if args.model.is_file():
        raise ValueError(f"{source} is no folder of safetensors: run {convert}")
    if not args.model.exists() and re.fullmatch(r"[\w-]+/[\w.-]+", source):
        raise ValueError(f"there is no folder {source}: if the hub has it, run "
                         f"`hf download {source} --local-dir {source}`, {convert}")
    progress(args, "loading ...")
    import torch
    from persimmon import PersimmonForCausalLM, Tokenizer, check_options
    if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    args.seed = random.randrange(10**6) if args.seed is None else args.seed
    check_options(**args.sampling, seed=args.seed)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(f"--device {device} is not available on this machine") from None
    options = {"dtype": args.dtype, "device": device, "quantize": args.quantize,
               "progress": lambda part: progress(args, f"loading {part:.0%} ...")}
    if args.random:
        model = random_model(int(args.random[3:] or 36), args.density, **options)
    else:
        model = PersimmonForCausalLM.from_pretrained(source, **options)
    model.fast, args.tokenizer = not args.plain, None if args.random else Tokenizer(source)
    size = sum(p.nbytes for p in model.parameters())
    if args.threads or (size < SMALL and __name__ == "__main__"):
        torch.set_num_threads(args.threads or 1)
    progress(args)
    if args.chat:
        return chat(model, args)
    samples, shown = [], 0
    for text in prompts:  # with random weights, each byte is a token
        ids = [*(text or "").encode(errors="replace")]
        ids = args.tokenizer.encode(text or "", args.add_bos) if args.tokenizer else ids
        samples += [Sample(text, ids, args) for _ in range(args.num_samples)]

    def show() -> None:
        """Print what is new: text as it grows, an object once its group is done."""
        nonlocal shown
        for sample in samples[shown:] if args.json or not args.random else []:
            print("" if args.json else sample.news(), end="", flush=True)
            if sample.figures is None and sample.finish_reason != "blank line":
                return
            shown += 1
            line = json.dumps({name: vars(sample)[name] for name in FACTS}) + "\n"
            end = "\n---\n\n" * (shown < len(samples))
            print(line if args.json else end, end="", flush=True)

    waiting = [sample for sample in samples if not sample.finish_reason]
    for at in range(0, len(waiting), ROWS):
        write(model, waiting[at : at + ROWS], args, show)
        if any(sample.finish_reason == "Ctrl-C" for sample in waiting):
            return 130
    show()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; an error is one sentence, and 2."""
    try:
        return run(parse(argv))
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, FloatingPointError, ImportError, RecursionError) as error:
        text = str(error)
    except (RuntimeError, MemoryError) as error:
        text = f"{error} {error.__context__}"  # while a CUDA graph is captured, that has the reason
        if type(error) is RuntimeError and not re.search("out of memory|allocate memory", text):
            raise
        text = "out of memory: try --quantize, or less --ctx-size, --max-tokens or --num-samples"
    text = re.sub(r"\S{200,}", lambda word: word[0][:80] + "...", " ".join(text.split()))
    print("\x1b[J" * sys.stderr.isatty() + f"sample.py: error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":  # settings of a process of its own, some from before torch is imported
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `sample.py | head` ends as usual
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules are imported, Ctrl-C just ends
    sys.stdin, sys.stderr = sys.stdin or open(os.devnull), sys.stderr or open(os.devnull, "w")
    if sys.stdout is None:
        sys.exit(print("sample.py: error: standard output is closed", file=sys.stderr) or 2)
    sys.stdout.reconfigure(encoding="utf-8")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages, which are quicker to fill
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
