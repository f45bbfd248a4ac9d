"""flash_attention_backward.py's kernel "scores", and the sums over packed sequences."""

import triton
import triton.language as tl

from pyarch.kernels._attention import (
    LOG2E,
    differentiate,
    load_tile,
    logarithm,
    product,
    scores_at,
    sequence_of,
)
from pyarch.kernels._common import bound
from pyarch.kernels._dropout import kept


@triton.jit(do_not_specialize=["H", "group", "rows", "keys", "sequences", "tiles", "left", "right", "columns",
                               "bias_batch", "bias_heads", "over_heads", "shared", "part", "threshold"])  # fmt: skip
def scores_kernel(
    d_bias, lse, delta, norm, g,  # (parts, *bias's shape) and (B, H, rows), fp32 and dense
    q, k, v, sinks, bias, mask, slopes, cu_q, cu_k,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_bb, stride_bh, stride_bm, stride_bn,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_sb, stride_sh, stride_gb, stride_gh, stride_gm, stride_gd,
    H, group, rows, keys, sequences, tiles, columns,  # tiles of rows, and columns of keys; to COLLAPSE, tiles of keys
    bias_batch, bias_heads, over_heads, shared, part,  # shared: (batch, head)s of an element, part of them together
    left, right, scale, cap,
    seed, threshold, keep,  # of dropout
    COLLAPSE: tl.constexpr,  # the bias is the same for every row
    D: tl.constexpr, DV: tl.constexpr, PACKED: tl.constexpr, SINKS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column, program = program % columns, program // columns
    tile, program = program % tiles, program // tiles
    matrix, number = program, program // (bias_batch * bias_heads)  # number: of the part
    program = program % (bias_batch * bias_heads)
    first_b, first_h = program // bias_heads, program % bias_heads
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    d_bias += matrix.to(tl.int64) * keys * (1 if COLLAPSE else rows)

    all_rows, all_keys, first_q, first_k, sequence = rows, keys, 0, 0, 0
    if COLLAPSE:
        i0, j0 = 0, tile * BN
    else:
        i0, j0 = tile * BM, column * BN
    if PACKED:
        if COLLAPSE:
            sequence, wrong = sequence_of(tile, cu_k, cu_q, sequences, keys, rows, BN)
        else:
            sequence, wrong = sequence_of(tile, cu_q, cu_k, sequences, rows, keys, BM)
        if wrong > 0:
            _store(
                d_bias, tl.full((BM, BN), float("nan"), tl.float32), i0, j0, 0, 0, rows, keys, keys, COLLAPSE, BM, BN
            )
            return
        first_q, first_k = tl.load(cu_q + sequence), tl.load(cu_k + sequence)
        if COLLAPSE:
            j0 = (tile - first_k // BN - sequence) * BN
        else:
            i0 = (tile - first_q // BM - sequence) * BM
        rows, keys = tl.load(cu_q + sequence + 1) - first_q, tl.load(cu_k + sequence + 1) - first_k
        if (j0 >= keys) | ((i0 >= rows) & (not COLLAPSE)):
            return

    random = 0
    if DROPOUT:
        random = tl.load(seed)
    j = j0 + tl.arange(0, BN)  # of the sequence
    inside_keys = j < keys
    key = j.to(tl.int64) + first_k  # of the tensors
    shift = keys - rows
    low, high = i0, rows  # of the rows, those that see a key
    if not COLLAPSE:
        high = tl.minimum(i0 + BM, rows)
    if RIGHT:
        low = tl.maximum(low, (j0 - right - shift) // BM * BM)
    if LEFT:
        high = tl.minimum(high, j0 + BN + left - shift)
    steps = tl.cdiv(tl.maximum(high - low, 0), BM)
    start = number * part
    count = tl.minimum(part, shared - start) * steps
    total = tl.zeros((BM, BN), tl.float32)
    for n in range(0, bound(count)):
        i = low + n % steps * BM + tl.arange(0, BM)
        inside_rows = i < rows
        row = i.to(tl.int64) + first_q
        head = start + n // steps
        which_b, which_h = first_b + head // over_heads, first_h + head % over_heads  # int32, as dropout counts
        b, h = tl.cast(which_b, tl.int64), tl.cast(which_h, tl.int64)
        kv = h // group
        q_rows = q + b * stride_qb + h * stride_qh + row[:, None] * stride_qm
        g_rows = g + b * stride_gb + h * stride_gh + row[:, None] * stride_gm
        k_rows = k + b * stride_kb + kv * stride_kh + key[:, None] * stride_kn
        v_rows = v + b * stride_vb + kv * stride_vh + key[:, None] * stride_vn
        q_tile = load_tile(q_rows, d, stride_qd, inside_rows, True, D, DP)
        g_tile = load_tile(g_rows, dv, stride_gd, inside_rows, True, DV, DVP)
        k_tile = load_tile(k_rows, d, stride_kd, inside_keys, True, D, DP)
        v_tile = load_tile(v_rows, dv, stride_vd, inside_keys, True, DV, DVP)
        s = product(
            q_tile,
            k_tile,
            q_rows,
            k_rows,
            stride_qd,
            stride_kd,
            inside_rows,
            inside_keys,
            BM,
            BN,
            True,
            True,
            D,
            DP,
            BD,
        )
        dp = product(
            g_tile, v_tile, g_rows, v_rows, stride_gd, stride_vd, inside_rows, inside_keys, BM, BN, True, True,
            DV, DVP, BDV,
        )  # fmt: skip
        if DROPOUT:
            mask_dp = kept(random, threshold, sequence + which_b, which_h, i, j0, BN)
            dp = tl.where(mask_dp, dp * keep, 0.0)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + (b + sequence) * stride_sb + h * stride_sh) * LOG2E
        s, _ = scores_at(
            s, j[None, :], (i + shift)[:, None], inside_rows[:, None] & inside_keys[None, :],
            bias + b * stride_bb + h * stride_bh + row[:, None] * stride_bm + key[None, :] * stride_bn,
            mask + b * stride_mb + h * stride_mh + row[:, None] * stride_mm + key[None, :] * stride_mn,
            left, right, scale, cap, slope,
            True, True, LEFT, RIGHT, SOFTCAP, BIAS, MASK, ALIBI, q.dtype.element_ty == tl.float32,
        )  # fmt: skip
        at = (b * H + h) * all_rows + row
        row_lse = logarithm(tl.load(lse + at, mask=inside_rows, other=float("inf")))
        row_delta = tl.load(delta + at, mask=inside_rows, other=0.0)
        _, ds = differentiate(s, dp, row_lse[:, None], row_delta[:, None])
        if q.dtype.element_ty == tl.float32:
            ds *= tl.load(norm + at, mask=inside_rows, other=0.0)[:, None]
        total += ds
    _store(d_bias, total, i0, j0, first_q, first_k, rows, keys, all_keys, COLLAPSE, BM, BN)


@triton.jit
def _store(
    d_bias, total, i0, j0, first_q, first_k, rows, keys, all_keys,
    COLLAPSE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix, or, to COLLAPSE, the sums over its rows."""
    i, j = i0 + tl.arange(0, BM), j0 + tl.arange(0, BN)
    key = j.to(tl.int64) + first_k
    if COLLAPSE:
        tl.store(d_bias + key, tl.sum(total, 0), mask=j < keys)
    else:
        cells = d_bias + (i.to(tl.int64) + first_q)[:, None] * all_keys + key[None, :]
        tl.store(cells, total, mask=(i < rows)[:, None] & (j < keys)[None, :])


@triton.jit(do_not_specialize=["H", "rows", "keys", "sequences"])
def sequences_kernel(sums, x, cu_q, cu_k, H, rows, keys, sequences, BLOCK: tl.constexpr):
    """sums (sequences, H): of the rows of each packed sequence in x (H, rows), both fp32 and dense."""
    sequence, h = tl.program_id(0) // H, tl.program_id(0) % H
    _, wrong = sequence_of(0, cu_q, cu_k, sequences, rows, keys, BLOCK)
    first, end = tl.load(cu_q + sequence), tl.load(cu_q + sequence + 1)
    end = tl.where(wrong > 0, first, end)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(bound(first), bound(end), BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x + h.to(tl.int64) * rows + i, mask=i < end, other=0.0)
    tl.store(sums + tl.program_id(0), tl.where(wrong > 0, float("nan"), tl.sum(total, 0)))
