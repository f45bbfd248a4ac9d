"""python -m pyarch generate: a model answers, and what it took is printed."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .._instruments import Operators
from ..dispatch import BACKENDS, use_backend
from ..models import Llama, generate
from ..nn import DecoderBlock
from . import weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a GGUF file, a Hugging Face folder, or smollm2")
    parser.add_argument("--prompt", required=True, help="the user's message (with --raw: the text to continue)")
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the prompt as it stands")
    parser.add_argument("--max-tokens", type=int, default=256, help="at most this many new tokens (256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument("--top-k", type=int, help="sample among the k likeliest")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest that reach this probability together")
    parser.add_argument("--min-p", type=float, help="sample among those with this share of the likeliest's probability")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument("--cache-dtype", choices=[*DTYPES, "int8"],
                        help="of keys and values: as --dtype, or int8, rounded, in half bfloat16's memory")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="print the answer alone")
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `load` and `settings` read besides --model."""
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default: the cores)")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--dtype", choices=DTYPES, help="of activations and cache (float32; on a GPU bfloat16)")
    parser.add_argument(
        "--act-bits", type=int, choices=[8], help="round activations to int8 in matmuls (changes answers)"
    )
    parser.add_argument("--backend", choices=["auto", *BACKENDS], default="auto",
                        help="of every op; reference is plain PyTorch with dequantised weights")  # fmt: skip


@dataclass
class Run:
    """One generation: its tokens and what it took. Times in seconds."""

    prompt: int = 0
    tokens: list[int] = field(default_factory=list)
    first: float = 0.0
    total: float = 0.0

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second, up to the first new token."""
        return self.prompt / self.first if self.first else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first."""
        return (len(self.tokens) - 1) / (self.total - self.first) if len(self.tokens) > 1 else 0.0

    def stream(self, model: Llama, prompt: list[int], **options) -> Iterator[int]:
        """The tokens of `generate` as they come, timed on the way."""
        self.prompt = len(prompt)
        start = time.perf_counter()
        for token in generate(model, prompt, **options):
            self.total = time.perf_counter() - start
            self.first = self.first or self.total
            self.tokens.append(token)
            yield token


def dtype_of(args: argparse.Namespace) -> str:
    """--dtype, or the device's: GPU kernels of quantised weights take no float32."""
    return args.dtype or ("bfloat16" if torch.device(args.device).type == "cuda" else "float32")


def cache_dtype_of(args: argparse.Namespace) -> torch.dtype | None:
    """--cache-dtype, None for the model's own. Raises ValueError for one that its cache cannot have."""
    if args.cache_dtype not in (None, "int8", dtype_of(args)):
        raise ValueError(f"--cache-dtype: must be {dtype_of(args)} (as --dtype) or int8, not {args.cache_dtype}")
    return torch.int8 if args.cache_dtype == "int8" else None


def operators(model: Llama, prompt: list[int], **options) -> dict[str, str]:
    """The backend of each pyarch op in one more step of the model; an empty dict is plain PyTorch throughout."""
    with Operators() as seen:
        list(generate(model, prompt[-1:], max_tokens=1, **options))
    backends = dict(operator.name().removeprefix("pyarch::").rsplit("__", 1) for operator, _ in seen.calls)
    if whole := backends.pop("decoder_blocks", None):
        backends |= dict.fromkeys(DecoderBlock.OPS, whole)
    return dict(sorted(backends.items()))


def weight_bytes(model: torch.nn.Module) -> int:
    """Memory of the weights, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process had so far: resident, or on a GPU what torch allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def load(args: argparse.Namespace, name: str, quiet: bool = False):
    """(model, tokenizer) for --model. Raises ValueError or OSError with a message for the user."""
    from tqdm import tqdm

    def progress(layers):
        return tqdm(layers, desc="loading", unit="layer", leave=False, disable=True if quiet else None)

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads: must be at least 1, not {args.threads}")
        torch.set_num_threads(args.threads)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: {args.device} is not usable here, torch finds no CUDA device")
    path = weights.find() if name == "smollm2" else Path(name)
    if path is None:
        raise ValueError(f"--model smollm2: its weights are not here; {weights.HINT}")
    if not path.exists():
        raise ValueError(f"--model: {name} does not exist")
    options = dict(dtype=DTYPES[dtype_of(args)], device=args.device, act_bits=args.act_bits, progress=progress)
    from ..io import gguf, tokenizer

    if path.is_dir():
        return Llama.from_pretrained(path, **options), tokenizer.from_folder(path)
    file = gguf.load(path)
    tokens = tokenizer.from_gguf(file)
    return Llama.from_gguf(file, dequantize=args.backend == "reference", **options), tokens


def encode(tokenizer, text: str, raw: bool = False) -> list[int]:
    """The prompt's ids: the user's message in the chat template, or as it stands."""
    if raw:
        return tokenizer.encode(text)
    if tokenizer.chat_template is None:
        raise ValueError("--prompt: this model has no chat template; --raw continues the prompt as it stands")
    return tokenizer.encode(tokenizer.chat([{"role": "user", "content": text}]))


def report(run: Run, model: Llama, backends: dict[str, str], cache_dtype: torch.dtype | None = None) -> str:
    """What a run took, in a few lines."""
    cache = "" if cache_dtype is None else f"cache {str(cache_dtype).removeprefix('torch.')}, "
    on_gpu = model.device.type == "cuda"
    where = torch.cuda.get_device_name(model.device) if on_gpu else f"{torch.get_num_threads()} threads"
    used = ", ".join(f"{op} {backend}" for op, backend in backends.items()) or "plain PyTorch throughout"
    return (
        f"first token {run.first:.3f} s, prompt {run.prompt} tokens at {run.prompt_rate:.1f}/s, "
        f"decode {len(run.tokens)} tokens at {run.decode_rate:.1f}/s\n"
        f"weights {weight_bytes(model) / 1e6:.1f} MB, {cache}peak memory {peak_bytes(model.device) / 1e6:.0f} MB, "
        f"{where}\nbackends: {used}"
    )


def main(args: argparse.Namespace) -> int:
    """Exit status: 0; 2 for a bad model file or option; 130 after Ctrl-C."""
    try:
        with use_backend(args.backend):
            cache_dtype = cache_dtype_of(args)
            model, tokenizer = load(args, args.model, args.quiet)
            prompt = encode(tokenizer, args.prompt, args.raw)
            run, pieces = Run(), tokenizer.stream(continues=args.raw)
            options = {k: getattr(args, k) for k in ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed")}
            try:
                for token in run.stream(model, prompt, stop=tokenizer.eos_ids, cache_dtype=cache_dtype, **options):
                    print(pieces.push(token), end="", flush=True)
            finally:
                if run.tokens:
                    print(pieces.end(), flush=True)
            if not args.quiet:
                backends = operators(model, prompt, cache_dtype=cache_dtype)
                print(report(run, model, backends, cache_dtype), file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        print(f"pyarch generate: {error}; pip install 'pyarch-kernels[models]'", file=sys.stderr)
        return 2
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        print(f"pyarch generate: {error}", file=sys.stderr)
        return 2
    return 0
