"""sample: the suite, the same tokens as the sorted reference for the same draw, and the distribution itself."""

import itertools

import pytest
import torch

import pyarch
from pyarch.ops.sample import CASES, sample_reference
from pyarch.testing import Refused, Sample, checks

OPTIONS = [
    dict(zip(("temperature", "top_k", "top_p", "min_p"), values, strict=True))
    for values in itertools.product((0.7, 3.0), (None, 1, 40), (None, 0.3, 0.95, 1.0), (None, 0.02))
]


def samples(dtype, device):
    """Calls that are the same for every draw, which the suite repeats."""
    draw = lambda *shape: torch.randn(*shape, dtype=dtype, device=device) * 3
    yield Sample("one is left", (draw(3, 77) + 90 * torch.eye(77, dtype=dtype, device=device)[5],), {"top_p": 0.9})
    yield Sample("the largest", (draw(5, 1000),), {"temperature": 0})
    yield Sample("top 1", (draw(4, 301),), {"top_k": 1, "temperature": 2.0})
    yield Sample("no rows", (draw(0, 9),), {"top_k": 3})
    yield Sample("one token", (draw(3, 1),))
    yield Sample("the first of equals", (torch.ones_like(draw(2, 50)),), {"temperature": 0})
    yield Sample("the first of equals by top_k", (torch.ones_like(draw(2, 600)),), {"top_k": 1})
    yield Sample("the first of equals by top_p", (torch.ones_like(draw(2, 600)),), {"top_p": 1e-3})
    masked = draw(3, 129)
    masked[:, :100] = -float("inf")
    yield Sample("masked", (masked,), {"temperature": 0.0})
    for name, case in CASES.items():
        yield Sample(name, (draw(case["batch"], case["vocabulary"]),), {"min_p": 1.0, "top_k": 1})


def refused():
    x = torch.randn(2, 8)
    yield Refused("one dimension", ValueError, "logits", (x[0],))
    yield Refused("no vocabulary", ValueError, "logits", (x[:, :0],))
    yield Refused("integers", TypeError, "logits", (x.long(),))
    for name, values in [
        ("NaN", (float("nan"), 1.0)),
        ("+inf", (float("inf"), 1.0)),
        ("nothing", (-float("inf"),) * 2),
    ]:
        bad = torch.tensor(values).repeat(2, 40)
        for temperature in (0.0, 1.0):
            yield Refused(f"{name} at {temperature}", ValueError, "logits", (bad,), {"temperature": temperature})
    for name, value in [("temperature", -1.0), ("temperature", float("nan")), ("temperature", float("inf")),
                        ("top_k", 0), ("top_k", 2.5), ("top_p", 0.0), ("top_p", 1.5), ("top_p", float("nan")),
                        ("min_p", -0.1), ("min_p", 2.0)]:  # fmt: skip
        yield Refused(f"{name} {value}", ValueError, name, (x,), {name: value})
    yield Refused("a seed for a generator", TypeError, "generator", (x,), {"generator": 3})


SUITE = checks(pyarch.sample, samples, refused=refused)


@pytest.mark.parametrize("check", SUITE, ids=str)
def test_suite(check):
    check()


@pytest.mark.forward
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_draw_same_token_as_by_sorting(dtype):
    """bfloat16 logits have many equal values, so which of them are kept shows too."""
    different = total = 0
    for number, options in enumerate(OPTIONS):
        for width in (1, 257, 3000):
            logits = (torch.randn(40, width) * 4).to(dtype)
            ours, theirs = (
                call(logits, generator=torch.Generator().manual_seed(number), **options)
                for call in (lambda *a, **k: pyarch.sample(*a, backend="cpu", **k), sample_reference)
            )
            different += int((ours != theirs).sum())
            total += ours.numel()
    assert different <= total * 1e-3, f"{different} of {total} tokens differ"  # a draw may fall on a rounded boundary


def test_sets_are_exact_where_sums_are():
    logits = torch.tensor([2.0, 8, 4, 2, 8, 1, 1, 1]).log().repeat(4000, 1)  # mass 27
    random = torch.Generator().manual_seed(0)

    def kept(**options):
        return sorted(set(pyarch.sample(logits, generator=random, backend="cpu", **options).tolist()))

    assert kept() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert kept(top_k=4) == [0, 1, 2, 4]  # of the two 2s the first
    assert kept(top_p=15.9 / 27) == [1, 4]
    assert kept(top_p=16.1 / 27) == [1, 2, 4]
    assert kept(top_k=3, top_p=0.79) == [1, 4]  # of a mass of 20
    assert kept(top_k=3, top_p=0.81) == [1, 2, 4]
    assert kept(min_p=0.24) == [0, 1, 2, 3, 4]
    assert kept(min_p=0.26) == [1, 2, 4]
    assert kept(min_p=0.26, top_p=0.79) == [1, 4]  # of what min_p left


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_distribution(backend):
    logits = torch.randn(20)
    counts = torch.zeros(20, dtype=torch.float64)
    random = torch.Generator().manual_seed(1)
    draws = 200_000
    counts += pyarch.sample(logits.expand(draws, 20), temperature=1.5, generator=random, backend=backend).bincount(
        minlength=20
    )
    expected = torch.softmax(logits.double() / 1.5, 0) * draws
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 60  # 19 degrees of freedom: exceeded once in 10^5 seeds


def test_seeds_repeat_and_differ():
    logits = torch.randn(1, 500).expand(50, 500)
    a, b, c = (pyarch.sample(logits, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    torch.manual_seed(7)
    first = pyarch.sample(logits)
    torch.manual_seed(7)
    assert torch.equal(first, pyarch.sample(logits))
    state = torch.get_rng_state()
    pyarch.sample(logits, temperature=0)
    assert torch.equal(state, torch.get_rng_state())  # the largest draws nothing


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e30])
def test_extreme_temperatures(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0]]).repeat(50, 1)
    tokens = pyarch.sample(logits, temperature=temperature, backend="cpu")
    assert set(tokens.tolist()) == ({1} if temperature < 1 else {0, 1, 2})
