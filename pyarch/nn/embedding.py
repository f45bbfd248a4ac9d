"""Token embeddings: torch's, and one whose table stays quantised."""

from __future__ import annotations

import torch

from ..quantized import PackedTensor, QuantizedTensor
from ._quantized import QuantizedModule


class Embedding(torch.nn.Embedding):
    """torch.nn.Embedding, with the dtype of its rows."""

    def reset_parameters(self) -> None:
        """As torch's, but for the meta device: nothing is there to fill, and torch would import its compiler for it."""
        if not self.weight.is_meta:
            super().reset_parameters()

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype


class QuantizedEmbedding(QuantizedModule):
    """Rows of a quantised weight [num_embeddings, embedding_dim]; only the rows asked for are dequantised.

    forward(ids): int64 (...) in [0, num_embeddings) -> (..., embedding_dim) in `dtype`, which `.to(dtype)` changes.
    Raises IndexError for an id out of range.
    """

    def __init__(self, weight: QuantizedTensor | PackedTensor, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(weight)
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=weight.device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self.get_buffer("_like").dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight.rows(ids.reshape(-1)).dequantize(self.dtype).view(*ids.shape, self.in_features)
