"""quant_matmul: y = act(x @ w.T + bias) with w a QuantizedTensor of 4-bit or 8-bit codes (pyarch/quantized.py).

    x         (..., K)  float32, bfloat16 or float16; float64 on the reference only
    weight    QuantizedTensor [N, K], any group size; scale and zero or offset in their own dtypes. A PackedTensor
              (weight.prepack()) gives the same bits faster on the cpu backend: 1.1 to 1.4 times for one row; the cuda
              backend takes packed weights alone, and triton canonical ones
    bias      (N)       x's dtype or float32, or None
    returns   (..., N)  x's dtype

Weights are used exactly as the codes say; sums are fp32 (bf16 dot products only for bf16 x) and y is rounded once. But
where a record of the card says that torch's matmul is faster for many rows (explain tells), Triton rounds weights to
x's dtype for it.

act_bits=8 also rounds the activations to int8, inside the call: one fp32 scale per row and weight group (per row when
the group is the row), amax / 127, round half to even. It changes answers (about 0.5 % of the output's norm), so it is
never chosen for you; int8 products are summed exactly in int32 within a group (in fp32 where groups are scattered by
g_idx or do not fill whole 32-bit words). Triton rounds x once a call, into memory of its own: so it takes float32.

x is read in place if its rows are evenly apart; else it is copied first, and so are weights and bias that are not
contiguous (pyarch.copies). cuda reads 16 bytes at a time where x's rows begin at multiples of 16 bytes (K a multiple of
8), else element by element, which is slower.

A row of y is bitwise the same for any M: on the CPU for any number of threads too (per CPU library), in cuda per GPU
architecture. Where a group has a zero or an offset, an infinity in x may come out as NaN on a GPU.
Gradients: for x and bias, through the dequantised weight, and through act_bits=8 as if it did not round (straight
through); the codes have none. On a GPU the weight is rounded to x's dtype there, and so is what an activation is
applied to where a gradient is wanted.
Frantar et al., GPTQ, 2022; Lin et al., AWQ, 2023, for the formats.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..dispatch import Facts, Limits, Op
from ..native import define, operator
from ..orders import ORDERS
from ..quantized import PackedTensor, QuantizedTensor
from . import _activation, _args
from ._activation import Activation


def quant_matmul(
    x: torch.Tensor,
    weight: QuantizedTensor | PackedTensor,
    bias: torch.Tensor | None = None,
    *,
    activation: Activation = None,
    act_bits: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """act(x @ weight.T + bias) with quantised weights; see the module's text.

    activation: None, "relu", "silu", "gelu" (erf), "gelu_tanh" or ("leaky_relu", slope).
    act_bits: None, or 8 to round activations to int8 inside the call.
    Raises TypeError or ValueError naming the argument; ValueError if the named backend cannot run the call.
    """
    facts = check(x, weight, bias, activation=activation, act_bits=act_bits)
    chosen = QUANT_MATMUL.choose(backend, facts)
    if chosen == "reference":
        return quant_matmul_reference(x, weight, bias, activation=activation, act_bits=act_bits)
    if _args.needs_grad(x, bias):
        # The activation stays with autograd: its derivative needs the value before. On the CPU it is kept in float32.
        if chosen != "cpu" or (bias is None and activation is None):
            return _activation.apply(activation, _QuantMatmul.apply(x, bias, weight, act_bits, chosen))
        y = _QuantMatmul.apply(x.float(), None if bias is None else bias.float(), weight, act_bits, chosen)
        return _activation.apply(activation, y).to(x.dtype)
    return _run(chosen, x, weight, bias, activation, act_bits)


def quant_matmul_reference(
    x: torch.Tensor,
    weight: QuantizedTensor | PackedTensor,
    bias: torch.Tensor | None = None,
    *,
    activation: Activation = None,
    act_bits: int | None = None,
) -> torch.Tensor:
    """The definition, in plain PyTorch, in float32 (float64 for float64 x): differentiable, every device."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    operand = x.to(wide)
    if act_bits == 8:
        codes, scale = quantize_activations(operand.detach(), weight)
        operand = codes * scale + (operand - operand.detach())  # the gradient passes the rounding unchanged
    y = F.linear(operand, weight.dequantize(wide), None if bias is None else bias.to(wide))
    return _activation.apply(activation, y).to(x.dtype)


def quantize_activations(x: torch.Tensor, weight: QuantizedTensor | PackedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What act_bits=8 does to x (..., K): its int8 codes, as numbers, and their scale, both (..., K)."""
    group = weight.column_groups()
    index = group.expand(x.shape)
    amax = x.new_zeros((*x.shape[:-1], weight.groups)).scatter_reduce(-1, index, x.abs(), "amax")
    scale = (amax / 127)[..., group]
    codes = torch.where(scale > 0, x / scale, 0.0).round().clamp(-127, 127)
    return codes, scale


def check(x: Any, weight: Any, bias: Any = None, *, activation: Any = None, act_bits: int | None = None) -> Facts:
    """Checks the arguments and returns the facts that dispatch compares with LIMITS."""
    _args.tensor("x", x)
    if not isinstance(weight, (QuantizedTensor, PackedTensor)):
        raise TypeError(f"weight: must be a QuantizedTensor (pyarch.quantize makes one), not {type(weight).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x: dtype must be floating, not {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != weight.in_features:
        raise ValueError(f"x: last dimension must be {weight.in_features} (weight's K), not shape {tuple(x.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight: must be on {x.device} like x, not {weight.device}")
    if bias is not None:
        _args.tensor("bias", bias, dtypes=(x.dtype, torch.float32), device=x.device, shape=(weight.out_features,))
    _activation.encode(activation)
    if act_bits not in (None, 8):
        raise ValueError(f"act_bits: must be None or 8, not {act_bits!r}")
    return {
        "device": _args.device_type(x),
        "dtype": x.dtype,
        "bits": weight.bits,
        "group_size": weight.group_size,
        "g_idx": weight.g_idx is not None,
        "order": weight.order,
        "act_bits": act_bits,
    }


def order_for(weight: QuantizedTensor | PackedTensor, dtype: torch.dtype, *, act_bits: int | None = None) -> str:
    """The order (pyarch/orders.py) of this weight that the kernels of its device read, for x of this dtype, where
    gradients are not asked for: "canonical" where none of them takes it packed."""
    facts = check(torch.empty(0, weight.in_features, dtype=dtype, device=weight.device), weight, act_bits=act_bits)
    for name, order in ORDERS.items():
        if order.device == facts["device"]:
            packed = {**facts, "order": name}
            if any(QUANT_MATMUL.refuses(backend, packed) is None for backend in LIMITS):
                return name
    return "canonical"


def _run(
    backend: str, x, weight: QuantizedTensor | PackedTensor, bias, activation: Activation, act_bits
) -> torch.Tensor:
    dense, (code, slope) = _args.contiguous, _activation.encode(activation)
    y = operator("quant_matmul", backend)(
        _args.rows(x), dense(weight.q), dense(weight.scale), dense(weight.zero), dense(weight.offset),
        dense(weight.g_idx), dense(bias), weight.out_features, weight.group_size, act_bits or 0, code, slope,
    )  # fmt: skip
    return _args.like_rows(y, x)


class _QuantMatmul(torch.autograd.Function):
    """x @ w.T + bias. Its gradients are linear in dy, and differentiable."""

    @staticmethod
    def forward(ctx, x, bias, weight, act_bits, backend):
        ctx.weight, ctx.backend, ctx.bias = weight, backend, None if bias is None else (bias.shape, bias.dtype)
        return _run(backend, x, weight, bias, None, act_bits)

    @staticmethod
    def backward(ctx, dy):
        wide = torch.float32 if dy.dtype != torch.float64 else torch.float64
        d_x = d_bias = None
        if ctx.needs_input_grad[1]:
            d_bias = dy.to(wide).sum_to_size(ctx.bias[0]).to(ctx.bias[1])
        if ctx.needs_input_grad[0] and ctx.backend == "triton" and dy.dtype in NATIVE_GRADIENT:
            native = torch.is_grad_enabled() and not torch.compiler.is_compiling()
            d_x = (_Gradient.apply if native else _run_backward)(dy, ctx.weight, ctx.backend)
        elif ctx.needs_input_grad[0]:
            d_x = (dy.to(wide) @ ctx.weight.dequantize(wide)).to(dy.dtype)
        return d_x, d_bias, None, None, None


class _Gradient(torch.autograd.Function):
    """dy @ w, whose own gradient is quant_matmul again."""

    @staticmethod
    def forward(ctx, dy, weight, backend):
        ctx.weight, ctx.backend = weight, backend
        return _run_backward(dy, weight, backend)

    @staticmethod
    def backward(ctx, d_dx):
        return _QuantMatmul.apply(d_dx, None, ctx.weight, None, ctx.backend), None, None


def _run_backward(dy: torch.Tensor, weight: QuantizedTensor, backend: str) -> torch.Tensor:
    dense = _args.contiguous
    dx = operator("quant_matmul_backward", backend)(
        _args.rows(dy), dense(weight.q), dense(weight.scale), dense(weight.zero), dense(weight.offset),
        weight.in_features, weight.group_size,
    )  # fmt: skip
    return _args.like_rows(dx, dy)


def _fake(x, q, scale, zero, offset, g_idx, bias, out_features, group_size, act_bits, activation, slope):
    return x.new_empty((x.shape[0], out_features))


def _fake_backward(dy, q, scale, zero, offset, in_features, group_size):
    return dy.new_empty((dy.shape[0], in_features))


def _group_refused(facts: Facts) -> str | None:
    if facts["group_size"] != -1 and (facts["group_size"] < 32 or facts["group_size"] % 32):
        return f"takes group_size -1 or a multiple of 32, not {facts['group_size']}"
    return None


def _not_in_cuda(facts: Facts) -> str | None:
    if facts["order"] != "fragments":
        return f"takes weights packed as fragments (weight.prepack() on the GPU), not {facts['order']} ones"
    return _group_refused(facts)


def _not_in_triton(facts: Facts) -> str | None:
    if facts["dtype"] == torch.float32 and facts["act_bits"] is None:
        return "takes float32 with act_bits=8 alone"
    return _group_refused(facts)


def _note(backend: str, x: torch.Tensor, weight: QuantizedTensor | PackedTensor, *_, act_bits=None, **__) -> str | None:
    """What a tuned config of this card says of a call."""
    if backend != "triton" or act_bits is not None:
        return None
    from ..kernels.quant_matmul import config_for

    shape = x.shape[:-1].numel(), weight.out_features, weight.in_features
    dense = config_for(shape, weight.bits, 90).dequantise
    return "on this card torch's matmul on the dequantised weight was measured faster, and runs" if dense else None


LIMITS = {
    "cpu": Limits("cpu", allowed={"order": ("canonical", "panels")}),
    "cuda": Limits(
        "cuda",
        dtypes=(torch.bfloat16, torch.float16),
        allowed={"g_idx": (False,), "act_bits": (None,)},
        capability=(8, 0),
        unless=_not_in_cuda,
    ),
    "triton": Limits(
        "cuda",
        allowed={"g_idx": (False,), "order": ("canonical",)},
        capability=(8, 0),
        unless=_not_in_triton,
    ),
}
QUANT_MATMUL = Op(
    "quant_matmul",
    LIMITS,
    check,
    "for x and bias, any number of times; that of x on triton by a native kernel (16-bit x), else through the"
    " dequantised weight in PyTorch operations",
    _note,
)
NATIVE_GRADIENT = (torch.bfloat16, torch.float16)  # the dtypes for which Triton has one
define(
    "quant_matmul",
    "(Tensor x, Tensor q, Tensor scale, Tensor? zero, Tensor? offset, Tensor? g_idx, Tensor? bias,"
    " int out_features, int group_size, int act_bits, int activation, float slope) -> Tensor",
    _fake,
    triton="quant_matmul:forward",
)
define(
    "quant_matmul_backward",
    "(Tensor dy, Tensor q, Tensor scale, Tensor? zero, Tensor? offset, int in_features, int group_size) -> Tensor",
    _fake_backward,
    triton="quant_matmul_backward:backward",
)

OPS = {quant_matmul: QUANT_MATMUL}
CASES = {
    "smollm2-down-decode": dict(m=1, n=576, k=1536, group_size=32),
    "llama7b-attention-decode": dict(m=1, n=4096, k=4096, group_size=128),
    "llama7b-up-decode": dict(m=1, n=11008, k=4096, group_size=128),
    "llama7b-attention-16": dict(m=16, n=4096, k=4096, group_size=128),
    "llama7b-attention-128": dict(m=128, n=4096, k=4096, group_size=128),
}


def flops(case: dict) -> int:
    return 2 * case["m"] * case["n"] * case["k"]


def bytes_moved(case: dict, bits: int) -> int:
    """Weight codes and their scales (2 bytes each): what a small M has to read."""
    groups = 1 if case["group_size"] == -1 else -(-case["k"] // case["group_size"])
    return case["n"] * (case["k"] * bits // 8 + 2 * groups)
