"""Prepacked weights: the format, the same results bit for bit, the modules that hold them, and what is refused."""

import copy
import pickle

import pytest
import torch
from quantized_weights import FORMATS, weight
from torch.utils import _pytree

import pyarch
from pyarch import nn, orders
from pyarch.quantized import TENSORS, PackedTensor, QuantizedTensor, quantize


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether two weights have the same tensors, dtypes and sizes."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in TENSORS]
    equal = (x is y if x is None else x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
    return all(equal) and (a.shape, a.group_size) == (b.shape, b.group_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (70, 300), (64, 577), (0, 64), (5, 0), (200, 33)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("order", orders.ORDERS)
def test_prepack_and_unpack(order, bits, shape, dtype):
    for symmetric in (True, False):
        w = quantize(torch.randn(shape).to(dtype), bits=bits, group_size=32, symmetric=symmetric)
        g_idx = (torch.randperm(w.in_features) % max(w.groups, 1)).int()
        offset = None if w.zero is not None else torch.randn(w.scale.shape).to(dtype)
        w = QuantizedTensor(w.q, w.scale, w.in_features, 32, w.zero, offset, g_idx)
        packed = w.prepack(order)
        assert isinstance(packed, PackedTensor)
        assert packed.order == order
        PackedTensor(packed.q, packed.scale, *w.shape, 32, packed.zero, packed.offset, packed.g_idx)  # is a format
        assert (packed.shape, packed.bits, packed.groups) == (w.shape, w.bits, w.groups)
        assert same(packed.unpack(), w)
        assert torch.equal(packed.dequantize(), w.dequantize())
        leaves, spec = _pytree.tree_flatten(packed)
        assert same(_pytree.tree_unflatten(leaves, spec).unpack(), w)
        index = torch.randint(shape[0], (7,)) if shape[0] else torch.empty(0, dtype=torch.int64)
        assert same(packed.rows(index), w.rows(index))
        for bad in (-1, shape[0]):
            with pytest.raises(IndexError):
                packed.rows(torch.tensor([bad]))


def test_packed_by_hand():
    w = quantize(torch.randn(70, 40), group_size=32).prepack()
    assert w.q.shape == (2, 5, 64, 4)
    assert w.scale.shape == (2, 2, 64)
    assert w.q[1, 3, 5].tolist() == w.unpack().q[69, 12:16].tolist()
    assert w.scale[1, 1, 5] == w.unpack().scale[69, 1]
    assert repr(w) == "PackedTensor(70x40, int4, group_size=32, torch.float32, cpu)"


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"q": torch.zeros(1, 8, 64, 4)}, TypeError, "q"),
        ({"q": torch.zeros(1, 8, 64, 4, dtype=torch.uint8, device="meta")}, TypeError, "q"),
        ({"q": torch.zeros(1, 8, 32, 4, dtype=torch.uint8)}, ValueError, "in_features"),
        ({"in_features": 65}, ValueError, "in_features"),
        ({"in_features": -1, "q": torch.zeros(1, 0, 64, 4, dtype=torch.uint8)}, ValueError, "in_features"),
        ({"out_features": 65}, ValueError, "in_features"),
        ({"out_features": -1}, ValueError, "out_features"),
        ({"scale": torch.ones(1, 2, 63)}, ValueError, "scale"),
        ({"group_size": 0}, ValueError, "group_size"),
    ],
    ids=str,
)
def test_packed_refused(changes, error, field):
    q, scale = torch.zeros(1, 8, 64, 4, dtype=torch.uint8), torch.ones(1, 2, 64)
    right = {"q": q, "scale": scale, "out_features": 4, "in_features": 64, "group_size": 32}
    PackedTensor(**right)
    with pytest.raises(error, match=f"^{field}: "):
        PackedTensor(**right | changes)


def test_fragments_by_hand():
    """Registers of mma.m16n8k16's left operand, as csrc/cuda/quant_matmul_weights.h takes them out of 16 bytes."""
    for bits in (4, 8):
        w = weight(40, 150, bits=bits, kind="offset").prepack("fragments")
        assert w.q.shape == (3, 3, 8 * bits, 16)
        codes = w.unpack().codes()
        for lane in range(32):
            for j in range(4):
                words = w.q[1, 2, lane if bits == 4 else j // 2 * 32 + lane].view(torch.int32).tolist()
                for i in range(4):
                    row, column = 16 + lane // 4 + i % 2 * 8, 128 + j * 16 + lane % 4 * 2 + i // 2 * 8
                    if bits == 4:
                        pair = [words[j] >> 4 * i & 15, words[j] >> 4 * (i + 4) & 15]
                    else:
                        word = words[j % 2 * 2 + i // 2]
                        pair = [(word >> 8 * (i % 2 + h) & 255 ^ 128) - 128 for h in (0, 2)]
                    inside = [codes[row, c] if c < 150 else 0 for c in (column, column + 1)]
                    assert pair == inside
        assert w.offset[2, 1, 7] == w.unpack().offset[39, 1]


def test_prepack_is_for_cpus_and_gpus():
    w = quantize(torch.randn(4, 64))
    with pytest.raises(ValueError, match="device: "):
        w.to("meta").prepack()
    with pytest.raises(ValueError, match="order: "):
        w.prepack("fragment")


def test_fragments_are_not_for_the_cpu():
    w, x = weight(20, 64).prepack("fragments"), torch.randn(3, 64)
    with pytest.raises(ValueError, match="order canonical or panels, not fragments"):
        pyarch.quant_matmul(x, w, backend="cpu")
    assert torch.equal(pyarch.quant_matmul(x, w), pyarch.quant_matmul(x, w.unpack(), backend="reference"))
    with pytest.raises((ValueError, RuntimeError), match="q: "):
        torch.ops.pyarch.quant_matmul__cpu(x, w.q, w.scale, None, None, None, None, 20, 32, 0, 0, 0.0)


@pytest.mark.forward
@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", FORMATS)
def test_packed_weights_give_the_same_bits(kind, bits, act_bits):
    for group_size in (16, 32, 128, 7, 48, -1):
        for n, k, act_order in (
            (70, 300, False),
            (64, 577, False),
            (33, 149, True),
            (1, 64, False),
            (200, 1030, False),
        ):
            w = weight(n, k, bits=bits, kind=kind, group_size=group_size, act_order=act_order)
            packed = w.prepack()
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = torch.randn(19, k).to(dtype)
                for m in (1, 4, 7, 19):
                    right = pyarch.quant_matmul(x[:m], w, act_bits=act_bits, backend="cpu")
                    assert torch.equal(pyarch.quant_matmul(x[:m], packed, act_bits=act_bits, backend="cpu"), right)


@pytest.mark.forward
def test_operator_refuses_packed_tensors_that_do_not_fit():
    w, x = weight(70, 300, kind="zero").prepack(), torch.randn(2, 300)
    right = {"q": w.q, "scale": w.scale, "zero": w.zero, "n": 70}
    wrong = [("q", w.q[:1]), ("q", w.q[:, 1:]), ("q", w.q.flatten(2)), ("q", w.q.transpose(2, 3)), ("q", w.q[0]),
             ("q", w.q.to(torch.int8)), ("scale", w.scale[:1]), ("scale", w.scale[:, 1:]), ("scale", w.scale[:, :, 1:]),
             ("scale", w.scale.flatten(0, 1)), ("zero", w.zero[:1]), ("zero", w.zero.double()), ("n", 129), ("n", 64),
             ("n", -1), ("n", 2**62)]  # fmt: skip
    for name, value in wrong:
        a = right | {name: value}
        with pytest.raises((ValueError, RuntimeError), match="q: |scale: |zero: |out_features: "):
            torch.ops.pyarch.quant_matmul__cpu(
                x, a["q"], a["scale"], a["zero"], None, None, None, a["n"], w.group_size, 0, 0, 0.0
            )


class TestModules:
    def test_linear(self):
        w, x = weight(70, 64, kind="offset"), torch.randn(3, 64)
        layer, plain = nn.QuantizedLinear(w, torch.randn(70)), nn.QuantizedLinear(w, torch.randn(70))
        plain.load_state_dict(layer.state_dict())
        with pytest.raises(ValueError, match="eval"):
            layer.prepack()
        nn.prepack(torch.nn.Sequential(layer).eval())
        assert isinstance(layer.weight, PackedTensor)
        assert torch.equal(layer(x), plain(x))
        assert layer.weight is layer.weight
        layer.to(torch.bfloat16).to(torch.float32)
        assert isinstance(layer.weight, PackedTensor)

    def test_packed_state_is_canonical(self):
        layer = nn.QuantizedLinear(weight(70, 64, kind="offset"), torch.randn(70)).eval()
        before = {name: t.clone() for name, t in layer.state_dict().items()}
        layer.prepack()
        assert list(layer.state_dict()) == list(before)
        assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert isinstance(other.weight, QuantizedTensor)
            assert torch.equal(other.q, before["q"])
        assert isinstance(layer.weight, PackedTensor)

    @pytest.mark.parametrize(
        "change",
        [lambda m: m.train(), lambda m: m.load_state_dict(m.state_dict()), lambda m: m.to("meta"),
         lambda m: m.load_state_dict(m.state_dict(), assign=True)],
    )  # fmt: skip
    def test_what_drops_the_packing(self, change):
        layer, x = nn.QuantizedLinear(weight(70, 64)).eval(), torch.randn(3, 64)
        right = layer(x)
        layer.prepack()
        change(layer)
        assert isinstance(layer.weight, QuantizedTensor)
        if layer.q.device.type == "cpu":
            assert torch.equal(layer(x), right)

    def test_packed_on_the_reference_and_in_training(self):
        layer, x = nn.QuantizedLinear(weight(70, 64)).eval(), torch.randn(3, 64, requires_grad=True)
        layer(x).sum().backward()
        right, x.grad = x.grad, None
        layer.prepack()
        layer(x).sum().backward()
        assert torch.equal(x.grad, right)
        with pyarch.use_backend("reference"):
            torch.testing.assert_close(layer(x), x @ layer.weight.dequantize().T)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_embedding(self, bits):
        w, ids = weight(70, 64, bits=bits, kind="offset"), torch.tensor([[0, 69], [3, 3]])
        layer = nn.QuantizedEmbedding(w).eval()
        right = layer(ids)
        layer.prepack()
        assert torch.equal(layer(ids), right)
        for bad in (-1, 70):
            with pytest.raises(IndexError):
                layer(torch.tensor([bad]))
