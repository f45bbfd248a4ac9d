"""Paged attention against the best that torch can do on the same pages, and on keys and values that lie together.

On pages torch gathers them first (K[table]) and then runs grouped matmuls or scaled_dot_product_attention; on
contiguous keys and values, head by head, it runs the same two without the gather, while ours still walks its table.
"""

import itertools

import torch
import torch.nn.functional as F

import pyarch
from pyarch.ops.paged_kv import CASES, bytes_moved, flops

from ._contest import PAST_CACHE, Entry, contest

PAGE_SIZE = 16
DECODE = {name: CASES[name] for name in ("gqa-decode", "mha-decode")}
BATCHES = {name: CASES[name] for name in ("gqa-decode-batch8",)}
SMALL = {name: CASES[name] for name in ("smollm2-decode",)}
PROMPTS = {name: CASES[name] for name in ("smollm2-prompt", "gqa-prompt")}


def grouped(q, k, v):
    """q (B, Hkv, G, D), k and v (B, Hkv, S, D): one row a sequence."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return torch.softmax(scores, -1) @ v


def _attention(case: dict, dtype: torch.dtype, contiguous: bool = False) -> Entry:
    batch, rows, kv, heads, kv_heads, dim = (
        case[name] for name in ("batch", "rows", "kv", "heads", "kv_heads", "head_dim")
    )
    pages = -(-kv // PAGE_SIZE)
    moved = bytes_moved(case, dtype)
    copies = -(-PAST_CACHE // moved)
    cache = pyarch.PagedKVCache(copies * batch * pages, PAGE_SIZE, 1, kv_heads, dim, dtype=dtype)
    k, v = cache.k[0].normal_(), cache.v[0].normal_()
    tables = torch.randperm(k.shape[0]).view(copies, batch, pages).int().unbind()
    lens = torch.full((batch,), kv, dtype=torch.int32)
    q = torch.randn(batch * rows, heads, dim).to(dtype)
    cu = torch.arange(0, batch * rows + 1, rows, dtype=torch.int32)
    theirs = q.view(batch, rows, heads, dim).transpose(1, 2).contiguous()
    turn, their_turns = itertools.cycle(tables), [itertools.cycle(tables) for _ in range(2)]

    def gather(table):
        long = table.long()
        return (x[long].flatten(1, 2)[:, :kv].transpose(1, 2) for x in (k, v))

    def sdpa(k, v):
        return F.scaled_dot_product_attention(theirs, k, v, is_causal=rows > 1, enable_gqa=heads != kv_heads)

    def matmul(k, v):
        return grouped(theirs.view(batch, kv_heads, heads // kv_heads, dim), k, v)

    if contiguous:
        dense = [[x.contiguous() for x in gather(table)] for table in tables]
        sources = [itertools.cycle(dense) for _ in range(2)]
        what = "on contiguous KV"
    else:
        sources = [map(gather, turns) for turns in their_turns]
        what = "on gathered pages"
    peers = {f"torch SDPA {what}": lambda: sdpa(*next(sources[0]))}
    if rows == 1:
        peers[f"torch grouped matmul {what}"] = lambda: matmul(*next(sources[1]))
    return Entry(
        lambda: pyarch.paged_attention(q, k, v, next(turn), lens, cu_seqlens_q=cu),
        peers,
        flops=flops(case),
        compute="bf16" if dtype == torch.bfloat16 else "fp32",
        moved=moved,
    )


@contest("paged decode, bf16, on pages", cases=DECODE, goal=15.0)
def bench_decode_bf16(case):
    return _attention(case, torch.bfloat16)


@contest("paged decode, fp32, on pages", cases=DECODE, goal=4.0)
def bench_decode_fp32(case):
    return _attention(case, torch.float32)


@contest("paged decode, bf16, against contiguous KV", cases=DECODE, goal=2.0)
def bench_decode_bf16_contiguous(case):
    return _attention(case, torch.bfloat16, contiguous=True)


@contest("paged decode, fp32, against contiguous KV", cases=DECODE, goal=2.0,
         note="bound by DRAM, whose rate changes here between 46 and 80 GB/s")  # fmt: skip
def bench_decode_fp32_contiguous(case):
    return _attention(case, torch.float32, contiguous=True)


@contest("paged decode, batch of 8, bf16", cases=BATCHES)
def bench_decode_batch(case):
    return _attention(case, torch.bfloat16)


@contest("paged decode, SmolLM2, fp32", cases=SMALL)
def bench_decode_small(case):
    return _attention(case, torch.float32)


@contest("paged prompt, bf16, against contiguous KV", cases=PROMPTS)
def bench_prompt_bf16(case):
    return _attention(case, torch.bfloat16, contiguous=True)


@contest("paged prompt, fp32, against contiguous KV", cases=PROMPTS)
def bench_prompt_fp32(case):
    return _attention(case, torch.float32, contiguous=True)
