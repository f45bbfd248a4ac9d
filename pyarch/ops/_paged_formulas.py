"""The definitions of kv_append and paged_attention (paged_kv.py), in plain PyTorch."""

from __future__ import annotations

import math

import torch

from . import _attention


def kv_append_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """The definition, in plain PyTorch: any device and dtype. ValueError for a slot out of range or named twice."""
    pages, page_size = k_cache.shape[:2]
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    if bool((slot_mapping < -1).any()) or bool((slots >= pages * page_size).any()):
        raise ValueError(f"slot_mapping: slots must be -1 or 0 to {pages * page_size - 1}, these are {slot_mapping}")
    if slots.unique().numel() != slots.numel():
        raise ValueError("slot_mapping: a slot is named twice")
    place = slots // page_size, slots % page_size
    for new, cache, scales in ((k[kept], k_cache, k_scale), (v[kept], v_cache, v_scale)):
        if scales is None:
            cache[place] = new
        else:
            cache[place], scales[place] = quantized_heads(new)


def quantized_heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., D) -> int8 codes and scales (...): amax / 127, x / scale rounded half to even; see paged_kv.py."""
    wide = x if x.dtype == torch.float64 else x.float()
    amax = wide.abs().amax(-1)
    # A tensor of 127, not the number: by a number, CUDA multiplies with its reciprocal, which rounds twice.
    scales = torch.where(amax.isfinite(), amax / torch.full_like(amax, 127), torch.nan)
    codes = torch.where(scales[..., None] > 0, wide / scales[..., None], 0.0).round().clamp(-127, 127)
    return codes.to(torch.int8), scales


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
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
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
        part = slice(low - base, high - base)
        keys, values = (
            _held(cache, scales, tables[b], part).to(wide).repeat_interleave(heads // kv_heads, 1)
            for cache, scales in ((k_cache, k_scale), (v_cache, v_scale))
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


def _held(cache: torch.Tensor, scales: torch.Tensor | None, pages: torch.Tensor, part: slice) -> torch.Tensor:
    """(positions, Hkv, D) of these pages one after the other, codes multiplied by their scales."""
    x = cache[pages].flatten(0, 1)[part]
    return x if scales is None else x * scales[pages].flatten(0, 1)[part, :, None]


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
