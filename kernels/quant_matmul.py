"""quant_matmul in Triton: y = act(x @ w.T + bias), int4 or int8 codes, fp16 or bf16 x (pyarch/ops/quant_matmul.py).

With act_bits=8 quant_matmul_act8.py computes, also for fp32 x; quant_matmul_backward.py has the gradient.

A program owns a tile of y, BN weight rows by BM rows of x, and one of SPLIT ranges of K:

                 BM rows of x                 The weight is the left operand, so that on sm_90 its codes go from
               +--------------+               registers into wgmma without a turn through shared memory.
      BK of K  |   x tile.T   |               A step takes BK columns, which lie in one group:
               +--------------+                   acc += scale * (q - c) @ x.T  +  shift * sum(x)
  +----------+ +--------------+               with c = 8 for 4-bit codes, 0 for 8-bit ones, and shift
  | q - c    | | acc, fp32    |  BN rows of w     none: no term   zero: -scale * (zero - c)   offset: offset + scale * c
  +----------+ +--------------+

q - c is exact in 16 bits, so weights are used exactly as the codes say: products and sums are fp32 and y is rounded
once. A 4-bit tile is two dots, of the even columns (low nibbles) and of the odd ones, so nothing is interleaved.
An infinity in x may come out as NaN where there is a shift, since its two terms are then both infinite.

Each weight byte is read ceil(M / BM) times, each byte of x ceil(N / BN) times. With SPLIT > 1 the partial sums go
through fp32 memory [SPLIT, M, N] and a second kernel adds them in order: bitwise repeatable, no atomics.
"""

import torch
import triton
import triton.language as tl

from pyarch.kernels import quant_matmul_act8, quant_matmul_dense
from pyarch.kernels._common import capability, dot, on_device_of
from pyarch.kernels._quant_matmul import Config, centred, check_memory, finish, fit, multiprocessors, reduce, shift_of
from pyarch.kernels._tuned import tuned


def key_for(shape: tuple[int, int, int], bits: int, rounded: bool = False, grouped: bool = True) -> str:
    """What calls share a tuned config: the rows of a tile, and the weight's elements to a power of two. rounded: with
    act_bits=8, where it also counts whether a row of the weight has groups."""
    m, n, k = shape
    rows = next((rows for rows in (16, 32, 64, 256, 1024) if m <= rows), "more")
    kind = f"int{bits}" + " act8" * rounded + " row" * (rounded and not grouped)
    return f"{kind} m{rows} 2^{(n * k).bit_length() - 1}"


def default_for(shape: tuple[int, int, int], arch: int) -> Config:
    """The config for (m, n, k) where none is tuned; split_k: the most parts that K may have."""
    m, n, _ = shape
    if m <= 32:
        return Config(block_m=16 if m <= 16 else 32, block_n=64, block_k=128, split_k=16, num_warps=4, num_stages=4)
    if m * n <= 64 * 64 * multiprocessors(arch):
        return Config(block_m=64, block_n=64, block_k=64, split_k=16, num_warps=4, num_stages=4)
    return Config(block_m=128, block_n=128, block_k=64, split_k=16, num_warps=8, num_stages=3)


def config_for(
    shape: tuple[int, int, int], bits: int, arch: int, rounded: bool = False, grouped: bool = True
) -> Config:
    """The config for (m, n, k) and int4 or int8 codes: tiles as tuned on this card, and a split K until every
    multiprocessor reads weights. rounded, grouped: as key_for."""
    found = tuned("quant_matmul", key_for(shape, bits, rounded, grouped), Config)
    default = quant_matmul_act8.default_for(shape, bits, grouped, arch) if rounded else default_for(shape, arch)
    return fit(found or default, shape, arch)


@triton.jit
def _matmul_kernel(
    x, q, scale, shift, bias, y, partial,  # x [M, K], q [N, K or K/2], scale and shift [N, G], partial [SPLIT, M, N]
    M, N, K, G, stride_xm, stride_xk, stride_q, slope,
    STEPS: tl.constexpr,  # of K in a split; not an argument at run time, on which Triton 3.6's interpreter cannot loop
    STEPS_PER_GROUP: tl.constexpr,  # 0: one group, scaled after the loop
    BITS: tl.constexpr, SHIFT: tl.constexpr,  # SHIFT: 0 none, 1 zero, 2 offset
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    CENTRE: tl.constexpr = 8 if BITS == 4 else 0
    PER_BYTE: tl.constexpr = 8 // BITS
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n_in, m_in = n < N, m < M
    first = tl.program_id(2) * STEPS
    columns, bytes_of = tl.arange(0, BK), tl.arange(0, BK // PER_BYTE)
    x_rows = x + m.to(tl.int64)[:, None] * stride_xm  # [BM, 1]
    q_rows = q + n.to(tl.int64)[:, None] * stride_q  # [BN, 1]
    scales = n.to(tl.int64) * G  # [BN]

    acc = tl.zeros((BN, BM), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    for i in range(STEPS):
        step = first + i
        start = step * BK
        k, bytes_k = start + columns, start // PER_BYTE + bytes_of
        x_mask = m_in[:, None] if EVEN_K else m_in[:, None] & (k < K)[None, :]
        q_mask = n_in[:, None] if EVEN_K else n_in[:, None] & (bytes_k * PER_BYTE < K)[None, :]
        x_tile = tl.load(x_rows + k.to(tl.int64)[None, :] * stride_xk, mask=x_mask, other=0.0)  # [BM, BK]
        q_tile = tl.load(q_rows + bytes_k[None, :], mask=q_mask, other=0)  # [BN, BK or BK/2]
        dtype: tl.constexpr = x_tile.dtype
        part = acc if STEPS_PER_GROUP == 0 else tl.zeros((BN, BM), tl.float32)
        if BITS == 4:
            even, odd = tl.split(tl.reshape(x_tile, (BM, BK // 2, 2)))  # [BM, BK/2] each
            part = dot(centred(q_tile & 15, 4, dtype), tl.trans(even), part)
            part = dot(centred(q_tile >> 4, 4, dtype), tl.trans(odd), part)
        else:
            part = dot(centred(q_tile, 8, dtype), tl.trans(x_tile), part)
        if SHIFT > 0:
            total = tl.sum(x_tile.to(tl.float32), axis=1)  # [BM]
        if STEPS_PER_GROUP == 0:
            acc = part
            if SHIFT > 0:
                sums += total
        else:
            # Steps beyond the last group have x = 0; the clamp keeps their scales inside the row.
            group = tl.minimum(step // STEPS_PER_GROUP, G - 1)
            s = tl.load(scale + scales + group, mask=n_in, other=0.0).to(tl.float32)  # [BN]
            acc += s[:, None] * part
            if SHIFT > 0:
                t = shift_of(tl.load(shift + scales + group, mask=n_in, other=0.0), s, CENTRE, SHIFT)
                acc += t[:, None] * total[None, :]
    if STEPS_PER_GROUP == 0:
        s = tl.load(scale + scales, mask=n_in, other=0.0).to(tl.float32)  # [BN]
        acc *= s[:, None]
        if SHIFT > 0:
            t = shift_of(tl.load(shift + scales, mask=n_in, other=0.0), s, CENTRE, SHIFT)
            acc += t[:, None] * sums[None, :]

    inside = n_in[:, None] & m_in[None, :]
    if SPLIT == 1:
        finish(acc, bias, y, n, m, N, inside, HAS_BIAS, ACTIVATION, slope)
    else:
        row = tl.program_id(2).to(tl.int64) * M + m
        tl.store(partial + row[None, :] * N + n[:, None], acc, mask=inside)


def forward(x, q, scale, zero, offset, g_idx, bias, out_features, group_size, act_bits, activation, slope):
    """pyarch::quant_matmul__triton. x (M, K), any strides -> y (M, N) of x's dtype."""
    check_memory(x, q, scale, zero, offset, g_idx, bias, out_features, group_size, activation)
    if act_bits not in (0, 8):
        raise ValueError(f"act_bits: must be 0 or 8, not {act_bits}")
    if x.dtype == torch.float32 and act_bits == 0:
        raise ValueError("x: must be float16 or bfloat16 where act_bits is 0")
    (m, k), n = x.shape, out_features
    y = x.new_empty((m, n))
    if m == 0 or n == 0:
        return y
    grouped, rounded = scale.shape[1] > 1, act_bits == 8 and k > 0
    with on_device_of(x):
        config = config_for((m, n, k), 4 if q.dtype == torch.uint8 else 8, capability(), rounded, grouped)
        run = quant_matmul_act8.launch if rounded else launch
        return run(config, y, x, q, scale, zero, offset, bias, group_size, activation, slope)


def launch(config: Config, y, x, q, scale, zero, offset, bias, group_size, activation, slope):
    """Fills and returns y (M, N) with the given config, on the current GPU."""
    if config.dequantise:
        return quant_matmul_dense.launch(y, x, q, scale, zero, offset, bias, group_size, activation, slope)
    (m, k), n, groups = x.shape, q.shape[0], scale.shape[1]
    q, scale = q.contiguous(), scale.contiguous()
    shift = zero if zero is not None else offset
    shift_kind = 0 if shift is None else 1 if zero is not None else 2
    bk = config.block_k if group_size == -1 else min(config.block_k, group_size & -group_size)
    # Every split takes the same number of steps; those past K read zeros.
    steps = triton.cdiv(triton.cdiv(k, bk), config.split_k)
    partial = y if config.split_k == 1 else y.new_empty((config.split_k, m, n), dtype=torch.float32)
    options = dict(enable_fp_fusion=True)  # a multiply and an add become one rounding, whatever Triton's default
    epilogue = dict(HAS_BIAS=bias is not None, ACTIVATION=activation, SPLIT=config.split_k, **options)
    bias = y if bias is None else bias.contiguous()
    grid = (triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m), config.split_k)
    _matmul_kernel[grid](
        x, q, scale, y if shift is None else shift.contiguous(), bias, y, partial,
        m, n, k, groups, x.stride(0), x.stride(1), q.stride(0), slope,
        STEPS=steps, STEPS_PER_GROUP=0 if groups == 1 else group_size // bk,
        BITS=4 if q.dtype == torch.uint8 else 8, SHIFT=shift_kind,
        EVEN_K=k == bk * steps * config.split_k, BM=config.block_m, BN=config.block_n, BK=bk,
        num_warps=config.num_warps, num_stages=config.num_stages, **epilogue,
    )  # fmt: skip
    if config.split_k > 1:
        reduce(partial, bias, y, slope, **epilogue)
    return y
