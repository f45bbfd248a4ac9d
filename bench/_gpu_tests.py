"""make gpu PART=test: the suite's tests of GPU kernels, dealt out to processes, and compute-sanitizer.

Most of their time is Triton's compiler and torch's, one core each, so every process takes each so-manieth test; they
share the GPU and the compilers' caches. It needs pytest alone. This module is also the plugin of these processes:

    --dealt 3/12     of every twelve selected tests the third (from 0)
    --notes FILE     tests that passed according to it are not run again; outcomes are added

The file belongs to one state of the sources, so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NAMES = "(cuda or triton or gpu) and not gpu_script and not cuda_build"  # those two prove things elsewhere
PROCESSES = min(16, os.cpu_count() or 1)
SANITIZER_SECONDS = 60


# ---- the plugin


def pytest_addoption(parser) -> None:
    parser.addoption("--dealt", default="0/1", help="which tests of how many are this process's: 3/12")
    parser.addoption("--notes", type=Path, help="outcomes of earlier runs, and of this one")


def pytest_configure(config) -> None:
    if config.getoption("--notes"):
        config.pluginmanager.register(_Notes(config.getoption("--notes"), config.getoption("--dealt")))


class _Notes:
    def __init__(self, path: Path, dealt: str) -> None:
        self.path, (self.mine, self.of) = path, map(int, dealt.split("/"))
        self.passed = outcomes(path, "passed")

    @pytest.hookimpl(trylast=True)  # after -k
    def pytest_collection_modifyitems(self, config, items) -> None:
        items.sort(key=lambda item: item.nodeid)  # not necessarily collected in one order, and all must deal alike
        mine = [item for item in items[self.mine :: self.of] if item.nodeid not in self.passed]
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:] = mine

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed or report.when == "call":
            with self.path.open("a") as file:
                file.write(f"{report.outcome} {report.nodeid}\n")


# ---- what starts them


def outcomes(path: Path, outcome: str) -> set[str]:
    """The tests that had it."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {test for kind, _, test in (line.partition(" ") for line in lines) if kind == outcome}


def suite(op: str, arguments: list[str], notes: Path, end: float) -> dict[str, Any]:
    """Runs what has not passed yet, until `end` at most -> counts, names of failed tests, and whether all is well."""
    start, earlier = time.monotonic(), outcomes(notes, "passed")
    notes.parent.mkdir(parents=True, exist_ok=True)
    notes.write_text("".join(f"passed {test}\n" for test in sorted(earlier)))
    environment = os.environ | {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "2",
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "bench._gpu_tests", "-p", "no:cacheprovider",
               "--notes", str(notes), "-k", f"{NAMES} and {op or 'test'}", *arguments]  # fmt: skip
    commands = [[*command, "--dealt", f"{i}/{PROCESSES}"] for i in range(PROCESSES)]
    well = True
    for code, text in _together(commands, environment, end):
        if code is None:
            print("--seconds are over; the same command goes on with the tests that are left")
        fine = code in (0, 5)  # 5: none was left for it
        print(text.splitlines()[-1] if fine else text, flush=True)
        well &= fine
    passed, failed = outcomes(notes, "passed"), sorted(outcomes(notes, "failed"))
    return {"passed": len(passed), "earlier": len(earlier), "failed": failed[:20], "well": well and not failed,
            "seconds": round(time.monotonic() - start)}  # fmt: skip


def sanitize(op: str) -> Iterator[tuple[str, bool]]:
    """(tool, whether it ended and found nothing) of compute-sanitizer's over the CUDA C++ kernels, on the suite's
    samples of them; nothing where it is not installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not here: accesses and races of the CUDA C++ kernels are not checked")
        return
    tests = [sys.executable, "-m", "pytest", "-q", "-k", f"test_suite and forward and cuda and {op or 'test'}"]
    # Each tensor its own allocation, so that what lies past its end belongs to nobody.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    checks = ("memcheck", "racecheck")
    options = ["--kernel-name", "kns=pyarch", "--error-exitcode", "9", "--print-limit", "5"]
    commands = [[tool, "--tool", check, *options, *tests] for check in checks]
    ended = _together(commands, environment, time.monotonic() + SANITIZER_SECONDS)
    for check, (code, text) in zip(checks, ended, strict=True):
        print(f"\n== compute-sanitizer {check}\n{text}", flush=True)
        if code is None:
            print(f"{check}: not finished in {SANITIZER_SECONDS} seconds")
        yield check, code in (0, 5)  # 5: pytest has no such test


def _together(commands: list[list[str]], environment: dict[str, str], end: float) -> Iterator[tuple[int | None, str]]:
    """Runs them at a time -> (status, or None for one that was ended at `end`; what it printed) of each."""
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        runs = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
                for command, output in zip(commands, outputs, strict=True)]  # fmt: skip
        for run, output in zip(runs, outputs, strict=True):
            code = None
            try:
                code = run.wait(max(end - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGINT)  # pytest tells what it has
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.wait(5)
                run.kill()
                run.wait()
            output.seek(0)
            yield code, output.read()
