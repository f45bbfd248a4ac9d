"""Hugging Face checkpoints: a folder with config.json and safetensors, in one file or sharded with an index.

A safetensors file is a length u64, a JSON header of that length, and the data:

    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {...}}

where the offsets count from the end of the header and the tensors fill the data without holes or overlaps. `load`
checks all of that, for every shard; tensors are read when asked for. Source: the safetensors specification.
docs/decisions/0052 says why the package's reader is not used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import FileError, Tensors, fill, parse_json, read_json, regular_file, reopened, stamp

MAX_HEADER = 16 << 20
MAX_CONFIG = 4 << 20
MAX_INDEX = 64 << 20
MAX_RANK = 8
MAX_ELEMENTS = 1 << 60

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its shard, safetensors' dtype name, shape, and bytes [offset, offset + nbytes)."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint:
    """An opened folder.

    config     the object in config.json
    infos      dict of tensor name to TensorInfo
    tensors    mapping of tensor name to torch.Tensor on the CPU, read at each access, in the dtype of the file
    """

    def __init__(
        self, folder: str, config: dict[str, Any], infos: dict[str, TensorInfo], stamps: dict[str, tuple]
    ) -> None:
        self.folder, self.config, self.infos = folder, config, infos
        self.tensors: Mapping[str, torch.Tensor] = _Tensors(infos, stamps)

    def __repr__(self) -> str:
        return f"Checkpoint({self.folder!r}, {len(self.infos)} tensors)"


def load(folder: str | os.PathLike) -> Checkpoint:
    """Opens a folder with config.json and either model.safetensors or model.safetensors.index.json and its shards.

    Raises FileError if anything is missing, does not fit together, or leads out of the folder. Pickled weights (.bin,
    .pt) are never loaded.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", MAX_CONFIG)
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not whole.exists() and not index.exists():
        raise FileError(folder, "has neither model.safetensors nor model.safetensors.index.json")
    infos: dict[str, TensorInfo] = {}
    stamps: dict[str, tuple] = {}
    if whole.exists():
        infos, stamps[os.fspath(whole)] = _header(whole)
    else:
        shards: dict[str, dict[str, TensorInfo]] = {}
        for name, shard in _weight_map(index).items():
            if shard not in shards:
                shards[shard], stamps[os.fspath(folder / shard)] = _header(folder / shard)
            if name not in shards[shard]:
                raise FileError(index, f"says that {name!r} is in {shard!r}, which does not have it")
            infos[name] = shards[shard][name]
    return Checkpoint(os.fspath(folder), config, infos, stamps)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to the name of its shard, a file of this very folder."""
    weights = read_json(index, MAX_INDEX).get("weight_map")
    if not isinstance(weights, dict):
        raise FileError(index, "has no weight_map")
    for shard in weights.values():
        if type(shard) is not str or not shard.endswith(".safetensors") or set(shard) & set("/\\:\0"):
            raise FileError(index, f"names {str(shard)[:100]!r}, which is no safetensors file of the folder")
    return weights


def _header(path: Path) -> tuple[dict[str, TensorInfo], tuple]:
    with open(regular_file(path), "rb") as file:
        known, size = stamp(file), os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise FileError(path, f"has {size} bytes, too few for its header: truncated, corrupt or no safetensors")
        if length > MAX_HEADER:
            raise FileError(path, f"has a header of {length} bytes; at most {MAX_HEADER} are read")
        header = parse_json(path, file.read(length), "its header ")
    header.pop("__metadata__", None)
    start = 8 + length
    infos = {name: _info(path, name, entry, start) for name, entry in header.items()}
    end = start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise FileError(path, f"tensor {name!r} begins at byte {info.offset}, but the one before ends at {end}")
        end += info.nbytes
    if end != size:
        raise FileError(path, f"holds {end} bytes by its header, but has {size}: truncated or corrupt")
    return infos, known


def _info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise FileError(path, f"tensor {name!r} is described by {type(entry).__name__}, not by an object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str):
        raise FileError(path, f"tensor {name!r} has no dtype")
    shape, offsets = _numbers(path, name, entry, "shape"), _numbers(path, name, entry, "data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FileError(path, f"data_offsets of tensor {name!r} must be a begin and an end")
    if len(shape) > MAX_RANK or math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise FileError(path, f"tensor {name!r} has the impossible shape {str(shape)[:100]}")
    nbytes = offsets[1] - offsets[0]
    if dtype in _DTYPES and math.prod(shape) * _DTYPES[dtype].itemsize != nbytes:
        raise FileError(path, f"tensor {name!r} of {dtype} and shape {shape} cannot have {nbytes} bytes")
    return TensorInfo(os.fspath(path), dtype, tuple(shape), start + offsets[0], nbytes)


def _numbers(path: Path, name: str, entry: dict, what: str) -> list[int]:
    value = entry.get(what)
    if type(value) is not list or any(type(v) is not int or v < 0 for v in value):
        raise FileError(path, f"{what} of tensor {name!r} must be a list of numbers of at least 0")
    return value


class _Tensors(Tensors):
    def __init__(self, infos: dict[str, TensorInfo], stamps: dict[str, tuple]) -> None:
        super().__init__(infos)
        self._stamps = stamps

    def __getitem__(self, name: str) -> torch.Tensor:
        info = self._infos[name]
        if info.dtype not in _DTYPES:
            raise FileError(info.file, f"tensor {name!r} is of dtype {info.dtype}; supported are {', '.join(_DTYPES)}")
        data = torch.empty(info.nbytes, dtype=torch.uint8)
        with reopened(info.file, self._stamps[info.file]) as file:
            file.seek(info.offset)
            fill(info.file, file, data.numpy())
        if info.dtype == "BOOL" and info.nbytes and int(data.max()) > 1:
            raise FileError(info.file, f"tensor {name!r} of BOOL has a byte that is neither 0 nor 1")
        return data.view(_DTYPES[info.dtype]).view(info.shape)
