"""Records and the README's table.

    python -m bench.table                          print the table from bench/records
    python -m bench.table RESULTS.json ... --write  append pytest-benchmark's results to the records, fill the README in

A record is one line of JSON: one case of one row with one thread count, ours and the fastest peer. Records are only
ever appended; the table shows the latest of each. What a row is, its cases and its goal are read from the bench files.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections import defaultdict
from collections.abc import Iterable
from math import exp, log
from pathlib import Path

from ._contest import Row

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin (python -m bench.table --write) -->", "<!-- benchmarks: end -->"
THREADS = 2  # the table's; the records have all
NEVER_UNDER = 0.95  # the worst case of a row that counts as met


def records_of(results: dict) -> Iterable[dict]:
    """The records in one JSON file of pytest-benchmark."""
    groups: dict[str, dict[str, dict]] = defaultdict(dict)
    for run in results["benchmarks"]:
        groups[run["group"]][run["params"]["contender"]] = run
    cpu, commit = results["machine_info"]["cpu"], results["commit_info"]
    machine = f"{cpu.get('brand_raw', 'unknown CPU')} family {cpu.get('family')} model {cpu.get('model')}"
    for pair in groups.values():
        if pair.keys() != {"pyarch", "peer"}:
            continue
        ours, peer = (
            {"median_us": run["stats"]["median"] * 1e6, "min_us": run["stats"]["min"] * 1e6}
            for run in (pair["pyarch"], pair["peer"])
        )
        info = dict(pair["pyarch"]["extra_info"])
        del info["contender"]
        yield _rounded({
            **info, "ours": ours, "peer": {"name": pair["peer"]["extra_info"]["contender"], **peer},
            "rounds": pair["pyarch"]["stats"]["rounds"], "machine": machine, "cpus": cpu.get("count"),
            "python": results["machine_info"]["python_version"], "date": results["datetime"][:19],
            "commit": (commit.get("id") or "unknown")[:12] + ("+changes" if commit.get("dirty") else ""),
        })  # fmt: skip


def append(results: dict) -> Path | None:
    """Appends the records of one JSON file to the machine's file in bench/records."""
    lines = list(records_of(results))
    if not lines:
        return None
    path = HERE / "records" / (lines[0]["machine"].lower().replace(" ", "-") + ".jsonl")
    with path.open("a") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def rows() -> list[Row]:
    """Every row of every bench file, in order."""
    modules = [importlib.import_module(f"{__package__}.{p.stem}") for p in sorted(HERE.glob("bench_*.py"))]
    return [f.row for module in modules for f in vars(module).values() if isinstance(getattr(f, "row", None), Row)]


def table() -> str:
    """The benchmark tables in Markdown, one for each machine measured."""
    latest: dict[str, dict[tuple, dict]] = defaultdict(dict)
    for path in sorted((HERE / "records").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            latest[record["machine"]][record["row"], record["case"], record["threads"]] = record
    return "\n\n".join(_machine(name, found) for name, found in latest.items())


def _machine(name: str, found: dict[tuple, dict]) -> str:
    lines, used = [], []
    for row in rows():
        if row.goal is None and row.at_most_us is None:
            continue  # a row without a goal is for the records alone
        threads = THREADS if THREADS in row.threads else row.threads[-1]
        measured = [found[key] for case in row.cases if (key := (row.work, case, threads)) in found]
        if measured:
            lines.append(_row(row, measured))
            used += measured
    tops = {r["ceiling"]: r["ceiling_rate"] for r in used if r.get("ceiling") and r["threads"] == THREADS}
    some = used[-1] if used else {}
    caption = (
        f"{name}, {some.get('cpus')} CPUs, {some.get('cpu_isa')} library, {THREADS} threads, torch {some.get('torch')}"
    )
    if tops:
        caption += "; ceilings " + ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in sorted(tops.items()))
        caption += " (GB/s or GFLOP/s)"
    head = ["| work | peer | goal | ratio | worst case | of ceiling | date |", "|---|---|---|---|---|---|---|"]
    return "\n".join([caption + ".", "", *head, *lines])


def _row(row: Row, measured: list[dict]) -> str:
    names = list(dict.fromkeys(r["peer"]["name"] for r in measured))
    peers = " / ".join(names) if len(names) < 4 else "eager torch"  # an op each: the records name them
    if row.at_most_us is None:
        figure = _mean(r["ratio"] for r in measured)
        worst = min(measured, key=lambda r: r["ratio"])
        goal = f"{row.goal:g}×" if row.goal else ""
        met = row.goal is None or (figure >= row.goal and worst["ratio"] >= NEVER_UNDER)
        cells = [goal, f"{figure:.2f}×", f"{worst['ratio']:.2f}× {worst['case']}"]
    else:
        worst = max(measured, key=lambda r: r["extra_us"])
        average = sum(r["extra_us"] for r in measured) / len(measured)
        met = worst["extra_us"] <= row.at_most_us
        cells = [f"≤ +{row.at_most_us:g} µs", f"{average:+.1f} µs", f"{worst['extra_us']:+.1f} µs {worst['case']}"]
    if not met:
        cells[1] = f"**{cells[1]}**" + (f" ({row.note})" if row.note else "")
    bounded = [r for r in measured if r.get("fraction")]
    kinds = "/".join(dict.fromkeys(r["ceiling"] for r in bounded))
    of = f"{_mean(r['fraction'] for r in bounded) * 100:.0f} % {kinds}" if bounded else ""
    return f"| {row.work} | {peers} | {' | '.join(cells)} | {of} | {max(r['date'] for r in measured)[:10]} |"


def _mean(values: Iterable[float]) -> float:
    logs = [log(v) for v in values]
    return exp(sum(logs) / len(logs))


def _rounded(value):
    """The same with numbers at four significant digits: more would be noise in the records."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else value


def filled(readme: str) -> str:
    """The README's text with the table between its markers. Raises ValueError without markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", nargs="*", type=Path, help="pytest-benchmark's JSON, to be appended to the records")
    parser.add_argument("--write", action="store_true", help="fill the README in")
    arguments = parser.parse_args()
    for path in arguments.results:
        append(json.loads(path.read_text()))
    if arguments.write:
        README.write_text(filled(README.read_text()))
    else:
        print(table())
