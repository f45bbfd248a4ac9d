"""What the Triton kernels share: rounding, 16-bit arithmetic and activations, right under the interpreter too."""

import pytest
import torch

import pyarch
from pyarch import arch
from pyarch.ops import _activation

if pyarch.backends()["triton"]:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from pyarch.kernels import _common  # noqa: E402

DEVICE = "cpu" if arch.interpreting() else "cuda"
DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def _narrow_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, _common.narrow(tl.load(x + i), y.dtype.element_ty))


@triton.jit
def _subtract_kernel(x, y, N: tl.constexpr, C: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, _common.subtract(tl.load(x + i), C))


@triton.jit
def _dot_kernel(a, b, c, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    acc = tl.full((N, N), 0.5, tl.float32)
    tl.store(c + i * N + j, _common.dot(tl.load(a + i * N + j), tl.load(b + i * N + j), acc))


@triton.jit
def _activate_kernel(x, y, slope, N: tl.constexpr, CODE: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, _common.activate(tl.load(x + i), CODE, slope))


def specials(n):
    """Random bits, and every boundary of rounding: halves, subnormals, the largest, infinities, NaN."""
    bits = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int64)
    bits[::2] = bits[::2] & ~0xFFFF | torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]).repeat(n)[: n // 2]
    x = bits.to(torch.int32).view(torch.float32)
    x[::5] = torch.randn(len(x[::5]))
    named = [0.0, -0.0, 65504.0, 65519.9, 65520.0, 3.3895e38, 3.4e38, 6e-8, 2.9e-8, 1e-40, torch.inf, -torch.inf]
    x[: len(named) + 1] = torch.tensor([*named, torch.nan])
    return x.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_rounds_as_torch(dtype):
    x = specials(4096)
    y = torch.empty(4096, dtype=dtype, device=DEVICE)
    _narrow_kernel[(1,)](x, y, 4096)
    want = x.to(dtype)
    assert torch.equal(y.isnan(), want.isnan())
    bits, right = y.view(torch.int16), want.view(torch.int16)
    assert torch.equal(bits[~want.isnan()], right[~want.isnan()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subtract_rounds_as_torch(dtype):
    x = (torch.randn(1024, device=DEVICE) * 200).to(dtype)
    y = torch.empty_like(x)
    _subtract_kernel[(1,)](x, y, 1024, 136)
    assert torch.equal(y, x - 136)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dot_sums_in_float32(dtype):
    a, b = (torch.randint(-8, 9, (32, 32), device=DEVICE).to(dtype) for _ in range(2))
    c = torch.empty(32, 32, device=DEVICE)
    _dot_kernel[(1,)](a, b, c, 32)
    assert torch.equal(c, a.float() @ b.float() + 0.5)


@pytest.mark.parametrize("activation", [*_activation.NAMES, ("leaky_relu", 0.1)], ids=str)
def test_activations_are_torchs(activation):
    x = torch.cat((torch.linspace(-30, 30, 1019), torch.tensor([0.0, -0.0, 1e30, -1e30, torch.nan]))).to(DEVICE)
    y = torch.empty_like(x)
    code, slope = _activation.encode(activation)
    _activate_kernel[(1,)](x, y, slope, 1024, code)
    torch.testing.assert_close(y, _activation.apply(activation, x), rtol=2e-6, atol=1e-6, equal_nan=True)
