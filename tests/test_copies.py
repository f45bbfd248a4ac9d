"""Copies that ops make of arguments in other layouts are counted, and a model's own calls make none."""

import pytest
import torch

import pyarch
from pyarch.models import Llama, LlamaConfig, generate


def made(call):
    """(copies, bytes) that a call makes."""
    before = pyarch.copies()
    call()
    return tuple(b - a for a, b in zip(before, pyarch.copies(), strict=True))


def calls(x):
    """Every op on rows (3, 4, 64) of some layout, with what it copies of x unless its rows are contiguous."""
    weight, whole = torch.ones(64), x.numel() * 4
    yield "rms_norm", lambda: pyarch.rms_norm(x, weight), whole
    yield "swiglu", lambda: pyarch.swiglu(x), whole
    yield "sample", lambda: pyarch.sample(x[0]), whole // 3
    caches = torch.zeros(2, 2, 8, 1, 64)
    yield "kv_append", lambda: pyarch.kv_append(x[:, :1], x[:, 1:2], *caches, torch.arange(3)), whole // 4 * 2
    table, lens = torch.zeros(3, 1, dtype=torch.int32), torch.full((3,), 4, dtype=torch.int32)
    yield "paged_attention", lambda: pyarch.paged_attention(x, *caches, table, lens), whole
    yield "flash_attention", lambda: pyarch.flash_attention(x[None], x[None], x[None]), 0
    w = pyarch.quantize(torch.randn(8, 64))
    yield "quant_matmul", lambda: pyarch.quant_matmul(x, w), 0


@pytest.mark.parametrize("layout", ["contiguous", "padded", "stepped"])
def test_what_is_copied_is_counted(layout):
    room = torch.randn(3, 4, 130)
    x = {"contiguous": room[..., :64].contiguous(), "padded": room[..., :64], "stepped": room[..., :128:2]}[layout]
    for name, call, nbytes in calls(x):
        copies, copied = made(call)
        if layout == "stepped":
            assert copied == nbytes, name
            assert (copies > 0) == (nbytes > 0), name
        elif layout == "contiguous" or name != "rms_norm":
            assert (copies, copied) == (0, 0), name


def test_rows_that_are_not_evenly_apart():
    x = torch.randn(3, 6, 64)[:, :4]
    assert made(lambda: pyarch.quant_matmul(x, pyarch.quantize(torch.randn(8, 64)))) == (1, x.numel() * 4)


def test_a_model_copies_nothing():
    """Prompt, decoding and a forward pass; a copy of this kind would be in every token."""
    model = Llama(LlamaConfig(40, 32, 48, 2, 6, 2, 8, 64, rope_theta=100.0)).eval()
    assert made(lambda: list(generate(model, [1, 2, 3], max_tokens=4))) == (0, 0)
    assert made(lambda: model(torch.tensor([[1, 2, 3]]))) == (0, 0)
