"""doctor tells the truth: what it says runs does run, what it says does not run is refused."""

import json
import subprocess
import sys

import pytest
import torch

import pyarch
from pyarch import arch, native
from pyarch.__main__ import COMMANDS, main
from pyarch.cli import doctor


def run(*args):
    return subprocess.run([sys.executable, "-m", "pyarch", *args], capture_output=True, text=True, timeout=120)


def test_json_is_what_the_text_tells(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == doctor.report()
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for expected in (torch.__version__, pyarch.__version__, arch.cpu_model(), *arch.CPU_ISAS, *found["ops"]):
        assert expected in text


def test_backends_are_as_reported():
    x, w = torch.randn(2, 8), torch.randn(8)
    for backend, why in doctor.report()["ops"]["rms_norm"].items():
        if why is None:
            pyarch.rms_norm(x, w, backend=backend)
        elif backend != "triton":
            with pytest.raises(ValueError, match="backend:"):
                pyarch.rms_norm(x, w, backend=backend)


def test_a_gpu_backend_runs_only_with_a_gpu(monkeypatch, capsys):
    for backend in ("cuda", "triton"):
        monkeypatch.setitem(native._UNAVAILABLE, backend, None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = doctor.report()
    for backend in ("cuda", "triton"):
        assert "finds no GPU" in found["backends"][backend]
        assert all(verdicts[backend] is not None for verdicts in found["ops"].values())
    assert f"not triton: {found['backends']['triton']}" in doctor._text(found)
    monkeypatch.setitem(native._UNAVAILABLE, "cpu", "not built")
    assert main(["doctor"]) == 1
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # interpreted kernels need none
    assert doctor.report()["ops"]["quant_matmul"]["triton"] is None


def test_a_gpu_too_old_for_a_kernel_is_named(monkeypatch):
    monkeypatch.setitem(native._UNAVAILABLE, "triton", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "compute capability (8, 0), this GPU has (7, 5)" in doctor.report()["ops"]["quant_matmul"]["triton"]


def test_an_operator_that_the_library_lacks_is_reported():
    native.define("unbuilt", "(Tensor x) -> Tensor", torch.empty_like)
    assert native.missing("rms_norm", "cpu") is None
    assert "older than unbuilt" in native.missing("unbuilt", "cpu")


def test_missing_things_come_with_what_to_do(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    monkeypatch.setenv("PYARCH_CPU_ISA", "portable")
    advice = "\n".join(doctor._advice())
    assert "pip install 'pyarch-kernels[models]'" in advice
    assert "PYARCH_CPU_ISA=portable" in advice


def test_command_line():
    done = run("doctor")
    assert done.returncode == 0
    assert "rms_norm" in done.stdout
    assert set(COMMANDS) <= set(run("--help").stdout.replace(",", " ").split("{")[1].replace("}", " ").split())
    bad = run("no-such-command")
    assert bad.returncode == 2
    assert "invalid choice" in bad.stderr
