"""Write text with a Persimmon model: `python sample.py` uses the small one in tiny/, `--model FOLDER` any other.

The text goes to stdout as it is made, everything else to stderr. Exit codes: 0, 2 for a wrong argument or a damaged
file, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; no option has a meaning that depends on another one."""
    parser = Parser(description="Write text with a Persimmon model.")
    add = parser.add_argument
    add("prompt", nargs="?", default="ROMEO:\n", help="text to continue; - reads it from standard input, less one line "
        "break at the end (default: %(default)r)")
    add("--model", metavar="FOLDER", type=Path, default=Path(__file__).resolve().parent / "tiny",
        help="config.json, safetensors and tokenizer.model (default: tiny/, 5 million parameters of Shakespeare)")
    add("-n", "--max-tokens", metavar="N", type=int, default=200, help="tokens to write at most (default: %(default)s)")
    add("--temp", metavar="T", type=float, default=0.8, help="temperature; 0 takes the likeliest (default: %(default)s)")
    add("--top-k", metavar="K", type=int, default=0, help="choose among the K likeliest; 0 is all (default: %(default)s)")
    add("--top-p", metavar="P", type=float, default=0.95,
        help="choose among the likeliest that have P together; 1 is all (default: %(default)s)")
    add("--min-p", metavar="P", type=float, default=0.0,
        help="choose among those at least P times as likely as the likeliest (default: %(default)s)")
    add("--seed", type=int, help="same seed, same text (default: another one each time, shown at the end)")
    add("--num-samples", metavar="N", type=int, default=1, help="texts to write, the k-th with seed + k - 1")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto",
        help="of weights and arithmetic (default: as config.json has it)")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: cuda where there is one, else cpu)")
    add("--threads", metavar="N", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--no-bos", action="store_true", help="do not put |ENDOFTEXT| in front of the prompt")
    add("--ignore-eos", action="store_true", help="go on after |ENDOFTEXT|")
    add("--quiet", action="store_true", help="no figures at the end")
    args = parser.parse_args(argv)
    if args.num_samples < 1 or (args.threads is not None and args.threads < 1):
        parser.error("--num-samples and --threads have to be 1 or more")
    return args


def peak_memory(device: str) -> str:
    """The most memory this process has had, in GB: resident, and on a GPU what PyTorch took there."""
    import torch

    if device.startswith("cuda"):
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB on the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"


def run(args: argparse.Namespace) -> int:
    """Load, generate, print; the exit code."""
    if args.prompt == "-":
        try:
            args.prompt = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not UTF-8: {error.reason} at byte {error.start}") from None
    import torch

    from persimmon import PersimmonForCausalLM, StreamDecoder, Tokenizer, generate

    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {device} is not to be had here") from None
    seed = random.randrange(2**32) if args.seed is None else args.seed
    model = PersimmonForCausalLM.from_pretrained(args.model, args.dtype, device)
    tokenizer = Tokenizer(args.model)
    prompt = tokenizer.encode(args.prompt, add_bos=False if args.no_bos else None)

    start = time.perf_counter()
    if is_terminal := sys.stderr.isatty() and not args.quiet:
        print(f"reading {len(prompt)} tokens ...", end="", file=sys.stderr, flush=True)
    steps = generate(
        model, torch.tensor([prompt] * args.num_samples), max_new_tokens=args.max_tokens, temperature=args.temp,
        top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=seed, stop_ids=() if args.ignore_eos else None,
    )  # fmt: skip
    # All samples are written at once, for the price of about one. The first is shown as it comes, the others wait.
    decoders = [StreamDecoder(tokenizer, prompt) for _ in range(args.num_samples)]
    waiting = [args.prompt] * args.num_samples
    shown, count, passes, reasons = 0, 0, 0, [None] * args.num_samples
    first = start
    try:
        for step in steps:
            if passes == 0:
                first = time.perf_counter()
                if is_terminal:
                    print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            passes += 1
            for row, token in enumerate(step.tokens):
                if reasons[row] is None:
                    count += 1
                    waiting[row] += decoders[row].push(token)
                    if step.finish_reasons[row] is not None:
                        is_last = row == args.num_samples - 1
                        waiting[row] += decoders[row].finish() + ("\n" if is_last else "\n\n---\n\n")
            reasons = step.finish_reasons
            while shown < args.num_samples:
                print(waiting[shown], end="", flush=True)
                waiting[shown] = ""
                if reasons[shown] is None:
                    break
                shown += 1
    except KeyboardInterrupt:
        print()
        reasons, interrupted = ["Ctrl-C"], True
    else:
        interrupted = False
    end = time.perf_counter()

    if not args.quiet and passes:
        read = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
        rate = (passes - 1) / (end - first) if passes > 1 else 0.0
        report = (
            f"prompt     {len(prompt):6} tokens {len(prompt) / (first - start):9.1f} tok/s, first token after "
            f"{first - start:.2f} s\n"
            f"generated  {count:6} tokens {rate * count / passes:9.1f} tok/s, {rate * read / 1e9:.1f} GB/s of weights read\n"
            f"peak memory {peak_memory(device)}, seed {seed}, stopped by {', '.join(sorted(set(map(str, reasons))))}"
        )
        print(report, file=sys.stderr)
    return 130 if interrupted else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; errors become one sentence and exit code 2."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `sample.py | head` ends like any other command
    args = parse(argv)
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        return run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
