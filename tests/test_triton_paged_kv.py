"""paged_attention and kv_append in Triton: interpreted on CPU tensors (TRITON_INTERPRET=1), or on a GPU."""

import itertools
import math
import random

import pytest
import torch
from paged_caches import paged, repaged, rounded, starts
from test_kv_append import append_samples

import pyarch
from pyarch import arch, native
from pyarch._instruments import assert_close, same
from pyarch.ops.paged_kv import CASES, kv_append_reference, paged_attention_reference
from pyarch.testing import Sample, checks

if pyarch.backends()["triton"]:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]

from pyarch.kernels import paged_kv as kernel  # noqa: E402

DEVICE = "cpu" if arch.interpreting() else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = 8  # of one key head: more than 8 rows are then a prompt


def made(dtype, lens, rows, dim, page_size, heads=HEADS, kv_heads=1, sinks=False, int8=False, device=DEVICE):
    """(q, the caches' arguments, options) of a call."""
    arguments, _ = paged(lens, page_size, kv_heads, dim, dtype, device)
    arguments, options = rounded(arguments) if int8 else (arguments, {})
    q = torch.randn(sum(rows), heads, dim, dtype=dtype, device=device)
    if sinks:
        options["sinks"] = torch.randn(heads, dtype=dtype, device=device)
    if any(n != 1 for n in rows):
        options["cu_seqlens_q"] = starts(rows, device)
    return q, arguments, {"return_lse": True, **options}


def call(q, arguments, options):
    return pyarch.paged_attention(q, *arguments, **options, backend="triton")


def samples(dtype, device):
    """Few and small, each with several features. What each argument may be is in test_paged_kv.py."""

    def sample(name, *sizes, options=(), **more):
        q, arguments, given = made(dtype, *sizes, **more, device=device)
        return Sample(name, (q, *arguments), given | dict(options))

    yield sample("decode, two splits", [5, 270], [1, 1], 16, 16, 6, 2)
    yield sample("mixed", [20, 19, 45], [12, 1, 5], 24, 5, sinks=True, options={"window": (37, -1)})
    yield sample("prompt after a prefix", [70], [10], 31, 7, options={"softcap": 3.0, "scale": -0.3})
    yield sample("not causal, long pages", [40], [9], 16, 64, options={"causal": False, "window": (20, 9)})
    yield sample("int8", [20, 30], [9, 1], 16, 16, int8=True, options={"softcap": 5.0})
    yield sample("more rows than tokens, none", [3, 0], [9, 2], 8, 4)
    yield sample("no rows", [9], [0], 16, 4)
    yield sample("no sequences", [], [], 16, 4)
    yield sample("a head of 257", [3], [1], 257, 4)  # outside LIMITS: must be refused


def tiny(dtype, device):
    """What the operator gets with hostile arguments: some hundred calls."""
    q, arguments, options = made(dtype, [3, 9], [1, 9], 8, 4, sinks=True, int8=True, device=device)
    yield Sample("both routes", (q, *arguments), options)


def few_tokens(dtype, device):
    yield from (s for s in append_samples(dtype, device) if "many" not in s.name)


KEEP = dict(keep_layout=("k_cache", "v_cache", "k_scale", "v_scale"), floor=2.0)
SUITE = [
    *(c for c in checks(pyarch.paged_attention, samples, **KEEP) if c.part != "operator"),
    *(c for c in checks(pyarch.paged_attention, tiny, **KEEP) if c.part == "operator"),
    *checks(pyarch.kv_append, few_tokens, **KEEP),
]
# What but the values of an answer knows a dtype runs with the first: the suite takes its time under the interpreter.
SUITE = [c for c in SUITE if c.backend == "triton" and (c.part == "forward" or c.dtype == torch.float32)]


@pytest.mark.parametrize("check", SUITE, ids=lambda check: f"{check.suite.card.name}-{check}")
def test_suite(check):
    check()


def close(what, got, q, arguments, options):
    wide = {n: o.double() if n == "sinks" else o for n, o in options.items()}
    caches = (c.double() if c.is_floating_point() else c for c in arguments[:2])
    truth = paged_attention_reference(q.double(), *caches, *arguments[2:], **wide)
    peer = paged_attention_reference(q, *arguments, **options)
    for name, g, t, p in zip(("out", "lse"), got, truth, peer, strict=True):
        assert_close(f"{what}, {name}", g, t, p, floor=2.0)


def every_config(few):
    """What config_for gives a route, with a dtype that it is for."""
    kinds = itertools.product((16, 64, 128, 256), DTYPES, (80, 90), (False, True), (False, True))
    return sorted({kernel.config_for(few, *kind): kind[1] for kind in kinds}.items(), key=str)


@pytest.mark.parametrize("few", [True, False])
def test_configs(few):
    """Each config is right on lengths that its tiles do not fit, writes all of out, and gives the same bits again."""
    for config, dtype in every_config(few):
        length, rows, heads = config.block_n + 7, 2 if few else 9, 2 if few else HEADS
        q, arguments, options = made(dtype, [length], [rows], min(config.block_d + 8, 40), 5, heads)
        results = []
        for _ in range(2):
            out, lse = torch.full_like(q, math.nan), torch.full(q.shape[:2], math.nan, device=DEVICE)
            tensors = (q, *arguments[:2], None, None, *arguments[2:], options["cu_seqlens_q"], None)
            results.append(kernel.launch(config, config, out, lse, *tensors, -1, 0, 0.0, q.shape[2] ** -0.5))
        assert all(map(same, *results))
        close(str(config), results[0], q, arguments, options)


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    """The room's real shapes, with fewer heads and rows."""
    case = CASES[name]
    group = case["heads"] // case["kv_heads"]
    rows = [min(case["rows"], 64 // group + 2)]
    q, arguments, options = made(torch.bfloat16, [min(case["kv"], 70)], rows, case["head_dim"], 16, group)
    close(name, call(q, arguments, options), q, arguments, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combinations(dtype):
    for seed in range(8):
        choose = random.Random(seed)
        torch.manual_seed(seed)
        lens = [choose.choice((0, 1, 17, 40, 300)) for _ in range(choose.randint(1, 3))]
        rows = [choose.choice((0, 1, 1, 2, 11)) for _ in lens]
        sizes = choose.choice((5, 16, 37)), choose.choice((1, 3, 16, 32))
        group, kv_heads = choose.choice(((1, 2), (3, 1), (8, 1), (9, 1)))
        q, arguments, options = made(
            dtype, lens, rows, *sizes, group * kv_heads, kv_heads, sinks=seed % 2 == 0, int8=seed % 3 == 0
        )
        options["cu_seqlens_q"] = starts(rows, DEVICE)
        options["causal"] = choose.random() < 0.7
        options["window"] = choose.choice((None, (20, -1), (0, 0), (9, 3), (2**40, 2**40)))
        options["softcap"] = choose.choice((0.0, 0.0, 3.0))
        close(f"seed {seed}", call(q, arguments, options), q, arguments, options)


def test_bitwise_alone_or_batched_any_page_size_and_grid(monkeypatch):
    lens, rows = [270, 3, 20], [1, 2, 17]
    arguments, dense = paged(lens, 16, 1, 16, torch.bfloat16, DEVICE)
    q = torch.randn(sum(rows), 4, 16, dtype=torch.bfloat16, device=DEVICE)
    options = {"cu_seqlens_q": starts(rows, DEVICE), "return_lse": True, "window": (262, 0), "softcap": 4.0}
    together = call(q, arguments, options)
    for page_size in (7, 256):
        again = call(q, [t.to(DEVICE) for t in repaged(dense, page_size)], options)
        assert all(map(same, again, together)), f"page size {page_size}"
    k, v, table, seq_lens = arguments
    for b, first in enumerate(options["cu_seqlens_q"].tolist()[:-1]):
        part = slice(first, first + rows[b])
        one = (k, v, table[b : b + 1], seq_lens[b : b + 1])
        alone = [call(q[part], one, options | {"cu_seqlens_q": starts(rows[b : b + 1], DEVICE)})]
        if rows[b] == 1:
            alone.append(call(q[part], one, options | {"cu_seqlens_q": None}))
        for result in alone:
            assert all(same(x, y[part]) for x, y in zip(result, together, strict=True)), f"sequence {b}"
    monkeypatch.setattr(kernel, "PROGRAMS", 1)  # a program takes all splits of its tile
    assert all(map(same, call(q, arguments, options), together))
    monkeypatch.setattr(kernel, "PARTIAL_FLOATS", 1)  # a launch for each sequence
    assert all(map(same, call(q, arguments, options), together))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 33])
def test_a_value_no_row_attends_to_does_not_matter(dtype, rows):
    """NaN or infinity outside of what a row sees does not reach it, on either route."""
    q, arguments, options = made(dtype, [90], [rows], 16, 16, heads=2)
    options["window"] = (30, 0)
    clean = call(q, arguments, options)
    own = torch.arange(90 - rows, 90, device=DEVICE)
    k, v, table, _ = arguments
    for cache, position, value in (
        (v, 90 - rows - 31, math.inf),
        (v, 60, math.nan),
        (v, 88, -math.inf),
        (k, 89, math.nan),
    ):
        place = table[0, position // 16], position % 16
        kept = cache[place].clone()
        cache[place] = value
        out, lse = call(q, arguments, options)
        cache[place] = kept
        sees = (position <= own) & (position >= own - 30)
        assert out[sees].isnan().all(), f"position {position}"
        assert same(out[~sees], clean[0][~sees]), f"position {position}"
        assert same(lse[~sees], clean[1][~sees]), f"position {position}"


@pytest.mark.parametrize("rows", [[6, 2], [33, 1]], ids=str)
def test_impossible_values_give_nan_and_harm_nothing_else(rows):
    q, (k, v, table, lens), options = made(torch.float16, [90, 40], rows, 16, 16, heads=2)
    first = rows[0]
    options["window"] = (30, 0)
    clean = call(q, (k, v, table, lens), options)
    for page in (-(2**31), k.shape[0]):
        bad = table.clone()
        bad[0, 3] = page  # positions 48 to 63: all rows of the first sequence see some of them
        bad[0, 6:], bad[1, 3:] = page, page  # no row does
        for result, right in zip(call(q, (k, v, bad, lens), options), clean, strict=True):
            assert result[:first].isnan().all()
            assert same(result[first:], right[first:])
    for length in (-1, table.shape[1] * 16 + 1):
        wrong = torch.tensor([90, length], dtype=torch.int32, device=DEVICE)
        for result, right in zip(call(q, (k, v, table, wrong), options), clean, strict=True):
            assert same(result[:first], right[:first])
            assert result[first:].isnan().all()
    total = sum(rows)
    for wrong in ([1, first, total], [0, first, total - 1], [0, total + 1, total], [0, -1, total],
                  [2**31 - 1, -(2**31), 2**31 - 1]):  # fmt: skip
        cu = torch.tensor(wrong, dtype=torch.int32, device=DEVICE)
        for result in call(q, (k, v, table, lens), options | {"cu_seqlens_q": cu}):
            assert result.isnan().all(), wrong


def test_no_pages():
    """Nothing to read: rows that attend to something are NaN, the others 0."""
    q, (k, v, table, _), options = made(torch.float32, [5, 5], [1, 1], 16, 4)
    lens = torch.tensor([5, 0], dtype=torch.int32, device=DEVICE)
    out, lse = call(q, (k[:0], v[:0], table, lens), options)
    assert out[0].isnan().all()
    assert not out[1].any()
    assert lse[1].isneginf().all()


def test_bad_slots_are_skipped():
    k, v = torch.randn(2, 5, 2, 8, device=DEVICE)
    caches = [torch.randn(3, 4, 2, 8, device=DEVICE) for _ in range(2)]
    want = [cache.cpu().clone() for cache in caches]
    kv_append_reference(k[:1].cpu(), v[:1].cpu(), *want, torch.tensor([7]))
    slots = torch.tensor([7, 12, -2, 2**62, -(2**62)], device=DEVICE)
    pyarch.kv_append(k, v, *caches, slots, backend="triton")
    assert all(same(cache.cpu(), right) for cache, right in zip(caches, want, strict=True))


def test_append_keeps_what_is_not_finite():
    """A head with a NaN or an infinity has scale NaN and codes 0; a head of zeros scale 0."""
    k = torch.randn(4, 2, 8, dtype=torch.bfloat16, device=DEVICE)
    k[0, 0, 3], k[1, 1, 0], k[2, 0], k[3, 1, 7] = math.nan, math.inf, 0, -math.inf
    slots = torch.arange(4, device=DEVICE)
    results = []
    for backend in ("triton", "reference"):
        codes, scales = (
            torch.full((2, 1, 4, 2, 8), 7, dtype=torch.int8, device=DEVICE),
            torch.ones(2, 1, 4, 2, device=DEVICE),
        )
        pyarch.kv_append(k, -k, *codes, slots, k_scale=scales[0], v_scale=scales[1], backend=backend)
        results.append((codes, scales.nan_to_num(-1.0)))
    assert all(map(same, *results))


def test_operator_refuses_what_it_cannot_compute():
    q, (k, v, table, lens), _ = made(torch.float16, [5, 9], [1, 1], 16, 4, 4, 2)
    good = dict(q=q, k=k, v=v, table=table, lens=lens, cu=None, sinks=None, k_scale=None, v_scale=None, causal=True,
                left=-1, right=-1, softcap=0.0, scale=1.0)  # fmt: skip
    operator = native.operator("paged_attention", "triton")
    operator(*good.values())
    scale = torch.ones(k.shape[:3], device=DEVICE)
    for name, value in [
        ("q", q.double()), ("q", q[0]), ("q", q[:, :3]), ("q", q[..., :8]), ("q", q[:1]), ("q", q.new_zeros(2, 4, 257)),
        ("k", k.float()), ("k", k[1:]), ("k", k[:, :0]), ("k", k.char()), ("v", v[..., :8]), ("table", table.long()),
        ("table", table[:1]), ("table", table[:1].expand(2**29, -1)), ("table", table[:, :1].expand(2, 2**29)),
        ("lens", lens[:1]), ("lens", lens.long()), ("cu", starts([2])), ("cu", starts([1, 1]).long()),
        ("sinks", q.new_zeros(3)), ("sinks", q.new_zeros(4).double()), ("k_scale", scale), ("v_scale", scale),
    ]:  # fmt: skip
        with pytest.raises((ValueError, RuntimeError)):
            operator(*(good | {name: value}).values())
