"""quant_matmul in Triton: y = act(x @ w.T + bias), int4 or int8 codes, fp16 or bf16 x (pyarch/ops/quant_matmul.py).

fp32 x works too, at the speed of plain multiply-adds: autograd needs it to keep what an epilogue is applied to.

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

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from pyarch.kernels._common import INTERPRETING, activate, capability, dot, narrow, on_device_of, subtract
from pyarch.kernels._tuned import tuned


@dataclass(frozen=True)
class Config:
    """One way to cut the work."""

    block_m: int  # rows of x
    block_n: int  # weight rows
    block_k: int  # columns of a step at most: a step never straddles two groups
    split_k: int
    num_warps: int
    num_stages: int


def key_for(shape: tuple[int, int, int], bits: int) -> str:
    """What calls share a tuned config: the rows of a tile, and the weight's elements to a power of two."""
    m, n, k = shape
    rows = next((rows for rows in (16, 32, 64, 256) if m <= rows), "more")
    return f"int{bits} m{rows} 2^{(n * k).bit_length() - 1}"


def default_for(shape: tuple[int, int, int], dtype: torch.dtype, arch: int) -> Config:
    """The config for (m, n, k) where none is tuned; split_k: the most parts that K may have."""
    m, n, _ = shape
    if dtype == torch.float32:
        return Config(block_m=32, block_n=64, block_k=32, split_k=16, num_warps=4, num_stages=2)
    if m <= 32:
        return Config(block_m=16 if m <= 16 else 32, block_n=64, block_k=128, split_k=16, num_warps=4, num_stages=4)
    if m * n <= 64 * 64 * _multiprocessors(arch):
        return Config(block_m=64, block_n=64, block_k=64, split_k=16, num_warps=4, num_stages=4)
    return Config(block_m=128, block_n=128, block_k=64, split_k=16, num_warps=8, num_stages=3)


def config_for(shape: tuple[int, int, int], bits: int, dtype: torch.dtype, arch: int) -> Config:
    """The config for (m, n, k) and int4 or int8 codes: tiles as tuned on this card, and a split K until every
    multiprocessor reads weights."""
    found = None if dtype == torch.float32 else tuned("quant_matmul", key_for(shape, bits), Config)
    return fit(found or default_for(shape, dtype, arch), shape, arch)


def fit(config: Config, shape: tuple[int, int, int], arch: int) -> Config:
    """K in at most split_k parts, of at least 512 columns each, to be worth the second pass."""
    m, n, k = shape
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    most = min(2 * _multiprocessors(arch) // tiles, k // 512, config.split_k)
    return replace(config, split_k=1 << max(0, most.bit_length() - 1))


def _multiprocessors(arch: int) -> int:
    return 132 if arch >= 90 else 108


@triton.jit
def _codes(q, BITS: tl.constexpr, dtype: tl.constexpr):
    """q - c as floats, exactly; 4-bit codes come as integers 0..15."""
    if dtype == tl.float32:
        return q.to(tl.float32) - (8 if BITS == 4 else 0)
    elif BITS == 4:
        # The code becomes the last bits of 128 (bf16) or 1024 (fp16): an OR and a subtraction, no conversion.
        if dtype == tl.bfloat16:
            return subtract((q.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True), 136)
        else:
            return subtract((q.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True), 1032)
    elif INTERPRETING:
        return narrow(q.to(tl.float32), dtype)
    else:
        return q.to(dtype)


@triton.jit
def _finish(acc, bias, y, n, m, N, inside, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, slope):
    """The epilogue: bias, activation, one rounding. acc, inside: [BN, BM]; n: [BN]; m: [BM]."""
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]  # [BN]
    acc = activate(acc, ACTIVATION, slope)
    tl.store(y + m.to(tl.int64)[None, :] * N + n[:, None], narrow(acc, y.dtype.element_ty), mask=inside)


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
            part = dot(_codes(q_tile & 15, 4, dtype), tl.trans(even), part)
            part = dot(_codes(q_tile >> 4, 4, dtype), tl.trans(odd), part)
        else:
            part = dot(_codes(q_tile, 8, dtype), tl.trans(x_tile), part)
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
                t = _shift_of(tl.load(shift + scales + group, mask=n_in, other=0.0), s, CENTRE, SHIFT)
                acc += t[:, None] * total[None, :]
    if STEPS_PER_GROUP == 0:
        s = tl.load(scale + scales, mask=n_in, other=0.0).to(tl.float32)  # [BN]
        acc *= s[:, None]
        if SHIFT > 0:
            t = _shift_of(tl.load(shift + scales, mask=n_in, other=0.0), s, CENTRE, SHIFT)
            acc += t[:, None] * sums[None, :]

    inside = n_in[:, None] & m_in[None, :]
    if SPLIT == 1:
        _finish(acc, bias, y, n, m, N, inside, HAS_BIAS, ACTIVATION, slope)
    else:
        row = tl.program_id(2).to(tl.int64) * M + m
        tl.store(partial + row[None, :] * N + n[:, None], acc, mask=inside)


@triton.jit
def _shift_of(value, s, CENTRE: tl.constexpr, SHIFT: tl.constexpr):
    """What a group adds to each weight beside scale * (q - c). value, s: [BN]."""
    if SHIFT == 1:
        return -s * (value.to(tl.float32) - CENTRE)
    else:
        return value.to(tl.float32) + s * CENTRE


@triton.jit
def _reduce_kernel(
    partial, bias, y, M, N, slope,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) + tl.arange(0, 1)
    inside = (n < N)[:, None] & (m < M)[None, :]
    cell = partial + m.to(tl.int64)[None, :] * N + n[:, None]  # [BN, 1]
    acc = tl.load(cell, mask=inside, other=0.0)
    for part in tl.static_range(1, SPLIT):
        acc += tl.load(cell + tl.cast(M, tl.int64) * N * part, mask=inside, other=0.0)
    _finish(acc, bias, y, n, m, N, inside, HAS_BIAS, ACTIVATION, slope)


def forward(x, q, scale, zero, offset, g_idx, bias, out_features, group_size, act_bits, activation, slope):
    """pyarch::quant_matmul__triton. x (M, K), any strides -> y (M, N) of x's dtype."""
    _check_memory(x, q, scale, zero, offset, g_idx, bias, out_features, group_size, act_bits, activation)
    (m, k), n = x.shape, out_features
    y = x.new_empty((m, n))
    if m == 0 or n == 0:
        return y
    with on_device_of(x):
        config = config_for((m, n, k), 4 if q.dtype == torch.uint8 else 8, x.dtype, capability())
        return launch(config, y, x, q, scale, zero, offset, bias, group_size, activation, slope)


def launch(config: Config, y, x, q, scale, zero, offset, bias, group_size, activation, slope):
    """Fills and returns y (M, N) with the given config, on the current GPU."""
    (m, k), n, groups = x.shape, q.shape[0], scale.shape[1]
    q, scale = q.contiguous(), scale.contiguous()
    shift = zero if zero is not None else offset
    shift_kind = 0 if shift is None else 1 if zero is not None else 2
    bk = config.block_k if group_size == -1 else min(config.block_k, group_size & -group_size)
    # Every split takes the same number of steps; those past K read zeros.
    steps = triton.cdiv(triton.cdiv(k, bk), config.split_k)
    partial = y if config.split_k == 1 else y.new_empty((config.split_k, m, n), dtype=torch.float32)
    epilogue = dict(HAS_BIAS=bias is not None, ACTIVATION=activation, SPLIT=config.split_k)
    bias = y if bias is None else bias.contiguous()
    grid = (triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m), config.split_k)
    options = dict(enable_fp_fusion=True)  # a multiply and an add become one rounding, whatever Triton's default
    _matmul_kernel[grid](
        x, q, scale, y if shift is None else shift.contiguous(), bias, y, partial,
        m, n, k, groups, x.stride(0), x.stride(1), q.stride(0), slope,
        STEPS=steps, STEPS_PER_GROUP=0 if groups == 1 else group_size // bk,
        BITS=4 if q.dtype == torch.uint8 else 8, SHIFT=shift_kind,
        EVEN_K=k == bk * steps * config.split_k, BM=config.block_m, BN=config.block_n, BK=bk,
        num_warps=config.num_warps, num_stages=config.num_stages, **epilogue, **options,
    )  # fmt: skip
    if config.split_k > 1:
        grid = (triton.cdiv(n, 1024), m)
        _reduce_kernel[grid](partial, bias, y, m, n, slope, BN=1024, num_warps=4, **epilogue, **options)
    return y


def _check_memory(x, q, scale, zero, offset, g_idx, bias, out_features, group_size, act_bits, activation):
    """The operator is open to anyone: refuses what would read outside a tensor or is not this kernel's to compute."""
    bits = {torch.uint8: 4, torch.int8: 8}.get(q.dtype)
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or bits is None:
        raise ValueError(f"x, q: must be float32, float16 or bfloat16, and uint8 or int8, not {x.dtype}, {q.dtype}")
    if g_idx is not None or act_bits != 0:
        raise ValueError("g_idx, act_bits: must be None and 0 in Triton")
    if group_size != -1 and (group_size < 32 or group_size % 32):
        raise ValueError(f"group_size: must be -1 or a multiple of 32, not {group_size}")
    if zero is not None and offset is not None:
        raise ValueError("offset: must be None when zero is given")
    if not 0 <= activation <= 5:
        raise ValueError(f"activation: must be a code from 0 to 5, not {activation}")
    (_, k), n = x.shape, out_features
    groups = 1 if group_size == -1 else triton.cdiv(k, group_size)
    expected = {"q": (q, (n, -(-k * bits // 8))), "scale": (scale, (n, groups)), "zero": (zero, (n, groups)),
                "offset": (offset, (n, groups)), "bias": (bias, (n,))}  # fmt: skip
    for name, (value, shape) in expected.items():
        if value is not None and (tuple(value.shape) != shape or value.device != x.device):
            raise ValueError(f"{name}: must be {shape} on {x.device}, not {tuple(value.shape)} on {value.device}")
