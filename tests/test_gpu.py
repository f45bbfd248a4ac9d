"""What only a GPU can show: streams, graphs, devices, and that a bad index harms nobody."""

import functools

import pytest
import torch
from quantized_weights import llama_file

import pyarch
from pyarch import nn
from pyarch._instruments import same
from pyarch.models import Llama, generate
from pyarch.native import Recorder
from pyarch.ops.paged_kv import kv_append_reference

KERNELS = ("cuda", "triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def quant_matmul():
    w = pyarch.quantize(torch.randn(256, 512), symmetric=False).to("cuda")
    x = torch.randn(3, 512, device="cuda", dtype=torch.bfloat16)
    return x, lambda: pyarch.quant_matmul(x, w, activation="silu", backend="triton")


def quant_matmul_packed():
    w = pyarch.quantize(torch.randn(256, 4096), symmetric=False).to("cuda").prepack()
    x = torch.randn(40, 4096, device="cuda", dtype=torch.bfloat16)  # several blocks share a tile's columns
    return x, lambda: pyarch.quant_matmul(x, w, activation="silu", backend="cuda")


def quant_matmul_act8():
    w = pyarch.quantize(torch.randn(256, 512), bits=8, group_size=-1).to("cuda")
    x = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)
    return x, lambda: pyarch.quant_matmul(x, w, act_bits=8, backend="triton")


def quant_matmul_gradient():
    w = pyarch.quantize(torch.randn(256, 512), symmetric=False).to("cuda")
    x = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16).requires_grad_()
    source = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    return source, lambda: torch.autograd.grad(pyarch.quant_matmul(x, w, backend="triton"), x, source)[0]


def paged_kv_append(backend="cuda"):
    k, v = torch.randn(2, 6, 2, 64, device="cuda", dtype=torch.bfloat16)
    caches = [torch.zeros(4, 8, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    slots = torch.tensor([3, 31, -1, 0, 17, 9], device="cuda")

    def call():
        pyarch.kv_append(k, v, *caches, slots, backend=backend)
        return caches[0] + caches[1]

    return k, call


def paged_kv_attention(backend="cuda"):
    caches = torch.randn(2, 80, 16, 2, 64, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(80, device="cuda").to(torch.int32).view(2, 40)
    lens = torch.tensor([600, 37], device="cuda", dtype=torch.int32)
    q = torch.randn(2, 8, 64, device="cuda", dtype=torch.bfloat16)
    return q, lambda: pyarch.paged_attention(q, *caches, table, lens, backend=backend)


def paged_kv_prompts():
    caches = torch.randn(2, 80, 16, 2, 64, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(80, device="cuda").to(torch.int32).view(2, 40)
    lens, starts = (torch.tensor(n, device="cuda", dtype=torch.int32) for n in ([600, 37], [0, 200, 201]))
    q = torch.randn(201, 8, 64, device="cuda", dtype=torch.bfloat16)
    return q, lambda: pyarch.paged_attention(q, *caches, table, lens, cu_seqlens_q=starts, backend="triton")


def paged_kv_int8(backend="cuda"):
    k, v = torch.randn(2, 48, 2, 64, device="cuda", dtype=torch.bfloat16)
    caches = torch.zeros(2, 3, 16, 2, 64, device="cuda", dtype=torch.int8)
    scales = dict(zip(("k_scale", "v_scale"), torch.zeros(2, 3, 16, 2, device="cuda"), strict=True))
    slots, table = torch.arange(48, device="cuda"), torch.tensor([[2, 0, 1]], device="cuda", dtype=torch.int32)
    lens, q = torch.tensor([41], device="cuda", dtype=torch.int32), k[:1].repeat(1, 4, 1)

    def call():
        pyarch.kv_append(k, v, *caches, slots, **scales, backend=backend)
        return pyarch.paged_attention(q, *caches, table, lens, **scales, backend=backend)

    return k, call


def flash_attention():
    q, k, v = (torch.randn(1, heads, 200, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    cu = torch.tensor([0, 130, 130, 200], device="cuda", dtype=torch.int32)
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "dropout_p": 0.25, "seed": torch.tensor(7, device="cuda")}
    return q, lambda: pyarch.flash_attention(q, k, v, causal=True, **packed, backend="triton")


def flash_attention_gradient():
    q, k, v = (torch.randn(1, heads, 200, 64, device="cuda").requires_grad_() for heads in (4, 2, 2))
    source = torch.randn(1, 4, 200, 64, device="cuda")

    def call():
        out = pyarch.flash_attention(q, k, v, causal=True, backend="triton")
        return torch.cat([g.flatten() for g in torch.autograd.grad(out, (q, k, v), source)])

    return source, call


MAKERS = [quant_matmul, quant_matmul_packed, quant_matmul_act8, quant_matmul_gradient, paged_kv_prompts]
MAKERS += [flash_attention, flash_attention_gradient]
for one in (paged_kv_append, paged_kv_attention, paged_kv_int8):
    MAKERS += [pytest.param(functools.partial(one, backend), id=f"{one.__name__}-{backend}") for backend in KERNELS]
CALLS = pytest.mark.parametrize("make", MAKERS)


@CALLS
def test_runs_on_the_current_stream(make):
    """On a stream that is behind, the kernel sees what comes before it there and not what is there now."""
    source, call = make()
    value, fresh = call().clone(), torch.randn_like(source)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        source.copy_(fresh)
        late = call().clone()
    torch.cuda.synchronize()
    assert not same(late, value)
    assert same(late, call())


@CALLS
def test_can_be_captured(make):
    source, call = make()
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        source.copy_(torch.randn_like(source))
        graph.replay()
        replayed = captured.clone()
        assert same(replayed, call())


@pytest.mark.parametrize("backend", KERNELS)
def test_paged_kv_bad_slots_are_skipped(backend):
    k, v = torch.randn(2, 5, 2, 8, device="cuda")
    caches = [torch.randn(3, 4, 2, 8, device="cuda") for _ in range(2)]
    want = [cache.cpu() for cache in caches]
    kv_append_reference(k[:1].cpu(), v[:1].cpu(), *want, torch.tensor([7]))
    slots = torch.tensor([7, 12, -2, 2**62, -(2**62)], device="cuda")
    pyarch.kv_append(k, v, *caches, slots, backend=backend)
    torch.cuda.synchronize()
    assert all(same(cache.cpu(), right) for cache, right in zip(caches, want, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_paged_kv_bad_indices_give_nan(backend):
    """What the host cannot check without waiting."""
    caches = torch.randn(2, 8, 16, 2, 64, device="cuda")
    q = torch.randn(3, 4, 64, device="cuda")
    table = torch.tensor([[1, 2], [3, 2**31 - 1], [-1, 4]], device="cuda", dtype=torch.int32)
    lens = torch.tensor([20, 17, -1], device="cuda", dtype=torch.int32)
    out = pyarch.paged_attention(q, *caches, table, lens, backend=backend)
    assert out[0].isfinite().all()
    assert out[1:].isnan().all()


@pytest.mark.parametrize("backend", KERNELS)
def test_paged_kv_has_the_same_bits_alone(backend):
    caches = torch.randn(2, 300, 16, 2, 64, device="cuda", dtype=torch.float16)
    lens = torch.tensor([1500, 3, 2999], device="cuda", dtype=torch.int32)
    table = torch.randperm(300, device="cuda").to(torch.int32)[:200].expand(3, 200).contiguous()
    q = torch.randn(3, 8, 64, device="cuda", dtype=torch.float16)
    together = pyarch.paged_attention(q, *caches, table, lens, backend=backend)
    for repeat in range(20):
        b = repeat % 3
        alone = pyarch.paged_attention(q[b : b + 1], *caches, table[b : b + 1], lens[b : b + 1], backend=backend)
        assert same(alone, together[b : b + 1])


@CALLS
def test_runs_on_the_device_of_its_tensors(make):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(1):
        _, call = make()
        want = call().clone()
    with torch.cuda.device(0):
        assert same(call(), want)


def test_auto_is_the_gpu_kernel():
    x, _ = quant_matmul()
    w = pyarch.quantize(torch.randn(64, 512)).to("cuda")
    assert pyarch.explain(pyarch.quant_matmul, x, w).backend == "triton"
    k, v = torch.randn(2, 5, 2, 8, device="cuda")
    caches = [torch.zeros(3, 4, 2, 8, device="cuda") for _ in range(2)]
    slots = torch.arange(5, device="cuda")
    assert pyarch.explain(pyarch.kv_append, k, v, *caches, slots).backend == "cuda"
    q = torch.randn(1, 4, 20, 64, device="cuda", dtype=torch.bfloat16)
    assert pyarch.explain(pyarch.flash_attention, q, q, q).backend == "triton"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_loaded_model_runs_on_gpu_kernels(bits):
    """Packed as fragments, on the CUDA C++ kernels in every step, near the same model on the CPU."""
    file = llama_file(bits=bits, kind="offset")
    model, plain = Llama.from_gguf(file, dtype=torch.bfloat16, device="cuda"), Llama.from_gguf(file)
    layers = [m for m in model.modules() if isinstance(m, nn.QuantizedLinear | nn.QuantizedEmbedding)]
    assert {layer.weight.order for layer in layers} == {"fragments"}
    x = torch.empty(1, 128, device="cuda", dtype=torch.bfloat16)
    assert pyarch.explain(pyarch.quant_matmul, x, model.head.weight).backend == "cuda"
    for dtype in (None, torch.int8):
        rows, used = [], []
        for each in (model, plain):
            cache = each.cache(4, 16, dtype=dtype)
            sequence = cache.allocate()
            with torch.inference_mode(), Recorder() as ran:
                rows.append([each.extend(cache, [sequence], [t])[0].float().cpu() for t in ([5, 40, 0, 17], [3], [9])])
            used.append({call.name() for call, _ in ran.calls})
        assert used[0] >= {"pyarch::quant_matmul__cuda", "pyarch::paged_attention__cuda"}
        for got, want in zip(*rows, strict=True):
            assert (got - want).norm() <= 0.05 * want.norm()
    assert len(list(generate(model, [5, 40], max_tokens=9, temperature=0.8, seed=1, cache_dtype=torch.int8))) == 9
    for change in (lambda: model.to("cpu"), lambda: model.train()):
        model.to("cuda").eval()
        nn.prepack(model, torch.bfloat16)
        assert {layer.weight.order for layer in layers} == {"fragments"}
        change()
        assert {layer.weight.order for layer in layers} == {"canonical"}
