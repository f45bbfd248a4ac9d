"""tune_allocator, in a process of its own: it changes the whole process; and pages of 2 MB."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyarch
from pyarch import quantized
from pyarch.allocator import in_huge_pages

CHILD = """
import resource, torch, pyarch
def faults(call):
    for _ in range(40): call()  # glibc's aligned allocations reuse a freed block only once its neighbours are settled
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5): call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
x = torch.ones(9 << 20)
call = lambda: x + x
untuned = faults(call)
print(int(pyarch.tune_allocator()), untuned, faults(call))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_temporaries_are_not_faulted_in_again():
    out = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout
    done, before, after = map(int, out.split())
    assert done == 1
    assert after * 20 < before


def test_elsewhere_it_changes_nothing_and_says_so(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert pyarch.tune_allocator() is False


def flags(address: int) -> list[str]:
    """VmFlags of the mapping that holds an address, "hg" of one that was advised to be in huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            low, _, high = first.partition("-")
            inside = int(low, 16) <= address < int(high, 16)
        elif inside and first == "VmFlags:":
            return rest
    raise AssertionError(f"{address:#x} is not mapped")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages")
def test_huge_pages_are_asked_for():
    small, large = torch.empty(1 << 20, dtype=torch.uint8), torch.empty(8 << 20, dtype=torch.uint8)
    assert in_huge_pages(large) is large
    assert "hg" in flags(large.data_ptr() + (4 << 20))
    assert in_huge_pages(small) is small
    assert in_huge_pages(torch.empty(8 << 20, device="meta")).is_meta
    weights = quantized._HugePages()
    first, second = weights.empty((3, 5), torch.int8), weights.empty((4 << 20, 2), torch.float16)
    assert "hg" in flags(second.data_ptr() + second.nbytes // 2)
    assert first.data_ptr() % 64 == second.data_ptr() % 64 == 0
