"""QuantizedTensor: a weight matrix of 4-bit or 8-bit codes with a scale per group of columns.

A row of 4-bit codes, two to a byte, the even column in the low nibble; a group is `group_size` columns:

    column   0   1   2   3        bits 7..4  bits 3..0
    byte     [ q1 | q0 ] [ q3 | q2 ] ...     (an odd last column leaves the high nibble 0)

    q       uint8 [N, ceil(K/2)], codes 0..15      or  int8 [N, K], codes -128..127
    scale   [N, G], float32, float16 or bfloat16, G = ceil(K / group_size), 1 for group_size -1 (the whole row)
    zero    [N, G], an integer or a float dtype     w = scale * (q - zero)
    offset  [N, G], a float dtype                   w = scale * q + offset
            neither: zero is 8 for 4-bit codes and 0 for 8-bit ones
    g_idx   [K] int32 in [0, G): the group of each column, where it is not column // group_size (GPTQ's act-order)

The tensors are the canonical form: what a state_dict holds and what every backend reads, on every device. They belong
to the QuantizedTensor once it is made and must not be written to.

`prepack` gives the same weight in the order in which the kernels of its device read it fastest, a PackedTensor: 64 rows
side by side on the CPU, the fragments of matrix instructions on a GPU (orders.py has both).

It has the very same codes and numbers, results on the CPU do not differ in a bit, and `unpack` gives the canonical form
back.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.utils import _pytree

from . import orders
from .allocator import in_huge_pages
from .orders import pack_int4 as pack_int4
from .orders import unpack_int4

_SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)
TENSORS = ("q", "scale", "zero", "offset", "g_idx")  # the fields of both layouts that are tensors


class _Weight:
    """What both layouts of a [out_features, in_features] weight have."""

    _NUMBERS: ClassVar[tuple[str, ...]] = ("in_features", "group_size")
    q: torch.Tensor
    scale: torch.Tensor
    in_features: int
    out_features: int
    group_size: int
    zero: torch.Tensor | None
    offset: torch.Tensor | None
    g_idx: torch.Tensor | None

    @property
    def bits(self) -> int:
        return 4 if self.q.dtype == torch.uint8 else 8

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def groups(self) -> int:
        """Groups in a row: the columns of scale."""
        return 1 if self.group_size == -1 else -(-self.in_features // self.group_size)

    @property
    def _row_bytes(self) -> int:
        """Bytes of a row's codes: the columns of the canonical q."""
        return -(-self.in_features * self.bits // 8)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._tensors() if t is not None)

    def column_groups(self) -> torch.Tensor:
        """int64 [K]: the group of each column."""
        if self.g_idx is not None:
            return self.g_idx.long()
        columns = torch.arange(self.in_features, device=self.device)
        return torch.zeros_like(columns) if self.group_size == -1 else columns // self.group_size

    def _tensors(self) -> list[torch.Tensor | None]:
        return [getattr(self, name) for name in TENSORS]

    def _check(self, q: tuple[int, ...], *panel: int) -> None:
        """That all but q's dtype is as the format says, given q's shape and what follows the groups in scale's."""
        if self.in_features < 0 or tuple(self.q.shape) != q:
            raise ValueError(
                f"in_features: {self.in_features} does not fit q of shape {tuple(self.q.shape)} ({self.bits}-bit codes)"
            )
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size: must be -1 (the whole row) or at least 1, not {self.group_size}")
        if self.zero is not None and self.offset is not None:
            raise ValueError("offset: must be None when zero is given")
        for name, dtypes in (("scale", _SCALE_DTYPES), ("zero", _INTEGERS + _SCALE_DTYPES), ("offset", _SCALE_DTYPES)):
            self._expect(name, dtypes, (q[0], self.groups, *panel))
        self._expect("g_idx", (torch.int32,), (self.in_features,))
        if self.g_idx is not None and self.in_features > 0 and not self.g_idx.is_meta:
            low, high = (int(v) for v in self.g_idx.aminmax())
            if low < 0 or high >= self.groups:
                raise ValueError(f"g_idx: values must be in [0, {self.groups}), not {low} to {high}")

    def _expect(self, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if value.dtype not in dtypes:
            raise TypeError(f"{name}: dtype must be {' or '.join(map(str, dtypes))}, not {value.dtype}")
        if tuple(value.shape) != shape:
            raise ValueError(f"{name}: shape must be {shape}, not {tuple(value.shape)}")
        if value.device != self.q.device:
            raise ValueError(f"{name}: must be on {self.q.device} like q, not {value.device}")

    def __repr__(self) -> str:
        n, k = self.shape
        extra = "".join(f", {f}" for f in ("zero", "offset", "g_idx") if getattr(self, f) is not None)
        kind = f"int{self.bits}, group_size={self.group_size}{extra}, {self.scale.dtype}, {self.device}"
        return f"{type(self).__name__}({n}x{k}, {kind})"


class _HugePages:
    """Memory for weights side by side in pages of 2 MB where the system has them: a model reads all of it for every
    token, and looking up 4 KB pages costs SmolLM2's decode a tenth. A chunk is freed with its last tensor."""

    CHUNK = 32 << 20

    def __init__(self) -> None:
        self.lock, self.left = threading.Lock(), torch.empty(0, dtype=torch.uint8, device="cpu")

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        with self.lock:
            if size > self.left.numel():
                self.left = self._chunk(max(size, self.CHUNK))
            taken, self.left = self.left[:size], self.left[-(-size // 64) * 64 :]
        return taken.view(dtype).view(shape)

    def _chunk(self, size: int) -> torch.Tensor:
        if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
            return torch.empty(size, dtype=torch.uint8, device="cpu")
        # Not torch.empty: of the memory that malloc gives again, small pages are already there, and remain.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return in_huge_pages(torch.frombuffer(memory, dtype=torch.uint8))


_huge_pages = _HugePages()


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor(_Weight):
    """A [out_features, in_features] weight of 4-bit or 8-bit codes; the module's text has the format.

    Raises TypeError or ValueError that names the field for a dtype, device or shape that does not fit.
    """

    q: torch.Tensor
    scale: torch.Tensor
    in_features: int
    group_size: int
    zero: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.q.dtype not in (torch.uint8, torch.int8) or self.q.dim() != 2:
            raise TypeError(f"q: must be uint8 or int8 of 2 dimensions, not {self.q.dtype} {tuple(self.q.shape)}")
        self._check((self.q.shape[0], self._row_bytes))

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return self.q.shape[0]

    @property
    def order(self) -> str:
        return "canonical"

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same weight on another device; dtypes never change."""
        moved = [None if t is None else t.to(device) for t in self._tensors()]
        return _unflatten(QuantizedTensor, moved, (self.in_features, self.group_size))

    def rows(self, index: torch.Tensor) -> QuantizedTensor:
        """The rows index int64 (R) as a weight [R, K]. Raises IndexError for one out of range."""
        picked = [None if t is None else t.index_select(0, index) for t in self._tensors()[:4]]
        return _unflatten(QuantizedTensor, [*picked, self.g_idx], (self.in_features, self.group_size))

    def prepack(self, order: str | None = None) -> PackedTensor:
        """The same weight in the order of its device's kernels, or "panels" (CPU) or "fragments" (CUDA); orders.py has
        the layouts.

        Raises ValueError for an unknown order, and without one for a weight that is neither on a CPU nor on a GPU.
        """
        if order is None:
            of_device = [name for name, each in orders.ORDERS.items() if each.device == self.device.type]
            if not of_device:
                raise ValueError(f"device: must be cpu or cuda, whose kernels read packed orders, not {self.device}")
            order = of_device[0]
        if order not in orders.ORDERS:
            raise ValueError(f"order: must be one of {', '.join(orders.ORDERS)}, not {order!r}")
        chosen = orders.ORDERS[order]

        def keep(t: torch.Tensor) -> torch.Tensor:
            return _huge_pages.empty(t.shape, t.dtype).copy_(t) if t.device.type == "cpu" else t.contiguous()

        grids = [None if t is None else keep(chosen.pack_grid(t)) for t in (self.scale, self.zero, self.offset)]
        q = keep(chosen.pack(self.q, self.in_features))
        return _unflatten(PackedTensor, [q, *grids, self.g_idx], (self.out_features, self.in_features, self.group_size))

    def codes(self) -> torch.Tensor:
        """int8 [N, K]: 0..15 for 4-bit codes, else as stored."""
        if self.bits == 8:
            return self.q
        return unpack_int4(self.q, self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [N, K] as numbers: computed in float32 (float64 if asked for), then rounded to dtype."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        group = self.column_groups()
        q, scale = self.codes().to(wide), self.scale.to(wide)[:, group]
        if self.offset is not None:
            return (scale * q + self.offset.to(wide)[:, group]).to(dtype)
        if self.zero is not None:
            return (scale * (q - self.zero.to(wide)[:, group])).to(dtype)
        return (scale * (q - (8 if self.bits == 4 else 0))).to(dtype)


@dataclass(frozen=True, eq=False, repr=False)
class PackedTensor(_Weight):
    """A [out_features, in_features] weight as `QuantizedTensor.prepack` makes it; the module's text has the layout.

    Raises TypeError or ValueError that names the field for a dtype, device or shape that does not fit.
    """

    _NUMBERS = ("out_features", "in_features", "group_size")
    q: torch.Tensor
    scale: torch.Tensor
    out_features: int
    in_features: int
    group_size: int
    zero: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.q.dtype not in (torch.uint8, torch.int8) or self.q.device.type not in ("cpu", "cuda"):
            raise TypeError(f"q: must be uint8 or int8 on the CPU or a GPU, not {self.q.dtype} on {self.q.device}")
        if self.out_features < 0:
            raise ValueError(f"out_features: must be at least 0, not {self.out_features}")
        self._check(self._order.shape(self.out_features, self.in_features, self.bits), self._order.rows)

    @property
    def _order(self) -> orders.Order:
        return orders.of(self.q)

    @property
    def order(self) -> str:
        """ "panels" or "fragments": the order's name in orders.py."""
        return self._order.name

    def unpack(self) -> QuantizedTensor:
        """The canonical form, bit by bit what was packed."""
        return self.rows(torch.arange(self.out_features, device=self.device))

    def rows(self, index: torch.Tensor) -> QuantizedTensor:
        """The rows index int64 (R) as a weight [R, K]. Raises IndexError for one out of range."""
        index.new_zeros(1).expand(self.out_features).index_select(0, index)  # raises; indexing takes negative ones
        order = self._order
        grids = [None if t is None else order.unpack_grid(t, index) for t in (self.scale, self.zero, self.offset)]
        q = order.unpack(self.q, self.in_features, index)
        return _unflatten(QuantizedTensor, [q, *grids, self.g_idx], (self.in_features, self.group_size))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """As of the canonical form."""
        return self.unpack().dequantize(dtype)


def quantize(weight: torch.Tensor, *, bits: int = 4, group_size: int = 128, symmetric: bool = True) -> QuantizedTensor:
    """Rounds a weight [N, K] to the nearest code, group by group along K (round to nearest, half to even).

    bits        4 or 8
    group_size  columns that share a scale, or -1 for the whole row
    symmetric   scale = max|w| / (2^(bits-1) - 1) and no zero; else the codes span [min(w, 0), max(w, 0)] with an
                integer zero
    The scale has the weight's dtype. Raises TypeError or ValueError naming the argument; weights must be finite.
    """
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.dtype not in _SCALE_DTYPES:
        raise TypeError("weight: must be a float32, float16 or bfloat16 tensor of 2 dimensions")
    if bits not in (4, 8):
        raise ValueError(f"bits: must be 4 or 8, not {bits}")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size: must be -1 (the whole row) or at least 1, not {group_size}")
    if not bool(weight.isfinite().all()):
        raise ValueError("weight: must be finite")
    n, k = weight.shape
    group = k if group_size == -1 else group_size
    groups = 1 if group_size == -1 else -(-k // group_size)
    w = F.pad(weight.detach().float(), (0, groups * group - k)).view(n, groups, group)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        scale = (w.abs().amax(-1) if group else w.new_zeros(n, groups)) / high
    else:
        top, bottom = (w.amax(-1).clamp(min=0), w.amin(-1).clamp(max=0)) if group else (w.new_zeros(n, groups),) * 2
        scale = (top - bottom) / (high - low)
    scale = scale.to(weight.dtype)
    wide = scale.float()
    step = torch.where(wide > 0, wide, 1.0)
    zero = None if symmetric else (low - bottom / step).round().clamp(low, high)
    codes = (w / step[..., None]).round() + (0 if zero is None else zero[..., None])
    codes = codes.clamp(low, high).view(n, groups * group)[:, :k].to(torch.int8)
    if bits == 8:
        return QuantizedTensor(codes, scale, k, group_size, None if zero is None else zero.to(torch.int8))
    zero = None if zero is None else (zero + 8).to(torch.uint8)
    return QuantizedTensor(pack_int4(codes + 8), scale, k, group_size, zero)


def concat(weights: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Weights of one format stacked along N: [N1, K], [N2, K], ... -> [N1 + N2 + ..., K], so that projections of the
    same input are one matmul.

    Raises ValueError unless all have the same K, bits, group_size, dtypes, device and optional fields, and no g_idx
    differs. `same_format` tells beforehand.
    """
    first = weights[0] if weights else None
    if first is None:
        raise ValueError("weights: must not be empty")
    if not all(same_format(first, w) for w in weights[1:]):
        raise ValueError(f"weights: must have one format, not {', '.join(map(repr, weights))}")
    stacked = [
        None if parts[0] is None else torch.cat(parts)
        for parts in zip(*(w._tensors()[:4] for w in weights), strict=True)
    ]
    return _unflatten(QuantizedTensor, [*stacked, first.g_idx], (first.in_features, first.group_size))


def same_format(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether `concat` can stack these two."""
    if (a.in_features, a.group_size) != (b.in_features, b.group_size):
        return False
    formats = ([None if t is None else (t.dtype, t.device) for t in w._tensors()] for w in (a, b))
    if next(formats) != next(formats):
        return False
    return a.g_idx is None or b.g_idx is None or torch.equal(a.g_idx, b.g_idx)


def _flatten(t: _Weight) -> tuple[list, tuple]:
    return t._tensors(), tuple(getattr(t, name) for name in t._NUMBERS)


def _unflatten(kind, tensors, context: tuple):
    # Without __post_init__: torch.compile and vmap put placeholders where the tensors were.
    made = object.__new__(kind)
    for name, value in [*zip(TENSORS, tensors, strict=True), *zip(kind._NUMBERS, context, strict=True)]:
        object.__setattr__(made, name, value)
    return made


for _kind in (QuantizedTensor, PackedTensor):
    _pytree.register_pytree_node(
        _kind, _flatten, partial(_unflatten, _kind), serialized_type_name=f"pyarch.{_kind.__name__}"
    )
