"""swiglu: the gated activation of a transformer's feed-forward block.

    y = silu(gate) * up        silu(g) = g / (1 + exp(-g)),  x = [gate | up]

    x         (..., 2F)  float32, bfloat16 or float16: the output of one matmul with both weights
    returns   (..., F)   like x

The product is fp32 and rounded once. Gradients: of the formula, in PyTorch operations. An x whose rows are not
contiguous, or not evenly apart, is copied first (pyarch.copies).
Shazeer, GLU Variants Improve Transformer, 2020.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..dispatch import Facts, Limits, Op
from ..native import define, operator
from . import _args


def swiglu(x: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """silu(x[..., :F]) * x[..., F:] for x (..., 2F); see the module's text.

    Raises TypeError or ValueError naming the argument; ValueError if the named backend cannot run the call.
    """
    chosen = SWIGLU.choose(backend, check(x))
    if chosen == "reference":
        return swiglu_reference(x)
    if _args.needs_grad(x):
        return _SwiGLU.apply(x, chosen)
    return _run(chosen, x)


def swiglu_reference(x: torch.Tensor) -> torch.Tensor:
    """The definition, in plain PyTorch: differentiable, any device and floating dtype."""
    gate, up = (x if x.dtype == torch.float64 else x.float()).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def check(x: Any) -> Facts:
    """Checks the argument and returns the facts that dispatch compares with LIMITS."""
    _args.tensor("x", x)
    if not x.is_floating_point():
        raise TypeError(f"x: dtype must be floating, not {x.dtype}")
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"x: the last dimension must be even (gate and up), not shape {tuple(x.shape)}")
    return {"device": _args.device_type(x), "dtype": x.dtype}


def _run(backend: str, x: torch.Tensor) -> torch.Tensor:
    return _args.like_rows(operator("swiglu", backend)(_args.row_contiguous(_args.rows(x))), x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, backend):
        ctx.save_for_backward(x)
        return _run(backend, x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        gate, up = x.float().chunk(2, dim=-1)
        s, wide = torch.sigmoid(gate), dy.float()
        dgate = wide * up * s * (1 + gate * (1 - s))
        return torch.cat((dgate, wide * gate * s), dim=-1).to(x.dtype), None


def _fake(x):
    return x.new_empty((x.shape[0], x.shape[1] // 2))


LIMITS = {"cpu": Limits("cpu")}
SWIGLU = Op("swiglu", LIMITS, check, "the formula's derivative in PyTorch operations, twice differentiable")
define("swiglu", "(Tensor x) -> Tensor", _fake)

OPS = {swiglu: SWIGLU}
CASES = {
    "smollm2-decode": dict(rows=1, features=1536),
    "llama8b-decode": dict(rows=1, features=14336),
    "smollm2-prompt": dict(rows=512, features=1536),
    "llama8b-prompt": dict(rows=512, features=14336),
}


def flops(case: dict) -> int:
    return 12 * case["rows"] * case["features"]  # the exponential counted as its polynomial


def bytes_moved(case: dict, dtype: torch.dtype) -> int:
    return 3 * case["rows"] * case["features"] * dtype.itemsize
