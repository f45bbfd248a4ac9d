"""Paged caches with known keys and values, for the tests of what works on them."""

import itertools

import torch

from pyarch.ops._paged_formulas import quantized_heads


def paged(lens, page_size, kv_heads, head_dim, dtype=torch.float32, device="cpu", spare=3):
    """Shuffled pages that hold the sequences' keys and values, NaN in every other slot, and garbage past the tables'
    used entries: (k_cache, v_cache, block_table, seq_lens), and the keys and values as they were."""
    counts = [-(-n // page_size) for n in lens]
    order = torch.randperm(sum(counts) + spare).tolist()
    shape = (len(order), page_size, kv_heads, head_dim)
    k_cache, v_cache = (torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2))
    table = torch.full((len(lens), max(counts, default=0) + 2), -(2**31), dtype=torch.int32)
    dense = []
    for b, n in enumerate(lens):
        k, v = (torch.randn(n, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2))
        for i in range(counts[b]):
            page = order.pop()
            table[b, i] = page
            part = slice(i * page_size, min(n, (i + 1) * page_size))
            k_cache[page, : part.stop - part.start], v_cache[page, : part.stop - part.start] = k[part], v[part]
        dense.append((k, v))
    return (k_cache, v_cache, table.to(device), torch.tensor(lens, dtype=torch.int32, device=device)), dense


def rounded(arguments):
    """The same in int8 caches, garbage in the codes of slots without a token: (arguments, the scales' options)."""
    (k, k_scale), (v, v_scale) = map(quantized_heads, arguments[:2])
    for codes, scales in ((k, k_scale), (v, v_scale)):
        codes[scales.isnan()] = 77
    return (k, v, *arguments[2:]), {"k_scale": k_scale, "v_scale": v_scale}


def starts(rows, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32, device=device)


def repaged(dense, page_size):
    """The same keys and values in pages of another size."""
    arguments, _ = paged([len(k) for k, _ in dense], page_size, *dense[0][0].shape[1:], dense[0][0].dtype)
    for table, (k, v) in zip(arguments[2], dense, strict=True):
        for i in range(len(k)):
            page = table[i // page_size]
            arguments[0][page, i % page_size], arguments[1][page, i % page_size] = k[i], v[i]
    return arguments
