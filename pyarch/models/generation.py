"""generate: tokens of one sequence as they come, over a paged cache of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from .. import nn
from .transformer import Llama

PAGE_SIZE = 32
PREFILL_TOKENS = 512  # of a prompt in one forward pass: bounds the memory of activations; no answer depends on it


def generate(
    model: Llama,
    prompt: Sequence[int],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop: Collection[int] = (),
    cache_dtype: torch.dtype | None = None,
) -> Iterator[int]:
    """Yields new token ids after `prompt` as they are sampled, at most max_tokens and as the context allows.

    temperature  0 takes the likeliest token; else sampling, limited by top_k, top_p, min_p (see nn.Sampler)
    seed         makes sampling repeatable
    stop         ids that end generation; such an id is not yielded
    cache_dtype  of keys and values: None is the model's; torch.int8 rounds them, in half bfloat16's memory
    Raises ValueError naming the argument, at the call, for an empty prompt, one beyond the context, or bad options.
    """
    context = model.config.max_positions
    if not 0 < len(prompt) <= context:
        raise ValueError(f"prompt: must be 1 to {context} tokens (the model's context), not {len(prompt)}")
    if min(prompt) < 0 or max(prompt) >= model.config.vocab_size:
        raise ValueError(f"prompt: ids must be in [0, {model.config.vocab_size})")
    if max_tokens < 0:
        raise ValueError(f"max_tokens: must be at least 0, not {max_tokens}")
    sampler = nn.Sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, device=model.device)
    count = min(max_tokens, context - len(prompt) + 1)
    cache = model.cache(-(-(len(prompt) + count) // PAGE_SIZE), PAGE_SIZE, dtype=cache_dtype)
    return _generate(model, cache, list(prompt), count, sampler, frozenset(stop))


def _generate(
    model: Llama, cache: nn.PagedKVCache, new: list[int], count: int, sampler: nn.Sampler, stop: frozenset[int]
):
    sequence = cache.allocate()
    for _ in range(count):
        with torch.inference_mode():
            for start in range(0, len(new), PREFILL_TOKENS):
                logits = model.extend(cache, [sequence], [new[start : start + PREFILL_TOKENS]])
            token = int(sampler(logits))
        if token in stop:
            return
        yield token
        new = [token]


def perplexity(model: Llama, tokens: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood of tokens[1:], each given all before it; no cache."""
    if len(tokens) < 2:
        raise ValueError(f"tokens: must be at least 2, not {len(tokens)}")
    with torch.inference_mode():
        ids = torch.tensor(tokens, device=model.device)
        logits = model(ids[None])[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, ids[1:]).exp().item()
