"""The gradients of flash_attention in Triton: interpreted on CPU tensors (TRITON_INTERPRET=1), or on a GPU."""

import itertools
import math

import pytest
import torch
from test_flash_attention import BAD_CU_SEQLENS, DTYPES, attend, combination, draw

import pyarch
from pyarch import arch, native
from pyarch._instruments import assert_close, same
from pyarch.ops._attention_formulas import gradients
from pyarch.ops.flash_attention import flash_attention_reference

if pyarch.backends()["triton"]:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]

from pyarch.kernels import _tuned  # noqa: E402
from pyarch.kernels import flash_attention_backward as kernel  # noqa: E402

DEVICE = "cpu" if arch.interpreting() else "cuda"
NAMES = ("q", "k", "v", "sinks", "bias", "alibi_slopes")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def derivatives(function, named, weights):
    """{name: gradient} of the sum of (out, lse) times weights."""
    values = {n: named[n].detach().requires_grad_() for n in NAMES if named.get(n) is not None}
    results = function(**named | values, return_lse=True)
    found = torch.autograd.grad(
        results, list(values.values()), [w.to(r) for w, r in zip(weights, results, strict=True)]
    )
    return dict(zip(values, found, strict=True))


def both(named):
    """The gradients by Triton and the fp64 reference's, for the same weights of out and lse."""
    q, v = named["q"], named["v"]
    weights = [torch.randn(*q.shape[:3], n).to(q.dtype) for n in (v.shape[3], 1)]
    weights[1] = weights[1].squeeze(-1)
    wide = {n: x.double() if n in NAMES and x is not None else x for n, x in named.items()}
    truth = derivatives(flash_attention_reference, wide, weights)
    here = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in named.items()}
    with native.Recorder() as ran:
        got = derivatives(lambda **o: attend(**o, backend="triton"), here, weights)
    assert [f.name() for f, _ in ran.calls] == [f"pyarch::flash_attention{n}__triton" for n in ("", "_backward")]
    return got, truth


def check(named, what=""):
    got, truth = both(named)
    for name, ours in got.items():
        assert ours.dtype == named[name].dtype
        assert ours.shape == named[name].shape
        error, size = (ours.cpu().double() - truth[name]).abs().max(), truth[name].abs().max()
        allowed = TOLERANCE[named["q"].dtype] * (size + 0.1)
        assert error <= allowed, f"{what} {name}: {error:.3g} of {size:.3g}"


def every_config():
    """(kernel, config, dtype) of what config_for gives, for every dtype, head size and kind of call, and of what cards
    were tuned to."""
    kinds = itertools.product((16, 128, 256), DTYPES, (80, 90), *[(False, True)] * 3)  # 16 has the tiles of 64
    found = {(name, kernel.config_for(name, *kind)): kind[1] for kind in kinds for name in ("rows", "keys", "scores")}
    shipped = [one for arch in (80, 90) for one in _tuned.shipped("flash_attention_backward", kernel.Config, arch)]
    found |= {(key.partition(" ")[0], config): torch.bfloat16 for key, config in shipped}
    return sorted(((*key, dtype) for key, dtype in found.items()), key=str)


@pytest.mark.parametrize(("name", "config", "dtype"), every_config(), ids=str)
def test_configs(name, config, dtype):
    """Each config is right on lengths that its tiles do not fit, with dropout, and gives the same bits again."""
    rows, keys = config.block_m * (1 + (name == "keys")) + 5, config.block_n * (1 + (name == "rows")) + 7
    d = config.block_d + 8 * (dtype == torch.float32)
    q, k, v = draw(dtype, heads=2, kv_heads=1, rows=rows, keys=keys, d=d, device=DEVICE)
    bias = torch.randn(1, 1, rows, keys, dtype=dtype, device=DEVICE) if name == "scores" else None
    seed, shape = torch.tensor([3], device=DEVICE), None if bias is None else (1, 1, rows, keys)
    small = kernel.Config(32, 32, 32 if dtype == torch.float32 else config.block_d, 4, 1)
    tensors = q, k, v, None, bias, *[None] * 4, seed
    expanded = q, k, v, None, None if bias is None else bias.expand(1, 2, rows, keys), *[None] * 4, seed
    options = config.block_n, 3, 0.0, 0.2, 0.4
    named = dict(window=options[:2], scale=0.2, dropout_p=0.4, seed=seed, bias=bias, return_lse=True)
    out, lse = flash_attention_reference(q, k, v, **named)
    weights = torch.randn_like(out), torch.randn_like(lse)
    got, again = (
        kernel.launch(
            lambda other: config if other == name else small, *weights, out, lse, *expanded, *options, shape, False
        )
        for _ in range(2)
    )
    assert all(map(same, got, again))
    wide = [x if x is None or x is seed else x.double() for x in (*weights, *tensors)]
    truth, peer = gradients(options, *wide), gradients(options, *weights, *tensors)
    for i, ours in zip((0, 1, 2, 4), (*got[:3], got[4]), strict=True):
        if peer[i] is not None:
            assert_close(f"{config}, {i}", ours.to(dtype), truth[i], peer[i], floor=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combinations_of_features(dtype):
    for seed in range(30):
        (q, k, v), options = combination(seed, dtype, most_rows=40)
        check({"q": q, "k": k, "v": v} | options, f"seed {seed}")


BIASES = [(1, 1, 1, 70), (1, 1, 40, 1), (2, 1, 40, 70), (1, 4, 40, 70), (1, 1, 40, 70), (2, 4, 1, 70), (1, 1, 1, 1)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_biases(shape, packed):
    """Every way to broadcast, in float32 beside bf16, whose gradient has more digits than out."""
    batch = 1 if packed else 2
    q, k, v = draw(torch.bfloat16, batch, heads=4, kv_heads=2, rows=40, keys=70)
    bias, slopes = torch.randn(min(shape[0], batch), *shape[1:]), torch.rand(2, 4)
    named = {"q": q, "k": k, "v": v, "bias": bias, "alibi_slopes": slopes, "window": (30, 20), "softcap": 2.0}
    if packed:
        cu = {"q": [0, 17, 40], "k": [0, 50, 70]}
        named |= {f"cu_seqlens_{n}": torch.tensor(c, dtype=torch.int32) for n, c in cu.items()}
    got, truth = both(named)
    for name in ("bias", "alibi_slopes"):
        torch.testing.assert_close(got[name].cpu().double(), truth[name], rtol=1e-4, atol=1e-4, msg=name)
    torch.testing.assert_close(got["q"].cpu().double(), truth["q"], rtol=2e-2, atol=2e-2)


def test_sequences_are_the_same_alone_and_packed():
    """Bitwise, also with more sequences than are looked at together and with empty ones."""
    lengths = [(5, 130), (0, 3), (60, 70), (4, 0), (1, 90)]  # few keys get a more exact delta alone
    parts = [draw(torch.bfloat16, heads=2, kv_heads=1, rows=n, keys=m, d=16, device=DEVICE) for n, m in lengths]

    def found(tensors, **options):
        tensors = [t.clone().requires_grad_() for t in tensors]
        out, lse = attend(*tensors, causal=True, window=(70, 0), **options, return_lse=True, backend="triton")
        weights = out.detach().float().sin().to(out.dtype), lse.detach().nan_to_num(neginf=0.0)
        return torch.autograd.grad((out, lse), tensors, weights)

    alone = zip(*map(found, parts), strict=True)
    ends = [[0] * 261 + torch.tensor(lengths)[:, i].cumsum(0).tolist() for i in range(2)]
    cu = [torch.tensor(e, dtype=torch.int32, device=DEVICE) for e in ends]
    together = found([torch.cat(x, 2) for x in zip(*parts, strict=True)], cu_seqlens_q=cu[0], cu_seqlens_k=cu[1])
    for one, packed in zip(alone, together, strict=True):
        assert same(torch.cat(one, 2), packed)


@pytest.mark.parametrize("shape", [(3, 5), (1, 5), (3, 1)], ids=str)
@pytest.mark.parametrize("cu", [c for c in BAD_CU_SEQLENS if c[0]], ids=str)
def test_wrong_cu_seqlens_give_nan(cu, shape):
    q, k, v = draw(torch.float16, rows=3, keys=5, device=DEVICE)
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32, device=DEVICE) for c in cu)
    slopes = torch.rand(len(cu_q) - 1, 2, device=DEVICE)
    tensors = [q, k, v, torch.rand(2, device=DEVICE), torch.rand(shape, device=DEVICE), slopes]
    options = dict(zip(NAMES, (t.requires_grad_() for t in tensors), strict=True))
    attend(**options, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, backend="triton").sum().backward()
    assert all(t.grad.isnan().all() for t in tensors)


def test_rows_and_keys_that_see_nothing_get_zero():
    """Never NaN: a window beside the keys, a mask, a sink of -inf; gradients of an lse that is -inf."""
    q, k, v = draw(torch.float16, heads=2, rows=9, keys=300, d=16)
    for options in ({"mask": torch.zeros(300, dtype=torch.bool)}, {"mask": torch.zeros(9, 1, dtype=torch.bool)}):
        got, _ = both({"q": q, "k": k, "v": v, "sinks": torch.tensor([-math.inf, 1.0])} | options)
        assert not any(got[n].any() for n in "qkv")
        assert got["sinks"][0] == 0
    got, _ = both({"q": k, "k": q, "v": q, "causal": True})  # 291 rows before the first key
    assert not got["q"][:, :, :291].any()
    got, _ = both({"q": q, "k": k, "v": v, "window": (0, 0)})
    assert not any(got[n][:, :, :-9].any() for n in "kv")


def test_any_strides_of_what_comes_back():
    """out.sum() gives an expanded gradient, a transposed out another layout; one that is not given is 0."""
    tensors = [t.requires_grad_() for t in draw(torch.bfloat16, heads=2, rows=20, d=16, device=DEVICE)]
    found = lambda out, g: torch.autograd.grad(out, tensors, g, retain_graph=True)
    out, lse = attend(*tensors, causal=True, return_lse=True, backend="triton")
    one, weights = torch.ones_like(out), torch.randn_like(out)
    assert all(map(same, found(out, one), found(out.sum(), None)))
    assert all(map(same, found(out, weights), found(out.mT, weights.mT.contiguous())))
    assert all(map(same, found((out, lse), (torch.zeros_like(out), lse.detach())), found(lse, lse.detach())))


def test_operator_refuses_what_it_cannot_compute():
    q, k, v = draw(torch.float16, heads=4, kv_heads=2, rows=3, keys=5, device=DEVICE)
    lse, sinks, scores = q.new_zeros(1, 4, 3, dtype=torch.float32), q.new_zeros(4).float(), q.new_zeros(1, 1, 3, 5)
    cu = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    good = dict(
        d_out=q, d_lse=lse, out=q, lse=lse, q=q, k=k, v=v, sinks=sinks, bias=scores, mask=None, slopes=sinks,
        cu_q=None, cu_k=None, seed=None, left=-1, right=-1, softcap=0.0, scale=1.0, dropout_p=0.0, of_bias=True,
        of_slopes=True,
    )  # fmt: skip
    call = native.operator("flash_attention_backward", "triton")
    assert [x.shape for x in call(*good.values())] == [q.shape, k.shape, v.shape, (4,), (1, 1, 3, 5), (4,)]
    for name, value in [
        ("d_out", q.float()), ("d_out", q[..., :4]), ("d_out", q[:, :2]), ("out", q[0]), ("out", q[:, :, :2]),
        ("d_lse", lse.double()), ("d_lse", lse[..., :2]), ("lse", lse[None]), ("lse", lse.mT.contiguous().mT),
        ("q", q[..., :4]), ("q", q.double()), ("k", k[:, :1]), ("v", v[:, :, :4]), ("sinks", sinks[:3]),
        ("bias", scores[0]), ("bias", scores[..., :4]), ("bias", scores.double()), ("bias", None), ("slopes", None),
        ("slopes", sinks[:3]), ("mask", scores), ("cu_q", cu), ("cu_k", cu), ("dropout_p", 0.1),
    ]:  # fmt: skip
        with pytest.raises((ValueError, RuntimeError), match=r"^[a-z_, ]+:"):
            call(*(good | {name: value}).values())


@pytest.mark.parametrize(("d", "padded"), [(9, 16), (16, 0)])
def test_what_is_padded_is_counted(d, padded):
    """q, k, v, the output and its gradient, where rows are not vectors of 16 bytes."""
    q, k, v = (torch.randn(1, 2, n, d, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for n in (5, 7, 7))
    before = pyarch.copies()
    out = pyarch.flash_attention(q, k, v, backend="triton")
    assert pyarch.copies() == before
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    copies, copied = (b - a for a, b in zip(before, pyarch.copies(), strict=True))
    assert (copies, copied) == ((5, (3 * 5 + 2 * 7) * 2 * padded * 2) if padded else (0, 0))
