"""Call overhead: every op on tensors so small that the call itself is what is measured, beside eager torch's."""

import torch
import torch.nn.functional as F

import pyarch

from ._contest import Entry, contest


def _norm():
    x, w = torch.randn(1, 64), torch.ones(64)
    return Entry(lambda: pyarch.rms_norm(x, w), {"F.rms_norm": lambda: F.rms_norm(x, (64,), w, 1e-6)})


def _matmul(act_bits=None):
    x, w = torch.randn(1, 64), torch.randn(64, 64)
    q = pyarch.quantize(w, group_size=32)
    return Entry(lambda: pyarch.quant_matmul(x, q, act_bits=act_bits), {"F.linear": lambda: F.linear(x, w)})


def _flash():
    q = torch.randn(1, 2, 4, 64)
    return Entry(lambda: pyarch.flash_attention(q, q, q),
                 {"SDPA": lambda: F.scaled_dot_product_attention(q, q, q)})  # fmt: skip


def _caches():
    return torch.zeros(2, 4, 16, 2, 64), torch.tensor([3])


def _append():
    (k_cache, v_cache), slot = _caches()
    k = torch.randn(1, 2, 64)
    rows = k_cache.view(-1, 2, 64), v_cache.view(-1, 2, 64)
    return Entry(lambda: pyarch.kv_append(k, k, k_cache, v_cache, slot),
                 {"index_copy_": lambda: [r.index_copy_(0, slot, k) for r in rows]})  # fmt: skip


def _paged():
    (k_cache, v_cache), _ = _caches()
    q, table, lens = torch.randn(1, 2, 64), torch.tensor([[1]], dtype=torch.int32), torch.tensor([9], dtype=torch.int32)

    def gathered():
        k, v = (c[table].flatten(1, 2)[:, :9].transpose(1, 2) for c in (k_cache, v_cache))
        return F.scaled_dot_product_attention(q[:, :, None], k, v)

    return Entry(lambda: pyarch.paged_attention(q, k_cache, v_cache, table, lens), {"gather and SDPA": gathered})


def _rotary():
    (k_cache, v_cache), slot = _caches()
    qkv, cos, sin, at = torch.randn(1, 6 * 64), torch.randn(8, 32), torch.randn(8, 32), torch.tensor([2])
    rows = k_cache.view(-1, 2, 64), v_cache.view(-1, 2, 64)

    def eager():
        q, k, v = qkv.view(1, 3, 2, 64).unbind(1)
        c, s = cos[at][:, None], sin[at][:, None]
        turned = []
        for x in (q, k):
            a, b = x.chunk(2, -1)
            turned.append(torch.cat((a * c - b * s, b * c + a * s), -1))
        rows[0].index_copy_(0, slot, turned[1])
        rows[1].index_copy_(0, slot, v)
        return turned[0]

    return Entry(lambda: pyarch.rotary_append(qkv, cos, sin, at, k_cache, v_cache, slot, num_heads=2, num_kv_heads=2),
                 {"eager rotation and index_copy_": eager})  # fmt: skip


def _swiglu():
    x = torch.randn(1, 128)
    return Entry(lambda: pyarch.swiglu(x), {"F.silu(a) * b": lambda: F.silu(x[:, :64]) * x[:, 64:]})


def _sample():
    x = torch.randn(1, 64)
    return Entry(lambda: pyarch.sample(x), {"softmax, multinomial": lambda: torch.multinomial(x.softmax(-1), 1)})


CALLS = {
    "rms_norm": _norm, "quant_matmul": _matmul, "quant_matmul-int8": lambda: _matmul(8), "flash_attention": _flash,
    "kv_append": _append, "paged_attention": _paged, "rotary_append": _rotary, "swiglu": _swiglu, "sample": _sample,
}  # fmt: skip


@contest("an op on tiny tensors (call overhead)", cases=CALLS, at_most_us=5.0, seconds=1.0)
def bench_overhead(call):
    return call()
