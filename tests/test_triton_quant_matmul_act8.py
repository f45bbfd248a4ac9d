"""quant_matmul with act_bits=8 in Triton: interpreted on CPU tensors (TRITON_INTERPRET=1), or on the GPU."""

import dataclasses
import itertools

import pytest
import torch
from quantized_weights import FORMATS, weight

import pyarch
from pyarch import arch
from pyarch._instruments import assert_close, poisoned, same
from pyarch.ops.quant_matmul import quant_matmul_reference, quantize_activations
from pyarch.quantized import QuantizedTensor
from pyarch.testing import Sample, checks

if pyarch.backends()["triton"]:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]

from pyarch.kernels import quant_matmul as kernel  # noqa: E402
from pyarch.kernels import quant_matmul_act8  # noqa: E402

DEVICE = "cpu" if arch.interpreting() else "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def draw(*shape, dtype=torch.float16):
    return torch.randn(*shape).to(DEVICE, dtype)


def samples(dtype, device):
    shapes = [(1, 33, 320, 128), (5, 40, 95, 32), (17, 65, 130, 96), (2, 16, 100, -1), (3, 20, 64, -1)]
    for i, (bits, kind) in enumerate(itertools.product((4, 8), FORMATS)):
        m, n, k, group = shapes[(i + DTYPES.index(dtype)) % 5]
        w = weight(n, k, bits=bits, group_size=group, kind=kind, scale_dtype=torch.float16, device=device)
        call = draw(m, k, dtype=dtype) + 0.5, w, draw(n, dtype=torch.float32)
        yield Sample(f"int{bits} {kind} {m}x{n}x{k} g{group}", call, {"act_bits": 8, "activation": "silu"})
    yield from few(dtype, device)
    w = weight(40, 64, kind="zero", device=device)
    for name, shape in {"batches": (2, 3, 64), "vector": (64,), "no rows": (0, 64)}.items():
        yield Sample(name, (draw(*shape, dtype=dtype), w), {"act_bits": 8})
    yield Sample("zeros", (torch.zeros(2, 64, dtype=dtype, device=device), w), {"act_bits": 8})
    yield Sample("one column", (draw(3, 1, dtype=dtype), weight(5, 1, group_size=-1, device=device)), {"act_bits": 8})
    yield Sample("no columns", (draw(3, 0, dtype=dtype), weight(5, 0, device=device)), {"act_bits": 8})
    outliers = draw(4, 64, dtype=dtype)
    outliers[:, 7] *= 1000
    yield Sample("outlier channel", (outliers, w), {"act_bits": 8})


def few(dtype, device):
    """What is enough for all but the numbers."""
    w = weight(12, 64, kind="zero", device=device)
    yield Sample("int4", (draw(3, 64, dtype=dtype), w, draw(12, dtype=dtype)), {"act_bits": 8})
    row = weight(5, 32, bits=8, group_size=-1, device=device)
    yield Sample("int8", (draw(3, 32, dtype=dtype), row), {"act_bits": 8})
    refused = dataclasses.replace(w, g_idx=torch.randint(0, 2, (64,), dtype=torch.int32, device=device))
    yield Sample("act-order", (draw(3, 64, dtype=dtype), refused), {"act_bits": 8})


SUITE = [c for c in checks(pyarch.quant_matmul, samples) if (c.backend, c.part) == ("triton", "forward")]
SUITE += [
    c for c in checks(pyarch.quant_matmul, few)
    if c.backend == "triton" and c.part != "forward" and c.dtype == torch.bfloat16
]  # fmt: skip


@pytest.mark.parametrize("check", SUITE, ids=str)
def test_suite(check):
    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 96, -1])
def test_codes_are_the_references(group, dtype):
    """Bit by bit, over rows of every magnitude: ties, subnormals, the largest, zeros; through a weight that is one."""
    k = 192
    x = (draw(24, k, dtype=torch.float32) * torch.logspace(-38, 4, 24, device=DEVICE)[:, None]).to(dtype)
    x[0] = 0
    x[1] = torch.arange(k, device=DEVICE) / 2 - 64  # halves of a scale of 1
    x[1, ::32] = 127
    codes = torch.eye(k, dtype=torch.int8, device=DEVICE)
    w = QuantizedTensor(codes, torch.ones(k, 1 if group == -1 else -(-k // group), device=DEVICE), k, group)
    got = kernel.forward(x.float(), w.q, w.scale, None, None, None, None, k, group, 8, 0, 0.0)
    numbers, scale = quantize_activations(x.float(), w)
    assert torch.equal(got, numbers * scale)


def every_config():
    """What config_for gives over the range of shapes, and some a tuner tries, each also with K in 3 uneven parts."""
    shapes = itertools.product((1, 20, 64, 300, 4096), (4096,), (512, 4096), (True, False))
    found = {kernel.config_for((m, n, k), 8, cc, True, g) for m, n, k, g in shapes for cc in (80, 90)}
    tiles = {dataclasses.replace(config, split_k=1) for config in found}
    return sorted(tiles | {dataclasses.replace(tile, split_k=3) for tile in tiles}, key=str)


@pytest.mark.parametrize("config", every_config(), ids=str)
def test_configs(config):
    """Each config is right on tiles and groups that do not fit it, writes all of y, and gives the same bits again."""
    for m, n, k, group, bits, kind in [(19, 75, 330, 64, 4, "zero"), (3, 130, 257, -1, 8, "offset")]:
        w, x = weight(n, k, bits=bits, group_size=group, kind=kind, device=DEVICE), draw(m, k)
        y = [torch.full((m, n), float("nan"), dtype=x.dtype, device=DEVICE) for _ in range(2)]
        for out in y:
            with poisoned():
                quant_matmul_act8.launch(config, out, x, w.q, w.scale, w.zero, w.offset, None, group, 0, 0.0)
        assert same(*y)
        truth, peer = (quant_matmul_reference(of, w, act_bits=8) for of in (x.double(), x))
        assert_close(str(config), y[0], truth, peer)


def test_tiles_in_bands():
    """More tiles of weight rows than a band has, in a last band that is not full: each is computed, once."""
    w, x = weight(16 * 19, 32, group_size=-1, bits=8, device=DEVICE), draw(70, 32)
    config = kernel.Config(block_m=32, block_n=16, block_k=32, split_k=1, num_warps=4, num_stages=2)
    y = torch.full((70, 16 * 19), float("nan"), dtype=x.dtype, device=DEVICE)
    quant_matmul_act8.launch(config, y, x, w.q, w.scale, None, None, None, -1, 0, 0.0)
    assert_close("bands", y, *(quant_matmul_reference(of, w, act_bits=8) for of in (x.double(), x)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", FORMATS)
def test_exact_on_integers(kind, bits):
    """Scales of 1, the largest codes of both: integers, and every sum of them, to the last bit."""
    for k, group in ((256, 128), (256, -1), (512, 512)):
        w = weight(20, k, bits=bits, kind=kind, group_size=group, device=DEVICE)
        zero, offset = (None if t is None else torch.full_like(t, v) for t, v in ((w.zero, 3), (w.offset, -2)))
        w = QuantizedTensor(w.q.clone(), torch.ones_like(w.scale), k, group, zero, offset)
        w.q[0], w.q[1] = (0, 255) if bits == 4 else (-128, 127)
        x = torch.randint(-127, 128, (3, k), device=DEVICE).float()
        x[:, ::32], x[0] = 127, 127
        got = pyarch.quant_matmul(x, w, act_bits=8, backend="triton")
        assert torch.equal(got.double(), quant_matmul_reference(x.double(), w, act_bits=8))


@pytest.mark.parametrize("bits", [4, 8])
def test_long_rows_do_not_overflow(bits):
    """The largest products, all of one sign, over more columns than an int32 sum can hold."""
    k = quant_matmul_act8.MOST_COLUMNS + 5000
    q = torch.full((2, k), -128, dtype=torch.int8) if bits == 8 else torch.zeros(2, k // 2, dtype=torch.uint8)
    w = QuantizedTensor(q, torch.ones(2, 1), k, -1).to(DEVICE)
    config = kernel.Config(block_m=16, block_n=16, block_k=4096, split_k=1, num_warps=4, num_stages=1)
    x, y = torch.full((1, k), 127.0, device=DEVICE), torch.empty(1, 2, device=DEVICE)
    quant_matmul_act8.launch(config, y, x, w.q, w.scale, None, None, None, -1, 0, 0.0)
    assert torch.equal(y, torch.full_like(y, -127.0 * k * (128 if bits == 8 else 8)))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(bad, kind):
    """A number that is not finite spoils its own row, and no other."""
    for group in (32, -1):
        w, x = weight(20, 128, kind=kind, group_size=group, device=DEVICE), draw(5, 128)
        right = pyarch.quant_matmul(x, w, act_bits=8, backend="triton")
        x[2, 70] = bad
        y = pyarch.quant_matmul(x, w, act_bits=8, backend="triton")
        assert y[2].isnan().all()
        rest = torch.arange(5) != 2
        assert torch.equal(y[rest], right[rest])


def test_float32_needs_act_bits():
    x, w = draw(2, 64, dtype=torch.float32), weight(8, 64, device=DEVICE)
    assert pyarch.explain(pyarch.quant_matmul, x, w, act_bits=8, backend="triton").backend == "triton"
    with pytest.raises(ValueError, match="float32 with act_bits=8 alone"):
        pyarch.quant_matmul(x, w, backend="triton")
