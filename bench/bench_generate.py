"""Whole runs of generate on SmolLM2-135M against llama.cpp, on the same Q4_1 file and on a Q4_0 requantisation.

Needs the weights (make demo fetches them) and llama-cpp-python (make bench PEERS=llama compiles it); skipped without.
Greedy, one sequence. A prompt run is 512 tokens up to the first new one, a decode run 64 tokens after a
prompt of 16.
llama.cpp rounds activations to int8 itself, as act_bits=8 does; its loop is C calls, with no Python per operator.
"""

import ctypes
import functools
import time
from pathlib import Path

import pytest
import torch

from pyarch.cli import weights
from pyarch.models import Llama, generate

from ._contest import Entry, contest

Q4_0 = Path(__file__).parents[1] / ".cache" / "smollm2.Q4_0.gguf"
MODELS = {
    "float32": dict(dtype=torch.float32),
    "bfloat16": dict(dtype=torch.bfloat16),
    "act_bits=8": dict(dtype=torch.float32, act_bits=8),
}
PROMPT = [(i * 7919) % 49000 + 100 for i in range(512)]  # the arithmetic does not depend on what the text says


def _file() -> Path:
    return weights.find() or pytest.skip(f"no weights: {weights.HINT}")


class LlamaCpp:
    """llama.cpp on one file, through its C interface: no Python overhead but one call a token."""

    def __init__(self, path: Path) -> None:
        self.lib = llama_cpp = _library()
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # C keeps no reference
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = 1024, 512, 512
        self.context = llama_cpp.llama_init_from_model(model, options)
        self.sampler = llama_cpp.llama_sampler_init_greedy()

    def run(self, prompt: list[int], count: int) -> tuple[float, float]:
        """(seconds to the first token, seconds from there to the last)."""
        llama_cpp, threads = self.lib, torch.get_num_threads()
        llama_cpp.llama_set_n_threads(self.context, threads, threads)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        tokens = (llama_cpp.llama_token * len(prompt))(*prompt)
        times = []
        start = time.perf_counter()
        for _ in range(count):
            assert llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(tokens))) == 0
            token = llama_cpp.llama_sampler_sample(self.sampler, self.context, -1)
            tokens = (llama_cpp.llama_token * 1)(token)
            times.append(time.perf_counter() - start)
        return times[0], times[-1] - times[0]


def _library():
    return pytest.importorskip("llama_cpp", reason="make bench PEERS=llama")


def _requantized() -> Path:
    llama_cpp = _library()
    if not Q4_0.exists():
        Q4_0.parent.mkdir(exist_ok=True)
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
        half = Q4_0.with_suffix(".part")
        assert llama_cpp.llama_model_quantize(str(_file()).encode(), str(half).encode(), ctypes.byref(options)) == 0
        half.rename(Q4_0)
    return Q4_0


@functools.cache
def _theirs(kind: str) -> LlamaCpp:
    return LlamaCpp(_file() if kind == "Q4_1" else _requantized())


@functools.cache
def _ours(name: str) -> Llama:
    return Llama.from_gguf(_file(), **MODELS[name])


def _run(model: Llama, prompt: list[int], count: int) -> tuple[float, float]:
    start, times = time.perf_counter(), []
    for _ in generate(model, prompt, max_tokens=count):
        times.append(time.perf_counter() - start)
    return times[0], times[-1] - times[0]


def _prompt(case: tuple[str, str]) -> Entry:
    theirs, ours = _theirs(case[1]), _ours(case[0])
    return Entry(lambda: _run(ours, PROMPT, 1)[0],
                 {f"llama.cpp {case[1]}": lambda: theirs.run(PROMPT, 1)[0]}, timed=True)  # fmt: skip


def _decode(case: tuple[str, str]) -> Entry:
    """Seconds a token."""
    theirs, ours = _theirs(case[1]), _ours(case[0])
    return Entry(lambda: _run(ours, PROMPT[:16], 65)[1] / 64,
                 {f"llama.cpp {case[1]}": lambda: theirs.run(PROMPT[:16], 65)[1] / 64}, timed=True,
                 moved=_file().stat().st_size)  # fmt: skip


def _cases(kind: str, *names: str) -> dict:
    return {name: (name, kind) for name in names}


WAITING = "memory, and what Python does for a token: decision 0060"


@contest("SmolLM2 decode, against Q4_1", cases=_cases("Q4_1", "act_bits=8"), goal=2.2, seconds=6, note=WAITING)
def bench_decode_q4_1(case):
    return _decode(case)


@contest("SmolLM2 decode, against Q4_0", cases=_cases("Q4_0", "act_bits=8"), goal=1.4, seconds=6, note=WAITING)
def bench_decode_q4_0(case):
    return _decode(case)


@contest(
    "SmolLM2 decode, activations not rounded, against Q4_1", cases=_cases("Q4_1", "float32", "bfloat16"), seconds=6
)
def bench_decode_unrounded(case):
    return _decode(case)


@contest("SmolLM2 prompt of 512, 16-bit, against Q4_1", cases=_cases("Q4_1", "bfloat16"), goal=3.0, seconds=8)
def bench_prompt_16bit(case):
    return _prompt(case)


@contest("SmolLM2 prompt of 512, act_bits=8, against Q4_0", cases=_cases("Q4_0", "act_bits=8"), goal=2.0, seconds=8)
def bench_prompt_int8(case):
    return _prompt(case)
