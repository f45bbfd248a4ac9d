"""RMSNorm against torch's own."""

import torch
import torch.nn.functional as F

import pyarch
from pyarch.ops.rms_norm import CASES, bytes_moved

from ._contest import Entry, contest


def _norms(case: dict, dtype: torch.dtype) -> Entry:
    n = case["n"]
    x, w = torch.randn(case["rows"], n).to(dtype), torch.ones(n, dtype=dtype)
    return Entry(
        lambda: pyarch.rms_norm(x, w),
        {"torch F.rms_norm": lambda: F.rms_norm(x, (n,), w, 1e-6)},
        moved=bytes_moved(case, dtype),
        memory="l3" if x.nbytes < 8 << 20 else "dram",
    )


@contest("RMSNorm, bf16", cases=CASES, goal=1.0)
def bench_rms_norm_bf16(case):
    return _norms(case, torch.bfloat16)


@contest("RMSNorm, fp32", cases=CASES, goal=1.0)
def bench_rms_norm_fp32(case):
    return _norms(case, torch.float32)
