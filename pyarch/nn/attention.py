"""Grouped-query self-attention over a paged cache, or over whole sequences without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ops import PagedKVCache, flash_attention, paged_attention, rms_norm, rotary_append
from ._watched import Watched
from .linear import Linear
from .rotary import RotaryEmbedding


@dataclass(frozen=True)
class PagedBatch:
    """New tokens of several sequences, one after the other in one row of T tokens, and their places in a cache.

    positions    int64 (T)      of each token in its own sequence
    slots        int64 (T)      of each token in the cache
    block_table  int32 (B, P)   pages of each sequence
    seq_lens     int32 (B)      tokens of each sequence, the new ones included
    cu_seqlens   int32 (B + 1)  where each sequence's new tokens begin, or None: one each
    last         int64 (B)      the row of each sequence's last token, or None: one each
    length       the largest of seq_lens
    """

    cache: PagedKVCache
    positions: torch.Tensor
    slots: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens: torch.Tensor | None
    last: torch.Tensor | None
    length: int

    @classmethod
    def append(cls, cache: PagedKVCache, sequences: Sequence, counts: Sequence[int]) -> PagedBatch:
        """Reserves counts[i] new tokens in sequences[i]. Raises what PagedKVCache.append raises."""
        slots = cache.append(sequences, counts)
        device, ends = slots.device, cache.lengths(sequences)
        cu_seqlens = last = None
        if all(n == 1 for n in counts):
            positions = torch.tensor([e - 1 for e in ends], dtype=torch.int64, device=device)
        else:
            positions = torch.cat([torch.arange(e - n, e) for e, n in zip(ends, counts, strict=True)]).to(device)
            starts = torch.tensor([0, *counts], dtype=torch.int64).cumsum(0)
            cu_seqlens, last = starts.int().to(device), (starts[1:] - 1).to(device)
        table, lengths = cache.block_table(sequences), cache.seq_lens(sequences)
        return cls(cache, positions, slots, table, lengths, cu_seqlens, last, max(ends, default=0))


class Attention(Watched):
    """softmax(q k^T / sqrt(head_dim)) v with rotary positions, causal; num_heads query heads share num_kv_heads.

    qkv       one projection to (num_heads + 2 num_kv_heads) * head_dim columns: queries, keys, values
    qk_norm   RMS norm of each query and key head before the rotation (Qwen3)
    window    each token sees itself and window - 1 tokens before it; None is all
    forward(x, rope)                x (B, S, hidden_size): whole sequences, no cache, differentiable
    forward(x, rope, batch, layer)  x (T, hidden_size): new tokens, their keys and values appended to batch's cache
    """

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, *, qkv_bias: bool = False,
                 out_bias: bool = False, qk_norm: bool = False, eps: float = 1e-6,
                 window: int | None = None) -> None:  # fmt: skip
        super().__init__()
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: must divide num_heads ({num_heads}), not {num_kv_heads}")
        if window is not None and window < 1:
            raise ValueError(f"window: must be at least 1, not {window}")
        self.num_heads, self.num_kv_heads, self.head_dim, self.eps = num_heads, num_kv_heads, head_dim, eps
        self.window = None if window is None else (window - 1, 0)
        self.qkv: torch.nn.Module = Linear(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, bias=qkv_bias)
        self.out: torch.nn.Module = Linear(num_heads * head_dim, hidden_size, bias=out_bias)
        self.q_norm: torch.nn.Parameter | None
        self.k_norm: torch.nn.Parameter | None
        for name in ("q_norm", "k_norm"):
            self.register_parameter(name, torch.nn.Parameter(torch.ones(head_dim)) if qk_norm else None)

    def forward(self, x: torch.Tensor, rope: RotaryEmbedding, batch: PagedBatch | None = None,
                layer: int = 0) -> torch.Tensor:  # fmt: skip
        if batch is None:
            return self._whole(x, rope)
        k_cache, v_cache = batch.cache.k[layer], batch.cache.v[layer]
        scales: dict[str, Any] = {"k_scale": batch.cache.k_scale[layer], "v_scale": batch.cache.v_scale[layer]}
        cos, sin = rope.tables(batch.length, x.device)
        q = rotary_append(self.qkv(x), cos, sin, batch.positions, k_cache, v_cache, batch.slots,
                          num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, interleaved=rope.interleaved,
                          q_norm=self.q_norm, k_norm=self.k_norm, eps=self.eps, **scales)  # fmt: skip
        y: Any = paged_attention(q, k_cache, v_cache, batch.block_table, batch.seq_lens, cu_seqlens_q=batch.cu_seqlens,
                                 window=self.window, **scales)  # fmt: skip
        return self.out(y.flatten(1))

    def _whole(self, x: torch.Tensor, rope: RotaryEmbedding) -> torch.Tensor:
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, Hq + 2 Hkv, S, D)
        q, k, v = heads.split(sizes, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm, eps=self.eps), rms_norm(k, self.k_norm, eps=self.eps)
        y: Any = flash_attention(rope(q), rope(k), v, causal=True, window=self.window)
        return self.out(y.transpose(1, 2).flatten(2))
