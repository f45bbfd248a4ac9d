"""rms_norm: the suite, and the reference against torch.nn.functional."""

import pytest
import torch

import pyarch
from pyarch.ops.rms_norm import CASES, rms_norm_reference
from pyarch.testing import Refused, Sample, checks


def samples(dtype, device):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, device=device)

    # eps 0.5: with 1e-6 the gradient of one column is all cancellation, and only its rounding would be compared
    for rows, n in [(3, 77), (1, 1), (2, 16), (1, 31), (5, 130)]:
        yield Sample(f"{rows}x{n}", (draw(rows, n), draw(n)), {"eps": 0.5})
        yield Sample(f"{rows}x{n} residual", (draw(rows, n), draw(n)), {"eps": 0.5, "residual": draw(rows, n)})
    yield Sample("float32 weight", (draw(4, 33), draw(33).float()), {"residual": draw(4, 33)})
    yield Sample("vector", (draw(40), draw(40)))
    yield Sample("batches", (draw(2, 3, 5, 24), draw(24)))
    yield Sample("no rows", (draw(0, 8), draw(8)))
    yield Sample("no columns", (draw(3, 0), draw(0)))
    yield Sample("zeros", (torch.zeros_like(draw(2, 9)), draw(9)), {"eps": 0.01})
    yield Sample("large values", (draw(2, 64) * 1e4, draw(64)))
    for name, case in CASES.items():
        yield Sample(name, (draw(min(case["rows"], 40), case["n"]), draw(case["n"])))


def refused():
    x, w = torch.randn(3, 8), torch.randn(8)
    yield Refused("no dimension", ValueError, "x", (torch.tensor(1.0), w))
    yield Refused("weight too long", ValueError, "weight", (x, torch.randn(9)))
    yield Refused("weight of two dimensions", ValueError, "weight", (x, w[None]))
    yield Refused("weight of another dtype", TypeError, "weight", (x, w.half()))
    yield Refused("residual of another shape", ValueError, "residual", (x, w), {"residual": x[:2]})
    yield Refused("residual of another dtype", TypeError, "residual", (x, w), {"residual": x.double()})
    yield Refused("negative eps", ValueError, "eps", (x, w), {"eps": -1e-6})
    yield Refused("eps not a number", ValueError, "eps", (x, w), {"eps": float("nan")})


SUITE = checks(pyarch.rms_norm, samples, gradients=("x", "weight", "residual"), refused=refused)


@pytest.mark.parametrize("check", SUITE, ids=str)
def test_suite(check):
    check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reference_is_torchs(dtype):
    x, w = torch.randn(5, 64, dtype=dtype), torch.randn(64, dtype=dtype)
    theirs = torch.nn.functional.rms_norm(x.double(), (64,), w.double(), 1e-6)
    torch.testing.assert_close(rms_norm_reference(x, w), theirs.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-12)
