"""swiglu: the suite, and the reference against torch.nn.functional."""

import pytest
import torch
import torch.nn.functional as F

import pyarch
from pyarch.ops.swiglu import CASES, swiglu_reference
from pyarch.testing import Refused, Sample, checks


def samples(dtype, device):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, device=device)

    for shape in [(3, 154), (1, 2), (2, 3, 4, 10), (40,), (0, 8), (3, 0)]:
        yield Sample("x".join(map(str, shape)), (draw(*shape),))
    yield Sample("large values", (draw(2, 64) * 50,))
    yield Sample("past one task", (draw(2, 2 * 16384 + 34),))
    for name, case in CASES.items():
        yield Sample(name, (draw(min(case["rows"], 5), 2 * case["features"]),))


def refused():
    yield Refused("no dimension", ValueError, "x", (torch.tensor(1.0),))
    yield Refused("an odd number of columns", ValueError, "x", (torch.randn(3, 5),))
    yield Refused("integers", TypeError, "x", (torch.ones(3, 4, dtype=torch.int32),))


SUITE = checks(pyarch.swiglu, samples, gradients=("x",), refused=refused)


@pytest.mark.parametrize("check", SUITE, ids=str)
def test_suite(check):
    check()


def test_reference_is_torchs():
    gate, up = torch.randn(2, 7, 33, dtype=torch.float64)
    torch.testing.assert_close(swiglu_reference(torch.cat((gate, up), -1)), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes(dtype):
    gate = torch.tensor([float("inf"), 200.0, 0.0, -200.0, float("nan")], dtype=dtype)
    y = pyarch.swiglu(torch.cat((gate, torch.ones_like(gate))), backend="cpu")
    torch.testing.assert_close(y, F.silu(gate), equal_nan=True)
