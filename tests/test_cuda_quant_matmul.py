"""quant_matmul in CUDA C++ on a GPU; without one, tests/emulated_quant_matmul.py runs the same kernels on the host."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from quantized_weights import FORMATS, weight

import pyarch
from pyarch import nn
from pyarch._instruments import same
from pyarch.ops import _activation
from pyarch.quantized import PackedTensor, QuantizedTensor
from pyarch.testing import Sample, checks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = (torch.bfloat16, torch.float16)


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


def dequantised(x, weight, bias=None, *, activation=None):
    """What same-dtype PyTorch does with the weight."""
    y = F.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))
    return _activation.apply(activation, y)


def samples(dtype, device):
    shapes = itertools.cycle([(1, 33, 576), (5, 70, 95), (16, 200, 1100), (30, 40, 577), (50, 900, 72), (200, 65, 300)])
    groups = itertools.cycle((32, 64, 128, -1, 96))
    for bits, kind, _ in itertools.product((4, 8), FORMATS, range(3)):
        (m, n, k), group = next(shapes), next(groups)
        w = weight(n, k, bits=bits, kind=kind, group_size=group, scale_dtype=torch.float16, device=device)
        name = f"int{bits} {kind} {m}x{n}x{k} g{group}"
        yield Sample(name, (draw(m, k, dtype=dtype), w.prepack(), draw(n, dtype=dtype)), {"activation": "silu"})
    w = weight(40, 64, device=device)
    yield Sample("canonical", (draw(3, 64, dtype=dtype), w))  # outside LIMITS: must be refused
    yield Sample("no rows", (draw(0, 64, dtype=dtype), w.prepack()))
    yield Sample("batches", (draw(2, 3, 64, dtype=dtype), w.prepack(), draw(40).float()))


ON_GPU = torch.cuda.is_available()
SUITE = checks(pyarch.quant_matmul, samples, peer=dequantised, keep_layout=("weight",)) if ON_GPU else []


@pytest.mark.parametrize("check", [c for c in SUITE if c.backend == "cuda"], ids=str)
def test_suite(check):
    check()


@pytest.mark.parametrize("group", [128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_has_the_same_bits_for_any_m(bits, group):
    w = weight(5000, 4000, bits=bits, group_size=group, kind="zero", device="cuda").prepack()
    x = draw(300, 4000)
    most = pyarch.quant_matmul(x, w, backend="cuda")
    for m in (1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 300):
        for _ in range(3):
            assert same(pyarch.quant_matmul(x[:m], w, backend="cuda"), most[:m]), f"M={m}"


def test_large_products_are_right():
    for m, n, k in ((1, 14336, 4096), (16, 4096, 14336), (64, 4096, 4096), (256, 4096, 4096)):
        w = weight(n, k, group_size=128, scale_dtype=torch.bfloat16, device="cuda")
        x = draw(m, k)
        right = F.linear(x.double(), w.dequantize(torch.float64))
        own = (F.linear(x, w.dequantize(x.dtype)) - right).norm()
        assert (pyarch.quant_matmul(x, w.prepack(), backend="cuda") - right).norm() <= 1.5 * own


def test_runs_on_the_current_stream_and_in_graphs():
    w = weight(700, 512, kind="offset", device="cuda").prepack()
    for m in (1, 20):  # the second has a workspace
        x = draw(m, 512)
        value, fresh = pyarch.quant_matmul(x, w).clone(), draw(m, 512)
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            x.copy_(fresh)
            late = pyarch.quant_matmul(x, w).clone()
        torch.cuda.synchronize()
        assert not same(late, value)
        assert same(late, pyarch.quant_matmul(x, w))
        with torch.cuda.graph(graph):
            captured = pyarch.quant_matmul(x, w)
        for _ in range(3):
            x.copy_(draw(m, 512))
            graph.replay()
            assert same(captured.clone(), pyarch.quant_matmul(x, w))


def test_modules_hold_fragments_on_a_gpu():
    layer = nn.QuantizedLinear(weight(70, 64), torch.randn(70)).eval()
    x, before = torch.randn(3, 64).bfloat16(), {name: t.clone() for name, t in layer.state_dict().items()}
    right = layer(x)
    layer.to("cuda").prepack()
    assert isinstance(layer.weight, PackedTensor)
    assert layer.weight.order == "fragments"
    assert pyarch.explain(pyarch.quant_matmul, x.cuda(), layer.weight).backend == "cuda"
    torch.testing.assert_close(layer(x.cuda()).cpu(), right, atol=0.02, rtol=0.02)
    assert all(torch.equal(t.cpu(), before[name]) for name, t in layer.state_dict().items())
    layer.to(torch.float16)
    assert isinstance(layer.weight, PackedTensor)
    assert isinstance(layer.cpu().weight, QuantizedTensor)
