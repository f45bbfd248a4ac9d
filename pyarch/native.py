"""The operators: one private, tensors-only torch operator per op and backend, and the libraries that implement them.

A room defines its operator once; all backends share the schema and the fake:

    define("rms_norm", "(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor, Tensor)", fake)

gives torch.ops.pyarch.rms_norm__cpu, __cuda and __triton. C++ libraries register the first two when they are loaded;
the Triton one calls kernels/<op>.py, which is imported on first use, so that `import pyarch` needs torch alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import arch

_OPERATORS: dict[tuple[str, str], Callable] = {}
_LIBRARY = torch.library.Library("pyarch", "DEF")
_FOLDER = Path(__file__).parent
_REBUILD = "pip install --no-build-isolation -e . (or make build)"


def _load(stem: str) -> str | None:
    """Loads a library beside this file; returns why not, or None."""
    path = next(_FOLDER.glob(f"{stem}.*so"), None)
    if path is None:
        return f"{stem} is not built: {_REBUILD}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load under torch {torch.__version__} ({error}): {_REBUILD}"
    return None


def _load_cpu() -> tuple[str | None, str | None]:
    """(instruction set of the loaded library, None) or (None, why there is none)."""
    reason = None
    for isa in arch.cpu_isas():
        why = _load(f"_cpu_{isa}")
        if why is None:
            return isa, None
        reason = reason or why
    return None, reason


cpu_isa, _no_cpu = _load_cpu()
if torch.version.cuda is None:
    _no_cuda: str | None = "this torch is built without CUDA"
else:
    _no_cuda = _load("_cuda")


if importlib.util.find_spec("triton") is None:
    _no_triton: str | None = "triton is not installed: pip install triton"
elif not (torch.version.cuda or arch.interpreting()):
    _no_triton = "this torch is built without CUDA (TRITON_INTERPRET=1 interprets the kernels, for tests)"
else:
    _no_triton = None


_UNAVAILABLE = {"cpu": _no_cpu, "cuda": _no_cuda, "triton": _no_triton, "reference": None}


def unavailable(backend: str) -> str | None:
    """Why what a backend ('cpu', 'cuda', 'triton', 'reference') runs on is not loaded; None if it is."""
    return _UNAVAILABLE[backend]


def no_device(backend: str) -> str | None:
    """Why this machine has no device for a backend; None if it has one. Asks the driver, so it is not for every call:
    a tensor on a device proves that it exists."""
    if backend not in ("cuda", "triton") or (backend == "triton" and arch.interpreting()) or torch.cuda.is_available():
        return None
    return "torch finds no GPU here: check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"


def missing(name: str, backend: str) -> str | None:
    """Why the op of this name has no operator on a backend whose library is loaded ('cpu', 'cuda'); None if it has."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"pyarch::{name}__{backend}", backend.upper()):
        return None
    return f"the {backend} library is older than {name}: {_REBUILD}"


def define(name: str, schema: str, fake: Callable, triton: str | None = None) -> None:
    """Declares pyarch::<name>__{cpu,cuda,triton} with one schema and one fake (shape inference).

    triton: 'module:function' under pyarch.kernels that implements the Triton one.
    """
    for backend in ("cpu", "cuda", "triton"):
        _LIBRARY.define(f"{name}__{backend}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"pyarch::{name}__{backend}", fake, lib=_LIBRARY)
        _OPERATORS[name, backend] = getattr(torch.ops.pyarch, f"{name}__{backend}").default
    if triton is not None:
        module, function = triton.split(":")

        def run(*args):
            return getattr(importlib.import_module(f"pyarch.kernels.{module}"), function)(*args)

        for key in ("CUDA", "CPU") if arch.interpreting() else ("CUDA",):
            _LIBRARY.impl(f"{name}__triton", run, key)


_LIBRARY.define("poison_memory(bool on) -> ()")
_LIBRARY.define("keep_decoder_blocks(Tensor?[] tensors, int[] sizes, float[] numbers) -> int")
_LIBRARY.define("drop_decoder_blocks(int layers) -> ()")


def poison(on: bool) -> None:
    """For tests: while on, the CPU library fills what it allocates with 0xff (NaN in every float type)."""
    if cpu_isa is not None:
        torch.ops.pyarch.poison_memory(on)


def operator(name: str, backend: str) -> Callable:
    """The torch operator of an op on a backend."""
    return _OPERATORS[name, backend]


def refusal(error: RuntimeError) -> Exception:
    """An operator's refusal of an argument, "name: ...", as the ValueError that it is; any other error as it was.

    C++ throws invalid_argument, of which torch made a ValueError and, from 2.15 at the latest, makes a RuntimeError.
    """
    text = str(error)
    return ValueError(text) if text.partition(":")[0].isidentifier() and ": " in text else error


class Recorder(TorchDispatchMode):
    """Notes the operators that run inside: calls of pyarch's, with their arguments, results of these, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []
        self.results: list[Any] = []
        self.others: set[Any] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch's own switch; else the first call imports its compiler: 140 MB, 2 s
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "pyarch":
            self.calls.append((func, args))
            self.results.append(result)
        else:
            self.others.add(func)
        return result
