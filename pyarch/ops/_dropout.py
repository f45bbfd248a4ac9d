"""Dropout of attention's weights: which are kept, as a function of a seed and the weight's place alone.

    words  = Philox4x32-7(counter (k // 32 * 4 + k // 2 % 4, q, h, b), key (low half of the seed, high half))
    number = the low half of words[k // 8 % 4] for an even k, its high half for an odd one: 0 to 65535
    kept   = number >= min(round(p * 65536), 65535)

b is the number of the sequence, in a batch or packed; h the query head; q and k count from the sequence's start. So a
sequence loses the same weights alone, padded and packed. One call of Philox serves the eight of a row's 32 keys that
one thread holds in the accumulators of a tensor core (docs/decisions/0012-dropout-by-counter.md).
Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011.
"""

from __future__ import annotations

from typing import Any

import torch

from . import _args

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def check(dropout_p: Any, seed: Any, device: torch.device) -> None:
    """Checks both arguments."""
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: must be a number of at least 0 and below 1, not {dropout_p!r}")
    if seed is not None:
        _args.tensor("seed", seed, dtypes=(torch.int64,), device=device)
        if seed.numel() != 1:
            raise ValueError(f"seed: must have one element, not shape {tuple(seed.shape)}")


def seed_of(dropout_p: float, seed: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """The seed that a call uses: None without dropout, else the given one, else one from torch's generator."""
    if dropout_p == 0 or seed is not None:
        return None if dropout_p == 0 else seed
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def philox(counter: tuple, key: tuple, rounds: int = 7) -> tuple[torch.Tensor, ...]:
    """Philox4x32 of int64 tensors that hold 32 bits each and broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high_a, low_a = _product(c0, _MULTIPLIERS[0])
        high_b, low_b = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return c0, c1, c2, c3


def _product(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(high, low) half of the 64 bits of a * b, which int64 does not hold at once."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, (high << 16 | low & 0xFFFF) & _WORD


def kept(seed: torch.Tensor, dropout_p: float, b, heads: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """bool (B, H, Sq, Sk): which weights are kept. b: (B, 1) or (1, Sq), each row's sequence; q: (Sq); k: (Sk)."""
    calls = torch.arange((k.shape[0] + 31) // 32 * 4, device=k.device)
    h = torch.arange(heads, device=k.device)[:, None, None]
    seed = seed.reshape(())
    four = philox((calls, q[:, None], h, b[:, None, :, None]), (seed & _WORD, seed >> 32 & _WORD))
    words = torch.stack(torch.broadcast_tensors(*four), -1)  # (B, H, Sq, calls, 4)
    numbers = torch.stack((words & 0xFFFF, words >> 16), -1).flatten(-3)
    number = numbers.index_select(-1, (k // 32 * 4 + k // 2 % 4) * 8 + k // 8 % 4 * 2 + k % 2)
    return number >= min(round(dropout_p * 65536), 65535)
