"""How bench/gpu.py takes time: contenders alternate, each a graph of calls between two CUDA events."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch

from ._gpu_cases import Entry

CALLS_US = 2000  # a graph holds about as many microseconds of calls


class Timer:
    """Seconds of one contender: a fixed number of calls, timed as often as asked. Calibrated when it is made."""

    def __init__(self, call: Callable[[int], object], copies: int, device: torch.device):
        self.call, self.copies, self.device = call, copies, device
        for i in range(max(3, copies)):  # compilation, handles, workspaces, what each copy makes once
            call(i % copies)
        self.replay: Callable[[], None] = self._calls
        self.count, self.graph = 1, False
        self.count = max(1, min(200, int(CALLS_US * 1e-6 / max(self(), 1e-7))))
        if device.type == "cuda":
            self._capture()

    def _calls(self) -> None:
        for i in range(self.count):
            self.call(i % self.copies)

    def _capture(self) -> None:
        """Turns the calls into a graph, where they can be captured."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._calls()
        except RuntimeError:  # a library that allocates or waits: timed call by call, and said so in the record
            torch.cuda.synchronize()
            return
        self.replay, self.graph = graph.replay, True
        graph.replay()

    def __call__(self) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            self.replay()
            return (time.perf_counter() - start) / self.count
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        self.replay()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) * 1e-3 / self.count


def measure(entry: Entry, device: torch.device, rounds: int) -> dict[str, Any]:
    """Medians by contender, in alternation; a contender that cannot run is named with its reason."""
    timers, failed = {}, {}
    for name, call in entry.calls.items():
        try:
            timers[name] = Timer(call, entry.copies, device)
        except Exception as error:  # the other cases shall still be measured
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    samples: dict[str, list[float]] = {name: [] for name in timers}
    order = list(timers)
    for _ in range(rounds):
        for name in order:
            samples[name].append(timers[name]())
        order = order[1:] + order[:1]
    found: dict[str, Any] = {"us": {}, "graph": {name: timer.graph for name, timer in timers.items()}}
    for name, seconds in samples.items():
        fifths = quantiles(seconds, n=5, method="inclusive")
        found["us"][name] = {"median": median(seconds) * 1e6, "p20": fifths[0] * 1e6, "p80": fifths[-1] * 1e6}
    if failed:
        found["failed"] = failed
    best = {name: median(seconds) for name, seconds in samples.items()}
    peers = [name for name in best if not name.startswith("pyarch")]
    if peers and len(peers) < len(best):
        ours = min((name for name in best if name.startswith("pyarch")), key=best.__getitem__)
        peer = min(peers, key=best.__getitem__)
        ratio = median(b / a for a, b in zip(samples[ours], samples[peer], strict=True))
        found |= {"peer": peer, "ratio": ratio}
    fastest = (found.get("peer") and best[ours]) or min(best.values(), default=float("nan"))
    if entry.flops:
        found["tflops"] = entry.flops / fastest * 1e-12
    if entry.moved:
        found["gbps"] = entry.moved / fastest * 1e-9
    return found
