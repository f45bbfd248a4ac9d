"""rms_norm: root-mean-square layer normalisation, with the residual addition that precedes it in a transformer.

    s = x + residual            (rounded to x's dtype)
    y = s / sqrt(mean(s^2) + eps) * weight

    x         (..., n)   float32, bfloat16 or float16
    weight    (n)        the same dtype as x, or float32
    residual  (..., n)   like x, or None
    returns   y (..., n) like x; with a residual (y, s), since s is the next residual

Sums, the root and the product are fp32; y is rounded once. Gradients: of the formula, by the reference. What is not
contiguous is copied first (pyarch.copies).
Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
"""

from __future__ import annotations

from typing import Any

import torch

from ..dispatch import Facts, Limits, Op
from ..native import define, operator
from . import _args


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square norm over the last dimension; see the module's text for the formula.

    Raises TypeError or ValueError naming the argument; ValueError if the named backend cannot run the call.
    """
    facts = check(x, weight, eps=eps, residual=residual)
    chosen = RMS_NORM.choose(backend, facts)
    if chosen == "reference":
        return rms_norm_reference(x, weight, eps=eps, residual=residual)
    if _args.needs_grad(x, weight, residual):
        y, s = _RMSNorm.apply(x, weight, residual, eps, chosen)
    else:
        y, s = _run(chosen, x, weight, residual, eps)
    return y if residual is None else (y, s)


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The definition, in plain PyTorch: differentiable, any device and floating dtype."""
    s = x if residual is None else x + residual
    wide = s if s.dtype == torch.float64 else s.float()
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)
    return y if residual is None else (y, s)


def check(x: Any, weight: Any, *, eps: float = 1e-6, residual: Any = None) -> Facts:
    """Checks the arguments and returns the facts that dispatch compares with LIMITS."""
    _args.tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x: must have at least one dimension")
    _args.tensor("weight", weight, dtypes=(x.dtype, torch.float32), device=x.device, shape=x.shape[-1:])
    if residual is not None:
        _args.tensor("residual", residual, dtypes=(x.dtype,), device=x.device, shape=x.shape)
    if not eps >= 0:
        raise ValueError(f"eps: must be at least 0, not {eps}")
    return {"device": _args.device_type(x), "dtype": x.dtype}


def _run(backend: str, x, weight, residual, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    dense, rows = _args.contiguous, _args.rows
    more = None if residual is None else dense(rows(residual))
    y, s = operator("rms_norm", backend)(dense(rows(x)), dense(weight), more, eps)
    return _args.like_rows(y, x), s if residual is None else _args.like_rows(s, x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, eps, backend):
        y, s = _run(backend, x, weight, residual, eps)
        ctx.save_for_backward(x if residual is None else s, weight)
        ctx.eps, ctx.residual = eps, residual is not None
        if residual is None:
            ctx.mark_non_differentiable(s)
        return y, s

    @staticmethod
    def backward(ctx, dy, ds):
        s, weight = ctx.saved_tensors
        wide, dwide = s.float(), dy.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
        unit = wide * inverse
        dw = (dwide * unit).sum_to_size(weight.shape).to(weight.dtype)
        g = dwide * weight
        dx = ((g - unit * (g * unit).mean(-1, keepdim=True)) * inverse).to(s.dtype)
        if ctx.residual:
            dx = dx + ds
        return dx, dw, dx if ctx.residual else None, None, None


def _fake(x, weight, residual, eps):
    return torch.empty_like(x), x.new_empty((0,)) if residual is None else torch.empty_like(x)


LIMITS = {"cpu": Limits("cpu")}
RMS_NORM = Op("rms_norm", LIMITS, check, "the formula's derivative in PyTorch operations, twice differentiable")
define("rms_norm", "(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor, Tensor)", _fake)

OPS = {rms_norm: RMS_NORM}
CASES = {
    "smollm2-decode": dict(rows=1, n=576),
    "llama8b-decode": dict(rows=1, n=4096),
    "llama8b-prompt": dict(rows=2048, n=4096),
}


def flops(case: dict) -> int:
    return 4 * case["rows"] * case["n"]


def bytes_moved(case: dict, dtype: torch.dtype) -> int:
    return 2 * case["rows"] * case["n"] * dtype.itemsize
