"""explain: which backend a call would take, why not another, and how its gradient is computed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from .dispatch import BACKENDS, Op


@dataclass(frozen=True)
class Explanation:
    """What explain() found. `backend` is the one that would run; `refused` says why each other one would not."""

    op: str
    backend: str
    permitted: tuple[str, ...]
    refused: dict[str, str]
    gradient: str
    note: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.op} -> {self.backend}"]
        lines += [f"  {name}: {'chosen' if name == self.backend else 'permitted'}" for name in self.permitted]
        lines += [f"  {name}: no, {reason}" for name, reason in self.refused.items()]
        lines += [f"  note: {self.note}"] if self.note else []
        return "\n".join([*lines, f"  gradient: {self.gradient}"])


def op_of(target: Callable) -> Op:
    """The Op behind a public function. Raises TypeError for anything else."""
    room = sys.modules.get(getattr(target, "__module__", None) or "")
    op = getattr(room, "OPS", {}).get(target)
    if op is None:
        raise TypeError(f"target: must be a pyarch op, not {target!r}")
    return op


def ops() -> dict[str, Op]:
    """Every op by its name, in the rooms' order."""
    prefix = f"{__package__}.ops."
    rooms = [module for name, module in list(sys.modules.items()) if name.startswith(prefix)]
    return {op.name: op for room in rooms for op in getattr(room, "OPS", {}).values()}


def explain(target: Callable, *args, backend: str = "auto", **kwargs) -> Explanation:
    """Which backend `target(*args, **kwargs)` takes and why; nothing is computed.

    target: a public op such as pyarch.quant_matmul. Raises what the call itself would raise for bad arguments.
    """
    op = op_of(target)
    facts = op.check(*args, **kwargs)
    refused = {name: reason for name in BACKENDS if (reason := op.refuses(name, facts)) is not None}
    permitted = tuple(name for name in BACKENDS if name not in refused)
    chosen = op.choose(backend, facts)
    note = op.note(chosen, *args, **kwargs) if op.note else None
    return Explanation(op.name, chosen, permitted, refused, op.gradient, note)
