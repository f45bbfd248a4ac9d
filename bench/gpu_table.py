"""The table of goals on a GPU in docs/gpu.md, from bench/records/gpu.

    python -m bench.gpu_table --write

A goal stands when the latest record of every case of its row shows it; a row without records says so.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import exp, log
from pathlib import Path

from ._gpu_cases import cases

RECORDS = Path(__file__).parent / "records/gpu"
PAGE = Path(__file__).parent.parent / "docs/gpu.md"
BEGIN, END = "<!-- goals: begin (python -m bench.gpu_table --write) -->", "<!-- goals: end -->"


@dataclass(frozen=True)
class Goal:
    """A row. cases: a pattern of the case's names; peers: of the contenders that count; rate: compared instead of a
    ratio of times, a fraction that the record has."""

    what: str
    against: str
    work: str
    cases: str
    floor: float
    target: float
    peers: str = ""
    rate: str = ""


SDPA = "torch SDPA, best of cuDNN, flash, efficient"
OTHERS, INT4 = "best of torch tinygemm, gemlite, humming-kernels", "_weight_int4pack_mm|gemlite|humming"
CUBLAS, LINEAR = "cuBLAS, bf16", "linear"
MATMUL = "quant_matmul int4 g128"
GOALS = (
    Goal("attention forward, bf16, S 2k to 16k", SDPA, "flash_attention", r"S(2048|8192|16384) ", 0.7, 1.0),
    Goal("attention forward, bf16, S to 1k", SDPA, "flash_attention", r"S(512|1024) ", 0.8, 1.1),
    Goal("attention backward, bf16, D 128", SDPA, "flash_attention gradient", "D128", 0.55, 1.0),
    Goal("window, sinks, packed sequences", "our dense, as many tiles", "flash_attention feature", "", 0.87, 1.0),
    Goal("paged decode, bf16, 256 MB", "copy bandwidth", "paged_kv decode", "^(?!B1 KV4)", 0.75, 0.9, rate="of_copy"),
    Goal("paged decode, int8 KV", "our bf16", "paged_kv decode int8", "", 1.8, 1.8),
    Goal("int4 matmul, M 1, layers of Llama 8B", OTHERS, MATMUL, "^M1 .*(K4096|K14336)", 1.1, 1.1, INT4),
    Goal("int4 matmul, M 16 and 64", OTHERS, MATMUL, "^M(16|64) ", 1.0, 1.0, INT4),
    Goal("int4 matmul, M 256 to 4096", CUBLAS, MATMUL, "^M(256|1024|4096) ", 0.95, 0.95, LINEAR),
    Goal("W8A8, M from 1024, quantisation included", CUBLAS, "quant_matmul W8A8", "", 1.5, 1.5),
    Goal("int4 matmul, M 1, 4096 x 4096", CUBLAS, MATMUL, "^M1 N4096 K4096", 2.5, 2.5, LINEAR),
    Goal("int4 matmul, M 1, over 100 MB", CUBLAS, MATMUL, "^M1 N16384", 3.3, 3.3, LINEAR),
)


def latest() -> dict[str, dict[tuple[str, str], dict]]:
    """By card: the last record of each case."""
    found: dict[str, dict[tuple[str, str], dict]] = {}
    for path in sorted(RECORDS.glob("*.jsonl")):
        for line in filter(None, path.read_text().splitlines()):
            record = json.loads(line)
            found.setdefault(record["card"], {})[record["work"], record["case"]] = record
    return found


def rows(goal: Goal) -> list[tuple[str, str]]:
    """The cases that a goal speaks of."""
    return [(c.work, c.name) for c in cases() if c.work == goal.work and re.search(goal.cases, c.name)]


def reached(goal: Goal, record: dict) -> float:
    """Ours over the best of the goal's peers in one record, or its fraction of a ceiling."""
    if goal.rate:
        return record.get(goal.rate, float("nan"))
    times = {name: t["median"] for name, t in record["us"].items()}
    ours = min(t for name, t in times.items() if name.startswith("pyarch"))
    theirs = [t for name, t in times.items() if not name.startswith("pyarch") and re.search(goal.peers, name)]
    return min(theirs, default=float("nan")) / ours


def table() -> str:
    return "\n\n".join(_table(card, found) for card, found in (latest() or {"": {}}).items())


def _table(card: str, found: dict[tuple[str, str], dict]) -> str:
    show: Callable[[Goal, float], str] = lambda g, x: f"{x * 100:.0f} %" if g.rate else f"{x:.2f}×"
    lines = [
        "| work | against | floor | target | reached | worst case | date, commit |",
        "|---|---|---|---|---|---|---|",
    ]
    for goal in GOALS:
        cells = [goal.what, goal.against, show(goal, goal.floor), show(goal, goal.target)]
        records = [found[key] for key in rows(goal) if key in found]
        if not records or len(records) < len(rows(goal)):
            lines.append("| " + " | ".join([*cells, "not yet run" if not records else "not all run", "", ""]) + " |")
            continue
        values = {r["case"]: reached(goal, r) for r in records}
        mean, worst = exp(sum(log(v) for v in values.values()) / len(values)), min(values, key=values.__getitem__)
        figure = show(goal, mean) if mean >= goal.target else f"**{show(goal, mean)}**"
        when = max((r["date"][:10], r["commit"]) for r in records)
        lines.append(
            "| " + " | ".join([*cells, figure, f"{show(goal, values[worst])} {worst}", ", ".join(when)]) + " |"
        )
    return "\n".join([*_caption(card, found), *lines])


def _caption(card: str, found: dict[tuple[str, str], dict]) -> Iterator[str]:
    if not found:
        return
    last = max(found.values(), key=lambda r: r["date"])
    tops = [r for (work, _), r in found.items() if work == "ceiling"]
    ceilings = "; ".join(
        f"{r['case']} {r['gbps']:.0f} GB/s" if "gbps" in r else f"{r['case']} {r['tflops']:.0f} TFLOP/s" for r in tops
    )
    yield f"{card}, driver {last.get('driver')}, torch {last['torch']}, Triton {last.get('triton')}; {ceilings}."
    yield ""


def filled(page: str) -> str:
    """The page with the table between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="fill docs/gpu.md in")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text()))
    else:
        print(table())
