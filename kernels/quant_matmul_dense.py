"""quant_matmul by torch's matmul (cuBLAS) on the weight as 16-bit numbers: for many rows of x, on cards where the tuner
measured that it wins (Config.dequantise in kernels/tuned). Elsewhere the weight is used as it is.

    codes -> w [N, K] of x's dtype in scratch, each rounded once   ->   x @ w.T + bias   ->   the activation, in place

It moves 2.5 bytes more for each 4-bit code, whatever M is, and rounds weights, and what an activation is applied to, as
PyTorch does.
"""

import torch
import triton
import triton.language as tl

from pyarch.kernels._quant_matmul import numbers, reduce, shift_of


@triton.jit
def _dequantise_kernel(
    q, scale, shift, w, N, K, G, GROUP, stride_q,  # q [N, K or K/2], scale and shift [N, G], w [N, K]
    BITS: tl.constexpr, SHIFT: tl.constexpr,  # SHIFT: 0 none, 1 zero, 2 offset
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BN rows and BK columns of w, all in one group."""
    CENTRE: tl.constexpr = 8 if BITS == 4 else 0
    WIDTH: tl.constexpr = BK * BITS // 8  # bytes
    dtype: tl.constexpr = w.dtype.element_ty
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    start = tl.program_id(1) * BK
    byte, k = start * BITS // 8 + tl.arange(0, WIDTH), start + tl.arange(0, BK)
    n_in = n < N
    q_tile = tl.load(q + n[:, None] * stride_q + byte[None, :], mask=n_in[:, None] & (byte < stride_q)[None, :])
    of_group = n * G + start // GROUP
    s = tl.load(scale + of_group, mask=n_in, other=0.0).to(tl.float32)  # [BN]
    t = shift_of(tl.load(shift + of_group, mask=n_in, other=0.0), s, CENTRE, SHIFT)[:, None] if SHIFT > 0 else 0.0
    if BITS == 4:
        even = numbers(q_tile & 15, s[:, None], t, 4, SHIFT, dtype)
        odd = numbers(q_tile >> 4, s[:, None], t, 4, SHIFT, dtype)
        values = tl.reshape(tl.join(even, odd), (BN, BK))
    else:
        values = numbers(q_tile, s[:, None], t, 8, SHIFT, dtype)
    tl.store(w + n[:, None] * K + k[None, :], values, mask=n_in[:, None] & (k < K)[None, :])


def dequantise(q, scale, zero, offset, in_features, group_size, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] in 16 bits, on the current GPU."""
    n, groups = scale.shape
    q, scale = q.contiguous(), scale.contiguous()
    shift = zero if zero is not None else offset
    w = torch.empty(n, in_features, dtype=dtype, device=q.device)
    group = in_features if groups == 1 else group_size
    block = 128 if groups == 1 else min(128, group & -group)
    _dequantise_kernel[triton.cdiv(n, 4096 // block), triton.cdiv(in_features, block)](
        q, scale, w if shift is None else shift.contiguous(), w, n, in_features, groups, group, q.stride(0),
        BITS=4 if q.dtype == torch.uint8 else 8, SHIFT=0 if shift is None else 1 if zero is not None else 2,
        BN=4096 // block, BK=block, num_warps=4, enable_fp_fusion=True,  # a multiply and an add become one rounding
    )  # fmt: skip
    return w


def launch(y, x, q, scale, zero, offset, bias, group_size, activation, slope):
    """Fills and returns y (M, N), on the current GPU."""
    w = dequantise(q, scale, zero, offset, x.shape[1], group_size, x.dtype)
    if bias is None:
        torch.mm(x, w.T, out=y)
    else:
        torch.addmm(bias.to(x.dtype), x, w.T, out=y)
    if activation:
        reduce(y, y, y, slope, HAS_BIAS=False, ACTIVATION=activation, SPLIT=1)
    return y
