"""rotary_append: what stands between the fused q, k, v projection and paged attention, in one pass over its rows.

    q, k, v = qkv, cut into Hq + Hkv + Hkv heads of D
    q, k    = q / sqrt(mean(q^2) + eps) * q_norm,  k likewise with k_norm        where they are given (Qwen3)
    q, k    = rotated by the angles of each token's position                     rotary embedding
    k, v    -> the slots of the caches, in place                                 kv_append (paged_kv.py)

A pair (a, b) of a head turns by angle j: (a cos_j - b sin_j, b cos_j + a sin_j). Which elements form pair j:

    interleaved=False   j and j + D/2    halves: GPT-NeoX, Hugging Face checkpoints
    interleaved=True    2j and 2j + 1    LLaMA's original, as GGUF files keep it

    qkv             (T, (Hq + 2 Hkv) * D)         float32, bfloat16 or float16
    cos, sin        (max_positions, D/2)          float32: tables by position
    positions       (T)                int64      in [0, max_positions)
    k_cache         (pages, page_size, Hkv, D)    qkv's dtype or int8, any outer strides; v_cache likewise
    slot_mapping    (T)                int64      page * page_size + offset of each token; -1: k and v are not kept
    q_norm, k_norm  (D)                           qkv's dtype or float32, or None
    k_scale         (pages, page_size, Hkv)       float32, for int8 caches and only for them; v_scale likewise
    returns         q (T, Hq, D)                  qkv's dtype

Everything is fp32 between one load and one rounding; v is copied bit by bit. What goes to an int8 cache is rounded as
kv_append rounds it, k after it was rounded to qkv's dtype. The CPU operator and the reference refuse
positions and slots out of range, and slots named twice, before anything is written.
For inference: a call that autograd would record runs on the reference. A qkv whose rows are not contiguous, and tables,
positions or slots that are not, are copied first (pyarch.copies).
Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
"""

from __future__ import annotations

from typing import Any

import torch

from ..dispatch import Facts, Limits, Op
from ..native import define, operator, refusal
from . import _args
from ._paged_checks import cache_kind, check_caches, dense_heads, inference_only, no_gradient
from ._paged_formulas import kv_append_reference


def rotary_append(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool = False,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Rotates q and k, appends k and v to the paged caches, returns q (T, num_heads, D); see the module's text.

    Raises TypeError or ValueError naming the argument; ValueError if the named backend cannot run the call.
    """
    facts = check(
        qkv, cos, sin, positions, k_cache, v_cache, slot_mapping, num_heads=num_heads, num_kv_heads=num_kv_heads,
        interleaved=interleaved, q_norm=q_norm, k_norm=k_norm, eps=eps, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    chosen = ROTARY_APPEND.choose(backend, facts)
    if chosen == "reference":
        return rotary_append_reference(
            qkv, cos, sin, positions, k_cache, v_cache, slot_mapping, num_heads=num_heads, num_kv_heads=num_kv_heads,
            interleaved=interleaved, q_norm=q_norm, k_norm=k_norm, eps=eps, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
    row, dense = _args.row_contiguous, _args.contiguous
    try:
        return operator("rotary_append", chosen)(
            row(qkv), dense(cos), dense(sin), dense(positions), k_cache, v_cache, dense(slot_mapping),
            dense(q_norm), dense(k_norm), k_scale, v_scale, num_heads, interleaved, eps,
        )  # fmt: skip
    except RuntimeError as error:
        raise refusal(error) from None


def rotary_append_reference(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool = False,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, in plain PyTorch: any device and floating dtype. ValueError for positions or slots it refuses."""
    if bool(((positions < 0) | (positions >= cos.shape[0])).any()):
        raise ValueError(f"positions: must be 0 to {cos.shape[0] - 1}, these are {positions}")
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, k_cache.shape[3]))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    angles = cos[positions][:, None], sin[positions][:, None]
    q, k = (rotate(_normed(x, w, eps), *angles, interleaved).to(qkv.dtype) for x, w in ((q, q_norm), (k, k_norm)))
    kv_append_reference(k, v, k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)
    return q


def _normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return wide if weight is None else wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x (..., D) with its pairs turned; cos and sin broadcast to (..., D/2)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
    turned = a * cos - b * sin, b * cos + a * sin
    return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)


def check(
    qkv: Any,
    cos: Any,
    sin: Any,
    positions: Any,
    k_cache: Any,
    v_cache: Any,
    slot_mapping: Any,
    *,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool = False,
    q_norm: Any = None,
    k_norm: Any = None,
    eps: float = 1e-6,
    k_scale: Any = None,
    v_scale: Any = None,
) -> Facts:
    """Checks the arguments and returns the facts that dispatch compares with LIMITS."""
    _args.tensor("qkv", qkv, rank=2)
    if not qkv.is_floating_point():
        raise TypeError(f"qkv: dtype must be floating, not {qkv.dtype}")
    dtype, device, tokens = qkv.dtype, qkv.device, qkv.shape[0]
    table = torch.float64 if dtype == torch.float64 else torch.float32
    _args.tensor("k_cache", k_cache, rank=4, dtypes=(dtype, torch.int8), device=device)
    if k_cache.shape[3] % 2:
        raise ValueError(f"k_cache: head size must be even, not shape {tuple(k_cache.shape)}")
    _, _, cached_heads, dim = check_caches(k_cache, v_cache, k_scale, v_scale, written=True)
    if num_kv_heads != cached_heads:
        raise ValueError(f"num_kv_heads: must be {cached_heads} (k_cache's), not {num_kv_heads}")
    if num_heads < 1:
        raise ValueError(f"num_heads: must be at least 1, not {num_heads}")
    _args.shape("qkv", qkv, tokens, (num_heads + 2 * num_kv_heads) * dim)
    _args.tensor("cos", cos, rank=2, dtypes=(table,), device=device)
    _args.shape("cos", cos, cos.shape[0], dim // 2)
    _args.tensor("sin", sin, dtypes=(table,), device=device, shape=cos.shape)
    for name, index in (("positions", positions), ("slot_mapping", slot_mapping)):
        _args.tensor(name, index, dtypes=(torch.int64,), device=device, shape=(tokens,))
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            _args.tensor(name, weight, dtypes=(dtype, torch.float32), device=device, shape=(dim,))
    if not eps >= 0:
        raise ValueError(f"eps: must be at least 0, not {eps}")
    gradient = _args.needs_grad(qkv, cos, sin, k_cache, v_cache, q_norm, k_norm, k_scale, v_scale)
    if gradient and k_scale is not None:
        no_gradient("qkv")
    return {
        "device": _args.device_type(qkv),
        "dtype": dtype,
        "cache": cache_kind(k_cache),
        "requires_grad": gradient,
        "dense_heads": dense_heads(k_cache, v_cache),
    }


def _fake(qkv, cos, sin, positions, k_cache, v_cache, slot_mapping, q_norm, k_norm, k_scale, v_scale, num_heads,
          interleaved, eps):  # fmt: skip
    return qkv.new_empty((qkv.shape[0], num_heads, k_cache.shape[3]))


LIMITS = {"cpu": Limits("cpu", unless=inference_only)}
ROTARY_APPEND = Op("rotary_append", LIMITS, check, "on the reference: the kernels are for inference")
define(
    "rotary_append",
    "(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor slot_mapping, Tensor? q_norm, Tensor? k_norm, Tensor(c!)? k_scale, Tensor(d!)? v_scale, int num_heads,"
    " bool interleaved, float eps) -> Tensor",
    _fake,
)

OPS = {rotary_append: ROTARY_APPEND}
CASES = {
    "smollm2-decode": dict(tokens=1, heads=9, kv_heads=3, head_dim=64),
    "llama8b-decode": dict(tokens=1, heads=32, kv_heads=8, head_dim=128),
    "smollm2-prompt": dict(tokens=512, heads=9, kv_heads=3, head_dim=64),
    "llama8b-prompt": dict(tokens=1024, heads=32, kv_heads=8, head_dim=128),
}


def flops(case: dict) -> int:
    return 3 * case["tokens"] * (case["heads"] + case["kv_heads"]) * case["head_dim"]


def bytes_moved(case: dict, dtype: torch.dtype) -> int:
    """qkv read, q, k and v written; the tables are small beside them."""
    return 2 * case["tokens"] * (case["heads"] + 2 * case["kv_heads"]) * case["head_dim"] * dtype.itemsize
