"""kv_append: the suite, what it refuses, and what it writes."""

import pytest
import torch
from paged_caches import paged, rounded

import pyarch
from pyarch.testing import Refused, Sample, checks, same


def append_samples(dtype, device):
    def sample(name, slots, pages, page_size, heads, dim, layout="plain", int8=False):
        tokens = len(slots)
        k, v = (torch.randn(tokens, heads, dim, dtype=dtype, device=device) for _ in range(2))
        if layout == "plain":
            k_cache, v_cache = (torch.randn(pages, page_size, heads, dim, dtype=dtype, device=device) for _ in range(2))
        elif layout == "interleaved":
            k_cache, v_cache = torch.randn(pages, page_size, 2, heads, dim, dtype=dtype, device=device).unbind(2)
        else:  # heads first
            k_cache, v_cache = (
                torch.randn(pages, heads, page_size, dim, dtype=dtype, device=device).transpose(1, 2) for _ in range(2)
            )
        scales = {}
        if int8:
            (k_cache, v_cache), scales = rounded((k_cache, v_cache))
        return Sample(name, (k, v, k_cache, v_cache, torch.tensor(slots, dtype=torch.int64, device=device)), scales)

    yield sample("one token", [13], 4, 16, 3, 64)
    yield sample("a prompt", list(range(7, 40)), 5, 8, 2, 33)
    yield sample("shuffled", torch.randperm(40).tolist(), 5, 8, 2, 16)
    yield sample("skipped", [3, -1, 0, -1, 6], 2, 4, 2, 8)
    yield sample("all skipped", [-1, -1], 2, 4, 2, 8)
    yield sample("no tokens", [], 2, 4, 2, 8)
    yield sample("page size 1", [4, 2, 0], 5, 1, 1, 1)
    yield sample("heads first", [9, 1, 4], 3, 4, 2, 8, "heads first")
    yield sample("int8", [13, -1, 60], 4, 16, 3, 64, int8=True)
    yield sample("int8, odd sizes", torch.randperm(40)[:33].tolist(), 5, 8, 2, 37, int8=True)
    yield sample("int8, no tokens", [], 2, 4, 2, 8, int8=True)
    yield sample("int8, many tokens", torch.randperm(600)[:400].tolist(), 75, 8, 4, 40, int8=True)
    yield sample("many tokens", torch.randperm(600)[:400].tolist(), 75, 8, 4, 40)


def append_refused():
    k, v = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    k_cache, v_cache = torch.randn(4, 5, 3, 8), torch.randn(4, 5, 3, 8)
    good = dict(k=k, v=v, k_cache=k_cache, v_cache=v_cache, slot_mapping=torch.tensor([3, 17]))

    def case(name, argument, error=ValueError, **changes):
        return Refused(name, error, argument, (), {**good, **changes})

    yield case("heads of k", "k", k=k[:, :2])
    yield case("tokens of v", "v", v=v[:1])
    yield case("dtype of k", "k", TypeError, k=k.half())
    yield case("dtype of v_cache", "v_cache", TypeError, v_cache=v_cache.half())
    yield case("other pages", "v_cache", v_cache=v_cache[:3])
    yield case("expanded cache", "k_cache", k_cache=k_cache[:1].expand(4, 5, 3, 8))
    yield case("int32 slots", "slot_mapping", TypeError, slot_mapping=torch.tensor([3, 17], dtype=torch.int32))
    yield case("one slot too few", "slot_mapping", slot_mapping=torch.tensor([3]))
    (codes, values), scales = rounded((k_cache, v_cache))
    int8 = dict(k_cache=codes, v_cache=values, **scales)
    yield case("int8 without k_scale", "k_scale", k_cache=codes, v_cache=values)
    yield case("scale for a floating cache", "k_scale", k_scale=scales["k_scale"])
    yield case("dtype of a scale", "k_scale", TypeError, **int8 | {"k_scale": scales["k_scale"].double()})
    yield case("expanded scale", "v_scale", **int8 | {"v_scale": scales["v_scale"][:1].expand(4, 5, 3)})
    yield case("integers into int8", "k", TypeError, **int8 | {"k": k.int()})
    yield case("other dtype of v", "v", TypeError, **int8 | {"v": v.half()})
    yield case("gradient of the rounding", "k", k=k.clone().requires_grad_(), **int8)
    yield case("gradient on the CPU kernel", "backend", backend="cpu", k=k.clone().requires_grad_())
    for backend in ("cpu", "reference"):
        for name, slots in (("above", [3, 20]), ("below", [-2, 3]), ("far", [3, 2**62]), ("twice", [3, 3])):
            yield case(f"slot {name}", "slot_mapping", slot_mapping=torch.tensor(slots), backend=backend)


SUITE = checks(pyarch.kv_append, append_samples, refused=append_refused, keep_layout=("k_cache", "v_cache"))


@pytest.mark.parametrize("check", SUITE, ids=str)
def test_suite(check):
    check()


def test_append_into_an_interleaved_cache():
    both = torch.zeros(4, 2, 3, 2, 8)
    k, v = torch.randn(2, 2, 8), torch.randn(2, 2, 8)
    pyarch.kv_append(k, v, both[:, 0], both[:, 1], torch.tensor([7, 2]), backend="cpu")
    assert torch.equal(both[2, 0, 1], k[0])
    assert torch.equal(both[0, 1, 2], v[1])
    assert both.count_nonzero() == k.count_nonzero() + v.count_nonzero()


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("v_cache", lambda m, k: (k, k, m[:4], m[:4])),
        ("v_cache", lambda m, k: (k, k, m[:4], m[1:5])),
        ("v_cache", lambda m, k: (k, k, m[:, :2], m[:, 1:3])),
        ("k", lambda m, k: (m[0, :2], k, m[:4], m[4:])),
        ("v", lambda m, k: (k, m[5, 1:3], m[:4], m[4:])),
        ("k_cache", lambda m, k: (k, k, m.as_strided((4, 3, 2, 8), (24, 16, 8, 1)), torch.zeros(4, 3, 2, 8))),
    ],
)
def test_append_refuses_memory_shared(argument, arguments):
    memory = torch.randn(8, 3, 2, 8)
    before = memory.clone()
    with pytest.raises(ValueError, match=f"^{argument}: "):
        pyarch.kv_append(*arguments(memory, torch.randn(2, 2, 8)), torch.tensor([0, 1]), backend="cpu")
    assert torch.equal(memory, before)


def test_append_in_a_compiled_step():
    """Append, then attend, in one graph: the graph sees the write."""
    (k_cache, v_cache, table, lens), _ = paged([5, 9], 4, 2, 8)
    slots = torch.stack([table[0, 1] * 4, table[1, 2] * 4]).long()
    k, v, q = torch.randn(2, 2, 8), torch.randn(2, 2, 8), torch.randn(2, 4, 8)

    def step(q, k, v, k_cache, v_cache):
        pyarch.kv_append(k, v, k_cache, v_cache, slots)
        return pyarch.paged_attention(q, k_cache, v_cache, table, lens)

    eager_k, eager_v = k_cache.clone(), v_cache.clone()
    expected = step(q, k, v, eager_k, eager_v)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v, k_cache, v_cache)
    assert all(map(same, (got, k_cache, v_cache), (expected, eager_k, eager_v)))
