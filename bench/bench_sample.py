"""sample against sorting: softmax, sort, cumulative sum, multinomial; and against topk for top-k alone."""

import torch

import pyarch
from pyarch.ops.sample import CASES, bytes_moved

from ._contest import Entry, contest


def _by_sorting(logits, top_p):
    p, order = (logits / 0.8).softmax(-1).sort(descending=True)
    p = torch.where(p.cumsum(-1) - p < top_p, p, 0)
    return order.gather(-1, torch.multinomial(p, 1))


def _by_topk(logits, k):
    values, index = torch.topk(logits, k)
    return index.gather(-1, torch.multinomial((values / 0.8).softmax(-1), 1))


def _logits(case):
    return torch.randn(case["batch"], case["vocabulary"]) * 3


@contest("sampling with top-p 0.9", cases=CASES, goal=1.0)
def bench_sample_top_p(case):
    x = _logits(case)
    return Entry(lambda: pyarch.sample(x, temperature=0.8, top_p=0.9), {"torch sort": lambda: _by_sorting(x, 0.9)},
                 moved=bytes_moved(case, x.dtype), memory="l3")  # fmt: skip


@contest("sampling with top-k 50", cases=CASES, goal=1.0)
def bench_sample_top_k(case):
    x = _logits(case)
    return Entry(lambda: pyarch.sample(x, temperature=0.8, top_k=50), {"torch.topk": lambda: _by_topk(x, 50)},
                 moved=bytes_moved(case, x.dtype), memory="l3")  # fmt: skip
