"""flash_attention: the suite, the reference against torch and a loop, and what a kernel in tiles could get wrong."""

import math
import random
import resource

import pytest
import torch
import torch.nn.functional as F

import pyarch
from pyarch._instruments import same
from pyarch.ops.flash_attention import CASES, flash_attention_reference
from pyarch.testing import Refused, Sample, checks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
attend = pyarch.flash_attention


def draw(dtype, batch=1, heads=2, kv_heads=None, rows=5, keys=None, d=8, dv=None, device="cpu"):
    """q, k, v of the given sizes."""
    kv_heads, keys = heads if kv_heads is None else kv_heads, rows if keys is None else keys
    shapes = (batch, heads, rows, d), (batch, kv_heads, keys, d), (batch, kv_heads, keys, dv or d)
    return tuple(torch.randn(*shape, dtype=dtype, device=device) for shape in shapes)


def samples(dtype, device):
    def sample(name, options=None, exact=False, **sizes):
        return Sample(name, draw(dtype, device=device, **sizes), options or {}, exact)

    def normal(*shape, like=dtype):
        return torch.randn(*shape, dtype=like, device=device)

    yield sample("plain")
    yield sample("causal, gqa 3", {"causal": True, "return_lse": True}, heads=6, kv_heads=2, rows=37, d=16)
    yield sample("one of each", heads=1, rows=1, d=1)
    yield sample("odd head sizes", {"return_lse": True}, batch=2, rows=19, keys=67, d=33, dv=47)
    yield sample("more rows than keys", {"causal": True}, rows=9, keys=4)
    yield sample("window", {"window": (3, 2), "return_lse": True}, rows=21, keys=30)
    yield sample("softcap", {"softcap": 2.0, "return_lse": True}, rows=9, keys=30)
    yield sample("sinks", {"sinks": normal(8), "window": (2, 0), "return_lse": True}, heads=8, rows=9, keys=6)
    # Biases of many elements: the largest error of a few is chance. None the same for all keys: its gradient is
    # cancellation alone.
    yield sample("bias", {"bias": normal(2, 1, 30), "return_lse": True}, batch=3, rows=12, keys=30)
    yield sample("float32 bias", {"bias": normal(1, 2, 12, 30, like=torch.float32)}, batch=3, rows=12, keys=30)
    keep = torch.rand(3, 1, 5, 9, device=device) > 0.4
    yield sample("mask", {"mask": keep, "return_lse": True}, batch=3, keys=9)
    yield sample("no key kept", {"mask": keep[:1, :, :, :1] & False}, batch=3, keys=9)
    yield sample("alibi", {"alibi_slopes": normal(3, 8).abs(), "scale": -0.3}, batch=3, heads=8, keys=9)
    cu = [torch.tensor(c, dtype=torch.int32, device=device) for c in ([0, 3, 3, 11], [0, 5, 9, 20])]
    packed = {"cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1], "causal": True, "return_lse": True}
    yield sample("packed", packed, heads=4, kv_heads=2, rows=11, keys=20)
    slopes = {"alibi_slopes": normal(3, 4).abs(), "bias": normal(1, 20), "mask": torch.rand(20, device=device) > 0.2}
    yield sample("packed with slopes", packed | slopes, heads=4, kv_heads=2, rows=11, keys=20)
    yield sample("no keys", {"sinks": normal(2), "return_lse": True}, keys=0)
    yield sample("no rows", rows=0, keys=3)
    yield sample("no batch", batch=0)
    yield sample("no heads", heads=0)
    yield sample("several blocks", {"return_lse": True}, heads=4, kv_heads=2, rows=70, keys=200, d=64)
    yield sample("large head", {"causal": True}, heads=1, rows=50, keys=90, d=512, dv=320)
    for name, case in CASES.items():
        sizes = {n: case[n] for n in ("batch", "kv_heads")} | {"d": case["head_dim"]}
        yield sample(name, {"causal": case["causal"]}, heads=2 * case["kv_heads"], rows=10, keys=75, **sizes)
    thin = {"dropout_p": 0.4, "seed": torch.tensor([-3], device=device), "return_lse": True}
    yield sample("dropout", thin | {"causal": True, "sinks": normal(4)}, heads=4, kv_heads=2, rows=20, keys=70)
    yield sample("packed with dropout", thin | packed | {"softcap": 2.0}, heads=4, kv_heads=2, rows=11, keys=20)


def refused():
    q, k, v = draw(torch.float32, heads=4, kv_heads=2, rows=3, keys=5)
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in ([0, 1, 3], [0, 2, 5]))
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}

    def case(name, argument, error=ValueError, q=q, k=k, v=v, **options):
        return Refused(name, error, argument, (q, k, v), options)

    yield case("three dimensions", "q", q=q[0])
    yield case("integers", "q", TypeError, q=q.int())
    yield case("another dtype", "k", TypeError, k=k.half())
    yield case("another dtype", "v", TypeError, v=v.half())
    yield case("heads that do not divide", "k", k=k[:, :1].expand(1, 3, 5, 8), v=v[:, :1].expand(1, 3, 5, 8))
    yield case("no key heads", "k", k=k[:, :0], v=v[:, :0])
    yield case("another head size", "k", k=k[..., :4])
    yield case("another batch", "k", k=k.expand(2, 2, 5, 8), v=v.expand(2, 2, 5, 8))
    yield case("another length", "v", v=v[:, :, :4])
    yield case("other heads", "v", v=v[:, :1])
    yield case("an empty head", "q", q=q[..., :0], k=k[..., :0])
    yield case("an empty head", "v", v=v[..., :0])
    yield case("a head of 513", "backend", q=q.new_zeros(1, 1, 2, 513), k=q.new_zeros(1, 1, 2, 513),
               v=q.new_zeros(1, 1, 2, 8), backend="cpu")  # fmt: skip
    yield case("a value head of 513", "backend", v=v.new_zeros(1, 2, 5, 513), backend="cpu")
    for window in (3, (1,), (1, -2), (0.5, 1), "ab"):
        yield case(f"window {window}", "window", window=window)
    for softcap in (-1.0, math.inf, math.nan):
        yield case(f"softcap {softcap}", "softcap", softcap=softcap)
    yield case("infinite scale", "scale", scale=math.inf)
    for p in (-0.1, 1.0, math.nan):
        yield case(f"dropout {p}", "dropout_p", dropout_p=p)
    yield case("two seeds", "seed", dropout_p=0.5, seed=torch.tensor([1, 2]))
    yield case("a seed of another dtype", "seed", TypeError, seed=torch.tensor([1], dtype=torch.int32))
    yield case("too few sinks", "sinks", sinks=torch.zeros(3))
    yield case("integer sinks", "sinks", TypeError, sinks=torch.zeros(4, dtype=torch.int32))
    yield case("too long a bias", "bias", bias=torch.zeros(3, 6))
    yield case("a bias of five dimensions", "bias", bias=torch.zeros(1, 1, 1, 3, 5))
    yield case("a bias of another dtype", "bias", TypeError, bias=torch.zeros(3, 5).half())
    yield case("a mask of numbers", "mask", TypeError, mask=torch.zeros(3, 5))
    yield case("too long a mask", "mask", mask=torch.zeros(3, 6, dtype=torch.bool))
    yield case("slopes of another batch", "alibi_slopes", alibi_slopes=torch.zeros(2, 4))
    yield case("too few slopes", "alibi_slopes", alibi_slopes=torch.zeros(3))
    yield case("cu_seqlens of q alone", "cu_seqlens_q", cu_seqlens_q=cu_q)
    yield case("cu_seqlens in int64", "cu_seqlens_q", TypeError, **packed | {"cu_seqlens_q": cu_q.long()})
    yield case("cu_seqlens of other lengths", "cu_seqlens_k", **packed | {"cu_seqlens_k": cu_k[:2]})
    yield case("cu_seqlens with a batch", "q", q=q.expand(2, 4, 3, 8), k=k.expand(2, 2, 5, 8),
               v=v.expand(2, 2, 5, 8), **packed)  # fmt: skip
    yield case("slopes of other sequences", "alibi_slopes", alibi_slopes=torch.zeros(1, 4), **packed)


# floor 2: gradients of sinks and slopes have few elements, in which single roundings decide
SUITE = checks(
    attend, samples, gradients=("q", "k", "v", "sinks", "bias", "alibi_slopes"), refused=refused,
    keep_layout=("cu_seqlens_q", "cu_seqlens_k"), floor=2.0,
)  # fmt: skip


@pytest.mark.parametrize("check", SUITE, ids=str)
def test_suite(check):
    check()


BAD_CU_SEQLENS = [
    ([1, 3], [0, 5]), ([0, 2], [0, 5]), ([0, 3], [0, 6]), ([0, 3], [0, -5]), ([], []),
    ([0, 2, 1, 3], [0, 1, 2, 5]), ([0, 1, 2, 3], [0, 2**31 - 1, 2, 5]),
]  # fmt: skip


@pytest.mark.parametrize("cu", BAD_CU_SEQLENS, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_values_of_cu_seqlens_are_checked(cu, backend):
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in cu)
    with pytest.raises(ValueError, match=r"^cu_seqlens_[qk]:"):
        attend(*draw(torch.float32, rows=3, keys=5), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, backend=backend)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reference_is_torchs(dtype, causal):
    q, k, v = draw(dtype, batch=2, heads=6, kv_heads=2, rows=33, d=16, dv=24)
    bias = torch.randn(2, 1, 33, 33, dtype=dtype)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(flash_attention_reference(q, k, v, causal=causal), theirs)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True, scale=0.3)
    torch.testing.assert_close(flash_attention_reference(q, k, v, bias=bias, scale=0.3), theirs)


def loop(q, k, v, *, causal, window, softcap, scale, sinks, bias, mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k):
    """The formula in Python floats, key by key."""
    batch, heads, rows, d = q.shape
    out = torch.zeros(batch, heads, rows, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, rows), -math.inf, dtype=torch.float64)
    if cu_seqlens_q is None:
        spans = [(b, 0, rows, 0, k.shape[2]) for b in range(batch)]
    else:
        cu_q, cu_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        spans = [(0, *cu_q[n : n + 2], *cu_k[n : n + 2]) for n in range(len(cu_q) - 1)]
    for n, (b, q0, q1, k0, k1) in enumerate(spans):
        for h in range(heads):
            g = h * k.shape[1] // heads
            for i in range(q0, q1):
                logits = [] if sinks is None else [(sinks[h].item(), None)]
                own = (i - q0) + (k1 - k0) - (q1 - q0)
                for j in range(k0, k1):
                    away = (j - k0) - own
                    if window is not None and (-1 < window[0] < -away or -1 < window[1] < away):
                        continue
                    if (causal and away > 0) or (
                        mask is not None and not mask.expand(batch, heads, rows, k.shape[2])[b, h, i, j]
                    ):
                        continue
                    s = torch.dot(q[b, h, i], k[b, g, j]).item() * (d**-0.5 if scale is None else scale)
                    s = softcap * math.tanh(s / softcap) if softcap else s
                    s += 0.0 if bias is None else bias.expand(batch, heads, rows, k.shape[2])[b, h, i, j].item()
                    if alibi_slopes is not None:
                        s -= alibi_slopes.expand(len(spans), heads)[n, h].item() * abs(away)
                    logits.append((s, v[b, g, j]))
                if logits:
                    top = max(s for s, _ in logits)
                    total = sum(math.exp(s - top) for s, _ in logits)
                    lse[b, h, i] = top + math.log(total)
                    for s, value in logits:
                        if value is not None:
                            out[b, h, i] += math.exp(s - top) / total * value
    return out, lse


def combination(seed, dtype=torch.float64, most_rows=20, most_keys=70):
    """Random sizes and a random combination of features."""
    r = random.Random(seed)
    chance = lambda p: r.random() < p
    packed = chance(0.4)
    batch, kv_heads = 1 if packed else r.randint(1, 2), r.randint(1, 2)
    heads = kv_heads * r.choice((1, 2, 3))
    rows, keys = r.choice((1, 3, 7, most_rows)), r.choice((1, 2, 9, 33, most_keys))
    q, k, v = draw(dtype, batch, heads, kv_heads, rows, keys, r.choice((1, 5, 16)), r.choice((1, 8, 19)))
    shape = lambda: [r.choice((1, n)) for n in (batch, heads, rows, keys)][r.randint(0, 3) :]
    cuts = lambda n, total: torch.tensor(
        sorted([0, total] + [r.randint(0, total) for _ in range(n - 1)]), dtype=torch.int32
    )
    sequences = r.randint(1, 3) if packed else batch
    options = dict(
        causal=chance(0.4),
        window=(r.randint(-1, 9), r.randint(-1, 9)) if chance(0.4) else None,
        softcap=r.choice((0.0, 1.5)),
        scale=r.choice((None, 0.7, -0.2)),
        sinks=torch.randn(heads, dtype=dtype) if chance(0.4) else None,
        bias=torch.randn(shape(), dtype=dtype) if chance(0.4) else None,
        mask=torch.rand(shape()) > 0.4 if chance(0.4) else None,
        alibi_slopes=torch.rand((sequences, heads) if chance(0.5) else heads, dtype=dtype) if chance(0.4) else None,
        cu_seqlens_q=cuts(sequences, rows) if packed else None,
        cu_seqlens_k=cuts(sequences, keys) if packed else None,
    )
    return (q, k, v), options


@pytest.mark.parametrize("seed", range(40))
def test_reference_is_the_formula(seed):
    tensors, options = combination(seed)
    for ours, truth in zip(
        flash_attention_reference(*tensors, **options, return_lse=True), loop(*tensors, **options), strict=True
    ):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_combinations_of_features(dtype):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for seed in range(200):
        tensors, options = combination(seed, dtype)
        wide = [t.double() for t in tensors]
        truth = flash_attention_reference(*wide, **options, return_lse=True)
        for ours, true in zip(attend(*tensors, **options, return_lse=True, backend="cpu"), truth, strict=True):
            torch.testing.assert_close(ours.double(), true.double(), rtol=tolerance, atol=tolerance, msg=f"seed {seed}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 3, 7, 15, 16, 17, 31, 40, 63, 65, 80, 96, 127, 129, 192, 255, 257, 511, 512])
def test_head_sizes(dtype, d):
    q, k, v = draw(dtype, heads=3, kv_heads=1, rows=17, keys=70, d=d, dv=513 - d)
    ours = attend(q, k, v, causal=True, backend="cpu")
    truth = flash_attention_reference(q.double(), k.double(), v.double(), causal=True)
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (40, 3)}], ids=str)
def test_rows_are_the_same_alone_in_a_batch_and_packed(dtype, options):
    """Bitwise, whatever else the call holds: other sequences, other rows of the sequence, other threads."""
    lengths = [(5, 130), (70, 70), (1, 300), (33, 40)]
    parts = [draw(dtype, heads=6, kv_heads=2, rows=n, keys=m, d=64) for n, m in lengths]
    alone = [attend(*p, **options, return_lse=True, backend="cpu") for p in parts]
    cu = [torch.tensor([0, *torch.tensor(lengths)[:, i].cumsum(0).tolist()], dtype=torch.int32) for i in range(2)]
    together = [torch.cat([p[i] for p in parts], 2) for i in range(3)]
    out, lse = attend(*together, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], **options, return_lse=True, backend="cpu")
    assert torch.equal(out, torch.cat([o for o, _ in alone], 2))
    assert torch.equal(lse, torch.cat([x for _, x in alone], 2))
    for (q, k, v), (o, x) in zip(parts, alone, strict=True):
        batched = attend(
            *(torch.cat((t, torch.randn_like(t))) for t in (q, k, v)), **options, return_lse=True, backend="cpu"
        )
        assert torch.equal(batched[0][:1], o)
        assert torch.equal(batched[1][:1], x)
        last = attend(q[:, :, -1:], k, v, **options, backend="cpu")
        assert torch.equal(last, o[:, :, -1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 128])
def test_error_is_torchs(dtype, d):
    """Root-mean-square error against float64 on long rows, where an accumulator could lose digits."""
    q, k, v = draw(dtype, heads=2, rows=64, keys=4096, d=d)
    q = q * 2
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    error = lambda out: (out.double() - truth).square().mean().sqrt()
    assert error(attend(q, k, v, backend="cpu")) <= 1.2 * error(F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("d", [256, 320, 512])
@pytest.mark.parametrize("seed", range(6))
def test_long_heads(d, seed):
    """The tolerance rule without its floor: a long head must not be one long chain of additions."""
    torch.manual_seed(seed)
    q, k, v = draw(torch.float32, rows=40, keys=200, d=d)
    truth = flash_attention_reference(q.double(), k.double(), v.double())
    error = lambda out: (out.double() - truth).norm()
    assert error(attend(q, k, v, backend="cpu")) <= 1.5 * error(flash_attention_reference(q, k, v))


def test_threads_give_the_same_bits():
    q, k, v = draw(torch.bfloat16, heads=4, rows=200, keys=500, d=64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = attend(q, k, v, causal=True, backend="cpu")
        torch.set_num_threads(3)
        assert torch.equal(one, attend(q, k, v, causal=True, backend="cpu"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform_and_saturated_scores_are_exact(dtype):
    """Equal scores average; one score far above the others selects, even where exp would overflow."""
    q, k = torch.zeros(1, 1, 3, 8, dtype=dtype), torch.zeros(1, 1, 64, 8, dtype=dtype)
    v = torch.randint(-4, 5, (1, 1, 64, 8)).to(dtype)
    assert torch.equal(attend(q, k, v, backend="cpu"), v.double().mean(2, keepdim=True).expand(1, 1, 3, 8).to(dtype))
    k[0, 0, 37] = 1
    out, lse = attend(q + 100, k, v, scale=100.0, return_lse=True, backend="cpu")
    assert torch.equal(out, v[:, :, 37:38].expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 80000.0))
    out, lse = attend(q - 100, k, v, scale=100.0, return_lse=True, backend="cpu")
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(63)))


def nan_and_infinity_stay_in_their_row(dtype, backend, device="cpu"):
    q, k, v = draw(dtype, rows=20, keys=70, device=device)
    clean = attend(q, k, v, backend=backend)
    q[0, 0, 3, 2], q[0, 1, 7, 1] = math.nan, math.inf
    out, lse = attend(q, k, v, return_lse=True, backend=backend)
    for h, i in ((0, 3), (1, 7)):
        assert out[0, h, i].isnan().all()
        assert lse[0, h, i].isnan()
        out[0, h, i] = clean[0, h, i]
    assert same(out, clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_reach_their_row_and_no_other(dtype):
    nan_and_infinity_stay_in_their_row(dtype, "cpu")


def test_memory_is_linear():
    """One head of 8,192 keys: the matrix of scores alone would be 256 MiB."""
    q, k, v = draw(torch.float32, heads=1, rows=8192, d=32)
    mask = torch.ones(8192, dtype=torch.bool)
    attend(*(t[:, :, :300] for t in (q, k, v)), backend="cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attend(q, k, v, mask=mask, bias=mask[:, None].float(), backend="cpu")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


def test_gradient_of_lse_alone_and_explained():
    q, k, v = (t.requires_grad_() for t in draw(torch.float32, rows=6, keys=9))
    _, lse = attend(q, k, v, return_lse=True, backend="cpu")
    ours = torch.autograd.grad(lse.sum(), (q, k))
    theirs = torch.autograd.grad(torch.logsumexp(q @ k.transpose(-1, -2) * 8**-0.5, -1).sum(), (q, k))
    torch.testing.assert_close(ours, theirs)
    assert "on cpu and triton a native kernel" in pyarch.explain(attend, q, k, v).gradient
    assert pyarch.explain(attend, q, k, v).backend == "cpu"
    assert pyarch.explain(attend, q.double(), k.double(), v.double()).backend == "reference"
