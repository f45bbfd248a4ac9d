"""What a GPU machine is for, in one command that needs no network: build, test, measure.

    python -m bench.gpu                 test, peers and bench, one after the other
    python -m bench.gpu --part test     builds for this machine and runs every test of a kernel that runs on the GPU,
                                        then compute-sanitizer over the CUDA C++ ones, where there is one
    python -m bench.gpu --part peers    the card's ceilings and what torch, cuDNN and cuBLAS reach on it
    python -m bench.gpu --part bench    ours against them
    python -m bench.gpu --part tune     looks for better configs of the Triton kernels: kernels/tuned/<card>.json
    python -m bench.gpu --part peers --dry-run --out FILE     tiny sizes, on a CPU: proves the script, measures nothing

--op quant_matmul keeps to one op. Each case is one line of JSON in bench/records/gpu/<card>.jsonl: medians and spread
by contender, ratios, the fraction of the card's ceilings, versions, commit and clocks. What --seconds cut off goes on
where it stopped: a case that this commit has on this card is not measured again, nor is a test that these sources have
passed run again. Nothing changes the card's settings; clocks are only read.

Time is taken by CUDA events around replays of a graph of calls, so that launch gaps are not measured; contenders
alternate, and their inputs rotate among copies larger than the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.util
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pyarch import arch

from . import _gpu_tests, _gpu_tune
from ._gpu_cases import Case, cases
from ._gpu_timer import measure

ROOT = Path(__file__).parent.parent
RECORDS = Path(__file__).parent / "records/gpu"
PARTS = ("test", "peers", "bench")  # of a run that names none
ROUNDS = 21


def build() -> None:
    """The CPU library that this machine uses and the CUDA library for its card, in place, both at a time; objects that
    are newer are kept."""
    card = {(9, 0): "90a"}.get(torch.cuda.get_device_capability(), "80;90a")
    cuda = {"PYARCH_CUDA": "1", "PYARCH_CPU_ISA": ";", "PYARCH_CUDA_ARCH": os.environ.get("PYARCH_CUDA_ARCH", card)}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    runs = [subprocess.Popen(command, cwd=ROOT, env=os.environ | part)
            for part in (cuda, {"PYARCH_CUDA": "0", "PYARCH_CPU_ISA": arch.cpu_isas()[0]})]  # fmt: skip
    for run in runs:
        if run.wait():
            sys.exit("make gpu: the build failed")


def sources() -> str:
    """A digest of what tests and measurements depend on."""
    digest = hashlib.sha256()
    for folder in ("pyarch", "kernels", "csrc", "tests", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def machine(device: torch.device) -> dict[str, Any]:
    """Where a figure comes from."""
    git = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    different = ["git", "diff", "--quiet", "HEAD", "--", ".", ":!bench/records", ":!kernels/tuned"]  # what runs write
    changed = subprocess.run(different, cwd=ROOT, capture_output=True).returncode  # without git too
    facts = {
        "commit": (git.stdout.strip() or "unknown") + (f"+{sources()}" if changed else ""),
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


def run(part: str, op: str, path: Path, device: torch.device, small: bool, end: float) -> Iterator[dict]:
    """Measures what is missing of a part and yields its records, each once it is written."""
    about, known = machine(device), done(path)
    left = [i for i, c in enumerate(cases()) if c.part == part and (c.work.startswith(op) or c.work == "ceiling")
            and (about["card"], about["commit"], part, c.work, c.name) not in known]  # fmt: skip
    if part == "bench" and device.type == "cuda" and left and time.monotonic() < end:
        compile_all(left)
    for case in (case for i, case in enumerate(cases()) if i in left):
        known = done(path)
        if time.monotonic() > end:
            print(f"--seconds are over; the same command goes on with {case.work}, {case.name}")
            return
        yield record(case, path, device, small, about, known)


def compile_all(which: list[int]) -> None:
    """Fills Triton's cache with what these cases need, in processes: compilation would be most of the time."""
    pool = ProcessPoolExecutor(min(8, os.cpu_count() or 1), multiprocessing.get_context("spawn"))
    with pool:
        list(pool.map(_run_once, which))


def _run_once(which: int) -> None:
    with torch.no_grad(), contextlib.suppress(Exception):  # measure() says what does not run
        for call in list(cases())[which].make(torch.device("cuda"), False).calls.values():
            with contextlib.suppress(Exception):
                call(0)
    torch.cuda.empty_cache()


def tests(op: str, arguments: list[str], path: Path, device: torch.device, end: float) -> int:
    """The suite on the GPU and compute-sanitizer; what this commit has passed on this card is not run again."""
    about, known, status = machine(device), done(path), 0

    def missing(work: str) -> bool:
        return not known.get((about["card"], about["commit"], "test", work, op or "all"), {}).get("well")

    def note(work: str, found: dict[str, Any]) -> int:
        write({**about, "part": "test", "work": work, "case": op or "all", **found}, path)
        return not found["well"]

    if missing("suite") or arguments:
        found = _gpu_tests.suite(op, arguments, ROOT / ".cache" / f"gpu-tests-{sources()}", end)
        print(f"tests: {found}", flush=True)
        status |= note("suite", found) if not arguments else not found["well"]
    if missing("memcheck") or missing("racecheck"):
        if time.monotonic() > end:
            print("--seconds are over; the same command goes on with compute-sanitizer")
            return 1
        for check, well in _gpu_tests.sanitize(op):
            status |= note(check, {"well": well})
    return status


def record(case: Case, path: Path, device: torch.device, small: bool, about: dict, known: dict) -> dict:
    torch.manual_seed(0)
    with torch.no_grad():
        found = measure(case.make(device, small), device, 3 if small else ROUNDS)
    line = {**about, "part": case.part, "work": case.work, "case": case.name, **found}
    line |= fractions(line, known)
    line["sm_mhz, memory_mhz, celsius, watt"] = smi("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    write(line, path)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return line


def write(line: dict[str, Any], path: Path) -> None:
    line["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(_rounded(line)) + "\n")


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
    parser.add_argument("--part", choices=("all", *PARTS, "tune"), default="all")
    parser.add_argument("--op", default="", help="one op alone: flash_attention, paged_kv or quant_matmul")
    parser.add_argument("--seconds", type=float, default=500, help="measure nothing new after so long")
    parser.add_argument("--out", type=Path, help="the file of records or configs, instead of the one of this card")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU, nothing built; needs --out")
    parser.add_argument("arguments", nargs="*", help="for pytest, after --")
    asked = parser.parse_args()
    end, status = time.monotonic() + asked.seconds, 0
    if asked.dry_run and (asked.out is None or asked.part in ("all", "test")):
        parser.error("--dry-run measures nothing: give it a part to measure and --out, so that no record is made")
    if not asked.dry_run:
        if not torch.cuda.is_available():
            parser.error("torch sees no CUDA device here; --dry-run proves the script without one")
        build()
    torch.backends.cudnn.benchmark = True  # the peer at its best
    device = torch.device("cpu" if asked.dry_run else "cuda")
    for part in PARTS if asked.part == "all" else (asked.part,):
        if part == "tune":
            _gpu_tune.tune(asked.op, asked.out, device, asked.dry_run, end, machine(device))
            continue
        path = asked.out or RECORDS / (torch.cuda.get_device_name().lower().replace(" ", "-") + ".jsonl")
        if part == "test":
            status |= tests(asked.op, asked.arguments, path, device, end)
        else:
            for r in run(part, asked.op, path, device, asked.dry_run, end):
                print(line_of(r), flush=True)
                status |= any(name.startswith("pyarch") for name in r.get("failed", ()))
    return status


if __name__ == "__main__":
    sys.exit(main())
