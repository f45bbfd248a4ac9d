"""Every operator of a GPU kernel infers shapes on fake CUDA tensors, also where there is no GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import pyarch
from pyarch.explain import ops
from pyarch.native import Recorder, operator


def quant_matmul():
    x = torch.randn(3, 64, requires_grad=True)
    pyarch.quant_matmul(x, pyarch.quantize(torch.randn(16, 64))).sum().backward()


def flash_attention():
    q = torch.randn(1, 4, 6, 8, requires_grad=True)
    k, v = torch.randn(2, 1, 2, 9, 8)
    pyarch.flash_attention(q, k, v, causal=True, bias=torch.zeros(6, 9, requires_grad=True)).sum().backward()


def kv_append():
    k, v = torch.randn(2, 3, 2, 8)
    pyarch.kv_append(k, v, *torch.zeros(2, 4, 8, 2, 8), torch.tensor([3, -1, 9]))


def paged_attention():
    table, lens = torch.zeros(2, 1, dtype=torch.int32), torch.tensor([3, 8], dtype=torch.int32)
    pyarch.paged_attention(torch.randn(2, 4, 8), *torch.zeros(2, 4, 8, 2, 8), table, lens)


CALLS = {f.__name__: f for f in (quant_matmul, flash_attention, kv_append, paged_attention)}


def test_every_op_with_a_gpu_kernel_is_here():
    assert CALLS.keys() == {name for name, op in ops().items() if {"cuda", "triton"} & op.limits.keys()}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_fake_tensors(name, backend):
    with Recorder() as ran, pyarch.use_backend("cpu"):
        CALLS[name]()
    assert ran.calls
    for call, arguments in ran.calls:
        real = tree_leaves(call(*tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, arguments)))
        other = operator(call.name().split("::")[1].rpartition("__")[0], backend)
        with FakeTensorMode():
            found = tree_leaves(other(*tree_map(on_a_gpu, arguments)))
        for ours, theirs in zip(found, real, strict=True):
            if theirs is not None:
                assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
                assert ours.device.type == "cuda"


def on_a_gpu(x):
    """The same, as a tensor without memory; under FakeTensorMode."""
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
