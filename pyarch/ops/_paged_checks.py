"""Checks of kv_append's and paged_attention's arguments, and the facts about a call that dispatch compares with limits.

Each raises TypeError or ValueError that names the argument.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from ..dispatch import Facts
from . import _args, _attention


def check_append(
    k: Any, v: Any, k_cache: Any, v_cache: Any, slot_mapping: Any, *, k_scale: Any = None, v_scale: Any = None
) -> Facts:
    """Checks kv_append's arguments and returns the facts that dispatch compares with its limits."""
    _, _, kv_heads, head_dim = check_caches(k_cache, v_cache, k_scale, v_scale, written=True)
    device = k_cache.device
    _args.tensor("k", k, rank=3, dtypes=_beside(k_cache), device=device)
    tokens = k.shape[0]
    _args.shape("k", k, tokens, kv_heads, head_dim)
    _args.tensor("v", v, dtypes=(k.dtype,), device=device, shape=(tokens, kv_heads, head_dim))
    _args.tensor("slot_mapping", slot_mapping, dtypes=(torch.int64,), device=device, shape=(tokens,))
    gradient = _args.needs_grad(k, v, k_cache, v_cache, k_scale, v_scale)
    if gradient and k_scale is not None:
        no_gradient("k")
    return _facts(k, k_cache, v_cache, gradient)


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
    k_scale: Any = None,
    v_scale: Any = None,
    return_lse: bool = False,
) -> Facts:
    """Checks paged_attention's arguments and returns the facts that dispatch compares with its limits."""
    _, _, kv_heads, head_dim = check_caches(k_cache, v_cache, k_scale, v_scale)
    device = k_cache.device
    _args.tensor("q", q, rank=3, dtypes=_beside(k_cache), device=device)
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
    gradient = _args.needs_grad(q, k_cache, v_cache, sinks, k_scale, v_scale)
    return {**_facts(q, k_cache, v_cache, gradient, batch), "positions": block_table.shape[1] * k_cache.shape[1]}


def check_caches(k_cache: Any, v_cache: Any, k_scale: Any, v_scale: Any, *, written: bool = False) -> tuple[int, ...]:
    """Checks caches that are alike, with scales where they are int8; returns their shape. written: by the call."""
    _args.tensor("k_cache", k_cache, rank=4)
    if not (k_cache.is_floating_point() or k_cache.dtype == torch.int8):
        raise TypeError(f"k_cache: dtype must be floating or int8, not {k_cache.dtype}")
    shape = k_cache.shape
    _, page_size, kv_heads, head_dim = shape
    if page_size == 0 or kv_heads == 0 or head_dim == 0:
        raise ValueError(f"k_cache: page_size, heads and head size must be at least 1, not shape {tuple(shape)}")
    _args.tensor("v_cache", v_cache, dtypes=(k_cache.dtype,), device=k_cache.device, shape=shape)
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        if k_cache.dtype != torch.int8:
            if scales is not None:
                raise ValueError(f"{name}: is for int8 caches, these are {k_cache.dtype}")
        elif scales is None:
            raise ValueError(f"{name}: int8 caches need one, float32 of shape {tuple(shape[:3])}")
        else:
            _args.tensor(name, scales, dtypes=(torch.float32,), device=k_cache.device, shape=shape[:3])
    if written:
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache), ("k_scale", k_scale), ("v_scale", v_scale)):
            if cache is not None:
                _args.writable(name, cache)
    return shape


def _beside(cache: torch.Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes that what comes with this cache may have: its own, or any that int8 codes stand for."""
    return _args.FLOATS if cache.dtype == torch.int8 else (cache.dtype,)


def no_gradient(name: str) -> NoReturn:
    """Refuses a call whose rounding to int8 would cut the gradient off without a word."""
    raise ValueError(f"{name}: rounding to int8 has no gradient, and autograd would record this call")


def _facts(
    x: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, requires_grad: bool, sequences: int | None = None
) -> Facts:
    _, page_size, _, head_dim = k_cache.shape
    return {
        "device": _args.device_type(x),
        "dtype": x.dtype,
        "cache": cache_kind(k_cache),
        "page_size": page_size,
        "head_dim": head_dim,
        "requires_grad": requires_grad,
        "rows_a_sequence": 1 if sequences is None else -(-x.shape[0] // max(1, sequences)),
        "dense_heads": dense_heads(k_cache, v_cache),
        "caches": (k_cache, v_cache),
    }


def cache_kind(cache: torch.Tensor) -> str:
    return "int8" if cache.dtype == torch.int8 else "floating"


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


def in_pieces(facts: Facts) -> str | None:
    """The predicate of the kernel that copies a head 16 bytes at a time."""
    unit = 16 if facts["cache"] == "int8" else 8
    if facts["head_dim"] % unit:
        return f"takes head sizes that are multiples of {unit} with {facts['cache']} caches, not {facts['head_dim']}"
    if not all(map(_in_16_bytes, facts["caches"])):
        return "needs caches whose heads begin at multiples of 16 bytes"
    return inference_only(facts)
