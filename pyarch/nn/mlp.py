"""The gated feed-forward block."""

from __future__ import annotations

import torch

from ..ops import swiglu
from ._watched import Watched
from .linear import Linear


class SwiGLU(Watched):
    """down(silu(gate(x)) * up(x)), gate and up as one projection; x (..., hidden_size) -> the same shape.

    Shazeer, GLU Variants Improve Transformer, 2020.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up: torch.nn.Module = Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down: torch.nn.Module = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(swiglu(self.gate_up(x)))
