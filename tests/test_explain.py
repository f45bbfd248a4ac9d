"""explain says what a call would do, and the call does it."""

import pytest
import torch

import pyarch
from pyarch.explain import ops
from pyarch.testing import Operators

X, W = torch.randn(3, 8), torch.randn(8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_what_it_says_is_what_runs(dtype, backend):
    if (dtype, backend) == (torch.float64, "cpu"):
        return  # refused: the next test but one
    said = pyarch.explain(pyarch.rms_norm, X.to(dtype), W.to(dtype), backend=backend)
    with Operators() as operators:
        pyarch.rms_norm(X.to(dtype), W.to(dtype), backend=backend)
    assert [func.name() for func, _ in operators.calls] == (["pyarch::rms_norm__cpu"] if said.backend == "cpu" else [])
    assert said.backend in said.permitted
    assert set(said.permitted) | set(said.refused) == {"cpu", "cuda", "triton", "reference"}


def test_text():
    assert str(pyarch.explain(pyarch.rms_norm, X.double(), W.double())).splitlines() == [
        "rms_norm -> reference",
        "  reference: chosen",
        "  cpu: no, takes dtype float32, bfloat16, float16, not float64",
        "  cuda: no, rms_norm has no cuda kernel",
        "  triton: no, rms_norm has no triton kernel",
        "  gradient: the formula's derivative in PyTorch operations, twice differentiable",
    ]
    assert "  reference: permitted" in str(pyarch.explain(pyarch.rms_norm, X, W))


def test_it_raises_what_the_call_would():
    with pytest.raises(ValueError, match="^weight:"):
        pyarch.explain(pyarch.rms_norm, X, W[:7])
    with pytest.raises(ValueError, match="^backend:"):
        pyarch.explain(pyarch.rms_norm, X.double(), W.double(), backend="cpu")
    for target in (torch.nn.functional.relu, torch.add, 3, "rms_norm"):
        with pytest.raises(TypeError, match="^target:"):
            pyarch.explain(target, X)


def test_nothing_is_computed():
    with Operators() as operators:
        pyarch.explain(pyarch.rms_norm, X, W)
    assert not operators.calls


def test_every_op_has_what_explain_needs():
    assert "rms_norm" in ops()
    for name, op in ops().items():
        assert op.name == name
        assert op.gradient
        assert set(op.limits) <= {"cpu", "cuda", "triton"}
