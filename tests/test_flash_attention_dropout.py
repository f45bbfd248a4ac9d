"""Dropout in flash_attention: the generator against published numbers, the same weights on every backend, gradients."""

import math

import pytest
import torch
from test_flash_attention import DTYPES, attend, combination, draw
from test_flash_attention_backward import gradients, native, wide

from pyarch._instruments import same
from pyarch.ops import _dropout
from pyarch.ops.flash_attention import flash_attention_reference

VECTORS = [  # philox4x32 of Random123's known answers: rounds, counter, key, result
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def seed_of(number):
    return torch.tensor([number])


def words(text):
    return tuple(torch.tensor(int(w, 16)) for w in text.split())


@pytest.mark.parametrize(("rounds", "counter", "key", "result"), VECTORS)
def test_philox_is_the_published_one(rounds, counter, key, result):
    assert _dropout.philox(words(counter), words(key), rounds) == words(result)


def philox(counter, key):
    """Seven rounds in Python's integers."""
    (c0, c1, c2, c3), (k0, k1), m = counter, key, 2**32
    for _ in range(7):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b // m ^ c1 ^ k0, b % m, a // m ^ c3 ^ k1, a % m
        k0, k1 = (k0 + 0x9E3779B9) % m, (k1 + 0xBB67AE85) % m
    return c0, c1, c2, c3


def is_kept(seed, p, b, h, q, k):
    """The definition, for one weight."""
    number = philox((k // 32 * 4 + k // 2 % 4, q, h, b), (seed % 2**32, seed // 2**32 % 2**32))[k // 8 % 4]
    return (number >> 16 * (k % 2)) % 2**16 >= min(round(p * 65536), 65535)


def kept(backend, seed, p, batch, heads, rows, keys, kv_heads=1, dtype=torch.float32, device="cpu"):
    """The weights that a call keeps: with equal scores and one-hot values, 128 keys a call, out is them."""
    found = torch.empty(batch, heads, rows, keys, dtype=torch.bool)
    q, k = (torch.zeros(batch, h, n, 1, dtype=dtype, device=device) for h, n in ((heads, rows), (kv_heads, keys)))
    for j in range(0, keys, 128):
        v = torch.eye(keys, dtype=dtype, device=device)[:, j : j + 128].expand(batch, kv_heads, -1, -1)
        out = attend(q, k, v, dropout_p=p, seed=seed_of(seed).to(device), backend=backend).cpu()
        found[..., j : j + 128] = out > 0
        true = found[..., j : j + 128].double() / (1 - p) / keys
        torch.testing.assert_close(out.double(), true, rtol=4 * torch.finfo(dtype).eps, atol=0)
    return found


DRAWS = [(0, 0.1), (1, 0.5), (-1, 0.9), (2**63 - 1, 1e-5), (-(2**63), 0.999999), (0x1234567890ABCDEF, 0.3)]


@pytest.mark.parametrize("seed", [seed for seed, _ in DRAWS])
def test_reference_is_the_definition(seed):
    sizes, p = (2, 3, 4, 70), 0.3
    found = kept("reference", seed, p, *sizes)
    for b, h, q, k in torch.cartesian_prod(*map(torch.arange, sizes)).tolist():
        assert found[b, h, q, k] == is_kept(seed, p, b, h, q, k), (b, h, q, k)


@pytest.mark.forward
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 6, 17, 33), (3, 2, 49, 70), (1, 2, 3, 530)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_drops_what_the_reference_drops(dtype, sizes):
    for seed, p in DRAWS:
        kv_heads = 2 if sizes[1] == 6 else 1
        assert torch.equal(*(kept(b, seed, p, *sizes, kv_heads, dtype) for b in ("cpu", "reference")))


@pytest.mark.forward
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (40, 3)}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_lose_the_same_weights_padded_and_packed(dtype, options):
    """Bitwise. A batch of their largest sizes keeps the weights that each one, packed, keeps."""
    lengths = [(5, 130), (70, 70), (0, 20), (1, 300), (33, 40)]
    options = options | {"dropout_p": 0.4, "seed": seed_of(7), "return_lse": True, "backend": "cpu"}
    q, k, v = draw(dtype, batch=5, heads=6, kv_heads=2, rows=70, keys=300, d=24)
    cu = [torch.tensor([0, *torch.tensor(lengths)[:, i].cumsum(0).tolist()], dtype=torch.int32) for i in range(2)]
    together = [
        torch.cat([t[n : n + 1, :, : s[of]] for n, s in enumerate(lengths)], 2) for t, of in ((q, 0), (k, 1), (v, 1))
    ]
    out, lse = attend(*together, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], **options)
    for n, (rows, keys) in enumerate(lengths):
        alone = attend(q[:, :, :rows], k[:, :, :keys], v[:, :, :keys], **options)
        for found, true in zip((out, lse), alone, strict=True):
            assert same(found[0, :, cu[0][n] : cu[0][n + 1]], true[n])


def test_statistics():
    """The share of kept weights, and of kept pairs next to each other in every dimension, within five deviations."""
    b, q, k = torch.arange(4)[:, None], torch.arange(64), torch.arange(256)
    for p in (0.1, 0.5, 0.83):
        found = _dropout.kept(seed_of(3), p, b, 8, q, k).double()
        near = lambda share, n, true: abs(share - true) < 5 * math.sqrt(true * (1 - true) / n)
        assert near(found.mean(), found.numel(), 1 - p)
        for dim in range(4):
            for step in (1, 2, 8):
                if step < found.shape[dim]:
                    pairs = found.narrow(dim, step, found.shape[dim] - step) * found.narrow(
                        dim, 0, found.shape[dim] - step
                    )
                    # pairs overlap, so that their mean varies up to three times as much
                    assert near(pairs.mean(), pairs.numel() / 3, (1 - p) ** 2), (p, dim, step)
        for other in (4, 3 + 2**32):
            both = found * _dropout.kept(seed_of(other), p, b, 8, q, k)
            assert near(both.mean(), both.numel(), (1 - p) ** 2)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_is_attention_with_that_mask(backend):
    """Against the formula by hand, with a sink: it is not dropped, and lse is as without."""
    q, k, v = draw(torch.float64 if backend == "reference" else torch.float32, heads=4, kv_heads=2, rows=20, keys=50)
    sinks, p = torch.randn(4).to(q), 0.25
    out, lse = attend(q, k, v, sinks=sinks, dropout_p=p, seed=seed_of(5), return_lse=True, backend=backend)
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)) * 8**-0.5
    weights = torch.cat((scores, sinks[:, None, None].expand(1, 4, 20, 1)), -1).softmax(-1)[..., :-1]
    keep = torch.tensor([[[is_kept(5, p, 0, h, i, j) for j in range(50)] for i in range(20)] for h in range(4)])
    torch.testing.assert_close(out, (weights * keep / (1 - p)) @ v.repeat_interleave(2, 1))
    assert same(lse, attend(q, k, v, sinks=sinks, return_lse=True, backend=backend)[1])


@pytest.mark.forward
@pytest.mark.parametrize("dtype", DTYPES)
def test_combinations_of_features(dtype):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for seed in range(60):
        tensors, options = combination(seed, dtype)
        options |= {"dropout_p": (0.1, 0.5)[seed % 2], "seed": seed_of(seed), "return_lse": True}
        truth = flash_attention_reference(*(t.double() for t in tensors), **options)
        for ours, true in zip(attend(*tensors, **options, backend="cpu"), truth, strict=True):
            torch.testing.assert_close(ours.double(), true.double(), rtol=tolerance, atol=tolerance, msg=f"seed {seed}")


@pytest.mark.parametrize("sizes", [(20, 70), (130, 600)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_combinations(dtype, sizes):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for seed in range(40 if sizes[0] == 20 else 15):
        tensors, options = combination(seed, dtype, *sizes)
        options |= {"dropout_p": (0.1, 0.5)[seed % 2], "seed": seed_of(seed)}
        truth = gradients(flash_attention_reference, [t.double() for t in tensors], wide(options), seed)
        peer = gradients(flash_attention_reference, tensors, options, seed)
        for name, ours in native(tensors, options, seed).items():
            error, theirs = ((x.double() - truth[name]).abs().max() for x in (ours, peer[name]))
            allowed = max(1.5 * theirs, tolerance * (truth[name].abs().max() + 0.1))
            assert error <= allowed, f"seed {seed}, {name}: {error:.3g}, PyTorch's {theirs:.3g}"


@pytest.mark.forward
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_dropout_a_seed_changes_nothing(dtype):
    tensors = draw(dtype, heads=4, kv_heads=2, rows=40, keys=90, d=24)
    for options in ({}, {"causal": True}):
        before, after = native(tensors, options), native(tensors, options | {"dropout_p": 0.0, "seed": seed_of(3)})
        assert all(same(before[name], after[name]) for name in before)
        assert same(attend(*tensors, **options), attend(*tensors, **options, dropout_p=0, seed=seed_of(3)))


@pytest.mark.forward
def test_threads_give_the_same_bits():
    tensors = draw(torch.bfloat16, heads=4, kv_heads=2, rows=130, keys=700, d=24)
    options = {"dropout_p": 0.3, "seed": seed_of(3), "causal": True}
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append({"out": attend(*tensors, **options, backend="cpu"), **native(tensors, options)})
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(same(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_seed_is_drawn_from_torchs_generator(backend):
    tensors = draw(torch.float32, rows=9, keys=30)
    call = lambda: attend(*tensors, dropout_p=0.5, backend=backend)
    torch.manual_seed(11)
    first, second = call(), call()
    torch.manual_seed(11)
    assert torch.equal(call(), first)
    assert not torch.equal(first, second)
    before = torch.get_rng_state()
    attend(*tensors, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("p", [-0.1, 1.0, math.nan, math.inf, "half", None])
def test_a_wrong_probability_is_refused(p):
    with pytest.raises(ValueError, match="^dropout_p:"):
        attend(*draw(torch.float32), dropout_p=p)


def test_operators_refuse_what_they_cannot_use():
    q, k, v = draw(torch.float32)
    lse, none = torch.zeros(q.shape[:3]), [None] * 6
    for p, seed, name in [
        (math.nan, seed_of(1), "dropout_p"), (1.0, seed_of(1), "dropout_p"), (-0.1, seed_of(1), "dropout_p"),
        (0.5, None, "seed"), (0.5, torch.zeros(2, dtype=torch.int64), "seed"), (0.5, torch.zeros(1), "seed"),
        (0.5, torch.zeros(0, dtype=torch.int64), "seed"), (0.0, torch.zeros(1, dtype=torch.int32), "seed"),
    ]:  # fmt: skip
        with pytest.raises((ValueError, RuntimeError), match=f"^{name}:"):
            torch.ops.pyarch.flash_attention__cpu(q, k, v, *none, seed, -1, -1, 0.0, 1.0, p)
        with pytest.raises((ValueError, RuntimeError), match=f"^{name}:"):
            torch.ops.pyarch.flash_attention_backward__cpu(
                q, lse, q, lse, q, k, v, *none, seed, -1, -1, 0.0, 1.0, p, False, False
            )
