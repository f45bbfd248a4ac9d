"""Files from outside: GGUF, safetensors checkpoints, tokenizers. All of it is untrusted.

Sizes, counts and offsets are checked against the file before anything is read or allocated by them, and nothing that
can run code (pickle) is ever loaded. Whatever is wrong with a file is a FileError that names the file and the fault.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

MAX_DEPTH = 64  # of nested JSON values


class FileError(ValueError):
    """A file is truncated, corrupt, of a foreign kind, or holds what pyarch does not support."""

    def __init__(self, path: str | os.PathLike, fault: str) -> None:
        super().__init__(os.fspath(path), fault)  # both, so that it can be pickled

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


class Tensors(Mapping):
    """Tensors by name, in the order of infos. Each access opens the file and reads that tensor; nothing is kept."""

    def __init__(self, infos: Mapping[str, Any]) -> None:
        self._infos = infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos


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


def stamp(file: BinaryIO) -> tuple[int, ...]:
    """What tells that a file is still the one whose header was checked."""
    s = os.fstat(file.fileno())
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns


@contextmanager
def reopened(path: str, known: tuple[int, ...]) -> Iterator[BinaryIO]:
    """The file again, unbuffered, if its stamp is as known.

    Files are read, not mapped: a file that shrinks under a memory map kills the process.
    """
    with open(regular_file(path), "rb", buffering=0) as file:
        if stamp(file) != known:
            raise FileError(path, "changed since it was opened")
        yield file


def fill(path: str, file: BinaryIO, target: np.ndarray) -> None:
    """Reads the next target.nbytes bytes into a contiguous array."""
    view = memoryview(target.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    while len(view):
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise FileError(path, "shrank while it was read")
        view = view[count:]


def read_small(path: str | os.PathLike, max_bytes: int) -> bytes:
    """The content of a regular file of at most max_bytes."""
    with open(regular_file(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size  # asked first: read(n) allocates n bytes whatever the file has
        if size > max_bytes:
            raise FileError(path, f"has {size} bytes; at most {max_bytes} are read")
        return file.read(size)


def read_json(path: str | os.PathLike, max_bytes: int) -> dict[str, Any]:
    """The object in a JSON file of at most max_bytes, nested at most MAX_DEPTH deep."""
    return parse_json(path, read_small(path, max_bytes))


def parse_json(path: str | os.PathLike, data: bytes, what: str = "") -> dict[str, Any]:
    """A JSON object nested at most MAX_DEPTH deep, no key twice; `what` says which part of the file it is."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as e:  # a bad number, text or nesting too
        raise FileError(path, f"{what}is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise FileError(path, f"{what}must be a JSON object, not {type(value).__name__}")
    level: list[dict | list] = [value]
    depth = 0
    while level := [v for parent in level for v in _children(parent) if isinstance(v, (dict, list))]:
        depth += 1
        if depth > MAX_DEPTH:
            raise FileError(path, f"{what}is nested more than {MAX_DEPTH} deep")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} occurs twice")
    return made


def _children(value: dict | list) -> Any:
    return value.values() if isinstance(value, dict) else value
