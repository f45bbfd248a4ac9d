"""A tile of paged_attention's Triton kernels (paged_kv_attention.py): its lanes over some positions."""

import triton
import triton.language as tl

from pyarch.kernels._attention import load_tile, range_of, soften, tanh
from pyarch.kernels._common import bound, dot, narrow


@triton.jit
def _floats(x, dtype: tl.constexpr):
    """Elements of a cache in the dtype of q: themselves, or codes, which are exact in it."""
    if x.dtype == dtype:
        return x
    else:
        return narrow(x.to(tl.float32), dtype)


@triton.jit
def _attend(
    acc, m, total, q, q_rows, position, low, high, gap_at, gap, length,
    k, v, k_scale, v_scale, table, pages,
    stride_kp, stride_kn, stride_vp, stride_vn, stride_ap, stride_an, stride_bp, stride_bn, stride_t,
    left, right, scale, cap,  # scale in log2 units; with softcap, scale / softcap, and cap in log2 units
    D: tl.constexpr, PAGE: tl.constexpr, INT8: tl.constexpr, EDGE: tl.constexpr, FOLD: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The positions from low to high, a tile at a time, gap more from gap_at on; EDGE: some rows do not see some."""
    columns, d = tl.arange(0, BN), tl.arange(0, BD)
    dtype: tl.constexpr = q_rows.dtype.element_ty
    INT: tl.constexpr = tl.int32 if dtype == tl.float32 else tl.int16
    EXPONENT: tl.constexpr = 0x7F800000 if dtype == tl.float32 else 0x7F80 if dtype == tl.bfloat16 else 0x7C00
    STAGES: tl.constexpr = 1 if EDGE and dtype != tl.float32 else None  # the kernel's; an edge is a tile or two
    lost = tl.zeros((BN,), tl.int32)  # 1 where a position has no page, which every row sees; at an edge: see below
    for step in tl.range(bound(low), bound(high), BN, num_stages=STAGES):
        start = tl.full((), step, tl.int32)
        if EDGE:
            start += tl.where(start >= gap_at, gap, 0)
        n = start + columns  # [BN]
        inside = n < length
        if PAGE % BN == 0:  # a page holds the tile
            page = tl.load(table + (start // PAGE).to(tl.int64) * stride_t)
            slot = start % PAGE + columns
        else:
            page = tl.load(table + (n // PAGE).to(tl.int64) * stride_t, mask=inside, other=0)  # [BN]
            slot = n % PAGE
        known = (page >= 0) & (page < pages)
        page, slot = tl.where(known, page, 0).to(tl.int64), slot.to(tl.int64)
        good = known & inside  # [BN]
        k_rows = k + (page * stride_kp + slot * stride_kn)[:, None]  # [BN, 1]
        v_rows = v + (page * stride_vp + slot * stride_vn)[:, None]  # [BN, 1]
        s = tl.zeros((BM, BN), tl.float32)
        if BD == DP:
            k_tile = _floats(load_tile(k_rows, d, 1, inside, False, D, DP), dtype)  # [BN, DP]
            s = dot(q, tl.trans(k_tile), s)
        else:
            for chunk in tl.static_range(0, DP, BD):
                q_chunk = load_tile(q_rows, chunk + d, 1, inside, False, D, DP)  # [BM, BD]
                k_chunk = _floats(load_tile(k_rows, chunk + d, 1, inside, False, D, DP), dtype)  # [BN, BD]
                s = dot(q_chunk, tl.trans(k_chunk), s)
        if INT8:
            s *= tl.load(k_scale + page * stride_ap + slot * stride_an)[None, :]  # [BN]
        if SOFTCAP:
            s = tanh(s * scale, dtype == tl.float32) * cap
        elif EDGE or not FOLD:
            s *= scale
        if EDGE:
            seen = inside[None, :]
            if LEFT:
                seen = seen & (n[None, :] >= (position - left)[:, None])
            if RIGHT:
                seen = seen & (n[None, :] <= (position + right)[:, None])
            s = tl.where(seen, tl.where(good[None, :], s, float("nan")), float("-inf"))
        else:
            lost = tl.where(good, lost, 1)

        p, shrink, m, total = soften(s, m, total, scale, FOLD and not EDGE)
        v_tile = load_tile(v_rows, tl.arange(0, DP), 1, inside, EDGE, D, DP)  # [BN, DP]
        if INT8:
            factor = tl.load(v_scale + page * stride_bp + slot * stride_bn, mask=inside, other=0.0)  # [BN]
            v_tile = narrow(v_tile.to(tl.float32) * factor[:, None], dtype)
        if EDGE:  # rows that do not see a value that is not finite would get 0 * NaN
            bits = v_tile.to(INT, bitcast=True)
            v_tile = tl.where((bits & EXPONENT) == EXPONENT, 0, bits).to(dtype, bitcast=True)
            lost = tl.maximum(lost, tl.max(((bits & EXPONENT) == EXPONENT).to(tl.int32), 1))
        acc = dot(narrow(p, dtype), v_tile, acc * shrink[:, None])
    return acc, m, total, lost


@triton.jit
def _spoil(
    acc, position, low, high, gap_at, gap, v, v_scale, table, pages,
    stride_vp, stride_vn, stride_bp, stride_bn, stride_t, left, right,
    D: tl.constexpr, PAGE: tl.constexpr, INT8: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """What _attend left out at the edges, a position at a time: NaN to the rows that see a value that is not finite."""
    d = tl.arange(0, DP)
    for step in range(bound(low), bound(high)):
        n = tl.full((), step, tl.int32)
        n += tl.where(n >= gap_at, gap, 0)
        page = tl.load(table + (n // PAGE).to(tl.int64) * stride_t)
        page, slot = tl.where((page >= 0) & (page < pages), page, 0).to(tl.int64), (n % PAGE).to(tl.int64)
        value = tl.load(v + page * stride_vp + slot * stride_vn + d, mask=d < D, other=0)
        value = value.to(tl.float32)
        if INT8:
            value *= tl.load(v_scale + page * stride_bp + slot * stride_bn)
        odd = (tl.abs(value) < float("inf")) == 0  # [DP]
        away = n - position  # [BM]
        seen = position == position
        if LEFT:
            seen = seen & (away >= -left)
        if RIGHT:
            seen = seen & (away <= right)
        acc = tl.where(seen[:, None] & odd[None, :], float("nan"), acc)
    return acc


@triton.jit
def walk(
    q_rows, position, first, last, begin, end, length,  # positions of the first row, of the last; what to walk over
    k, v, k_scale, v_scale, table, pages,
    stride_kp, stride_kn, stride_vp, stride_vn, stride_ap, stride_an, stride_bp, stride_bn, stride_t,
    left, right, scale, cap,
    D: tl.constexpr, PAGE: tl.constexpr, INT8: tl.constexpr, FOLD: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """(acc, m, total) of a tile's rows over the positions from begin to end, which are multiples of BN or beyond."""
    q = load_tile(q_rows, tl.arange(0, BD), 1, position < length, False, D, DP)  # [BM, DP]; not used where BD < DP
    low, high, full_low, full_high = range_of(first, last, left, right, length, LEFT, RIGHT, BN)
    low, high = tl.maximum(low, begin), tl.minimum(high, end)
    full_low = tl.minimum(tl.maximum(full_low, begin), end)
    full_high = tl.minimum(tl.maximum(full_high, begin), end)
    gap = full_high - full_low
    acc = tl.zeros((BM, DP), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc, m, total, lost = _attend(
        acc, m, total, q, q_rows, position, full_low, full_high, 0, 0, length,
        k, v, k_scale, v_scale, table, pages,
        stride_kp, stride_kn, stride_vp, stride_vn, stride_ap, stride_an, stride_bp, stride_bn, stride_t,
        left, right, scale, cap,
        D, PAGE, INT8, False, FOLD, LEFT, RIGHT, SOFTCAP, BM, BN, BD, DP,
    )  # fmt: skip
    total = tl.where(tl.max(lost, 0) > 0, float("nan"), total)
    acc, m, total, lost = _attend(
        acc, m, total, q, q_rows, position, low, high - gap, full_low, gap, length,
        k, v, k_scale, v_scale, table, pages,
        stride_kp, stride_kn, stride_vp, stride_vn, stride_ap, stride_an, stride_bp, stride_bn, stride_t,
        left, right, scale, cap,
        D, PAGE, INT8, True, FOLD, LEFT, RIGHT, SOFTCAP, BM, BN, BD, DP,
    )  # fmt: skip
    if tl.max(lost, 0) > 0:
        acc = _spoil(
            acc, position, low, high - gap, full_low, gap, v, v_scale, table, pages,
            stride_vp, stride_vn, stride_bp, stride_bn, stride_t, left, right, D, PAGE, INT8, LEFT, RIGHT, DP,
        )  # fmt: skip
    return acc, m, total
