"""usage: python sample.py [-h] [PROMPT] [options]

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
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing torch takes seconds: --help and a wrong argument do not wait for it
    from persimmon import KVCache, PersimmonForCausalLM

PROCESSES = int(os.environ.get("WORLD_SIZE") or 1)  # under torchrun; a RANK may be a scheduler's
RANK = int(os.environ.get("RANK") or 0) if PROCESSES > 1 else 0
ROWS = 16  # texts written at once: a pass reads the same weights for all of them
CHAT_HELP = "/help, /reset forgets, /exit leaves, Ctrl-C interrupts, \\ continues a line"
SAMPLING = "max_new_tokens temperature top_k top_p min_p repetition_penalty".split()
FIGURES = ("read {prompt_tokens} tokens at {prompt_tokens_per_second:.1f} tok/s, first token after "
           "{seconds_to_first_token:.2f} s\nwrote {tokens} at {tokens_per_second:.1f} tok/s, "
           "peak memory {peak_gigabytes:.2f} GB, seed {seed}, ended by {reasons}")
OPTIONS = {  # heading: {names: (type or action; default; placeholder; help)}
    "what to write": {
        "-p --prompt": (str, None, "TEXT", r"text to continue, - for standard input [$'ROMEO:\n']"),
        "-f --file": (str, None, "FILE", "continue the text in FILE"),
        "--batch": (str, None, "FILE", "continue each line: text, JSON, or what --json wrote"),
        "--chat": ("store_true", False, "", "talk, in the format of Adept's chat model"),
        "-n --max-new-tokens --max-tokens": (int, 200, "N", "tokens at most; -1: no limit [200]"),
        "--num-samples": (int, 1, "N", "texts a prompt [1]"),
        "--stop": ("append", [], "TEXT", "end before TEXT; may be repeated"),
        "--no-bos": ("store_true", False, "", "do not put |ENDOFTEXT| in front of the prompt"),
        "--ignore-eos": ("store_true", False, "", "go on after |ENDOFTEXT|"),
        "--json": ("store_true", False, "", "a JSON object a text: prompt, ids, logprobs, ..."),
        "-q --quiet": ("store_true", False, "", "no figures and no progress")},
    "how to choose tokens": {
        "--temperature --temp": (float, 0.8, "T", "0 is greedy [0.8]"),
        "--top-k": (int, 40, "K", "among the K likeliest; 0: all, which is slower [40]"),
        "--top-p": (float, 0.95, "P", "among the likeliest that have P together [0.95]"),
        "--min-p": (float, 0.0, "P", "those at least P times as likely as the first [0]"),
        "--repetition-penalty --repeat-penalty": (float, 1.0, "X", "1 is off [1]"),
        "--seed": (int, None, "N", "same seed, same text; text k has N + k - 1 [random]")},
    "model and machine": {
        "-m --model": (Path, Path(__file__).with_name("tiny"), "FOLDER", "from convert.py [tiny/]"),
        "--dtype": (str, "auto", "TYPE", "bfloat16, float16, float32 [what config.json says]"),
        "--quantize": (str, None, "KIND", "int8 or int4, while loading; see also convert.py"),
        "--device": (str, None, "NAME", "cpu, cuda, cuda:1, mps [cuda if there is one]"),
        "-t --threads": (int, None, "N", "CPU threads [1 for a small model, else all cores]"),
        "-c --ctx-size": (int, None, "N", "tokens that --chat remembers [the model's context]"),
        "--plain": ("store_true", False, "", "run the model as written, with no faster ways"),
        "--random": (str, None, "8b[:L]", "random weights of the 8B's shape, L layers: no text"),
        "--density": (float, 0.5, "P", "with --random, activations that are not zero [0.5]")}}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises ValueError or ArgumentError for what is wrong with it."""
    parser, help_text = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False), __doc__
    parser.format_help = lambda: help_text
    parser.add_argument("text", nargs="?")
    for heading, options in OPTIONS.items():
        help_text += f"\n{heading}:\n"
        for names, (kind, default, placeholder, about) in options.items():
            how = {"action": kind} if isinstance(kind, str) else {"type": kind}
            parser.add_argument(*names.split(), default=default, **how)
            left = ", ".join(names.split()[: 1 if names.startswith("--") else 2])
            help_text += f"  {f'{left} {placeholder}':26}{about}\n"
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(f"{unknown[0]} is no option (see --help); a prompt of words needs quotes")
    if [args.text, args.prompt, args.file, args.batch, args.chat or None].count(None) < 4:
        raise ValueError("give only one of a prompt, --file, --batch and --chat")
    if args.chat and (args.json or args.num_samples > 1 or args.random):
        raise ValueError("--chat goes with none of --json, --num-samples and --random")
    if args.random and not re.fullmatch("8b(:[1-9][0-9]{0,2})?", args.random):
        raise ValueError(f"--random {args.random} is no shape: give 8b, or 8b:L for L layers")
    args.max_new_tokens = 2**28 if args.max_new_tokens == -1 else args.max_new_tokens
    for key, top in (("max_new_tokens", 2**28), ("num_samples", 9999), ("threads", 4096),
                     ("ctx_size", 2**28), ("density", 0.99)):
        if (value := getattr(args, key)) is not None and not 0 < value <= top:
            raise ValueError(f"--{key.replace('_', '-')} {value} is not above 0 and up to {top}")
    args.prompt = args.text if args.prompt is None else args.prompt
    args.stop = [stop for stop in (*args.stop, *["\n\nhuman:"] * args.chat) if stop]
    args.quiet |= RANK > 0  # under torchrun, process 0 speaks for all
    args.sampling, args.note = {name: getattr(args, name) for name in SAMPLING}, ""
    return args


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The texts to continue. ValueError for what is not UTF-8."""
    source = args.batch if args.file is None else args.file
    if source is None and args.prompt != "-":
        return ["ROMEO:\n" if args.prompt is None else args.prompt]
    data = sys.stdin.buffer.read() if source in ("-", None) else Path(source).read_bytes()
    text = data.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    prompts = [line for line in text.split("\n") if line.strip()] if args.batch else [text]
    for n, line in enumerate(prompts if args.batch else []):
        with suppress(ValueError, RecursionError):  # a line need not be JSON
            value = json.loads(line)
            value = value.get("prompt") if isinstance(value, dict) else value
            prompts[n] = value.encode().decode() if isinstance(value, str) else line
    return prompts


def shared(value: Any) -> Any:
    """The value that process 0 passes. Under torchrun, every process has to call this."""
    box = [value]
    if PROCESSES > 1:
        import torch
        torch.distributed.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def progress(args: argparse.Namespace, note: str = "") -> None:
    """Show in a terminal what goes on and how much of it is done, in place of the last note."""
    if sys.stderr.isatty() and not args.quiet and note != args.note:
        args.note = note
        # Save the cursor, switch line wrap off, ...: a note that scrolls would move the place.
        print(f"\x1b[J\x1b7\x1b[?7l{note}\x1b[?7h\x1b8", end="", file=sys.stderr, flush=True)


def visible(answer: argparse.Namespace, args: argparse.Namespace) -> str:
    """What can be printed of an answer: not what may be the beginning of a stop text."""
    text = answer.text
    if not answer.finish_reason or (args.chat and answer.finish_reason != "stop"):
        cut = [n for stop in args.stop for n in range(len(stop)) if text.endswith(stop[:n])]
        text = text[: len(text) - max(cut, default=0)]
    return text.strip() if args.chat else answer.prompt + text


def write(model: PersimmonForCausalLM, prompts: Sequence[str], args: argparse.Namespace,
          cache: KVCache | None = None) -> list[argparse.Namespace]:
    """Continue prompts side by side, printing the first as it grows. Returns what --json prints."""
    from persimmon import StreamDecoder, engine_for, generate
    answers = [argparse.Namespace(prompt=prompt, text="", ids=[], logprobs=[], finish_reason=None,
                                  seed=None, figures=None) for prompt in prompts]
    limit = model.config.max_position_embeddings  # more is refused, but decoding all takes minutes
    for answer in answers if args.batch else ():  # one long line does not stop the others
        if len(args.tokenizer.encode(answer.prompt)) >= limit:
            answer.finish_reason = "too long"
    growing = [answer for answer in answers if not answer.finish_reason]
    inputs = args.tokenizer([answer.prompt for answer in growing])  # input_ids and attention_mask
    decoders = [StreamDecoder(args.tokenizer, ids[:limit]) for ids in inputs["input_ids"].tolist()]
    steps = generate(model, **inputs, **args.sampling, seed=args.seed, cache=cache,
                     stop_ids=() if args.ignore_eos or args.random else None) if growing else ()
    read = int(inputs["attention_mask"].sum()) - (cache.length if cache else 0)
    shown, is_shown = "", not args.json and not args.random
    progress(args, f"reading {read} tokens ...")
    times, tokens = [time.perf_counter()], [0]  # written by then: at the start, after each step
    with suppress(KeyboardInterrupt):
        for step in steps:
            for answer, decoder, token, logprob, reason in zip(growing, decoders, *step):
                if not answer.finish_reason:
                    answer.ids.append(token)
                    answer.logprobs.append(logprob)
                    answer.text += decoder.push(token) + (decoder.finish() if reason else "")
                    if found := [n for n in map(answer.text.find, args.stop) if n >= 0]:
                        answer.text, reason = answer.text[: min(found)], "stop"
                    answer.finish_reason = reason
            times.append(time.perf_counter())
            tokens.append(sum(len(answer.ids) for answer in growing))
            progress(args, "" if is_shown else f"{tokens[-1]} tokens ...")
            if is_shown:
                before, shown = shown, visible(answers[0], args)
                print(shown[len(before) :], end="", flush=True)
            if all(answer.finish_reason for answer in growing):
                break
            if len(times) == 2:  # slow, of use for later tokens only, and not timed
                engine_for(model).prepare(lambda x: progress(args, f"laying out weights {x:.0%}"))
    progress(args)
    first = times[1] - times[0] if len(times) > 1 else 0.0
    speed = (tokens[-1] - tokens[2]) / (times[-1] - times[2]) if len(times) > 3 else 0.0
    figures = {"prompt_tokens": read, "prompt_tokens_per_second": read / first if first else 0.0,
               "seconds_to_first_token": first, "tokens": tokens[-1], "tokens_per_second": speed,
               "peak_gigabytes": peak_memory(model.device.type == "cuda") / 1e9}
    for n, answer in enumerate(growing):
        answer.finish_reason, answer.seed = answer.finish_reason or "Ctrl-C", args.seed + n
        answer.figures = {name: round(value, 3) for name, value in figures.items()}
    if args.json or is_shown:
        texts = [json.dumps(vars(a)) if args.json else visible(a, args) for a in answers]
        print(("\n" if args.json else "\n\n---\n\n").join(texts)[len(shown) :], flush=True)
    if not args.quiet:
        reasons = ", ".join(sorted({answer.finish_reason for answer in answers}))
        print(FIGURES.format(**figures, seed=args.seed, reasons=reasons), file=sys.stderr)
    args.seed = (args.seed + len(growing)) % 2**63
    return answers


def peak_memory(is_cuda: bool) -> float:
    """The most bytes this process has had: on a GPU what PyTorch took there; 0 if unknown."""
    if is_cuda:
        import torch
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, TypeError):  # Linux, where ru_maxrss begins with that of the parent
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    with suppress(ImportError):  # macOS; Windows has no such module
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 0.0


def complete(model: PersimmonForCausalLM, args: argparse.Namespace, prompts: list[str]) -> int:
    """Continue the prompts, ROWS at a time; the exit code."""
    prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
    for at in range(0, len(prompts), ROWS):
        print(end="\n---\n\n" * (at > 0 and not args.json and not args.random))
        answers = write(model, prompts[at : at + ROWS], args)
        if any(answer.finish_reason == "Ctrl-C" for answer in answers):
            return 130
    return 0


def chat(model: PersimmonForCausalLM, args: argparse.Namespace) -> int:
    """Talk until /exit or the end of input; the exit code."""
    from persimmon import chat_prompt, engine_for
    limit = min(args.ctx_size or 2**28, model.config.max_position_embeddings)
    cache = engine_for(model).make_cache(1, 1)
    turns, read = [], []  # human, adept, human, ...; the ids that the cache holds
    note = lambda text: RANK or print(f"({text})", file=sys.stderr, flush=True)  # noqa: E731

    def answer(line: str) -> None:
        """Let the model answer. Drops the oldest turns if the context has no room for that."""
        nonlocal turns, read, cache
        for first in range(0, len(turns) + 1, 2):
            prompt = chat_prompt([*turns[first:], line])
            ids = args.tokenizer.encode(prompt)
            if len(ids) + min(args.max_new_tokens, limit // 4) <= limit:
                break
        if len(ids) >= limit:
            raise ValueError(f"that is too long: {len(ids)} tokens, and the context is {limit}")
        if first:
            note(f"the context of {limit} tokens is full: {first // 2} answers are dropped")
        known = min(cache.length, len(os.path.commonprefix([read, ids[:-1]])))
        if (N := min(limit, len(ids) + args.max_new_tokens)) > cache.keys.shape[3]:
            # Not all at once: in large pages, an 8B's 9 GiB would be filled with the first token.
            wider = engine_for(model).make_cache(1, min(limit, 2 * N))
            wider.keys[..., :known, :] = cache.keys[..., :known, :]
            wider.values[..., :known, :] = cache.values[..., :known, :]
            cache = wider
        cache.crop(known)
        (new,) = write(model, [prompt], args, cache)
        turns, read = [*turns[first:], line, visible(new, args)], ids + new.ids

    if is_terminal := sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):  # Windows
            import readline  # input() can then be edited, and be longer than 4096 bytes
            readline.parse_and_bind("set enable-bracketed-paste on")
        note(CHAT_HELP)
    while True:
        try:
            line = "/exit"
            with suppress(EOFError):  # which ends a line too
                line = "" if RANK > 0 else input("> " if is_terminal else "")
                while line.endswith("\\"):
                    line = line[:-1] + "\n"
                    line += input("  " if is_terminal else "")
            line = shared(line).strip()
            word = re.match(r"\S*", line)[0]
            if word == "/exit":
                print(end="\n" * is_terminal, file=sys.stderr)
                return 0
            if word == "/reset":
                turns = []
            if re.fullmatch(r"/\w*", word):
                replies = {"/reset": "forgotten", "/help": CHAT_HELP}
                note(replies.get(word, f"there is no {word}: /help lists what there is"))
            elif word:
                answer(line)
        except KeyboardInterrupt:
            note("/exit leaves")
        except ValueError as error:  # a turn that is too long, or not UTF-8
            note(error)


def random_model(layers: int, density: float, dtype: str, device: str, quantize: str | None = None,
                 progress: Callable[[float], Any] = lambda done: None) -> PersimmonForCausalLM:
    """An 8B whose layers have the same random weights, and leave `density` of relu(x) nonzero."""
    import torch
    from persimmon import PersimmonConfig, PersimmonForCausalLM, as_dtype, quantize_model
    with torch.device("meta"):
        model = PersimmonForCausalLM(PersimmonConfig(num_hidden_layers=layers))
    model.to(as_dtype(dtype.replace("auto", "bfloat16")))
    first, *others = model.model.layers
    for part in model.lm_head, model.model.final_layernorm, first:
        part.to_empty(device=device).apply(lambda m: getattr(m, "reset_parameters", lambda: 0)())
    model.model.embed_tokens.weight = model.lm_head.weight
    bias = 3**-0.5 * torch.special.ndtri(torch.tensor(density)).item()  # 3**-0.5: spread of W x
    torch.nn.init.constant_(first.mlp.dense_h_to_4h.bias, bias)
    if quantize is not None:
        quantize_model(model, quantize)
    for n, block in enumerate(others, start=2):
        block.to_empty(device=device).load_state_dict(first.state_dict())
        progress(n / layers)
    return model.eval()


def load(args: argparse.Namespace) -> PersimmonForCausalLM:
    """The model that the command line asks for; sets args.tokenizer, the seed and the threads."""
    source, new = str(args.model), f"{args.model.stem}-safetensors"
    if not args.model.is_dir():
        is_at_hub = re.fullmatch(r"[\w-]+/[\w.-]+", source) and not args.model.exists()
        get = f"`hf download {source} --local-dir {source}` and " if is_at_hub else ""
        raise ValueError(f"there is no folder {source}: to make one of Adept's weights, run {get}"
                         f"`python convert.py {source} {new}`, then `python sample.py -m {new}`")
    progress(args, "loading ...")
    import torch
    from persimmon import PersimmonForCausalLM, Tokenizer, check_options
    args.seed = int.from_bytes(os.urandom(4), "big") % 10**6 if args.seed is None else args.seed
    check_options(**args.sampling, seed=args.seed)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if PROCESSES > 1 and device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    args.tokenizer = Tokenizer(source)
    args.tokenizer.add_bos &= not args.no_bos
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(f"--device {device} is not available on this machine") from None
    options = {"dtype": args.dtype, "quantize": args.quantize,
               "device": device if PROCESSES == 1 else "cpu",  # where each takes its share
               "progress": lambda part: progress(args, f"loading {part:.0%} ...")}
    warnings.filterwarnings("error", ".* to be trained")  # it has no lm_head, so it can't write
    model = (random_model(int(args.random[3:] or 36), args.density, **options) if args.random
             else PersimmonForCausalLM.from_pretrained(source, **options))
    if PROCESSES > 1:
        from persimmon import parallelize
        model = parallelize(model).to(device)
    model.fast = not args.plain
    if args.threads or __name__ == "__main__" and sum(p.nbytes for p in model.parameters()) < 64e6:
        torch.set_num_threads(args.threads or 1)  # a second one costs a small model time
    progress(args)
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; an error is one sentence, and 2."""
    try:
        args = parse(argv)
        prompts = [] if args.chat or RANK > 0 else read_prompts(args)
        model = load(args)
        prompts = shared(prompts)
        code = chat(model, args) if args.chat else complete(model, args, prompts)
        if PROCESSES > 1:
            import torch
            torch.distributed.destroy_process_group()
        return code
    except KeyboardInterrupt:
        print(end="\x1b[J" * sys.stderr.isatty(), file=sys.stderr)
        return 130
    except UnicodeDecodeError as error:
        text = f"the prompt is not UTF-8: {error.reason} at byte {error.start}"
    except (argparse.ArgumentError, ValueError, OSError, ArithmeticError, ImportError,
            Warning) as error:
        text = str(error)
    except (RuntimeError, MemoryError) as error:
        time.sleep(5 * (PROCESSES > 1))  # if it came from another's end, torchrun ends this one
        text = f"{error!r} {error.__context__!r}"  # while a graph is captured, that has the reason
        if not re.search("MemoryError|out of memory|allocate memory", text):
            raise
        text = "out of memory: try --quantize, or less --ctx-size, --max-tokens or --num-samples"
    time.sleep(5 * (RANK > 0))  # process 0 says it, and torchrun ends this one
    text = re.sub(r"\S{200,}", lambda word: word[0][:80] + "...", " ".join(text.split()))
    print("\x1b[J" * sys.stderr.isatty() + f"sample.py: error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":  # settings of a process of its own, some from before torch is imported
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `sample.py | head` ends as usual
    if PROCESSES > 1:  # others would wait, in the middle of a pass; readline has turned echo off
        signal.signal(signal.SIGINT, lambda *_: (os.system("stty sane 2>&-"), os._exit(130)))
    sys.stdin, sys.stderr = sys.stdin or open(os.devnull), sys.stderr or open(os.devnull, "w")
    if sys.stdout is None:
        sys.exit(print("sample.py: error: standard output is closed", file=sys.stderr) or 2)
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # for --chat
    sys.stdout.reconfigure(encoding="utf-8")
    sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w", encoding="utf-8")
    # Large pages fill sooner; waiting threads soon leave others the cores; caches have a bound.
    os.environ.update({"THP_MEM_ALLOC_ENABLE": "1", "GOMP_SPINCOUNT": "1000", **dict.fromkeys(
        ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"), "64"), **os.environ})
    sys.exit(main())
