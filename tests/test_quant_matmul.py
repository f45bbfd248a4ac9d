"""quant_matmul: the suite over every weight format, batch invariance, and hostile calls of the CPU operator."""

import pytest
import torch
from quantized_weights import FORMATS, weight

import pyarch
from pyarch.ops.quant_matmul import CASES, quant_matmul_reference
from pyarch.quantized import QuantizedTensor
from pyarch.testing import Refused, Sample, checks


def call(dtype, device, name, m, n, k, *, bias=False, activation=None, act_bits=None, **options):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, device=device)

    w = weight(n, k, device=device, **options)
    return Sample(name, (draw(m, k), w, draw(n).float() if bias else None),
                  {"activation": activation, "act_bits": act_bits})  # fmt: skip


def samples(dtype, device, act_bits=None):
    yield call(dtype, device, "bias, gelu, fp16 offset", 5, 37, 96,
               bias=True, activation="gelu", kind="offset", scale_dtype=torch.float16, act_bits=act_bits)  # fmt: skip
    yield call(dtype, device, "int8, silu", 3, 33, 130, bits=8, bias=True, activation="silu", act_bits=act_bits)
    yield call(dtype, device, "act-order", 4, 9, 70, kind="zero", act_order=True, act_bits=act_bits)
    for i, kind in enumerate(FORMATS):
        for bits, m, group in ((4, 5 + 4 * (i % 2), 32), (8, 9 - 4 * (i % 2), 64)):
            name = f"int{bits} {kind} g{group} M={m}"
            yield call(dtype, device, name, m, 67, 149, bits=bits, kind=kind, group_size=group, act_bits=act_bits)
    for bits, group in ((4, 8), (4, 48), (4, 128), (4, -1), (4, 7), (8, 16), (8, 1000), (8, 100)):
        name = f"int{bits} g{group}"
        yield call(dtype, device, name, 3, 21, 577, bits=bits, group_size=group, kind="offset", act_bits=act_bits)
    for name, m, n, k in (("one", 1, 1, 1), ("no rows", 0, 8, 16), ("no outputs", 3, 0, 16), ("no columns", 3, 8, 0)):
        yield call(dtype, device, name, m, n, k, bias=True, act_bits=act_bits)
    yield call(dtype, device, "no columns, whole row", 2, 5, 0, group_size=-1, bias=True, act_bits=act_bits)
    yield call(dtype, device, "many rows", 197, 40, 64, group_size=16, bits=8, act_bits=act_bits)
    yield call(dtype, device, "K past every block", 2, 17, 2700, group_size=-1, act_bits=act_bits)
    yield call(dtype, device, "group 128 with a tail", 7, 49, 576, group_size=128, act_bits=act_bits)
    for activation in ("relu", "gelu", "gelu_tanh", ("leaky_relu", 0.1)):
        yield call(dtype, device, str(activation), 4, 40, 64, bias=True, activation=activation, act_bits=act_bits)
    w, options = weight(12, 64, device=device), {"act_bits": act_bits}
    for shape in ((2, 3, 5, 64), (64,)):
        yield Sample(f"x {shape}", (torch.randn(shape, dtype=dtype, device=device), w), options)
    yield Sample("zeros", (torch.zeros(2, 64, dtype=dtype, device=device), w), options)
    outliers = torch.randn(4, 64, dtype=dtype, device=device)
    outliers[:, 7] *= 1000
    yield Sample("outlier channel", (outliers, w), options)
    yield from exact(dtype, device, act_bits)


def samples_int8(dtype, device):
    return samples(dtype, device, act_bits=8)


def exact(dtype, device, act_bits):
    """Small integers: every product, sum and result is representable."""
    for bits in (4, 8):
        for kind in FORMATS:
            w = weight(18, 64, bits=bits, kind=kind, device=device)
            q = w.q & 0x33 if bits == 4 else w.q.clamp(-3, 3)
            zero, offset = (None if t is None else torch.full_like(t, v) for t, v in ((w.zero, 2), (w.offset, -2)))
            w = QuantizedTensor(q, torch.ones_like(w.scale), 64, 32, zero, offset)
            x = torch.zeros(3, 64, dtype=dtype, device=device)
            x[:, ::5] = torch.randint(-1, 2, x[:, ::5].shape).to(x)
            if act_bits == 8:  # a scale of 1 in every group
                x[:, 1::32] = torch.tensor([127.0, -127.0, 127.0]).to(x)[:, None]
            truth = quant_matmul_reference(x.double(), w, act_bits=act_bits)
            representable = torch.equal(truth.to(dtype).double(), truth)
            yield Sample(f"integers, int{bits} {kind}", (x, w), {"act_bits": act_bits}, exact=representable)


def refused():
    x, w = torch.randn(3, 64), weight(8, 64)
    yield Refused("no weight", TypeError, "weight", (x, torch.randn(8, 64)))
    yield Refused("no dimension", ValueError, "x", (torch.tensor(1.0), w))
    yield Refused("another K", ValueError, "x", (torch.randn(3, 65), w))
    yield Refused("integer x", TypeError, "x", (torch.ones(3, 64, dtype=torch.int32), w))
    yield Refused("bias too long", ValueError, "bias", (x, w, torch.randn(9)))
    yield Refused("bias of another dtype", TypeError, "bias", (x, w, torch.randn(8).half()))
    yield Refused("unknown activation", ValueError, "activation", (x, w), {"activation": "tanh"})
    yield Refused("act_bits 4", ValueError, "act_bits", (x, w), {"act_bits": 4})


def samples_packed(dtype, device):
    for options in ({"kind": "offset", "scale_dtype": torch.float16}, {"bits": 8, "kind": "zero"}, {"act_order": True}):
        for act_bits in (None, 8):
            name, w = f"packed {options} {act_bits}", weight(67, 149, **options)
            yield Sample(name, (torch.randn(9, 149, dtype=dtype), w.prepack()), {"act_bits": act_bits})


SUITE = checks(pyarch.quant_matmul, samples, gradients=("x", "bias"), refused=refused)
SUITE_INT8 = checks(pyarch.quant_matmul, samples_int8)
SUITE_PACKED = checks(pyarch.quant_matmul, samples_packed)


@pytest.mark.parametrize("check", SUITE, ids=str)
def test_suite(check):
    check()


@pytest.mark.parametrize("check", SUITE_INT8, ids=str)
def test_suite_int8(check):
    check()


@pytest.mark.parametrize("check", SUITE_PACKED, ids=str)
def test_suite_packed(check):
    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradient_passes_the_rounding_of_activations(backend, dtype):
    w, bias = weight(20, 64), torch.randn(20)
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    dy = torch.randn(5, 20, dtype=dtype)
    (got,) = torch.autograd.grad(pyarch.quant_matmul(x, w, bias, act_bits=8, backend=backend), x, dy)
    (right,) = torch.autograd.grad(quant_matmul_reference(x, w, bias), x, dy)
    assert torch.equal(got, right)


@pytest.mark.forward
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize(
    "options", [{}, {"bits": 8}, {"kind": "offset"}, {"act_order": True}, {"group_size": 20}], ids=str
)
def test_rows_do_not_depend_on_their_neighbours(options, act_bits, dtype):
    w, x = weight(70, 300, **options), torch.randn(230, 300).to(dtype)
    alone = torch.cat([pyarch.quant_matmul(row[None], w, act_bits=act_bits, backend="cpu") for row in x])
    for m in (2, 3, 5, 6, 7, 16, 191, 192, 193, 230):
        together = pyarch.quant_matmul(x[:m], w, act_bits=act_bits, backend="cpu")
        assert torch.equal(together, alone[:m]), f"M={m}"


@pytest.mark.forward
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, 512, 1024, 640, -1])
def test_few_rows_are_those_of_many_for_every_group_size(group_size, bits):
    w, x = (
        pyarch.quantize(torch.randn(45, 1700), bits=bits, group_size=group_size, symmetric=False),
        torch.randn(7, 1700),
    )
    many = pyarch.quant_matmul(x, w, act_bits=8, backend="cpu")
    for m in range(1, 7):
        assert torch.equal(pyarch.quant_matmul(x[:m], w, act_bits=8, backend="cpu"), many[:m]), f"M={m}"


@pytest.mark.forward
@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(bad, act_bits):
    """A number that is not finite spoils its own row, and no other."""
    w, x = weight(20, 128, kind="offset"), torch.randn(9, 128)
    right = pyarch.quant_matmul(x, w, act_bits=act_bits, backend="cpu")
    x[4, 70] = bad
    y = pyarch.quant_matmul(x, w, act_bits=act_bits, backend="cpu")
    assert not y[4].isfinite().any()
    rest = torch.arange(9) != 4
    assert torch.equal(y[rest], right[rest])


@pytest.mark.forward
def test_saturated_codes():
    """The largest sums that codes can make are exact: -128 * 127 over a long row."""
    k = 4096
    w = QuantizedTensor(torch.full((17, k), -128, dtype=torch.int8), torch.ones(17, 1), k, -1)
    y = pyarch.quant_matmul(torch.full((3, k), 127.0), w, act_bits=8, backend="cpu")
    assert torch.equal(y, torch.full((3, 17), -128.0 * 127 * k))


@pytest.mark.forward
@pytest.mark.parametrize("group", [-1, 5, 8])
def test_operator_refuses_group_indices_out_of_range(group):
    w = weight(8, 40, group_size=group, act_order=True)
    for value in (-1, w.groups, 2**31 - 1, -(2**31)):
        index = w.g_idx.clone()
        index[17] = value
        with pytest.raises((ValueError, RuntimeError), match="g_idx: values must be in"):  # torch's choice
            torch.ops.pyarch.quant_matmul__cpu(
                torch.randn(2, 40), w.q, w.scale, None, None, index, None, 8, w.group_size, 0, 0, 0.0
            )


def test_reference_is_linear():
    """Against torch's own linear on the dequantised weight, in float64."""
    w, x, bias = weight(12, 96, kind="offset"), torch.randn(5, 96, dtype=torch.float64), torch.randn(12).double()
    theirs = torch.nn.functional.linear(x, w.dequantize(torch.float64), bias)
    torch.testing.assert_close(quant_matmul_reference(x, w, bias), theirs)


def test_reference_rounds_activations_by_group():
    """Against a loop over rows and groups."""
    w, x = weight(6, 80, group_size=32, kind="zero"), torch.randn(3, 80)
    rounded = torch.empty_like(x)
    for i in range(3):
        for begin in range(0, 80, 32):
            group = x[i, begin : begin + 32]
            scale = group.abs().max() / 127
            rounded[i, begin : begin + 32] = (group / scale).round() * scale
    torch.testing.assert_close(quant_matmul_reference(x, w, act_bits=8), rounded @ w.dequantize().T)


def test_refuses_a_weight_on_another_device():
    with pytest.raises(ValueError, match=r"^weight: must be on cpu"):
        pyarch.quant_matmul(torch.randn(3, 64), weight(8, 64).to("meta"))


def test_cases_run():
    for case in CASES.values():
        w = weight(64, case["k"], group_size=case["group_size"])
        y = pyarch.quant_matmul(torch.randn(case["m"], case["k"]), w, act_bits=8, backend="cpu")
        assert y.shape == (case["m"], 64)
