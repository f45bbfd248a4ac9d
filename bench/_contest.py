"""contest: a benchmark of ours against peers, measured in alternation in one process.

    @contest("RMSNorm, bf16", cases=CASES, goal=4.0)
    def bench_rms_norm(case):
        x = ...
        return Entry(lambda: pyarch.rms_norm(x, w), {"torch F.rms_norm": lambda: ...}, moved=...)

becomes one pytest-benchmark group per case and thread count with two members, `pyarch` and `peer` (the fastest of the
peers given). Both are measured together, when the first member runs: rounds of ours and each peer follow one another,
in turned order, so that a disturbance of the machine meets all of them. The ratio is the median over rounds of
peer time / our time in that round. pytest-benchmark then gets the samples through a clock that replays them.

Working sets that must come from DRAM are rotated: `rotate(weight)` is an endless iterator over enough copies.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

import pytest
import torch
from torch.utils import _pytree

from . import ceilings

PAST_CACHE = 160 << 20  # bytes: several times the last-level cache of the machines measured
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """What one case compares. `flops` and `moved` (bytes) are what the work needs at least, for the ceiling."""

    ours: Callable[[], Any]
    peers: Mapping[str, Callable[[], Any]]
    flops: float = 0
    compute: str = "fp32"  # the ceiling of the flops: fp32, bf16 or int8
    moved: float = 0
    memory: str = "dram"  # the ceiling of the bytes: dram or l3
    timed: bool = False  # the callables return the seconds they took themselves


@dataclass(frozen=True)
class Row:
    """A row of the table, as its bench file states it; the measurements are in bench/records."""

    work: str
    cases: tuple[str, ...]
    threads: tuple[int, ...]
    goal: float | None
    at_most_us: float | None
    note: str


@dataclass
class Result:
    """Seconds per call of every contender, one sample a round."""

    samples: dict[str, list[float]]
    peer: str  # the fastest one
    facts: dict[str, Any] = field(default_factory=dict)


def rotate(value: T, nbytes: int | None = None) -> Iterator[T]:
    """Endlessly the same value in turn from enough copies that none is in a cache when its turn comes.

    value: a tensor, a QuantizedTensor or a tuple of such; nbytes: what one copy occupies, if not its tensors' size.
    """
    leaves, spec = _pytree.tree_flatten(value)
    size = nbytes or sum(t.nbytes for t in leaves if isinstance(t, torch.Tensor))
    copies = [value]
    for _ in range(-(-PAST_CACHE // max(size, 1)) - 1):
        fresh = [t.clone() if isinstance(t, torch.Tensor) else t for t in leaves]
        copies.append(_pytree.tree_unflatten(fresh, spec))
    return itertools.cycle(copies)


def contest(work: str, *, cases: Mapping[str, Any] | Sequence[str], goal: float | None = None,
            at_most_us: float | None = None, threads: tuple[int, ...] = (1, 2), seconds: float = 2.0,
            note: str = ""):  # fmt: skip
    """Makes a bench_ function (case -> Entry) a pytest-benchmark test.

    work: the row of the table that these cases form; goal: what its ratio should reach; at_most_us: instead, how many
    microseconds ours may take more than the peer; seconds: how long to measure one case with one thread count;
    note: for the table, in a few words, why the goal is missed where it is.
    """
    points = [(name, n, who) for name in cases for n in threads for who in ("pyarch", "peer")]
    ids = [f"{name}-{n}t-{who}" for name, n, who in points]
    row = Row(work, tuple(cases), threads, goal, at_most_us, note)

    def decorate(build: Callable[[Any], Entry]) -> Callable:
        measured: dict[tuple[str, int], Result] = {}

        @pytest.mark.parametrize(("case", "threads", "contender"), points, ids=ids)
        def test(case: str, threads: int, contender: str, replay) -> None:
            key = (case, threads)
            if key not in measured:
                measured.clear()  # one at a time: the entries' tensors are large
                entry = build(cases[case] if isinstance(cases, Mapping) else case)
                measured[key] = measure(entry, threads, seconds)
            result = measured[key]
            peer = contender == "peer"
            about = {"row": work, "case": case, "threads": threads}
            replay(f"{work} | {case} | {threads}T", result.samples[result.peer if peer else "pyarch"],
                   about | {"contender": result.peer if peer else "pyarch"} | result.facts)  # fmt: skip

        test.__name__ = test.__qualname__ = build.__name__
        test.__doc__, test.row = build.__doc__, row
        return test

    return decorate


def measure(entry: Entry, threads: int, seconds: float) -> Result:
    """Rounds of ours and every peer in alternation for about so many seconds."""
    contenders = {"pyarch": entry.ours, **entry.peers}
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads)
    gc.disable()
    try:
        with torch.inference_mode():
            samples = _alternate(contenders, seconds, entry.timed)
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()
    ours = samples["pyarch"]
    peer = min(entry.peers, key=lambda name: median(samples[name]))
    facts = {
        "ratio": median(b / a for a, b in zip(ours, samples[peer], strict=True)),
        "extra_us": median((a - b) * 1e6 for a, b in zip(ours, samples[peer], strict=True)),
        "peers_us": {name: median(samples[name]) * 1e6 for name in entry.peers},
    }
    least = ceilings.bound(threads, flops=entry.flops, compute=entry.compute, moved=entry.moved, memory=entry.memory)
    if least is not None:
        kind, floor = least
        facts |= {"ceiling": kind, "ceiling_rate": ceilings.ceiling(kind, threads), "fraction": floor / median(ours)}
    return Result(samples, peer, facts)


def _alternate(contenders: Mapping[str, Callable], seconds: float, timed: bool) -> dict[str, list[float]]:
    inner = {name: 1 if timed else _calibrate(f) for name, f in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    end = time.perf_counter() + seconds
    for rounds in itertools.count():
        if rounds >= 5 and (time.perf_counter() >= end or rounds >= 400):
            return samples
        for name in order:
            f, n = contenders[name], inner[name]
            if timed:
                samples[name].append(f())
                continue
            start = time.perf_counter()
            for _ in range(n):
                f()
            samples[name].append((time.perf_counter() - start) / n)
        order = order[1:] + order[:1]
    raise AssertionError  # count() has no end


def _calibrate(f: Callable, least: float = 2e-4) -> int:
    """Warms f up and returns how many calls take about 0.2 ms: long for the clock, short for the scheduler."""
    f()
    n = 1
    while True:
        start = time.perf_counter()
        for _ in range(n):
            f()
        elapsed = time.perf_counter() - start
        if elapsed >= least or n >= 1000:
            return n
        n = min(1000, max(n * 2, int(n * least / max(elapsed, 1e-9))))
