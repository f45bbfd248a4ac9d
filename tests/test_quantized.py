"""QuantizedTensor: the format, packing, quantize(), and what is refused."""

import pytest
import torch
from torch.utils import _pytree

from pyarch.quantized import QuantizedTensor, pack_int4, quantize, unpack_int4


@pytest.mark.parametrize("k", [0, 1, 2, 7, 64])
def test_pack_and_unpack(k):
    codes = torch.randint(0, 16, (5, k))
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, (k + 1) // 2)
    assert torch.equal(unpack_int4(packed, k), codes.to(torch.int8))


def test_low_nibble_first():
    assert pack_int4(torch.tensor([[1, 2, 15]])).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize("k", [1, 31, 64, 200])
@pytest.mark.parametrize("group", [16, 32, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_rounds_to_the_nearest_code(bits, group, symmetric, k):
    weight = torch.randn(6, k)
    w = quantize(weight, bits=bits, group_size=group, symmetric=symmetric)
    step = w.scale[:, w.column_groups()]
    slack = 1.0 if not symmetric else 0.5  # a rounded zero shifts the range by up to half a step
    assert ((w.dequantize() - weight).abs() <= slack * step * (1 + 1e-5)).all()
    assert w.bits == bits
    assert w.shape == (6, k)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_keeps_zero_exact(bits, symmetric):
    weight = torch.randn(4, 64).abs() + 1
    weight[:, ::3] = 0
    w = quantize(weight, bits=bits, group_size=32, symmetric=symmetric)
    assert torch.equal(w.dequantize()[:, ::3], torch.zeros(4, 22))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scale_has_the_weights_dtype(dtype):
    w = quantize(torch.randn(4, 64).to(dtype))
    assert w.scale.dtype == dtype
    assert w.dequantize(dtype).dtype == dtype


def test_zeros_and_sizes_of_zero():
    assert torch.equal(quantize(torch.zeros(3, 40)).dequantize(), torch.zeros(3, 40))
    for shape in ((0, 64), (3, 0)):
        for group in (32, -1):
            assert quantize(torch.zeros(shape), group_size=group).dequantize().shape == shape


def test_dequantize_by_hand():
    q, scale = pack_int4(torch.tensor([[0, 8, 15, 3]])), torch.tensor([[0.5, 2.0]])
    assert QuantizedTensor(q, scale, 4, 2).dequantize().tolist() == [[-4.0, 0.0, 14.0, -10.0]]
    zero = torch.tensor([[1, 2]], dtype=torch.uint8)
    assert QuantizedTensor(q, scale, 4, 2, zero).dequantize().tolist() == [[-0.5, 3.5, 26.0, 2.0]]
    offset = torch.tensor([[1.0, -1.0]])
    assert QuantizedTensor(q, scale, 4, 2, None, offset).dequantize().tolist() == [[1.0, 5.0, 29.0, 5.0]]
    order = torch.tensor([1, 0, 0, 1], dtype=torch.int32)
    assert QuantizedTensor(q, scale, 4, 2, g_idx=order).dequantize().tolist() == [[-16.0, 0.0, 3.5, -10.0]]


def test_pytree_and_repr():
    w = quantize(torch.randn(4, 64), symmetric=False)
    leaves, spec = _pytree.tree_flatten(w)
    again = _pytree.tree_unflatten(leaves, spec)
    assert torch.equal(again.dequantize(), w.dequantize())
    assert again.group_size == w.group_size
    assert repr(w) == "QuantizedTensor(4x64, int4, group_size=128, zero, torch.float32, cpu)"
    assert w.nbytes == 4 * 32 + 4 * 4 + 4


Q, S = torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"q": Q.int()}, TypeError, "q"),
        ({"q": Q[0]}, TypeError, "q"),
        ({"in_features": 66}, ValueError, "in_features"),
        ({"in_features": -1}, ValueError, "in_features"),
        ({"group_size": 0}, ValueError, "group_size"),
        ({"group_size": -2}, ValueError, "group_size"),
        ({"scale": S.double()}, TypeError, "scale"),
        ({"scale": S[:, :1]}, ValueError, "scale"),
        ({"scale": S.to("meta")}, ValueError, "scale"),
        ({"zero": S.long()}, TypeError, "zero"),
        ({"zero": S[:3]}, ValueError, "zero"),
        ({"offset": S.int()}, TypeError, "offset"),
        ({"zero": S, "offset": S}, ValueError, "offset"),
        ({"g_idx": torch.zeros(64)}, TypeError, "g_idx"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, ValueError, "g_idx"),
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, ValueError, "g_idx"),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, ValueError, "g_idx"),
    ],
    ids=str,
)
def test_refused(changes, error, field):
    with pytest.raises(error, match=f"^{field}: "):
        QuantizedTensor(**{"q": Q, "scale": S, "in_features": 64, "group_size": 32} | changes)


@pytest.mark.parametrize(
    ("arguments", "error", "field"),
    [
        ({"weight": torch.ones(3)}, TypeError, "weight"),
        ({"weight": torch.ones(3, 3, dtype=torch.float64)}, TypeError, "weight"),
        ({"weight": torch.full((3, 3), float("nan"))}, ValueError, "weight"),
        ({"bits": 3}, ValueError, "bits"),
        ({"group_size": 0}, ValueError, "group_size"),
    ],
    ids=str,
)
def test_quantize_refuses(arguments, error, field):
    with pytest.raises(error, match=f"^{field}: "):
        quantize(**{"weight": torch.ones(3, 3)} | arguments)
