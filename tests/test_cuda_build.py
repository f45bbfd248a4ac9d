"""PYARCH_CUDA=1 builds the CUDA library under any torch, and what it registers is what the rooms declare."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyarch  # noqa: F401  (declares the operators)

ROOT = Path(__file__).parent.parent
PROBE = """
import ctypes, sys, torch, pyarch
stub, library = sys.argv[1:]
ctypes.CDLL(stub, ctypes.RTLD_GLOBAL)  # in a CUDA torch the real libtorch_cuda is there already
torch.ops.load_library(library)
for name in torch._C._dispatch_get_all_op_names():
    if name.startswith("pyarch::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
        print(name)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH: the CUDA library is not built")
    if torch.version.cuda is not None:
        pytest.skip("under a CUDA torch the library is built and loaded as it is")
    folder = tmp_path_factory.mktemp("cuda")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder]
    environment = os.environ | {"PYARCH_CUDA": "1", "PYARCH_CPU_ISA": ""}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_builds_and_registers(built):
    library = next(built.glob("lib/pyarch/_cuda.*so"))
    stub = built / "pyarch._cuda/libtorch_cuda.so"
    run = subprocess.run([sys.executable, "-c", PROBE, stub, library], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    source = (ROOT / "csrc/cuda/bindings.cpp").read_text()
    registered = set(re.findall(r'm\.impl\("(\w+)"', source))
    assert "kv_append__cuda" in registered
    assert {name.removeprefix("pyarch::") for name in run.stdout.split()} >= registered


def test_the_host_calls_no_device_function(built):
    """nvcc makes such a call in a template one of exit() or free(), without a word."""
    objects = [p for p in built.rglob("*.o") if p.name != "bindings.o"]
    assert len(objects) >= 2
    for path in objects:
        missing = subprocess.run(["nm", "-u", path], capture_output=True, text=True, check=True).stdout.split()
        assert not {"exit", "free"} & set(missing), path.name


def test_holds_code_for_every_architecture(built):
    from triton import knobs

    library = next(built.glob("lib/pyarch/_cuda.*so"))
    listed = subprocess.run([knobs.nvidia.cuobjdump.path, "--list-elf", library], capture_output=True, text=True)
    assert set(re.findall(r"sm_\w+", listed.stdout)) == {"sm_80", "sm_90a"}
