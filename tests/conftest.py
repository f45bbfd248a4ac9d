"""What every test file shares: the seed, and which tests run again under the other CPU libraries."""

import importlib.util

import pytest
import torch

from pyarch import native
from pyarch.testing import Check

# What cannot be imported here, and why: a GPU machine without a network has pytest and little else.
NEEDS = {"test_io_*.py": ("numpy", "hypothesis"), "test_paged_cache.py": ("hypothesis",)}
MISSING = {files: [name for name in names if importlib.util.find_spec(name) is None] for files, names in NEEDS.items()}
collect_ignore_glob = [files for files, names in MISSING.items() if names]

FORWARD_AND_BOUNDS = ("forward", "operator", "refusal")


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="seed of every test's random inputs; -1 draws one")


def pytest_configure(config):
    seed = config.getoption("--seed")
    config.seed = torch.seed() % 2**32 if seed == -1 else seed


def pytest_report_header(config):
    skipped = [f"not collected: {files}, needs {', '.join(names)}" for files, names in MISSING.items() if names]
    return [f"pyarch: CPU library {native.cpu_isa}, torch {torch.__version__}, --seed {config.seed}", *skipped]


def pytest_collection_modifyitems(items):
    """`-m forward` picks what the CI budget allows on the CPU libraries that are not this machine's best."""
    for item in items:
        check = getattr(item, "callspec", None) and item.callspec.params.get("check")
        if isinstance(check, Check) and check.part in FORWARD_AND_BOUNDS:
            item.add_marker(pytest.mark.forward)


@pytest.fixture(autouse=True)
def _seeded(request):
    torch.manual_seed(request.config.seed)
