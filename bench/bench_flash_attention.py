"""Attention against torch's fused kernel, and against the two matrix products and the softmax written out; its
gradient against the fused kernel's."""

import torch
import torch.nn.functional as F

import pyarch
from pyarch.ops.flash_attention import CASES, bytes_moved, flops

from ._contest import Entry, contest

FULL = {name: case for name, case in CASES.items() if not case["causal"]}
CAUSAL = {name: case for name, case in CASES.items() if case["causal"]}
FUSED, WRITTEN_OUT = "torch SDPA", "torch matmul + softmax"


def _attention(case: dict, dtype: torch.dtype, peer: str) -> Entry:
    group = case["heads"] // case["kv_heads"]
    rows, d = (case["batch"], case["heads"], case["rows"]), case["head_dim"]
    q = torch.randn(*rows, d).to(dtype)
    k, v = (torch.randn(case["batch"], case["kv_heads"], case["keys"], d).to(dtype) for _ in range(2))
    wide_k, wide_v = (x.repeat_interleave(group, 1) for x in (k, v))  # torch's copies are not counted
    later = torch.full((case["rows"], case["keys"]), -torch.inf, dtype=dtype).triu(1) if case["causal"] else 0.0

    def written_out():
        return torch.softmax(q @ wide_k.transpose(-1, -2) * d**-0.5 + later, -1) @ wide_v

    def fused():
        return F.scaled_dot_product_attention(q, k, v, is_causal=case["causal"], enable_gqa=group > 1)

    return Entry(
        lambda: pyarch.flash_attention(q, k, v, causal=case["causal"]),
        {peer: fused if peer == FUSED else written_out},
        flops=flops(case),
        compute="bf16" if dtype == torch.bfloat16 else "fp32",
        moved=bytes_moved(case, dtype),
        memory="l3",
    )


@contest("attention, fp32, against SDPA", cases=FULL, goal=1.3)
def bench_flash_attention_fp32(case):
    return _attention(case, torch.float32, FUSED)


@contest("attention, bf16, against SDPA", cases=FULL, goal=2.2)
def bench_flash_attention_bf16(case):
    return _attention(case, torch.bfloat16, FUSED)


@contest("causal attention, fp32, against SDPA", cases=CAUSAL, goal=2.0)
def bench_flash_attention_causal_fp32(case):
    return _attention(case, torch.float32, FUSED)


@contest("causal attention, bf16, against SDPA", cases=CAUSAL, goal=2.0)
def bench_flash_attention_causal_bf16(case):
    return _attention(case, torch.bfloat16, FUSED)


@contest("attention, fp32, against matmul and softmax", cases=FULL, goal=1.0)
def bench_flash_attention_written_out_fp32(case):
    return _attention(case, torch.float32, WRITTEN_OUT)


@contest("attention, bf16, against matmul and softmax", cases=FULL, goal=1.0)
def bench_flash_attention_written_out_bf16(case):
    return _attention(case, torch.bfloat16, WRITTEN_OUT)


# SDPA's gradient has no groups: cases whose heads have keys of their own.
TRAINED = {name: case for name, case in CASES.items() if case["heads"] == case["kv_heads"] and case["rows"] <= 4096}
_LONG = dict(batch=1, heads=8, kv_heads=8, rows=4096, keys=4096)
TRAINED |= {
    "h8-d64-4096": dict(_LONG, head_dim=64, causal=False),
    "h8-d128-4096-causal": dict(_LONG, head_dim=128, causal=True),
}


def _gradient(case: dict, dtype: torch.dtype, forward: bool) -> Entry:
    shape = case["batch"], case["heads"], case["rows"], case["head_dim"]
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
    d_out = torch.randn(shape).to(dtype)

    def training(attend):
        out = None if forward else attend()

        def run():
            with torch.inference_mode(False), torch.enable_grad():
                return torch.autograd.grad(attend() if out is None else out, (q, k, v), d_out, retain_graph=not forward)

        return run

    ours = training(lambda: pyarch.flash_attention(q, k, v, causal=case["causal"]))
    theirs = training(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=case["causal"]))
    return Entry(
        ours,
        {FUSED: theirs},
        flops=flops(case) * (7 if forward else 5) // 2,  # five products in the gradient for two in the forward
        compute="bf16" if dtype == torch.bfloat16 else "fp32",
        moved=bytes_moved(case, dtype) * 2,
        memory="l3",
    )


@contest("attention backward, fp32, against SDPA", cases=TRAINED, goal=1.3)
def bench_flash_attention_backward_fp32(case):
    return _gradient(case, torch.float32, forward=False)


@contest("attention backward, bf16, against SDPA", cases=TRAINED, goal=2.0)
def bench_flash_attention_backward_bf16(case):
    return _gradient(case, torch.bfloat16, forward=False)


@contest("attention forward and backward, fp32, against SDPA", cases=TRAINED, goal=1.3)
def bench_flash_attention_training_fp32(case):
    return _gradient(case, torch.float32, forward=True)


@contest("attention forward and backward, bf16, against SDPA", cases=TRAINED, goal=2.0)
def bench_flash_attention_training_bf16(case):
    return _gradient(case, torch.bfloat16, forward=True)
