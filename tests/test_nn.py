"""pyarch.nn against torch.nn and the dequantised formula."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from quantized_weights import weight

import pyarch
from pyarch import nn
from pyarch.quantized import QuantizedTensor, concat


class TestQuantizedLinear:
    @pytest.mark.parametrize("kind", ["symmetric", "zero", "offset"])
    @pytest.mark.parametrize("bias", [False, True])
    def test_is_the_dequantised_linear(self, kind, bias):
        w = weight(24, 70, kind=kind)
        b = torch.randn(24) if bias else None
        layer, x = nn.QuantizedLinear(w, b), torch.randn(2, 3, 70)
        torch.testing.assert_close(layer(x), F.linear(x, w.dequantize(), b), rtol=1e-5, atol=1e-4)

    def test_act_bits(self):
        w, x = weight(16, 64), torch.randn(3, 64)
        y = nn.QuantizedLinear(w, act_bits=8)(x)
        assert torch.equal(y, pyarch.quant_matmul(x, w, act_bits=8))
        assert not torch.equal(y, pyarch.quant_matmul(x, w))

    def test_from_float(self):
        linear = torch.nn.Linear(64, 8)
        layer = nn.QuantizedLinear.from_float(linear, bits=8, group_size=-1)
        x = torch.randn(5, 64)
        assert (layer(x) - linear(x)).abs().max() < 0.05

    def test_state_dict_round_trip(self):
        a, b = nn.QuantizedLinear(weight(8, 64), torch.randn(8)), nn.QuantizedLinear(weight(8, 64), torch.randn(8))
        x = torch.randn(2, 64)
        b(x)
        assert not torch.equal(a(x), b(x))
        b.load_state_dict(a.state_dict())
        assert torch.equal(a(x), b(x))
        assert set(a.state_dict()) == {"q", "scale", "bias"}

    def test_load_state_dict_by_assignment(self):
        a, b = nn.QuantizedLinear(weight(8, 64)), nn.QuantizedLinear(weight(8, 64))
        b.load_state_dict(a.state_dict(), assign=True)
        x = torch.randn(2, 64)
        assert torch.equal(a(x), b(x))

    @pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
    def test_casts_leave_the_weight_alone(self, cast):
        w = weight(8, 64, kind="offset", scale_dtype=torch.float16)
        layer = cast(nn.QuantizedLinear(w, torch.randn(8)))
        assert torch.equal(layer.weight.dequantize(), w.dequantize())
        assert (layer.scale.dtype, layer.offset.dtype) == (torch.float16, torch.float16)
        assert layer.bias.dtype != torch.float32

    def test_meta_and_back(self):
        layer = nn.QuantizedLinear(weight(8, 64)).to("meta")
        assert layer.weight.q.device.type == "meta"
        assert layer.to_empty(device="cpu").weight.q.device.type == "cpu"

    def test_copies(self):
        layer, x = nn.QuantizedLinear(weight(8, 64)), torch.randn(2, 64)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), layer(x))
            assert other.q.data_ptr() == other.weight.q.data_ptr() != layer.q.data_ptr()

    def test_gradients(self):
        layer = nn.QuantizedLinear(weight(8, 64), torch.zeros(8, requires_grad=True))
        x = torch.randn(3, 64, requires_grad=True)
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, layer.weight.dequantize().sum(0).expand(3, 64), rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.bias.grad, torch.full((8,), 3.0))

    def test_refuses(self):
        with pytest.raises(TypeError, match="weight"):
            nn.QuantizedLinear(torch.randn(4, 4))
        with pytest.raises(ValueError, match="act_bits"):
            nn.QuantizedLinear(weight(4, 32), act_bits=4)
        with pytest.raises(ValueError, match="x"):
            nn.QuantizedLinear(weight(4, 32))(torch.randn(2, 31))


class TestParallel:
    def test_one_format_is_one_matmul(self):
        parts = [weight(8, 64, kind="offset"), weight(4, 64, kind="offset"), weight(3, 64, kind="offset")]
        layer, x = nn.parallel(parts, [None] * 3), torch.randn(2, 64)
        assert isinstance(layer, nn.QuantizedLinear)
        assert torch.equal(layer.weight.dequantize(), torch.cat([p.dequantize() for p in parts]))
        assert torch.equal(layer(x), torch.cat([nn.QuantizedLinear(p)(x) for p in parts], -1))

    def test_formats_stay_apart(self):
        parts = [weight(8, 64), weight(4, 64), weight(3, 64, bits=8), torch.randn(5, 64)]
        bias = torch.randn(4)
        layer, x = nn.parallel(parts, [None, bias, None, None]), torch.randn(2, 64)
        assert [type(p) for p in layer.parts] == [nn.QuantizedLinear, nn.QuantizedLinear, nn.Linear]
        expected = [p.dequantize() if isinstance(p, QuantizedTensor) else p for p in parts]
        y = F.linear(x, torch.cat(expected), torch.cat([torch.zeros(8), bias, torch.zeros(8)]))
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-4)

    def test_concat_refuses(self):
        w = weight(4, 64)
        others = [weight(4, 32), weight(4, 64, group_size=64), weight(4, 64, bits=8), weight(4, 64, kind="zero")]
        for other in others:
            with pytest.raises(ValueError, match="weights"):
                concat([w, other])
        with pytest.raises(ValueError, match="weights"):
            concat([])

    def test_concat_compares_act_order(self):
        order = torch.arange(64, dtype=torch.int32) % 2
        w = weight(4, 64)
        a = QuantizedTensor(w.q, w.scale, 64, 32, g_idx=order)
        b = QuantizedTensor(w.q, w.scale, 64, 32, g_idx=order.flip(0))
        assert torch.equal(concat([a, a]).dequantize(), torch.cat([a.dequantize()] * 2))
        with pytest.raises(ValueError, match="weights"):
            concat([a, b])


class TestQuantizedEmbedding:
    @pytest.mark.parametrize("kind", ["symmetric", "zero", "offset"])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_rows(self, kind, bits):
        w = weight(20, 70, bits=bits, kind=kind)
        layer, ids = nn.QuantizedEmbedding(w), torch.tensor([[0, 19, 3], [3, 3, 7]])
        assert torch.equal(layer(ids), w.dequantize()[ids])

    def test_dtype_follows_to(self):
        layer = nn.QuantizedEmbedding(weight(20, 64)).to(torch.bfloat16)
        assert layer(torch.tensor([1])).dtype == layer.dtype == torch.bfloat16
        assert layer.scale.dtype == torch.float32
        assert set(layer.state_dict()) == {"q", "scale"}

    @pytest.mark.parametrize("bad", [-1, 20])
    def test_refuses_ids_out_of_range(self, bad):
        with pytest.raises(IndexError):
            nn.QuantizedEmbedding(weight(20, 64))(torch.tensor([0, bad]))


class TestRMSNorm:
    def test_is_torchs(self):
        ours, theirs, x = nn.RMSNorm(40, 1e-5), torch.nn.RMSNorm(40, 1e-5), torch.randn(3, 40)
        with torch.no_grad():
            ours.weight.copy_(torch.randn(40))
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))

    def test_default_eps_is_torchs(self):
        x = torch.randn(3, 8) * 1e-4
        torch.testing.assert_close(nn.RMSNorm(8)(x), torch.nn.RMSNorm(8)(x))

    def test_residual(self):
        norm, x, r = nn.RMSNorm(40), torch.randn(3, 40), torch.randn(3, 40)
        y, s = norm(x, r)
        assert torch.equal(s, x + r)
        torch.testing.assert_close(y, norm(x + r))

    def test_refuses(self):
        with pytest.raises(ValueError, match="normalized_shape"):
            nn.RMSNorm((4, 8))


class TestRotary:
    def test_tables(self):
        cos, sin = nn.RotaryEmbedding(6, theta=100.0).tables(9, "cpu")
        for p in (0, 1, 8):
            for i in range(3):
                angle = p * 100.0 ** (-2 * i / 6)
                assert abs(cos[p, i].item() - math.cos(angle)) < 1e-6
                assert abs(sin[p, i].item() - math.sin(angle)) < 1e-6

    def test_conventions_differ_by_a_permutation(self):
        x = torch.randn(2, 3, 7, 10)
        halves, pairs = nn.RotaryEmbedding(10)(x), nn.RotaryEmbedding(10, interleaved=True)
        order = torch.arange(10).view(2, 5).t().flatten()  # 0 5 1 6 ...
        torch.testing.assert_close(pairs(x[..., order]), halves[..., order])

    def test_scores_depend_on_distance_alone(self):
        rope, q, k = nn.RotaryEmbedding(16, theta=50.0), torch.randn(16), torch.randn(16)
        rq, rk = rope(q.expand(40, 16)), rope(k.expand(40, 16))
        torch.testing.assert_close(rq[5] @ rk[3], rq[39] @ rk[37], rtol=1e-4, atol=1e-4)

    def test_llama3_factors(self):
        factors = nn.llama3_factors(128, 5e5, factor=8, low_freq_factor=1, high_freq_factor=4, original_positions=8192)
        assert factors[0] == 1.0
        assert factors[-1] == 8.0
        assert list(factors) == sorted(factors)
        i = next(i for i, f in enumerate(factors) if 1 < f < 8)
        smooth = (8192 / (2 * math.pi * 5e5 ** (2 * i / 128)) - 1) / 3
        assert math.isclose(1 / factors[i], (1 - smooth) / 8 + smooth)

    def test_tables_grow_and_end(self):
        rope = nn.RotaryEmbedding(4, max_positions=300)
        early = rope.tables(10, "cpu")[0]
        late = rope.tables(300, "cpu")[0]
        assert late.shape == (300, 2)
        assert torch.equal(late[: len(early)], early)
        with pytest.raises(ValueError, match="context is 300"):
            rope.tables(301, "cpu")

    def test_refuses(self):
        with pytest.raises(ValueError, match="head_dim"):
            nn.RotaryEmbedding(5)
        with pytest.raises(ValueError, match="factors"):
            nn.RotaryEmbedding(8, factors=(1.0,))


def test_swiglu():
    layer, x = nn.SwiGLU(12, 20), torch.randn(2, 3, 12)
    gate, up = layer.gate_up(x).chunk(2, -1)
    torch.testing.assert_close(layer(x), layer.down(F.silu(gate) * up))


@pytest.mark.parametrize(
    "options", [{}, dict(qkv_bias=True, out_bias=True), dict(qk_norm=True), dict(window=3)], ids=str
)
def test_attention_cached_is_whole(options):
    torch.manual_seed(0)
    layer, rope = nn.Attention(24, 6, 2, 8, **options), nn.RotaryEmbedding(8, interleaved=True)
    x = torch.randn(2, 9, 24)
    cache = nn.PagedKVCache(12, 4, 1, 2, 8)
    with torch.inference_mode():
        whole = layer(x, rope)
        sequences = [cache.allocate(), cache.allocate()]
        batch = nn.PagedBatch.append(cache, sequences, [7, 4])
        got = layer(torch.cat((x[0, :7], x[1, :4])), rope, batch)
        torch.testing.assert_close(got, torch.cat((whole[0, :7], whole[1, :4])), rtol=1e-4, atol=1e-5)
        batch = nn.PagedBatch.append(cache, sequences, [1, 1])
        got = layer(torch.stack((x[0, 7], x[1, 4])), rope, batch)
        torch.testing.assert_close(got, torch.stack((whole[0, 7], whole[1, 4])), rtol=1e-4, atol=1e-5)


def test_attention_refuses():
    with pytest.raises(ValueError, match="num_kv_heads"):
        nn.Attention(8, 3, 2, 4)
    with pytest.raises(ValueError, match="window"):
        nn.Attention(8, 2, 2, 4, window=0)


def test_replaced_tensors_are_seen():
    layer, x = nn.QuantizedLinear(weight(8, 64), torch.randn(8)), torch.randn(2, 64)
    other = nn.QuantizedLinear(weight(8, 64), torch.randn(8))
    layer(x)
    assert torch.equal(torch.func.functional_call(layer, other.state_dict(), (x,)), other(x))
    layer.scale = other.scale
    assert torch.equal(layer.weight.scale, other.scale)


def test_layers_compile():
    layer = torch.nn.Sequential(nn.RMSNorm(64), nn.QuantizedLinear(weight(64, 64)), nn.SwiGLU(64, 32))
    x = torch.randn(3, 64)
    with torch.no_grad():
        want = layer(x)
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, want)
