"""What kernels of attention share: loads, scores, gradients, packed sequences, the host's part."""

import math

import torch
import triton
import triton.language as tl

from pyarch.kernels._common import bound, dot, narrow

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
L2_BYTES = 32 << 20  # of what programs running together share; an A100 has 40 MiB, an H100 50


@triton.jit
def tanh(x, ACCURATE: tl.constexpr):
    """tanh of fp32, to some 1e-7; ACCURATE: relative to the result, by a polynomial fitted to it below 0.6."""
    y = 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2E)) + 1.0)
    if ACCURATE:
        z = x * x
        c = 0.021798964 + z * (-0.0084468815 + z * 0.0024149067)
        c = -0.33333333 + z * (0.13333318 + z * (-0.053962792 + z * c))
        y = tl.where(z < 0.36, x + x * z * c, y)
    return y


@triton.jit
def load_tile(rows, d, stride, inside, EDGE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Columns d of a tile whose rows begin at rows [N, 1]; zeros from column D on and, at an EDGE, where not inside."""
    cells = rows + d.to(tl.int64)[None, :] * stride
    if EDGE and D == DP:
        return tl.load(cells, mask=inside[:, None], other=0.0)
    elif EDGE:
        return tl.load(cells, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    elif D == DP:
        return tl.load(cells)
    else:
        return tl.load(cells, mask=(d < D)[None, :], other=0.0)


@triton.jit
def scores_of(
    s, away, inside, bias_cells, mask_cells,
    left, right, scale, cap, slope,  # scale in log2 units; with softcap, scale / softcap, and cap in log2 units
    EDGE: tl.constexpr, SCALE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, ACCURATE: tl.constexpr,
):  # fmt: skip
    """(scores in log2 units, -inf where a key is not seen; tanh of the softcap, if any) of the products s of a tile.

    Rows or keys first, as the caller has them. away: how far each key lies after each row's position; inside: what
    exists of the tile, asked for at an EDGE alone. Without SCALE, which needs that nothing is added, s is as it was.
    """
    bend = s
    if SOFTCAP:
        bend = tanh(s * scale, ACCURATE)
        s = bend * cap
    elif SCALE:
        s *= scale
    if BIAS:
        added = tl.load(bias_cells, mask=inside, other=0) if EDGE else tl.load(bias_cells)
        s += added.to(tl.float32) * LOG2E
    if ALIBI:
        s -= tl.abs(away).to(tl.float32) * slope
    if MASK:
        kept = tl.load(mask_cells, mask=inside, other=0) if EDGE else tl.load(mask_cells)
        s = tl.where(kept != 0, s, float("-inf"))
    if EDGE:
        seen = inside
        if LEFT:
            seen = seen & (away >= -left)
        if RIGHT:
            seen = seen & (away <= right)
        s = tl.where(seen, s, float("-inf"))
    return s, bend


@triton.jit
def scores_at(
    s, key, position, inside, bias_cells, mask_cells,
    left, right, scale, cap, slope,  # scale in log2 units; with softcap, scale / softcap, and cap in log2 units
    EDGE: tl.constexpr, SCALE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, ACCURATE: tl.constexpr,
):  # fmt: skip
    """scores_of, of the place of each key and row, counted from anywhere: what a loop advances by belongs to position,
    which a thread has few of, else the compiler keeps a matrix of differences."""
    bend = s
    if SOFTCAP:
        bend = tanh(s * scale, ACCURATE)
        s = bend * cap
    elif SCALE:
        s *= scale
    if BIAS:
        added = tl.load(bias_cells, mask=inside, other=0) if EDGE else tl.load(bias_cells)
        s += added.to(tl.float32) * LOG2E
    if ALIBI:
        s -= tl.abs(key.to(tl.float32) - position.to(tl.float32)) * slope
    if MASK:
        kept = tl.load(mask_cells, mask=inside, other=0) if EDGE else tl.load(mask_cells)
        s = tl.where(kept != 0, s, float("-inf"))
    if EDGE:
        seen = inside
        if LEFT:
            seen = seen & (key >= position - left)
        if RIGHT:
            seen = seen & (key <= position + right)
        s = tl.where(seen, s, float("-inf"))
    return s, bend


@triton.jit
def soften(s, m, total, scale, FOLD: tl.constexpr):
    """A step of the softmax: (p, by what acc shrinks, m, total) after scores s [BM, BN]; FOLD: yet to be scaled."""
    top = tl.max(s, 1)  # [BM]
    if FOLD:
        top *= scale
    top = tl.maximum(m, top)
    base = tl.where(top == float("-inf"), 0.0, top)  # nothing seen so far: no -inf - -inf
    if FOLD:
        p = tl.exp2(s * scale - base[:, None])
    else:
        p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(m - base)
    return p, shrink, top, total * shrink + tl.sum(p, 1)


@triton.jit
def range_of(first, last, left, right, count, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """(low, high, full_low, full_high): what of 0 to count the positions from first to last see, and, in tiles of
    BLOCK, what all of them see. low, full_low and full_high are multiples of BLOCK."""
    low, high, full_low, full_high = 0, count, 0, count
    if LEFT:
        low = tl.maximum(first - left, 0) // BLOCK * BLOCK
        full_low = tl.cdiv(tl.maximum(last - left, 0), BLOCK) * BLOCK
    if RIGHT:
        high = tl.minimum(count, tl.maximum(last + right + 1, 0))
        full_high = tl.minimum(count, tl.maximum(first + right + 1, 0))
    return low, high, full_low, tl.maximum(full_high // BLOCK * BLOCK, full_low)


@triton.jit
def place_of(program, heads, tiles, share):
    """(tile, head) of a program: those that run together belong to `share` heads, tile 0 of each first."""
    first = program // (share * tiles) * share
    rest = program % (share * tiles)
    width = tl.minimum(heads - first, share)
    return rest // width, first + rest % width


@triton.jit
def sequence_of(tile, cu, other, sequences, total, other_total, BLOCK: tl.constexpr):
    """(the sequence that a tile of BLOCK rows of cu's belongs to, how many entries of cu and the other are wrong).

    Sequence b has the tiles from cu[b] // BLOCK + b on.
    """
    found, wrong = 0, 0
    for step in range(0, bound(sequences), 256):
        b = step + tl.arange(0, 256)
        inside = b < sequences
        a0, a1 = tl.load(cu + b, mask=inside, other=0), tl.load(cu + b + 1, mask=inside, other=0)  # [256]
        o0, o1 = tl.load(other + b, mask=inside, other=0), tl.load(other + b + 1, mask=inside, other=0)  # [256]
        falls = (a0 > a1) | (o0 > o1)
        begins = (b == 0) & ((a0 != 0) | (o0 != 0))
        ends = (b == sequences - 1) & ((a1 != total) | (o1 != other_total))
        found += tl.sum((inside & (a0 // BLOCK + b <= tile)).to(tl.int32), 0)
        wrong += tl.sum((inside & (falls | begins | ends)).to(tl.int32), 0)
    return found - 1, wrong


@triton.jit
def store_tile(to, x, count, D: tl.constexpr):
    """The first count rows of x [N, DP], rounded once, to rows of a dense matrix with D columns."""
    n, d = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1])
    cells = to + n[:, None] * D + d[None, :]
    tl.store(cells, narrow(x, to.dtype.element_ty), mask=(n < count)[:, None] & (d < D)[None, :])


@triton.jit
def product(
    a, b, a_rows, b_rows, stride_a, stride_b, inside_a, inside_b, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EDGE_A: tl.constexpr, EDGE_B: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """a @ b.T, fp32 [ROWS, COLUMNS]: of the tiles, or, if these are wider than BD, of chunks loaded again."""
    s = tl.zeros((ROWS, COLUMNS), tl.float32)
    if BD == DP:
        s = dot(a, tl.trans(b), s)
    else:
        for chunk in tl.static_range(0, DP, BD):
            d = chunk + tl.arange(0, BD)
            a_chunk = load_tile(a_rows, d, stride_a, inside_a, EDGE_A, D, DP)  # [ROWS, BD]
            b_chunk = load_tile(b_rows, d, stride_b, inside_b, EDGE_B, D, DP)  # [COLUMNS, BD]
            s = dot(a_chunk, tl.trans(b_chunk), s)
    return s


@triton.jit
def differentiate(s, dp, lse, delta):
    """(p, ds) of a tile, rows or keys first. lse: in log2 units, +inf for a row that sees nothing."""
    p = tl.exp2(s - lse)
    return p, p * (dp - delta)


@triton.jit
def logarithm(lse):
    """In log2 units, +inf for a row that sees nothing: of which p is 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


def padded(size: int) -> int:
    """The smallest power of two that holds size, at least 16: what a dot takes."""
    return max(16, triton.next_power_of_2(size))


def whole(x: torch.Tensor) -> bool:
    """Whether every row can be read in vectors of 16 bytes."""
    vector = 16 // x.element_size()
    outer = [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    return x.stride(3) == 1 and all(n % vector == 0 for n in (x.shape[3], x.storage_offset(), *outer))


def window_of(left: int, right: int, rows: int, keys: int) -> tuple[int, int]:
    """A side that reaches past every key is unbounded: fewer kernels, and no position overflows."""
    return tuple(-1 if side >= rows + keys else side for side in (left, right))


def operands(q, k, v, sinks, bias, mask, slopes, cu_q, cu_k) -> tuple:
    """The tensors as the kernels take them, q in the place of what is not there, and their strides."""
    strides = lambda x, n: (0,) * n if x is None else x.stride()
    mask = None if mask is None else mask.view(torch.uint8)
    return (
        q, k, v, *(q if x is None else x for x in (sinks, bias, mask, slopes, cu_q, cu_k)),
        *q.stride(), *k.stride(), *v.stride(), *strides(bias, 4), *strides(mask, 4), *(0, *strides(slopes, 1))[-2:],
    )  # fmt: skip


def constants(q, v, sinks, bias, mask, slopes, cu_q, left, right, softcap) -> dict:
    """Which features a call has, as constants of the kernels."""
    return dict(
        D=q.shape[3], DV=v.shape[3], PACKED=cu_q is not None, SINKS=sinks is not None, LEFT=left >= 0,
        RIGHT=right >= 0, SOFTCAP=softcap > 0, BIAS=bias is not None, MASK=mask is not None, ALIBI=slopes is not None,
        DP=padded(q.shape[3]), DVP=padded(v.shape[3]),
        enable_fp_fusion=True,  # a multiply and an add become one rounding, whatever Triton's default
    )  # fmt: skip


def check_memory(q, k, v, sinks, bias, mask, slopes, cu_q, cu_k):
    """The operator is open to anyone: refuses what would read outside a tensor or is not this kernel's to compute."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v: must be 4-dimensional float32, float16 or bfloat16, not {q.dtype} {tuple(q.shape)}")
    (batch, heads, rows, d), (_, kv_heads, keys, dv) = q.shape, v.shape
    if not (0 < d <= 256 and 0 < dv <= 256) or max(rows, keys) >= 2**29:
        raise ValueError(f"q: head sizes must be 1 to 256 and lengths below 2^29, not {d}, {dv} and {rows}, {keys}")
    if heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"k: its {kv_heads} heads must divide q's {heads}")
    if (cu_q is None) != (cu_k is None) or (cu_q is not None and (cu_q.dim() != 1 or len(cu_q) < 2 or batch != 1)):
        raise ValueError("cu_seqlens_q: must be None as cu_seqlens_k, or (n + 1) with one batch and n of at least 1")
    sequences = batch if cu_q is None else len(cu_q) - 1
    floats, scores = (q.dtype, torch.float32), (batch, heads, rows, keys)
    per_head = (heads,) if slopes is None or slopes.dim() == 1 else (sequences, heads)
    for name, x, shape, dtypes in [
        ("k", k, (batch, kv_heads, keys, d), (q.dtype,)), ("v", v, (batch, kv_heads, keys, dv), (q.dtype,)),
        ("sinks", sinks, (heads,), floats), ("bias", bias, scores, floats), ("mask", mask, scores, (torch.bool,)),
        ("alibi_slopes", slopes, per_head, floats), ("cu_seqlens_q", cu_q, (sequences + 1,), (torch.int32,)),
        ("cu_seqlens_k", cu_k, (sequences + 1,), (torch.int32,)),
    ]:  # fmt: skip
        if x is not None and (tuple(x.shape) != shape or x.dtype not in dtypes or x.device != q.device):
            found = f"{tuple(x.shape)} {x.dtype} on {x.device}"
            raise ValueError(f"{name}: must be {shape} {' or '.join(map(str, dtypes))} on {q.device}, not {found}")
        if name in ("sinks", "cu_seqlens_q", "cu_seqlens_k") and x is not None and not x.is_contiguous():
            raise ValueError(f"{name}: must be contiguous")
