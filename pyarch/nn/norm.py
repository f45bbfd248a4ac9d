"""RMSNorm through pyarch.rms_norm."""

from __future__ import annotations

import torch

from ..ops import rms_norm
from ..ops.rms_norm import RMS_NORM, check
from . import _direct


class RMSNorm(torch.nn.RMSNorm):
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
        self._direct = _direct.Direct()

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        weight = self.weight
        if self._direct.ready(x) and (residual is None or residual.is_contiguous()):
            y, s = _direct.rms_norm(x, weight, residual, eps)
            return y if residual is None else (y, s)
        result = rms_norm(x, weight, eps=eps, residual=residual)
        self._direct.learn(x, lambda: [(RMS_NORM, check(x, weight, eps=eps, residual=residual))])
        return result
