"""Activations of epilogues: their names, what they mean in PyTorch, and their codes in native kernels (epilogue.h)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Activation = str | tuple[str, float] | None
NAMES = (None, "relu", "silu", "gelu", "gelu_tanh")


def encode(activation: Activation) -> tuple[int, float]:
    """(code, slope) for the operators. Raises ValueError for an unknown activation."""
    if activation is None:
        return 0, 0.0
    if isinstance(activation, (tuple, list)) and len(activation) == 2 and activation[0] == "leaky_relu":
        return len(NAMES), float(activation[1])
    if activation not in NAMES:
        raise ValueError(f"activation: must be one of {NAMES} or ('leaky_relu', slope), not {activation!r}")
    return NAMES.index(activation), 0.0


def apply(activation: Activation, y: torch.Tensor) -> torch.Tensor:
    """The activation in plain PyTorch. gelu is the erf form, gelu_tanh the tanh approximation."""
    code, slope = encode(activation)
    if code == 0:
        return y
    if code == len(NAMES):
        return F.leaky_relu(y, slope)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    return (F.relu, F.silu, F.gelu)[code - 1](y)
