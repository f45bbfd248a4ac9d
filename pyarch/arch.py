"""What this machine has, and the environment switches. A leaf: it imports nothing of pyarch and no torch.

Switches, all of them:
  PYARCH_CPU_ISA     at import: use this CPU library (avx512, avx2, portable) instead of the best; at build: build these
  PYARCH_CUDA        at build: auto, 0 or 1 (setup.py)
  PYARCH_CUDA_ARCH   at build: compute capabilities (setup.py)
  PYARCH_SANITIZE    at build: AddressSanitizer and UBSan in the CPU libraries (setup.py)
  TRITON_INTERPRET   Triton's own: 1 runs its kernels in Python, on CPU tensors (for tests)
"""

from __future__ import annotations

import functools
import os

# Best first. A library is used only where the CPU has every flag: one missing means an illegal instruction.
CPU_ISAS: dict[str, frozenset[str]] = {
    "avx512": frozenset(
        "avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni avx512_bf16 avx2 fma f16c bmi2".split()
    ),
    "avx2": frozenset("avx2 fma f16c bmi1 bmi2 movbe".split()),
    "portable": frozenset(),
}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The CPU's feature flags as Linux names them; empty where /proc/cpuinfo does not exist."""
    try:
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith(("flags", "Features")):
                    return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


@functools.cache
def cpu_model() -> str:
    """The CPU's name as Linux gives it, or 'unknown CPU'."""
    try:
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return "unknown CPU"


def asked_cpu_isa() -> str | None:
    """The CPU library that PYARCH_CPU_ISA names; None where the best is taken."""
    return os.environ.get("PYARCH_CPU_ISA") or None


def cpu_isas() -> list[str]:
    """The CPU libraries this machine can run, best first; PYARCH_CPU_ISA narrows them to one.

    Raises RuntimeError if the switch names an unknown library or one this CPU cannot run.
    """
    able = [isa for isa, flags in CPU_ISAS.items() if flags <= cpu_flags()]
    asked = asked_cpu_isa()
    if asked is None:
        return able
    if asked not in able:
        raise RuntimeError(f"PYARCH_CPU_ISA is {asked!r}; this machine can run {able}")
    return [asked]


def environment_of_a_limited_process() -> dict[str, str]:
    """The environment less LD_PRELOAD: allocators and sanitizers reserve more than a limit on memory allows."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"
