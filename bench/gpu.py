"""What a GPU machine is for, in one command that needs no network: build, test, measure.

    python -m bench.gpu --part test     builds for this machine and runs every test of a kernel that runs on the GPU
    python -m bench.gpu --part peers    the card's ceilings and what torch, cuDNN and cuBLAS reach on it
    python -m bench.gpu --part bench    ours against them
    python -m bench.gpu --part peers --dry-run --out FILE     tiny sizes, on a CPU: proves the script, measures nothing

Each case is one line of JSON in bench/records/gpu/<card>.jsonl: medians and spread by contender, ratios, the fraction
of the card's ceilings, versions, commit and clocks. A run that ends early (--seconds) goes on where it stopped: a case
that this commit has on this card is not measured again. Nothing changes the card's settings; clocks are only read.

Time is taken by CUDA events around replays of a graph of calls, so that launch gaps are not measured; contenders
alternate, and their inputs rotate among copies larger than the cache.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from pyarch import arch

from ._gpu_cases import Case, Entry, cases

ROOT = Path(__file__).parent.parent
RECORDS = Path(__file__).parent / "records/gpu"
CALLS_US = 2000  # a graph holds about as many microseconds of calls
ROUNDS = 21


def build() -> None:
    """The CPU library that this machine uses and the CUDA library, in place; objects that are newer are kept."""
    environment = os.environ | {"PYARCH_CUDA": "1", "PYARCH_CPU_ISA": arch.cpu_isas()[0]}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)


def test(arguments: list[str]) -> int:
    """The suite's tests of GPU backends: those with cuda, triton or gpu in their name."""
    names = "(cuda or triton or gpu) and not gpu_script and not cuda_build"  # those two are about other machines
    command = [sys.executable, "-m", "pytest", "-q", "-k", names, *arguments]
    if importlib.util.find_spec("xdist"):  # most of the time is Triton's compiler
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def machine(device: torch.device) -> dict[str, Any]:
    """Where a figure comes from."""
    git = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT, capture_output=True).returncode
    facts = {
        "commit": (git.stdout.strip() or "unknown") + ("+changes" if changed else ""),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    if importlib.util.find_spec("triton"):
        import triton

        facts["triton"] = triton.__version__
    if device.type != "cuda":
        return {"card": "dry run on a CPU", **facts}
    properties = torch.cuda.get_device_properties(device)
    return {
        "card": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30),
        "driver": smi("driver_version"),
        "cudnn": torch.backends.cudnn.version(),
        **facts,
    }


def smi(*what: str) -> str | None:
    """What nvidia-smi answers, or None without it. A query: it changes nothing."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(what)}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Timer:
    """Seconds of one contender: a fixed number of calls, timed as often as asked. Calibrated when it is made."""

    def __init__(self, call: Callable[[int], object], copies: int, device: torch.device):
        self.call, self.copies, self.device = call, copies, device
        for i in range(3):  # compilation, handles, workspaces
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
        except (RuntimeError, ValueError) as error:
            if name.startswith("pyarch"):
                raise
            failed[name] = str(error).splitlines()[0][:200]
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
        ours = next(name for name in best if name.startswith("pyarch"))
        peer = min(peers, key=best.__getitem__)
        ratio = median(b / a for a, b in zip(samples[ours], samples[peer], strict=True))
        found |= {"peer": peer, "ratio": ratio}
    fastest = (found.get("peer") and best[ours]) or min(best.values(), default=float("nan"))
    if entry.flops:
        found["tflops"] = entry.flops / fastest * 1e-12
    if entry.moved:
        found["gbps"] = entry.moved / fastest * 1e-9
    return found


def done(path: Path) -> dict[tuple, dict]:
    """The records in a file, by what makes a measurement the same."""
    if not path.exists():
        return {}
    lines = (json.loads(line) for line in path.read_text().splitlines() if line)
    return {(r["card"], r["commit"], r["part"], r["work"], r["case"]): r for r in lines}


def fractions(record: dict, known: dict[tuple, dict]) -> dict[str, float]:
    """Of this card's measured copy bandwidth and bf16 matrix rate, once both are known."""
    ceilings = {key[4]: r for key, r in known.items() if key[0] == record["card"] and key[3] == "ceiling"}
    of = {}
    if "copy" in ceilings and "gbps" in record:
        of["of_copy"] = record["gbps"] / ceilings["copy"]["gbps"]
    if "matmul bfloat16" in ceilings and "tflops" in record:
        of["of_matmul"] = record["tflops"] / ceilings["matmul bfloat16"]["tflops"]
    return of


def run(part: str, path: Path, device: torch.device, small: bool, seconds: float) -> Iterator[dict]:
    """Measures what is missing of a part and yields its records, each once it is written."""
    end, about = time.monotonic() + seconds, machine(device)
    for case in (c for c in cases() if c.part == part):
        known = done(path)
        if (about["card"], about["commit"], part, case.work, case.name) in known:
            continue
        if time.monotonic() > end:
            print(f"--seconds {seconds:.0f} are over; the same command goes on with {case.work}, {case.name}")
            return
        yield record(case, path, device, small, about, known)


def record(case: Case, path: Path, device: torch.device, small: bool, about: dict, known: dict) -> dict:
    torch.manual_seed(0)
    with torch.inference_mode():
        found = measure(case.make(device, small), device, 3 if small else ROUNDS)
    line = {**about, "part": case.part, "work": case.work, "case": case.name, **found}
    line |= fractions(line, known)
    line["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    line["sm_mhz, memory_mhz, celsius, watt"] = smi("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(_rounded(line)) + "\n")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return line


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def line_of(r: dict) -> str:
    times = ", ".join(f"{name} {t['median']:.1f} us" for name, t in r["us"].items())
    more = "".join(f", {key} {r[key]:.3g}" for key in ("tflops", "gbps", "ratio", "of_copy", "of_matmul") if key in r)
    return f"{r['work']}, {r['case']}: {times}{more}" + "".join(
        f"; {n}: {why}" for n, why in r.get("failed", {}).items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("peers", "test", "bench"), default="test")
    parser.add_argument("--seconds", type=float, default=420, help="start no new case after so long")
    parser.add_argument("--out", type=Path, help="the file of records, instead of bench/records/gpu/<card>.jsonl")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU, nothing built; needs --out")
    parser.add_argument("arguments", nargs="*", help="for pytest, after --")
    asked = parser.parse_args()
    if asked.dry_run and (asked.out is None or asked.part == "test"):
        parser.error("--dry-run measures nothing: give it a part to measure and --out, so that no record is made")
    if not asked.dry_run:
        if not torch.cuda.is_available():
            parser.error("torch sees no CUDA device here; --dry-run proves the script without one")
        build()
    if asked.part == "test":
        return test(asked.arguments)
    torch.backends.cudnn.benchmark = True  # the peer at its best
    device = torch.device("cpu" if asked.dry_run else "cuda")
    path = asked.out or RECORDS / (torch.cuda.get_device_name().lower().replace(" ", "-") + ".jsonl")
    for r in run(asked.part, path, device, asked.dry_run, asked.seconds):
        print(line_of(r), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
