"""rotary_append: the suite, refusals of index values, and the rotation against complex numbers and kv_append."""

import pytest
import torch
from paged_caches import rounded

import pyarch
from pyarch.ops.rotary import CASES, rotary_append_reference
from pyarch.testing import Refused, Sample, checks


def call(tokens, heads, kv_heads, dim, dtype=torch.float32, device="cpu", page_size=4, **options):
    """(args, kwargs) of a call with random contents; pages in a random order."""
    pages = tokens // page_size + 2
    draw = lambda *shape: torch.randn(*shape, dtype=dtype, device=device)
    angles = torch.rand(3 * tokens + 5, dim // 2, device=device) * 7
    slots = torch.randperm(pages * page_size, device=device)[:tokens]
    positions = torch.randint(0, angles.shape[0], (tokens,), device=device)
    caches = [draw(pages, page_size, kv_heads, dim) for _ in range(2)]
    args = draw(tokens, (heads + 2 * kv_heads) * dim), angles.cos(), angles.sin(), positions, *caches, slots
    return args, dict(num_heads=heads, num_kv_heads=kv_heads) | options


def samples(dtype, device):
    def norms(dim, wide=False):
        weights = torch.randn(2, dim, device=device).to(torch.float32 if wide else dtype)
        return dict(q_norm=weights[0].clone(), k_norm=weights[1].clone(), eps=0.1)

    shapes = [
        (5, 3, 1, 20, norms(20)), (7, 4, 2, 34, {"interleaved": True}), (2, 2, 2, 130, {}), (0, 2, 1, 8, {}),
        (1, 1, 1, 2, norms(2, True)), (40, 3, 1, 64, norms(64, True) | {"interleaved": True}),
    ]  # fmt: skip
    for tokens, heads, kv_heads, dim, options in shapes:
        args, kwargs = call(tokens, heads, kv_heads, dim, dtype, device, **options)
        if tokens == 5:
            args[6][1] = -1
        yield Sample(f"{tokens}x{heads}/{kv_heads}x{dim} {' '.join(options)}", args, kwargs)
    for interleaved in (False, True):  # quarter turns are exact, so that codes are the reference's
        args, kwargs = call(9, 3, 2, 16, dtype, device, interleaved=interleaved)
        turns = torch.randint(0, 4, args[1].shape, device=device)
        cos, sin = (torch.tensor(t, device=device)[turns] for t in ([1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, -1.0]))
        caches, scales = rounded(args[4:6])
        yield Sample(f"int8 {interleaved}", (args[0], cos, sin, args[3], *caches, args[6]), kwargs | scales)
    for name, c in CASES.items():
        args, kwargs = call(min(c["tokens"], 33), c["heads"], c["kv_heads"], c["head_dim"], dtype, device, page_size=16)
        yield Sample(name, args, kwargs)


def refused():
    def case(name, error, argument, place=None, value=None, **options):
        args, kwargs = call(6, 4, 2, 8)
        if place is not None:
            args = (*args[:place], value(args[place]), *args[place + 1 :])
        return Refused(name, error, argument, args, kwargs | options)

    yield case("qkv too narrow", ValueError, "qkv", 0, lambda x: x[:, :-8])
    yield case("sines of another length", ValueError, "sin", 2, lambda x: x[:-1])
    yield case("cosines of the whole head", ValueError, "cos", 1, lambda x: torch.cat((x, x), 1))
    yield case("bfloat16 tables", TypeError, "cos", 1, lambda x: x.bfloat16())
    yield case("int32 positions", TypeError, "positions", 3, lambda x: x.int())
    yield case("positions too few", ValueError, "positions", 3, lambda x: x[:-1])
    yield case("cache of another dtype", TypeError, "k_cache", 4, lambda x: x.half())
    yield case("values of another shape", ValueError, "v_cache", 5, lambda x: x[:-1])
    yield case("expanded cache", ValueError, "k_cache", 4, lambda x: x[:1].expand_as(x))
    yield case("slots too few", ValueError, "slot_mapping", 6, lambda x: x[:-1])
    yield case("other kv heads", ValueError, "num_kv_heads", num_kv_heads=4)
    yield case("no heads", ValueError, "num_heads", num_heads=0)
    yield case("scale for a floating cache", ValueError, "k_scale", k_scale=torch.ones(3, 4, 2))
    int8 = lambda x: torch.zeros(x.shape, dtype=torch.int8)
    yield case("int8 cache beside a floating one", TypeError, "v_cache", 4, int8)
    yield case("norm of another length", ValueError, "q_norm", q_norm=torch.ones(4))
    yield case("norm of another dtype", TypeError, "k_norm", k_norm=torch.ones(8).half())
    yield case("negative eps", ValueError, "eps", eps=-1.0)
    yield case("eps not a number", ValueError, "eps", eps=float("nan"))
    for name, place, entry, value in [
        ("negative position", 3, 2, -1), ("position past the tables", 3, 2, 23), ("slot past the cache", 6, 5, 12),
        ("slot below -1", 6, 0, -2),
    ]:  # fmt: skip
        edit = lambda x, entry=entry, value=value: x.index_fill(0, torch.tensor(entry), value)
        yield case(name, ValueError, "positions" if place == 3 else "slot_mapping", place, edit)
    yield case("slot named twice", ValueError, "slot_mapping", 6, lambda x: x.index_fill(0, torch.tensor(1), int(x[4])))
    args, kwargs = call(6, 4, 2, 8)
    yield Refused(
        "odd head size", ValueError, "k_cache", (args[0], *args[1:4], args[4][..., :7], args[5], args[6]), kwargs
    )


SUITE = checks(pyarch.rotary_append, samples, refused=refused, keep_layout=("k_cache", "v_cache"))


@pytest.mark.parametrize("check", SUITE, ids=str)
def test_suite(check):
    check()


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_turns_complex_numbers(interleaved):
    args, kwargs = call(5, 4, 2, 8, torch.float64, interleaved=interleaved)
    args = (args[0], args[1].double(), args[2].double(), *args[3:])
    turn = torch.complex(args[1], args[2])[args[3]][:, None]
    q, k, v = args[0].view(5, 8, 8).split((4, 2, 2), 1)

    def turned(x):
        if interleaved:
            return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous()) * turn).flatten(-2)
        z = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat((z.real, z.imag), -1)

    torch.testing.assert_close(rotary_append_reference(*args, **kwargs), turned(q))
    for cache, new in ((args[4], turned(k)), (args[5], v)):
        torch.testing.assert_close(cache.flatten(0, 1)[args[6]], new)


def test_caches_of_one_buffer_with_other_strides():
    args, kwargs = call(6, 3, 2, 16)
    pages = args[4].shape[0]
    both = torch.zeros(pages, 2, 2, 4, 16).transpose(2, 3)  # (page, k or v, slot, head, dim), heads outside slots
    q = pyarch.rotary_append(*args[:4], both[:, 0], both[:, 1], args[6], backend="cpu", **kwargs)
    same = pyarch.rotary_append(*args, backend="cpu", **kwargs)
    assert torch.equal(q, same)
    for half, cache in ((0, args[4]), (1, args[5])):
        assert torch.equal(both[:, half].flatten(0, 1)[args[6]], cache.flatten(0, 1)[args[6]])


def test_an_input_in_the_cache_is_refused():
    args, kwargs = call(2, 1, 1, 8)
    inside = args[4].view(-1)[:48].view(2, 24)
    with pytest.raises(ValueError, match="qkv: must not share"):
        pyarch.rotary_append(inside, *args[1:], backend="cpu", **kwargs)


def test_gradients_go_to_the_reference():
    args, kwargs = call(2, 2, 1, 8)
    assert pyarch.explain(pyarch.rotary_append, args[0].requires_grad_(), *args[1:], **kwargs).backend == "reference"
    q = pyarch.rotary_append(*args, **kwargs)
    q.sum().backward()
    assert args[0].grad is not None
