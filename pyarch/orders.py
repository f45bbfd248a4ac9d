"""The orders in which kernels read packed weights (PackedTensor), made from the canonical one (quantized.py).

`panels`, of CPU kernels: 64 rows side by side, four bytes of each in turn:

    q       [ceil(N/64), ceil(K*bits/32), 64, 4], uint8 or int8: four bytes of each of 64 rows, then the next four
    scale   [ceil(N/64), G, 64], zero and offset likewise

`fragments`, of CUDA kernels: tiles of 16 rows and 64 columns, each as the registers of a warp's matrix instructions
(csrc/cuda/quant_matmul_weights.h), so that 16 bytes that lie together are one lane's:

    q       [ceil(N/16), ceil(K/64), 8*bits, 16], uint8 or int8; with lane = 4*g + t and column 16*j + 8*c + 2*t + e,
              4-bit  q[.., .., lane, 4*j + 2*e + c]: row g in the low nibble, row g + 8 in the high one
              8-bit  q[.., .., 32*(j // 2) + lane, 8*(j % 2) + 4*c + 2*e + h]: row g + 8*h
    scale   [ceil(N/16), G, 16], zero and offset likewise

In both, rows beyond N and columns beyond K are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 [N, K] of any integer dtype -> uint8 [N, ceil(K/2)], the even column in the low nibble."""
    codes = codes.to(torch.uint8)
    if codes.shape[1] % 2:
        codes = F.pad(codes, (0, 1))
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack_int4(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """uint8 [N, ceil(K/2)] -> int8 codes 0..15 [N, K]: the inverse of pack_int4."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :in_features].to(torch.int8)


@dataclass(frozen=True)
class Order:
    """An order: what it packs together, and its codes. q is always the canonical [N, ceil(K*bits/8)], index int64."""

    name: str
    device: str  # the type of device whose kernels read it
    rows: int  # that lie together

    def shape(self, n: int, k: int, bits: int) -> tuple[int, int, int, int]:
        """Of packed q."""
        raise NotImplementedError

    def pack(self, q: torch.Tensor, k: int) -> torch.Tensor:
        raise NotImplementedError

    def unpack(self, packed: torch.Tensor, k: int, index: torch.Tensor) -> torch.Tensor:
        """The rows index of q."""
        raise NotImplementedError

    def pack_grid(self, t: torch.Tensor) -> torch.Tensor:
        """[N, G] -> [ceil(N/rows), G, rows]."""
        n, groups = t.shape
        missing = -n % self.rows
        return F.pad(t, (0, 0, 0, missing)).view((n + missing) // self.rows, self.rows, groups).transpose(1, 2)

    def unpack_grid(self, packed: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return packed[index // self.rows, :, index % self.rows]


class _Panels(Order):
    def shape(self, n, k, bits):
        return -(-n // self.rows), -(-k * bits // 32), self.rows, 4

    def pack(self, q, k):
        n, width = q.shape
        dwords = F.pad(q, (0, -width % 4)).view(n, -(-width // 4), 4).view(torch.int32).squeeze(2)
        return self.pack_grid(dwords).unsqueeze(-1).view(q.dtype)

    def unpack(self, packed, k, index):
        width = -(-k // 2) if packed.dtype == torch.uint8 else k
        return packed[index // self.rows, :, index % self.rows].flatten(1)[:, :width].contiguous()


class _Fragments(Order):
    def shape(self, n, k, bits):
        return -(-n // self.rows), -(-k // 64), 8 * bits, 16

    def pack(self, q, k):
        codes = unpack_int4(q, k).view(torch.uint8) if q.dtype == torch.uint8 else q
        codes = F.pad(codes, (0, -k % 64, 0, -q.shape[0] % self.rows))
        n, k = codes.shape
        shape = n // 16, k // 64
        tiles = codes.view(shape[0], 2, 8, shape[1], 2, 2, 2, 4, 2)  # h g | v j c t e, with v*2 + j of 4 operands
        if q.dtype == torch.int8:
            return tiles.permute(0, 3, 4, 2, 7, 5, 6, 8, 1).reshape(*shape, 64, 16)  # v g t j c e h
        low, high = tiles.permute(1, 0, 3, 2, 7, 4, 5, 8, 6).unbind()  # g t v j e c
        return (low | high << 4).reshape(*shape, 32, 16)

    def unpack(self, packed, k, index):
        tile, row = index // self.rows, index % self.rows
        high, g, steps = row // 8, row % 8, packed.shape[1]
        count = index.shape[0]
        every, places = torch.arange(count, device=index.device), (count, steps * 64)
        if packed.dtype == torch.int8:
            lanes = packed[tile].view(count, steps, 2, 8, 4, 2, 2, 2, 2)[every, :, :, g]  # v t j c e h
            one = lanes[every, ..., high]
            return one.permute(0, 1, 2, 4, 5, 3, 6).reshape(places)[:, :k].contiguous()
        lanes = packed[tile].view(count, steps, 8, 4, 2, 2, 2, 2)[every, :, g]  # t v j e c
        one = lanes >> (4 * high).to(torch.uint8).view(count, 1, 1, 1, 1, 1, 1) & 15
        return pack_int4(one.permute(0, 1, 3, 4, 6, 2, 5).reshape(places)[:, :k])


PANELS = _Panels("panels", "cpu", 64)
FRAGMENTS = _Fragments("fragments", "cuda", 16)
ORDERS = {order.name: order for order in (PANELS, FRAGMENTS)}


def of(q: torch.Tensor) -> Order:
    """The order that packed codes of this shape have."""
    return FRAGMENTS if q.shape[-1] == 16 else PANELS
