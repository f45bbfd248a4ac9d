"""make gpu's script without a GPU: every case runs in small, records hold what they must, a second run goes on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import _gpu_tests, _gpu_timer, gpu, gpu_table
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
    fastest = min(t["median"] for t in found["us"].values())  # on a busy machine either
    assert found["tflops"] == pytest.approx(1e-3 / (fastest * 1e-6), rel=1e-6)


@pytest.mark.parametrize(("code", "status"), [(0, 0), (5, 0), (1, 1), (9, 1)])
def test_compute_sanitizer(code, status, tmp_path, monkeypatch):
    """It watches our kernels alone, with every tensor an allocation; whatever it does not prove counts as wrong."""
    tool, log = tmp_path / "compute-sanitizer", tmp_path / "log"
    tool.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> {log}\nexit {code}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert dict(_gpu_tests.sanitize("paged_kv")) == dict.fromkeys(("memcheck", "racecheck"), status == 0)
    memory, races = sorted(log.read_text().splitlines())
    assert memory.startswith("1 --tool memcheck --kernel-name kns=pyarch ")
    assert races.startswith("1 --tool racecheck ")
    assert all("cuda and paged_kv" in line for line in (memory, races))


def test_compute_sanitizer_that_does_not_end(tmp_path, monkeypatch):
    (tmp_path / "compute-sanitizer").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(_gpu_tests, "SANITIZER_SECONDS", 0.1)
    assert not any(well for _, well in _gpu_tests.sanitize(""))


def test_suite_is_dealt_out_and_goes_on(tmp_path, monkeypatch, capsys):
    """Every test runs once, in some process; what passed is not run again, what failed is."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    tests = "import pathlib, pytest\n@pytest.mark.parametrize('i', range(7))\ndef test_gpu(i):\n"
    tests += (
        "    with open('ran', 'a') as f: f.write(f'{i}\\n')\n    assert i != 3 or pathlib.Path('mended').exists()\n"
    )
    (tmp_path / "test_some.py").write_text(tests)
    monkeypatch.setattr(_gpu_tests, "PROCESSES", 2)
    monkeypatch.chdir(tmp_path)
    notes, ran = tmp_path / "notes", tmp_path / "ran"

    def run(end=600.0):
        arguments = [str(tmp_path), "--rootdir", str(tmp_path), "-c", str(tmp_path / "pytest.ini")]
        found = _gpu_tests.suite("", arguments, notes, time.monotonic() + end)
        done = sorted(map(int, ran.read_text().split())) if ran.exists() else []
        ran.unlink(missing_ok=True)
        return found, done

    monkeypatch.setattr(_gpu_tests, "ROOT", tmp_path)
    assert run(0) == ({"passed": 0, "earlier": 0, "failed": [], "well": False, "seconds": 0}, [])
    assert "goes on" in capsys.readouterr().out
    found, done = run()
    assert done == list(range(7))
    assert (found["passed"], found["failed"], found["well"]) == (6, ["test_some.py::test_gpu[3]"], False)
    (tmp_path / "mended").touch()
    found, done = run()
    assert done == [3]
    assert (found["passed"], found["earlier"], found["failed"], found["well"]) == (7, 6, [], True)


def test_what_passed_is_not_run_again(tmp_path, monkeypatch):
    """Of this commit on this card: the suite, and each tool of compute-sanitizer."""
    runs, well = [], {"suite": False, "memcheck": True, "racecheck": False}
    monkeypatch.setattr(gpu, "machine", lambda _: {"card": "Card", "commit": "abc"})
    monkeypatch.setattr(_gpu_tests, "suite", lambda *_: runs.append("suite") or {"well": well["suite"]})
    monkeypatch.setattr(
        _gpu_tests, "sanitize", lambda _: runs.append("tools") or [(t, well[t]) for t in list(well)[1:]]
    )
    path, later = tmp_path / "card.jsonl", time.monotonic() + 60

    def run(op="", end=later):
        runs.clear()
        return gpu.tests(op, [], path, torch.device("cpu"), end), list(runs)

    assert run() == (1, ["suite", "tools"])
    well["suite"] = well["racecheck"] = True
    assert run(end=0) == (1, ["suite"])
    assert run() == (0, ["tools"])
    assert run() == (0, [])
    assert run("paged_kv") == (0, ["suite", "tools"])
    monkeypatch.setattr(gpu, "machine", lambda _: {"card": "Card", "commit": "abd"})
    assert run() == (0, ["suite", "tools"])
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(r["part"], r["work"]) for r in kept} == {("test", work) for work in well}


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
