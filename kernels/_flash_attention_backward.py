"""flash_attention_backward.py's kernels "rows" and "keys"."""

import triton
import triton.language as tl

from pyarch.kernels._attention import (
    LOG2E,
    differentiate,
    load_tile,
    logarithm,
    place_of,
    product,
    range_of,
    scores_at,
    sequence_of,
    store_tile,
)
from pyarch.kernels._common import bound, dot, narrow
from pyarch.kernels._dropout import kept


@triton.jit
def _over_keys(
    d_q, along, sloped, total, q, g, q_rows, g_rows, lse, delta, k_head, v_head, bias_rows, mask_rows, i, shift,
    low, high, gap_at, gap, keys,
    seed, threshold, keep, sequence, head,  # of dropout
    stride_qd, stride_gd, stride_kn, stride_kd, stride_vn, stride_vd, stride_bn, stride_mn,
    left, right, scale, cap, slope,
    DELTA: tl.constexpr, SUM: tl.constexpr, SUM_SLOPES: tl.constexpr, EDGE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """The keys from low to high, as in the forward. DELTA adds p * dp to along, no more; else d_q grows, SUM adds ds to
    along and SUM_SLOPES the slope's part to sloped. total grows by p, of fp32 inputs alone."""
    columns, d, dv = tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, DVP)
    dtype: tl.constexpr = k_head.dtype.element_ty
    for step in range(bound(low), bound(high), BN):
        start = tl.full((), step, tl.int32)
        if EDGE:
            start += tl.where(start >= gap_at, gap, 0)
        n = start.to(tl.int64)
        inside = start + columns < keys  # [BN]
        k_rows = k_head + n * stride_kn + columns.to(tl.int64)[:, None] * stride_kn  # [BN, 1]
        v_rows = v_head + n * stride_vn + columns.to(tl.int64)[:, None] * stride_vn  # [BN, 1]
        k = load_tile(k_rows, d, stride_kd, inside, EDGE, D, DP)  # [BN, DP]
        v = load_tile(v_rows, dv, stride_vd, inside, EDGE, DV, DVP)  # [BN, DVP]; not used where BDV < DVP
        s = product(q, k, q_rows, k_rows, stride_qd, stride_kd, inside, inside, BM, BN, False, EDGE, D, DP, BD)
        dp = product(g, v, g_rows, v_rows, stride_gd, stride_vd, inside, inside, BM, BN, False, EDGE, DV, DVP, BDV)
        if DROPOUT:
            dp = tl.where(kept(seed, threshold, sequence, head, i, start, BN), dp * keep, 0.0)
        position = i + shift - start
        s, bend = scores_at(
            s, columns[None, :], position[:, None], (columns < keys - start)[None, :],
            bias_rows + n * stride_bn + columns.to(tl.int64)[None, :] * stride_bn,
            mask_rows + n * stride_mn + columns.to(tl.int64)[None, :] * stride_mn,
            left, right, scale, cap, slope,
            EDGE, True, LEFT, RIGHT, SOFTCAP, BIAS, MASK, ALIBI, dtype == tl.float32,
        )  # fmt: skip
        p, ds = differentiate(s, dp, lse[:, None], delta[:, None])
        if dtype == tl.float32:
            total += tl.sum(p, 1)
        if DELTA:
            along += tl.sum(p * dp, 1)
        else:
            if SUM:
                along += tl.sum(ds, 1)
            if SUM_SLOPES:
                away = columns.to(tl.float32)[None, :] - position.to(tl.float32)[:, None]
                sloped -= tl.sum(ds * tl.abs(away), 1)
            if SOFTCAP:
                ds *= 1.0 - bend * bend
            d_q = dot(narrow(ds, dtype), k, d_q)
    return d_q, along, sloped, total


@triton.jit(do_not_specialize=["H", "group", "rows", "keys", "sequences", "tiles", "share", "left", "right",
                               "threshold"])  # fmt: skip
def rows_kernel(
    d_q, delta, norm, row_sinks, row_slopes, row_bias,  # (B, H, rows, D), and (B, H, rows) fp32, all dense
    out, lse, d_lse, g,  # dense but g, which is d_out
    q, k, v, sinks, bias, mask, slopes, cu_q, cu_k,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_bb, stride_bh, stride_bm, stride_bn,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_sb, stride_sh, stride_gb, stride_gh, stride_gm, stride_gd,
    heads, H, group, rows, keys, sequences, tiles, share, left, right, scale, cap, factor,  # factor: of d_q
    seed, threshold, keep,  # of dropout
    STEP: tl.constexpr,  # 0: delta from out, and all; 1: delta from p and dp, no more; 2: all but delta
    SUM: tl.constexpr, SUM_SLOPES: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PACKED: tl.constexpr, SINKS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    NORM: tl.constexpr = q.dtype.element_ty == tl.float32
    place, bh = place_of(tl.program_id(0), heads, tiles, share)
    tile = tiles - 1 - place
    b, h = bh // H, bh % H
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    first = bh.to(tl.int64) * rows
    d_q += first * D
    out += first * DV
    lse += first
    d_lse += first
    delta += first
    norm += first
    row_sinks += first
    row_slopes += first
    row_bias += first

    i0, first_q, first_k, sequence = tile * BM, 0, 0, b
    if PACKED:
        sequence, wrong = sequence_of(tile, cu_q, cu_k, sequences, rows, keys, BM)
        if wrong > 0:
            i = i0 + tl.arange(0, BM)
            nan = tl.full((BM,), float("nan"), tl.float32)
            store_tile(d_q + i0.to(tl.int64) * D, tl.full((BM, DP), float("nan"), tl.float32), rows - i0, D)
            tl.store(delta + i, nan, mask=i < rows)
            if NORM:
                tl.store(norm + i, nan, mask=i < rows)
            if SINKS:
                tl.store(row_sinks + i, nan, mask=i < rows)
            if SUM_SLOPES:
                tl.store(row_slopes + i, nan, mask=i < rows)
            if SUM:
                tl.store(row_bias + i, nan, mask=i < rows)
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
    inside = i < rows
    row = tl.minimum(i, rows - 1).to(tl.int64)[:, None] + first_q  # [BM, 1], of the tensors
    b, h, kv, first_k = b.to(tl.int64), h.to(tl.int64), (h // group).to(tl.int64), tl.cast(first_k, tl.int64)
    q_rows = q + b * stride_qb + h * stride_qh + row * stride_qm
    g_rows = g + b * stride_gb + h * stride_gh + row * stride_gm
    k_head = k + b * stride_kb + kv * stride_kh + first_k * stride_kn
    v_head = v + b * stride_vb + kv * stride_vh + first_k * stride_vn
    bias_rows = bias + b * stride_bb + h * stride_bh + row * stride_bm + first_k * stride_bn
    mask_rows = mask + b * stride_mb + h * stride_mh + row * stride_mm + first_k * stride_mn
    q_tile = load_tile(q_rows, d, stride_qd, i < rows, False, D, DP)  # [BM, DP]; not used where BD < DP
    g_tile = load_tile(g_rows, dv, stride_gd, i < rows, False, DV, DVP)  # [BM, DVP]; not used where BDV < DVP
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + sequence * stride_sb + h * stride_sh) * LOG2E
    first = tl.cast(first_q, tl.int64) + i0
    n = first + tl.arange(0, BM)
    row_lse = tl.load(lse + n, mask=inside, other=float("-inf"))
    row_d_lse = tl.load(d_lse + n, mask=inside, other=0.0)
    row_d_lse = tl.where(row_lse == float("-inf"), 0.0, row_d_lse)
    row_lse = logarithm(row_lse)

    shift = keys - rows
    begin, end = i0 + shift, tl.minimum(i0 + BM, rows) - 1 + shift  # positions of the first and the last row
    low, high, full_low, full_high = range_of(begin, end, left, right, keys, LEFT, RIGHT, BN)
    gap = full_high - full_low

    zeros = tl.zeros((BM,), tl.float32)
    d_q_tile, along, sloped, total = tl.zeros((BM, DP), tl.float32), zeros, zeros, zeros
    if NORM and SINKS:
        total = tl.exp2(tl.load(sinks + h) * LOG2E - row_lse)
    row_delta = zeros
    if STEP == 0:
        for chunk in tl.static_range(0, DVP, BDV):
            c = chunk + tl.arange(0, BDV)
            g_chunk = load_tile(g_rows, c, stride_gd, inside, False, DV, DVP)
            o_chunk = load_tile(out + row * DV, c, 1, inside, False, DV, DVP)
            row_delta += tl.sum(g_chunk.to(tl.float32) * o_chunk.to(tl.float32), 1)
        row_delta -= row_d_lse
    elif STEP == 2:
        row_delta = tl.load(delta + n, mask=inside, other=0.0)
    for edge in tl.static_range(2):
        d_q_tile, along, sloped, total = _over_keys(
            d_q_tile, along, sloped, total, q_tile, g_tile, q_rows, g_rows, row_lse, row_delta, k_head, v_head,
            bias_rows, mask_rows, i, shift, low if edge else full_low, high - gap if edge else full_high, full_low, gap,
            keys, number, threshold, keep, sequence, head,
            stride_qd, stride_gd, stride_kn, stride_kd, stride_vn, stride_vd, stride_bn, stride_mn,
            left, right, scale, cap, slope, STEP == 1, SUM, SUM_SLOPES, edge == 1,
            D, DV, LEFT, RIGHT, SOFTCAP, BIAS, MASK, ALIBI, DROPOUT, BM, BN, BD, BDV, DP, DVP,
        )  # fmt: skip

    one = tl.where(total == 0, 1.0, 1.0 / total) if NORM else tl.full((BM,), 1.0, tl.float32)
    n = first + tl.arange(0, BM)
    if STEP == 1:
        tl.store(delta + n, along * one - row_d_lse, mask=inside)
    else:
        store_tile(d_q + first * D, d_q_tile * (factor * one)[:, None], rows - i0, D)
        if NORM:
            tl.store(norm + n, one, mask=inside)
        if STEP == 0:
            tl.store(delta + n, row_delta, mask=inside)
        if SINKS:
            tl.store(row_sinks + n, -tl.exp2(tl.load(sinks + h) * LOG2E - row_lse) * one * row_delta, mask=inside)
        if SUM_SLOPES:
            tl.store(row_slopes + n, sloped * one, mask=inside)
        if SUM:
            tl.store(row_bias + n, along * one, mask=inside)


@triton.jit
def _over_rows(
    d_k, d_v, k, v, k_rows, v_rows, q_head, g_head, lse, delta, norm, bias_cells, mask_cells, slopes, j0, inside_keys,
    heads, low, high, gap_at, gap, rows, all_rows, shift,
    seed, threshold, keep, sequence, first_head,  # of dropout
    stride_qh, stride_qm, stride_qd, stride_gh, stride_gm, stride_gd, stride_kd, stride_vd, stride_bh, stride_bm,
    stride_mh, stride_mm, stride_sh, left, right, scale, cap,
    EDGE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """The rows from low to high of so many heads, a tile at a time, gap more from gap_at on, against BN keys. EDGE:
    some do not see some of them, or are not there. Pointers: of row 0 of the first head; bias_cells, mask_cells
    [BN, 1]."""
    columns, d, dv = tl.arange(0, BM), tl.arange(0, DP), tl.arange(0, DVP)
    j = j0 + tl.arange(0, BN)
    dtype: tl.constexpr = q_head.dtype.element_ty
    steps = tl.cdiv(high - low, BM)
    for step in range(0, bound(heads * steps)):  # one loop, so that fewer registers live through it
        start = low + step % steps * BM
        if EDGE:
            start += tl.where(start >= gap_at, gap, 0)
        n, h = tl.cast(start, tl.int64), tl.cast(step // steps, tl.int64)
        i = start + columns
        inside = i < rows  # [BM]
        q_rows = q_head + h * stride_qh + n * stride_qm + columns.to(tl.int64)[:, None] * stride_qm  # [BM, 1]
        g_rows = g_head + h * stride_gh + n * stride_gm + columns.to(tl.int64)[:, None] * stride_gm  # [BM, 1]
        q = load_tile(q_rows, d, stride_qd, inside, EDGE, D, DP)  # [BM, DP]
        g = load_tile(g_rows, dv, stride_gd, inside, EDGE, DV, DVP)  # [BM, DVP]
        row = h * all_rows + n + columns
        if EDGE:
            row_lse = tl.load(lse + row, mask=inside, other=float("inf"))
            row_delta = tl.load(delta + row, mask=inside, other=0.0)
        else:
            row_lse, row_delta = tl.load(lse + row), tl.load(delta + row)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + h * stride_sh) * LOG2E
        s = product(k, q, k_rows, q_rows, stride_kd, stride_qd, inside_keys, inside, BN, BM, True, EDGE, D, DP, BD)
        dp = product(v, g, v_rows, g_rows, stride_vd, stride_gd, inside_keys, inside, BN, BM, True, EDGE, DV, DVP, BDV)
        there = inside[None, :]  # keys that are not get nothing stored, but there is no bias for them
        if BIAS or MASK:
            there = there & inside_keys[:, None]
        s, bend = scores_at(
            s, j[:, None], (i + shift)[None, :], there,
            bias_cells + h * stride_bh + n * stride_bm + columns.to(tl.int64)[None, :] * stride_bm,
            mask_cells + h * stride_mh + n * stride_mm + columns.to(tl.int64)[None, :] * stride_mm,
            left, right, scale, cap, slope,
            EDGE, True, LEFT, RIGHT, SOFTCAP, BIAS, MASK, ALIBI, dtype == tl.float32,
        )  # fmt: skip
        if DROPOUT:
            head = first_head + step // steps
            kept_here = tl.trans(kept(seed, threshold, sequence, head, i, j0, BN))  # [BN, BM]
            dp = tl.where(kept_here, dp * keep, 0.0)
        p, ds = differentiate(s, dp, logarithm(row_lse)[None, :], row_delta[None, :])  # [BN, BM]
        if dtype == tl.float32:
            row_norm = tl.load(norm + row, mask=inside, other=0.0)[None, :]
            p *= row_norm
            ds *= row_norm
        if DROPOUT:
            p = tl.where(kept_here, p, 0.0)
        if SOFTCAP:
            ds *= 1.0 - bend * bend
        d_v = dot(narrow(p, dtype), g, d_v)
        d_k = dot(narrow(ds, dtype), q, d_k)
    return d_k, d_v


@triton.jit(do_not_specialize=["H", "group", "rows", "keys", "sequences", "tiles", "share", "left", "right",
                               "threshold"])  # fmt: skip
def keys_kernel(
    d_k, d_v, lse, delta, norm, g,  # all dense but g, which is d_out
    q, k, v, sinks, bias, mask, slopes, cu_q, cu_k,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_bb, stride_bh, stride_bm, stride_bn,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_sb, stride_sh, stride_gb, stride_gh, stride_gm, stride_gd,
    heads, H, group, rows, keys, sequences, tiles, share,  # heads: of k, in all batches; H: of q; tiles: of keys
    left, right, scale, cap, factor,  # factor: of d_k
    seed, threshold, keep,  # of dropout
    D: tl.constexpr, DV: tl.constexpr, PACKED: tl.constexpr, SINKS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    tile, head = place_of(tl.program_id(0), heads, tiles, share)
    kv_heads = H // group
    b, kv = head // kv_heads, head % kv_heads
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    d_k += head.to(tl.int64) * keys * D
    d_v += head.to(tl.int64) * keys * DV
    first_head = b.to(tl.int64) * H + kv * group  # of q
    lse += first_head * rows
    delta += first_head * rows
    norm += first_head * rows

    all_rows, j0, first_q, first_k, sequence = rows, tile * BN, 0, 0, b
    if PACKED:
        sequence, wrong = sequence_of(tile, cu_k, cu_q, sequences, keys, rows, BN)
        if wrong > 0:
            store_tile(d_k + j0.to(tl.int64) * D, tl.full((BN, DP), float("nan"), tl.float32), keys - j0, D)
            store_tile(d_v + j0.to(tl.int64) * DV, tl.full((BN, DVP), float("nan"), tl.float32), keys - j0, DV)
            return
        first_q, first_k = tl.load(cu_q + sequence), tl.load(cu_k + sequence)
        j0 = (tile - first_k // BN - sequence) * BN
        rows, keys = tl.load(cu_q + sequence + 1) - first_q, tl.load(cu_k + sequence + 1) - first_k
        if j0 >= keys:
            return

    number = 0
    if DROPOUT:
        number = tl.load(seed)
    head = kv * group  # int32, as dropout counts
    inside = j0 + tl.arange(0, BN) < keys  # [BN]
    b, kv, first = b.to(tl.int64), kv.to(tl.int64), tl.cast(first_k, tl.int64) + j0
    n = tl.arange(0, BN).to(tl.int64)[:, None]
    first_q = tl.cast(first_q, tl.int64)
    k_rows = k + b * stride_kb + kv * stride_kh + first * stride_kn + n * stride_kn
    v_rows = v + b * stride_vb + kv * stride_vh + first * stride_vn + n * stride_vn
    k_tile = load_tile(k_rows, d, stride_kd, inside, True, D, DP)  # [BN, DP]; not used where BD < DP
    v_tile = load_tile(v_rows, dv, stride_vd, inside, True, DV, DVP)  # [BN, DVP]; not used where BDV < DVP

    shift = keys - rows
    last = tl.minimum(j0 + BN, keys) - 1
    low, high, full_low, full_high = range_of(j0 - shift, last - shift, right, left, rows, RIGHT, LEFT, BM)
    full_high = tl.where(last - j0 == BN - 1, full_high, full_low)
    gap = full_high - full_low

    d_k_tile, d_v_tile = tl.zeros((BN, DP), tl.float32), tl.zeros((BN, DVP), tl.float32)
    h = kv * group
    for edge in tl.static_range(2):
        d_k_tile, d_v_tile = _over_rows(
            d_k_tile, d_v_tile, k_tile, v_tile, k_rows, v_rows,
            q + b * stride_qb + h * stride_qh + first_q * stride_qm,
            g + b * stride_gb + h * stride_gh + first_q * stride_gm, lse + first_q, delta + first_q, norm + first_q,
            bias + b * stride_bb + h * stride_bh + first_q * stride_bm + first * stride_bn + n * stride_bn,
            mask + b * stride_mb + h * stride_mh + first_q * stride_mm + first * stride_mn + n * stride_mn,
            slopes + sequence * stride_sb + h * stride_sh, j0, inside, group,
            low if edge else full_low, high - gap if edge else full_high, full_low, gap, rows, all_rows, shift,
            number, threshold, keep, sequence, head,
            stride_qh, stride_qm, stride_qd, stride_gh, stride_gm, stride_gd, stride_kd, stride_vd,
            stride_bh, stride_bm, stride_mh, stride_mm, stride_sh, left, right, scale, cap, edge == 1,
            D, DV, LEFT, RIGHT, SOFTCAP, BIAS, MASK, ALIBI, DROPOUT, BM, BN, BD, BDV, DP, DVP,
        )  # fmt: skip
    store_tile(d_k + first * D, d_k_tile * factor, keys - j0, D)
    store_tile(d_v + first * DV, d_v_tile * keep if DROPOUT else d_v_tile, keys - j0, DV)
