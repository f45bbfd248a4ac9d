"""paged_kv in Triton: the append to pages, and the launches of attention over them (pyarch/ops/paged_kv.py).

The kernels of attention, and what decides their bits, are in paged_kv_attention.py. What is here of them is the grid:

    few rows (to FEW lanes)    split_kernel    (a tile of 16 lanes, a key head, a share of the splits)
                               combine_kernel  (a tile, a key head, a lane)
    more, if cu_seqlens_q      prompt_kernel   (total_q // rows of a tile + sequences, a key head)

Partial results take memory for as many splits as the table can hold, since the host does not know lengths. It is kept
to PARTIAL_FLOATS by taking the sequences in several launches. Lengths, cu_seqlens_q and sinks that are not contiguous
are copied; all else is read in place. prompt_kernel comes last, because it also checks
cu_seqlens_q as a whole and makes NaN of all rows if it is wrong.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pyarch.kernels._attention import LOG2E, padded, whole
from pyarch.kernels._common import capability, on_device_of
from pyarch.kernels.paged_kv_attention import SPLIT, combine_kernel, prompt_kernel, split_kernel

FEW = 64  # lanes of a sequence that takes the route of few rows
PROGRAMS = 2048  # that fill a GPU: the splits of a tile are shared among no more than that needs
PARTIAL_FLOATS = 64 << 20  # of partial results of a launch, unless one sequence needs more
MOST_POSITIONS = 2**30  # that a table may hold: positions are int32


@dataclass(frozen=True)
class Config:
    """One way to cut the work."""

    block_m: int  # lanes
    block_n: int  # positions of a step
    block_d: int  # of the head size in a dot at most
    num_warps: int
    num_stages: int


COMBINED = 32  # splits that combine_kernel adds at a time


def config_for(few: bool, size: int, dtype: torch.dtype, arch: int, vectors: bool, int8: bool) -> Config:
    """The config of a route.

    size: the head size, padded; vectors: heads can be loaded in vectors of 16 bytes, past the registers; int8: caches,
    which turn into dtype in registers. The largest tiles found that do not spill (tests/compile_kernels.py).
    """
    wide = dtype == torch.float32  # multiply-adds, whose operands lie in registers: in chunks of the head size
    chunk = (32 if vectors or (few and size == 256) else 16) if wide else size
    if few and (wide or int8 or not vectors):
        return Config(16, 32 if vectors and size <= 64 else 16, chunk, 8, 3 if vectors else 1)
    if few:  # 5 stages: page numbers are on their way while the tile before is, and that while one is used
        return Config(16, 32, chunk, 4, 5)
    if not vectors:
        small = size == 256 or (wide and size == 128)
        return Config(16 if small else 32, 16, chunk, 16 if wide and small else 8, 1)
    if wide:
        return Config(16 if size == 256 else 32, 16, chunk, 8, 2)
    if int8:
        return Config(64, 16 if size == 256 else 32, size, 8, 2)
    if size == 256:
        return Config(128, 16, size, 8, 3) if arch >= 90 else Config(64, 32, size, 8, 2)
    return Config(128, 64 if arch >= 90 or size <= 64 else 32, size, 8, 3)


@triton.jit
def _write(
    x, cache, scales, token, page, at, head, heads, stride_t, stride_h, stride_p, stride_n, stride_c,
    stride_sp, stride_sn, stride_sc, D: tl.constexpr, INT8: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Some heads [BH] of a token into its slot; as int8, each with its scale."""
    d, some = tl.arange(0, DP)[None, :], head < heads
    inside = some[:, None] & (d < D)
    value = tl.load(x + token * stride_t + head[:, None] * stride_h + d, mask=inside, other=0)  # [BH, DP]
    cells = cache + page * stride_p + at * stride_n + head[:, None] * stride_c + d
    if INT8:
        size = tl.abs(value.to(tl.float32))
        odd = tl.max((size < float("inf")).to(tl.int32) ^ 1, 1) > 0  # NaN or infinity among a head's elements
        scale = tl.where(odd, float("nan"), tl.div_rn(tl.max(size, 1), tl.full(head.shape, 127.0, tl.float32)))
        real = scale > 0  # else the codes are 0
        code = tl.div_rn(value.to(tl.float32), tl.where(real, scale, 1.0)[:, None] + tl.zeros_like(size))
        code = (code + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds half to even
        code = tl.where(real[:, None], tl.minimum(tl.maximum(code, -127.0), 127.0), 0.0)
        tl.store(cells, code.to(tl.int8), mask=inside)
        tl.store(scales + page * stride_sp + at * stride_sn + head * stride_sc, scale, mask=some)
    else:
        tl.store(cells, value, mask=inside)


@triton.jit
def _append_kernel(
    k, v, k_cache, v_cache, slots, k_scale, v_scale, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_kp, stride_kn, stride_kc, stride_vp, stride_vn, stride_vc,
    stride_ap, stride_an, stride_ac, stride_bp, stride_bn, stride_bc, heads, pages, page_size,
    D: tl.constexpr, INT8: tl.constexpr, BH: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """BH heads of a token. A slot that is none is skipped: to raise, the host would have to wait."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if (slot < 0) | (slot >= tl.cast(pages, tl.int64) * page_size):
        return
    page, at, head = slot // page_size, slot % page_size, tl.program_id(1) * BH + tl.arange(0, BH).to(tl.int64)
    _write(k, k_cache, k_scale, token, page, at, head, heads, stride_kt, stride_kh, stride_kp, stride_kn, stride_kc,
           stride_ap, stride_an, stride_ac, D, INT8, DP)  # fmt: skip
    _write(v, v_cache, v_scale, token, page, at, head, heads, stride_vt, stride_vh, stride_vp, stride_vn, stride_vc,
           stride_bp, stride_bn, stride_bc, D, INT8, DP)  # fmt: skip


def append(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale):
    """pyarch::kv_append__triton, in place."""
    _check_append(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    if k.numel() == 0:
        return
    (tokens, heads, d), (pages, page_size) = k.shape, k_cache.shape[:2]
    dp, int8 = triton.next_power_of_2(d), k_scale is not None
    block = max(1, min(triton.next_power_of_2(heads), 2048 // dp))
    scales = (k_scale, v_scale) if int8 else (k_cache, v_cache)
    strides = (n for x in (k_cache, v_cache, *scales) for n in x.stride()[:3])
    with on_device_of(k):
        _append_kernel[(tokens, triton.cdiv(heads, block))](
            k, v, k_cache, v_cache, slot_mapping, *scales, *k.stride()[:2], *v.stride()[:2], *strides, heads, pages,
            page_size, D=d, INT8=int8, BH=block, DP=dp, num_warps=4,
        )  # fmt: skip


def forward(
    q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, sinks, k_scale, v_scale,
    causal, left, right, softcap, scale,
):  # fmt: skip
    """pyarch::paged_attention__triton: (out (total_q, Hq, D) like q, lse (total_q, Hq) fp32)."""
    _check_memory(q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, cu_seqlens_q, sinks)
    vectors = all(map(whole, (q[None], k_cache, v_cache)))
    with on_device_of(q):
        kind = padded(q.shape[2]), q.dtype, capability(), vectors, k_scale is not None
        few, many = config_for(True, *kind), config_for(False, *kind)
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
        tensors = (q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, cu_seqlens_q, sinks)
        return launch(few, many, out, lse, *tensors, left, 0 if causal else right, softcap, scale)


def launch(
    few, many, out, lse, q, k_cache, v_cache, k_scale, v_scale, table, lens, cu, sinks, left, right, softcap, scale
):  # fmt: skip
    """Fills and returns (out, lse), both contiguous, with a config for each route, on the current GPU."""
    (total, heads, d), (pages, page_size, kv_heads, _), (batch, columns) = q.shape, k_cache.shape, table.shape
    if total == 0:
        return out, lse
    group, capacity, packed = heads // kv_heads, columns * page_size, cu is not None
    if pages == 0:  # a page to read and to find missing
        k_cache = v_cache = k_cache.new_zeros(()).expand(1, page_size, kv_heads, d)
        k_scale = v_scale = None if k_scale is None else k_scale.new_zeros(()).expand(1, page_size, kv_heads)
    # A side of the window that reaches past every position is unbounded: fewer kernels, and no position overflows.
    left, right = (-1 if side >= total + capacity else side for side in (left, right))
    cu = lens if cu is None else cu.contiguous()
    sides, lens = (max(left, 0), max(right, 0)), lens.contiguous()
    numbers = *sides, scale / softcap if softcap > 0 else scale * LOG2E.value, softcap * LOG2E.value
    int8 = k_scale is not None
    scales = (k_scale, v_scale) if int8 else (q, q)
    strides = *q.stride()[:2], *(n for x in (k_cache, v_cache, *scales) for n in x.stride()[:3]), *table.stride()
    common = dict(LEFT=left >= 0, RIGHT=right >= 0, D=d, enable_fp_fusion=True)  # FMAs, whatever Triton's default
    walk = common | dict(PAGE=page_size, INT8=int8, FOLD=scale >= 0 and softcap <= 0, SOFTCAP=softcap > 0, DP=padded(d))
    sink = dict(SINKS=sinks is not None)
    sinks = q if sinks is None else sinks.contiguous()

    h = min(group, few.block_m)  # heads of a tile
    pairs, most = kv_heads * triton.cdiv(group, h), max(1, FEW // h)
    route = dict(PACKED=packed, MOST=most, H=h)
    rows = few.block_m // h
    tiles = triton.cdiv(min(most, total), rows) if packed else 1  # of a sequence
    lanes = rows * h if packed else h
    touched = triton.cdiv(sides[0] + sides[1] + rows, SPLIT.value) + 1 if left >= 0 and right >= 0 else capacity
    splits = max(1, min(triton.cdiv(capacity, SPLIT.value), touched))
    share = max(1, min(splits, triton.cdiv(PROGRAMS, pairs * tiles * batch)))
    floats = tiles * pairs * splits * lanes * d  # of a sequence
    some = max(1, min(batch, PARTIAL_FLOATS // floats))  # sequences of a launch
    partial, peak = (q.new_empty(some * floats // d * of, dtype=torch.float32) for of in (d, 2))
    for first in range(0, batch if not packed or batch > 1 or total <= most else 0, some):
        tiles_now = min(some, batch - first) * tiles * pairs
        split_kernel[(tiles_now * share,)](
            q, k_cache, v_cache, *scales, table, lens, cu, partial, peak, *strides, first, total, group, pages,
            capacity, pairs, tiles, splits, share, *numbers, **walk, **route, **_constants(few, d), LANES=lanes,
        )  # fmt: skip
        combine_kernel[(tiles_now * lanes,)](
            lens, cu, sinks, partial, peak, out, lse, first, total, heads, group, capacity, pairs, tiles, splits,
            *sides, **common, **route, **sink, ROWS=rows, LANES=lanes, BS=COMBINED, DP=padded(d),
            num_warps=8 if padded(d) == 256 else 4, maxnreg=128,
        )  # fmt: skip
    if packed:
        h = min(group, many.block_m)
        pairs, tiles = kv_heads * triton.cdiv(group, h), total // (many.block_m // h) + batch
        prompt_kernel[(tiles * pairs,)](
            q, k_cache, v_cache, *scales, table, lens, cu, sinks, out, lse, *strides, total, batch, heads, group, pages,
            capacity, pairs, tiles, *numbers, **walk, **sink, MOST=most, H=h, **_constants(many, d),
        )  # fmt: skip
    return out, lse


def _constants(config: Config, d: int) -> dict:
    return dict(
        BM=config.block_m, BN=config.block_n, BD=min(config.block_d, padded(d)),
        num_warps=config.num_warps, num_stages=config.num_stages,
        # Else ptxas may spill to fit one more block on a multiprocessor. 16 warps have 128 registers anyway.
        maxnreg={4: 168 if padded(d) < 256 else 255, 8: 255}.get(config.num_warps),
    )  # fmt: skip


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _check_append(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale):
    """The operators are open to anyone: refuses what would touch memory outside a tensor."""
    if k.dim() != 3 or k_cache.dim() != 4 or k.dtype not in FLOATS:
        raise ValueError(f"k, k_cache: must be 3- and 4-dimensional, k of floats, not {k.dtype} {tuple(k.shape)}")
    if max(k.shape) >= 2**31:
        raise ValueError("k: more than 2^31 tokens")
    _check_caches(k, k_cache, v_cache, k_scale, v_scale)
    _check(k, v=(v, k.shape, k.dtype), slot_mapping=(slot_mapping, k.shape[:1], torch.int64))
    _check_dense(k=k, v=v, slot_mapping=slot_mapping)


def _check_memory(q, k_cache, v_cache, k_scale, v_scale, table, lens, cu, sinks):
    """The same of paged_attention, and what is not these kernels' to compute."""
    if q.dim() != 3 or k_cache.dim() != 4 or table.dim() != 2 or q.dtype not in FLOATS:
        raise ValueError(f"q, k_cache, block_table: must be 3-, 4- and 2-dimensional, q of floats, not {q.dtype}")
    (total, heads, d), (pages, page_size, kv_heads, _), (batch, columns) = q.shape, k_cache.shape, table.shape
    if not 0 < d <= 256 or page_size == 0 or kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"q: must have heads of 1 to 256, a multiple of k_cache's, not {tuple(q.shape)}")
    if max(columns * page_size, page_size, total + batch) > MOST_POSITIONS or pages >= 2**31:
        raise ValueError("block_table: must hold at most 2^30 positions, and q as many rows")
    if total != batch if cu is None else batch == 0 < total:
        raise ValueError(f"q: must have one row per sequence, or cu_seqlens_q, not {total} rows for {batch}")
    _check_caches(q[:, :kv_heads], k_cache, v_cache, k_scale, v_scale)
    _check(
        q, block_table=(table, table.shape, torch.int32), seq_lens=(lens, (batch,), torch.int32),
        cu_seqlens_q=(cu, (batch + 1,), torch.int32),
        sinks=(sinks, (heads,), q.dtype if sinks is None or sinks.dtype == q.dtype else torch.float32),
    )  # fmt: skip
    _check_dense(q=q)


def _check_caches(x, k_cache, v_cache, k_scale, v_scale):
    """Caches alike, for heads as x (rows, heads, dim) has them, with scales if and only if they are int8."""
    shape, int8 = (*k_cache.shape[:2], *x.shape[1:]), k_cache.dtype == torch.int8
    if (k_scale is not None) != int8 or (v_scale is not None) != int8:
        raise ValueError(f"k_scale: int8 caches need k_scale and v_scale, and only they, not {k_cache.dtype}")
    dtype = torch.int8 if int8 else x.dtype
    _check(
        x, k_cache=(k_cache, shape, dtype), v_cache=(v_cache, shape, dtype),
        k_scale=(k_scale, shape[:3], torch.float32), v_scale=(v_scale, shape[:3], torch.float32),
    )  # fmt: skip
    _check_dense(k_cache=k_cache, v_cache=v_cache)


def _check(x, **tensors):
    """Raises ValueError for a tensor that has not the given shape and dtype, or is not on x's device."""
    for name, (tensor, shape, dtype) in tensors.items():
        wanted = tuple(shape), dtype, x.device
        if tensor is not None and (found := (tuple(tensor.shape), tensor.dtype, tensor.device)) != wanted:
            raise ValueError(f"{name}: must be {wanted}, not {found}")


def _check_dense(**tensors):
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: the last dimension must be contiguous")
