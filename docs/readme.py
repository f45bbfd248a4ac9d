"""Fills in the README's generated parts: the support matrix, from LIMITS, and what its example prints.

python -m docs.readme --write
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from pathlib import Path

import torch

import pyarch
from pyarch.dispatch import Limits, Op
from pyarch.explain import ops

README = Path(__file__).parent.parent / "README.md"
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def matrix() -> str:
    """One row an op, one column a backend; every op also runs on `reference`, in any float dtype, anywhere."""
    lines = ["| op | `cpu` | `triton` | `cuda` | gradients |", "|---|---|---|---|---|"]
    for name, op in sorted(ops().items()):
        cells = [_limits(op, backend) for backend in ("cpu", "triton", "cuda")]
        lines.append(" | ".join([f"| `{name}`", *cells, f"{op.gradient} |"]))
    return "\n".join(lines)


def _limits(op: Op, backend: str) -> str:
    if backend not in op.limits:
        return ""
    limits: Limits = op.limits[backend]
    parts = [" ".join(SHORT.get(d, str(d).removeprefix("torch.")) for d in limits.dtypes)]
    parts += [f"{fact} {' or '.join(map(str, values))}" for fact, values in limits.allowed.items()]
    parts += [f"{fact} {low} to {high}" for fact, (low, high) in limits.ranges.items()]
    if limits.capability > (0, 0):
        parts.append("sm_{}{}".format(*limits.capability))
    return ", ".join(parts)


def example(text: str) -> str:
    """What the README's first Python block prints."""
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    if block is None:
        raise ValueError("README.md: needs a Python block")
    out = io.StringIO()
    torch.manual_seed(0)
    with contextlib.redirect_stdout(out):
        exec(compile(block.group(1), "README.md", "exec"), {"__name__": "readme"})
    return f"```\n{out.getvalue().rstrip()}\n```"


def filled(text: str) -> str:
    """The README's text with its parts generated anew. Raises ValueError where a marker is missing."""
    for name, content in (("matrix", matrix()), ("example", example(text))):
        begin, end = f"<!-- {name}: begin (make readme) -->", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"README.md: needs the lines {begin} and {end}")
        text = f"{before}{begin}\n{content}\n{end}{after}"
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="write the README; else print the support matrix")
    if parser.parse_args().write:
        README.write_text(filled(README.read_text()))
    else:
        print(f"pyarch {pyarch.__version__}\n{matrix()}")
