"""Choice of the next token."""

from __future__ import annotations

from typing import Any

import torch

from ..ops import sample


class Sampler(torch.nn.Module):
    """logits (B, V) -> token ids int64 (B), by pyarch.sample with these options.

    seed  makes the choices repeatable; None takes torch's own generator
    Raises ValueError naming the option that sample would refuse.
    """

    def __init__(self, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                 min_p: float | None = None, seed: int | None = None, device: torch.device | str = "cpu"):  # fmt: skip
        super().__init__()
        self.options: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        sample(torch.zeros(1, 2, device=device), **self.options)  # refuses bad options now

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return sample(logits, generator=self.generator, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.options.items())
