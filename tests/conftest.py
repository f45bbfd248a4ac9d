"""What every test file shares: the seed, and which tests run again under the other CPU libraries."""

import pytest
import torch

from pyarch import native
from pyarch.testing import Check

FORWARD_AND_BOUNDS = ("forward", "operator", "refusal")


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="seed of every test's random inputs; -1 draws one")


def pytest_configure(config):
    seed = config.getoption("--seed")
    config.seed = torch.seed() % 2**32 if seed == -1 else seed


def pytest_report_header(config):
    return f"pyarch: CPU library {native.cpu_isa}, torch {torch.__version__}, --seed {config.seed}"


def pytest_collection_modifyitems(items):
    """`-m forward` picks what the CI budget allows on the CPU libraries that are not this machine's best."""
    for item in items:
        check = getattr(item, "callspec", None) and item.callspec.params.get("check")
        if isinstance(check, Check) and check.part in FORWARD_AND_BOUNDS:
            item.add_marker(pytest.mark.forward)


@pytest.fixture(autouse=True)
def _seeded(request):
    torch.manual_seed(request.config.seed)
