"""The formulas of attention in PyTorch operations, in memory quadratic in the sequence: the reference, second
derivatives, and gradients where no kernel has them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from . import _dropout

Options = tuple[
    int, int, float, float, float
]  # left and right of the window, softcap, scale, dropout_p: the operator's
OTHER_SEQUENCE = 2**40  # further away than any key


class Weights(NamedTuple):
    """What the reference and the gradients share, float32 or float64."""

    p: torch.Tensor  # (B, H, Sq, Sk) probabilities
    p_sink: torch.Tensor  # (B, H, Sq) of the sink, 0 without one
    lse: torch.Tensor  # (B, H, Sq)
    capped: torch.Tensor  # (B, H, Sq, Sk) scores before bias, ALiBi and masks
    away: torch.Tensor  # (Sq, Sk) how far a key lies after the row's position; far for another sequence's
    sequence: torch.Tensor | None  # (Sq) of each row, if packed
    factor: torch.Tensor | None  # (B, H, Sq, Sk) of each probability, with dropout: 0 or 1 / (1 - dropout_p)

    def thin(self, x: torch.Tensor) -> torch.Tensor:
        """What dropout leaves of x (B, H, Sq, Sk)."""
        return x if self.factor is None else x * self.factor


def weights(options: Options, q, k, sinks, bias, mask, alibi_slopes, cu_q, cu_k, seed) -> Weights:
    left, right, softcap, scale, dropout_p = options
    keys = wide(k, q.shape[1])
    scores = capped = q.to(keys.dtype) @ keys.transpose(-1, -2) * scale
    if softcap > 0:
        scores = capped = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    sequence, row, key, away = positions(q.shape[2], k.shape[2], cu_q, cu_k, q.device)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(keys.dtype)
        if slopes.dim() == 2 and sequence is not None:
            slopes = slopes[sequence].T[:, :, None]
        else:
            slopes = slopes[..., None, None]
        scores = scores - slopes * away.abs()
    seen = away.abs() < OTHER_SEQUENCE
    if left >= 0:
        seen = seen & (away >= -left)
    if right >= 0:
        seen = seen & (away <= right)
    if mask is not None:
        seen = seen & mask
    sink = scores.new_full((1, 1, 1, 1), -math.inf) if sinks is None else sinks.to(keys.dtype)[:, None, None]
    scores = torch.cat((scores.masked_fill(~seen, -math.inf), sink.expand(*scores.shape[:3], 1)), -1)
    top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    p = torch.exp(scores - top)
    total = p.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    lse = (top + total.log()).masked_fill(nothing, -math.inf).squeeze(-1)
    p = p / total
    factor = None
    if dropout_p > 0:
        b = torch.arange(q.shape[0], device=q.device)[:, None] if sequence is None else sequence[None]
        factor = _dropout.kept(seed, dropout_p, b, q.shape[1], row, key).to(p.dtype) / (1 - dropout_p)
    return Weights(p[..., :-1], p[..., -1], lse, capped, away, sequence, factor)


def wide(x: torch.Tensor, heads: int) -> torch.Tensor:
    """In the dtype of the sums, with every head repeated for its group."""
    x = x if x.dtype == torch.float64 else x.float()
    return x.repeat_interleave(heads // max(x.shape[1], 1), 1)


def positions(rows: int, keys: int, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None, device: torch.device):
    """(sequence of each row, or None; each row's and each key's number in its sequence; how far each key lies after
    each row's position, (rows, keys))."""
    i, j = torch.arange(rows, device=device), torch.arange(keys, device=device)
    if cu_q is None or cu_k is None:
        return None, i, j, j - (i[:, None] + keys - rows)
    if not torch.compiler.is_compiling():
        for name, cu, total in (("cu_seqlens_q", cu_q, rows), ("cu_seqlens_k", cu_k, keys)):
            if len(cu) == 0 or cu[0] != 0 or cu[-1] != total or bool((cu.diff() < 0).any()):
                raise ValueError(f"{name}: must rise from 0 to {total}, not {cu.tolist()}")
    sequence_i, sequence_j = (torch.bucketize(x, cu, right=True) - 1 for x, cu in ((i, cu_q), (j, cu_k)))
    own = i + (cu_k[1:].long() - cu_q[1:].long())[sequence_i]
    row, key = i - cu_q.long()[sequence_i], j - cu_k.long()[sequence_j]
    same = sequence_i[:, None] == sequence_j
    return sequence_i, row, key, torch.where(same, j - own[:, None], OTHER_SEQUENCE)


def gradients(options: Options, d_out, d_lse, q, k, v, sinks, bias, mask, slopes, cu_q, cu_k, seed) -> tuple:
    """The gradients with respect to q, k, v, ... seed, None for what has none: themselves differentiable."""
    heads, group_of = q.shape[1], (*k.shape[:2], q.shape[1] // max(k.shape[1], 1), k.shape[2])
    w = weights(options, q, k, sinks, bias, mask, slopes, cu_q, cu_k, seed)
    d_out, d_lse = d_out.to(w.p.dtype), d_lse.masked_fill(w.lse == -math.inf, 0.0)
    d_p = w.thin(d_out @ wide(v, heads).transpose(-1, -2))
    inner = d_lse - (w.p * d_p).sum(-1)
    d_s = w.p * (d_p + inner[..., None])
    d_sinks = None if sinks is None else (w.p_sink * inner).sum((0, 2)).to(sinks.dtype)
    d_bias = None if bias is None else d_s.sum_to_size(bias.shape).to(bias.dtype)
    d_slopes = None
    if slopes is not None:
        each = -(d_s * w.away.abs()).sum(-1)  # (B, H, Sq)
        if slopes.dim() == 2 and w.sequence is not None:
            d_slopes = torch.zeros_like(slopes, dtype=each.dtype).index_add(0, w.sequence, each[0].T)
        else:
            d_slopes = each.sum(-1).sum_to_size(slopes.shape)
        d_slopes = d_slopes.to(slopes.dtype)
    _, _, softcap, scale, _ = options
    if softcap > 0:
        d_s = d_s * (1 - (w.capped / softcap).square())
    d_s = d_s * scale
    d_q = d_s @ wide(k, heads)
    d_k = (d_s.transpose(-1, -2) @ q.to(d_s.dtype)).view(*group_of, k.shape[3]).sum(2)
    d_v = (w.thin(w.p).transpose(-1, -2) @ d_out).view(*group_of, v.shape[3]).sum(2)
    d_qkv = d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)
    return *d_qkv, d_sinks, d_bias, None, d_slopes, None, None, None
