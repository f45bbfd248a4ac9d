"""What the quant_matmul kernels share: their configs, how the grid is cut, and what follows the sums."""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from pyarch.kernels._common import INTERPRETING, activate, narrow, subtract


@dataclass(frozen=True)
class Config:
    """One way to cut the work."""

    block_m: int  # rows of x
    block_n: int  # weight rows
    block_k: int  # columns of a step at most: a step never straddles two groups
    split_k: int
    num_warps: int
    num_stages: int
    dequantise: bool = False  # instead: the weight goes into scratch for torch's matmul, and tiles mean nothing


def fit(config: Config, shape: tuple[int, int, int], arch: int) -> Config:
    """K in at most split_k parts, of at least 512 columns each, to be worth the second pass."""
    m, n, k = shape
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    most = min(2 * multiprocessors(arch) // tiles, k // 512, config.split_k)
    return replace(config, split_k=1 << max(0, most.bit_length() - 1))


def multiprocessors(arch: int) -> int:
    return 132 if arch >= 90 else 108


def check_memory(x, q, scale, zero, offset, g_idx, bias, out_features, group_size, activation):
    """The operators are open to anyone: refuses what would read outside a tensor. x: (M, K)."""
    bits = {torch.uint8: 4, torch.int8: 8}.get(q.dtype)
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or bits is None:
        raise ValueError(f"x, q: must be float32, float16 or bfloat16, and uint8 or int8, not {x.dtype}, {q.dtype}")
    if g_idx is not None:
        raise ValueError("g_idx: must be None in Triton")
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


@triton.jit
def centred(q, BITS: tl.constexpr, dtype: tl.constexpr):
    """q - c as floats, exactly; 4-bit codes come as integers 0..15."""
    if BITS == 4:
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
def finish(acc, bias, y, n, m, N, inside, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, slope):
    """The epilogue: bias, activation, one rounding. acc, inside: [BN, BM]; n: [BN]; m: [BM]."""
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]  # [BN]
    acc = activate(acc, ACTIVATION, slope)
    tl.store(y + m.to(tl.int64)[None, :] * N + n[:, None], narrow(acc, y.dtype.element_ty), mask=inside)


@triton.jit
def shift_of(value, s, CENTRE: tl.constexpr, SHIFT: tl.constexpr):
    """What a group adds to each weight beside scale * (q - c). value, s: [BN]."""
    if SHIFT == 1:
        return -s * (value.to(tl.float32) - CENTRE)
    else:
        return value.to(tl.float32) + s * CENTRE


@triton.jit
def numbers(q, s, t, BITS: tl.constexpr, SHIFT: tl.constexpr, dtype: tl.constexpr):
    """The weights that codes, scales and shifts (fp32) stand for, rounded once to 16 bits; 4-bit codes as 0..15."""
    w = centred(q, BITS, dtype).to(tl.float32) * s
    return narrow(w + t if SHIFT > 0 else w, dtype)


@triton.jit
def reduce_kernel(
    partial, bias, y, M, N, slope,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) + tl.arange(0, 1)
    inside = (n < N)[:, None] & (m < M)[None, :]
    cell = partial + m.to(tl.int64)[None, :] * N + n[:, None]  # [BN, 1]
    acc = tl.load(cell, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, SPLIT):
        acc += tl.load(cell + tl.cast(M, tl.int64) * N * part, mask=inside, other=0.0)
    finish(acc, bias, y, n, m, N, inside, HAS_BIAS, ACTIVATION, slope)


def reduce(partial: torch.Tensor, bias: torch.Tensor, y: torch.Tensor, slope: float, **constants) -> None:
    """The second pass where K was split: y from partial sums (SPLIT, M, N), on the current GPU. One part may be y."""
    m, n = y.shape
    reduce_kernel[triton.cdiv(n, 1024), m](partial, bias, y, m, n, slope, BN=1024, num_warps=4, **constants)
