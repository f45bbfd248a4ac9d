"""GGUF files (versions 2 and 3, little-endian): `load(path)` checks the whole header and reads tensors when asked.

    file       "GGUF", version u32, tensors u64, entries u64; the entries; the tensor infos; padding; the data
    entry      key string, type u32, value (a number, a bool, a string, or an array: type u32, length u64, values)
    info       name string, rank u32, sizes u64 (the row first), type u32, offset u64 from the start of the data
    string     length u64, UTF-8 bytes

Quantised types stay quantised, used exactly: the QuantizedTensor has the very numbers of the file, so dequantize() does
the arithmetic of the format's definition, in the same order, in float32:

    type         codes  group  scale                      offset or zero
    Q4_0         4-bit  32     d, fp16                    zero 8
    Q4_1         4-bit  32     d, fp16                    m, fp16
    Q5_0, Q5_1   int8   32     d, fp16                    none; m, fp16
    Q8_0         int8   32     d, fp16                    none
    Q4_K         4-bit  32     d * 6-bit scale, fp32      -(dmin * 6-bit minimum), fp32
    Q5_K         int8   32     d * 6-bit scale, fp32      -(dmin * 6-bit minimum), fp32
    Q6_K         int8   16     d * int8 scale, fp32       none

fp16 times a 6-bit or 8-bit integer needs up to 19 bits of mantissa: exact in fp32, in no 16-bit type.
Source of the layouts: the GGUF specification and the gguf package, whose tables of types and block sizes are used here.
docs/decisions/0050 says why its reader is not.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch

from ..quantized import QuantizedTensor
from . import FileError, Tensors, fill, regular_file, reopened, require, stamp

MAX_RANK = 4
MAX_DEPTH = 4  # arrays in arrays
PIECE = 1 << 18  # bytes of a quantised tensor that are converted at a time: they and what they become stay in L2

_SCALARS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}  # value type -> struct code
_STRING, _ARRAY = 8, 9
_PLAIN = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: GGML type name, shape in torch's order (rows first), and bytes [offset, offset + nbytes)."""

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUF:
    """An opened GGUF file.

    metadata   dict of str to int, float, bool, str or a list of them
    infos      dict of tensor name to TensorInfo, in the order of the file
    tensors    mapping of tensor name to torch.Tensor or QuantizedTensor on the CPU, read and converted at each access
    """

    def __init__(self, path: str, known: tuple, metadata: dict[str, Any], infos: dict[str, TensorInfo]) -> None:
        self.path, self.metadata, self.infos = path, metadata, infos
        self.tensors: Mapping[str, torch.Tensor | QuantizedTensor] = _Tensors(path, known, infos)

    def __repr__(self) -> str:
        return f"GGUF({self.path!r}, {len(self.metadata)} entries, {len(self.infos)} tensors)"


def load(path: str | os.PathLike) -> GGUF:
    """Opens a GGUF file: reads its metadata and checks every tensor's place; raises FileError if anything is wrong."""
    path = os.fspath(regular_file(path))
    with open(path, "rb") as file:
        header = _Header(path, file)
        metadata, infos = header.read()
        if metadata.get("split.count", 1) not in (0, 1):
            raise FileError(path, f"is one of {metadata['split.count']} parts of a model; only whole files are read")
        return GGUF(path, stamp(file), metadata, infos)


class _Header:
    """Reads a header front to back; `take` is the only way to bytes, so nothing is read that the file does not have."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.left = self.size

    def fault(self, text: str) -> FileError:
        return FileError(self.path, text)

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise self.fault(f"{what} needs {count} bytes, but {self.left} are left: truncated or corrupt")
        self.left -= count
        data = self.file.read(count)
        if len(data) != count:
            raise self.fault(f"shrank while {what} was read")
        return data

    def number(self, code: str, what: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def count(self, least: int, what: str) -> int:
        """A count of things of at least `least` bytes each, which must fit in what is left of the file."""
        count = self.number("Q", what)
        if count * least > self.left:
            raise self.fault(f"{what} is {count}, more than the {self.left} bytes left can hold: truncated or corrupt")
        return count

    def string(self, what: str) -> str:
        data = self.take(self.number("Q", f"the length of {what}"), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fault(f"{what} is not UTF-8") from None

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise self.fault(f"{what} has the unknown value type {kind}")
        if depth == MAX_DEPTH:
            raise self.fault(f"{what} has arrays nested more than {MAX_DEPTH} deep")
        inner = self.number("I", f"the element type of {what}")
        if inner in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[inner])
            length = self.count(size, f"the length of {what}")
            return list(struct.unpack(f"<{length}{_SCALARS[inner]}", self.take(length * size, what)))
        length = self.count({_STRING: 8, _ARRAY: 12}.get(inner, 1), f"the length of {what}")
        return [self.value(inner, what, depth + 1) for _ in range(length)]

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if self.size < 4 or self.take(4, "the magic number") != b"GGUF":
            raise self.fault("is not a GGUF file: it does not begin with 'GGUF'")
        version = self.number("I", "the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            raise self.fault("is big-endian" if swapped else f"is of GGUF version {version}; 2 and 3 are supported")
        tensors = self.count(24, "the number of tensors")
        entries = self.count(13, "the number of metadata entries")
        metadata: dict[str, Any] = {}
        for i in range(entries):
            key = self.string(f"the key of metadata entry {i}")
            if key in metadata:
                raise self.fault(f"metadata key {key!r} occurs twice")
            metadata[key] = self.value(self.number("I", f"the type of {key!r}"), f"metadata {key!r}")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.fault(f"general.alignment must be a power of two, not {alignment!r}")
        raw = [self.info(i) for i in range(tensors)]
        start = -(-(self.size - self.left) // alignment) * alignment
        return metadata, self.place(raw, start, alignment)

    def info(self, index: int) -> tuple[str, str, tuple[int, ...], int, int]:
        """name, type, shape, relative offset, nbytes of one tensor; block and size fit each other."""
        name = self.string(f"the name of tensor {index}")
        rank = self.number("I", f"the rank of tensor {name!r}")
        if rank > MAX_RANK:
            raise self.fault(f"tensor {name!r} has {rank} dimensions; at most {MAX_RANK} are possible")
        sizes = struct.unpack(f"<{rank}Q", self.take(8 * rank, f"the shape of tensor {name!r}"))
        if 0 in sizes:
            raise self.fault(f"tensor {name!r} has a dimension of size 0")
        kind, offset = struct.unpack("<IQ", self.take(12, f"the type and offset of tensor {name!r}"))
        constants = require("gguf").constants
        try:
            ggml = constants.GGMLQuantizationType(kind)
        except ValueError:
            raise self.fault(f"tensor {name!r} has the unknown type {kind}") from None
        block, nbytes = constants.GGML_QUANT_SIZES[ggml]
        row = sizes[0] if sizes else 1
        if row % block:
            raise self.fault(f"tensor {name!r} has rows of {row}, which is no multiple of {ggml.name}'s {block}")
        return name, ggml.name, tuple(reversed(sizes)), offset, math.prod(sizes) // block * nbytes

    def place(self, raw: list[tuple], start: int, alignment: int) -> dict[str, TensorInfo]:
        """The infos, once every tensor lies inside the file, aligned, and no two share a byte."""
        infos: dict[str, TensorInfo] = {}
        for name, kind, shape, offset, nbytes in raw:
            if name in infos:
                raise self.fault(f"tensor {name!r} occurs twice")
            if offset % alignment:
                raise self.fault(f"tensor {name!r} is at offset {offset}, which is not aligned to {alignment}")
            if start + offset + nbytes > self.size:
                raise self.fault(
                    f"tensor {name!r} ends at byte {start + offset + nbytes}, but the file has {self.size}: "
                    "truncated or corrupt"
                )
            infos[name] = TensorInfo(kind, shape, start + offset, nbytes)
        end, before = 0, ""
        for name, info in sorted(infos.items(), key=lambda item: item[1].offset):
            if info.offset < end:
                raise self.fault(f"tensors {before!r} and {name!r} overlap")
            end, before = info.offset + info.nbytes, name
        return infos


class _Tensors(Tensors):
    def __init__(self, path: str, known: tuple, infos: dict[str, TensorInfo]) -> None:
        super().__init__(infos)
        self._path, self._known = path, known

    def __getitem__(self, name: str) -> torch.Tensor | QuantizedTensor:
        info = self._infos[name]
        if info.type not in _PLAIN and info.type not in _UNPACK:
            have = ", ".join([*_UNPACK, *_PLAIN])
            raise FileError(self._path, f"tensor {name!r} is of type {info.type}; supported are {have}")
        if info.type in _UNPACK and len(info.shape) != 2:
            raise FileError(self._path, f"tensor {name!r} is {info.type} of shape {info.shape}; only matrices can be")
        with reopened(self._path, self._known) as file:
            file.seek(info.offset)
            return self._plain(file, info) if info.type in _PLAIN else self._quantized(file, name, info)

    def _plain(self, file: BinaryIO, info: TensorInfo) -> torch.Tensor:
        tensor = torch.empty(info.shape, dtype=_PLAIN[info.type])
        fill(self._path, file, tensor.view(-1).view(torch.uint8).numpy())
        return tensor

    def _quantized(self, file: BinaryIO, name: str, info: TensorInfo) -> QuantizedTensor:
        n, k = info.shape
        block, group, unpack = _UNPACK[info.type]
        row = info.nbytes // n
        rows = min(n, max(1, PIECE // row))
        buffer = np.empty(rows * (k // block), _BLOCKS[info.type])
        parts: list[torch.Tensor] = []  # torch's memory, for its alignment; filled through numpy
        for at in range(0, n, rows):
            m = min(rows, n - at)
            blocks = buffer[: m * (k // block)]
            fill(self._path, file, blocks)
            piece = [a.reshape(m, -1) for a in unpack(blocks)]
            if not all(map(_finite, piece[1:])):
                raise FileError(self._path, f"tensor {name!r} has a scale that is not finite: corrupt")
            parts = parts or [torch.from_numpy(a).new_empty(n, a.shape[1]) for a in piece]
            for whole, part in zip(parts, piece, strict=True):
                whole.numpy()[at : at + m] = part
        return QuantizedTensor(parts[0], parts[1], k, group, offset=parts[2] if len(parts) == 3 else None)


def _finite(scales: np.ndarray) -> bool:
    """By the bits: the exponent of an infinity or a NaN is all ones. (isfinite of fp16 takes ten times as long.)"""
    bits, ones = (np.uint16, 0x7C00) if scales.dtype == np.float16 else (np.uint32, 0x7F800000)
    return bool((np.bitwise_and(scales.view(bits), ones) != ones).all())


# Unpacking, in numpy: on pieces of this size torch's threads cost more than they bring, and wait for each other where
# other programs run. Fields of raw bytes ("V16") are copied out whole, because numpy is fast on long contiguous arrays
# and slow on many short rows.

_F2 = "<f2"
_BLOCKS = {  # a block, front to back: numbers in fp16, 6-bit scales s, quants q, high bits of quants h
    "Q4_0": np.dtype([("d", _F2), ("q", "V16")]),
    "Q4_1": np.dtype([("d", _F2), ("m", _F2), ("q", "V16")]),
    "Q5_0": np.dtype([("d", _F2), ("h", "V4"), ("q", "V16")]),
    "Q5_1": np.dtype([("d", _F2), ("m", _F2), ("h", "V4"), ("q", "V16")]),
    "Q8_0": np.dtype([("d", _F2), ("q", "V32")]),
    "Q4_K": np.dtype([("d", _F2), ("m", _F2), ("s", "V12"), ("q", "V128")]),
    "Q5_K": np.dtype([("d", _F2), ("m", _F2), ("s", "V12"), ("h", "V32"), ("q", "V128")]),
    "Q6_K": np.dtype([("q", "V128"), ("h", "V64"), ("s", "V16"), ("d", _F2)]),
}


def _bytes(x: np.ndarray, field: str) -> np.ndarray:
    """A field of B blocks, uint8 [B, bytes]."""
    return x[field].copy().view(np.uint8).reshape(len(x), -1)


def _alternate(first: np.ndarray, second: np.ndarray, size: int) -> np.ndarray:
    """size bytes of the first, size of the second, and so on."""
    return np.stack((first.reshape(-1).view(f"V{size}"), second.reshape(-1).view(f"V{size}")), axis=1).view(np.uint8)


def _pairs(q: np.ndarray, half: int) -> np.ndarray:
    """Codes two to a byte, neighbours together, the even one low; from `half` bytes at a time that hold one element in
    their low nibbles and the element `half` places on in their high ones."""
    # Of two bytes, bits 0..3 and 8..11 are neighbours of the first half, 4..7 and 12..15 of the second.
    two = q.reshape(-1).view("<u2")
    first, second = (two & 0x0F) | (two >> 4 & 0xF0), (two >> 4 & 0x0F) | (two >> 8 & 0xF0)
    return _alternate(first.astype(np.uint8), second.astype(np.uint8), half // 2)


def _singles(q: np.ndarray, half: int) -> np.ndarray:
    """The same codes, one to a byte."""
    return _alternate(q & 15, q >> 4, half)


def _fifth_bits(h: np.ndarray) -> np.ndarray:
    """[B, 4] bytes -> [B, 32]: bit i of the little-endian word, as 0 or 16."""
    return np.unpackbits(h, axis=1, bitorder="little") << 4


def _bit_planes(h: np.ndarray, width: int) -> np.ndarray:
    """[..., 32] bytes -> [..., 8 / width, 32]: bits 0.. of every byte, then the next `width` bits, ..., at bit 4."""
    planes = [((h >> at & 2**width - 1) << 4).reshape(-1).view("V32") for at in range(0, 8, width)]
    return np.stack(planes, axis=-1).view(np.uint8)


def _k_scales(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset of Q4_K or Q5_K, fp32 [B, 8].

    Of the 12 bytes s, scale j is s[j] & 63 and minimum j is s[j+4] & 63 for j < 4; for j >= 4 their low four bits are
    the nibbles of s[j+4] and their high two bits the top bits of s[j-4] and s[j].
    """
    s, m, low = np.split(_bytes(x, "s"), 3, axis=1)
    scales = np.concatenate((s & 63, (low & 15) | (s >> 6 << 4)), axis=1)
    minimums = np.concatenate((m & 63, (low >> 4) | (m >> 6 << 4)), axis=1)
    return x["d"].astype(np.float32)[:, None] * scales, -(x["m"].astype(np.float32)[:, None] * minimums)


def _q4(x: np.ndarray) -> np.ndarray:
    return _pairs(_bytes(x, "q"), 16)


def _q5(x: np.ndarray) -> np.ndarray:
    return (_singles(_bytes(x, "q"), 16).reshape(-1, 32) | _fifth_bits(_bytes(x, "h"))).view(np.int8)


def _q5_k(x: np.ndarray) -> np.ndarray:
    low, high = _singles(_bytes(x, "q"), 32), _bit_planes(_bytes(x, "h"), 1)
    return (low.reshape(-1) | high.reshape(-1)).view(np.int8)


def _q6_k(x: np.ndarray) -> np.ndarray:
    low, high = _singles(_bytes(x, "q"), 64), _bit_planes(_bytes(x, "h"), 2)
    return (low.reshape(-1) | high.reshape(-1)).view(np.int8) - np.int8(32)


def _q6_k_scales(x: np.ndarray) -> np.ndarray:
    return x["d"].astype(np.float32)[:, None] * _bytes(x, "s").view(np.int8)


_Unpack = Callable[[np.ndarray], tuple[np.ndarray, ...]]
_UNPACK: dict[str, tuple[int, int, _Unpack]] = {  # type -> elements in a block, group_size, (codes, scale[, offset])
    "Q4_0": (32, 32, lambda x: (_q4(x), x["d"])),
    "Q4_1": (32, 32, lambda x: (_q4(x), x["d"], x["m"])),
    "Q5_0": (32, 32, lambda x: (_q5(x) - np.int8(16), x["d"])),
    "Q5_1": (32, 32, lambda x: (_q5(x), x["d"], x["m"])),
    "Q8_0": (32, 32, lambda x: (_bytes(x, "q").view(np.int8), x["d"])),
    "Q4_K": (256, 32, lambda x: (_pairs(_bytes(x, "q"), 32), *_k_scales(x))),
    "Q5_K": (256, 32, lambda x: (_q5_k(x), *_k_scales(x))),
    "Q6_K": (256, 16, lambda x: (_q6_k(x), _q6_k_scales(x))),
}
