"""tune_allocator, in a process of its own: it changes the whole process."""

import platform
import subprocess
import sys

import pytest

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
    import pyarch

    monkeypatch.setattr(sys, "platform", "darwin")
    assert pyarch.tune_allocator() is False
