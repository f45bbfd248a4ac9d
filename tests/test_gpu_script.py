"""make gpu's script without a GPU: every case runs in small, records hold what they must, a second run goes on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import _gpu_timer, gpu, gpu_table
from bench._gpu_cases import Entry

ROOT = Path(__file__).parent.parent


def script(*arguments):
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # tiny work: threads would wait for one another
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("part", ["peers", "bench"])
def test_dry_run(part, tmp_path):
    out = tmp_path / "records.jsonl"
    first = script("--part", part, "--dry-run", "--out", str(out))
    assert first.returncode == 0, first.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    works = {
        "peers": "ceiling, attention, conv2d, lstm",
        "bench": "flash_attention, flash_attention gradient, flash_attention feature, quant_matmul int4 g128,"
        " quant_matmul int4 g32, quant_matmul W8A8, paged_kv append, paged_kv decode, paged_kv decode int8,"
        " paged_kv prompt",
    }
    assert {r["work"] for r in records} == set(works[part].split(", "))
    for r in records:
        assert {"card", "commit", "torch", "date", "us", "graph"} <= r.keys()
        assert set(r.get("failed", ())) <= {"gemlite", "humming"}  # where they are not installed
        assert r["card"] == "dry run on a CPU"
        assert all(0 < t["p20"] <= t["median"] <= t["p80"] for t in r["us"].values())
        assert ("ratio" in r) == (part == "bench")
        assert r.get("tflops", 0) > 0 or r.get("gbps", 0) > 0
    kept = records[:-2]
    out.write_text("".join(json.dumps(r) + "\n" for r in kept))
    assert "go" in script("--part", part, "--dry-run", "--out", str(out), "--seconds", "-1").stdout
    assert len(out.read_text().splitlines()) == len(kept)
    script("--part", part, "--dry-run", "--out", str(out))
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["work"], r["case"]) for r in again] == [(r["work"], r["case"]) for r in records]


def test_makes_no_record_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "no CUDA device" in script("--part", "peers").stderr
    assert "--out" in script("--part", "peers", "--dry-run").stderr
    assert not (ROOT / "bench/records/gpu").exists() or not list((ROOT / "bench/records/gpu").glob("*dry*"))


def test_what_cannot_run_is_named():
    def broken(_):
        raise ValueError("backend: no\nmore")

    calls = {"pyarch": broken, "peer": lambda _: time.sleep(1e-4), "other": lambda _: time.sleep(1e-3)}
    found = _gpu_timer.measure(Entry(calls, copies=1, flops=1e9), torch.device("cpu"), rounds=2)
    assert found["failed"] == {"pyarch": "ValueError: backend: no"}
    assert found["us"].keys() == {"peer", "other"}
    assert "ratio" not in found
    assert found["tflops"] == pytest.approx(1e-3 / (found["us"]["peer"]["median"] * 1e-6), rel=1e-6)


@pytest.mark.parametrize(("code", "status"), [(0, 0), (5, 0), (1, 1), (9, 1)])
def test_compute_sanitizer(code, status, tmp_path, monkeypatch):
    """It watches our kernels alone, with every tensor an allocation; whatever it does not prove counts as wrong."""
    tool, log = tmp_path / "compute-sanitizer", tmp_path / "log"
    tool.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> {log}\nexit {code}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu.sanitize("paged_kv") == status
    memory, races = log.read_text().splitlines()
    assert memory.startswith("1 --tool memcheck --kernel-name kns=pyarch ")
    assert races.startswith("1 --tool racecheck ")
    assert all("cuda and paged_kv" in line for line in (memory, races))


def test_compute_sanitizer_that_does_not_end(tmp_path, monkeypatch):
    (tmp_path / "compute-sanitizer").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpu, "SANITIZER_SECONDS", 0.1)
    assert gpu.sanitize("") == 1


def test_table_of_goals(tmp_path, monkeypatch):
    """Made-up records: the mean and the worst of a row, of the peers that count; a row with a case missing says so."""
    monkeypatch.setattr(gpu_table, "RECORDS", tmp_path)
    assert "not yet run" in gpu_table.table()
    sizes = [name for work, name in gpu_table.rows(next(g for g in gpu_table.GOALS if "M 16" in g.what))]
    common = {"card": "Card", "torch": "2", "commit": "abc", "work": "quant_matmul int4 g128"}
    lines = []
    for i, name in enumerate(sizes):
        us = {
            "pyarch triton": 10.0,
            "gemlite": 20.0 if i else 5.0,
            "humming": 40.0,
            "torch F.linear, bf16 weights": 1.0,
        }
        lines.append(
            {**common, "case": name, "date": f"2026-01-0{i + 1}", "us": {n: {"median": t} for n, t in us.items()}}
        )
    (tmp_path / "card.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = (line for line in gpu_table.table().splitlines() if "M 16" in line)
    mean = (0.5 * 2 ** (len(sizes) - 1)) ** (1 / len(sizes))
    assert f"| {mean:.2f}× | 0.50× {sizes[0]} | 2026-01-0{len(sizes)}, abc |" in row
    (tmp_path / "card.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    assert "not all run" in gpu_table.table()
    assert "**0.50×**" not in gpu_table.table()
