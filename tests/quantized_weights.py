"""Random quantised weights in every format, for the tests of what reads them."""

from types import SimpleNamespace

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


def llama_file(**options):
    """A Llama of one layer as a GGUF file that is open (pyarch.io.gguf.GGUF), quantised but for its norms; options:
    `weight`'s."""
    metadata = {"general.architecture": "llama", "llama.context_length": 64, "llama.block_count": 1,
                "llama.embedding_length": 128, "llama.feed_forward_length": 256, "llama.attention.head_count": 4,
                "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5}  # fmt: skip
    shapes = {"attn_q": (128, 128), "attn_k": (64, 128), "attn_v": (64, 128), "attn_output": (128, 128),
              "ffn_gate": (256, 128), "ffn_up": (256, 128), "ffn_down": (128, 256)}  # fmt: skip
    tensors = {f"blk.0.{name}.weight": weight(*shape, **options) for name, shape in shapes.items()}
    tensors["token_embd.weight"] = weight(48, 128, **options)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        tensors[f"{name}.weight"] = torch.linspace(0.5, 1.5, 128)
    return SimpleNamespace(metadata=metadata, infos=tensors, tensors=tensors)
