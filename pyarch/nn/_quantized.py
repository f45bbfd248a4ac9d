"""A module that owns a quantised weight."""

from __future__ import annotations

import torch

from ..ops.quant_matmul import order_for
from ..quantized import TENSORS, PackedTensor, QuantizedTensor
from ._watched import Watched


class QuantizedModule(Watched):
    """Holds a QuantizedTensor as buffers: they move between devices and are saved, and no `.to(dtype)` casts them.

    After `prepack()`, or made from a PackedTensor, it holds the packed form instead, which its device's kernels read
    faster. That is for inference: `train()`, `load_state_dict` and a move to another device bring the canonical form
    back, and state_dict, pickles and copies always have it.
    """

    act_bits: int | None = None

    def __init__(self, weight: QuantizedTensor | PackedTensor) -> None:
        super().__init__()
        if not isinstance(weight, (QuantizedTensor, PackedTensor)):
            raise TypeError(
                f"weight: must be a QuantizedTensor (pyarch.quantize makes one), not {type(weight).__name__}"
            )
        self.out_features, self.in_features = weight.shape
        self.group_size = weight.group_size
        for name in TENSORS:
            self.register_buffer(name, None)
        self._hold(weight)

    def _hold(self, weight: QuantizedTensor | PackedTensor) -> None:
        self._weight: QuantizedTensor | PackedTensor | None = weight
        self._buffers.update((name, getattr(weight, name)) for name in TENSORS)

    @property
    def weight(self) -> QuantizedTensor | PackedTensor:
        """The weight [out_features, in_features]."""
        kept, b = self._weight, self._buffers
        if (
            kept is None
            or kept.q is not b["q"]
            or kept.scale is not b["scale"]
            or kept.zero is not b["zero"]
            or kept.offset is not b["offset"]
            or kept.g_idx is not b["g_idx"]
        ):
            kept = self._weight = self._as_held(*(getattr(self, name) for name in TENSORS))
        return kept

    def _as_held(self, q, scale, zero, offset, g_idx) -> QuantizedTensor | PackedTensor:
        sizes = (self.in_features, self.group_size)
        if q.dim() == 2:
            return QuantizedTensor(q, scale, *sizes, zero, offset, g_idx)
        return PackedTensor(q, scale, self.out_features, *sizes, zero, offset, g_idx)

    def prepack(self, dtype: torch.dtype | None = None) -> None:
        """Holds the weight in the order of its device's kernels (QuantizedTensor.prepack); given the dtype of the
        activations, only if a kernel multiplies these with it: the GPU's takes neither float32 nor every format.

        Raises ValueError in training mode, and without dtype for a weight that is neither on a CPU nor on a GPU.
        """
        weight = self.weight
        if self.training:
            raise ValueError("prepack: is for inference, call eval() first")
        if isinstance(weight, QuantizedTensor):
            order = None if dtype is None else order_for(weight, dtype, act_bits=self.act_bits)
            if order != "canonical":
                self._hold(weight.prepack(order))

    def _canonical(self) -> QuantizedTensor:
        weight = self.weight
        return weight.unpack() if isinstance(weight, PackedTensor) else weight

    def _unpack(self) -> None:
        self._hold(self._canonical())

    def train(self, mode: bool = True):
        if mode:
            self._unpack()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        device = self.weight.device
        if fn(torch.empty(0, dtype=torch.uint8, device=device)).device.type != device.type:
            self._unpack()
        # As bytes, which move but are never cast: scales keep the dtype of their source.
        kept = {name: self._buffers.pop(name) for name in TENSORS}
        try:
            super()._apply(fn, recurse)
            kept = {n: None if t is None else fn(t.view(torch.uint8)).view(t.dtype) for n, t in kept.items()}
        finally:
            self._buffers.update(kept)
            self._weight = None
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        canonical = self._canonical()
        if canonical is not self.weight:
            destination.update((prefix + n, t) for n in TENSORS if (t := getattr(canonical, n)) is not None)

    def _load_from_state_dict(self, *args, **kwargs):
        self._unpack()
        super()._load_from_state_dict(*args, **kwargs)
        self._weight = None

    def __getstate__(self):
        canonical = self._canonical()
        buffers = {**self._buffers, **{name: getattr(canonical, name) for name in TENSORS}}
        return {**self.__dict__, "_weight": None, "_buffers": buffers}

    def extra_repr(self) -> str:
        return repr(self.weight)


def prepack(module: torch.nn.Module, dtype: torch.dtype | None = None) -> None:
    """`QuantizedModule.prepack` for every one of module and below it. Raises ValueError in training mode."""
    for each in module.modules():
        if isinstance(each, QuantizedModule):
            each.prepack(dtype)
