"""doctor: versions, instruction sets, GPU, tools, and which backend runs which op here; if not, why, and what to do."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from typing import Any

import torch

from .. import __version__, arch, native
from ..dispatch import BACKENDS, Op, backends
from ..explain import ops

EXTRAS = {"models": ("numpy", "gguf", "safetensors", "tokenizers", "jinja2", "tqdm")}
TOOLS = ("c++", "ninja", "nvcc", "clang-format")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def main(args: argparse.Namespace) -> int:
    """Prints what report() found; 1 if no native backend runs here, else 0."""
    found = report()
    print(json.dumps(found, indent=2) if args.json else _text(found))
    return 0 if any(found["backends"][b] is None for b in BACKENDS if b != "reference") else 1


def report() -> dict[str, Any]:
    """All findings as plain data. Under backends and ops, None is fine and a text says why not, and what to do."""
    return {
        "versions": {
            "pyarch": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".rstrip(", "),
        },
        "cpu": {
            "model": arch.cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "runs": arch.cpu_isas(),
            "loaded": native.cpu_isa,
            "missing": {isa: sorted(flags - arch.cpu_flags()) for isa, flags in arch.CPU_ISAS.items()},
        },
        "gpu": _gpus(),
        "tools": {name: _tool(name) for name in TOOLS},
        "extras": {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()},
        "backends": backends(),
        "ops": {name: _verdicts(op) for name, op in ops().items()},
        "advice": _advice(),
    }


def _verdicts(op: Op) -> dict[str, str | None]:
    """Per backend but the reference: None if the op runs on it here, else why not."""
    found: dict[str, str | None] = {}
    for backend, why in backends().items():
        if backend == "reference":
            continue
        if backend not in op.limits:
            why = f"no {backend} kernel"
        elif why is None and backend in ("cpu", "cuda"):
            why = native.missing(op.name, backend)
        if why is None and torch.cuda.is_available() and op.limits[backend].device == "cuda":
            why = op.limits[backend].outdated_gpu()
        found[backend] = why
    return found


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)}
        for p in properties
    ]


def _advice() -> list[str]:
    """What to do about what does not run here, most useful first."""
    advice = []
    if (reason := native.unavailable("cpu")) is not None:
        advice.append(f"cpu: {reason}")
    best = next(iter(arch.cpu_isas()), None)
    if native.cpu_isa not in (None, best):
        advice.append(f"cpu: the {best} library would be faster than {native.cpu_isa} and is not built: make build")
    if asked := arch.asked_cpu_isa():
        advice.append(f"cpu: PYARCH_CPU_ISA={asked} chooses the library; unset it to get the best")
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        advice.append("cuda, triton: there is a GPU driver, but this torch is built for the CPU: install a CUDA build")
    elif torch.version.cuda is not None and not torch.cuda.is_available():
        advice.append(f"cuda, triton: {native.no_device('cuda')}")
    missing = [name for names in EXTRAS.values() for name in names if _version(name) is None]
    if missing:
        advice.append(f"models: {', '.join(missing)} missing: pip install 'pyarch-kernels[models]'")
    return advice


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _tool(name: str) -> str | None:
    """The last line with a version that the tool prints, or None where there is no such tool."""
    path = shutil.which(name)
    if path is None:
        return None
    try:
        out = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "does not run"
    lines = [line.strip() for line in out.splitlines() if any(c.isdigit() for c in line)]
    if name == "nvcc":
        return lines[-1] if lines else "unknown version"
    return lines[0] if lines else "unknown version"


def _text(found: dict[str, Any]) -> str:
    cpu, lines = found["cpu"], []

    def section(title: str, rows: dict[str, Any]) -> None:
        width = max(map(len, rows), default=0)
        lines.append(title)
        lines.extend(f"  {name:{width}}  {value}" for name, value in rows.items())

    section("versions", {name: value or "not installed" for name, value in found["versions"].items()})
    isas = {isa: "loaded" if isa == cpu["loaded"] else "runs here" for isa in cpu["runs"]}
    isas |= {isa: f"no: this CPU lacks {', '.join(flags)}" for isa, flags in cpu["missing"].items() if flags}
    section(f"cpu: {cpu['model']}, {cpu['cores']} cores, torch uses {cpu['threads']} threads", isas)
    gpus = {f"{i}": f"{g['name']}, sm_{g['capability']}, {g['memory_gib']} GiB" for i, g in enumerate(found["gpu"])}
    section("gpu" if gpus else "gpu: none that this torch can use", gpus)
    section("tools", {name: value or "not found" for name, value in found["tools"].items()})
    section("backends", {name: "runs" if why is None else f"no: {why}" for name, why in found["backends"].items()})
    section("ops", {name: _sentence(verdicts) for name, verdicts in found["ops"].items()})
    if found["advice"]:
        lines += ["what to do", *(f"  {line}" for line in found["advice"])]
    return "\n".join(lines)


def _sentence(verdicts: dict[str, str | None]) -> str:
    runs = [name for name, why in verdicts.items() if why is None]
    none = [name for name, why in verdicts.items() if why == f"no {name} kernel"]
    parts = [", ".join([*runs, "reference"])]
    parts += [f"not {name}: {why}" for name, why in verdicts.items() if why is not None and name not in none]
    return "; ".join(parts + [f"no kernel: {', '.join(none)}"] * bool(none))
