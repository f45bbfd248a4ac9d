"""GPU kernels without a GPU: what they cost when compiled."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="compiles Triton kernels")
ROOT = Path(__file__).parent.parent
DRIVER = ROOT / "tests/compile_kernels.py"


def test_costs_are_as_recorded():
    # In a process of its own: the stand-in driver is Triton's for the rest of the process.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(DRIVER)], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"quant_matmul _matmul_kernel m1 int4 .* sm_90: \d+ registers", run.stdout)
    for line in run.stdout.splitlines():
        if "_int8_kernel" in line:
            assert ("wgmma" in line) == ("sm_90" in line), line
        fits = "flash_attention " in line and "float32" not in line and "d127" not in line and "d255" not in line
        if fits or re.search(r"flash_attention_backward .*(d64|d128) .*(sinks|causal|alibi|alibi.dropout) ", line):
            assert ("wgmma" in line) == ("sm_90" in line), line


def test_a_dearer_kernel_fails():
    from compile_kernels import faults

    cost = {"registers": 40, "spills": 0, "shared": 1024}
    table = {"nvcc 1.0": {"op kernel sm_80": cost}}

    def fault(compiler="nvcc 1.0", kernel="op kernel sm_80", **change):
        return faults({compiler: {kernel: {**cost, **change}}}, table)

    assert fault() == fault(registers=39) == fault(compiler="nvcc 2.0", registers=99) == []
    assert "registers 41, recorded 40" in fault(registers=41)[0]
    assert "shared 1025" in fault(shared=1025)[0]
    assert "spills 8 bytes" in fault(spills=8, compiler="nvcc 2.0")[0]
    assert "do not fit" in fault(shared=164 * 1024, compiler="nvcc 2.0")[0]
    assert "not in" in fault(kernel="op other sm_80")[0]
    table["nvcc 1.0"]["op kernel sm_80"] = {**cost, "wgmma": 8}
    assert "wgmma is lost" in fault()[0]
    assert fault(wgmma=4) == []
