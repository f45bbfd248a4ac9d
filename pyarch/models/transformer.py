"""Llama: the decoder-only transformer of Llama, Mistral, Qwen2, Qwen3 and SmolLM2.

    tokens -> embed -> [ x + attention(norm(x)) -> x + swiglu(norm(x)) ] * num_layers -> norm -> head -> logits

Touvron et al., LLaMA, 2023 (RMS norm before each block, rotary positions, SwiGLU); Ainslie et al., GQA, 2023;
Jiang et al., Mistral 7B, 2023 (sliding window); Yang et al., Qwen3, 2025 (norm of queries and keys).

T new tokens of B sequences, S tokens of a whole sequence, H hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import nn


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model. Lengths are in elements, positions in tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_factors: tuple[float, ...] | None = None  # divisors of the frequencies: Llama 3's scaling
    rope_interleaved: bool = False  # pairs (2i, 2i + 1) instead of (i, i + head_dim/2)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    tied: bool = False  # the head is the embedding's table


PRESETS = {
    "tiny": LlamaConfig(256, 64, 160, 2, 4, 2, 16, 256),
    "smollm2-135m": LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 8192, rope_theta=1e5, tied=True),
    "llama-3.1-8b": LlamaConfig(
        128256, 4096, 14336, 32, 32, 8, 128, 131072, rope_theta=5e5,
        rope_factors=nn.llama3_factors(128, 5e5, factor=8, low_freq_factor=1, high_freq_factor=4,
                                       original_positions=8192),
    ),
    "mistral-7b": LlamaConfig(32000, 4096, 14336, 32, 32, 8, 128, 32768, window=4096),
    "qwen2.5-0.5b": LlamaConfig(151936, 896, 4864, 24, 14, 2, 64, 32768, 1e-6, 1e6, qkv_bias=True, tied=True),
    "qwen3-0.6b": LlamaConfig(151936, 1024, 3072, 28, 16, 8, 128, 40960, 1e-6, 1e6, qk_norm=True, tied=True),
}  # fmt: skip


def block(c: LlamaConfig) -> nn.DecoderBlock:
    """One layer: x + attention(norm(x)), then x + swiglu(norm(x))."""
    attention = nn.Attention(
        c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, qkv_bias=c.qkv_bias, out_bias=c.out_bias,
        qk_norm=c.qk_norm, eps=c.norm_eps, window=c.window,
    )  # fmt: skip
    mlp = nn.SwiGLU(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
    return nn.DecoderBlock(nn.RMSNorm(c.hidden_size, c.norm_eps), attention, nn.RMSNorm(c.hidden_size, c.norm_eps), mlp)


class Llama(nn.Module):
    """The model. `from_gguf` and `from_pretrained` load trained weights; a new one is randomly initialised.

    forward(tokens)         int64 (B, S) -> logits (B, S, V): whole sequences without a cache, differentiable
    forward(tokens, batch)  int64 (T) -> logits (B, V) of each sequence's last token; keys and values go to the cache
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed: nn.Embedding | nn.QuantizedEmbedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.rope = nn.RotaryEmbedding(c.head_dim, theta=c.rope_theta, factors=c.rope_factors,
                                       max_positions=c.max_positions, interleaved=c.rope_interleaved)  # fmt: skip
        self.layers = nn.DecoderBlocks(block(c) for _ in range(c.num_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.norm_eps)
        self.head: nn.Module = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, batch: nn.PagedBatch | None = None) -> torch.Tensor:
        x, residual = self.layers(self.embed(tokens), self.rope, batch)
        if batch is not None and batch.last is not None:
            x, residual = x[batch.last], None if residual is None else residual[batch.last]
        return self.head(self.norm(x) if residual is None else self.norm(x, residual)[0])

    def cache(self, num_pages: int, page_size: int = 16, *, dtype: torch.dtype | None = None) -> nn.PagedKVCache:
        """An empty cache of num_pages * page_size tokens for this model, on its device and in its dtype, or in int8."""
        c = self.config
        if dtype not in (None, self.dtype, torch.int8):
            raise TypeError(f"dtype: of the model's cache must be {self.dtype} or torch.int8, not {dtype}")
        return nn.PagedKVCache(num_pages, page_size, c.num_layers, c.num_kv_heads, c.head_dim,
                               dtype=self.dtype if dtype is None else dtype, device=self.device)  # fmt: skip

    def extend(self, cache: nn.PagedKVCache, sequences: Sequence, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Appends tokens[i] to sequences[i], any numbers of them -> logits (B, V) after the last of each.

        cache is one of `self.cache`; sequences are handles of its `allocate`. Raises ValueError naming the argument,
        before anything is changed, for no tokens, ids outside the vocabulary, or more tokens than the model's context.
        """
        if not tokens or len(tokens) != len(sequences) or not all(len(t) for t in tokens):
            raise ValueError("tokens: must be at least one token for each of one or more sequences")
        flat = [int(t) for row in tokens for t in row]
        if min(flat) < 0 or max(flat) >= self.config.vocab_size:
            raise ValueError(f"tokens: ids must be in [0, {self.config.vocab_size}), not {min(flat)} to {max(flat)}")
        counts = [len(t) for t in tokens]
        before = cache.lengths(sequences)
        self.rope.tables(max(n + m for n, m in zip(before, counts, strict=True)), self.device)
        batch = nn.PagedBatch.append(cache, sequences, counts)
        return self(torch.tensor(flat, device=self.device), batch)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations and of the cache."""
        return self.embed.dtype

    @classmethod
    def from_gguf(cls, path: Any, **options) -> Llama:
        """A model of a GGUF file (architectures llama, qwen2, qwen3), quantised weights as they are in the file.

        path may also be what pyarch.io.gguf.load returned; options are those of pyarch.models.loading.from_gguf.
        Raises ValueError for a file that is not such a model.
        """
        from . import loading

        return loading.from_gguf(path, **options)

    @classmethod
    def from_pretrained(cls, folder: Any, **options) -> Llama:
        """A model of a Hugging Face folder (config.json and safetensors) of type llama, mistral, qwen2 or qwen3.

        folder may also be what pyarch.io.checkpoint.load returned; options are those of loading.from_pretrained.
        Raises ValueError for a folder that is not one.
        """
        from . import loading

        return loading.from_pretrained(folder, **options)
