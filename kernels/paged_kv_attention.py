"""paged_attention's Triton kernels: fp16, bf16 or fp32, caches of the same or int8 (pyarch/ops/paged_kv.py).

A tile has BM lanes. A lane is a query vector, one row of a sequence and one head of the group of a key head, so that a
single row of a group of 8 fills half a tile of 16. A tile walks over the positions that any of its rows attends to, BN
at a time from multiples of BN on, and finds each in the page table:

    lanes          row i, head 0 | row i, head 1 | ... | row i+1, head 0 | ...          [BM]
    positions      | edge |          full          | edge |       edges compare positions, full tiles have no masks

Two routes; which one a sequence takes depends on its own rows alone, and so do its bits:

    few rows     split_kernel: a tile over one split of 256 absolute positions, and over every share-th one after it;
                 acc, m and total of each go to memory. combine_kernel: adds the splits of a lane in an order that
                 positions alone decide
    more         prompt_kernel: a tile over all of its positions

The grid follows from sizes, not from lengths, which the host does not read: programs without work return. Nothing
outside the arguments is touched: page numbers are clamped, and a wrong one makes NaN of the rows that attend to it. At
an edge, a value that some rows of a tile see and others do not is kept from these even if it is not finite; of an
infinity they see, an edge makes NaN.

A tile reads each key and value that it needs once, later tiles of the same rows mostly from L2. Scores, softmax and
sums are fp32; probabilities are rounded to q's dtype for their product, and so are the values of int8 caches. Codes of
int8 keys are exact in any dtype; their scale is a factor of the score.
"""

import triton
import triton.language as tl

from pyarch.kernels._attention import LN2, LOG2E, sequence_of
from pyarch.kernels._common import bound, narrow
from pyarch.kernels._paged_attention import walk

SPLIT = tl.constexpr(256)  # positions that are summed before they go to memory
SIZES = ("total_q", "group", "pages", "capacity", "pairs", "tiles", "left", "right")  # not worth a kernel each


@triton.jit
def _splits_of(first, last, length, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """(the first split that a tile's rows see, the number of them) for rows at positions first to last."""
    low, high = 0, length
    if LEFT:
        low = tl.maximum(first - left, 0)
    if RIGHT:
        high = tl.minimum(length, last + right + 1)
    begin = low // SPLIT
    return begin, tl.where(low < high, tl.cdiv(high, SPLIT) - begin, 0)


@triton.jit
def _length_of(lens, b, capacity):
    """(the sequence's length, whether it is possible); 0 if it is not."""
    length = tl.load(lens + b)
    valid = (length >= 0) & (length <= capacity)
    return tl.where(valid, length, 0), valid


@triton.jit
def _few_rows_of(b, cu, total_q, PACKED: tl.constexpr, MOST: tl.constexpr):
    """(the sequence's first row of q, its rows); none where they are more than MOST, or outside q."""
    if PACKED:
        begin, end = tl.load(cu + b), tl.load(cu + b + 1)
        mine = (begin >= 0) & (begin <= end) & (end <= total_q) & (end - begin <= MOST)
        return begin, tl.where(mine, end - begin, 0)
    else:
        return b, 1


@triton.jit
def _finish(m, total, valid, sinks, head, SINKS: tl.constexpr):
    """(what acc is multiplied by, lse) of rows whose sum is total * 2^m, before the sink."""
    total = tl.where(valid, total, float("nan"))
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        both = tl.maximum(m, sink)
        base = tl.where(both == float("-inf"), 0.0, both)
        own = tl.exp2(m - base)
        total = total * own + tl.exp2(sink - base)
        m = base
    else:
        own = 1.0
    nothing = total == 0  # seen by a row: out is 0, the logarithm of the sum -inf
    total = tl.where(nothing, 1.0, total)
    return own / total, tl.where(nothing, float("-inf"), (m + tl.log2(total)) * LN2)


@triton.jit(do_not_specialize=[*SIZES, "sequences"])
def prompt_kernel(
    q, k, v, k_scale, v_scale, table, lens, cu, sinks, out, lse,  # out (total_q, heads, D), lse (total_q, heads): dense
    stride_qm, stride_qh, stride_kp, stride_kn, stride_kh, stride_vp, stride_vn, stride_vh,
    stride_ap, stride_an, stride_ah, stride_bp, stride_bn, stride_bh, stride_tb, stride_t,
    total_q, sequences, heads, group, pages, capacity, pairs, tiles,  # pairs: of a key head and H heads of its group
    left, right, scale, cap,
    SINKS: tl.constexpr, MOST: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, INT8: tl.constexpr,
    FOLD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Sequences of more than MOST rows: a tile of rows and a pair, over all positions. All NaN if cu is wrong."""
    ROWS: tl.constexpr = BM // H
    program = tl.program_id(0)
    tile, pair = tiles - 1 - program // pairs, program % pairs  # the longest first
    lane = tl.arange(0, BM)
    head_tiles = tl.cdiv(group, H)
    kv, in_group = pair // head_tiles, pair % head_tiles * H + lane % H
    head = (kv * group + tl.minimum(in_group, group - 1)).to(tl.int64)  # [BM]
    real = (lane < ROWS * H) & (in_group < group)
    b, wrong = sequence_of(tile, cu, cu, sequences, total_q, total_q, ROWS)
    if wrong > 0:
        row = tile * ROWS + lane // H
        nan = tl.full((BM,), float("nan"), tl.float32)
        _store(
            out, lse, nan[:, None] + tl.zeros((BM, DP), tl.float32), nan, row, head, real & (row < total_q), heads, D
        )
        return
    first_q = tl.load(cu + b)
    rows = tl.load(cu + b + 1) - first_q
    i0 = (tile - first_q // ROWS - b) * ROWS
    if (i0 >= rows) | (rows <= MOST):
        return
    length, valid = _length_of(lens, b, capacity)
    i = i0 + lane // H  # [BM], rows of the sequence
    row = (first_q + tl.minimum(i, rows - 1)).to(tl.int64)
    q_rows = q + (row * stride_qm + head * stride_qh)[:, None]  # [BM, 1]
    first, last, kv = length - rows + i0, length - rows + tl.minimum(i0 + ROWS, rows) - 1, kv.to(tl.int64)
    acc, m, total = walk(
        q_rows, length - rows + i, first, last, 0, length, length,
        k + kv * stride_kh, v + kv * stride_vh, k_scale + kv * stride_ah, v_scale + kv * stride_bh,
        table + b.to(tl.int64) * stride_tb, pages,
        stride_kp, stride_kn, stride_vp, stride_vn, stride_ap, stride_an, stride_bp, stride_bn, stride_t,
        left, right, scale, cap,
        D, PAGE, INT8, FOLD, LEFT, RIGHT, SOFTCAP, BM, BN, BD, DP,
    )  # fmt: skip
    factor, logarithm = _finish(m, total, valid, sinks, head, SINKS)
    _store(out, lse, acc * factor[:, None], logarithm, row, head, real & (i < rows), heads, D)


@triton.jit
def _store(out, lse, acc, logarithm, row, head, inside, heads, D: tl.constexpr):
    """Lanes, rounded once. acc: [BM, DP]; logarithm, row, head, inside: [BM]."""
    cell, d = row.to(tl.int64) * heads + head, tl.arange(0, acc.shape[1])
    tl.store(
        out + cell[:, None] * D + d[None, :], narrow(acc, out.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :]
    )
    tl.store(lse + cell, logarithm, mask=inside)


@triton.jit(
    do_not_specialize=[
        "first_b",
        "total_q",
        "group",
        "pages",
        "capacity",
        "pairs",
        "tiles",
        "splits",
        "share",
        "left",
        "right",
    ]
)
def split_kernel(
    q, k, v, k_scale, v_scale, table, lens, cu,
    partial, peak,  # [tile, pair, split, lane, D] and [tile, pair, split, 2, lane]: acc; m and total
    stride_qm, stride_qh, stride_kp, stride_kn, stride_kh, stride_vp, stride_vn, stride_vh,
    stride_ap, stride_an, stride_ah, stride_bp, stride_bn, stride_bh, stride_tb, stride_t,
    first_b, total_q, group, pages, capacity, pairs, tiles, splits, share,  # tiles: of a sequence; share: of its splits
    left, right, scale, cap,
    PACKED: tl.constexpr, MOST: tl.constexpr, H: tl.constexpr, LANES: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, INT8: tl.constexpr, FOLD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Sequences of at most MOST rows: a tile of rows and a pair, over every share-th split of what they see."""
    ROWS: tl.constexpr = BM // H
    program = tl.program_id(0)
    pair, turn, tile = program % pairs, program // pairs % share, program // pairs // share
    b, i0 = first_b + tile // tiles, tile % tiles * ROWS
    first_q, rows = _few_rows_of(b, cu, total_q, PACKED, MOST)
    length, _ = _length_of(lens, b, capacity)
    first, last = length - rows + i0, length - rows + tl.minimum(i0 + ROWS, rows) - 1
    begin, count = _splits_of(first, last, length, left, right, LEFT, RIGHT)
    if (i0 >= rows) | (turn >= count):
        return
    lane, d = tl.arange(0, BM), tl.arange(0, DP)
    head_tiles = tl.cdiv(group, H)
    kv, in_group = (pair // head_tiles).to(tl.int64), pair % head_tiles * H + lane % H
    head = kv * group + tl.minimum(in_group, group - 1)  # [BM]
    i = tl.minimum(i0 + lane // H, rows - 1)  # [BM], rows of the sequence
    q_rows = q + ((first_q + i).to(tl.int64) * stride_qm + head * stride_qh)[:, None]  # [BM, 1]
    for split in range(bound(turn), bound(count), bound(share)):
        start = (begin + split) * SPLIT
        acc, m, total = walk(
            q_rows, length - rows + i, first, last, start, start + SPLIT, length,
            k + kv * stride_kh, v + kv * stride_vh, k_scale + kv * stride_ah, v_scale + kv * stride_bh,
            table + b.to(tl.int64) * stride_tb, pages,
            stride_kp, stride_kn, stride_vp, stride_vn, stride_ap, stride_an, stride_bp, stride_bn, stride_t,
            left, right, scale, cap,
            D, PAGE, INT8, FOLD, LEFT, RIGHT, SOFTCAP, BM, BN, BD, DP,
        )  # fmt: skip
        cell = ((tile * pairs + pair).to(tl.int64) * splits + split) * LANES
        tl.store(
            partial + (cell + lane[:, None]) * D + d[None, :], acc, mask=(lane < LANES)[:, None] & (d < D)[None, :]
        )
        tl.store(peak + 2 * cell + lane, m, mask=lane < LANES)
        tl.store(peak + 2 * cell + LANES + lane, total, mask=lane < LANES)


@triton.jit(do_not_specialize=[*SIZES, "first_b", "splits"])
def combine_kernel(
    lens, cu, sinks, partial, peak, out, lse,
    first_b, total_q, heads, group, capacity, pairs, tiles, splits, left, right,
    PACKED: tl.constexpr, SINKS: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, H: tl.constexpr,
    LANES: tl.constexpr, D: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BS: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """A lane: its splits, BS at a time from multiples of BS on, so that positions decide what is added to what."""
    program = tl.program_id(0)
    lane, pair, tile = program % LANES, program // LANES % pairs, program // LANES // pairs
    b, i0 = first_b + tile // tiles, tile % tiles * ROWS
    head_tiles = tl.cdiv(group, H)
    i, in_group = i0 + lane // H, pair % head_tiles * H + lane % H
    first_q, rows = _few_rows_of(b, cu, total_q, PACKED, MOST)
    if (i >= rows) | (in_group >= group):
        return
    length, valid = _length_of(lens, b, capacity)
    first, last = length - rows + i0, length - rows + tl.minimum(i0 + ROWS, rows) - 1
    begin, count = _splits_of(first, last, length, left, right, LEFT, RIGHT)
    cells = (tile * pairs + pair).to(tl.int64) * splits
    d = tl.arange(0, DP)
    m = tl.full((BS,), float("-inf"), tl.float32)
    for at in range(bound(begin // BS * BS), bound(begin + count), BS):
        split = at + tl.arange(0, BS) - begin
        there = (split >= 0) & (split < count)
        m = tl.maximum(m, tl.load(peak + 2 * (cells + split) * LANES + lane, mask=there, other=float("-inf")))
    top = tl.max(m, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    acc, total = tl.zeros((DP,), tl.float32), 0.0
    for at in range(bound(begin // BS * BS), bound(begin + count), BS):
        split = at + tl.arange(0, BS) - begin
        there = (split >= 0) & (split < count)
        cell = (cells + split) * LANES  # [BS]
        weight = tl.exp2(tl.load(peak + 2 * cell + lane, mask=there, other=float("-inf")) - base)
        total += tl.sum(weight * tl.load(peak + 2 * cell + LANES + lane, mask=there, other=0.0), 0)
        part = tl.load(
            partial + (cell + lane)[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0
        )  # [BS, DP]
        acc += tl.sum(weight[:, None] * part, 0)
    head = (pair // head_tiles).to(tl.int64) * group + in_group
    factor, logarithm = _finish(top, total, valid, sinks, head, SINKS)
    cell = (first_q + i).to(tl.int64) * heads + head
    tl.store(out + cell * D + d, narrow(acc * factor, out.dtype.element_ty), mask=d < D)
    tl.store(lse + cell, logarithm)
