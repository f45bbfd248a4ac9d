"""The gradient of quant_matmul with respect to x in Triton: dx = dy @ w, for training through frozen weights.

A program owns BM rows and BK columns of dx and walks over the rows of w:

                    BK columns of w
                  +-----------------+    w is made of codes where it is used, rounded once to dy's dtype, as a PyTorch
      BN rows     |        w        |    weight would be:
                  +-----------------+        w = scale * (q - c) + shift      c and shift as in quant_matmul.py
  +-------------+ +-----------------+    scale and shift for the groups that the columns lie in: a tile may have parts
  | dy, BN of N | |    acc, fp32    | BM of several, CHUNK columns each.
  +-------------+ +-----------------+    4-bit codes: the even columns and the odd ones are products of their own, side
                                         by side only when dx is written.

dy is read ceil(K / BK) times, each byte of w ceil(M / BM) times, in one order of N: the same bits in every run.
"""

import torch
import triton
import triton.language as tl

from pyarch.kernels._common import bound, capability, dot, narrow, on_device_of
from pyarch.kernels._quant_matmul import Config, check_memory, numbers, shift_of


def config_for(m: int, arch: int) -> Config:
    """The config for m rows; block_n: weight rows of a step, block_k: columns of a tile of dx."""
    if m <= 64:
        return Config(block_m=16 if m <= 16 else 64, block_n=64, block_k=64, split_k=1, num_warps=4, num_stages=3)
    steps = 64 if arch >= 90 else 32  # w passes through registers, of which mma.sync wants more than wgmma
    return Config(block_m=128, block_n=steps, block_k=128, split_k=1, num_warps=8, num_stages=3)


@triton.jit
def _spread(value, BN: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """[BN, PARTS] -> [BN, WIDTH]: each part's value for its columns."""
    if PARTS == 1:
        return value
    else:
        return tl.reshape(tl.broadcast_to(value[:, :, None], (BN, PARTS, WIDTH // PARTS)), (BN, WIDTH))


@triton.jit
def _gradient_kernel(
    dy, q, scale, shift, dx,  # dy [M, N], q [N, K or K/2], scale and shift [N, G], dx [M, K]
    M, N, K, G, GROUP, stride_dm, stride_dn, stride_q, STEPS,
    BITS: tl.constexpr, SHIFT: tl.constexpr,  # SHIFT: 0 none, 1 zero, 2 offset
    CHUNK: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    CENTRE: tl.constexpr = 8 if BITS == 4 else 0
    WIDTH: tl.constexpr = BK * BITS // 8  # bytes
    PARTS: tl.constexpr = BK // CHUNK
    dtype: tl.constexpr = dx.dtype.element_ty
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    start = tl.program_id(1) * BK
    # Rows past an end are copies of the last: those of dy are not written, those of w meet zeros.
    m_row = tl.minimum(m, M - 1).to(tl.int64)
    byte = start * BITS // 8 + tl.arange(0, WIDTH)
    group = tl.minimum((start + tl.arange(0, PARTS) * CHUNK) // GROUP, G - 1)
    columns = tl.arange(0, BN)

    low = tl.zeros((BM, WIDTH), tl.float32)  # of 4-bit codes the even columns
    high = tl.zeros((BM, WIDTH), tl.float32)
    for step in range(bound(STEPS)):
        n = step * BN + columns
        n_row = tl.minimum(n, N - 1).to(tl.int64)
        dy_places = dy + m_row[:, None] * stride_dm + n.to(tl.int64)[None, :] * stride_dn
        q_places = q + n_row[:, None] * stride_q + byte[None, :]
        dy_tile = tl.load(dy_places) if EVEN_N else tl.load(dy_places, mask=(n < N)[None, :], other=0.0)  # [BM, BN]
        q_tile = tl.load(q_places) if EVEN_K else tl.load(q_places, mask=(byte < stride_q)[None, :])  # [BN, WIDTH]
        of_group = n_row[:, None] * G + group[None, :]  # [BN, PARTS]
        s = tl.load(scale + of_group).to(tl.float32)
        t = tl.zeros_like(s)
        if SHIFT > 0:
            t = _spread(shift_of(tl.load(shift + of_group), s, CENTRE, SHIFT), BN, PARTS, WIDTH)
        s = _spread(s, BN, PARTS, WIDTH)
        if BITS == 4:
            low = dot(dy_tile, numbers(q_tile & 15, s, t, 4, SHIFT, dtype), low)
            high = dot(dy_tile, numbers(q_tile >> 4, s, t, 4, SHIFT, dtype), high)
        else:
            low = dot(dy_tile, numbers(q_tile, s, t, 8, SHIFT, dtype), low)

    if BITS == 4:
        result = tl.reshape(tl.join(narrow(low, dtype), narrow(high, dtype)), (BM, BK))
    else:
        result = narrow(low, dtype)
    k = start + tl.arange(0, BK)
    inside = (m < M)[:, None] & (k < K)[None, :]
    tl.store(dx + m.to(tl.int64)[:, None] * K + k[None, :], result, mask=inside)


def backward(dy, q, scale, zero, offset, in_features, group_size):
    """pyarch::quant_matmul_backward__triton. dy (M, N) of 16-bit floats, any strides -> dx (M, K) of its dtype."""
    if dy.dim() != 2 or dy.dtype not in (torch.float16, torch.bfloat16) or in_features < 0:
        raise ValueError(f"dy, in_features: must be (M, N) in 16 bits and at least 0, not {dy.dtype}, {in_features}")
    dx = dy.new_empty((dy.shape[0], in_features))
    check_memory(dx, q, scale, zero, offset, None, None, dy.shape[1], group_size, 0)
    if dx.numel() == 0:
        return dx
    if dy.shape[1] == 0:
        return dx.zero_()
    with on_device_of(dy):
        return launch(config_for(len(dy), capability()), dx, dy, q, scale, zero, offset, group_size)


def launch(config: Config, dx, dy, q, scale, zero, offset, group_size):
    """Fills and returns dx (M, K) with the given config, on the current GPU. No size is 0."""
    (m, n), k, groups = dy.shape, dx.shape[1], scale.shape[1]
    q, scale = q.contiguous(), scale.contiguous()
    shift = zero if zero is not None else offset
    group = k if groups == 1 else group_size
    _gradient_kernel[triton.cdiv(m, config.block_m), triton.cdiv(k, config.block_k)](
        dy, q, scale, dx if shift is None else shift.contiguous(), dx,
        m, n, k, groups, group, dy.stride(0), dy.stride(1), q.stride(0), triton.cdiv(n, config.block_n),
        BITS=4 if q.dtype == torch.uint8 else 8, SHIFT=0 if shift is None else 1 if zero is not None else 2,
        CHUNK=config.block_k if groups == 1 else min(config.block_k, group & -group),
        EVEN_N=n % config.block_n == 0, EVEN_K=k % config.block_k == 0,
        BM=config.block_m, BN=config.block_n, BK=config.block_k, num_warps=config.num_warps,
        num_stages=config.num_stages, enable_fp_fusion=True,  # a multiply and an add become one rounding
    )  # fmt: skip
    return dx
