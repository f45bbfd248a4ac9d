"""The gradient of quant_matmul in Triton: interpreted on CPU tensors (TRITON_INTERPRET=1), or on the GPU."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from quantized_weights import FORMATS, weight

import pyarch
from pyarch import arch, native
from pyarch._instruments import assert_close, poisoned, same
from pyarch.ops import _activation
from pyarch.ops.quant_matmul import quant_matmul_reference
from pyarch.testing import Sample, checks

if pyarch.backends()["triton"]:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]

from pyarch.kernels import quant_matmul_backward as kernel  # noqa: E402

DEVICE = "cpu" if arch.interpreting() else "cuda"
DTYPES = (torch.bfloat16, torch.float16)


def draw(*shape, dtype=torch.float16):
    return torch.randn(*shape).to(DEVICE, dtype)


def dequantised(x, weight, bias=None, *, activation=None, act_bits=None):
    """What same-dtype PyTorch does with the weight."""
    y = F.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))
    return _activation.apply(activation, y)


def samples(dtype, device):
    w = weight(20, 64, kind="zero", device=device)
    yield Sample("silu", (draw(5, 64, dtype=dtype), w, draw(20, dtype=torch.float32)), {"activation": "silu"})
    wide = weight(33, 96, bits=8, group_size=-1, kind="offset", device=device)
    yield Sample("bias of x's dtype", (draw(2, 3, 96, dtype=dtype), wide, draw(33, dtype=dtype)))
    yield Sample("vector", (draw(64, dtype=dtype), w, draw(20, dtype=dtype)), {"activation": ("leaky_relu", 0.1)})
    yield Sample("no rows", (draw(0, 64, dtype=dtype), w))
    yield Sample("no outputs", (draw(3, 64, dtype=dtype), weight(0, 64, device=device)))


SUITE = [
    c for c in checks(pyarch.quant_matmul, samples, gradients=("x", "bias"), peer=dequantised)
    if c.backend == "triton" and (c.part, c.dtype) in [*(("gradient", t) for t in DTYPES), *(
        (part, torch.bfloat16) for part in ("operator", "compile"))]
]  # fmt: skip


@pytest.mark.parametrize("check", SUITE, ids=str)
def test_suite(check):
    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(kind, bits, dtype):
    """Groups of every kind, tiles that fit and that do not; the same bits from columns as from rows of dy."""
    for m, n, k, group in [(5, 37, 95, -1), (70, 70, 330, 32), (3, 20, 200, 96), (17, 64, 256, 128), (2, 3, 1, -1)]:
        w = weight(n, k, bits=bits, group_size=group, kind=kind, scale_dtype=torch.float16, device=DEVICE)
        dy = draw(m, n, dtype=dtype)
        call = native.operator("quant_matmul_backward", "triton")
        with poisoned():
            got, again = (call(t, w.q, w.scale, w.zero, w.offset, k, group) for t in (dy, dy.T.contiguous().T))
        assert same(got, again)
        truth = dy.double() @ w.dequantize(torch.float64)
        assert_close(f"{m}x{n}x{k} g{group}", got, truth, dy @ w.dequantize(dtype))


@pytest.mark.parametrize(("m", "cc"), [(1, 90), (40, 90), (200, 90), (200, 80)])
def test_configs(m, cc):
    """Each config writes all of dx, and nothing else, on tiles and groups that do not fit it."""
    for (n, k, group, bits), dtype in itertools.product([(75, 330, 64, 4), (130, 257, -1, 8)], DTYPES):
        w, dy = weight(n, k, bits=bits, group_size=group, kind="offset", device=DEVICE), draw(9, n, dtype=dtype)
        dx = torch.full((11, k), float("nan"), dtype=dtype, device=DEVICE)
        kernel.launch(kernel.config_for(m, cc), dx[1:10], dy, w.q, w.scale, None, w.offset, group)
        assert dx[[0, 10]].isnan().all()
        assert_close(f"for {m}, sm_{cc}", dx[1:10], dy.double() @ w.dequantize(torch.float64), dy @ w.dequantize(dtype))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_on_integers(bits, dtype):
    """Integer weights and dy of -1, 0, 1: every product and sum is representable in fp32; dx is their rounding."""
    w = weight(64, 200, bits=bits, kind="zero", device=DEVICE)
    w.scale.fill_(1)
    dy = torch.randint(-1, 2, (17, 64), device=DEVICE).to(dtype)
    got = kernel.backward(dy, w.q, w.scale, w.zero, None, 200, 32)
    weights = (w.codes().double() - w.zero.double().repeat_interleave(32, 1)[:, :200]).to(dtype).double()
    assert same(got, (dy.double() @ weights).to(dtype))


def test_through_the_rounding_of_activations():
    """act_bits=8 passes the gradient as if it did not round; float32 x takes PyTorch's operations."""
    w = weight(20, 64, device=DEVICE)
    for dtype in (*DTYPES, torch.float32):
        x, dy = draw(5, 64, dtype=dtype).requires_grad_(), draw(5, 20, dtype=dtype)
        (got,) = torch.autograd.grad(pyarch.quant_matmul(x, w, act_bits=8, backend="triton"), x, dy)
        assert_close(str(dtype), got, dy.double() @ w.dequantize(torch.float64), dy @ w.dequantize(dtype))


def test_frozen_layer_trains_what_is_before_it():
    """A few steps through a frozen int4 layer bring the loss down as PyTorch's own do."""
    w, target = weight(16, 32, kind="zero", device=DEVICE), draw(8, 16, dtype=torch.float32)

    def losses(forward):
        torch.manual_seed(1)
        x = draw(8, 32, dtype=torch.float32).requires_grad_()
        optimiser, found = torch.optim.SGD([x], lr=2.0), []
        for _ in range(6):
            loss = (forward(x.to(torch.bfloat16)).float() - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(loss.item())
        return torch.tensor(found)

    ours = losses(lambda x: pyarch.quant_matmul(x, w, backend="triton"))
    assert ours[-1] < 0.8 * ours[0]
    torch.testing.assert_close(ours, losses(lambda x: quant_matmul_reference(x, w)), rtol=0.02, atol=0)


def test_operator_refuses_what_it_cannot_compute():
    dy, w = draw(2, 8), weight(8, 64, kind="zero", device=DEVICE)
    good = dict(dy=dy, q=w.q, scale=w.scale, zero=w.zero, offset=None, in_features=64, group_size=32)
    call = native.operator("quant_matmul_backward", "triton")
    call(*good.values())
    for name, value in [
        ("dy", dy.float()), ("dy", dy[:, :7]), ("dy", dy[0]), ("q", w.q[:, :1]), ("q", w.q.int()), ("q", w.q[None]),
        ("scale", w.scale[:, :1]), ("zero", w.zero[:4]), ("offset", w.scale), ("in_features", 62), ("in_features", -1),
        ("in_features", 66), ("group_size", 33), ("group_size", 0), ("group_size", -2), ("group_size", 2**40),
    ]:  # fmt: skip
        with pytest.raises((ValueError, RuntimeError)):
            call(*(good | {name: value}).values())
