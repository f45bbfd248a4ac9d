"""Matrix instructions in the emulator: laid out as the PTX ISA says, exact, and mistakes with them are caught."""

import re
from pathlib import Path

import pytest
import torch
from test_emulator import SEEDS, Emulated, Pointer, nvcc_compiles

KERNELS = Path(__file__).parent / "emulator_matrix.cu"
BUGS = re.findall(r"^ +(\w+)", KERNELS.read_text().split("enum Bug {")[1].split("}")[0], re.M)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return Emulated(KERNELS, tmp_path_factory.mktemp("emulated"))


def integers(*shape, dtype):
    return torch.randint(-9, 10, shape).to(dtype)


def run(kernels, function, *arguments, seed=1):
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    pointers = [Pointer(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
    return kernels(function, *pointers, seed=seed, allow=tensors)


def words(elements):
    """Pairs of 16-bit elements (..., 2) as registers, the first in the low half."""
    return elements.contiguous().view(torch.int32).squeeze(-1)


@DTYPES
def test_mma_is_a_product_in_the_layout_of_the_ptx_isa(kernels, dtype):
    """The fragments of mma.m16n8k16, element by element, as the ISA's formulas give row and column."""
    lane = torch.arange(32)
    group, thread = lane >> 2, lane & 3

    def rows_a(i):
        return group if i in (0, 1, 4, 5) else group + 8

    def columns_a(i):
        return thread * 2 + (i & 1) + (8 if i >= 4 else 0)

    for seed in range(5):
        a, b, c = integers(16, 16, dtype=dtype), integers(16, 8, dtype=dtype), torch.randint(-99, 99, (16, 8)).float()
        a_fragment = torch.stack([a[rows_a(i), columns_a(i)] for i in range(8)], -1).view(32, 4, 2)
        b_fragment = torch.stack([b[thread * 2 + (i & 1) + (8 if i >= 2 else 0), group] for i in range(4)], -1)
        where = [(group + (8 if i >= 2 else 0), thread * 2 + (i & 1)) for i in range(4)]
        d = torch.stack([c[place] for place in where], -1).contiguous()
        arguments = words(a_fragment), words(b_fragment.view(32, 2, 2)), d, int(dtype == torch.bfloat16)
        assert run(kernels, "run_multiply", *arguments, seed=seed) is None
        right = c.double() + a.double() @ b.double()
        for i, place in enumerate(where):
            assert torch.equal(d[:, i].double(), right[place])


def test_ldmatrix_is_laid_out_as_the_ptx_isa_says(kernels):
    matrices = torch.randn(4, 8, 8).bfloat16()
    r = torch.zeros(32, 4, dtype=torch.int32)
    assert run(kernels, "run_load", matrices, r) is None
    for lane in range(32):
        for i in range(4):
            assert torch.equal(r[lane, i : i + 1].view(torch.bfloat16), matrices[i, lane // 4, lane % 4 * 2 :][:2])


def test_transposed_matrices_are_laid_out_as_the_ptx_isa_says(kernels):
    matrices = torch.randn(4, 8, 8).bfloat16()
    r = torch.zeros(32, 5, dtype=torch.int32)
    assert run(kernels, "run_transpose", matrices, r) is None
    for lane in range(32):
        for i in range(5):  # the last one from registers
            column = matrices[i % 4, lane % 4 * 2 :, lane // 4][:2]
            assert torch.equal(r[lane, i : i + 1].view(torch.bfloat16), column)


@pytest.mark.parametrize("limit", [0, 31, 32])
def test_lanes_exchange_numbers_and_votes(kernels, limit):
    y = torch.full((32, 2), -1, dtype=torch.int32)
    assert run(kernels, "run_exchange", y, limit) is None
    assert y[:, 0].tolist() == [(lane + 5) % 32 for lane in range(32)]
    assert y[:, 1].tolist() == [int(limit == 32)] * 32


@pytest.mark.parametrize("size", range(0, 17, 4))
def test_a_part_of_16_bytes(kernels, size):
    x, y = torch.randn(size // 4), torch.full((4,), torch.nan)
    keep = torch.cat([x, torch.zeros(4 - size // 4)])
    assert run(kernels, "run_copy_part", x, y, size) is None
    assert torch.equal(y, keep)
    assert "access of 16 bytes" in run(kernels, "run_copy_part", torch.randn(3), y, 16)


def product(kernels, bug, seed, dtype=torch.bfloat16):
    """(complaint, whether the result is right)"""
    a, b, d = integers(16, 16, dtype=dtype), integers(16, 16, dtype=dtype), torch.full((16, 16), torch.nan)
    error = run(kernels, "run_product", a, b, d, int(dtype == torch.bfloat16), BUGS.index(bug), seed=seed)
    return error, torch.equal(d, a.float() @ b.float().T)


@DTYPES
def test_products_are_exact_under_every_seed(kernels, dtype):
    for seed in range(50):
        assert product(kernels, "none", seed, dtype) == (None, True)


@pytest.mark.parametrize("bug", ["wrong_matrix", "wrong_row", "wrong_fragment", "wrong_result", "no_barrier"])
def test_a_wrong_index_gives_a_wrong_result(kernels, bug):
    results = [product(kernels, bug, seed) for seed in SEEDS]
    assert all(error is None for error, _ in results)
    assert not all(right for _, right in results) if bug == "no_barrier" else not any(right for _, right in results)


@pytest.mark.parametrize(
    ("bug", "complaint"),
    [
        ("row_past_the_end", "access of 16 bytes at byte 1024 of shared memory of 1024 bytes"),
        ("row_misaligned", "misaligned"),
        ("half_a_warp", "deadlock"),
        ("other_instruction", "different instructions"),
    ],
)
def test_a_fault_ends_the_launch(kernels, bug, complaint):
    for seed in SEEDS:
        assert complaint in product(kernels, bug, seed)[0]


def test_every_bug_is_planted_somewhere():
    text = Path(__file__).read_text()
    assert len(BUGS) == 10
    assert all(f'"{name}"' in text for name in BUGS)


def test_the_same_kernels_compile_for_the_gpu(tmp_path):
    nvcc_compiles(KERNELS, tmp_path)
