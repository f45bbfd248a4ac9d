"""make gpu PART=tune: which config of a Triton kernel is fastest on this card, for each kind of call.

Every candidate runs every shape of its kind; the best three and the default meet again in alternation, and the best of
them is written to kernels/tuned/<card>.json. A kind that this commit has tuned on this card is not measured again.
Compilation is most of the time, so it happens first, in processes that share Triton's cache.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ._gpu_cases import Call, copies_of, quantised, randn
from ._gpu_timer import Timer

LEAST_GAIN = 1.02  # over the default, to be worth a config of its own
FINALISTS, ROUNDS = 3, 11


@dataclasses.dataclass(frozen=True)
class Kind:
    """Calls that share a config. shapes: (device, copies or None for as many as leave the cache) -> one call a shape,
    each made from a config, and how many copies it rotates among."""

    op: str
    key: str
    default: Any
    candidates: list
    shapes: Callable[[torch.device, int | None], list[tuple[Callable[[Any], Call], int]]]


def quant_matmul_kinds(small: bool) -> Iterator[Kind]:
    """rounded: with act_bits=8."""
    from pyarch.kernels import quant_matmul as kernel
    from pyarch.kernels import quant_matmul_act8
    from pyarch.kernels._common import capability

    small_weights, large_weights = ((4096, 4096), (6144, 2560)), ((11008, 4096), (4096, 14336), (8192, 8192))
    formats = (4, 128, False), (8, 128, False), (8, -1, True)  # bits, group_size, rounded
    for shapes, m, (bits, group, rounded) in itertools.product(
        (small_weights, large_weights), (1, 32, 64, 256, 1024, 4096), formats
    ):
        if small:
            shapes, m = ((128, 128),), 1
        grouped = group != -1

        def of(config, weights, x, y, rounded=rounded, group=group):
            config = kernel.fit(config, (len(x), *y.shape[1:], x.shape[1]), capability())
            launch, rest = (quant_matmul_act8 if rounded else kernel).launch, (None, None, None, group, 0, 0.0)
            return lambda i: launch(config, y, x, weights[i].q, weights[i].scale, *rest)

        def make(device, copies, of=of, shapes=shapes, m=m, bits=bits, group=group):
            found = []
            for n, k in shapes:
                count = copies or copies_of(n * k * bits / 8)
                weights = [quantised(n, k, group, device, bits) for _ in range(count)]
                x = randn(m, k, device=device)
                found.append((functools.partial(of, weights=weights, x=x, y=x.new_empty(m, n)), count))
            return found

        tile = min(128, max(16, m))
        rows = (tile, 256) if rounded and m > 128 else (tile,)
        steps = (128, 256) if rounded else (64, 128)
        blocks = itertools.product(rows, (32, 64, 128), steps, (4, 8), (2, 3, 4), (1, 4, 16))
        candidates = [kernel.Config(rows, n, k, split, warps, stages) for rows, n, k, warps, stages, split in blocks]
        shape = m, *shapes[0]
        if rounded:
            default = quant_matmul_act8.default_for(shape, bits, grouped, 90)
        else:
            default = kernel.default_for(shape, 90)
        if m > 64 and not rounded:
            candidates.insert(0, dataclasses.replace(default, dequantise=True))
        key = kernel.key_for(shape, bits, rounded, grouped)
        yield Kind("quant_matmul", key, default, candidates[: 2 if small else None], make)
        if small:
            return


def flash_attention_kinds(small: bool) -> Iterator[Kind]:
    from pyarch.kernels import flash_attention as kernel

    for size, rows in ((16, 8),) if small else itertools.product((64, 128, 256), (48, 4096)):

        def make(device, copies, size=size, rows=rows):
            heads, keys = (1, rows) if small else (16, max(rows, 2048))
            q, k, v = (randn(1, heads, n, size, device=device) for n in (rows, keys, keys))
            out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)

            def of(config, right):
                arguments = q, k, v, *[None] * 7, -1, right, 0.0, size**-0.5, 0.0
                return lambda _: kernel.launch(config, out, lse, *arguments)

            return [(functools.partial(of, right=right), 1) for right in (-1, 0)]

        default = kernel.default_for(rows, size, torch.bfloat16, 90, False, True)
        blocks = itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
        candidates = [kernel.Config(m, n, size, warps, stages) for m, n, warps, stages in blocks]
        yield Kind("flash_attention", kernel.key_for(rows, size), default, candidates[: 2 if small else None], make)


def flash_attention_backward_kinds(small: bool) -> Iterator[Kind]:
    """Each kernel alone: the others are left out."""
    from pyarch.kernels import flash_attention_backward as kernel

    for name, size in itertools.product(("rows", "keys"), (16,) if small else (64, 128, 256)):

        def make(device, copies, name=name, size=size):
            heads, rows = (1, 16) if small else (16, 4096)
            q, k, v, out, d_out = (randn(1, heads, rows, size, device=device) for _ in range(5))
            lse, d_lse = (q.new_full(q.shape[:3], n, dtype=torch.float32) for n in (20.0, 0.0))

            def of(config, right):
                arguments = d_out, d_lse, out, lse, q, k, v, *[None] * 7, -1, right, 0.0, size**-0.5, 0.0, None, False
                return lambda _: kernel.launch(lambda other: config if other == name else None, *arguments)

            return [(functools.partial(of, right=right), 1) for right in (-1, 0)]

        default = kernel.default_for(name, size, torch.bfloat16, 90)
        tiles = ((64, 128), (32, 64, 128)) if name == "rows" else ((16, 32, 64), (64, 128))
        blocks = itertools.product(*tiles, (4, 8), (2, 3) if name == "rows" else (1, 2))
        candidates = [kernel.Config(m, n, size, warps, stages) for m, n, warps, stages in blocks]
        yield Kind(
            "flash_attention_backward", kernel.key_for(name, size), default, candidates[: 2 if small else None], make
        )


KINDS = {
    "quant_matmul": quant_matmul_kinds,
    "flash_attention": flash_attention_kinds,
    "flash_attention_backward": flash_attention_backward_kinds,
}


def tune(op: str, out: Path | None, device: torch.device, small: bool, end: float, about: dict[str, Any]) -> None:
    """Tunes what this commit has not tuned here; op: one of KINDS, or "" for all."""
    from pyarch.kernels import _tuned
    from pyarch.kernels._common import capability

    path = out or _tuned.FOLDER / _tuned.file_name(about["card"])
    known = json.loads(path.read_text()) if path.exists() else {"capability": capability()}
    kinds = [kind for name in KINDS if name.startswith(op) for kind in KINDS[name](small)]
    missing = [k for k in kinds if known.get(k.op, {}).get(k.key, {}).get("commit") != about["commit"]]
    if device.type == "cuda":
        _compile(missing, kinds)
    for kind in missing:
        if time.monotonic() > end:
            print(f"--seconds are over; the same command goes on with {kind.op}, {kind.key}")
            return
        config, gain = best(kind, device, 1 if small else ROUNDS)
        found = {"config": dataclasses.asdict(config), "gain": round(gain, 3)}
        known.setdefault(kind.op, {})[kind.key] = found | {
            "commit": about["commit"],
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{kind.op}, {kind.key}: {gain:.3f} of the default, {config}", flush=True)


def best(kind: Kind, device: torch.device, rounds: int) -> tuple[Any, float]:
    """The fastest config, and how many times as fast as the default it is over all shapes (geometric mean)."""
    shapes = kind.shapes(device, None)

    def timers(config: Any) -> list[Timer] | None:
        try:
            return [Timer(of(config), copies, device) for of, copies in shapes]
        except Exception as error:  # does not fit this card, or the compiler refuses it: one that cannot be chosen
            if config == kind.default:
                raise
            print(f"{kind.op}, {kind.key}: {config} does not run: {str(error).splitlines()[0][:120]}")
            return None

    default = timers(kind.default)
    scored = []
    for config in kind.candidates:
        if config != kind.default and (found := timers(config)) is not None:
            scored.append((sum(math.log(median(timer() for _ in range(3))) for timer in found), config))
            del found
    finalists = [config for _, config in sorted(scored, key=lambda pair: pair[0])[:FINALISTS]]
    gains = {kind.default: 1.0}
    for config in finalists:
        ratios = [
            median(theirs() / ours() for _ in range(rounds))
            for ours, theirs in zip(timers(config), default, strict=True)
        ]
        gains[config] = math.exp(sum(map(math.log, ratios)) / len(ratios))
    chosen = max(gains, key=gains.__getitem__)
    return (chosen, gains[chosen]) if gains[chosen] >= LEAST_GAIN else (kind.default, 1.0)


def _compile(missing: list[Kind], kinds: list[Kind]) -> None:
    """Fills Triton's cache."""
    work = [(kinds.index(kind), i) for kind in missing for i in range(len(kind.candidates))]
    pool = concurrent.futures.ProcessPoolExecutor(min(12, os.cpu_count() or 1), multiprocessing.get_context("spawn"))
    with pool:
        list(pool.map(_run_once, *zip(*work, strict=True), chunksize=8))


def _run_once(kind: int, candidate: int) -> None:
    every = [one for name in KINDS for one in KINDS[name](False)]
    with contextlib.suppress(Exception):  # best() says what does not run
        for of, _ in every[kind].shapes(torch.device("cuda"), 1):
            of(every[kind].candidates[candidate])(0)
