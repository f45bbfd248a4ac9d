"""The definitions of kv_append and paged_attention (paged_kv.py), in plain PyTorch."""

from __future__ import annotations

import math

import torch

from . import _attention


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
