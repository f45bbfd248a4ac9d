"""paged_attention: the suite, the reference against SDPA, and what must not change an answer."""

import math

import pytest
import torch
from paged_caches import paged, repaged, rounded, starts

import pyarch
from pyarch.ops.paged_kv import CASES, paged_attention_reference
from pyarch.testing import Refused, Sample, checks, same

ALL = [torch.float32, torch.bfloat16, torch.float16]


def attention_samples(dtype, device):
    def sample(name, lens, rows, heads, kv_heads, dim, page_size, sinks=False, int8=False, **options):
        arguments, _ = paged(lens, page_size, kv_heads, dim, dtype, device)
        if int8:
            arguments, scales = rounded(arguments)
            options |= scales
        q = torch.randn(sum(rows), heads, dim, dtype=dtype, device=device)
        if sinks:
            options["sinks"] = torch.randn(heads, dtype=dtype, device=device)
        if any(n != 1 for n in rows):
            options["cu_seqlens_q"] = starts(rows, device)
        return Sample(name, (q, *arguments), {"return_lse": True, **options})

    yield sample("decode", [5, 300, 77], [1, 1, 1], 8, 2, 64, 16)
    yield sample("one key", [1], [1], 1, 1, 1, 1)
    yield sample("three heads a key head, odd sizes", [33, 270], [1, 1], 9, 3, 40, 5)
    yield sample("five heads a key head", [70, 257], [1, 1], 10, 2, 17, 3)
    yield sample("prompt", [70], [70], 6, 2, 64, 16)
    yield sample("prompt after a prefix, odd sizes", [301], [67], 3, 3, 31, 7)
    yield sample("prompts and single tokens", [40, 19, 300, 270], [40, 1, 1, 13], 4, 2, 32, 16)
    yield sample("not causal", [40, 90], [3, 1], 4, 4, 16, 8, causal=False)
    yield sample("not causal prompt", [90], [33], 4, 4, 16, 8, causal=False, window=(20, 9))
    yield sample("window", [300, 20, 280], [1, 20, 50], 4, 2, 24, 16, window=(37, -1))
    yield sample("window of one", [300], [5], 2, 1, 16, 4, window=(0, 0))
    yield sample("softcap", [150, 60], [1, 60], 4, 2, 32, 16, softcap=5.0)
    yield sample("sinks", [150, 60], [1, 60], 4, 2, 32, 16, sinks=True)
    yield sample("all options", [290, 61], [20, 2], 6, 2, 48, 9, True, window=(70, 3), softcap=2.0, scale=0.3)
    yield sample("empty sequences", [0, 30, 0, 8], [1, 2, 3, 0], 4, 2, 16, 4)
    yield sample("empty with sinks", [0, 30], [2, 2], 4, 2, 16, 4, sinks=True)
    yield sample("more rows than tokens", [3, 20], [7, 25], 4, 2, 16, 4)
    yield sample("no rows", [9, 9], [0, 0], 4, 2, 16, 4)
    yield sample("no sequences", [], [], 4, 2, 16, 4)
    yield sample("large head", [20, 20], [1, 20], 2, 1, 300, 16)
    yield sample("large scores", [200, 100], [1, 50], 4, 2, 32, 16, scale=30.0)
    yield sample("int8 decode", [300, 5, 77], [1, 1, 1], 8, 2, 64, 16, int8=True)
    yield sample("int8 decode, large head", [270, 33], [1, 1], 4, 4, 128, 5, int8=True, softcap=3.0)
    yield sample("int8 rows of odd sizes", [290, 61], [2, 1], 6, 2, 37, 9, True, int8=True, window=(70, 3))
    yield sample("int8 prompts and single tokens", [40, 300, 150], [40, 1, 70], 6, 2, 32, 16, int8=True)
    yield sample("int8 empty", [0, 30, 8], [1, 2, 0], 4, 2, 16, 4, int8=True)
    for name, case in CASES.items():  # their head ratio and size, with fewer of all else
        kv, rows, batch = min(case["kv"], 260), min(case["rows"], 30), min(case["batch"], 2)
        yield sample(name, [kv] * batch, [rows] * batch, case["heads"] // case["kv_heads"], 1, case["head_dim"], 16)


def attention_refused():
    (k, v, table, lens), _ = paged([5, 9], 4, 2, 8)
    q = torch.randn(2, 4, 8)
    good = dict(q=q, k_cache=k, v_cache=v, block_table=table, seq_lens=lens)

    def case(name, argument, error=ValueError, **changes):
        return Refused(name, error, argument, (), {**good, **changes})

    yield case("q of two dimensions", "q", q=q[0])
    yield case("head size of q", "q", q=q[..., :7])
    yield case("heads of q", "q", q=q[:, :3])
    yield case("rows of q", "q", q=q[:1])
    yield case("dtype of q", "q", TypeError, q=q.double())
    yield case("cache of three dimensions", "k_cache", k_cache=k[0])
    yield case("cache of integers", "k_cache", TypeError, k_cache=torch.zeros(k.shape, dtype=torch.int32))
    yield case("page size 0", "k_cache", k_cache=k[:, :0], v_cache=v[:, :0])
    yield case("other pages", "v_cache", v_cache=v[1:])
    yield case("dtype of v_cache", "v_cache", TypeError, v_cache=v.half())
    yield case("int64 table", "block_table", TypeError, block_table=table.long())
    yield case("table of one dimension", "block_table", block_table=table[0])
    yield case("int64 lengths", "seq_lens", TypeError, seq_lens=lens.long())
    yield case("one length too few", "seq_lens", seq_lens=lens[:1])
    yield case("cu_seqlens_q too short", "cu_seqlens_q", cu_seqlens_q=starts([2]))
    yield case("cu_seqlens_q of int64", "cu_seqlens_q", TypeError, cu_seqlens_q=starts([1, 1]).long())
    yield case("window not a pair", "window", window=3)
    yield case("window below -1", "window", window=(-2, 0))
    yield case("window of floats", "window", window=(1.0, 0.0))
    yield case("negative softcap", "softcap", softcap=-1.0)
    (codes, values, _, _), scales = rounded((k, v, table, lens))
    int8 = dict(k_cache=codes, v_cache=values, **scales)
    yield case("int8 without k_scale", "k_scale", **int8 | {"k_scale": None})
    yield case("int8 without v_scale", "v_scale", **int8 | {"v_scale": None})
    yield case("scale for a floating cache", "v_scale", v_scale=scales["v_scale"])
    yield case("dtype of a scale", "v_scale", TypeError, **int8 | {"v_scale": scales["v_scale"].half()})
    yield case("heads of a scale", "k_scale", **int8 | {"k_scale": scales["k_scale"][..., :1]})
    yield case("int8 beside floats", "v_cache", TypeError, **int8 | {"v_cache": v})
    yield case("float64 beside int8", "q", TypeError, **int8 | {"q": q.double()})
    yield case("softcap not a number", "softcap", softcap=math.nan)
    yield case("endless scale", "scale", scale=math.inf)
    yield case("sinks of other heads", "sinks", sinks=torch.zeros(3))
    yield case("dtype of sinks", "sinks", TypeError, sinks=torch.zeros(4).half())
    for backend in ("cpu", "reference"):
        yield case("page too large", "block_table", block_table=table.clamp(min=k.shape[0]), backend=backend)
        yield case("page negative", "block_table", block_table=table.clamp(max=-1), backend=backend)
        last = table.clone()
        last[1, 2] = k.shape[0]
        yield case("last used page", "block_table", block_table=last, backend=backend)
        yield case("length above the table", "seq_lens", seq_lens=lens + 20, backend=backend)
        yield case("negative length", "seq_lens", seq_lens=lens - 6, backend=backend)
        for name, values in (("start", [1, 1, 2]), ("end", [0, 1, 1]), ("end above", [0, 1, 3]), ("fall", [0, 3, 2]),
                             ("below 0", [0, -1, 2])):  # fmt: skip
            cu = torch.tensor(values, dtype=torch.int32)
            yield case(f"cu_seqlens_q {name}", "cu_seqlens_q", cu_seqlens_q=cu, backend=backend)
    yield case("cache with a step", "backend", backend="cpu", k_cache=torch.cat([k, k], -1)[..., ::2])
    yield case("gradient on the CPU kernel", "backend", backend="cpu", q=q.clone().requires_grad_())


# floor 2: the exponential magnifies one rounding of a score, so the largest of many errors is a matter of chance
# (in fp32 up to 2.1 times torch's where the root mean square is 0.92 times)
SUITE = checks(
    pyarch.paged_attention,
    attention_samples,
    refused=attention_refused,
    keep_layout=("k_cache", "v_cache"),
    floor=2.0,
)


@pytest.mark.parametrize("check", SUITE, ids=str)
def test_suite(check):
    check()


@pytest.mark.parametrize("head_dim", [320, 512])
@pytest.mark.parametrize("seed", range(6))
def test_long_heads(head_dim, seed):
    """The tolerance rule without its floor: a long head must not be one long chain of additions."""
    torch.manual_seed(seed)
    (k, v, table, lens), _ = paged([200, 90], 16, 2, head_dim)
    rows = [40, 1]
    q = torch.randn(sum(rows), 4, head_dim)
    cu = starts(rows)
    got = pyarch.paged_attention(q, k, v, table, lens, cu_seqlens_q=cu, backend="cpu").double()
    peer = paged_attention_reference(q, k, v, table, lens, cu_seqlens_q=cu).double()
    truth = paged_attention_reference(q.double(), k.double(), v.double(), table, lens, cu_seqlens_q=cu)
    for part in (slice(0, 40), slice(40, 41)):
        assert (got - truth)[part].norm() <= 1.5 * (peer - truth)[part].norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reference_is_sdpas(dtype):
    arguments, dense = paged([37, 5, 64], 8, 2, 16, dtype)
    rows = [4, 5, 1]
    q = torch.randn(sum(rows), 6, 16, dtype=dtype)
    out = paged_attention_reference(q, *arguments, cu_seqlens_q=starts(rows))
    for first, n, (k, v) in zip(starts(rows).tolist(), rows, dense, strict=False):
        mask = torch.arange(len(k)) <= torch.arange(len(k) - n, len(k))[:, None]
        theirs = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None].double() for x in (q[first : first + n], k, v)), attn_mask=mask, enable_gqa=True
        )
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            out[first : first + n].double(), theirs[0].transpose(0, 1), rtol=tolerance, atol=tolerance
        )


def test_reference_has_gradients():
    (k, v, *rest), _ = paged([9, 3], 4, 1, 4, torch.float64)
    k, v = k.nan_to_num(0.5), v.nan_to_num(0.5)
    q, sinks = torch.randn(4, 2, 4, dtype=torch.float64), torch.randn(2, dtype=torch.float64)

    def call(q, k, v, sinks):
        options = dict(cu_seqlens_q=starts([3, 1]), sinks=sinks, softcap=3.0, return_lse=True)
        return pyarch.paged_attention(q, k, v, *rest, **options)

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in (q, k, v, sinks)], fast_mode=True)
    explained = pyarch.explain(pyarch.paged_attention, q.float(), k.float(), v.float(), rest[0], rest[1],
                               cu_seqlens_q=starts([3, 1]))  # fmt: skip
    assert explained.backend == "reference"
    assert "inference" in explained.refused["cpu"]


def attend(q, arguments, rows, **options):
    return pyarch.paged_attention(q, *arguments, cu_seqlens_q=starts(rows), return_lse=True, backend="cpu", **options)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("options", [{}, {"window": (130, 0)}, {"softcap": 4.0, "causal": False}], ids=str)
def test_bitwise_alone_or_batched_any_page_size_and_threads(dtype, options):
    lens, rows = [700, 3, 290, 530], [1, 1, 40, 3]
    arguments, dense = paged(lens, 16, 2, 40, dtype)
    q = torch.randn(sum(rows), 6, 40, dtype=dtype)
    together = attend(q, arguments, rows, **options)
    for page_size in (1, 7, 1024):
        again = attend(q, repaged(dense, page_size), rows, **options)
        assert all(map(same, again, together)), f"page size {page_size}"
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            again = attend(q, arguments, rows, **options)
        finally:
            torch.set_num_threads(threads)
        assert all(map(same, again, together)), f"{count} threads"
    k_cache, v_cache, table, seq_lens = arguments
    for b, first in enumerate(starts(rows).tolist()[:-1]):
        part = slice(first, first + rows[b])
        alone = attend(q[part], (k_cache, v_cache, table[b : b + 1], seq_lens[b : b + 1]), rows[b : b + 1], **options)
        assert all(same(one, both[part]) for one, both in zip(alone, together, strict=True)), f"sequence {b}"


@pytest.mark.parametrize("dtype", ALL)
def test_a_value_no_row_attends_to_does_not_matter(dtype):
    """NaN in a token before the window, or after a causal row's own position, reaches no row that does not see it."""
    arguments, _ = paged([300], 16, 2, 24, dtype)
    rows, left = 60, 50
    q = torch.randn(rows, 4, 24, dtype=dtype)
    clean, _ = attend(q, arguments, [rows], window=(left, 0))
    _, v_cache, table, _ = arguments
    for position in (0, 189, 240, 270, 299):
        page, offset = table[0, position // 16], position % 16
        kept = v_cache[page, offset].clone()
        v_cache[page, offset] = torch.nan
        out, _ = attend(q, arguments, [rows], window=(left, 0))
        v_cache[page, offset] = kept
        own = torch.arange(300 - rows, 300)
        sees = (position <= own) & (position >= own - left)
        assert out[sees].isnan().all(), f"position {position}"
        tolerance = 4 * torch.finfo(dtype).eps  # such a prompt takes another route, with other roundings
        torch.testing.assert_close(out[~sees], clean[~sees], rtol=tolerance, atol=tolerance)


def test_table_entries_before_the_window_are_not_used():
    (k, v, table, lens), _ = paged([100], 10, 2, 16)
    q = torch.randn(3, 4, 16)
    expected = attend(q, (k, v, table, lens), [3], window=(20, -1))
    table[0, :7] = -5  # positions 0 to 69; the first row stands at 97 and sees 77 and up
    got = attend(q, (k, v, table, lens), [3], window=(20, -1))
    assert same(got[0], expected[0])
    table[0, 7] = -5
    with pytest.raises(ValueError, match=r"^block_table: entry \[0, 7\] is -5"):
        attend(q, (k, v, table, lens), [3], window=(20, -1))


@pytest.mark.parametrize("dtype", ALL)
def test_prompt_in_pieces(dtype):
    """A prompt in one call and in pieces: the same answer within rounding."""
    arguments, _ = paged([200], 16, 2, 32, dtype)
    q = torch.randn(200, 4, 32, dtype=dtype)
    whole, _ = attend(q, arguments, [200])
    pieces, at = [], 0
    for n in (120, 1, 60, 19):
        at += n
        partial = (*arguments[:3], torch.tensor([at], dtype=torch.int32))
        pieces.append(attend(q[at - n : at], partial, [n])[0])
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", ["interleaved", "heads first", "kv in one row"])
def test_cache_layouts(layout):
    (k, v, table, lens), _ = paged([90, 33], 8, 2, 24)
    q = torch.randn(2, 4, 24)
    expected = pyarch.paged_attention(q, k, v, table, lens, backend="cpu")
    if layout == "interleaved":
        k2, v2 = torch.stack([k, v], 1).unbind(1)
    elif layout == "heads first":
        k2, v2 = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    else:
        both = torch.cat([k, v], -1)
        k2, v2 = both[..., :24], both[..., 24:]
    assert same(pyarch.paged_attention(q, k2, v2, table, lens, backend="cpu"), expected)
