"""Dropout in Triton's flash_attention: the weights that every backend drops; interpreted, or on the GPU."""

import pytest
import torch
from test_flash_attention import DTYPES, attend, combination, draw
from test_flash_attention_dropout import DRAWS, kept, seed_of

import pyarch
from pyarch import arch, native
from pyarch._instruments import same
from pyarch.ops.flash_attention import flash_attention_reference

if pyarch.backends()["triton"]:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]

from test_triton_flash_attention_backward import check as check_gradients  # noqa: E402

from pyarch.kernels import flash_attention as kernel  # noqa: E402

DEVICE = "cpu" if arch.interpreting() else "cuda"


@pytest.mark.parametrize(("seed", "p"), DRAWS)
def test_drops_what_the_reference_drops(seed, p):
    for sizes, dtype in (((1, 1, 1, 1), DTYPES[2]), ((2, 6, 17, 33), DTYPES[0]), ((1, 1, 70, 75), DTYPES[1])):
        kv_heads = 2 if sizes[1] == 6 else 1
        found = (
            kept(b, seed, p, *sizes, kv_heads, dtype, device=d) for b, d in (("triton", DEVICE), ("reference", "cpu"))
        )
        assert torch.equal(*found)


@pytest.mark.parametrize("keys", [16, 32, 64, 128])
def test_tiles_of_any_size(keys):
    """A tile of 16 keys takes half of a call's numbers."""
    config = kernel.Config(16, keys, 16, 4, 1)
    sizes, p = (1, 1, 20, 2 * keys + 9), 0.4
    q, k = torch.zeros(1, 1, 20, 16, device=DEVICE), torch.zeros(1, 1, sizes[3], 16, device=DEVICE)
    found = []
    for j in range(0, sizes[3], 256):
        v = torch.eye(sizes[3], device=DEVICE)[None, None, :, j : j + 256]
        out, lse = q.new_empty(1, 1, 20, v.shape[3]), q.new_empty(1, 1, 20)
        seed = seed_of(3).to(DEVICE)
        kernel.launch(config, out, lse, q, k, v, *[None] * 6, seed, -1, -1, 0.0, 1.0, p)
        found.append(out.cpu() > 0)
    assert torch.equal(torch.cat(found, 3), kept("reference", 3, p, *sizes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combinations_of_features(dtype):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for seed in range(12):
        tensors, options = combination(seed, dtype)
        options |= {"dropout_p": (0.1, 0.5)[seed % 2], "seed": seed_of(seed), "return_lse": True}
        truth = flash_attention_reference(*(t.double() for t in tensors), **options)
        here = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
        got = attend(*(t.to(DEVICE) for t in tensors), **here, backend="triton")
        for ours, true in zip(got, truth, strict=True):
            torch.testing.assert_close(
                ours.double().cpu(), true.double(), rtol=tolerance, atol=tolerance, msg=f"seed {seed}"
            )


def test_sequences_lose_the_same_weights_padded_and_packed():
    lengths = [(5, 40), (0, 3), (30, 30), (1, 50)]
    options = {"dropout_p": 0.4, "seed": seed_of(7).to(DEVICE), "causal": True, "return_lse": True, "backend": "triton"}
    q, k, v = draw(torch.bfloat16, batch=4, heads=2, kv_heads=1, rows=30, keys=50, d=16, device=DEVICE)
    ends = [[0, *torch.tensor(lengths)[:, i].cumsum(0).tolist()] for i in range(2)]
    cu = [torch.tensor(e, dtype=torch.int32, device=DEVICE) for e in ends]
    parts = [
        torch.cat([t[n, :, : s[of]] for n, s in enumerate(lengths)], 1)[None] for t, of in ((q, 0), (k, 1), (v, 1))
    ]
    together = attend(*parts, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], **options)
    for n, (rows, keys) in enumerate(lengths):
        alone = attend(q[:, :, :rows], k[:, :, :keys], v[:, :, :keys], **options)
        for found, true in zip(together, alone, strict=True):
            assert same(found[0, :, ends[0][n] : ends[0][n + 1]], true[n])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype):
    """Of every argument, by the native kernels: with the weights that the reference drops."""
    for seed in range(12):
        (q, k, v), options = combination(seed, dtype, most_rows=40)
        dropout = {"dropout_p": (0.1, 0.5)[seed % 2], "seed": seed_of(seed)}
        check_gradients({"q": q, "k": k, "v": v} | options | dropout, f"seed {seed}")


def test_without_dropout_a_seed_changes_nothing():
    tensors = draw(torch.bfloat16, heads=2, rows=40, keys=70, d=16, device=DEVICE)
    plain = attend(*tensors, causal=True, backend="triton")
    assert same(plain, attend(*tensors, causal=True, dropout_p=0.0, seed=seed_of(3).to(DEVICE), backend="triton"))


def test_operator_refuses_what_it_cannot_use():
    q, k, v = draw(torch.float16, device=DEVICE)
    call, seed = native.operator("flash_attention", "triton"), seed_of(1).to(DEVICE)
    for p, given, name in [
        (float("nan"), seed, "dropout_p"), (1.0, seed, "dropout_p"), (-0.1, seed, "dropout_p"), (0.5, None, "seed"),
        (0.5, seed.expand(2), "seed"), (0.5, seed.int(), "seed"), (0.0, seed[:0], "seed"),
    ]:  # fmt: skip
        with pytest.raises((ValueError, RuntimeError), match=f"^{name}:"):
            call(q, k, v, *[None] * 6, given, -1, -1, 0.0, 1.0, p)
