"""What bench/gpu.py measures: peers alone, and ours against them.

A case is a function of (device, small) that makes its tensors and returns an Entry. `small` shrinks every size, for a
dry run on a CPU, which proves the script and measures nothing. Contenders take the number of a copy of their inputs:
there are enough copies that no call finds its inputs in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyarch
from pyarch.ops.quant_matmul import bytes_moved
from pyarch.quantized import QuantizedTensor

from ._gpu_peers import INT4

PAST_CACHE = 256 << 20  # bytes: five times the L2 of an H100
Call = Callable[[int], object]


@dataclass(frozen=True)
class Entry:
    """What one case compares: calls by contender, the copies they rotate among, what the work needs at least."""

    calls: Mapping[str, Call]
    copies: int
    flops: float = 0
    moved: float = 0  # bytes


@dataclass(frozen=True)
class Case:
    part: str
    work: str
    name: str
    make: Callable[[torch.device, bool], Entry]


def copies_of(nbytes: float) -> int:
    return max(2, min(64, -(-PAST_CACHE // max(int(nbytes), 1))))


def randn(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)


# ---- ceilings


def copy_bandwidth(device: torch.device, small: bool) -> Entry:
    n = 1 << (16 if small else 30)
    source, target = (torch.empty(n, dtype=torch.uint8, device=device) for _ in range(2))
    source.random_()
    return Entry({"torch copy_": lambda _: target.copy_(source)}, copies=1, moved=2 * n)


def matmul_ceiling(dtype: torch.dtype) -> Callable[[torch.device, bool], Entry]:
    def make(device: torch.device, small: bool) -> Entry:
        n = 64 if small else 8192
        a, b = (randn(n, n, device=device, dtype=dtype) for _ in range(2))
        return Entry({"torch matmul": lambda _: a @ b}, copies=1, flops=2 * n**3)

    return make


# ---- peers, of attention also against ours


def sdpa_backends(device: torch.device) -> tuple[SDPBackend, ...]:
    able = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    return able if device.type == "cuda" else able[:1]


def sdpa(b: int, h: int, s: int, d: int, causal: bool, against: bool = False) -> Callable[[torch.device, bool], Entry]:
    def make(device: torch.device, small: bool) -> Entry:
        length = 64 if small else s
        q, k, v = (randn(b, h, length, d, device=device) for _ in range(3))

        def call(backend: SDPBackend) -> Call:
            def run(_: int) -> torch.Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

            return run

        calls = {f"SDPA {one.name.lower()}": call(one) for one in sdpa_backends(device)}
        if against:
            ours = "triton" if device.type == "cuda" else "auto"
            calls[f"pyarch {ours}"] = lambda _: pyarch.flash_attention(q, k, v, causal=causal, backend=ours)
        return Entry(calls, copies=1, flops=4 * b * h * length**2 * d / (2 if causal else 1))

    return make


def cudnn_convolution(n: int, c: int, size: int, k: int, kernel: int, stride: int) -> Callable:
    def make(device: torch.device, small: bool) -> Entry:
        batch, side = (1, 8) if small else (n, size)
        x = randn(batch, c, side, side, device=device, dtype=torch.float16)
        w = randn(k, c, kernel, kernel, device=device, dtype=torch.float16)
        xl, wl = (t.to(memory_format=torch.channels_last) for t in (x, w))
        out = -(-side // stride)
        return Entry(
            {
                "cudnn channels_last": lambda _: F.conv2d(xl, wl, None, stride, kernel // 2),
                "cudnn contiguous": lambda _: F.conv2d(x, w, None, stride, kernel // 2),
            },
            copies=1,
            flops=2 * batch * k * c * kernel**2 * out**2,
        )

    return make


def cudnn_lstm(batch: int, steps: int, size: int, layers: int) -> Callable:
    def make(device: torch.device, small: bool) -> Entry:
        time, width = (3, 16) if small else (steps, size)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        net = torch.nn.LSTM(width, width, layers).to(device, dtype)
        x = randn(time, batch, width, device=device, dtype=dtype)
        return Entry({"cudnn LSTM": lambda _: net(x)[0]}, copies=1, flops=16 * batch * time * layers * width**2)

    return make


# ---- ours against peers


def attention_gradient(b: int, h: int, s: int, d: int, causal: bool) -> Callable[[torch.device, bool], Entry]:
    """Gradients of q, k and v alone: the forward has run."""

    def make(device: torch.device, small: bool) -> Entry:
        length = 32 if small else s
        inputs = [randn(b, h, length, d, device=device).requires_grad_() for _ in range(3)]
        weight = randn(b, h, length, d, device=device)

        def call(forward: Callable[..., torch.Tensor]) -> Call:
            with torch.enable_grad():
                out = forward(*inputs)
            return lambda _: torch.autograd.grad(out, inputs, weight, retain_graph=True)

        def theirs(backend: SDPBackend) -> Callable[..., torch.Tensor]:
            def forward(*qkv: torch.Tensor) -> torch.Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(*qkv, is_causal=causal)

            return forward

        ours = "triton" if device.type == "cuda" else "auto"
        calls = {f"pyarch {ours}": call(lambda *qkv: pyarch.flash_attention(*qkv, causal=causal, backend=ours))}
        calls |= {f"SDPA {one.name.lower()}": call(theirs(one)) for one in sdpa_backends(device)}
        return Entry(calls, copies=1, flops=10 * b * h * length**2 * d / (2 if causal else 1))

    return make


def attention_feature(feature: str) -> Callable[[torch.device, bool], Entry]:
    """A feature against the same number of tiles without it: what the feature itself costs."""

    def make(device: torch.device, small: bool) -> Entry:
        h, s, d, window = (1, 32, 16, 16) if small else (16, 8192, 128, 1024)
        q, k, v = (randn(1, h, s, d, device=device) for _ in range(3))
        ours = "triton" if device.type == "cuda" else "auto"
        attend = functools.partial(pyarch.flash_attention, backend=ours)
        if feature == "window":  # as many keys a row as the dense call has
            short_k, short_v = (x[:, :, :window].contiguous() for x in (k, v))
            with_it = lambda _: attend(q, k, v, window=(window - 1, 0))
            without = lambda _: attend(q, short_k, short_v)
            flops = 4.0 * h * s * window * d
        elif feature == "sinks":
            sinks = torch.randn(h, device=device)
            with_it, without = (lambda _: attend(q, k, v, sinks=sinks)), lambda _: attend(q, k, v)
            flops = 4.0 * h * s * s * d
        elif feature == "dropout":
            seed = torch.zeros(1, dtype=torch.int64, device=device)
            with_it, without = (lambda _: attend(q, k, v, dropout_p=0.1, seed=seed)), lambda _: attend(q, k, v)
            flops = 4.0 * h * s * s * d
        else:  # eight sequences, packed or as a batch
            cu = torch.arange(0, s + 1, s // 8, dtype=torch.int32, device=device)
            batch = [x.view(h, 8, s // 8, d).transpose(0, 1).contiguous() for x in (q, k, v)]
            with_it = lambda _: attend(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
            without = lambda _: attend(*batch)
            flops = 4.0 * h * s * s // 8 * d
        return Entry({f"pyarch {ours} {feature}": with_it, "dense": without}, copies=1, flops=flops)

    return make


def quantised(n: int, k: int, group: int, device: torch.device, bits: int = 4) -> QuantizedTensor:
    dtype, low, high = (torch.uint8, 0, 256) if bits == 4 else (torch.int8, -127, 128)
    q = torch.randint(low, high, (n, k * bits // 8), dtype=dtype, device=device)
    groups = 1 if group == -1 else k // group
    return QuantizedTensor(q, torch.rand(n, groups, device=device).to(torch.bfloat16) / 64, k, group)


def int4_matmul(m: int, n: int, k: int, group: int) -> Callable[[torch.device, bool], Entry]:
    def make(device: torch.device, small: bool) -> Entry:
        rows, columns = (32, 256) if small else (n, k)
        x = randn(m, columns, device=device)
        moved = bytes_moved(dict(n=rows, k=columns, group_size=group), 4) + 2 * m * (rows + columns)
        copies = copies_of(moved)
        weights = [quantised(rows, columns, group, device) for _ in range(copies)]
        dense = [randn(rows, columns, device=device) for _ in range(copies_of(2 * rows * columns))]
        ours = "triton" if device.type == "cuda" else "auto"
        calls: dict[str, Call] = {f"pyarch {ours}": lambda i: pyarch.quant_matmul(x, weights[i], backend=ours)}
        if device.type == "cuda" and m <= 64:
            packed = [w.prepack() for w in weights]
            calls["pyarch cuda"] = lambda i: pyarch.quant_matmul(x, packed[i], backend="cuda")
        for name, peer in INT4.items():
            # Made when first called, so that a library that is not here, or cannot, fails as that contender.
            of = functools.cache(lambda i, peer=peer: peer(weights[i]))
            calls[name] = lambda i, of=of: of(i)(x)
        calls["torch F.linear, bf16 weights"] = lambda i: F.linear(x, dense[i % len(dense)])
        return Entry(calls, copies, flops=2 * m * rows * columns, moved=moved)

    return make


def w8a8_matmul(m: int, n: int, k: int) -> Callable[[torch.device, bool], Entry]:
    """int8 weights and activations that the call rounds itself, a scale for each row of both."""

    def make(device: torch.device, small: bool) -> Entry:
        rows, columns, batch = (32, 64, 8) if small else (n, k, m)
        x, w = randn(batch, columns, device=device), quantised(rows, columns, -1, device, 8)
        dense = randn(rows, columns, device=device)
        ours = "triton" if device.type == "cuda" else "auto"
        calls = {
            f"pyarch {ours}": lambda _: pyarch.quant_matmul(x, w, act_bits=8, backend=ours),
            "torch F.linear, bf16 weights": lambda _: F.linear(x, dense),
        }
        return Entry(calls, copies=1, flops=2 * batch * rows * columns)

    return make


def kv_append(tokens: int, heads: int, dim: int) -> Callable[[torch.device, bool], Entry]:
    def make(device: torch.device, small: bool) -> Entry:
        page_size, pages = 16, 8 if small else max(4096, tokens // 4)
        count = min(tokens, pages * page_size)
        k, v = (randn(count, heads, dim, device=device) for _ in range(2))
        caches = [randn(pages, page_size, heads, dim, device=device) for _ in range(2)]
        flat = [cache.view(-1, heads, dim) for cache in caches]
        slots = torch.randperm(pages * page_size, device=device)[:count]
        ours = "cuda" if device.type == "cuda" else "auto"

        def index_copy(_: int) -> None:
            flat[0].index_copy_(0, slots, k)
            flat[1].index_copy_(0, slots, v)

        return Entry(
            {
                f"pyarch {ours}": lambda _: pyarch.kv_append(k, v, *caches, slots, backend=ours),
                "torch index_copy_, twice": index_copy,
            },
            copies=1,
            moved=8.0 * count * heads * dim,
        )

    return make


def paged_decode(batch: int, length: int, heads: int, kv_heads: int, int8: bool = False) -> Callable:
    """One row a sequence against pages of 16 in shuffled order: bf16, with contiguous keys and values as the peer's, or
    int8 against our bf16."""

    def make(device: torch.device, small: bool) -> Entry:
        count, dim = (2, 64) if small else (batch, 128)
        pages = (40 if small else length) // 16  # a sequence
        elements = 2 * count * pages * 16 * kv_heads * dim
        copies = copies_of(2 * elements)
        caches = [randn(2, count * pages, 16, kv_heads, dim, device=device) for _ in range(copies)]
        tables = [torch.randperm(count * pages, device=device).int().view(count, pages) for _ in range(copies)]
        lens = torch.full((count,), pages * 16, dtype=torch.int32, device=device)
        q = randn(count, heads, dim, device=device)
        ours = "cuda" if device.type == "cuda" else "auto"
        attend = functools.partial(pyarch.paged_attention, backend=ours)
        paged = lambda i: attend(q, *caches[i], tables[i], lens)

        def dense(i: int) -> torch.Tensor:
            k, v = caches[i].view(2, count, pages * 16, kv_heads, dim).transpose(2, 3)
            return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

        flops = 4.0 * count * heads * pages * 16 * dim
        if not int8:
            calls = {f"pyarch {ours}": paged, "torch SDPA, contiguous": dense}
            if device.type == "cuda":
                other = functools.partial(pyarch.paged_attention, backend="triton")
                calls["pyarch triton"] = lambda i: other(q, *caches[i], tables[i], lens)
            return Entry(calls, copies, flops, 2.0 * elements)
        codes = [torch.randint(-127, 128, cache.shape, dtype=torch.int8, device=device) for cache in caches]
        scales = [torch.rand(cache.shape[:-1], device=device) / 64 for cache in caches]

        def rounded(i: int) -> torch.Tensor:
            return attend(q, *codes[i], tables[i], lens, k_scale=scales[i][0], v_scale=scales[i][1])

        return Entry({f"pyarch {ours} int8": rounded, "our bf16": paged}, copies, flops, elements * (1 + 4 / dim))

    return make


def paged_prompt(batch: int, rows: int, length: int) -> Callable[[torch.device, bool], Entry]:
    """New rows of each sequence, causal, against bf16 pages of 16; the peers have contiguous keys and values."""

    def make(device: torch.device, small: bool) -> Entry:
        heads, kv_heads, dim = (4, 2, 64) if small else (32, 8, 128)
        count, new, old = (2, 16, 32) if small else (batch, rows, length)
        caches = randn(2, count * old // 16, 16, kv_heads, dim, device=device)
        table = torch.randperm(count * old // 16, device=device).int().view(count, old // 16)
        lens = torch.full((count,), old, dtype=torch.int32, device=device)
        starts = torch.arange(0, count * new + 1, new, dtype=torch.int32, device=device)
        q = randn(count * new, heads, dim, device=device)
        k, v = caches.view(2, count, old, kv_heads, dim).transpose(2, 3).contiguous()
        batched = q.view(count, new, heads, dim).transpose(1, 2).contiguous()
        seen = torch.ones(new, old, dtype=torch.bool, device=device).tril(old - new)
        ours = "triton" if device.type == "cuda" else "auto"
        calls = {
            f"pyarch {ours}": lambda _: pyarch.paged_attention(
                q, *caches, table, lens, cu_seqlens_q=starts, backend=ours
            ),
            "our flash_attention, contiguous": lambda _: pyarch.flash_attention(
                batched, k, v, causal=True, backend=ours
            ),
            "torch SDPA, contiguous": lambda _: F.scaled_dot_product_attention(
                batched, k, v, attn_mask=seen, enable_gqa=True
            ),
        }
        return Entry(calls, copies=1, flops=4.0 * count * heads * dim * (new * (old - new) + new * (new + 1) / 2))

    return make


def cases() -> Iterator[Case]:
    """In the order in which they are worth having."""
    yield Case("peers", "ceiling", "copy", copy_bandwidth)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield Case("peers", "ceiling", f"matmul {dtype}".replace("torch.", ""), matmul_ceiling(dtype))
    for b, h, s, d in ((4, 16, 512, 64), (4, 16, 2048, 128), (2, 16, 8192, 128), (1, 32, 16384, 64)):
        for causal in (False, True):
            yield Case("peers", "attention", f"B{b} H{h} S{s} D{d}{' causal' * causal}", sdpa(b, h, s, d, causal))
    for shape in ((64, 64, 56, 64, 3, 1), (64, 256, 14, 256, 3, 1), (64, 512, 7, 2048, 1, 1), (64, 128, 56, 128, 3, 2)):
        label = "N{} C{} {}px K{} {}x{} stride {}".format(*shape[:5], shape[4], shape[5])
        yield Case("peers", "conv2d", label, cudnn_convolution(*shape))
    for shape in ((1, 256, 512, 2), (64, 256, 512, 2), (64, 128, 1024, 1)):
        yield Case("peers", "lstm", "B{} T{} H{} L{}".format(*shape), cudnn_lstm(*shape))
    for b, h, s, d in ((4, 16, 512, 64), (4, 16, 1024, 128), (4, 16, 2048, 64), (2, 16, 8192, 128), (1, 32, 16384, 64)):
        for causal in (False, True):
            label = f"B{b} H{h} S{s} D{d}{' causal' * causal}"
            yield Case("bench", "flash_attention", label, sdpa(b, h, s, d, causal, against=True))
    for b, h, s, d in ((4, 16, 2048, 128), (2, 16, 8192, 128), (4, 16, 2048, 64)):
        for causal in (False, True):
            label = f"B{b} H{h} S{s} D{d}{' causal' * causal}"
            yield Case("bench", "flash_attention gradient", label, attention_gradient(b, h, s, d, causal))
    for feature in ("window", "sinks", "dropout", "varlen"):
        yield Case("bench", "flash_attention feature", feature, attention_feature(feature))
    for n, k in ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)):  # the layers of Llama-3-8B
        for m in (1, 4, 16, 64, 256, 1024, 4096):
            yield Case("bench", "quant_matmul int4 g128", f"M{m} N{n} K{k}", int4_matmul(m, n, k, 128))
    for n, k in ((8192, 8192), (16384, 16384)):
        yield Case("bench", "quant_matmul int4 g128", f"M1 N{n} K{k}", int4_matmul(1, n, k, 128))
    for m in (1, 16, 256):
        yield Case("bench", "quant_matmul int4 g32", f"M{m} N4096 K4096", int4_matmul(m, 4096, 4096, 32))
    for m, n, k in ((1024, 4096, 4096), (4096, 4096, 4096), (4096, 14336, 4096)):
        yield Case("bench", "quant_matmul W8A8", f"M{m} N{n} K{k}", w8a8_matmul(m, n, k))
    for tokens, heads in ((1, 8), (64, 8), (8192, 8), (8192, 32)):
        yield Case("bench", "paged_kv append", f"T{tokens} H{heads} D128", kv_append(tokens, heads, 128))
    for shape in ((1, 4096, 32, 8), (16, 4096, 32, 8), (64, 2048, 32, 8), (1, 65536, 32, 8), (16, 2048, 32, 32)):
        yield Case("bench", "paged_kv decode", "B{} KV{} H{}/{} D128".format(*shape), paged_decode(*shape))
        if shape != (1, 4096, 32, 8):
            label = "B{} KV{} H{}/{} D128".format(*shape)
            yield Case("bench", "paged_kv decode int8", label, paged_decode(*shape, int8=True))
    for shape in ((1, 2048, 2048), (1, 512, 8192), (8, 256, 2048)):
        yield Case("bench", "paged_kv prompt", "B{} rows {} KV{} H32/8 D128".format(*shape), paged_prompt(*shape))
