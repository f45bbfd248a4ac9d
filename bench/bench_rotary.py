"""rotary_append against the same in eager torch, and in torch.compile'd form."""

import torch

import pyarch
from pyarch.ops.rotary import CASES, bytes_moved

from ._contest import Entry, contest


def _rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _torch(qkv, cos, sin, positions, k_rows, v_rows, slots, heads, kv_heads):
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), 1)
    c, s = cos[positions][:, None].to(qkv.dtype), sin[positions][:, None].to(qkv.dtype)
    k_rows.index_copy_(0, slots, _rotated(k, c, s))
    v_rows.index_copy_(0, slots, v)
    return _rotated(q, c, s)


@contest("rotary embedding and cache append, bf16", cases=CASES, goal=1.0)
def bench_rotary(case):
    tokens, heads, kv_heads, dim = case.values()
    pages = -(-tokens // 16)
    caches = [torch.zeros(pages, 16, kv_heads, dim, dtype=torch.bfloat16) for _ in range(2)]
    rows = [c.view(-1, kv_heads, dim) for c in caches]
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).bfloat16()
    cos, sin = torch.randn(2, 4096, dim // 2).unbind()
    at = torch.arange(tokens)
    compiled = torch.compile(_torch)
    return Entry(
        lambda: pyarch.rotary_append(qkv, cos, sin, at, *caches, at, num_heads=heads, num_kv_heads=kv_heads),
        {
            "torch eager": lambda: _torch(qkv, cos, sin, at, *rows, at, heads, kv_heads),
            "torch.compile": lambda: compiled(qkv, cos, sin, at, *rows, at, heads, kv_heads),
        },
        moved=bytes_moved(case, qkv.dtype),
        memory="l3" if qkv.nbytes < 4 << 20 else "dram",
    )
