"""Dispatch: limits as data, a named backend runs or raises, and what auto becomes."""

import asyncio
import concurrent.futures
import dataclasses

import pytest
import torch

import pyarch
from pyarch import dispatch, native
from pyarch.dispatch import Limits, Op
from pyarch.ops.rms_norm import RMS_NORM
from pyarch.testing import Operators

X, W = torch.randn(3, 8), torch.randn(8)
FACTS = {"device": "cpu", "dtype": torch.float32, "head_dim": 64, "mask": None}


def ran(function, *args, **kwargs) -> set[str]:
    with Operators() as operators:
        function(*args, **kwargs)
    return {func.name().rpartition("__")[2] for func, _ in operators.calls} or {"reference"}


@pytest.mark.parametrize(
    ("limits", "facts", "reason"),
    [
        (Limits(), {}, None),
        (Limits("cuda"), {}, "runs on cuda tensors, these are on cpu"),
        (Limits(), {"device": "meta"}, "runs on cpu tensors, these are on meta"),
        (Limits(dtypes=(torch.float16,)), {}, "takes dtype float16, not float32"),
        (Limits(allowed={"mask": (None, "causal")}), {}, None),
        (Limits(allowed={"mask": ("causal",)}), {}, "takes mask causal, not None"),
        (Limits(ranges={"head_dim": (1, 64)}), {}, None),
        (Limits(ranges={"head_dim": (1, 63)}), {}, "takes head_dim 1 to 63, not 64"),
        (Limits(unless=lambda facts: "never" if facts["head_dim"] == 64 else None), {}, "never"),
    ],
)
def test_limits(limits, facts, reason):
    assert limits.refuses(FACTS | facts) == reason


def test_an_interpreted_kernel_takes_cpu_tensors():
    assert Limits("cuda").refuses(FACTS, interpreted=True) is None
    assert Limits("cuda").refuses(FACTS | {"device": "cuda"}, interpreted=True) is not None


def test_capability_is_compared_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    facts = FACTS | {"device": "cuda"}
    assert Limits("cuda", capability=(8, 0)).refuses(facts) is None
    assert "needs compute capability (9, 0)" in Limits("cuda", capability=(9, 0)).refuses(facts)


def test_auto_takes_the_first_permitted():
    made = Op("made", {"cpu": Limits(dtypes=(torch.float16,)), "triton": Limits("cuda")}, lambda: FACTS, "none")
    assert made.choose("auto", FACTS | {"dtype": torch.float16}) == "cpu"
    assert made.choose("auto", FACTS) == "reference"
    reversed_order = dataclasses.replace(RMS_NORM, limits={"triton": Limits("cuda"), "cpu": Limits()})
    assert reversed_order.choose("auto", FACTS) == "cpu"


def test_a_named_backend_runs_or_raises():
    assert ran(pyarch.rms_norm, X, W, backend="cpu") == {"cpu"}
    assert ran(pyarch.rms_norm, X, W) == {"cpu"}
    assert ran(pyarch.rms_norm, X, W, backend="reference") == {"reference"}
    assert ran(pyarch.rms_norm, X.double(), W.double()) == {"reference"}
    with pytest.raises(ValueError, match="^backend: 'cpu' cannot run this rms_norm: takes dtype"):
        pyarch.rms_norm(X.double(), W.double(), backend="cpu")
    with pytest.raises(ValueError, match="^backend: 'cuda' cannot run this rms_norm: rms_norm has no cuda kernel"):
        pyarch.rms_norm(X, W, backend="cuda")
    with pytest.raises(ValueError, match="^backend: 'gpu' is not one of auto, cpu, cuda, triton, reference"):
        pyarch.rms_norm(X, W, backend="gpu")


@pytest.mark.parametrize("name", ["sample", "kv_append", "paged_attention", "rotary_append", "flash_attention"])
def test_what_an_operator_refuses_is_a_value_error_under_every_torch(name, monkeypatch):
    cache, int64, int32 = torch.zeros(2, 2, 1, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    args = {
        "sample": (torch.randn(1, 8),),
        "kv_append": (torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), cache, cache.clone(), int64),
        "paged_attention": (torch.zeros(1, 1, 4), cache, cache.clone(), int32[None], int32),
        "flash_attention": (torch.zeros(1, 1, 2, 4),) * 3,
        "rotary_append": (torch.zeros(1, 12), torch.ones(1, 2), torch.ones(1, 2), int64, cache, cache.clone(), int64),
    }[name]
    options = dict(num_heads=1, num_kv_heads=1) if name == "rotary_append" else {}
    for text, error in (("x: entry 0 is -7: no", ValueError), ("out of memory: 5 bytes", RuntimeError)):

        def refuse(*_, text=text):
            raise RuntimeError(text)

        monkeypatch.setitem(native._OPERATORS, (name, "cpu"), refuse)
        with pytest.raises(error, match=f"^{text}$"):
            getattr(pyarch, name)(*args, **options, backend="cpu")


def test_an_unavailable_library_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setitem(native._UNAVAILABLE, "cpu", "_cpu_avx512 is not built: make build")
    with pytest.raises(ValueError, match="make build"):
        pyarch.rms_norm(X, W, backend="cpu")
    assert ran(pyarch.rms_norm, X, W) == {"reference"}
    assert pyarch.backends()["cpu"] == "_cpu_avx512 is not built: make build"


def test_backends_names_all_and_says_why_not():
    found = pyarch.backends()
    assert list(found) == ["cpu", "cuda", "triton", "reference"]
    assert found["cpu"] is None
    assert found["reference"] is None
    assert torch.version.cuda or "without CUDA" in found["cuda"]
    assert torch.cuda.is_available() or found["cuda"] is not None


def test_use_backend_decides_what_auto_is_inside():
    with pyarch.use_backend("reference"):
        assert ran(pyarch.rms_norm, X, W) == {"reference"}
        assert ran(pyarch.rms_norm, X, W, backend="cpu") == {"cpu"}
        with pyarch.use_backend("cpu"):
            assert ran(pyarch.rms_norm, X, W) == {"cpu"}
            with pytest.raises(ValueError, match="cannot run this"):
                pyarch.rms_norm(X.double(), W.double())
            with pyarch.use_backend("auto"):
                assert ran(pyarch.rms_norm, X.double(), W.double()) == {"reference"}
        assert ran(pyarch.rms_norm, X, W) == {"reference"}
    assert ran(pyarch.rms_norm, X, W) == {"cpu"}


def test_use_backend_refuses_unknown_names_and_survives_errors():
    with pytest.raises(ValueError, match="^name: 'fast' is not one of"), pyarch.use_backend("fast"):
        pass
    with pytest.raises(KeyError), pyarch.use_backend("reference"):
        raise KeyError
    assert ran(pyarch.rms_norm, X, W) == {"cpu"}


def test_threads_and_tasks_choose_for_themselves():
    async def chosen(name):
        with pyarch.use_backend(name):
            await asyncio.sleep(0.01)
            return RMS_NORM.choose("auto", FACTS)

    async def both():
        return await asyncio.gather(chosen("reference"), chosen("cpu"))

    assert asyncio.run(both()) == ["reference", "cpu"]
    assert dispatch._forced_in_graphs == "auto"
    with pyarch.use_backend("reference"), concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(RMS_NORM.choose, "auto", FACTS).result() == "cpu"


def test_a_compiled_function_follows_use_backend():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    compiled = torch.compile(pyarch.rms_norm, fullgraph=True, backend=keep)
    expected = compiled(X, W)
    with pyarch.use_backend("reference"):
        torch.testing.assert_close(compiled(X, W), expected)
    compiled(X, W)
    assert ["rms_norm__cpu" in graph for graph in graphs] == [True, False]


def test_a_fall_back_on_a_gpu_is_told_once(caplog):
    made = Op("told_once", {"cuda": Limits("cuda", dtypes=())}, lambda: FACTS, "none")
    for _ in range(2):
        assert made.choose("auto", FACTS | {"device": "cuda"}) == "reference"
    assert [r.getMessage() for r in caplog.records] == [
        "told_once runs on its PyTorch reference; pyarch.explain says why"
    ]
