"""Files from outside: GGUF, safetensors checkpoints, tokenizers. All of it is untrusted.

Sizes, counts and offsets are checked against the file before anything is read or allocated by them, and nothing that
can run code (pickle) is ever loaded. Whatever is wrong with a file is a FileError that names the file and the fault.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

MAX_DEPTH = 64  # of nested JSON values


class FileError(ValueError):
    """A file is truncated, corrupt, of a foreign kind, or holds what pyarch does not support."""

    def __init__(self, path: str | os.PathLike, fault: str) -> None:
        super().__init__(f"{os.fspath(path)}: {fault}")


def require(module: str) -> ModuleType:
    """Imports one of the packages of the extra 'models'."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(f"{e}; reading models needs: pip install 'pyarch-kernels[models]'") from None


def regular_file(path: str | os.PathLike) -> Path:
    """The path of an existing regular file: a pipe or a device could block or never end."""
    path = Path(path)
    if not path.exists():
        raise FileError(path, "no such file")
    if not path.is_file():
        raise FileError(path, "is not a regular file")
    return path


def read_json(path: str | os.PathLike, max_bytes: int) -> dict[str, Any]:
    """The object in a JSON file of at most max_bytes, nested at most MAX_DEPTH deep."""
    path = regular_file(path)
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise FileError(path, f"is larger than the {max_bytes} bytes allowed")
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as e:  # a bad number, text or nesting too
        raise FileError(path, f"is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise FileError(path, f"must hold a JSON object, not {type(value).__name__}")
    level: list[dict | list] = [value]
    depth = 0
    while level := [v for parent in level for v in _children(parent) if isinstance(v, (dict, list))]:
        depth += 1
        if depth > MAX_DEPTH:
            raise FileError(path, f"is nested more than {MAX_DEPTH} deep")
    return value


def _children(value: dict | list) -> Any:
    return value.values() if isinstance(value, dict) else value
