"""Tuned configs: what a card's file says is what runs, and the tuner writes such a file."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyarch

if pyarch.backends()["triton"]:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]

from pyarch.kernels import _tuned, flash_attention, flash_attention_backward, quant_matmul  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
MATMUL = quant_matmul.Config(block_m=16, block_n=32, block_k=64, split_k=2, num_warps=8, num_stages=2)
ATTENTION = flash_attention.Config(block_m=16, block_n=32, block_d=16, num_warps=2, num_stages=1)
GRADIENT = flash_attention_backward.Config(block_m=16, block_n=64, block_d=16, num_warps=2, num_stages=1)


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A card with tuned configs for small calls."""
    found = {"quant_matmul": {quant_matmul.key_for((3, 64, 1024), 4): MATMUL},
             "flash_attention": {flash_attention.key_for(9, 16): ATTENTION},
             "flash_attention_backward": {flash_attention_backward.key_for("keys", 16): GRADIENT}}  # fmt: skip
    table = {op: {key: {"config": dataclasses.asdict(c)} for key, c in found[op].items()} for op in found}
    (tmp_path / "some-card.json").write_text(json.dumps({"capability": 90, **table}))
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(_tuned, "_card", lambda: "Some Card")
    _tuned._table.cache_clear()
    yield
    _tuned._table.cache_clear()


def test_what_is_tuned_runs(card, monkeypatch):
    ran = []
    for module in (quant_matmul, flash_attention):
        launch = module.launch
        monkeypatch.setattr(module, "launch", lambda c, *rest, launch=launch: ran.append(c) or launch(c, *rest))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(3, 1024, device=device, dtype=torch.float16)
    w = pyarch.quantize(torch.randn(64, 1024)).to(device)
    got = pyarch.quant_matmul(x, w, backend="triton")
    torch.testing.assert_close(got.float(), x.float() @ w.dequantize().T, rtol=1e-2, atol=1e-1)
    q = torch.randn(1, 2, 9, 16, device=device, dtype=torch.float16)
    got = pyarch.flash_attention(q, q, q, backend="triton")
    want = torch.nn.functional.scaled_dot_product_attention(q.float(), q.float(), q.float())
    torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-2)
    assert ran == [MATMUL, ATTENTION]
    pyarch.flash_attention(q, q, q, bias=q.new_zeros(9, 9), backend="triton")
    assert ran[-1] != ATTENTION, "tuned without bias"


def test_torchs_matmul_where_it_was_faster(card, monkeypatch):
    """As the card's file says, and explain with it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(3, 1024, device=device, dtype=torch.float16)
    w = pyarch.quantize(torch.randn(64, 1024)).to(device)
    explain = lambda: pyarch.explain(pyarch.quant_matmul, x, w, backend="triton")
    assert explain().note is None
    monkeypatch.setitem(
        _tuned._table("Some Card")["quant_matmul"][quant_matmul.key_for((3, 64, 1024), 4)]["config"], "dequantise", True
    )
    assert "  note: on this card torch's matmul" in str(explain())
    ran = []
    dense = quant_matmul.quant_matmul_dense
    monkeypatch.setattr(dense, "launch", lambda *a, launch=dense.launch: ran.append(1) or launch(*a))
    got = pyarch.quant_matmul(x, w, backend="triton")
    assert ran == [1]
    torch.testing.assert_close(got, torch.nn.functional.linear(x, w.dequantize(x.dtype)), rtol=1e-2, atol=1e-2)


def test_a_tuned_gradient_runs(card, monkeypatch):
    """In the kernel that it is for, in calls that it was measured on."""
    ran, launch = [], flash_attention_backward.launch
    monkeypatch.setattr(flash_attention_backward, "launch", lambda of, *rest: ran.append(of) or launch(of, *rest))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.randn(1, 2, 9, 16, device=device, dtype=torch.float16, requires_grad=True)
    pyarch.flash_attention(q, q, q, backend="triton").sum().backward()
    pyarch.flash_attention(q, q, q, softcap=2.0, backend="triton").sum().backward()
    plain, bent = ran
    default = functools.partial(flash_attention_backward.default_for, size=16, dtype=torch.float16, arch=90)
    assert (plain("keys"), plain("rows")) == (GRADIENT, default("rows"))
    assert bent("keys") == default("keys", bent=True)


def test_only_configs_of_the_architecture_are_compiled(card):
    assert [config for _, config in _tuned.shipped("quant_matmul", quant_matmul.Config, 90)] == [MATMUL]
    assert not list(_tuned.shipped("quant_matmul", quant_matmul.Config, 80))


@pytest.mark.parametrize(
    ("op", "modules"),
    [("quant_matmul", (quant_matmul,)), ("flash_attention", (flash_attention, flash_attention_backward))],
    ids=["quant_matmul", "flash_attention"],
)
def test_tuner(op, modules, tmp_path):
    """Tiny and interpreted: it chooses among candidates and the default, writes what _tuned reads, and goes on."""
    out = tmp_path / "card.json"
    command = [sys.executable, "-m", "bench.gpu", "--part", "tune", "--op", op, "--dry-run", "--out", str(out)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    first = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    found = json.loads(out.read_text())
    for module in modules:
        entries = found[module.__name__.rpartition(".")[2]].values()
        assert entries
        assert all(module.Config(**entry["config"]) and entry["gain"] >= 1 for entry in entries)
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not again.stdout, "a kind that this commit has tuned is not measured again"
