"""int8 paged caches: what is stored, bit by bit; what attention makes of it; the cache, the blocks, a model."""

import pytest
import torch
from paged_caches import paged, repaged, rounded, starts

import pyarch
from pyarch import nn
from pyarch.models import Llama, generate
from pyarch.models.transformer import PRESETS
from pyarch.ops._paged_formulas import quantized_heads
from pyarch.ops.paged_kv import kv_append_reference, paged_attention_reference
from pyarch.testing import same

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.forward


def empty(pages, page_size, heads, dim):
    """Caches and scales with garbage in them."""
    codes = torch.randint(-128, 128, (2, pages, page_size, heads, dim), dtype=torch.int8)
    return (*codes.unbind(), *torch.randn(2, pages, page_size, heads).unbind())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 37, 1, 300])
def test_append_stores_the_references_bits(dtype, dim):
    k, v = torch.randn(2, 40, 3, dim) * torch.logspace(-8, 4, 40)[None, :, None, None]
    for x in (k, v):
        x[0], x[1, 0, dim // 2], x[2, 1, 0], x[3, 2, -1] = 0, torch.nan, torch.inf, -torch.inf
        x[4] = 3e-45  # whose scale is 0, or of a few bits
        x[5], x[6, :, 0] = 2e-43, -x[6].abs().amax(-1)
    k, v = k.to(dtype), v.to(dtype)
    slots = torch.randperm(60)[:40]
    slots[7] = -1
    got, want = empty(12, 5, 3, dim), None
    want = tuple(t.clone() for t in got)
    pyarch.kv_append(k, v, *got[:2], slots, k_scale=got[2], v_scale=got[3], backend="cpu")
    kv_append_reference(k, v, *want[:2], slots, k_scale=want[2], v_scale=want[3])
    assert all(map(same, got, want))
    assert got[2].flatten(0, 1)[slots[1], 0].isnan()


def test_rounding_is_to_the_nearest_and_of_two_to_the_even_one():
    x = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 3.49, 3.51, 0])
    for sign in (1, -1):
        codes, scale = quantized_heads(sign * x)
        assert scale == 1
        assert codes.tolist() == [sign * c for c in (127, 0, 2, 2, 0, -2, -126, 3, 4, 0)]
    caches = empty(1, 1, 1, 10)
    options = dict(k_scale=caches[2], v_scale=caches[3])
    pyarch.kv_append(x[None, None], -x[None, None], *caches[:2], torch.tensor([0]), **options, backend="cpu")
    assert caches[0].flatten().tolist() == [127, 0, 2, 2, 0, -2, -126, 3, 4, 0]
    assert torch.equal(caches[1], -caches[0])


def test_scales_of_any_strides_and_caches_of_one_buffer():
    k, v, slots = torch.randn(6, 2, 16), torch.randn(6, 2, 16), torch.tensor([3, 14, 0, 7, -1, 9])
    want = empty(4, 4, 2, 16)
    kv_append_reference(k, v, *want[:2], slots, k_scale=want[2], v_scale=want[3])
    both, scales = torch.zeros(4, 2, 4, 2, 16, dtype=torch.int8), torch.zeros(4, 2, 4, 2)
    got = both[:, 0], both[:, 1], scales[..., 0].mT, scales[..., 1].mT
    pyarch.kv_append(k, v, *got[:2], slots, k_scale=got[2], v_scale=got[3], backend="cpu")
    places = slots[slots >= 0] // 4, slots[slots >= 0] % 4
    assert all(same(g[places], w[places]) for g, w in zip(got, want, strict=True))
    q, table, lens = torch.randn(1, 4, 16), torch.arange(4, dtype=torch.int32)[None], torch.tensor([1]).int()
    dense = [t.contiguous() for t in got]
    outs = [pyarch.paged_attention(q, c[0], c[1], table, lens, k_scale=c[2], v_scale=c[3], backend="cpu")
            for c in (got, dense)]  # fmt: skip
    assert same(*outs)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("v_scale", lambda c: {"v_scale": c["k_scale"]}),
        ("k_scale", lambda c: {"k_scale": c["k_cache"][:, :, :, :4].view(torch.float32)[..., 0]}),
        ("v_scale", lambda c: {"v_scale": c["k_scale"].as_strided((4, 4, 2), (8, 1, 1))}),
        ("k", lambda c: {"k": c["v_scale"].flatten()[:32].view(1, 2, 16)}),
        ("slot_mapping", lambda c: {"slot_mapping": c["k_scale"].view(torch.int64).flatten()[:1]}),
    ],
)
def test_append_refuses_memory_shared(argument, change):
    call = dict(zip(("k_cache", "v_cache", "k_scale", "v_scale"), empty(4, 4, 2, 16), strict=True))
    call |= dict(k=torch.randn(1, 2, 16), v=torch.randn(1, 2, 16), slot_mapping=torch.tensor([1]))
    before = {name: t.clone() for name, t in call.items()}
    with pytest.raises(ValueError, match=f"^{argument}: "):
        pyarch.kv_append(**call | change(call), backend="cpu")
    assert all(same(call[name], before[name]) for name in call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"window": (130, 0)}, {"softcap": 4.0, "causal": False}], ids=str)
def test_bitwise_alone_or_batched_any_page_size_and_threads(dtype, options):
    lens, rows = [700, 3, 290, 530], [1, 1, 40, 3]
    arguments, dense = paged(lens, 16, 2, 40, dtype)
    q = torch.randn(sum(rows), 6, 40, dtype=dtype)

    def attend(arguments, q=q, rows=rows):
        caches, scales = arguments
        return pyarch.paged_attention(q, *caches, cu_seqlens_q=starts(rows), return_lse=True, backend="cpu",
                                      **scales, **options)  # fmt: skip

    (k_cache, v_cache, table, seq_lens), scales = kept = rounded(arguments)
    together = attend(kept)
    for page_size in (1, 7, 1024):
        assert all(map(same, attend(rounded(repaged(dense, page_size))), together)), f"page size {page_size}"
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            again = attend(kept)
        finally:
            torch.set_num_threads(threads)
        assert all(map(same, again, together)), f"{count} threads"
    for b, first in enumerate(starts(rows).tolist()[:-1]):
        part, one = slice(first, first + rows[b]), (k_cache, v_cache, table[b : b + 1], seq_lens[b : b + 1])
        alone = attend((one, scales), q[part], rows[b : b + 1])
        assert all(same(x, both[part]) for x, both in zip(alone, together, strict=True)), f"sequence {b}"


@pytest.mark.parametrize("rows", [6, 60])
def test_scales_are_numbers_and_those_that_are_not_reach_who_sees_them(rows):
    arguments, _ = paged([300], 16, 2, 32)
    (k, v, table, lens), scales = rounded(arguments)
    q, own = torch.randn(rows, 4, 32), torch.arange(300 - rows, 300)
    options = scales | {"cu_seqlens_q": starts([rows]), "window": (50, 0), "backend": "cpu"}
    clean = pyarch.paged_attention(q, k, v, table, lens, **options)
    flipped = {"k_scale": -scales["k_scale"]}
    assert same(pyarch.paged_attention(q, -k, v, table, lens, **options | flipped), clean)
    flipped = {"v_scale": -scales["v_scale"]}
    assert same(pyarch.paged_attention(q, k, v, table, lens, **options | flipped), -clean)
    for position in (0, 243, 244, 270, 297, 299):
        page, offset = table[0, position // 16], position % 16
        for name in ("k_scale", "v_scale"):
            odd = scales[name].clone()
            odd[page, offset] = torch.nan
            out = pyarch.paged_attention(q, k, v, table, lens, **options | {name: odd})
            sees = (position <= own) & (position >= own - 50)
            assert out[sees].isnan().all(), f"{name}, position {position}"
            # a prompt with values that are not finite takes another route, with other roundings
            torch.testing.assert_close(out[~sees], clean[~sees], rtol=2e-6, atol=2e-6)


def test_gradients_go_to_the_reference():
    arguments, _ = paged([30], 8, 2, 16)
    (k, v, table, lens), scales = rounded(arguments)
    q = torch.randn(1, 4, 16, requires_grad=True)
    assert pyarch.explain(pyarch.paged_attention, q, k, v, table, lens, **scales).backend == "reference"
    pyarch.paged_attention(q, k, v, table, lens, **scales).sum().backward()
    wide = [x * s[..., None] for x, s in zip((k, v), scales.values(), strict=True)]
    twin = q.detach().clone().requires_grad_()
    paged_attention_reference(twin, *wide, table, lens).sum().backward()
    torch.testing.assert_close(q.grad, twin.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_append_rounds_what_it_would_have_stored(dtype, interleaved):
    qkv = torch.randn(9, (4 + 2 * 2) * 32).to(dtype)
    angles, positions = torch.rand(20, 16) * 7, torch.randint(0, 20, (9,))
    slots = torch.randperm(20)[:9]
    slots[2] = -1
    options = dict(num_heads=4, num_kv_heads=2, interleaved=interleaved, k_norm=torch.rand(32), backend="cpu")
    k, v = torch.zeros(2, 5, 4, 2, 32, dtype=dtype)
    q = pyarch.rotary_append(qkv, angles.cos(), angles.sin(), positions, k, v, slots, **options)
    got = empty(5, 4, 2, 32)
    want = tuple(t.clone() for t in got)
    scales = dict(k_scale=got[2], v_scale=got[3])
    q8 = pyarch.rotary_append(qkv, angles.cos(), angles.sin(), positions, *got[:2], slots, **scales, **options)
    place = slots.clamp(min=0)
    new = (x.flatten(0, 1)[place] for x in (k, v))
    kv_append_reference(*new, *want[:2], slots, k_scale=want[2], v_scale=want[3])
    assert same(q8, q)
    assert all(map(same, got, want))


def test_a_fork_owns_its_scales():
    cache = pyarch.PagedKVCache(6, 4, 2, 3, 8, dtype=torch.int8)
    a = cache.allocate()

    def append(sequence, count):
        slots = cache.append([sequence], [count])
        new = torch.randn(2, count, 3, 8)
        for layer in range(2):
            scales = dict(k_scale=cache.k_scale[layer], v_scale=cache.v_scale[layer])
            pyarch.kv_append(new[0] + layer, new[1], cache.k[layer], cache.v[layer], slots, **scales, backend="cpu")
        return new

    def held(sequence, layer):
        pages = cache.block_table([sequence])[0].long()
        return [t[layer][pages].flatten(0, 1)[: cache.lengths([sequence])[0]]
                for t in (cache.k, cache.v, cache.k_scale, cache.v_scale)]  # fmt: skip

    first = append(a, 6)
    b = cache.fork(a)
    before = [t.clone() for t in held(a, 1)]
    more = append(b, 3)  # copies the last page, scales and all
    assert all(map(same, held(a, 1), before))
    for layer in range(2):
        k = torch.cat([first[0], more[0]]) + layer
        codes, scales = quantized_heads(k)
        assert same(held(b, layer)[0], codes)
        assert same(held(b, layer)[2], scales)


def test_generate_with_an_int8_cache():
    torch.manual_seed(0)
    model = Llama(PRESETS["tiny"]).eval()
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    plain, rounded_ = (list(generate(model, prompt, max_tokens=12, cache_dtype=d)) for d in (None, torch.int8))
    with pyarch.use_backend("reference"):
        assert list(generate(model, prompt, max_tokens=12, cache_dtype=torch.int8)) == rounded_
    assert plain[0] == rounded_[0]
    with pytest.raises(TypeError, match=r"^dtype: of the model's cache must be torch.float32 or torch.int8"):
        generate(model, prompt, cache_dtype=torch.bfloat16)


def test_one_short_way_does_not_serve_caches_of_another_dtype():
    """Blocks that have learnt with one cache are right with another, bit for bit."""
    torch.manual_seed(0)
    model = Llama(PRESETS["tiny"]).eval()
    logits = {}
    with torch.inference_mode():
        for turn in range(2):
            for dtype in (torch.float32, torch.int8):
                cache = nn.PagedKVCache(8, 4, 2, 2, 16, dtype=dtype)
                sequence = cache.allocate()
                for token in (5, 6, 7, 8):
                    got = model.extend(cache, [sequence], [[token]])
                assert same(logits.setdefault(dtype, got), got), f"turn {turn}, {dtype}"
    assert not same(*logits.values())
