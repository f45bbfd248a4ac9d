"""PagedKVCache: who owns which page. Bookkeeping is on the host; kv_append (ops/paged_kv.py) fills the pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..allocator import in_huge_pages
from . import _args


class OutOfPages(RuntimeError):
    """The cache has too few free pages for an append. Nothing was changed; free a sequence, or append less."""


class CacheSequence:
    """A sequence's handle: opaque, valid until it is freed, and only with the cache that made it."""

    __slots__ = ("_length", "_pages")

    def __init__(self) -> None:
        self._length = 0
        self._pages: list[int] = []


class PagedKVCache:
    """Keys and values of many sequences in fixed-size pages; forks share pages until one of them writes.

    k, v: one tensor per layer, (num_pages, page_size, num_kv_heads, head_dim), not initialised; layers_k and layers_v
    are all layers in one, (num_layers, num_pages, page_size, num_kv_heads, head_dim).
    k_scale, v_scale: of an int8 cache, one float32 tensor per layer, (num_pages, page_size, num_kv_heads), whose
    positions lie together for each head; else None per layer. layers_k_scale and layers_v_scale likewise.
    Arguments are counts of at least 1; dtype float32, bfloat16, float16 or int8. Raises TypeError or ValueError naming
    the argument. Not safe for use by several threads at a time.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size), ("num_layers", num_layers),
                            ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):  # fmt: skip
            _count(name, value, 1)
        if num_pages > 2**31 - 1:
            raise ValueError(f"num_pages: must fit block_table's int32, not {num_pages}")
        if dtype not in (*_args.FLOATS, torch.int8):
            raise TypeError(f"dtype: must be {' or '.join(map(str, (*_args.FLOATS, torch.int8)))}, not {dtype}")
        shape = (num_layers, num_pages, page_size, num_kv_heads, head_dim)
        self.layers_k = in_huge_pages(torch.empty(shape, dtype=dtype, device=device))
        self.layers_v = in_huge_pages(torch.empty(shape, dtype=dtype, device=device))
        self.k: tuple[torch.Tensor, ...] = self.layers_k.unbind()
        self.v: tuple[torch.Tensor, ...] = self.layers_v.unbind()
        self.layers_k_scale: torch.Tensor | None = None
        self.layers_v_scale: torch.Tensor | None = None
        self.k_scale: tuple[torch.Tensor | None, ...] = (None,) * num_layers
        self.v_scale: tuple[torch.Tensor | None, ...] = (None,) * num_layers
        if dtype == torch.int8:
            self.layers_k_scale, self.layers_v_scale = (
                in_huge_pages(torch.empty(num_layers, num_pages, num_kv_heads, page_size, device=device)).mT
                for _ in range(2)
            )
            self.k_scale, self.v_scale = self.layers_k_scale.unbind(), self.layers_v_scale.unbind()
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is taken first
        self._owners = [0] * num_pages  # sequences that hold a page
        self._live: set[CacheSequence] = set()

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def allocate(self) -> CacheSequence:
        """A new, empty sequence. It takes no page before its first append."""
        sequence = CacheSequence()
        self._live.add(sequence)
        return sequence

    def append(self, sequences: Sequence[CacheSequence], counts: Sequence[int]) -> torch.Tensor:
        """Reserves counts[i] new tokens at the end of sequences[i]; returns their slots, for kv_append.

        Slots are int64 (sum of counts), sequence by sequence. A last page that a fork shares is copied first.
        Raises OutOfPages where too few are free, ValueError for a bad count or handle or a sequence named twice; then
        nothing is changed.
        """
        held = self._check(sequences)
        if len(set(held)) != len(held):
            raise ValueError("sequences: one is named twice")
        if len(counts) != len(held):
            raise ValueError(f"counts: must be one per sequence ({len(held)}), not {len(counts)}")
        for i, count in enumerate(counts):
            _count(f"counts[{i}]", count, 0)
        needed, shared, leaving = 0, [], dict[int, int]()
        for s, count in zip(held, counts, strict=True):
            needed += -(-(s._length + count) // self.page_size) - len(s._pages)
            last = s._pages[-1] if s._pages else -1
            if count and s._length % self.page_size and self._owners[last] - leaving.get(last, 0) > 1:
                leaving[last] = leaving.get(last, 0) + 1
                shared.append(s)
        needed += len(shared)
        if needed > len(self._free):
            raise OutOfPages(f"append needs {needed} pages and {len(self._free)} are free")
        for s in shared:
            self._own_last_page(s)
        slots: list[int] = []
        for s, count in zip(held, counts, strict=True):
            end = s._length + count
            while len(s._pages) * self.page_size < end:
                s._pages.append(self._take())
            for position in range(s._length, end):
                slots.append(s._pages[position // self.page_size] * self.page_size + position % self.page_size)
            s._length = end
        return torch.tensor(slots, dtype=torch.int64, device=self.layers_k.device)

    def fork(self, sequence: CacheSequence) -> CacheSequence:
        """A new sequence with the same tokens. Pages are shared; the last one is copied when either appends to it."""
        (source,) = self._check([sequence])
        copy = self.allocate()
        copy._length, copy._pages = source._length, list(source._pages)
        for page in copy._pages:
            self._owners[page] += 1
        return copy

    def free(self, sequence: CacheSequence) -> None:
        """Gives the sequence's pages back, those no other sequence shares. The handle is no longer valid."""
        (s,) = self._check([sequence])
        self._live.remove(s)
        for page in reversed(s._pages):
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)
        s._pages, s._length = [], 0

    def block_table(self, sequences: Sequence[CacheSequence]) -> torch.Tensor:
        """int32 (B, most pages of any): the pages of each sequence in order, then -1."""
        held = self._check(sequences)
        width = max((len(s._pages) for s in held), default=0)
        rows = [s._pages + [-1] * (width - len(s._pages)) for s in held]
        return torch.tensor(rows, dtype=torch.int32, device=self.layers_k.device).view(len(held), width)

    def lengths(self, sequences: Sequence[CacheSequence]) -> list[int]:
        """The number of tokens of each sequence."""
        return [s._length for s in self._check(sequences)]

    def seq_lens(self, sequences: Sequence[CacheSequence]) -> torch.Tensor:
        """`lengths` as int32 (B) on the cache's device."""
        return torch.tensor(self.lengths(sequences), dtype=torch.int32, device=self.layers_k.device)

    def _check(self, sequences: Iterable[CacheSequence]) -> list[CacheSequence]:
        held = list(sequences)
        for i, s in enumerate(held):
            if not isinstance(s, CacheSequence):
                raise TypeError(f"sequences[{i}]: must be what allocate() or fork() returned, not {type(s).__name__}")
            if s not in self._live:
                raise ValueError(f"sequences[{i}]: is not a live sequence of this cache (freed, or of another cache)")
        return held

    def _take(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _own_last_page(self, s: CacheSequence) -> None:
        """Copy on write: replaces a shared last page by a copy of its used slots."""
        old, used = s._pages[-1], s._length % self.page_size
        new = self._take()
        for cache in (self.layers_k, self.layers_v, self.layers_k_scale, self.layers_v_scale):
            if cache is not None:
                cache[:, new, :used].copy_(cache[:, old, :used])
        self._owners[old] -= 1
        s._pages[-1] = new


def _count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: must be at least {least}, not {value}")
