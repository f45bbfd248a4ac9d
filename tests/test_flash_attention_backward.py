"""The native gradient of flash_attention: many tiles and blocks, every feature, any threads, linear memory."""

import resource

import pytest
import torch
from test_flash_attention import BAD_CU_SEQLENS, DTYPES, attend, combination, draw

from pyarch.native import Recorder
from pyarch.ops.flash_attention import flash_attention_reference

EXTRAS = ("sinks", "bias", "alibi_slopes")


def gradients(function, tensors, options, seed=0):
    """Of a weighted sum of out and lse with respect to q, k, v and the options that have one."""
    extras = {n: options[n].detach().requires_grad_() for n in EXTRAS if options.get(n) is not None}
    values = [t.detach().requires_grad_() for t in tensors]
    out, lse = function(*values, **options | extras, return_lse=True)
    random = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=random).to(tensors[0].dtype).to(x) for x in (out, lse)]
    found = torch.autograd.grad((out, lse), [*values, *extras.values()], weights)
    return dict(zip(("q", "k", "v", *extras), found, strict=True))


def native(tensors, options, seed=0):
    with Recorder() as ran:
        found = gradients(lambda *a, **o: attend(*a, **o, backend="cpu"), tensors, options, seed)
    assert [f.name() for f, _ in ran.calls] == [f"pyarch::flash_attention{n}__cpu" for n in ("", "_backward")]
    return found


def wide(options):
    return {n: x.double() if n in EXTRAS and x is not None else x for n, x in options.items()}


@pytest.mark.parametrize("sizes", [(20, 70), (130, 600)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_combinations_of_features(dtype, sizes):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for seed in range(100 if sizes[0] == 20 else 40):
        tensors, options = combination(seed, dtype, *sizes)
        truth = gradients(flash_attention_reference, [t.double() for t in tensors], wide(options), seed)
        for name, ours in native(tensors, options, seed).items():
            assert ours.dtype == dtype
            error, size = (ours.double() - truth[name]).abs().max(), truth[name].abs().max()
            assert error <= tolerance * (size + 0.1), f"seed {seed}, {name}: {error:.3g} of {size:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 3, 15, 16, 17, 40, 65, 127, 129, 257, 511, 512])
def test_head_sizes(dtype, d):
    tensors = draw(dtype, heads=3, kv_heads=1, rows=17, keys=70, d=d, dv=513 - d)
    truth = gradients(flash_attention_reference, [t.double() for t in tensors], {"causal": True})
    for name, ours in native(tensors, {"causal": True}).items():
        error = (ours.double() - truth[name]).abs().max() / truth[name].abs().max()
        assert error <= 10 * torch.finfo(dtype).eps, f"{name}: {error}"


BIASES = [(1, 1, 1, 700), (1, 1, 130, 1), (2, 1, 130, 700), (1, 4, 130, 700), (1, 1, 130, 700), (2, 4, 1, 700)]


@pytest.mark.parametrize("bias", BIASES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_threads_give_the_same_bits(dtype, packed, bias):
    """Several parts of dQ, and biases whose gradient several heads, rows or batches share."""
    batch = 1 if packed else 2
    tensors = draw(dtype, batch, heads=4, kv_heads=2, rows=130, keys=700, d=24)
    options = {"sinks": torch.randn(4), "alibi_slopes": torch.rand(4), "softcap": 3.0, "window": (400, 50)}
    options["bias"] = torch.randn(min(bias[0], batch), *bias[1:])
    if packed:
        cu = [[0, 60, 60, 130], [0, 300, 300, 700]]
        options |= {f"cu_seqlens_{x}": torch.tensor(c, dtype=torch.int32) for x, c in zip("qk", cu, strict=True)}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = native(tensors, options)
        for count in (2, 3):
            torch.set_num_threads(count)
            for name, other in native(tensors, options).items():
                assert torch.equal(one[name], other), f"{name} with {count} threads"
    finally:
        torch.set_num_threads(threads)


def test_memory_is_linear():
    """One head of 8,192 keys: the matrix of scores alone would be 256 MiB."""
    short = draw(torch.float32, heads=1, rows=300, d=32)
    native(short, {})
    tensors = draw(torch.float32, heads=1, rows=8192, d=32)
    options = {"mask": torch.ones(8192, dtype=torch.bool), "bias": torch.zeros(8192, 1), "sinks": torch.zeros(1)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    native(tensors, options)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 96 * 1024


def test_second_derivative_of_one_tensor_in_three_places():
    """q, k and v depend on each other, and the weights of the outputs on them."""
    x = torch.randn(1, 2, 7, 8)

    def second(function, x):
        x = x.requires_grad_()
        out = function(x, x * 2, x.sin(), causal=True)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (again,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        return first, again, *torch.autograd.grad(again.sin().sum(), x)

    ours = second(lambda *a, **o: attend(*a, **o, backend="cpu"), x.clone())
    for found, truth in zip(ours, second(flash_attention_reference, x.double()), strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item())


def test_only_what_is_asked():
    """A bias without a gradient costs none; a frozen k has none."""
    q, k, v = draw(torch.float32, rows=6, keys=9)
    attend(q, k, v.requires_grad_(), bias=torch.randn(9), backend="cpu").sum().backward()
    assert [x.grad is None for x in (q, k, v)] == [True, True, False]


def test_rows_without_keys_and_keys_without_rows():
    tensors = draw(torch.bfloat16, heads=2, rows=9, keys=300)
    found = native(tensors, {"mask": torch.zeros(300, dtype=torch.bool), "sinks": torch.randn(2)})
    assert not any(found[n].any() for n in "qkv")
    found = native(tensors, {"window": (0, 0)})
    assert not any(found[n][:, :, :-9].any() for n in "kv")


@pytest.mark.parametrize("cu", BAD_CU_SEQLENS, ids=str)
def test_values_of_cu_seqlens_are_checked(cu):
    q, k, v = draw(torch.float32, rows=3, keys=5)
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in cu)
    lse = torch.zeros(1, 2, 3)
    with pytest.raises((ValueError, RuntimeError), match=r"^cu_seqlens_[qk]:"):
        torch.ops.pyarch.flash_attention_backward__cpu(
            q, lse, q, lse, q, k, v, None, None, None, None, cu_q, cu_k, None, -1, -1, 0.0, 1.0, 0.0, False, False
        )
