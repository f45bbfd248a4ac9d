"""paged_attention of the CUDA library on CPU tensors, with the emulator (test_emulator.py runs this).

    python tests/emulated_attention.py LIBRARY

In a process of its own, since the library registers pyarch::paged_attention__cuda for CPU tensors. Every call runs
under several seeds, which must give the same bits; memory that the kernel allocates is full of NaN.
"""

import dataclasses
import inspect
import itertools
import sys
import time

import pytest
import torch
from emulated_operators import Emulator
from paged_caches import paged, repaged, rounded, starts
from test_paged_kv import attention_samples

import pyarch
from pyarch._instruments import assert_close, same
from pyarch.ops import _attention
from pyarch.ops.paged_kv import PAGED_ATTENTION, check, paged_attention_reference

HERE = dataclasses.replace(PAGED_ATTENTION.limits["cuda"], device="cpu", capability=(0, 0))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Attention:
    """pyarch.paged_attention as it calls the CUDA operator."""

    def __init__(self, path: str):
        self.emulator = Emulator(path)
        self.calls = 0

    def __call__(self, q, k, v, table, lens, seeds=(1,), **options):
        options = {"causal": True, "window": None, "softcap": 0.0, "scale": None, **options}
        left, right = _attention.window(options["window"])
        scale = q.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
        arguments = (q, k, v, table, lens, options.get("cu_seqlens_q"), options.get("sinks"),
                     options.get("k_scale"), options.get("v_scale"), options["causal"], left, right,
                     options["softcap"], scale)  # fmt: skip
        results = []
        for seed in seeds:
            results.append(self.emulator("paged_attention", *arguments, seed=seed))
            self.calls += 1
            assert all(map(same, results[0], results[-1])), f"other bits under seed {seed}"
        return results[0]


def close(what, attention, q, caches, seeds=(1, 2), **options):
    """The tolerance rule, with the floor of test_paged_kv.py."""
    got = attention(q, *caches, seeds=seeds, **options)
    wide = {n: o.double() if n == "sinks" and o is not None else o for n, o in options.items()}
    truth = paged_attention_reference(
        q.double(), *(c.double() for c in caches[:2]), *caches[2:], return_lse=True, **wide
    )
    peer = paged_attention_reference(q, *caches, return_lse=True, **options)
    for name, g, t, p in zip(("out", "lse"), got, truth, peer, strict=True):
        assert_close(f"{what}, {name}", g, t, p, floor=2.0)


def samples(attention):
    """The op's own samples that the kernel takes."""
    ran = 0
    for dtype in DTYPES:
        for sample in attention_samples(dtype, "cpu"):
            named = dict(inspect.signature(pyarch.paged_attention).bind(*sample.args, **sample.kwargs).arguments)
            if HERE.refuses(check(**named)) is not None:
                continue
            named.pop("return_lse")
            caches = [named.pop(name) for name in ("k_cache", "v_cache", "block_table", "seq_lens")]
            close(f"{sample.name}, {dtype}", attention, named.pop("q"), caches, **named)
            ran += 1
    assert ran > 30


def shapes(attention):
    """Page sizes, heads a key head, head sizes, rows: each with some of the options."""
    options = itertools.cycle(
        [{}, {"window": (100, -1)}, {"softcap": 4.0}, {"sinks": True}, {"causal": False, "window": (70, 3)}]
    )
    for number, (page_size, group, dim, int8) in enumerate(
        [
            (1, 1, 64, False),
            (5, 3, 128, False),
            (16, 4, 80, False),
            (256, 8, 64, False),
            (16, 8, 128, False),
            (7, 12, 16, False),
            (16, 2, 256, False),
            (3, 5, 8, False),
            (16, 8, 256, False),
            (5, 4, 128, True),
            (16, 1, 80, True),
            (1, 2, 64, True),
            (7, 12, 16, True),
            (16, 8, 256, True),
        ]
    ):
        dtype, chosen = DTYPES[number % 3], dict(next(options))
        lens, rows = [290, 0, 70, 600, 3], [1, 1, 4, 2, 5]
        if number % 2:
            rows = [1] * 5
        else:
            chosen["cu_seqlens_q"] = starts(rows)
        caches, _ = paged(lens, page_size, 2, dim, dtype)
        q = torch.randn(sum(rows), 2 * group, dim).to(dtype)
        if chosen.get("sinks"):
            chosen["sinks"] = torch.randn(2 * group).to(dtype if number % 2 else torch.float32)
        what = f"page {page_size}, group {group}, head size {dim}, {dtype}, {chosen}, int8 {int8}"
        if int8:
            caches, scales = rounded(caches)
            chosen |= scales
        close(what, attention, q, caches, **chosen)


def invariance(attention):
    """The same bits alone or among others, for any page size, table width and grid."""
    for dtype, int8, options in (
        (torch.float32, False, {}),
        (torch.bfloat16, False, {"window": (200, 0)}),
        (torch.float16, False, {"softcap": 4.0, "causal": False}),
        (torch.bfloat16, True, {"window": (200, 0)}),
    ):
        lens, rows = [520, 3, 40, 290], [1, 2, 7, 3]
        caches, dense = paged(lens, 16, 1, 48 if int8 else 40, dtype)
        kept = lambda caches, int8=int8: rounded(caches) if int8 else (caches, {})
        (k, v, table, seq_lens), scales = kept(caches)
        q = torch.randn(sum(rows), 3, k.shape[3]).to(dtype)
        options |= scales
        together = attention(q, k, v, table, seq_lens, cu_seqlens_q=starts(rows), seeds=(1, 2), **options)
        for page_size in (1, 1024):
            again, scales = kept(repaged(dense, page_size))
            again = attention(q, *again, cu_seqlens_q=starts(rows), **options | scales)
            assert all(map(same, again, together)), f"page size {page_size}"
        for b, first in enumerate(starts(rows).tolist()[:-1]):
            part = slice(first, first + rows[b])
            cu = starts(rows[b : b + 1])
            alone = attention(q[part], k, v, table[b : b + 1], seq_lens[b : b + 1], cu_seqlens_q=cu, **options)
            assert all(same(one, both[part]) for one, both in zip(alone, together, strict=True)), f"sequence {b}"
            if options.get("causal", True):  # each row as the last one of a shorter sequence
                length = seq_lens[b : b + 1] - rows[b] + 1
                one = attention(q[part][:1], k, v, table[b : b + 1], length, **options)
                assert all(same(x, both[first : first + 1]) for x, both in zip(one, together, strict=True))
        # With a table so wide that partial results have no room, a block folds all splits of its tile by itself.
        (k, v, table, seq_lens), scales = kept(repaged(dense, 1024))
        wide = torch.full((len(lens), 60_000), -1, dtype=torch.int32)
        wide[:, : table.shape[1]] = table
        again = attention(q, k, v, wide, seq_lens, cu_seqlens_q=starts(rows), **options | scales)
        assert all(map(same, again, together))


def spans(attention):
    """Splits beyond a span: right, and the same bits from memory and by one block, alone and after a window's start."""
    for dtype, group, options in ((torch.bfloat16, 3, {}), (torch.float16, 9, {"window": (4300, 0)})):
        caches, dense = paged([4700, 300], 16, 1, 16, dtype)
        q = torch.randn(2, group, 16).to(dtype)
        close(f"spans, {dtype}", attention, q, caches, seeds=(1,), **options)
        both = attention(q, *caches, seeds=(2,), **options)
        alone = attention(q[:1], caches[0], caches[1], caches[2][:1], caches[3][:1], **options)
        assert all(same(one, together[:1]) for one, together in zip(alone, both, strict=True))
        k, v, table, lens = repaged(dense, 1024)
        wide = torch.full((2, 60_000), -1, dtype=torch.int32)
        wide[:, : table.shape[1]] = table
        assert all(map(same, attention(q, k, v, wide, lens, **options), both))


def values(attention):
    """NaN outside of what a row sees does not reach it; indices that are not possible give NaN, and nothing else."""
    (k, v, table, lens), _ = paged([300, 40], 16, 2, 24)
    q = torch.randn(8, 4, 24)
    cu, options = starts([6, 2]), {"window": (50, 0)}
    clean = attention(q, k, v, table, lens, cu_seqlens_q=cu, **options)[0]
    for position in (0, 243, 244, 246, 270, 297, 299):
        page, offset = table[0, position // 16], position % 16
        for cache in (k, v):
            kept = cache[page, offset].clone()
            cache[page, offset] = torch.nan
            out = attention(q, k, v, table, lens, cu_seqlens_q=cu, **options)[0]
            cache[page, offset] = kept
            own = torch.cat([torch.arange(294, 300), torch.tensor([-1, -1])])
            sees = (position <= own) & (position >= own - 50)
            assert out[sees].isnan().all(), f"position {position}"
            assert same(out[~sees], clean[~sees]), f"position {position}"
    for page in (-1, -(2**31), k.shape[0], 2**31 - 1):
        bad = table.clone()
        bad[0, 15] = page  # positions 240 to 255, seen by all rows of the first sequence
        out, lse = attention(q, k, v, bad, lens, cu_seqlens_q=cu, **options)
        assert out[:6].isnan().all()
        assert lse[:6].isnan().all()
        assert same(out[6:], clean[6:])
    for length in (-1, -(2**31), table.shape[1] * 16 + 1, 2**31 - 1):
        out, lse = attention(q, k, v, table, torch.tensor([300, length], dtype=torch.int32), cu_seqlens_q=cu, **options)
        assert same(out[:6], clean[:6])
        assert out[6:].isnan().all()
        assert lse[6:].isnan().all()
    for wrong in ([1, 6, 8], [0, 6, 7], [0, 9, 8], [0, -1, 8], [0, 6, 2**31 - 1]):
        cu = torch.tensor(wrong, dtype=torch.int32)
        out, lse = attention(q, k, v, table, lens, cu_seqlens_q=cu, **options)
        assert out.isnan().all()
        assert lse.isnan().all()


def scales(attention):
    """Negative scales are numbers like others; NaN ones reach the rows that see their position, and no other."""
    arguments, _ = paged([300], 16, 2, 32)
    (k, v, table, lens), options = rounded(arguments)
    q, cu = torch.randn(6, 4, 32), starts([6])
    options |= {"cu_seqlens_q": cu, "window": (50, 0)}
    clean = attention(q, k, v, table, lens, **options)[0]
    negative = {name: -options[name] for name in ("k_scale", "v_scale")}
    assert same(attention(q, -k, v, table, lens, **options | {"k_scale": negative["k_scale"]})[0], clean)
    assert same(attention(q, k, v, table, lens, **options | {"v_scale": negative["v_scale"]})[0], -clean)
    for position in (0, 243, 244, 270, 297, 299):
        page, offset, own = table[0, position // 16], position % 16, torch.arange(294, 300)
        for name in ("k_scale", "v_scale"):
            odd = options[name].clone()
            odd[page, offset] = torch.nan
            out = attention(q, k, v, table, lens, **options | {name: odd})[0]
            sees = (position <= own) & (position >= own - 50)
            assert out[sees].isnan().all(), f"{name}, position {position}"
            assert same(out[~sees], clean[~sees]), f"{name}, position {position}"


def limits(attention):
    """What the kernel does not take is refused with the reason, by dispatch and by the operator."""
    caches, _ = paged([20, 9], 4, 1, 24, torch.float16)
    shifted = [torch.randn(*c.shape[:3], c.shape[3] + 1).half()[..., 1:] for c in caches[:2]]
    for what, q, (k, v) in (
        ("rows_a_sequence 0 to 16, not 17", torch.randn(34, 2, 24), caches[:2]),
        (
            "multiples of 8 with floating caches, not 20",
            torch.randn(2, 2, 20),
            (c[..., :20].clone() for c in caches[:2]),
        ),
        ("head_dim 8 to 256, not 264", torch.randn(2, 2, 264), (c.repeat(1, 1, 1, 11) for c in caches[:2])),
        ("multiples of 16 bytes", torch.randn(2, 2, 24), shifted),
    ):
        cu = starts([q.shape[0] // 2] * 2)
        facts = check(q.half(), k, v, *caches[2:], cu_seqlens_q=cu)
        assert what in (HERE.refuses(facts) or ""), what
        if q.shape[0] == 2:
            with pytest.raises((RuntimeError, ValueError), match="multiple"):
                attention(q.half(), k, v, *caches[2:], cu_seqlens_q=cu)


def main(path: str) -> None:
    torch.set_num_threads(1)
    attention = Attention(path)
    for part in (samples, shapes, invariance, spans, values, scales, limits):
        torch.manual_seed(0)
        begin, calls = time.perf_counter(), attention.calls
        part(attention)
        print(f"{part.__name__}: {attention.calls - calls} calls, {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1])
