"""swiglu against F.silu(gate) * up, eager and compiled."""

import torch
import torch.nn.functional as F

import pyarch
from pyarch.ops.swiglu import CASES, bytes_moved

from ._contest import Entry, contest


def _torch(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@contest("SwiGLU, bf16", cases=CASES, goal=1.0)
def bench_swiglu(case):
    x = torch.randn(case["rows"], 2 * case["features"]).bfloat16()
    compiled = torch.compile(_torch)
    return Entry(
        lambda: pyarch.swiglu(x), {"torch eager": lambda: _torch(x), "torch.compile": lambda: compiled(x)},
        moved=bytes_moved(case, x.dtype), memory="l3" if x.nbytes < 8 << 20 else "dram",
    )  # fmt: skip
