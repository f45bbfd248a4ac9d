"""CUDA kernels on the host: the emulator catches planted bugs, and the operators are what their references say."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyarch.ops.paged_kv import kv_append_reference

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
KERNELS = ROOT / "tests/emulator_kernels.cu"
SEEDS = range(1, 9)
LAYOUTS = ("dense", "fused projection", "interleaved", "misaligned")
Pointer = ctypes.c_void_p


def compile_for_host(library: Path, *sources: Path, flags: tuple[str, ...] = ("-Wextra", "-Werror"), link=()) -> None:
    own = [
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-shared",
        "-fPIC",
        "-DPYARCH_EMU",
        f"-I{CSRC / 'emu'}",
        f"-I{CSRC / 'cuda'}",
    ]
    files = ["-x", "c++", CSRC / "emu/emu.cpp", *sources, "-x", "none"]
    subprocess.run(["c++", *own, *flags, "-o", library, *files, *link], check=True)


class Emulated:
    """A .cu file built for the host. Tensors named in `allow` are what its kernels may touch."""

    def __init__(self, source: Path, folder: Path):
        library = folder / f"{source.stem}.so"
        compile_for_host(library, source)
        self.library = ctypes.CDLL(str(library))
        self.library.pyarch_emu_seed.argtypes = [ctypes.c_uint64]
        self.library.pyarch_emu_allow.argtypes = [Pointer, ctypes.c_uint64]

    def __call__(self, function: str, *arguments, seed: int, allow: list[torch.Tensor]) -> str | None:
        """Runs a launcher; returns its complaint, or None."""
        self.library.pyarch_emu_forget()
        self.library.pyarch_emu_seed(seed)
        for t in allow:
            memory = t.untyped_storage()
            self.library.pyarch_emu_allow(memory.data_ptr(), memory.nbytes())
        launcher = getattr(self.library, function)
        launcher.restype = ctypes.c_char_p
        error = launcher(*arguments)
        return None if error is None else error.decode()


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return Emulated(KERNELS, tmp_path_factory.mktemp("emulated"))


def bugs() -> dict[str, int]:
    names = KERNELS.read_text().split("enum Bug {")[1].split("}")[0]
    return {name: i for i, name in enumerate(re.findall(r"^ +(\w+)", names, re.M))}


def run_sum(kernels, bug, seed):
    """(complaint, whether the result is right)"""
    x, y = torch.randn(300), torch.full((3,), float("nan"))
    arguments = Pointer(x.data_ptr()), Pointer(y.data_ptr()), ctypes.c_int64(x.numel()), bug
    error = kernels("run_sum", *arguments, seed=seed, allow=[x, y])
    return error, torch.allclose(y, torch.stack([part.sum() for part in x.split(128)]), atol=1e-5)


def run_scale(kernels, bug, seed):
    x, y = torch.randn(6 * 512), torch.full((6 * 512,), float("nan"))
    error = kernels("run_scale", Pointer(x.data_ptr()), Pointer(y.data_ptr()), 6, bug, seed=seed, allow=[x, y])
    return error, torch.equal(y, 2 * x)


def run_count(kernels, bug, seed):
    y = torch.zeros(2, dtype=torch.int32)
    error = kernels("run_count", Pointer(y.data_ptr()), 3, bug, seed=seed, allow=[y])
    return error, y.tolist() == [384, 384]


def run_total(kernels, bug, seed):
    x, left, y = torch.randn(5, 128), torch.full((5, 128), float("nan")), torch.full((128,), float("nan"))
    arrived = torch.full((1,), 7, dtype=torch.int32)
    pointers = [Pointer(t.data_ptr()) for t in (x, left, arrived, y)]
    error = kernels("run_total", *pointers, 5, bug, seed=seed, allow=[x, left, arrived, y])
    return error, torch.allclose(y, 2 * x.sum(0), atol=1e-5)


@pytest.mark.parametrize("run", [run_sum, run_scale, run_count, run_total])
def test_right_kernels_are_right_under_every_seed(kernels, run):
    for seed in range(50):
        assert run(kernels, 0, seed) == (None, True)


@pytest.mark.parametrize(
    ("run", "bug"),
    [
        *((run_sum, bug) for bug in ("no_barrier_after_store", "no_barrier_between_steps")),
        *((run_scale, bug) for bug in ("wait_one_late", "no_barrier_after_wait", "no_barrier_before_reuse")),
        (run_count, "plain_add"),
        *((run_total, bug) for bug in ("no_fence", "no_barrier_before_fence", "last_one_early")),
    ],
)
def test_a_race_gives_a_wrong_result(kernels, run, bug):
    results = [run(kernels, bugs()[bug], seed) for seed in SEEDS]
    assert any(error is None and not right for error, right in results), results


@pytest.mark.parametrize(
    ("run", "bug", "complaint"),
    [
        (run_sum, "store_out_of_bounds", "access of 4 bytes at byte 12 of an allocation of 12 bytes"),
        (run_sum, "load_out_of_bounds", "of an allocation of 1200 bytes"),
        (run_sum, "shared_out_of_bounds", "access of 4 bytes at byte 512 of shared memory of 512 bytes"),
        (run_sum, "shuffle_not_reached", "deadlock"),
        (run_scale, "misaligned_copy", "misaligned"),
    ],
)
def test_a_fault_ends_the_launch(kernels, run, bug, complaint):
    for seed in SEEDS:
        error, _ = run(kernels, bugs()[bug], seed)
        assert error is not None
        assert complaint in error
        assert "deadlock" in error or "by thread (" in error


def test_every_bug_is_planted_somewhere():
    text = Path(__file__).read_text()
    assert len(bugs()) == 15
    assert all(f'"{name}"' in text for name in bugs() if name != "none")


def test_one_seed_is_one_run(kernels):
    runs = {str([run_scale(kernels, bugs()["no_barrier_after_wait"], seed) for seed in (3, 4)]) for _ in range(3)}
    assert len(runs) == 1


def test_memory_that_was_not_allowed(kernels):
    x, y = torch.randn(64), torch.zeros(1)
    error = kernels("run_sum", Pointer(x.data_ptr()), Pointer(y.data_ptr()), ctypes.c_int64(64), 0, seed=1, allow=[y])
    assert "outside every allocation" in error


def nvcc_compiles(source: Path, folder: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    for arch in ("sm_80", "sm_90a"):
        target = f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"
        command = ["nvcc", "-std=c++17", target, "-cubin", f"-I{CSRC / 'cuda'}", "-o", folder / arch, source]
        subprocess.run(command, check=True)


def test_the_same_kernels_compile_for_the_gpu(tmp_path):
    nvcc_compiles(KERNELS, tmp_path)


# ---- kv_append


class KvAppend(ctypes.Structure):
    """csrc/cuda/paged_kv.h"""

    _fields_ = [
        *((name, Pointer) for name in ("k", "v", "k_cache", "v_cache", "slots")),
        *((name, ctypes.c_int64) for name in ("tokens", "heads", "dim", "pages", "page_size", "item")),
        ("source", ctypes.c_int64 * 2 * 2),
        ("target", ctypes.c_int64 * 3 * 2),
        *((name, Pointer) for name in ("k_scale", "v_scale")),
        ("scale", ctypes.c_int64 * 3 * 2),
        ("type", ctypes.c_int64),
    ]


@pytest.fixture(scope="module")
def paged_kv(tmp_path_factory):
    return Emulated(CSRC / "cuda/paged_kv.cu", tmp_path_factory.mktemp("emulated"))


def append(paged_kv, k, v, k_cache, v_cache, slots, seed=1, allow=None):
    (tokens, heads, dim), (pages, page_size) = k.shape, k_cache.shape[:2]
    pointers = [t.data_ptr() for t in (k, v, k_cache, v_cache, slots)]
    call = KvAppend(*pointers, tokens, heads, dim, pages, page_size, k.element_size())
    for i, (source, target) in enumerate([(k, k_cache), (v, v_cache)]):
        call.source[i][:], call.target[i][:] = source.stride()[:2], target.stride()[:3]
    allow = allow or [k, v, k_cache, v_cache, slots]
    return paged_kv("pyarch_kv_append", ctypes.byref(call), None, seed=seed, allow=allow)


def case(layout, dtype, tokens=7, heads=3, dim=16, pages=4, page_size=5):
    """k, v, caches and slots in one of the layouts that models make."""
    if layout == "fused projection":  # k and v are views of one matrix
        k, v = torch.randn(tokens, 2 * heads, dim).to(dtype).chunk(2, 1)
    else:
        k, v = (torch.randn(tokens, heads, dim).to(dtype) for _ in range(2))
    if layout == "interleaved":  # both caches in one buffer, heads before positions
        caches = torch.randn(pages, 2, heads, page_size, dim).to(dtype)
        k_cache, v_cache = caches[:, 0].transpose(1, 2), caches[:, 1].transpose(1, 2)
    elif layout == "misaligned":
        k_cache, v_cache = (torch.randn(pages, page_size, heads, dim + 1).to(dtype)[..., 1:] for _ in range(2))
    else:
        k_cache, v_cache = (torch.randn(pages, page_size, heads, dim).to(dtype) for _ in range(2))
    slots = torch.randperm(pages * page_size)[:tokens]
    slots[tokens // 2 :: 3] = -1
    return k, v, k_cache, v_cache, slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [16, 72, 3])
def test_kv_append(paged_kv, layout, dtype, dim):
    for seed, tokens in enumerate((7, 1, 19)):
        k, v, k_cache, v_cache, slots = case(layout, dtype, tokens=tokens, dim=dim)
        want = [k_cache.clone(), v_cache.clone()]
        kv_append_reference(k, v, *want, slots)
        assert append(paged_kv, k, v, k_cache, v_cache, slots, seed) is None
        assert torch.equal(k_cache, want[0])
        assert torch.equal(v_cache, want[1])


def test_kv_append_skips_bad_slots(paged_kv):
    k, v, k_cache, v_cache, slots = case("dense", torch.float16)
    before = k_cache.clone(), v_cache.clone()
    slots.copy_(torch.tensor([-1, -2, 20, 21, 2**40, -(2**62), 2**62]))
    assert append(paged_kv, k, v, k_cache, v_cache, slots) is None
    assert torch.equal(k_cache, before[0])
    assert torch.equal(v_cache, before[1])


def test_kv_append_of_nothing(paged_kv):
    for sizes in (dict(tokens=0), dict(heads=0), dict(pages=0)):
        k, v, k_cache, v_cache, _ = case("dense", torch.float32, **sizes)
        slots = torch.zeros(k.shape[0], dtype=torch.int64)
        assert append(paged_kv, k, v, k_cache, v_cache, slots, allow=[k, v, slots]) is None


def test_kv_append_touches_nothing_else(paged_kv):
    """The emulator would say so: with one allocation missing it does."""
    arguments = case("dense", torch.float32)
    for missing in range(5):
        allow = [t for i, t in enumerate(arguments) if i != missing]
        assert "outside every allocation" in append(paged_kv, *arguments, allow=allow)


# ---- the whole way from torch.ops on CPU tensors


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    from torch.utils import cpp_extension

    library = tmp_path_factory.mktemp("emulated") / "operators.so"
    sources = [CSRC / "cuda/bindings.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]
    flags = ["-O2", "-DTORCH_TARGET_VERSION=0x020b000000000000", *(f"-I{p}" for p in cpp_extension.include_paths())]
    folder = Path(torch.__file__).parent / "lib"
    compile_for_host(library, *sources, flags=(*flags, f"-I{CSRC / 'include'}"), link=(f"-L{folder}", "-ltorch_cpu"))
    return library


@pytest.mark.parametrize("script", ["emulated_operators", "emulated_attention", "emulated_quant_matmul"])
def test_operators(operators, script):
    command = [sys.executable, ROOT / f"tests/{script}.py", operators]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    print(run.stdout)
