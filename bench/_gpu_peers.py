"""Other libraries' int4 matmul on our quantised weights: torch's own, and gemlite and humming-kernels where installed.

Each takes a symmetric QuantizedTensor and returns a function of x. Of a library that is not there, or does not run, the
record keeps the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from pyarch.quantized import QuantizedTensor

Linear = Callable[[torch.Tensor], torch.Tensor]


def tinygemm(w: QuantizedTensor) -> Linear:
    scales_and_zeros = torch.stack((w.scale, torch.zeros_like(w.scale)), -1).transpose(0, 1).contiguous()
    if w.device.type == "cuda":
        swapped = w.q << 4 | w.q >> 4  # it keeps the even column in the high nibble
        packed = torch.ops.aten._convert_weight_to_int4pack(swapped, 8)
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, w.group_size, scales_and_zeros)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(w.codes().int(), 1)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, w.group_size, scales_and_zeros)


def gemlite(w: QuantizedTensor) -> Linear:
    from gemlite.helper import A16W4_HQQ_INT

    layer = A16W4_HQQ_INT(device=w.device, dtype=w.scale.dtype)
    return layer.from_weights(w.codes().to(torch.uint8), w.scale, torch.full_like(w.scale, 8))


def humming(w: QuantizedTensor) -> Linear:
    from humming.layer import HummingLayer

    weight = {"dtype": "uint4", "group_size": w.group_size}
    layer = HummingLayer(w.out_features, w.in_features, weight, torch_dtype=w.scale.dtype).to(w.device)
    layer.load_from_unquantized(w.dequantize(w.scale.dtype))
    layer.transform()
    return layer


INT4: Mapping[str, Callable[[QuantizedTensor], Linear]] = {
    "torch _weight_int4pack_mm": tinygemm,
    "gemlite": gemlite,
    "humming": humming,
}
