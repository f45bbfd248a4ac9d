"""check_op bites: each planted bug in a made-up op must be caught by the part that is there for it."""

import pytest
import torch

from pyarch import native
from pyarch.dispatch import Limits, Op
from pyarch.testing import Refused, Sample, checks

native.define("halve", "(Tensor x, Tensor table) -> Tensor", lambda x, table: torch.empty_like(x))
_implementation = torch.library.Library("pyarch", "IMPL")
_plant = {"bug": "none"}


def _halve_cpu(x, table):
    """x / 2, as a C++ kernel might compute it, with the bug that a test plants."""
    bug = _plant["bug"]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if bug == "reads memory as contiguous":
        x = x.as_strided(x.shape, y.stride())
    if (bug == "writes out of bounds" and x.numel()) or (bug == "trusts its table" and table.numel() == 6):
        x.as_strided((1,), (1,), x.storage_offset() + x.numel()).zero_()
    if bug == "changes an argument":
        table.zero_()
    if bug == "wrong by a rounding":
        x = x * (1 + 4 * torch.finfo(x.dtype).eps)
    if bug == "depends on threads" and torch.get_num_threads() == 3:
        return x.nextafter(x + 1) / 2
    if bug == "other shape than the fake's":
        return torch.cat((x, x)) / 2
    y.copy_(x / 2)
    if bug == "last column unwritten" and x.numel():
        y[..., -1] = torch.empty(y.shape[:-1], dtype=y.dtype)
    return y


_implementation.impl("halve__cpu", _halve_cpu, "CPU")


class _Halve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, table):
        return native.operator("halve", "cpu")(x, table)

    @staticmethod
    def backward(ctx, dy):
        bug = _plant["bug"]
        if bug == "wrong gradient":
            return dy / 3, None
        return (dy / 2).detach() if bug == "gradient cut off" else dy / 2, None


def check(x, table):
    if _plant["bug"] == "checks nothing":
        return {"device": "cpu", "dtype": torch.float32}
    for name, value in (("x", x), ("table", table)):
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type == "meta":
            raise TypeError(f"{name}: must be a dense CPU tensor")
    if x.is_complex() or table.dtype != torch.int32:
        raise TypeError("x: must be real" if x.is_complex() else "table: must be int32")
    return {"device": x.device.type, "dtype": x.dtype}


def halve(x, table, *, backend="auto"):
    bug, facts = _plant["bug"], check(x, table)
    chosen = HALVE.choose(backend, facts) if bug != "takes any backend" else "cpu"
    if chosen == "reference" or bug == "falls back":
        return halve_reference(x, table)
    return _Halve.apply(x, table) if x.requires_grad else native.operator("halve", "cpu")(x, table)


def halve_reference(x, table):
    return x / 2


HALVE = Op("halve", {"cpu": Limits("cpu", dtypes=(torch.float32,))}, check, "native")
OPS = {halve: HALVE}


def samples(dtype, device):
    for shape in ((3, 5), (1, 1), (2, 3, 4), (0, 4)):
        yield Sample(str(shape), (torch.randn(shape, dtype=dtype), torch.arange(3, dtype=torch.int32)))
    yield Sample("whole numbers", (torch.arange(6.0).to(dtype)[None], torch.arange(3, dtype=torch.int32)), exact=True)


def refused():
    yield Refused("float table", TypeError, "table", (torch.randn(3), torch.randn(3)))


def suite():
    return {c.part: c for c in checks(halve, samples, gradients=("x",), refused=refused)}


@pytest.fixture
def plant(monkeypatch):
    return lambda bug: monkeypatch.setitem(_plant, "bug", bug)


@pytest.mark.parametrize("part", ["forward", "gradient", "operator", "compile", "refusal"])
def test_a_right_op_passes(part):
    suite()[part]()


@pytest.mark.parametrize(
    ("part", "bug", "message"),
    [
        ("forward", "wrong by a rounding", "largest error"),
        ("forward", "last column unwritten", "nan"),
        ("forward", "reads memory as contiguous", "layout"),
        ("forward", "writes out of bounds", "wrote outside"),
        ("forward", "changes an argument", "was changed"),
        ("forward", "depends on threads", "threads"),
        ("forward", "falls back", "ran on none"),
        ("gradient", "wrong gradient", "gradient 0"),
        ("gradient", "gradient cut off", "can be differentiated"),
        ("gradient", "falls back", "ran on none"),
        ("compile", "falls back", "ran set()"),
        ("operator", "trusts its table", "wrote outside"),
        ("operator", "other shape than the fake's", "opcheck"),
        ("refusal", "takes any backend", "must be refused"),
        ("refusal", "checks nothing", "must be refused naming x"),
    ],
)
def test_a_planted_bug_is_caught(plant, part, bug, message):
    plant(bug)
    with pytest.raises(AssertionError) as caught:
        suite()[part]()
    assert message in str(caught.value)
