"""pytest bench --benchmark-only: contests (_contest.py) under the tuned allocator, told to pytest-benchmark."""

from __future__ import annotations

import pytest
import torch

import pyarch
from pyarch import native

TUNED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TUNED] = pyarch.tune_allocator()


class _Clock:
    """A clock that stands still except when told how long something took."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def replay(benchmark, pytestconfig):
    """Tells pytest-benchmark samples that were measured in alternation with others: (group, seconds, extra_info)."""

    def tell(group: str, samples: list[float], extra_info: dict) -> None:
        benchmark.group = group
        benchmark.extra_info.update(extra_info)
        benchmark.extra_info.update(
            cpu_isa=native.cpu_isa, torch=torch.__version__, pyarch=pyarch.__version__,
            allocator="tuned" if pytestconfig.stash[TUNED] else "default",
        )  # fmt: skip
        clock, remaining = _Clock(), iter(samples)
        benchmark._timer = clock

        def advance() -> None:
            clock.now += next(remaining)

        benchmark.pedantic(advance, rounds=len(samples))

    return tell
