"""How many copies ops make of arguments in layouts that their kernels cannot read. A leaf: rooms and kernels count."""

from __future__ import annotations

import torch

_made = [0, 0]


def copies() -> tuple[int, int]:
    """(how many, their bytes): the copies that ops have made, since the process began, of arguments that lie in memory
    as their kernel cannot read them. Each op says which it copies. Not counted: in compiled functions."""
    return _made[0], _made[1]


def copied(t: torch.Tensor) -> torch.Tensor:
    """t, which is such a copy, counted."""
    if not torch.compiler.is_compiling():
        _made[0] += 1
        _made[1] += t.nbytes
    return t
