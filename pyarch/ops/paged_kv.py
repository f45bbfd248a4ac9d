"""paged_kv: attention over keys and values that live in pages, and the append that writes them there.

    q              (total_q, Hq, D)              new rows of all sequences, one after the other
    k_cache        (pages, page_size, Hkv, D)    any outer strides; v_cache likewise; Hq a multiple of Hkv
    block_table    (B, max_pages)      int32     block_table[b, i]: the page of positions i * page_size and up
    seq_lens       (B)                 int32     tokens of sequence b in the cache, its new rows included
    cu_seqlens_q   (B+1)               int32     rows cu[b] to cu[b+1]-1 of q are sequence b's; None: one row each
    slot_mapping   (T)                 int64     page * page_size + offset of each token; -1: the token is skipped

    positions of sequence b   0 . . 15 | 16 . . 31 | 32 . . 47 | 48 . . seq_len-1
    block_table[b]                7    |     2     |     9     |     4     | ...     further entries are never read
    its rows of q                                        [0 . . . . . n-1]           row i is at seq_len - n + i

    s = scale * q @ k;  s = softcap * tanh(s / softcap) if softcap > 0;  out = softmax(s) @ v;  lse = log(sum(exp(s)))

A row attends to the positions from its own minus window[0] to its own plus window[1], and with `causal` to none after
its own. A sink is one more logit per head, which takes part in the softmax and has no value. A row that attends to
nothing gives 0, and its lse is the sink's logit, or -inf without one. lse is natural, includes the sink and is fp32.

Products, sums and the softmax are fp32 and out is rounded once. On the CPU a long sequence is split at fixed positions
and its splits are combined in their order: an answer is bitwise the same alone or in a batch, for any page size and any
number of threads. Slots that hold no token may hold anything, NaN included, and so may table entries of positions that
no row attends to.

Errors: TypeError or ValueError for metadata. For values (lengths, table entries, slots) the CPU operators and the
reference raise before anything is read or written. CUDA kernels cannot, since the host would have to wait; they touch
nothing outside their arguments, and give NaN to the rows of a sequence whose length is not possible, to rows that
attend to a position whose table entry is not a page, and to all rows if cu_seqlens_q does not rise from 0 to total_q.

For inference: a call that autograd would record runs on the reference. On CUDA paged_attention takes few rows, 16 a
sequence on average. Not supported: fp8 or int8 caches, tree masks, values of another head size than keys.
Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023; Dao et al.,
Flash-Decoding for long-context inference, 2023.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..dispatch import Facts, Limits, Op
from ..native import define, operator, refusal
from . import _args, _attention


def kv_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Writes the keys and values (T, Hkv, D) of T new tokens into their slots of the caches, in place.

    slot_mapping: int64 (T), page * page_size + offset, as PagedKVCache.append returns it; -1 skips the token. A slot
    out of range or named twice is refused and nothing is written (on CUDA: out of range is skipped; of two tokens for
    one slot, either remains).
    Raises TypeError or ValueError naming the argument; ValueError if the named backend cannot run the call.
    """
    chosen = KV_APPEND.choose(backend, check_append(k, v, k_cache, v_cache, slot_mapping))
    if chosen == "reference":
        return kv_append_reference(k, v, k_cache, v_cache, slot_mapping)
    try:
        operator("kv_append", chosen)(
            _args.row_contiguous(k), _args.row_contiguous(v), k_cache, v_cache, _args.row_contiguous(slot_mapping)
        )
    except RuntimeError as error:
        raise refusal(error) from None


def kv_append_reference(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """The definition, in plain PyTorch: any device and dtype. ValueError for a slot out of range or named twice."""
    pages, page_size = k_cache.shape[:2]
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    if bool((slot_mapping < -1).any()) or bool((slots >= pages * page_size).any()):
        raise ValueError(f"slot_mapping: slots must be -1 or 0 to {pages * page_size - 1}, these are {slot_mapping}")
    if slots.unique().numel() != slots.numel():
        raise ValueError("slot_mapping: a slot is named twice")
    k_cache[slots // page_size, slots % page_size] = k[kept]
    v_cache[slots // page_size, slots % page_size] = v[kept]


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of q's rows over paged keys and values; prompts and single tokens may be mixed. See the module's text.

    window: (left, right) positions besides the own one, -1 unbounded. sinks: (Hq), float32 or q's dtype. scale: None is
    1/sqrt(D). Returns out (total_q, Hq, D) in q's dtype, and with return_lse also lse (total_q, Hq) in float32.
    Raises TypeError or ValueError naming the argument; ValueError if the named backend cannot run the call.
    """
    options: dict[str, Any] = dict(
        cu_seqlens_q=cu_seqlens_q, causal=causal, window=window, softcap=softcap, sinks=sinks, scale=scale
    )
    facts = check(q, k_cache, v_cache, block_table, seq_lens, **options)
    chosen = PAGED_ATTENTION.choose(backend, facts)
    if chosen == "reference":
        return paged_attention_reference(q, k_cache, v_cache, block_table, seq_lens, return_lse=return_lse, **options)
    left, right = (-1, -1) if window is None else window
    try:
        out, lse = operator("paged_attention", chosen)(
            _args.row_contiguous(q), k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, sinks, causal, left, right,
            softcap, q.shape[-1] ** -0.5 if scale is None else scale,
        )  # fmt: skip
    except RuntimeError as error:
        raise refusal(error) from None
    return (out, lse) if return_lse else out


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The definition, in plain PyTorch, sequence by sequence: differentiable, any device and dtype."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads, head_dim = q.shape[1:]
    pages, page_size, kv_heads = k_cache.shape[:3]
    starts = list(range(q.shape[0] + 1)) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    lens = seq_lens.tolist()
    check_lengths(starts, lens, q.shape[0], block_table.shape[1] * page_size)
    left, right = (2**31 if side == -1 else side for side in _attention.window(window, causal))
    spans = [_span(n, last - first, left, right) for first, last, n in zip(starts[:-1], starts[1:], lens, strict=True)]
    tables = [block_table[b, low // page_size : -(-high // page_size)].long() for b, (low, high) in enumerate(spans)]
    for b, used in enumerate(tables):
        if bool(((used < 0) | (used >= pages)).any()):
            raise ValueError(f"block_table: row {b} has entries outside 0 to {pages - 1}: {used.tolist()}")
    outs, lses = [q.new_empty((0, heads, head_dim))], [q.new_empty((0, heads), dtype=wide)]
    for b, (low, high) in enumerate(spans):
        rows = q[starts[b] : starts[b + 1]].to(wide)
        base = low // page_size * page_size
        keys, values = (
            cache[tables[b]].flatten(0, 1)[low - base : high - base].to(wide).repeat_interleave(heads // kv_heads, 1)
            for cache in (k_cache, v_cache)
        )
        scores = torch.einsum("rhd,khd->hrk", rows, keys) * (head_dim**-0.5 if scale is None else scale)
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        own = torch.arange(lens[b] - rows.shape[0], lens[b], device=q.device)[:, None]
        away = torch.arange(low, high, device=q.device) - own
        scores = scores.masked_fill((away < -left) | (away > right), -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(wide)[:, None, None].expand(-1, rows.shape[0], 1)], -1)
        lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(scores.shape[:2], -math.inf)
        weights = torch.where(lse[..., None] == -math.inf, 0.0, torch.exp(scores - lse[..., None]))
        outs.append(torch.einsum("hrk,khd->rhd", weights[..., : high - low], values).to(q.dtype))
        lses.append(lse.T)
    return (torch.cat(outs), torch.cat(lses)) if return_lse else torch.cat(outs)


def check_lengths(starts: list[int], lens: list[int], total: int, capacity: int) -> None:
    """Checks the values of cu_seqlens_q (rows in order, all of q's) and seq_lens (what the table can hold)."""
    if starts[0] != 0 or starts[-1] != total or starts != sorted(starts):
        raise ValueError(f"cu_seqlens_q: must rise from 0 to {total} (q's rows), not {starts}")
    if any(not 0 <= n <= capacity for n in lens):
        raise ValueError(f"seq_lens: must be 0 to {capacity} (what block_table can hold), not {lens}")


def _span(length: int, rows: int, left: int, right: int) -> tuple[int, int]:
    """The positions [low, high) that any of a sequence's rows attends to."""
    low, high = max(0, length - rows - left), min(length, length + right)
    return (low, high) if rows and low < high else (0, 0)


def check_append(k: Any, v: Any, k_cache: Any, v_cache: Any, slot_mapping: Any) -> Facts:
    """Checks kv_append's arguments and returns the facts that dispatch compares with its limits."""
    _, _, kv_heads, head_dim = _check_caches(k_cache, v_cache)
    device, dtypes = k_cache.device, (k_cache.dtype,)
    _args.tensor("k", k, rank=3, dtypes=dtypes, device=device)
    tokens = k.shape[0]
    _args.shape("k", k, tokens, kv_heads, head_dim)
    _args.tensor("v", v, dtypes=dtypes, device=device, shape=(tokens, kv_heads, head_dim))
    _args.writable("k_cache", k_cache)
    _args.writable("v_cache", v_cache)
    _args.tensor("slot_mapping", slot_mapping, dtypes=(torch.int64,), device=device, shape=(tokens,))
    return _facts(k, k_cache, v_cache, _args.needs_grad(k, v, k_cache, v_cache))


def check(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    seq_lens: Any,
    *,
    cu_seqlens_q: Any = None,
    causal: bool = True,
    window: Any = None,
    softcap: float = 0.0,
    sinks: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Facts:
    """Checks paged_attention's arguments and returns the facts that dispatch compares with its limits."""
    _, _, kv_heads, head_dim = _check_caches(k_cache, v_cache)
    device = k_cache.device
    _args.tensor("q", q, rank=3, dtypes=(k_cache.dtype,), device=device)
    total, heads, q_dim = q.shape
    if q_dim != head_dim or heads == 0 or heads % kv_heads:
        raise ValueError(f"q: must be (rows, a multiple of {kv_heads} heads, {head_dim}), not shape {tuple(q.shape)}")
    _args.tensor("block_table", block_table, rank=2, dtypes=(torch.int32,), device=device)
    batch = block_table.shape[0]
    _args.tensor("seq_lens", seq_lens, dtypes=(torch.int32,), device=device, shape=(batch,))
    if cu_seqlens_q is not None:
        _args.tensor("cu_seqlens_q", cu_seqlens_q, dtypes=(torch.int32,), device=device, shape=(batch + 1,))
    elif total != batch:
        raise ValueError(f"q: without cu_seqlens_q must have one row per sequence ({batch}), not {total}")
    _attention.window(window)
    _attention.scaling(softcap, scale)
    if sinks is not None:
        _args.tensor("sinks", sinks, dtypes=(q.dtype, torch.float32), device=device, shape=(heads,))
    return _facts(q, k_cache, v_cache, _args.needs_grad(q, k_cache, v_cache, sinks), batch)


def _check_caches(k_cache: Any, v_cache: Any) -> tuple[int, ...]:
    """Checks that the caches are alike; returns their shape."""
    _args.tensor("k_cache", k_cache, rank=4)
    if not k_cache.is_floating_point():
        raise TypeError(f"k_cache: dtype must be floating, not {k_cache.dtype}")
    shape = k_cache.shape
    _, page_size, kv_heads, head_dim = shape
    if page_size == 0 or kv_heads == 0 or head_dim == 0:
        raise ValueError(f"k_cache: page_size, heads and head size must be at least 1, not shape {tuple(shape)}")
    _args.tensor("v_cache", v_cache, dtypes=(k_cache.dtype,), device=k_cache.device, shape=shape)
    return shape


def _facts(
    x: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, requires_grad: bool, sequences: int | None = None
) -> Facts:
    _, page_size, _, head_dim = k_cache.shape
    return {
        "device": _args.device_type(x),
        "dtype": x.dtype,
        "page_size": page_size,
        "head_dim": head_dim,
        "requires_grad": requires_grad,
        "rows_a_sequence": 1 if sequences is None else -(-x.shape[0] // max(1, sequences)),
        "dense_heads": dense_heads(k_cache, v_cache),
        "caches": (k_cache, v_cache),
    }


def dense_heads(k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
    """Whether the elements of a head lie side by side in both caches."""
    return k_cache.stride()[3] == v_cache.stride()[3] == 1 or k_cache.shape[3] == 1


def _in_16_bytes(cache: torch.Tensor) -> bool:
    """Whether every head of every slot begins at a multiple of 16 bytes."""
    return all(n * cache.itemsize % 16 == 0 for n in (cache.storage_offset(), *cache.stride()[:3]))


def inference_only(facts: Facts) -> str | None:
    """The predicate in the limits of kernels over the caches."""
    if facts["requires_grad"]:
        return "is for inference only, and autograd would record this call"
    return None if facts["dense_heads"] else "needs caches whose last dimension is contiguous"


def _in_pieces(facts: Facts) -> str | None:
    """The predicate of the kernel that copies a head 16 bytes at a time."""
    if facts["head_dim"] % 8:
        return f"takes head sizes that are multiples of 8, not {facts['head_dim']}"
    if not all(map(_in_16_bytes, facts["caches"])):
        return "needs caches whose heads begin at multiples of 16 bytes"
    return inference_only(facts)


def _append_fake(k, v, k_cache, v_cache, slot_mapping):
    return None


def _attention_fake(
    q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, sinks, causal, left, right, softcap, scale
):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:2], dtype=torch.float32)


KV_APPEND = Op(
    "kv_append",
    {"cpu": Limits("cpu", unless=inference_only), "cuda": Limits("cuda", capability=(8, 0), unless=inference_only)},
    check_append,
    "on the reference: in-place indexing in PyTorch",
)
PAGED_ATTENTION = Op(
    "paged_attention",
    {
        "cpu": Limits("cpu", unless=inference_only),
        # It reads the cache once for every 8 query vectors of a key head, so prompts are not for it.
        "cuda": Limits(
            "cuda", ranges={"head_dim": (8, 256), "rows_a_sequence": (0, 16)}, capability=(8, 0), unless=_in_pieces
        ),
    },
    check,
    "on the reference: the kernels are for inference",
)
define(
    "kv_append",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()",
    _append_fake,
)
define(
    "paged_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, Tensor? cu_seqlens_q,"
    " Tensor? sinks, bool causal, int window_left, int window_right, float softcap, float scale) -> (Tensor, Tensor)",
    _attention_fake,
)

OPS = {kv_append: KV_APPEND, paged_attention: PAGED_ATTENTION}
CASES = {
    "smollm2-decode": dict(batch=1, rows=1, kv=512, heads=9, kv_heads=3, head_dim=64),
    "smollm2-prompt": dict(batch=1, rows=512, kv=512, heads=9, kv_heads=3, head_dim=64),
    "gqa-decode": dict(batch=1, rows=1, kv=4096, heads=32, kv_heads=8, head_dim=128),
    "mha-decode": dict(batch=1, rows=1, kv=4096, heads=32, kv_heads=32, head_dim=128),
    "gqa-decode-batch8": dict(batch=8, rows=1, kv=1024, heads=32, kv_heads=8, head_dim=128),
    "gqa-prompt": dict(batch=1, rows=2048, kv=2048, heads=32, kv_heads=8, head_dim=128),
}


def flops(case: dict) -> int:
    """Multiplications and additions of the causal products: the last rows of each sequence."""
    pairs = sum(case["kv"] - i for i in range(case["rows"]))
    return 4 * case["batch"] * pairs * case["heads"] * case["head_dim"]


def bytes_moved(case: dict, dtype: torch.dtype) -> int:
    """Every key and value once."""
    return 2 * case["batch"] * case["kv"] * case["kv_heads"] * case["head_dim"] * dtype.itemsize
