"""quant_matmul of the CUDA library on CPU tensors, with the emulator (test_emulator.py runs this).

    python tests/emulated_quant_matmul.py LIBRARY

In a process of its own, since the library registers pyarch::quant_matmul__cuda for CPU tensors. Every call runs under
several seeds, which must give the same bits; memory that the kernel allocates is full of NaN.
"""

import dataclasses
import itertools
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from emulated_operators import Emulator
from quantized_weights import FORMATS, weight

from pyarch._instruments import assert_close, same
from pyarch.ops import _activation
from pyarch.ops.quant_matmul import QUANT_MATMUL, check, quant_matmul_reference
from pyarch.quantized import QuantizedTensor

HERE = dataclasses.replace(QUANT_MATMUL.limits["cuda"], device="cpu", capability=(0, 0))
DTYPES = (torch.bfloat16, torch.float16)
ROWS = (1, 8, 11, 16, 23, 32, 33, 64, 70)  # every tile, full and not, and two of the largest


class Matmul:
    """pyarch.quant_matmul as it calls the CUDA operator."""

    def __init__(self, path: str):
        self.emulator = Emulator(path)
        self.calls = 0

    def __call__(self, x, w, bias=None, activation=None, seeds=(1,)):
        packed = w.prepack("fragments")
        assert HERE.refuses(check(x, packed, bias, activation=activation)) is None
        code, slope = _activation.encode(activation)
        arguments = (x, packed.q, packed.scale, packed.zero, packed.offset, None, bias, w.out_features, w.group_size,
                     0, code, slope)  # fmt: skip
        results = []
        for seed in seeds:
            results.append(self.emulator("quant_matmul", *arguments, seed=seed))
            self.calls += 1
            assert same(results[0], results[-1]), f"other bits under seed {seed}"
        return results[0]


def close(what, matmul, x, w, bias=None, activation=None, seeds=(1, 2), exact=False):
    """The tolerance rule; the peer is same-dtype PyTorch on the same weight."""
    got = matmul(x, w, bias, activation, seeds)
    truth = quant_matmul_reference(x.double(), w, bias, activation=activation)
    peer = F.linear(x, w.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))
    assert_close(what, got, truth, _activation.apply(activation, peer), exact=exact)


def formats(matmul):
    """Every format, both codes and dtypes, group sizes, and shapes that fill no tile."""
    groups, scales = itertools.cycle((32, 64, 128, -1, 96, 192, 160)), itertools.cycle((torch.float32, *DTYPES))
    shapes = itertools.cycle([(1, 33, 576), (5, 70, 95), (13, 17, 130), (30, 40, 577), (50, 100, 72), (67, 5, 300)])
    for bits, kind, dtype in itertools.product((4, 8), FORMATS, DTYPES):
        for _ in range(2):
            (m, n, k), group, scale = next(shapes), next(groups), next(scales)
            w = weight(n, k, bits=bits, kind=kind, group_size=group, scale_dtype=scale)
            what = f"int{bits} {kind} {dtype} {m}x{n}x{k} g{group} {scale}"
            close(what, matmul, torch.randn(m, k).to(dtype), w, torch.randn(n).to(dtype))


def zeros(matmul):
    """Every dtype that a zero may have, beyond the codes too."""
    for i, dtype in enumerate((torch.uint8, torch.int8, torch.int16, torch.int32, *DTYPES, torch.float32)):
        w = weight(20, 130, bits=(4, 8)[i % 2])
        zero = torch.randint(0, 100, w.scale.shape).to(dtype)
        w = QuantizedTensor(w.q, w.scale, 130, 32, zero)
        close(f"zero of {dtype}", matmul, torch.randn(3, 130).to(DTYPES[i % 2]), w, seeds=(1,))


def epilogues(matmul):
    w, x = weight(40, 64), torch.randn(6, 64)
    for i, activation in enumerate((None, "relu", "silu", "gelu", "gelu_tanh", ("leaky_relu", 0.1))):
        dtype = DTYPES[i % 2]
        bias = torch.randn(40).to(torch.float32 if i % 3 else dtype)
        close(f"{activation}", matmul, x.to(dtype) * 3, w, bias, activation)


def layouts(matmul):
    """x as it lies in memory: padded rows, columns apart, transposed, misaligned; M, N or K of 0 or 1."""
    w, dtype = weight(24, 72), torch.bfloat16
    for what, x in (
        ("rows apart", torch.randn(9, 80).to(dtype)[:, :72]),
        ("columns apart", torch.randn(9, 144).to(dtype)[:, ::2]),
        ("transposed", torch.randn(72, 9).to(dtype).T),
        ("misaligned", torch.randn(9, 81).to(dtype)[:, 1:73]),
        ("one row for all", torch.randn(1, 72).to(dtype).expand(9, 72)),
    ):
        assert same(matmul(x, w, seeds=(1, 2)), matmul(x.contiguous(), w)), what
    for m, n, k in ((0, 8, 16), (3, 0, 16), (3, 8, 0), (1, 1, 1), (2, 16, 64)):
        for group in (32, -1):
            close(f"{m}x{n}x{k}", matmul, torch.randn(m, k).to(dtype), weight(n, k, group_size=group), torch.randn(n))


def exact(matmul):
    """Small integers: every product, sum and result is representable."""
    for bits, kind, m in itertools.product((4, 8), FORMATS, (3, 40)):
        w = weight(18, 200, bits=bits, kind=kind)
        w = QuantizedTensor(w.q, torch.ones_like(w.scale), 200, 32, *(
            None if t is None else torch.full_like(t, v) for t, v in ((w.zero, 2), (w.offset, -2))))  # fmt: skip
        x = torch.zeros(m, 200, dtype=torch.float16)
        x[:, ::25] = torch.randint(-1, 2, x[:, ::25].shape).half()
        close(f"integers, int{bits} {kind}", matmul, x, w, seeds=(1,), exact=True)


def saturated(matmul):
    """The largest codes, infinities and NaN: each in its own row."""
    w = QuantizedTensor(torch.full((17, 128), -128, dtype=torch.int8), torch.ones(17, 1), 128, -1)
    x = torch.full((3, 128), 2.0, dtype=torch.bfloat16)
    assert torch.equal(matmul(x, w), torch.full((3, 17), -128.0 * 2 * 128).bfloat16())
    w, x = weight(20, 128, kind="offset"), torch.randn(9, 128).half()
    right = matmul(x, w)
    rest = torch.arange(9) != 4
    for bad in (torch.nan, torch.inf):
        x[4, 70] = bad
        y = matmul(x, w)
        assert not y[4].isfinite().any()
        assert same(y[rest], right[rest])


def invariance(matmul):
    """A row has the same bits for any M, in every tile, alone and last."""
    for bits, kind, group, k in ((4, "symmetric", 128, 1100), (8, "zero", 32, 200), (4, "offset", -1, 577)):
        w = weight(36, k, bits=bits, kind=kind, group_size=group)
        x = torch.randn(max(ROWS), k).to(DTYPES[bits // 8])
        most = matmul(x, w)
        for m in ROWS:
            assert same(matmul(x[:m], w), most[:m]), f"M={m}"
        assert same(matmul(x[-1:], w), most[-1:])


def splits(matmul):
    """Tiles that share their columns among 4, 2 and 1 blocks have the same bits, and stay right."""
    x = torch.randn(17, 70).bfloat16()
    for n in (48 * 128, 96 * 128 - 5):
        w = weight(n, 70, group_size=64)
        few = dataclasses.replace(w, q=w.q[:40], scale=w.scale[:40])
        close(f"N {n}", matmul, x, few, seeds=(1, 5))
        y = matmul(x, w, seeds=(2,))
        assert same(matmul(x, few), y[:, :40].contiguous()), f"N {n}"
        assert_close(f"N {n}", y, quant_matmul_reference(x.double(), w), F.linear(x, w.dequantize(x.dtype)))


def limits(matmul):
    """What the kernel does not take is refused with the reason."""
    x, w = torch.randn(2, 64).half(), weight(8, 64)
    for what, facts in (
        ("packed as fragments", check(x, w)),
        ("not panels", check(x, w.prepack("panels"))),
        ("float32", check(x.float(), w.prepack("fragments"))),
        ("act_bits None, not 8", check(x, w.prepack("fragments"), act_bits=8)),
        ("not 48", check(x, weight(8, 64, group_size=48).prepack("fragments"))),
        ("g_idx False", check(x, weight(8, 64, act_order=True).prepack("fragments"))),
    ):
        assert what in (HERE.refuses(facts) or ""), what
    packed = w.prepack("fragments")
    with pytest.raises((RuntimeError, ValueError), match="^q: "):
        matmul.emulator("quant_matmul", x, packed.q, packed.scale, None, None, None, None, 17, 32, 0, 0, 0.0)


def main(path: str, *names: str) -> None:
    torch.set_num_threads(1)
    matmul = Matmul(path)
    for part in (formats, zeros, epilogues, layouts, exact, saturated, invariance, splits, limits):
        if names and part.__name__ not in names:
            continue
        torch.manual_seed(0)
        begin, calls = time.perf_counter(), matmul.calls
        part(matmul)
        print(f"{part.__name__}: {matmul.calls - calls} calls, {time.perf_counter() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
