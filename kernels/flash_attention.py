"""flash_attention in Triton, forward: fp16, bf16 or fp32, head sizes to 256 (pyarch/ops/flash_attention.py).

A program owns BM rows of one head and walks over the keys that any of them sees, BN at a time:

          keys of the sequence               s = q @ k.T, fp32            [BM, BN]
      +------+--------------+------+         m, total: largest score, sum  [BM]
  BM  | edge |     full     | edge |         acc = acc * 2^(m' - m) + 2^(s - m) @ v, fp32   [BM, DV]
      +------+--------------+------+
      ^ left of the window         ^ diagonal, right of the window, end of the keys

Where every row sees every key of a tile the loop has no masks; only the edges compare positions. Softmax is in powers
of 2: scale * log2(e) is one factor of the scores, and where nothing else is added to them it is part of the one
multiply-add before the exponential. Probabilities are rounded to v's dtype for their product; sums are fp32 and out
is rounded once. fp32 products are in full precision, never tf32, in chunks of the head size that fit into registers.

Every tensor is read in place, with any strides. Loads never leave a sequence: rows past its end are its last row,
computed and not stored, keys past its end are masked. Head sizes that are no power of two are padded with zeros inside.
Each byte of q is read once and out written once; k and v are read once by every row tile, mostly from L2: programs that
run together belong to as many heads as fit there, and the longest rows of causal attention run first.

Packed sequences: sequence b has the tiles from cu_seqlens_q[b] // BM + b on, more than it needs, so the grid is known
without reading lengths. Each program reads all of cu_seqlens; if they do not rise from 0 to the end, out is NaN.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pyarch.kernels._attention import (
    L2_BYTES,
    LN2,
    LOG2E,
    check_memory,
    constants,
    load_tile,
    operands,
    padded,
    place_of,
    range_of,
    scores_of,
    sequence_of,
    soften,
    whole,
    window_of,
)
from pyarch.kernels._common import bound, capability, dot, narrow, on_device_of
from pyarch.kernels._dropout import kept, numbers
from pyarch.kernels._tuned import tuned


@dataclass(frozen=True)
class Config:
    """One way to cut the work."""

    block_m: int  # rows
    block_n: int  # keys of a step
    block_d: int  # of the head size in a dot at most
    num_warps: int
    num_stages: int


def key_for(rows: int, size: int) -> str:
    """What calls in 16 bits share a tuned config."""
    return f"d{size} rows{'<=' if rows <= 64 else '>'}64"


def config_for(
    rows: int, size: int, dtype: torch.dtype, arch: int, scored: bool, whole: bool, dropout: bool = False
) -> Config:
    """The config for sequences of so many rows, as tuned on this card; size: the larger head size, padded.

    scored: with bias or mask, which are loaded into registers, element by element where their rows are not aligned.
    whole: q, k and v can be loaded in vectors of 16 bytes, past the registers.
    """
    plain = whole and not scored and not dropout and dtype != torch.float32
    found = tuned("flash_attention", key_for(rows, size), Config) if plain else None
    return found or default_for(rows, size, dtype, arch, scored, whole, dropout)


def default_for(
    rows: int, size: int, dtype: torch.dtype, arch: int, scored: bool, whole: bool, dropout: bool = False
) -> Config:
    """The largest tiles that no feature makes spill (tests/compile_kernels.py). None is measured yet."""
    chunk = 32 if dtype == torch.float32 else size  # of multiply-adds, whose operands lie in registers
    if not whole:
        return Config(16 if size == 256 else 32, 16, chunk, 8, 1)
    if dtype == torch.float32:
        if dropout and not (scored and size == 256):
            return Config(16, 32, chunk, 4, 2)
        return Config(32, 16 if scored and size == 256 else 32, chunk, 8, 2 if scored or size == 256 else 3)
    if scored:
        return Config(64, 16 if size == 256 else 32, size, 8, 2)
    if size == 256:
        return Config(128 if arch >= 90 and rows > 64 and not dropout else 64, 32, size, 8, 2)
    if rows <= 64:
        return Config(64, 32 if dropout else 64, size, 4, 3)
    return Config(128, 128 if arch >= 90 and size <= 64 else 64, size, 8, 3)


@triton.jit
def _attend(
    acc, m, total, q, q_rows, k_head, v_head, bias_rows, mask_rows, position, low, high, gap_at, gap, keys,
    seed, threshold, sequence, h, i,  # of dropout; i: numbers of the rows
    stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_bn, stride_mn,
    left, right, scale, cap, slope,
    D: tl.constexpr, DV: tl.constexpr, EDGE: tl.constexpr, FOLD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """The keys from low to high, a tile at a time, gap more from gap_at on; EDGE: some rows do not see some of them."""
    columns, d, dv = tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, DVP)
    dtype: tl.constexpr = v_head.dtype.element_ty
    for step in range(bound(low), bound(high), BN):
        start = tl.full((), step, tl.int32)
        if EDGE:
            start += tl.where(start >= gap_at, gap, 0)
        n = start.to(tl.int64)
        inside = start + columns < keys  # [BN]
        # A scalar that moves and offsets that stay: the compiler computes these once.
        k_rows = k_head + n * stride_kn + columns.to(tl.int64)[:, None] * stride_kn  # [BN, 1]
        v_rows = v_head + n * stride_vn + columns.to(tl.int64)[:, None] * stride_vn  # [BN, 1]
        s = tl.zeros((BM, BN), tl.float32)
        if BD == DP:
            k_tile = load_tile(k_rows, d, stride_kd, inside, EDGE, D, DP)  # [BN, DP]
            s = dot(q, tl.trans(k_tile), s)
        else:
            for chunk in tl.static_range(0, DP, BD):
                q_chunk = load_tile(q_rows, chunk + d, stride_qd, inside, False, D, DP)  # [BM, BD]
                k_chunk = load_tile(k_rows, chunk + d, stride_kd, inside, EDGE, D, DP)  # [BN, BD]
                s = dot(q_chunk, tl.trans(k_chunk), s)

        s, _ = scores_of(
            s, (start + columns)[None, :] - position[:, None], inside[None, :],
            bias_rows + n * stride_bn + columns.to(tl.int64)[None, :] * stride_bn,
            mask_rows + n * stride_mn + columns.to(tl.int64)[None, :] * stride_mn,
            left, right, scale, cap, slope,
            EDGE, EDGE or not FOLD, LEFT, RIGHT, SOFTCAP, BIAS, MASK, ALIBI, dtype == tl.float32,
        )  # fmt: skip
        p, shrink, m, total = soften(s, m, total, scale, FOLD and not EDGE)
        if DROPOUT:
            p = tl.where(kept(seed, threshold, sequence, h, i, start, BN), p, 0.0)
        v_tile = load_tile(v_rows, dv, stride_vd, inside, EDGE, DV, DVP)  # [BN, DVP]
        acc = dot(narrow(p, dtype), v_tile, acc * shrink[:, None])
    return acc, m, total


@triton.jit(do_not_specialize=["H", "group", "rows", "keys", "sequences", "tiles", "share", "left", "right",
                             "threshold"])  # fmt: skip
def _forward_kernel(
    out, lse,  # (B, H, rows, DV) and (B, H, rows), both dense
    q, k, v, sinks, bias, mask, slopes, cu_q, cu_k,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_bb, stride_bh, stride_bm, stride_bn,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_sb, stride_sh,
    heads, H, group, rows, keys, sequences,  # heads: B * H; group: heads of q for one of k
    tiles, share,  # row tiles of a head; heads whose tiles run together
    left, right, scale, cap,
    seed, threshold, factor,  # of dropout
    D: tl.constexpr, DV: tl.constexpr, PACKED: tl.constexpr, SINKS: tl.constexpr, FOLD: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    place, bh = place_of(tl.program_id(0), heads, tiles, share)
    tile = tiles - 1 - place
    b, h = bh // H, bh % H
    d, dv = tl.arange(0, BD), tl.arange(0, DVP)
    out += bh.to(tl.int64) * rows * DV
    lse += bh.to(tl.int64) * rows

    i0, first_q, first_k, sequence = tile * BM, 0, 0, b
    if PACKED:
        sequence, wrong = sequence_of(tile, cu_q, cu_k, sequences, rows, keys, BM)
        if wrong > 0:
            i = i0 + tl.arange(0, BM)
            nan = tl.full((BM, DVP), float("nan"), tl.float32)
            _store(out, lse, nan, tl.full((BM,), float("nan"), tl.float32), i, dv, i < rows, DV)
            return
        first_q, first_k = tl.load(cu_q + sequence), tl.load(cu_k + sequence)
        i0 = (tile - first_q // BM - sequence) * BM
        rows, keys = tl.load(cu_q + sequence + 1) - first_q, tl.load(cu_k + sequence + 1) - first_k
        if i0 >= rows:
            return

    number = 0
    if DROPOUT:
        number = tl.load(seed)
    head = h  # int32, as dropout counts
    i = i0 + tl.arange(0, BM)  # [BM], rows of the sequence
    row = tl.minimum(i, rows - 1).to(tl.int64)[:, None] + first_q  # [BM, 1], of the tensors
    b, h, kv, first_k = b.to(tl.int64), h.to(tl.int64), (h // group).to(tl.int64), tl.cast(first_k, tl.int64)
    q_rows = q + b * stride_qb + h * stride_qh + row * stride_qm
    k_head = k + b * stride_kb + kv * stride_kh + first_k * stride_kn
    v_head = v + b * stride_vb + kv * stride_vh + first_k * stride_vn
    bias_rows = bias + b * stride_bb + h * stride_bh + row * stride_bm + first_k * stride_bn
    mask_rows = mask + b * stride_mb + h * stride_mh + row * stride_mm + first_k * stride_mn
    q_tile = load_tile(q_rows, d, stride_qd, i < rows, False, D, DP)  # [BM, DP]; not used where BD < DP
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + sequence * stride_sb + h * stride_sh) * LOG2E
    acc = tl.zeros((BM, DVP), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if SINKS:
        m = tl.zeros((BM,), tl.float32) + tl.load(sinks + h) * LOG2E
        total = tl.where(m == float("-inf"), 0.0, 1.0)

    shift = keys - rows
    begin, end = i0 + shift, tl.minimum(i0 + BM, rows) - 1 + shift  # positions of the first and the last row
    low, high, full_low, full_high = range_of(begin, end, left, right, keys, LEFT, RIGHT, BN)
    gap = full_high - full_low
    position = i + shift
    acc, m, total = _attend(
        acc, m, total, q_tile, q_rows, k_head, v_head, bias_rows, mask_rows, position,
        full_low, full_high, 0, 0, keys, number, threshold, sequence, head, i,
        stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_bn, stride_mn,
        left, right, scale, cap, slope,
        D, DV, False, FOLD, LEFT, RIGHT, SOFTCAP, BIAS, MASK, ALIBI, DROPOUT, BM, BN, BD, DP, DVP,
    )  # fmt: skip
    acc, m, total = _attend(
        acc, m, total, q_tile, q_rows, k_head, v_head, bias_rows, mask_rows, position,
        low, high - gap, full_low, gap, keys, number, threshold, sequence, head, i,
        stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_bn, stride_mn,
        left, right, scale, cap, slope,
        D, DV, True, FOLD, LEFT, RIGHT, SOFTCAP, BIAS, MASK, ALIBI, DROPOUT, BM, BN, BD, DP, DVP,
    )  # fmt: skip

    nothing = total == 0  # seen by a row: out is 0, the logarithm of the sum -inf
    total = tl.where(nothing, 1.0, total)
    logarithm = tl.where(nothing, float("-inf"), (m + tl.log2(total)) * LN2)
    if DROPOUT:
        acc *= (factor / total)[:, None]
    else:
        acc *= (1.0 / total)[:, None]
    _store(out, lse, acc, logarithm, first_q + i, dv, i < rows, DV)


@triton.jit
def _store(out, lse, acc, logarithm, row, dv, inside, DV: tl.constexpr):
    """Rows of a head, rounded once. acc: [BM, DVP]; logarithm, row, inside: [BM]."""
    cells = out + row.to(tl.int64)[:, None] * DV + dv[None, :]
    tl.store(cells, narrow(acc, out.dtype.element_ty), mask=inside[:, None] & (dv < DV)[None, :])
    tl.store(lse + row, logarithm, mask=inside)


def forward(q, k, v, sinks, bias, mask, slopes, cu_q, cu_k, seed, left, right, softcap, scale, dropout_p):
    """pyarch::flash_attention__triton: (out (B, H, Sq, Dv) like q, lse (B, H, Sq) fp32); every input in place."""
    check_memory(q, k, v, sinks, bias, mask, slopes, cu_q, cu_k)
    rows = q.shape[2] if cu_q is None else q.shape[2] // (len(cu_q) - 1)
    with on_device_of(q):
        size, scored = padded(max(q.shape[3], v.shape[3])), bias is not None or mask is not None
        config = config_for(rows, size, q.dtype, capability(), scored, all(map(whole, (q, k, v))), dropout_p > 0)
        out = q.new_empty((*q.shape[:3], v.shape[3]))
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        tensors = (q, k, v, sinks, bias, mask, slopes, cu_q, cu_k, seed)
        return launch(config, out, lse, *tensors, left, right, softcap, scale, dropout_p)


def launch(
    config: Config, out, lse, q, k, v, sinks, bias, mask, slopes, cu_q, cu_k, seed,
    left, right, softcap, scale, dropout_p,
):  # fmt: skip
    """Fills and returns (out, lse), both contiguous, with the given config, on the current GPU."""
    dropout = numbers(seed, dropout_p, q)
    if lse.numel() == 0:
        return out, lse
    (batch, heads, rows, d), (_, kv_heads, keys, dv) = q.shape, v.shape
    sequences = 0 if cu_q is None else len(cu_q) - 1
    tiles = triton.cdiv(rows, config.block_m) if cu_q is None else rows // config.block_m + sequences
    group = heads // kv_heads
    share = max(1, L2_BYTES // max(1, keys * (d + dv) * q.element_size())) * group
    left, right = window_of(left, right, rows, keys)
    features = constants(q, v, sinks, bias, mask, slopes, cu_q, left, right, softcap)
    _forward_kernel[(tiles * batch * heads,)](
        out, lse, *operands(q, k, v, sinks, bias, mask, slopes, cu_q, cu_k),
        batch * heads, heads, group, rows, keys, sequences, tiles, min(share, batch * heads),
        max(left, 0), max(right, 0), scale / softcap if softcap > 0 else scale * LOG2E.value, softcap * LOG2E.value,
        *dropout, **features, DROPOUT=dropout_p > 0,
        FOLD=scale >= 0 and softcap <= 0 and bias is None and mask is None and slopes is None,
        BM=config.block_m, BN=config.block_n, BD=min(config.block_d, features["DP"]),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse
