"""Rotary position embedding: the tables, and the rotation in plain PyTorch for whole, uncached sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..ops.rotary import rotate


class RotaryEmbedding(torch.nn.Module):
    """Tables of cos and sin for positions 0, 1, ...: angle(p, i) = p * theta^(-2i / head_dim) / factors[i].

    head_dim       even
    theta          the base
    factors        head_dim/2 divisors of the frequencies (Llama 3's long-context scaling), or None
    max_positions  positions of the model's context
    interleaved    pairs are (2i, 2i+1), as in the paper and in GGUF files of the llama architecture; else (i, i + D/2)
    Su et al., RoFormer, 2021.
    """

    def __init__(self, head_dim: int, *, theta: float = 10000.0, factors: Sequence[float] | None = None,
                 max_positions: int = 4096, interleaved: bool = False) -> None:  # fmt: skip
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim: must be even and at least 2, not {head_dim}")
        if factors is not None and len(factors) != head_dim // 2:
            raise ValueError(f"factors: must be {head_dim // 2} numbers, not {len(factors)}")
        self.head_dim, self.theta, self.factors = head_dim, theta, factors
        self.max_positions, self.interleaved = max_positions, interleaved
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def tables(self, positions: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each float32 [at least `positions`, head_dim/2]. Raises ValueError beyond max_positions.

        They grow by doubling and are kept; angles are computed in float64, so that late positions stay exact.
        """
        if positions > self.max_positions:
            raise ValueError(f"positions: the model's context is {self.max_positions} tokens, {positions} were asked")
        kept = self._tables
        if kept is None or kept[0].shape[0] < positions or kept[0].device != torch.device(device):
            length = min(self.max_positions, max(256, 1 << (positions - 1).bit_length()))
            with torch.inference_mode(False):  # they outlive the mode, and autograd takes no tensor made in it
                kept = self._tables = self._made(length, device)
        return kept

    def _made(self, length: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        frequency = self.theta ** (torch.arange(0, self.head_dim, 2, dtype=torch.float64) / -self.head_dim)
        if self.factors is not None:
            frequency = frequency / torch.tensor(self.factors, dtype=torch.float64)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        return angle.cos().float().to(device), angle.sin().float().to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotates x (..., S, head_dim), whose rows stand at positions 0 to S-1; differentiable."""
        cos, sin = (t[: x.shape[-2]] for t in self.tables(x.shape[-2], x.device))
        wide = x if x.dtype == torch.float64 else x.float()
        return rotate(wide, cos, sin, self.interleaved).to(x.dtype)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, theta={self.theta}, interleaved={self.interleaved}"


def llama3_factors(head_dim: int, theta: float, *, factor: float, low_freq_factor: float, high_freq_factor: float,
                   original_positions: int) -> tuple[float, ...]:  # fmt: skip
    """The divisors of Llama 3.1's rotary scaling: 1 for wavelengths short against the original context, `factor` for
    long ones, and a smooth passage between."""
    factors = []
    for i in range(head_dim // 2):
        turns = original_positions / (2 * math.pi * theta ** (2 * i / head_dim))  # rotations in the original context
        smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)
