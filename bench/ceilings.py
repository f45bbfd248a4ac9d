"""What this machine can do at most; every benchmark's figure is also given as a fraction of it.

`python -m bench.ceilings` prints them. They are measured by ceilings.cpp, which the system's compiler builds on first
use; without a compiler there are none, and no fractions.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
KINDS = {  # in the order of ceilings.cpp: name -> (what it is, unit)
    "fp32": ("fp32 FMA", "GFLOP/s"),
    "bf16": ("bf16 dot product", "GFLOP/s"),
    "int8": ("int8 dot product (VNNI)", "GOP/s"),
    "dram": ("DRAM read", "GB/s"),
    "l3": ("L3 read", "GB/s"),
}


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The measuring library, built once per source text under build/; None without a compiler."""
    name = f"ceilings-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    path = SOURCE.parent.parent / "build" / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        flags = ["-O3", "-std=c++17", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
        try:
            subprocess.run(["c++", *flags, str(SOURCE), "-o", str(path)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
    library = ctypes.CDLL(str(path))
    library.ceiling.restype = ctypes.c_double
    library.ceiling.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_double)
    return library


@functools.cache
def ceiling(kind: str, threads: int) -> float | None:
    """Operations or bytes a second with so many threads: the best of five short runs, since others may disturb one."""
    library = _library()
    if library is None:
        return None
    return max(library.ceiling(list(KINDS).index(kind), threads, 0.1) for _ in range(5)) or None


def bound(threads: int, *, flops: float = 0, compute: str = "fp32", moved: float = 0, memory: str = "dram"):
    """(the kind that bounds such a piece of work, its least time in seconds), or None where nothing is known."""
    works = [(kind, ceiling(kind, threads), work) for kind, work in ((compute, flops), (memory, moved)) if work]
    if any(top is None for _, top, _ in works):
        return None
    return max(((kind, work / top) for kind, top, work in works), key=lambda pair: pair[1], default=None)


if __name__ == "__main__":
    for kind, (what, unit) in KINDS.items():
        tops = [ceiling(kind, threads) for threads in (1, 2)]
        print(f"{what:28}", *(f"{top / 1e9:8.1f}" if top else "     n/a" for top in tops), f"{unit}, 1 and 2 threads")
