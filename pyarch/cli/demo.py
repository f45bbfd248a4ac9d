"""python -m pyarch demo: SmolLM2 answers twice, through pyarch and through plain PyTorch, side by side.

Each side runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from ..dispatch import use_backend
from ..models import perplexity
from . import generate

SIDES = {"pyarch": "auto", "plain PyTorch": "reference"}
PROMPT = "What is the capital of France, and what is it known for?"
SENTENCE = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief"
)  # Dickens, A Tale of Two Cities


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="a GGUF file, a Hugging Face folder, or smollm2")
    parser.add_argument("--prompt", default=PROMPT, help="the user's message")
    parser.add_argument("--max-tokens", type=int, default=64, help="at most this many new tokens (64)")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)  # one side, as JSON: what demo runs
    generate.add_model_arguments(parser)


def side(args: argparse.Namespace) -> dict:
    """One side's figures. The model answers once before the run that is measured."""
    with use_backend(args.backend):
        model, tokenizer = generate.load(args, args.model)
        prompt = generate.encode(tokenizer, args.prompt)
        list(generate.Run().stream(model, prompt, max_tokens=4))
        run = generate.Run()
        tokens = list(run.stream(model, prompt, max_tokens=args.max_tokens, stop=tokenizer.eos_ids))
        return {
            "tokens": tokens,
            "text": tokenizer.decode(tokens),
            "rows": {
                "time to first token": f"{run.first * 1e3:.0f} ms",
                "prompt": f"{run.prompt_rate:.1f} tokens/s",
                "decode": f"{run.decode_rate:.1f} tokens/s",
                "weights": f"{generate.weight_bytes(model) / 1e6:.1f} MB",
                "peak memory": f"{generate.peak_bytes(model.device) / 1e6:.0f} MB",
                "perplexity": f"{perplexity(model, tokenizer.encode(SENTENCE)):.4f}",
            },
            "backends": generate.operators(model, prompt),
        }


def main(args: argparse.Namespace) -> int:
    """Exit status: 0 if both sides gave the same tokens, or in 16 bits, where plain PyTorch rounds the weights too and
    may choose another; 1 if not, 2 if one could not run, 130 after Ctrl-C."""
    try:
        if args.side:
            print(json.dumps(side(args)))
            return 0
        options = ["--model", args.model, "--prompt", args.prompt, "--max-tokens", str(args.max_tokens), "--device",
                   args.device, "--dtype", generate.dtype_of(args)]  # fmt: skip
        options += [f"--threads={args.threads}"] if args.threads else []
        results = {}
        for name, backend in SIDES.items():
            own = ["--act-bits=8"] if args.act_bits and backend == "auto" else []
            command = [sys.executable, "-m", "pyarch", "demo", "--side", "--backend", backend, *options, *own]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                return done.returncode
            results[name] = json.loads(done.stdout)
    except KeyboardInterrupt:
        return 130
    except (ImportError, OSError, ValueError, TypeError, RuntimeError) as error:
        print(f"pyarch demo: {error}", file=sys.stderr)
        return 2
    ours, plain = results.values()
    print(f"> {args.prompt}\n{ours['text']}\n")
    print(f"{'':22}" + "".join(f"{name:>20}" for name in results))
    for row in ours["rows"]:
        print(f"{row:22}" + "".join(f"{r['rows'][row]:>20}" for r in results.values()))
    equal, exact = ours["tokens"] == plain["tokens"], generate.dtype_of(args) == "float32"
    verdict = f"yes, all {len(plain['tokens'])}" if equal else "NO" if exact else "no, both rounded"
    print(f"{'tokens equal':22}{verdict:>20}")
    print("backends of pyarch: " + ", ".join(f"{op} {backend}" for op, backend in ours["backends"].items()))
    if not equal:
        print(f"plain PyTorch said:\n{plain['text']}")
    return 0 if equal or not exact else 1
