"""int4 and int8 matmuls against torch's int4 kernel (bf16) and its dynamic int8 linear with the best engine.

Weights are prepacked on both sides, as torch's kernels demand and as models here hold them.
Weights are rotated past the cache, so that they come from DRAM as in a real model.
"""

import itertools
import warnings

import torch

import pyarch
from pyarch.ops.quant_matmul import CASES, bytes_moved, flops

from ._contest import PAST_CACHE, Entry, contest, rotate

DECODE = {name: case for name, case in CASES.items() if case["m"] == 1 and case["group_size"] == 128}
BATCH = {name: case for name, case in CASES.items() if case["m"] > 1}
INT4PACK = "torch _weight_int4pack_mm"


def _weights(case: dict, bits: int):
    w = pyarch.quantize(torch.randn(case["n"], case["k"]).bfloat16(), bits=bits, group_size=case["group_size"])
    return rotate(w.prepack())


def _int4pack(case: dict, x: torch.Tensor):
    n, k, group = case["n"], case["k"], case["group_size"]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (n, k), dtype=torch.int32), 1)
    turns = rotate((packed, torch.rand(k // group, n, 2).bfloat16()))

    def call():
        codes, scales = next(turns)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, scales)

    return call


def _dynamic_int8(case: dict, engine: str):
    """torch's dynamic int8 linear; the packed weight hides its tensor, so copies are counted by hand."""
    torch.backends.quantized.engine = engine
    x, w = torch.randn(case["m"], case["k"]), torch.randn(case["n"], case["k"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized dtypes are deprecated; the linear is what torch has
        q = torch.quantize_per_channel(w, torch.full((case["n"],), 0.02), torch.zeros(case["n"]).long(), 0, torch.qint8)
        copies = -(-PAST_CACHE // w.numel())
        turns = itertools.cycle([torch.ops.quantized.linear_prepack(q, None) for _ in range(copies)])
    return lambda: torch.ops.quantized.linear_dynamic(x, next(turns), False)


def _engines(case: dict) -> dict:
    return {
        f"torch dynamic int8 ({engine})": _dynamic_int8(case, engine)
        for engine in torch.backends.quantized.supported_engines
        if engine in ("x86", "onednn")
    }


def _entry(case: dict, bits: int, act_bits: int | None, peers: dict, dtype: torch.dtype) -> Entry:
    x, weights = torch.randn(case["m"], case["k"]).to(dtype), _weights(case, bits)
    return Entry(
        lambda: pyarch.quant_matmul(x, next(weights), act_bits=act_bits),
        peers,
        flops=flops(case),
        compute="int8" if act_bits else "bf16",
        moved=bytes_moved(case, bits),
    )


def _against_int4pack(case: dict, act_bits: int | None) -> Entry:
    x = torch.randn(case["m"], case["k"]).bfloat16()
    return _entry(case, 4, act_bits, {INT4PACK: _int4pack(case, x)}, torch.bfloat16)


@contest("int4 g128, M=1, act_bits=8", cases=DECODE, goal=1.6, note="memory: torch itself reads at 70 % of it")
def bench_int4_decode_int8(case):
    return _against_int4pack(case, 8)


@contest("int4 g128, M=1, 16-bit activations", cases=DECODE, goal=1.3, note="memory, as above")
def bench_int4_decode_16bit(case):
    return _against_int4pack(case, None)


@contest("int4 g128, M=16 and 128, 16-bit activations", cases=BATCH, goal=2.3)
def bench_int4_batch_16bit(case):
    return _against_int4pack(case, None)


@contest("int4 g128, M=16 and 128, act_bits=8", cases=BATCH, goal=4.0)
def bench_int4_batch_int8(case):
    return _against_int4pack(case, 8)


@contest("int4 g128, M=16 and 128, act_bits=8, against int8 weights", cases=BATCH, goal=1.0)
def bench_int4_batch_dynamic(case):
    return _entry(case, 4, 8, _engines(case), torch.float32)


@contest("int8 weights, M=16 and 128, act_bits=8", cases=BATCH, goal=1.1)
def bench_int8_batch(case):
    """A scale for each row of the weight, which is what the peer has."""
    return _entry({**case, "group_size": -1}, 8, 8, _engines(case), torch.float32)


@contest("int8 g128, M=16 and 128, act_bits=8", cases=BATCH, goal=1.0)
def bench_int8_groups(case):
    return _entry(case, 8, 8, _engines(case), torch.float32)
