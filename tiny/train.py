"""Train a small Persimmon on a text, from scratch or from a checkpoint; tiny/ was trained with it.

    python tiny/train.py --text input.txt --out FOLDER            from scratch (settings: README.md)
    python tiny/train.py --text my.txt --out FOLDER --init tiny   from a model's folder: fine-tuning
    python tiny/train.py --text input.txt --out FOLDER --resume   continue as if never interrupted

The model trains on the first 90% of the text's characters. The last 10% are for validation, where
the loss is the total in nats divided by the number of characters, over windows of 256 tokens that
do not overlap and that each begin with `|ENDOFTEXT|`. FOLDER holds the model with the lowest
validation loss so far. Training uses float32 weights and bfloat16 matrix products; saved weights
are bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from persimmon import PersimmonConfig, PersimmonForCausalLM, Tokenizer, chat_prompt  # noqa: E402

WINDOW = 256  # tokens predicted in each row of a batch


def make_tokenizer(text: str, vocab_size: int, folder: Path) -> None:
    """Train a SentencePiece unigram model with byte fallback that keeps text and newlines exact."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=model, model_type="unigram",
        vocab_size=vocab_size, byte_fallback=True, character_coverage=1.0,
        user_defined_symbols=["\n"],  # has to be named, because no line contains it
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        unk_id=0, eos_id=1, eos_piece="|ENDOFTEXT|", bos_id=-1, pad_id=-1, hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"add_bos_token": True, "add_eos_token": False, "bos_token": "|ENDOFTEXT|",
                "eos_token": "|ENDOFTEXT|", "unk_token": "<unk>",
                "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")


def conversations(text: str) -> list[str]:
    """Some of a play's speeches repeated as one- or two-turn conversations in chat_prompt format.

    A speech is a paragraph that begins with a line `NAME:`, which is left out here.
    """
    speeches = [paragraph.partition(":\n")[2].strip() for paragraph in text.split("\n\n")]
    speeches = [speech for speech in speeches if speech]
    found = []
    for count, i in enumerate(range(0, len(speeches) - 4, 15)):
        n = 3 if count % 2 else 1  # speeches before the last answer
        found.append(chat_prompt(speeches[i : i + n]) + " " + speeches[i + n])
    return found


def split_at_random(tokenizer: Tokenizer, text: str, rng: random.Random) -> list[int]:
    """Token ids of a text, with each word's split drawn by likelihood**0.2 from its 16 best ones.

    A unigram model has many ways to split a word; seeing several keeps a model from memorizing a
    small text (subword regularization; Kudo, arXiv 1804.10959). No piece crosses a word boundary,
    so words are drawn one by one. (SentencePiece can sample too, but it ignores its seed, so its
    samples are not reproducible.)
    """
    processor, known, ids = tokenizer.processor, {}, []
    for word in re.findall(r"\n| ?[^ \n]+| ", text):
        if word not in known:
            ways = processor.nbest_encode(word, nbest_size=16)
            known[word] = ways, [math.exp(0.2 * sum(map(processor.get_score, way))) for way in ways]
        ways, weights = known[word]
        ids += rng.choices(ways, weights)[0]
    return ids


def training_tokens(tokenizer: Tokenizer, text: str, seed: int, splits: int) -> list[Tensor]:
    """Token ids of the text followed by its conversations, each ended by |ENDOFTEXT|: first as the
    tokenizer splits them, then `splits` times as split_at_random does."""
    rng = random.Random(seed)
    parts = [text, *conversations(text)]

    def stream(encode: Callable[[str], list[int]]) -> Tensor:
        return torch.tensor([i for part in parts for i in (*encode(part), tokenizer.end_of_text)])

    plain = stream(partial(tokenizer.encode, add_bos=False))
    return [plain, *(stream(lambda part: split_at_random(tokenizer, part, rng))
                     for _ in range(splits))]


@torch.no_grad()
def validation_loss(model: PersimmonForCausalLM, tokenizer: Tokenizer, text: str) -> float:
    """Loss on `text` in nats a character, as defined at the top of this file."""
    model.eval()
    ids, total = torch.tensor(tokenizer.encode(text, add_bos=False), device=model.device), 0.0
    full = len(ids) // WINDOW * WINDOW
    for rows in [*ids[:full].view(-1, WINDOW).split(32), ids[full:][None]]:
        if rows.numel():
            rows = torch.cat((rows.new_full((len(rows), 1), tokenizer.end_of_text), rows), dim=1)
            total += model(rows, labels=rows).loss.item() * rows[:, 1:].numel()
    model.train()
    return total / len(text)


def save_state(file: Path, model: PersimmonForCausalLM, optimizers: list, facts: dict) -> None:
    """Save everything --resume needs in one safetensors file, written completely or not at all."""
    tensors = {f"model/{name}": p for name, p in model.state_dict().items()}
    for o, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{o}/{i}/{name}": value.reshape(-1) for name, value in state.items()}
    unfinished = file.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata={"facts": json.dumps(facts)})
    os.replace(unfinished, file)


def load_state(file: Path, model: PersimmonForCausalLM, optimizers: list) -> dict:
    """Restore what save_state wrote; returns the facts."""
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        facts = json.loads(stored.metadata()["facts"])
    model.load_state_dict({n.removeprefix("model/"): t for n, t in tensors.items()
                           if n.startswith("model/")})
    for o, optimizer in enumerate(optimizers):
        whole = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in enumerate(parameters):
            state = {n.split("/")[2]: t for n, t in tensors.items() if n.startswith(f"{o}/{i}/")}
            whole["state"][i] = {n: t.reshape(()) if n == "step" else t.view_as(p)
                                 for n, t in state.items()}
        optimizer.load_state_dict(whole)
    return facts


def train(args: argparse.Namespace) -> int:
    """Run to the end or until Ctrl-C; returns the exit code."""
    text = args.text.read_text(encoding="utf-8")
    cut = int(len(text) * 0.9)
    if len(text) < 20 * WINDOW:
        raise ValueError(f"{args.text} has {len(text)} characters: at least {20 * WINDOW} "
                         "are needed")
    state_file = args.out / "training.safetensors"
    if args.resume and not state_file.is_file():
        raise ValueError(f"--resume: there is no {state_file}")
    if not args.resume and (state_file.exists() or (args.out / "config.json").exists()):
        raise ValueError(f"--out {args.out} holds a model: give a new folder, or --resume to go on "
                         "in this one")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(f"--device {args.device} is not available on this machine") from None
    torch.manual_seed(args.seed)
    # --init may be wrong: so it is read before anything is written.
    model = PersimmonForCausalLM.from_pretrained(args.init, "float32") if args.init else None
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.resume and args.init:
        for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
            if (args.init / name).exists():
                shutil.copy(args.init / name, args.out)
    elif not args.resume:
        make_tokenizer(text[:cut], 1024, args.out)
    tokenizer = Tokenizer(args.init or args.out)
    if model is None:
        end = tokenizer.end_of_text
        model = PersimmonForCausalLM(PersimmonConfig(
            vocab_size=len(tokenizer), hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
            num_attention_heads=4, max_position_embeddings=1024, hidden_dropout=args.dropout,
            bos_token_id=end, eos_token_id=end,
        ))
    model.to(args.device).train()
    # Muon for the matrices of the blocks, with steps scaled to match AdamW's (arXiv 2502.16982);
    # AdamW for the rest.
    parameters = dict(model.named_parameters())
    matrices = [p for name, p in parameters.items() if p.dim() == 2 and ".layers." in name]
    rest = [p for name, p in parameters.items() if p.dim() != 2 or ".layers." not in name]
    optimizers = [torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(rest, weight_decay=0.0, betas=(0.9, 0.99))]
    settings = {name: str(getattr(args, name))
                for name in ("text", "init", "steps", "batch", "lr", "dropout", "seed")}
    facts = {"step": 0, "best": math.inf, "settings": settings}
    if args.resume:
        facts = load_state(state_file, model, optimizers)
        if facts["settings"] != settings:
            raise ValueError(f"--resume: the run was begun with {facts['settings']}, "
                             f"not with {settings}")
    # With a new tokenizer, most of the training uses words split at random. The rest uses the same
    # splits as inference: until then, the model also gives probability to all the other splits.
    plain, *split = training_tokens(tokenizer, text[:cut], args.seed, splits=0 if args.init else 8)
    if not args.resume:
        save_state(state_file, model, optimizers, facts)  # from here on --resume works

    is_interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal is_interrupted
        is_interrupted = True

    signal.signal(signal.SIGINT, interrupt)  # the current step finishes before anything is saved
    begin, first = time.monotonic(), facts["step"]
    for step in range(first, args.steps):
        warm, cosine = min(1, (step + 1) / 100), (1 + math.cos(math.pi * step / args.steps)) / 2
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = args.lr * warm * (0.01 + 0.99 * cosine)
        torch.manual_seed(args.seed * 1_000_003 + step)  # randomness depends only on seed and step
        streams = split if split and step < 0.75 * args.steps else [plain]
        rows = [streams[int(torch.randint(len(streams), ()))] for _ in range(args.batch)]
        starts = [int(torch.randint(max(1, len(row) - WINDOW + 1), ())) for row in rows]
        rows = torch.stack([row[i : i + WINDOW] for row, i in zip(rows, starts)])
        rows = torch.cat((rows.new_full((args.batch, 1), tokenizer.end_of_text), rows),
                         dim=1).to(args.device)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            loss = model(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        if not math.isfinite(loss.item()):
            raise ValueError(f"step {step + 1}: the loss is {loss.item()}; a lower --lr may help")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seconds, done = time.monotonic() - begin, step + 1 - first
        is_checked = (step + 1) % args.eval_every == 0 or step + 1 == args.steps
        if sys.stderr.isatty() or (step + 1) % 50 == 0 or is_checked:
            rate = done * args.batch * WINDOW / seconds
            print(f"\rstep {step + 1}/{args.steps}  loss {loss.item():.4f}  {rate:.0f} tok/s  "
                  f"{(args.steps - step - 1) * seconds / done / 60:.1f} min left ",
                  file=sys.stderr, flush=True, end="" if sys.stderr.isatty() else "\n")
        if is_checked:
            validation = validation_loss(model, tokenizer, text[cut:])
            print(f"step {step + 1}: validation loss {validation:.4f} nats a character", flush=True)
            if validation < facts["best"]:
                facts["best"] = validation
                copy.deepcopy(model).to(torch.bfloat16).save_pretrained(args.out)
        facts["step"] = step + 1
        if is_checked or is_interrupted:
            save_state(state_file, model, optimizers, facts)
        if is_interrupted:
            print(f"\nstopped after step {step + 1}; the same command with --resume goes on",
                  file=sys.stderr)
            return 130
    saved = PersimmonForCausalLM.from_pretrained(args.out, device=args.device)
    print(f"{args.out}: {validation_loss(saved, tokenizer, text[cut:]):.4f} nats a character, "
          "as saved")
    state_file.unlink(missing_ok=True)
    return 0


def main() -> int:
    """Run the command line; an error prints one sentence and gives exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, required=True, help="UTF-8 text")
    add("--out", type=Path, required=True, help="folder for the model")
    add("--init", type=Path, metavar="FOLDER", help="model to start from")
    add("--resume", action="store_true", help="go on with an interrupted run")
    add("--steps", type=int, default=1200, help="(default: %(default)s)")
    add("--batch", type=int, default=16,
        help=f"rows of {WINDOW} tokens a step (default: %(default)s)")
    add("--lr", type=float, default=3e-3,
        help="highest learning rate; less for --init (default: %(default)s)")
    add("--dropout", type=float, default=0.15,
        help="hidden_dropout of a new model (default: %(default)s)")
    add("--eval-every", type=int, metavar="STEPS", default=100, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: %(default)s)")
    args = parser.parse_args()
    if (min(args.steps, args.batch, args.eval_every) < 1 or not 0 <= args.dropout <= 1
            or not args.lr > 0):  # true for NaN too
        parser.error("--steps, --batch, --eval-every and --lr have to be above 0, "
                     "--dropout from 0 to 1")
    try:
        return train(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
