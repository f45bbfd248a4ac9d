"""Which backend runs a call: limits as data, one verdict per backend, and `use_backend`.

A room computes the *facts* of a call (dtype, device, head_dim, ...) while it checks the arguments; an Op's limits are
compared with them. A named backend runs or raises with the limit it violates; `auto` takes the first permitted in the
Op's order, which recorded measurements set.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from . import arch, native

BACKENDS = ("cpu", "cuda", "triton", "reference")
Facts = Mapping[str, Any]

_forced: contextvars.ContextVar[str] = contextvars.ContextVar("pyarch_backend", default="auto")
_forced_in_graphs = "auto"  # the same for torch.compile, which cannot read a ContextVar but guards on a global
_blocks: dict[object, str] = {}  # the use_backend blocks open in the process, oldest first
_log = logging.getLogger("pyarch")
_warned: set[str] = set()


@dataclass(frozen=True)
class Limits:
    """What one backend of one op takes. Every fact named here must be among the facts of a call."""

    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    allowed: Mapping[str, tuple] = field(default_factory=dict)  # fact -> the values it may have
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # fact -> smallest and largest value
    capability: tuple[int, int] = (0, 0)  # least CUDA compute capability
    unless: Callable[[Facts], str | None] | None = None  # the one predicate: returns its reason

    def refuses(self, facts: Facts, interpreted: bool = False) -> str | None:
        """The first limit that these facts violate, as text; None if all hold. Interpreted kernels take CPU tensors."""
        if facts["device"] != ("cpu" if interpreted else self.device):
            return f"runs on {self.device} tensors, these are on {facts['device']}"
        if facts["dtype"] not in self.dtypes:
            return f"takes dtype {', '.join(map(_name, self.dtypes))}, not {_name(facts['dtype'])}"
        for fact, values in self.allowed.items():
            if facts[fact] not in values:
                return f"takes {fact} {' or '.join(map(str, values))}, not {facts[fact]}"
        for fact, (low, high) in self.ranges.items():
            if not low <= facts[fact] <= high:
                return f"takes {fact} {low} to {high}, not {facts[fact]}"
        if facts["device"] == "cuda" and (reason := self.outdated_gpu()):
            return reason
        return self.unless(facts) if self.unless else None

    def outdated_gpu(self) -> str | None:
        """Why the GPU of this machine, which has one, is too old; None if it is not."""
        if self.capability > (0, 0) and (have := torch.cuda.get_device_capability()) < self.capability:
            return f"needs compute capability {self.capability}, this GPU has {have}"
        return None


@dataclass(frozen=True)
class Op:
    """An op as dispatch and explain see it. `limits` is in the order in which `auto` tries."""

    name: str
    limits: Mapping[str, Limits]
    check: Callable[..., Facts]  # the public function's arguments, less backend -> facts; raises on bad input
    gradient: str  # one sentence: how gradients are computed
    note: Callable[..., str | None] | None = None  # (backend, *arguments): what else explain says of a call

    def refuses(self, backend: str, facts: Facts) -> str | None:
        """Why this backend cannot run this call; None if it can."""
        if backend == "reference":
            return None
        limits = self.limits.get(backend)
        if limits is None:
            return f"{self.name} has no {backend} kernel"
        return native.unavailable(backend) or limits.refuses(facts, backend == "triton" and arch.interpreting())

    def choose(self, backend: str, facts: Facts) -> str:
        """The backend that runs. Raises ValueError for an unknown name or one that cannot run this call."""
        if backend == "auto":
            backend = _forced_in_graphs if torch.compiler.is_compiling() else _forced.get()
        if backend == "auto":
            for name in self.limits:
                if self.refuses(name, facts) is None:
                    return name
            if facts["device"] == "cuda" and not torch.compiler.is_compiling() and self.name not in _warned:
                _warned.add(self.name)
                _log.warning("%s runs on its PyTorch reference; pyarch.explain says why", self.name)
            return "reference"
        if backend not in BACKENDS:
            raise ValueError(f"backend: {backend!r} is not one of auto, {', '.join(BACKENDS)}")
        reason = self.refuses(backend, facts)
        if reason is not None:
            raise ValueError(f"backend: {backend!r} cannot run this {self.name}: {reason}")
        return backend


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the block, `auto` means this backend. Raises ValueError for an unknown name.

    Each thread and asyncio task has its own choice; functions under torch.compile see the latest one of the process,
    and are compiled anew when it changes. Enter the block outside a compiled function.
    """
    global _forced_in_graphs
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"name: {name!r} is not one of auto, {', '.join(BACKENDS)}")
    token, block = _forced.set(name), object()
    _blocks[block] = _forced_in_graphs = name
    try:
        yield
    finally:
        _forced.reset(token)
        del _blocks[block]  # blocks of several tasks end in any order
        _forced_in_graphs = next(reversed(_blocks.values()), "auto")


def forced() -> str:
    """What `use_backend` says here; "auto" outside its blocks."""
    return _forced.get()


def backends() -> dict[str, str | None]:
    """Every backend, with None where it can run in this process and the reason where it cannot."""
    return {name: native.unavailable(name) or native.no_device(name) for name in BACKENDS}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
