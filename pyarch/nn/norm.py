"""RMSNorm through pyarch.rms_norm."""

from __future__ import annotations

import torch

from ..ops import rms_norm
from ._watched import Watched


class RMSNorm(Watched, torch.nn.RMSNorm):
    """torch.nn.RMSNorm over the last dimension, with the residual addition that precedes it in a transformer.

    normalized_shape  n, or (n,)
    eps               torch's default (None) is the machine epsilon of x's dtype, as in torch
    forward(x)            x (..., n) -> (..., n)
    forward(x, residual)  -> (norm of x + residual, x + residual)
    """

    def __init__(self, normalized_shape, eps: float | None = None, elementwise_affine: bool = True, device=None,
                 dtype=None) -> None:  # fmt: skip
        super().__init__(normalized_shape, eps, elementwise_affine, device=device, dtype=dtype)
        if len(self.normalized_shape) != 1 or not elementwise_affine:
            raise ValueError("normalized_shape: must be one dimension, with elementwise_affine=True")

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return rms_norm(x, self.weight, eps=eps, residual=residual)
