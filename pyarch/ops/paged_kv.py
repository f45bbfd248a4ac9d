"""paged_kv: attention over keys and values that live in pages, and the append that writes them there.

    q              (total_q, Hq, D)              new rows of all sequences, one after the other
    k_cache        (pages, page_size, Hkv, D)    any outer strides; v_cache likewise; Hq a multiple of Hkv
    block_table    (B, max_pages)      int32     block_table[b, i]: the page of positions i * page_size and up
    seq_lens       (B)                 int32     tokens of sequence b in the cache, its new rows included
    cu_seqlens_q   (B+1)               int32     rows cu[b] to cu[b+1]-1 of q are sequence b's; None: one row each
    slot_mapping   (T)                 int64     page * page_size + offset of each token; -1: the token is skipped
    k_scale        (pages, page_size, Hkv)   float32, any strides; v_scale likewise; for int8 caches, and only for them

    positions of sequence b   0 . . 15 | 16 . . 31 | 32 . . 47 | 48 . . seq_len-1
    block_table[b]                7    |     2     |     9     |     4     | ...     further entries are never read
    its rows of q                                        [0 . . . . . n-1]           row i is at seq_len - n + i

    s = scale * q @ k;  s = softcap * tanh(s / softcap) if softcap > 0;  out = softmax(s) @ v;  lse = log(sum(exp(s)))

A row attends to the positions from its own minus window[0] to its own plus window[1], and with `causal` to none after
its own. A sink is one more logit per head, which takes part in the softmax and has no value. A row that attends to
nothing gives 0, and its lse is the sink's logit, or -inf without one. lse is natural, includes the sink and is fp32.

A cache has the dtype of q, k and v, or it is int8 and its element is code * scale, one scale for each token and head:

    amax = max(abs(x))    scale = amax / 127    code = x / scale, rounded half to even      all in fp32

A head of zeros has scale 0. A head with a NaN or an infinity has scale NaN and codes 0, so that all that attends to it
is NaN.

Products, sums and the softmax are fp32 and out is rounded once. On the CPU a long sequence is split at fixed positions
and its splits are combined in their order: an answer is bitwise the same alone or in a batch, for any page size and any
number of threads. Slots that hold no token may hold anything, NaN included, and so may table entries of positions that
no row attends to.

Caches are used in place. q, k, v and slot_mapping are copied first where their last dimension is not contiguous
(pyarch.copies).

Errors: TypeError or ValueError for metadata. For values (lengths, table entries, slots) the CPU operators and the
reference raise before anything is read or written. CUDA kernels cannot, since the host would have to wait; they touch
nothing outside their arguments, and give NaN to the rows of a sequence whose length is not possible, to rows that
attend to a position whose table entry is not a page, and to all rows if cu_seqlens_q does not rise from 0 to total_q.

For inference: a call that autograd would record runs on the reference. On GPUs few rows, 16 a sequence on average, run
in CUDA C++ where it takes the layout (with q of 16 bits, an infinite value gives NaN there), and all else in Triton,
which rounds probabilities, and values of int8 caches, to the dtype of q. Not supported: fp8 caches, tree masks, values
of another head size than keys.
Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023; Dao et al.,
Flash-Decoding for long-context inference, 2023.
"""

from __future__ import annotations

from typing import Any

import torch

from ..dispatch import Limits, Op
from ..native import define, operator, refusal
from . import _args
from ._paged_checks import check, check_append, in_pieces, inference_only
from ._paged_formulas import kv_append_reference, paged_attention_reference


def kv_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Writes the keys and values (T, Hkv, D) of T new tokens into their slots of the caches, in place.

    slot_mapping: int64 (T), page * page_size + offset, as PagedKVCache.append returns it; -1 skips the token. A slot
    out of range or named twice is refused and nothing is written (on CUDA: out of range is skipped; of two tokens for
    one slot, either remains). Into int8 caches the tokens are rounded, and k_scale and v_scale take their scales.
    Raises TypeError or ValueError naming the argument; ValueError if the named backend cannot run the call.
    """
    facts = check_append(k, v, k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)
    chosen = KV_APPEND.choose(backend, facts)
    if chosen == "reference":
        return kv_append_reference(k, v, k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)
    row = _args.row_contiguous
    try:
        operator("kv_append", chosen)(row(k), row(v), k_cache, v_cache, row(slot_mapping), k_scale, v_scale)
    except RuntimeError as error:
        raise refusal(error) from None


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
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of q's rows over paged keys and values; prompts and single tokens may be mixed. See the module's text.

    window: (left, right) positions besides the own one, -1 unbounded. sinks: (Hq), float32 or q's dtype. scale: None is
    1/sqrt(D). Returns out (total_q, Hq, D) in q's dtype, and with return_lse also lse (total_q, Hq) in float32.
    Raises TypeError or ValueError naming the argument; ValueError if the named backend cannot run the call.
    """
    options: dict[str, Any] = dict(
        cu_seqlens_q=cu_seqlens_q, causal=causal, window=window, softcap=softcap, sinks=sinks, scale=scale,
        k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    facts = check(q, k_cache, v_cache, block_table, seq_lens, **options)
    chosen = PAGED_ATTENTION.choose(backend, facts)
    if chosen == "reference":
        return paged_attention_reference(q, k_cache, v_cache, block_table, seq_lens, return_lse=return_lse, **options)
    left, right = (-1, -1) if window is None else window
    try:
        out, lse = operator("paged_attention", chosen)(
            _args.row_contiguous(q), k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, sinks, k_scale, v_scale,
            causal, left, right, softcap, q.shape[-1] ** -0.5 if scale is None else scale,
        )  # fmt: skip
    except RuntimeError as error:
        raise refusal(error) from None
    return (out, lse) if return_lse else out


def _append_fake(*_):
    return None


def _attention_fake(q, *_):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:2], dtype=torch.float32)


KV_APPEND = Op(
    "kv_append",
    {
        "cpu": Limits("cpu", unless=inference_only),
        "cuda": Limits("cuda", capability=(8, 0), unless=inference_only),
        "triton": Limits("cuda", capability=(8, 0), unless=inference_only),
    },
    check_append,
    "on the reference: in-place indexing in PyTorch",
)
PAGED_ATTENTION = Op(
    "paged_attention",
    {
        "cpu": Limits("cpu", unless=inference_only),
        # It reads the cache once for every 8 or 16 query vectors of a key head, so prompts are for Triton.
        "cuda": Limits(
            "cuda",
            ranges={"head_dim": (8, 256), "rows_a_sequence": (0, 16)},
            capability=(8, 0),
            unless=in_pieces,
        ),
        "triton": Limits(
            "cuda", ranges={"head_dim": (1, 256), "positions": (0, 2**30)}, capability=(8, 0), unless=inference_only
        ),
    },
    check,
    "on the reference: the kernels are for inference",
)
define(
    "kv_append",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, Tensor(c!)? k_scale,"
    " Tensor(d!)? v_scale) -> ()",
    _append_fake,
    triton="paged_kv:append",
)
define(
    "paged_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, Tensor? cu_seqlens_q,"
    " Tensor? sinks, Tensor? k_scale, Tensor? v_scale, bool causal, int window_left, int window_right, float softcap,"
    " float scale) -> (Tensor, Tensor)",
    _attention_fake,
    triton="paged_kv:forward",
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
