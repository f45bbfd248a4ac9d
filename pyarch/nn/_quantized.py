"""A module that owns a QuantizedTensor."""

from __future__ import annotations

from dataclasses import fields

import torch

from ..quantized import QuantizedTensor

_TENSORS = ("q", "scale", "zero", "offset", "g_idx")


class QuantizedModule(torch.nn.Module):
    """Holds a QuantizedTensor as buffers: they move between devices and are saved, and no `.to(dtype)` casts them."""

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        if not isinstance(weight, QuantizedTensor):
            raise TypeError(
                f"weight: must be a QuantizedTensor (pyarch.quantize makes one), not {type(weight).__name__}"
            )
        self.out_features, self.in_features = weight.shape
        self.group_size = weight.group_size
        for name in _TENSORS:
            self.register_buffer(name, getattr(weight, name))
        self._weight: QuantizedTensor | None = weight

    @property
    def weight(self) -> QuantizedTensor:
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
            kept = self._weight = QuantizedTensor(**{f.name: getattr(self, f.name) for f in fields(QuantizedTensor)})
        return kept

    def _apply(self, fn, recurse=True):
        # As bytes, which move but are never cast: scales keep the dtype of their source.
        kept = {name: self._buffers.pop(name) for name in _TENSORS}
        try:
            super()._apply(fn, recurse)
            kept = {n: None if t is None else fn(t.view(torch.uint8)).view(t.dtype) for n, t in kept.items()}
        finally:
            self._buffers.update(kept)
            self._weight = None
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._weight = None

    def __getstate__(self):
        return {**self.__dict__, "_weight": None}

    def extra_repr(self) -> str:
        return repr(self.weight)
