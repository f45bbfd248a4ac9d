"""quant_matmul with act_bits=8 in Triton: int8 activations against int8 or int4 codes, sums in int32.

Two kernels a call. The first rounds x once, to int8 codes with a scale (and their sum, where weights have a zero or an
offset) for each row and weight group:

    code = round(x / s), half to even,  s = amax / 127 in fp32      s NaN where x has a NaN or an infinity

It reads x once and writes half of it or less. The second owns tiles of y, BN weight rows by BM rows of x:

                 BM rows of x
               +--------------+    A step takes BK columns, which lie in one group, in one product of integers:
      BK of K  |  codes.T     |        acc += w_scale * s * (q - c) @ codes.T  +  shift * (s * sum of codes)
               +--------------+    with c and shift as in quant_matmul.py. With a scale for the whole row there is one
  +----------+ +--------------+    int32 accumulator and fp32 comes after the loop.
  |  q - c   | |     acc      |  BN rows of w
  +----------+ +--------------+    4-bit codes come as 16 * (q - 8): a shift and an exclusive or; 1/16 is in the scale.

Neighbouring programs take BAND tiles of weight rows by many of x, so that both stay in the cache. Integer sums are
exact: a part of K has at most 2^17 columns of products up to 127 * 128. Sums of parts are added in fp32.
"""

import torch
import triton
import triton.language as tl

from pyarch.kernels._common import bound
from pyarch.kernels._quant_matmul import Config, finish, multiprocessors, reduce, shift_of

MOST_COLUMNS = 1 << 17  # of an int32 sum
BAND = 8


def default_for(shape: tuple[int, int, int], bits: int, grouped: bool, arch: int) -> Config:
    """The config for (m, n, k) where none is tuned; split_k: the most parts that K may have."""
    m, n, _ = shape
    if m <= 32:
        return Config(block_m=16 if m <= 16 else 32, block_n=64, block_k=256, split_k=16, num_warps=4, num_stages=3)
    if m * n <= 64 * 64 * multiprocessors(arch):
        return Config(block_m=64, block_n=64, block_k=128, split_k=16, num_warps=4, num_stages=4)
    if bits == 4 and arch < 90:
        return Config(block_m=64, block_n=128, block_k=128, split_k=4, num_warps=8, num_stages=4)
    if grouped or bits == 4 or m * n <= 256 * 128 * 100:
        return Config(block_m=128, block_n=128, block_k=128, split_k=4, num_warps=8, num_stages=4)
    return Config(block_m=256, block_n=128, block_k=128, split_k=1, num_warps=8, num_stages=3)


@triton.jit
def _columns(row, start, step, K, GROUP, stride_xk, BC: tl.constexpr):
    """Columns step * BC and on of each group: their places, which there are, and x there. [BG, BC]; start: [BG]."""
    column = step * BC + tl.arange(0, BC)
    k = start[:, None] + column[None, :]
    inside = (column < GROUP)[None, :] & (k < K)
    return k, inside, tl.load(row + k * stride_xk, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _largest(values):
    """The bits of each row's largest magnitude. As integers they are in order, NaN and infinity the largest."""
    return tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def _round_kernel(
    x, codes, scale, total,  # x [M, K], codes int8 [M, stride_codes], scale and total fp32 [G, stride_scale]
    K, GROUP, stride_xm, stride_xk, stride_codes, stride_scale,
    STEPS,  # of BC columns in a group
    ONCE: tl.constexpr,  # STEPS is 1: what was read is still there
    TOTAL: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BG groups of a row: their scales, then their codes."""
    m = tl.program_id(0).to(tl.int64)
    group = (tl.program_id(1) * BG + tl.arange(0, BG)).to(tl.int64)
    start = group * GROUP
    row, target = x + m * stride_xm, codes + m * stride_codes

    k, inside, values = _columns(row, start, 0, K, GROUP, stride_xk, BC)
    most = _largest(values)
    for step in range(1, bound(STEPS)):
        most = tl.maximum(most, _largest(_columns(row, start, step, K, GROUP, stride_xk, BC)[2]))
    s = tl.where(most < 0x7F800000, tl.div_rn(most.to(tl.float32, bitcast=True), 127.0), float("nan"))
    tl.store(scale + group * stride_scale + m, s, mask=start < K)

    sums = tl.zeros((BG,), tl.int32)
    for step in range(bound(STEPS)):
        if not ONCE:
            k, inside, values = _columns(row, start, step, K, GROUP, stride_xk, BC)
        quotient = tl.where((s > 0)[:, None], tl.div_rn(values, tl.where(s > 0, s, 1.0)[:, None]), 0.0)
        # Sums with 1.5 * 2^23 are rounded to whole numbers, half to even, which are then their last bits.
        rounded = tl.clamp(quotient, -127.0, 127.0) + 12582912.0
        code = rounded.to(tl.int32, bitcast=True) - 0x4B400000
        tl.store(target + k, code.to(tl.int8), mask=inside)
        if TOTAL:
            sums += tl.sum(code, axis=1)
    if TOTAL:
        tl.store(total + group * stride_scale + m, s * sums.to(tl.float32), mask=start < K)


@triton.jit
def _int8_kernel(
    codes, x_scale, x_total,  # what _round_kernel made; whole tiles of scales
    q, scale, shift, bias, y, partial,  # q [N, K or K/2], scale and shift [N, G], partial [SPLIT, M, N]
    M, N, K, G, stride_codes, stride_scale, stride_q, slope, STEPS, STEPS_PER_GROUP,  # STEPS: of K in a split
    GROUPED: tl.constexpr,  # scales act on every step, else after the loop
    BITS: tl.constexpr, SHIFT: tl.constexpr,  # SHIFT: 0 none, 1 zero, 2 offset
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    CENTRE: tl.constexpr = 8 if BITS == 4 else 0
    PER_BYTE: tl.constexpr = 8 // BITS
    UNIT: tl.constexpr = 0.0625 if BITS == 4 else 1.0
    tiles_m = tl.cdiv(M, BM)
    place = tl.program_id(0)
    first_n = place // (BAND * tiles_m) * BAND
    wide = tl.minimum(tl.cdiv(N, BN) - first_n, BAND)
    place = place % (BAND * tiles_m)
    n = (first_n + place % wide) * BN + tl.arange(0, BN)
    m = place // wide * BM + tl.arange(0, BM)
    # Rows past the end are others' again: read in vain, not written.
    n_row, m_row = tl.minimum(n, N - 1).to(tl.int64), tl.minimum(m, M - 1).to(tl.int64)
    first = tl.program_id(1) * STEPS
    columns, bytes_of = tl.arange(0, BK), tl.arange(0, BK // PER_BYTE)
    x_tiles = codes + m_row[:, None] * stride_codes + (first * BK + columns)[None, :]  # [BM, BK]
    q_tiles = q + n_row[:, None] * stride_q + (first * (BK // PER_BYTE) + bytes_of)[None, :]  # [BN, BK or BK/2]
    scales = n_row * G  # [BN]

    acc = tl.zeros((BN, BM), tl.float32)
    whole = tl.zeros((BN, BM), tl.int32)
    for i in range(bound(STEPS)):
        step = first + i
        if EVEN_K:
            x_tile, q_tile = tl.load(x_tiles), tl.load(q_tiles)
        else:
            x_tile = tl.load(x_tiles, mask=(step * BK + columns < K)[None, :], other=0)
            q_tile = tl.load(q_tiles, mask=(step * BK + bytes_of * PER_BYTE < K)[None, :], other=0)
        if BITS == 4:
            # Nibble q in the upper half of a byte, its highest bit turned, is 16 * (q - 8).
            q_tile = tl.join((q_tile << 4) ^ 0x80, (q_tile & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)
            q_tile = tl.reshape(q_tile, (BN, BK))
        if GROUPED:
            part = tl.dot(q_tile, tl.trans(x_tile), out_dtype=tl.int32)
            # Steps beyond the last group have codes 0; the clamp keeps their scales inside the row.
            group = tl.minimum(step // STEPS_PER_GROUP, G - 1)
            s = tl.load(scale + scales + group).to(tl.float32)  # [BN]
            s_x = tl.load(x_scale + group.to(tl.int64) * stride_scale + m)  # [BM]
            acc += (s * UNIT)[:, None] * (s_x[None, :] * _float(part, BK))
            if SHIFT > 0:
                t = shift_of(tl.load(shift + scales + group), s, CENTRE, SHIFT)
                total = tl.load(x_total + group.to(tl.int64) * stride_scale + m)  # [BM]
                acc += t[:, None] * tl.where(step == group * STEPS_PER_GROUP, total, 0.0)[None, :]  # once a group
        else:
            whole = tl.dot(q_tile, tl.trans(x_tile), whole, out_dtype=tl.int32)
        x_tiles += BK
        q_tiles += BK // PER_BYTE
    if not GROUPED:
        s = tl.load(scale + scales).to(tl.float32)  # [BN]
        s_x = tl.load(x_scale + m)  # [BM]
        acc = (s * UNIT)[:, None] * (s_x[None, :] * whole.to(tl.float32))
        if SHIFT > 0 and (SPLIT == 1 or first == 0):
            t = shift_of(tl.load(shift + scales), s, CENTRE, SHIFT)
            acc += t[:, None] * tl.load(x_total + m)[None, :]

    inside = (n < N)[:, None] & (m < M)[None, :]
    if SPLIT == 1:
        finish(acc, bias, y, n, m, N, inside, HAS_BIAS, ACTIVATION, slope)
    else:
        row = tl.program_id(1).to(tl.int64) * M + m
        tl.store(partial + row[None, :] * N + n[:, None], acc, mask=inside)


@triton.jit
def _float(part, BK: tl.constexpr):
    """The int32 product of BK columns as fp32, exactly."""
    if BK <= 256:  # below 2^22: the last bits of 1.5 * 2^23, at the full rate of additions
        return (part + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    else:
        return part.to(tl.float32)


def launch(config: Config, y, x, q, scale, zero, offset, bias, group_size, activation, slope):
    """Fills and returns y (M, N) with the given config, on the current GPU. K has at least one column."""
    (m, k), n, groups = x.shape, q.shape[0], scale.shape[1]
    q, scale = q.contiguous(), scale.contiguous()
    shift = zero if zero is not None else offset
    shift_kind = 0 if shift is None else 1 if zero is not None else 2
    options = dict(enable_fp_fusion=True)  # a multiply and an add become one rounding, whatever Triton's default

    codes = x.new_empty((m, triton.cdiv(k, 16) * 16), dtype=torch.int8)
    x_scale = x.new_empty((groups, triton.cdiv(m, config.block_m) * config.block_m), dtype=torch.float32)
    x_total = x_scale if shift is None else torch.empty_like(x_scale)
    group = k if groups == 1 else group_size
    block = min(triton.next_power_of_2(group), 16384)
    together = max(1, min(2048 // block, triton.next_power_of_2(groups)))
    _round_kernel[m, triton.cdiv(groups, together)](
        x, codes, x_scale, x_total,
        k, group, x.stride(0), x.stride(1), codes.stride(0), x_scale.stride(0), triton.cdiv(group, block),
        ONCE=group <= block, TOTAL=shift is not None, BG=together, BC=block,
        num_warps=max(1, min(16, together * block // 1024)), **options,
    )  # fmt: skip

    bk = config.block_k if groups == 1 else min(config.block_k, group_size & -group_size)
    split = max(config.split_k, triton.cdiv(k, MOST_COLUMNS))
    steps = triton.cdiv(triton.cdiv(k, bk), split)  # of every split; those past K read zeros
    partial = y if split == 1 else y.new_empty((split, m, n), dtype=torch.float32)
    epilogue = dict(HAS_BIAS=bias is not None, ACTIVATION=activation, SPLIT=split, **options)
    bias = y if bias is None else bias.contiguous()
    tiles = triton.cdiv(n, config.block_n) * triton.cdiv(m, config.block_m)
    _int8_kernel[tiles, split](
        codes, x_scale, x_total, q, scale, y if shift is None else shift.contiguous(), bias, y, partial,
        m, n, k, groups, codes.stride(0), x_scale.stride(0), q.stride(0), slope, steps, group_size // bk,
        GROUPED=groups > 1, BITS=4 if q.dtype == torch.uint8 else 8, SHIFT=shift_kind, EVEN_K=k == bk * steps * split,
        BM=config.block_m, BN=config.block_n, BK=bk, BAND=BAND,
        num_warps=config.num_warps, num_stages=config.num_stages, **epilogue,
    )  # fmt: skip
    if split > 1:
        reduce(partial, bias, y, slope, **epilogue)
    return y
