"""The benchmark harness: alternation, ratios, records and the table."""

import json

import pytest
import torch

from bench import _contest, table
from bench._contest import Entry, Row


def test_measure_alternates_and_picks_the_fastest_peer(monkeypatch):
    monkeypatch.setattr(_contest.ceilings, "ceiling", lambda kind, threads: 1e9)
    calls = []

    def contender(name, took):
        return lambda: calls.append(name) or took

    entry = Entry(
        contender("ours", 1.0), {"slow": contender("slow", 4.0), "fast": contender("fast", 2.0)}, moved=5e8, timed=True
    )
    result = _contest.measure(entry, threads=1, seconds=0.0)
    assert (result.peer, result.facts["ratio"], result.facts["extra_us"]) == ("fast", 2.0, -1e6)
    assert (result.facts["ceiling"], result.facts["fraction"]) == ("dram", 0.5)
    assert len(calls) == 15
    assert calls[:6] == ["ours", "slow", "fast", "slow", "fast", "ours"]


def test_rotate_gives_copies_past_the_cache():
    weight = torch.zeros(8 << 20)
    turns = _contest.rotate(weight)
    seen = {next(turns).data_ptr() for _ in range(20)}
    assert len(seen) == 5


def test_a_row_without_a_goal_is_for_the_records_alone(results, tmp_path, monkeypatch):
    (tmp_path / "records").mkdir()
    monkeypatch.setattr(table, "HERE", tmp_path)
    monkeypatch.setattr(table, "rows", lambda: [Row("work", ("a",), (1, 2), goal=None, at_most_us=None, note="")])
    table.append(results)
    assert "| work |" in table.table()
    assert "3.00" not in table.table()


@pytest.fixture
def results():
    def run(contender, median):
        info = {"row": "work", "case": "a", "threads": 2, "contender": contender, "ratio": 3.0, "extra_us": -20.0}
        info |= {"ceiling": "dram", "ceiling_rate": 3e10, "fraction": 0.5, "cpu_isa": "avx512", "torch": "2"}
        stats = {"median": median, "min": median, "rounds": 5}
        params = {"contender": "pyarch" if contender == "pyarch" else "peer"}
        return {"group": "g", "params": params, "extra_info": info, "stats": stats}

    cpu = {"brand_raw": "CPU", "family": 1, "model": 2, "count": 2}
    commit = {"id": "0123456789abcdef", "dirty": False}
    return {
        "benchmarks": [run("pyarch", 1e-5), run("torch", 3e-5)], "datetime": "2026-01-02T03:04:05.6",
        "machine_info": {"cpu": cpu, "python_version": "3.11"}, "commit_info": commit,
    }  # fmt: skip


def test_records_and_table(results, tmp_path, monkeypatch):
    (tmp_path / "records").mkdir()
    monkeypatch.setattr(table, "HERE", tmp_path)
    goal = Row("work", ("a", "b"), (1, 2), goal=4.0, at_most_us=None, note="why")
    monkeypatch.setattr(table, "rows", lambda: [goal])
    for _ in range(2):
        path = table.append(results)
    lines = path.read_text().splitlines()
    assert len(lines) == 2  # appended, never rewritten
    record = json.loads(lines[0])
    assert record["ours"]["median_us"] == 10.0
    assert record["peer"] == {"name": "torch", "median_us": 30.0, "min_us": 30.0}
    assert "| work | torch | 4× | **3.00×** (why) | 3.00× a | 50 % dram | 2026-01-02 |" in table.table()
    monkeypatch.setattr(table, "rows", lambda: [Row("work", ("a",), (1, 2), None, 5.0, "")])
    assert "| ≤ +5 µs | -20.0 µs | -20.0 µs a |" in table.table()


def test_filled_replaces_what_is_between_the_markers(monkeypatch):
    monkeypatch.setattr(table, "table", lambda: "new")
    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter"
    assert table.filled(text) == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter"
    with pytest.raises(ValueError, match="README"):
        table.filled("no markers")


def test_every_row_is_stated_once():
    rows = table.rows()
    assert rows
    assert len({row.work for row in rows}) == len(rows)
