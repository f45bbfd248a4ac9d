"""Without a GPU: operators of GPU kernels infer shapes on fake CUDA tensors, and models are packed for them."""

import dataclasses
import sys

import pytest
import torch
from quantized_weights import llama_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import pyarch
from pyarch import native, nn, orders
from pyarch._instruments import same
from pyarch.explain import ops
from pyarch.models import Llama
from pyarch.native import Recorder, operator
from pyarch.ops.quant_matmul import QUANT_MATMUL

quant_matmul_room = sys.modules["pyarch.ops.quant_matmul"]  # pyarch.ops.quant_matmul is the function


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


@pytest.fixture
def cuda_is_here(monkeypatch):
    """Dispatch believes in a GPU of sm_90 and in the CUDA library."""
    monkeypatch.setitem(native._UNAVAILABLE, "cuda", None)
    monkeypatch.setitem(native._UNAVAILABLE, "triton", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


@pytest.mark.parametrize(
    ("dtype", "act_bits", "options", "order"),
    [
        (torch.bfloat16, None, {}, "fragments"),
        (torch.float16, None, {"bits": 8, "kind": "offset", "group_size": -1}, "fragments"),
        (torch.float32, None, {}, "canonical"),
        (torch.bfloat16, 8, {}, "canonical"),
        (torch.bfloat16, None, {"group_size": 48}, "canonical"),
        (torch.bfloat16, None, {"act_order": True}, "canonical"),
    ],
    ids=str,
)
def test_a_model_is_packed_where_the_cuda_kernel_takes_it(dtype, act_bits, options, order, cuda_is_here, monkeypatch):
    """With the CPU standing in for the GPU: it has the kernels, limits and orders of one, its own not."""
    ours = {name: dataclasses.replace(limits, device={"cpu": "cuda"}.get(limits.device, "cpu"))
            for name, limits in QUANT_MATMUL.limits.items()}  # fmt: skip
    file = llama_file(**options)
    plain = Llama.from_gguf(file, dtype=dtype, act_bits=act_bits)
    nn.prepack(plain)
    assert {weight.order for weight in weights(plain)} == {"panels"}
    monkeypatch.setattr(quant_matmul_room, "LIMITS", ours)
    monkeypatch.setattr(quant_matmul_room, "QUANT_MATMUL", dataclasses.replace(QUANT_MATMUL, limits=ours))
    for name, device in (("panels", "cuda"), ("fragments", "cpu")):
        monkeypatch.setitem(orders.ORDERS, name, dataclasses.replace(orders.ORDERS[name], device=device))
    model = Llama.from_gguf(file, dtype=dtype, act_bits=act_bits)
    assert {weight.order for weight in weights(model)} == {order}
    assert model.head.weight.q is model.embed.weight.q
    tokens = torch.tensor([[5, 40, 0, 17]])
    with pyarch.use_backend("reference"), torch.inference_mode():
        assert same(model(tokens), plain(tokens))
    for change in (lambda m: m.train(), lambda m: m.load_state_dict(m.state_dict()), lambda m: m.to("meta")):
        model = Llama.from_gguf(file, dtype=dtype, act_bits=act_bits)
        change(model)
        assert {weight.order for weight in weights(model)} == {"canonical"}


def weights(model):
    return [m.weight for m in model.modules() if isinstance(m, nn.QuantizedLinear | nn.QuantizedEmbedding)]


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch with CUDA, though no GPU")
def test_a_model_on_a_gpu_takes_gpu_kernels(cuda_is_here):
    """Whole sequences; the checks of rotary_append's reference read values, which fake tensors have not."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Llama.from_gguf(llama_file(), dtype=torch.bfloat16, device="cuda:0")
        for layer in (model.head, model.layers[0].mlp.down):
            x = torch.empty(1, layer.in_features, dtype=torch.bfloat16, device="cuda:0")
            assert pyarch.explain(pyarch.quant_matmul, x, layer.weight).backend == "cuda"
        with Recorder() as ran, torch.inference_mode():
            logits = model(torch.empty(2, 5, dtype=torch.int64, device="cuda:0"))
    assert (logits.shape, logits.device.type) == ((2, 5, 48), "cuda")
    assert {call.name() for call, _ in ran.calls} == {"pyarch::quant_matmul__cuda", "pyarch::flash_attention__triton"}
