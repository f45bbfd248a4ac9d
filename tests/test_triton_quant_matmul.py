"""quant_matmul in Triton: interpreted on CPU tensors (TRITON_INTERPRET=1), or on the GPU where there is one."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from quantized_weights import FORMATS

import pyarch
from pyarch import arch, native
from pyarch._instruments import assert_close, same
from pyarch.ops import _activation
from pyarch.ops.quant_matmul import quant_matmul_reference
from pyarch.quantized import QuantizedTensor, pack_int4
from pyarch.testing import Sample, checks

if pyarch.backends()["triton"]:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]

from pyarch.kernels import quant_matmul as kernel  # noqa: E402

DEVICE = "cpu" if arch.interpreting() else "cuda"
DTYPES = (torch.bfloat16, torch.float16)


def weight(n, k, group_size, bits, form, dtype=torch.float32, device=DEVICE):
    """Random codes over their whole range, in one of the canonical formats."""
    groups = 1 if group_size == -1 else -(-k // group_size)
    codes = torch.randint(0, 16, (n, k)) if bits == 4 else torch.randint(-128, 128, (n, k))
    scale = (torch.rand(n, groups) + 0.5).to(dtype) / 64
    zero = {"zero": torch.randint(0, 16, (n, groups), dtype=torch.uint8), "float zero": 7 + torch.randn(n, groups)}
    offset = torch.randn(n, groups).to(dtype) / 16 if form == "offset" else None
    q = pack_int4(codes) if bits == 4 else codes.to(torch.int8)
    return QuantizedTensor(q, scale, k, group_size, zero.get(form), offset).to(device)


def draw(*shape, dtype=torch.float16, device=DEVICE):
    return torch.randn(*shape).to(device, dtype)


def dequantised(x, weight, bias=None, *, activation=None):
    """What same-dtype PyTorch does with the weight."""
    y = F.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))
    return _activation.apply(activation, y)


def samples(dtype, device):
    one = dict(dtype=dtype, device=device)
    shapes = [(1, 33, 576, 128), (5, 70, 95, 32), (17, 65, 130, 96), (2, 16, 100, -1)]
    for i, (bits, form) in enumerate(itertools.product((4, 8), FORMATS)):
        for m, n, k, group in (shapes[i % 4], shapes[(i + i // 4 + 1) % 4]):
            w = weight(n, k, group, bits, form, torch.float16, device)
            yield Sample(f"int{bits} {form} {m}x{n}x{k} g{group}", (draw(m, k, **one) + 0.5, w, draw(n, **one)))
    w = weight(40, 64, 32, 4, "zero", torch.bfloat16, device)
    for activation in ("relu", "silu", "gelu", "gelu_tanh", ("leaky_relu", 0.1)):
        yield Sample(
            f"{activation}", (draw(6, 64, **one), w, draw(40, device=device).float()), {"activation": activation}
        )
    yield Sample("batches, no bias", (draw(2, 3, 64, **one), w))
    yield Sample("vector", (draw(64, **one), w))
    yield Sample("no rows", (draw(0, 64, **one), w))
    yield Sample("no outputs", (draw(3, 64, **one), weight(0, 64, 32, 4, "zero", device=device)))
    yield Sample("one column", (draw(3, 1, **one), weight(5, 1, -1, 4, "zero", device=device)))
    yield Sample("large x", (draw(3, 64, **one) * 1000, w))
    # Outside LIMITS: must be refused.
    yield Sample("group of 16", (draw(3, 64, **one), weight(8, 64, 16, 8, "symmetric", device=device)))
    yield Sample("group of 48", (draw(3, 96, **one), weight(8, 96, 48, 4, "symmetric", device=device)))
    g_idx = torch.randint(0, 2, (64,), dtype=torch.int32, device=device)
    yield Sample("act-order", (draw(3, 64, **one), dataclasses.replace(w, g_idx=g_idx)))


SUITE = [
    c for c in checks(pyarch.quant_matmul, samples, peer=dequantised) if c.backend == "triton" and c.dtype in DTYPES
]


@pytest.mark.parametrize("check", SUITE, ids=str)
def test_suite(check):
    check()


def every_config():
    """What config_for gives over the range of shapes, each also with K split into 3 unevenly."""
    shapes = itertools.product((1, 20, 64, 200, 2048), (512, 4096), (512, 4096))
    found = {kernel.config_for(shape, 4, cc) for shape in shapes for cc in (80, 90)}
    assert {config.split_k > 1 for config in found} == {True, False}
    tiles = {dataclasses.replace(config, split_k=1) for config in found}
    return sorted(tiles | {dataclasses.replace(tile, split_k=3) for tile in tiles}, key=str)


@pytest.mark.parametrize("config", every_config(), ids=str)
def test_configs(config):
    """Each config is right on tiles and groups that do not fit it, writes all of y, and gives the same bits again."""
    for (m, n, k, group, bits), dtype in itertools.product([(19, 75, 330, 64, 4), (3, 130, 257, -1, 8)], DTYPES):
        w, x = weight(n, k, group, bits, "offset"), draw(m, k, dtype=dtype)
        y = [torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
        for out in y:
            kernel.launch(config, out, x, w.q, w.scale, None, w.offset, None, group, 0, 0.0)
        assert same(*y)
        assert_close(str(config), y[0], quant_matmul_reference(x.double(), w), dequantised(x, w))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", FORMATS)
def test_dequantised_for_torchs_matmul(form, bits):
    """What a tuned config may choose for many rows."""
    config = kernel.Config(0, 0, 0, 0, 0, 0, dequantise=True)
    for (m, n, k, group), dtype in itertools.product([(5, 70, 95, -1), (3, 40, 330, 96), (9, 33, 64, 32)], DTYPES):
        w, x = weight(n, k, group, bits, form), draw(m, k, dtype=dtype)
        for bias, silu in ((None, None), (draw(n, dtype=torch.float32), "silu")):
            y = torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE)
            code = _activation.encode(silu)
            got = kernel.launch(config, y, x, w.q, w.scale, w.zero, w.offset, bias, group, *code)
            truth = quant_matmul_reference(x.double(), w, None if bias is None else bias.double(), activation=silu)
            assert_close(f"{m}x{n}x{k} g{group}", got, truth, dequantised(x, w, bias, activation=silu))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_on_integers(bits, dtype):
    """Integer weights and x of -1, 0, 1: every product and sum is representable in fp32; y is their rounding."""
    w = weight(64, 256, 32, bits, "zero")
    w = dataclasses.replace(w, scale=torch.ones_like(w.scale))
    x = torch.randint(-1, 2, (17, 256), device=DEVICE).to(dtype)
    got = pyarch.quant_matmul(x, w, backend="triton")
    assert same(got, quant_matmul_reference(x.double(), w).to(dtype))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("activation", _activation.NAMES)
def test_not_finite(activation, form):
    """NaN and infinity stay in their rows, and no other row feels them; without a shift they are as in PyTorch."""
    w, x = weight(40, 64, 32, 4, form), draw(4, 64)
    x[0, 0], x[1, 0], x[2, 5] = float("nan"), float("inf"), float("-inf")
    got, want = (pyarch.quant_matmul(x, w, activation=activation, backend=b) for b in ("triton", "reference"))
    assert got[0].isnan().all()
    assert got[3].isfinite().all()
    if form == "symmetric" and activation in (None, "relu"):
        assert torch.equal(got[:3].isnan(), want[:3].isnan())
        assert torch.equal(got[:3].isinf(), want[:3].isinf())


def test_gradient():
    w, bias = weight(8, 64, 32, 4, "zero"), draw(8, dtype=torch.float32).requires_grad_()
    x = draw(3, 64).requires_grad_()
    pyarch.quant_matmul(x, w, bias, activation="silu", backend="triton").sum().backward()
    wide = x.detach().double().requires_grad_()
    quant_matmul_reference(wide, w, bias.detach().double(), activation="silu").sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=4e-3, atol=4e-3)


def test_no_columns():
    w = QuantizedTensor(torch.empty(5, 0, dtype=torch.uint8), torch.empty(5, 0), 0, 32).to(DEVICE)
    y = kernel.forward(draw(6, 0), w.q, w.scale, None, None, None, draw(5), 5, 32, 0, 1, 0.0)
    assert y.shape == (6, 5)
    assert y.isfinite().all()


def test_operator_refuses_what_it_cannot_compute():
    x, w = draw(2, 64), weight(8, 64, 32, 4, "zero")
    good = dict(x=x, q=w.q, scale=w.scale, zero=w.zero, offset=None, g_idx=None, bias=None,
                out_features=8, group_size=32, act_bits=0, activation=0, slope=0.0)  # fmt: skip
    call = native.operator("quant_matmul", "triton")
    call(*good.values())
    for name, value in [
        ("x", x.double()), ("x", x[:, :32]), ("x", x[0]), ("q", w.q[:, :1]), ("q", w.q.int()), ("q", w.q[None]),
        ("scale", w.scale[:, :1]), ("zero", w.zero[:4]), ("offset", w.scale), ("bias", x[0]), ("g_idx", w.zero),
        ("out_features", 7), ("out_features", 9),
        ("group_size", 33), ("group_size", 0), ("group_size", -2), ("group_size", 2**40), ("act_bits", 4),
        ("activation", 6), ("activation", -1),
    ]:  # fmt: skip
        with pytest.raises((ValueError, RuntimeError)):
            call(*(good | {name: value}).values())
