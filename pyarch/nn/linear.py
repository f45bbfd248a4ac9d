"""Linear layers: torch's for weights in a float format, pyarch's for quantised ones, and several side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops import quant_matmul
from ..quantized import PackedTensor, QuantizedTensor, concat, quantize, same_format
from ._quantized import QuantizedModule

Weight = torch.Tensor | QuantizedTensor | PackedTensor


class Linear(torch.nn.Linear):
    """torch.nn.Linear itself: float16, bfloat16 and float32 weights take torch's own matmul for now."""


class QuantizedLinear(QuantizedModule):
    """y = x @ weight.T + bias through pyarch.quant_matmul; x (..., in_features) -> (..., out_features).

    weight    QuantizedTensor or PackedTensor, kept as it is; `.to(dtype)` never changes it
    bias      (out_features), x's dtype or float32, or None; a parameter
    act_bits  None, or 8: round activations to int8 inside the matmul (changes answers, see quant_matmul)
    """

    def __init__(self, weight: QuantizedTensor | PackedTensor, bias: torch.Tensor | None = None, *,
                 act_bits: int | None = None) -> None:  # fmt: skip
        super().__init__(weight)
        if act_bits not in (None, 8):
            raise ValueError(f"act_bits: must be None or 8, not {act_bits!r}")
        self.act_bits = act_bits
        self.bias: torch.nn.Parameter | None
        kept = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        self.register_parameter("bias", kept)

    @classmethod
    def from_float(cls, linear: torch.nn.Linear, *, bits: int = 4, group_size: int = 128, symmetric: bool = True,
                   act_bits: int | None = None) -> QuantizedLinear:  # fmt: skip
        """A torch.nn.Linear with its weight rounded by pyarch.quantize."""
        weight = quantize(linear.weight, bits=bits, group_size=group_size, symmetric=symmetric)
        return cls(weight, linear.bias, act_bits=act_bits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quant_matmul(x, self.weight, self.bias, act_bits=self.act_bits)


class ParallelLinear(torch.nn.Module):
    """Linear layers of the same input side by side: their outputs concatenated along the last dimension."""

    def __init__(self, parts: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def linear(weight: Weight, bias: torch.Tensor | None = None, *, act_bits: int | None = None) -> torch.nn.Module:
    """The layer for a weight [N, K]: QuantizedLinear for a quantised one, else Linear sharing the tensor."""
    if not isinstance(weight, torch.Tensor):
        return QuantizedLinear(weight, bias, act_bits=act_bits)
    layer = Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias)
    return layer


def parallel(weights: Sequence[Weight], biases: Sequence[torch.Tensor | None], *,
             act_bits: int | None = None) -> torch.nn.Module:  # fmt: skip
    """One layer for projections of the same input: a single matmul where neighbours have one format (and so one
    file format), else ParallelLinear of as few matmuls as the formats allow.

    biases: one for each weight; where any is given, the missing ones are zeros.
    """
    if any(b is not None for b in biases):
        like = next(b for b in biases if b is not None)
        biases = [like.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    runs: list[tuple[list[Weight], list]] = []
    for weight, bias in zip(weights, biases, strict=True):
        if runs and _stack(runs[-1][0][-1], weight):
            runs[-1][0].append(weight)
            runs[-1][1].append(bias)
        else:
            runs.append(([weight], [bias]))
    layers = [linear(_cat(w), None if b[0] is None else torch.cat(b), act_bits=act_bits) for w, b in runs]
    return layers[0] if len(layers) == 1 else ParallelLinear(layers)


def _stack(a: Weight, b: Weight) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype
    return isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor) and same_format(a, b)


def _cat(weights: Sequence[Weight]) -> Weight:
    if len(weights) == 1:
        return weights[0]
    if isinstance(weights[0], QuantizedTensor):
        return concat([w for w in weights if isinstance(w, QuantizedTensor)])
    return torch.cat([w for w in weights if isinstance(w, torch.Tensor)])
