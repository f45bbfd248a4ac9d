"""Random quantised weights in every format, for the tests of what reads them."""

import torch

from pyarch.quantized import QuantizedTensor, pack_int4

FORMATS = ("symmetric", "zero", "float zero", "offset")


def weight(n, k, *, bits=4, group_size=32, kind="symmetric", scale_dtype=torch.float32, act_order=False, device="cpu"):
    """Random codes over their whole range, with scales that keep outputs near 1."""
    groups = 1 if group_size == -1 else -(-k // group_size)
    low, high = (0, 16) if bits == 4 else (-128, 128)
    codes = torch.randint(low, high, (n, k), device=device)
    q = pack_int4(codes) if bits == 4 else codes.to(torch.int8)
    scale = ((torch.rand(n, groups, device=device) + 0.5) / (high - low)).to(scale_dtype)
    zero = offset = g_idx = None
    if kind == "zero":
        zero = torch.randint(low, high, (n, groups), device=device).to(torch.uint8 if bits == 4 else torch.int16)
    elif kind == "float zero":
        zero = (low + (high - low) * torch.rand(n, groups, device=device)).to(scale_dtype)
    elif kind == "offset":
        offset = (torch.randn(n, groups, device=device) / 16).to(scale_dtype)
    if act_order:
        g_idx = (torch.randperm(k, device=device) % max(groups, 1)).int()
    return QuantizedTensor(q, scale, k, group_size, zero, offset, g_idx)
