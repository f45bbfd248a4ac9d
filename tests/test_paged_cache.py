"""PagedKVCache against a plain model: lists of tokens."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

import pyarch


class Cache(RuleBasedStateMachine):
    """Every token is a number of its own, written into both caches of each layer; the model keeps them in lists."""

    handles = Bundle("handles")

    @initialize(pages=st.integers(1, 12), page_size=st.integers(1, 5), layers=st.integers(1, 2))
    def start(self, pages, page_size, layers):
        self.cache = pyarch.PagedKVCache(pages, page_size, layers, 1, 2)
        for tensor in (*self.cache.k, *self.cache.v):
            tensor.fill_(torch.nan)
        self.model, self.freed, self.next = {}, [], 0

    @rule(target=handles)
    def allocate(self):
        handle = self.cache.allocate()
        self.model[handle] = []
        return handle

    @rule(target=handles, source=handles)
    def fork(self, source):
        copy = self.cache.fork(source)
        self.model[copy] = list(self.model[source])
        return copy

    @rule(picked=st.lists(handles, max_size=4, unique=True), data=st.data())
    def append(self, picked, data):
        counts = data.draw(st.lists(st.integers(0, 9), min_size=len(picked), max_size=len(picked)))
        before = self.picture(), self.cache.free_pages
        try:
            slots = self.cache.append(picked, counts)
        except pyarch.OutOfPages:
            assert (self.picture(), self.cache.free_pages) == before
            assert sum(counts) > 0
            return
        assert slots.dtype == torch.int64
        assert slots.shape == (sum(counts),)
        tokens = torch.arange(self.next, self.next + sum(counts), dtype=torch.float32)
        self.next += sum(counts)
        for layer in range(len(self.cache.k)):
            rows = torch.stack([tokens + 0.25 * layer, -tokens], -1)[:, None]
            pyarch.kv_append(rows, -rows, self.cache.k[layer], self.cache.v[layer], slots)
        written = iter(tokens.tolist())
        for handle, count in zip(picked, counts, strict=True):
            self.model[handle] += [next(written) for _ in range(count)]

    @rule(handle=consumes(handles))
    def free(self, handle):
        self.cache.free(handle)
        del self.model[handle]
        self.freed.append(handle)

    @rule()
    def refuse_the_freed(self):
        for handle in self.freed[-3:]:
            for call in (self.cache.free, self.cache.fork, lambda h: self.cache.append([h], [1]),
                         lambda h: self.cache.block_table([h]), lambda h: self.cache.seq_lens([h])):  # fmt: skip
                with pytest.raises(ValueError, match=r"^sequences\[0\]: is not a live"):
                    call(handle)

    def picture(self):
        handles = list(self.model)
        return self.cache.block_table(handles).tolist(), self.cache.seq_lens(handles).tolist()

    @invariant()
    def holds_the_tokens(self):
        if not hasattr(self, "model"):
            return
        handles, size = list(self.model), self.cache.page_size
        table, lens = self.cache.block_table(handles), self.cache.seq_lens(handles)
        assert table.dtype == lens.dtype == torch.int32
        assert lens.tolist() == [len(tokens) for tokens in self.model.values()]
        used = set()
        for row, tokens in zip(table, self.model.values(), strict=True):
            pages = row[: -(-len(tokens) // size)]
            assert (row[len(pages) :] == -1).all()
            used.update(pages.tolist())
            for layer in range(len(self.cache.k)):
                held = self.cache.k[layer][pages.long()].reshape(-1, 2)[: len(tokens)]
                assert held[:, 0].tolist() == [t + 0.25 * layer for t in tokens]
                assert torch.equal(self.cache.v[layer][pages.long()].reshape(-1, 2)[: len(tokens)], -held)
        assert self.cache.free_pages == self.cache.k[0].shape[0] - len(used)  # none leaks, none is lost


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_out_of_pages_changes_nothing():
    cache = pyarch.PagedKVCache(3, 2, 1, 1, 4)
    a, b = cache.allocate(), cache.allocate()
    cache.append([a], [3])
    with pytest.raises(pyarch.OutOfPages, match="needs 2 pages and 1 are free"):
        cache.append([a, b], [2, 2])
    assert cache.seq_lens([a, b]).tolist() == [3, 0]
    assert cache.free_pages == 1
    assert cache.append([a, b], [1, 2]).tolist() == [3, 4, 5]


def test_fork_copies_the_last_page_only_when_it_must():
    cache = pyarch.PagedKVCache(4, 4, 1, 1, 4)
    a = cache.allocate()
    cache.append([a], [6])
    b = cache.fork(a)
    assert cache.free_pages == 2
    cache.append([a], [1])  # shared: copied
    assert cache.free_pages == 1
    cache.append([b], [1])  # b is now the only owner: in place
    assert cache.free_pages == 1
    assert cache.block_table([a])[0, 0] == cache.block_table([b])[0, 0]
    cache.free(a)
    cache.free(b)
    assert cache.free_pages == 4


def test_refusals():
    cache = pyarch.PagedKVCache(4, 2, 1, 1, 4)
    s, foreign = cache.allocate(), pyarch.PagedKVCache(4, 2, 1, 1, 4).allocate()
    cache.append([s], [3])
    for call in (cache.free, cache.fork, lambda h: cache.append([s, h], [1, 1])):
        with pytest.raises(ValueError, match=r"^sequences\[\d\]: is not a live"):
            call(foreign)
        with pytest.raises(TypeError, match=r"^sequences\[\d\]: must be what"):
            call(0)
    with pytest.raises(ValueError, match=r"^sequences: one is named twice"):
        cache.append([s, s], [1, 1])
    with pytest.raises(ValueError, match=r"^counts: must be one per sequence"):
        cache.append([s], [1, 1])
    with pytest.raises(ValueError, match=r"^counts\[0\]: must be at least 0"):
        cache.append([s], [-1])
    with pytest.raises(TypeError, match=r"^counts\[0\]: must be an int"):
        cache.append([s], [1.0])
    assert cache.seq_lens([s]).tolist() == [3]
    assert cache.free_pages == 2
    for i, name in enumerate(("num_pages", "page_size", "num_layers", "num_kv_heads", "head_dim")):
        for bad, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
            with pytest.raises(error, match=rf"^{name}:"):
                pyarch.PagedKVCache(*(bad if i == j else 2 for j in range(5)))
    with pytest.raises(ValueError, match=r"^num_pages: must fit"):
        pyarch.PagedKVCache(2**31, 1, 1, 1, 1)
    with pytest.raises(TypeError, match=r"^dtype:"):
        pyarch.PagedKVCache(1, 1, 1, 1, 1, dtype=torch.int32)
