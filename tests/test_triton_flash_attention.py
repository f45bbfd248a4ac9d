"""flash_attention in Triton: interpreted on CPU tensors (TRITON_INTERPRET=1), or on the GPU where there is one."""

import itertools
import math

import pytest
import torch
from test_flash_attention import (
    BAD_CU_SEQLENS,
    DTYPES,
    attend,
    combination,
    draw,
    nan_and_infinity_stay_in_their_row,
)

import pyarch
from pyarch import arch, native
from pyarch._instruments import assert_close, same
from pyarch.ops.flash_attention import CASES, flash_attention_reference
from pyarch.testing import Sample, checks

if pyarch.backends()["triton"]:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]

from pyarch.kernels import flash_attention as kernel  # noqa: E402

DEVICE = "cpu" if arch.interpreting() else "cuda"


def samples(dtype, device):
    """Few and small, each with several features: the interpreter takes 10 ms a tile. What each argument may be is in
    test_flash_attention, whose samples run here too where there is a GPU."""

    def normal(*shape, like=dtype):
        return torch.randn(*shape, dtype=like, device=device)

    def sample(name, options=None, **sizes):
        return Sample(name, draw(dtype, device=device, **sizes), {"return_lse": True} | (options or {}))

    yield sample("odd head sizes, gqa 3", {"causal": True}, heads=3, kv_heads=1, rows=19, keys=67, d=33, dv=47)
    yield sample("softcap, sinks, window", {"softcap": 2.0, "sinks": normal(2), "window": (9, 3)}, rows=40, keys=70)
    bias, keep = normal(2, 1, 30), torch.rand(1, 1, 9, 30, device=device) > 0.4
    yield sample("bias, mask", {"bias": bias, "mask": keep}, rows=9, keys=30)
    slopes = normal(2, 2, like=torch.float32).abs()
    yield sample("alibi, negative scale", {"alibi_slopes": slopes, "scale": -0.3}, batch=2, rows=9)
    cu = [torch.tensor(c, dtype=torch.int32, device=device) for c in ([0, 3, 3, 11], [0, 5, 9, 20])]
    packed = {"cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1], "causal": True}
    yield sample("packed", packed | {"alibi_slopes": normal(3, 2).abs(), "sinks": normal(2)}, rows=11, keys=20)
    yield sample("no keys", {"sinks": normal(2)}, keys=0)
    yield sample("no key kept", {"causal": True, "return_lse": False}, rows=9, keys=4)  # a difference of -inf is NaN
    yield sample("no rows", rows=0, keys=3)
    yield sample("no heads", heads=0)
    yield sample("a head of 256", {"causal": True}, heads=1, rows=5, keys=20, d=256, dv=16)
    yield sample("a head of 257", heads=1, d=257)  # outside LIMITS: must be refused
    yield sample("a value head of 300", heads=1, dv=300)


SUITE = [
    c
    for c in checks(
        attend, samples, gradients=("q", "k", "v", "sinks", "bias", "alibi_slopes"),
        keep_layout=("cu_seqlens_q", "cu_seqlens_k"), floor=2.0,
    )
    if c.backend == "triton" and (c.part != "operator" or c.dtype == torch.bfloat16)  # memory safety knows no dtype
]  # fmt: skip


@pytest.mark.parametrize("check", SUITE, ids=str)
def test_suite(check):
    check()


def every_config():
    """What config_for gives, for every dtype, head size and kind of call, each with a dtype that it is for."""
    kinds = itertools.product((1, 4096), (16, 64, 128, 256), DTYPES, (80, 90), *[(False, True)] * 3)
    return sorted({kernel.config_for(*kind): kind[2] for kind in kinds}.items(), key=str)


@pytest.mark.parametrize(("config", "dtype"), every_config(), ids=str)
def test_configs(config, dtype):
    """Each config is right on lengths that its tiles do not fit, writes all of out, and gives the same bits again."""
    rows, keys = config.block_m + 5, 3 * config.block_n + 7
    q, k, v = draw(dtype, heads=1, rows=rows, keys=keys, d=config.block_d + 8 * (dtype == torch.float32), device=DEVICE)
    for left, right, scale in ((-1, 0, -0.1), (config.block_n, config.block_n // 2, 0.2)):
        results = []
        for _ in range(2):
            out, lse = torch.full_like(q, math.nan), torch.full(q.shape[:3], math.nan, device=DEVICE)
            results.append(kernel.launch(config, out, lse, q, k, v, *[None] * 7, left, right, 0.0, scale, 0.0))
        assert all(map(same, *results))
        options = {"window": (left, right), "scale": scale, "return_lse": True}
        truth = flash_attention_reference(q.double(), k.double(), v.double(), **options)
        peer = flash_attention_reference(q, k, v, **options)
        for got, true, theirs in zip(results[0], truth, peer, strict=True):
            assert_close(f"{config} {left} {right}", got, true, theirs, floor=2.0)


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    """The room's real shapes, with fewer heads and rows; their keys are whole tiles and a rest."""
    case = CASES[name]
    group = case["heads"] // case["kv_heads"]
    q, k, v = draw(torch.bfloat16, heads=group, kv_heads=1, rows=70, keys=200, d=case["head_dim"], device=DEVICE)
    options = {"causal": case["causal"], "return_lse": True}
    truth = flash_attention_reference(q.double(), k.double(), v.double(), **options)
    peer = flash_attention_reference(q, k, v, **options)
    for got, true, theirs in zip(attend(q, k, v, **options, backend="triton"), truth, peer, strict=True):
        assert_close(name, got, true, theirs, floor=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combinations_of_features(dtype):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for seed in range(30):
        tensors, options = combination(seed, dtype)
        truth = flash_attention_reference(*(t.double() for t in tensors), **options, return_lse=True)
        here = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
        got = attend(*(t.to(DEVICE) for t in tensors), **here, return_lse=True, backend="triton")
        for ours, true in zip(got, truth, strict=True):
            torch.testing.assert_close(
                ours.double().cpu(), true.double(), rtol=tolerance, atol=tolerance, msg=f"seed {seed}"
            )


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (40, 3)}], ids=str)
def test_sequences_are_the_same_alone_and_packed(options):
    """Bitwise, also with more sequences than are looked at together and with empty ones."""
    lengths = [(5, 130), (0, 3), (60, 60), (4, 0), (1, 90)]
    parts = [draw(torch.bfloat16, heads=1, rows=n, keys=m, d=16, device=DEVICE) for n, m in lengths]
    alone = [attend(*p, **options, return_lse=True, backend="triton") for p in parts]
    together = [torch.cat([p[i] for p in parts], 2) for i in range(3)]
    for empty in (0, 260 * options.get("causal", 0)):
        ends = [torch.tensor(lengths)[:, i].cumsum(0).tolist() for i in range(2)]
        cu = [torch.tensor([0] * (empty + 1) + e, dtype=torch.int32, device=DEVICE) for e in ends]
        packed = {"cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1]}
        out, lse = attend(*together, **packed, **options, return_lse=True, backend="triton")
        assert same(out, torch.cat([o for o, _ in alone], 2))
        assert same(lse, torch.cat([x for _, x in alone], 2))


@pytest.mark.parametrize("cu", BAD_CU_SEQLENS, ids=str)
def test_wrong_cu_seqlens_give_nan(cu):
    """The kernel does not wait for lengths, so it cannot refuse them; fewer than one sequence is seen in the shape."""
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32, device=DEVICE) for c in cu)
    tensors = draw(torch.float16, rows=3, keys=5, device=DEVICE)
    if not len(cu_q):
        with pytest.raises(ValueError, match="^cu_seqlens_q:"):
            attend(*tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, backend="triton")
        return
    for result in attend(*tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, backend="triton"):
        assert result.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uniform_and_saturated_scores_are_exact(dtype):
    """Equal scores average; one score far above the others selects, even where exp would overflow."""
    q, k = (torch.zeros(1, 1, n, 16, dtype=dtype, device=DEVICE) for n in (3, 64))
    v = torch.randint(-4, 5, (1, 1, 64, 16), device=DEVICE).to(dtype)
    want = v.double().mean(2, keepdim=True).expand(1, 1, 3, 16).to(dtype)
    assert torch.equal(attend(q, k, v, backend="triton"), want)
    k[0, 0, 37] = 1
    out, lse = attend(q + 100, k, v, scale=100.0, return_lse=True, backend="triton")
    assert torch.equal(out, v[:, :, 37:38].expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 160000.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_reach_their_row_and_no_other(dtype):
    nan_and_infinity_stay_in_their_row(dtype, "triton", DEVICE)


def test_operator_refuses_what_it_cannot_compute():
    q, k, v = draw(torch.float16, heads=4, kv_heads=2, rows=3, keys=5, device=DEVICE)
    cu = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    sinks, scores = q.new_zeros(4), q.new_zeros(1, 4, 3, 5)
    good = dict(q=q, k=k, v=v, sinks=sinks, bias=scores, mask=scores == 0, slopes=sinks, cu_q=None, cu_k=None,
                seed=None, left=-1, right=-1, softcap=0.0, scale=1.0, dropout_p=0.0)  # fmt: skip
    call = native.operator("flash_attention", "triton")
    call(*good.values())
    for name, value in [
        ("q", q.double()), ("q", q[0]), ("q", q[..., :4]), ("q", q[:, :3]), ("q", q.new_zeros(1, 4, 3, 257)),
        ("k", k[:, :1]), ("k", k[..., :4]), ("k", k.float()), ("k", k.expand(2, 2, 5, 8)),
        ("v", v[:, :1]), ("v", v[:, :, :4]), ("v", v.new_zeros(1, 2, 5, 257)),
        ("sinks", sinks[:3]), ("sinks", sinks.double()), ("bias", scores[..., :4]), ("bias", scores[0]),
        ("mask", scores), ("mask", scores[:, :1] == 0), ("slopes", sinks[:3]), ("slopes", sinks[None, None]),
        ("cu_q", cu), ("cu_k", cu),
    ]:  # fmt: skip
        with pytest.raises((ValueError, RuntimeError)):
            call(*(good | {name: value}).values())
