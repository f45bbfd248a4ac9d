"""Configs that were measured on a card: tuned/<card>.json beside this file, which `make gpu PART=tune` writes.

    {"capability": 90,
     "quant_matmul": {"int4 m16 2^24": {"config": {"block_m": 16, ...}, "gain": 1.12, "commit": ..., "date": ...}}}

A kernel file says what calls share a config (key_for) and what they get on a card that has none for them (config_for).
"""

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from pyarch.kernels._common import INTERPRETING

FOLDER = Path(__file__).parent / "tuned"
Config = TypeVar("Config")


def file_name(card: str) -> str:
    return card.lower().replace(" ", "-") + ".json"


def tuned(op: str, key: str, config: type[Config]) -> Config | None:
    """What was measured best for such calls on the current GPU; None where nothing was."""
    entry = _table(_card()).get(op, {}).get(key)
    return None if entry is None else config(**entry["config"])


def shipped(op: str, config: type[Config], arch: int) -> Iterator[tuple[str, Config]]:
    """(key, config) of every card of this compute capability."""
    for path in sorted(FOLDER.glob("*.json")):
        table = json.loads(path.read_text())
        if table["capability"] == arch:
            yield from ((key, config(**entry["config"])) for key, entry in table.get(op, {}).items())


def _card() -> str:
    return "" if INTERPRETING.value or not torch.cuda.is_available() else _name(torch.cuda.current_device())


@functools.cache
def _name(device: int) -> str:
    return torch.cuda.get_device_name(device)


@functools.cache
def _table(card: str) -> Mapping[str, Mapping[str, dict]]:
    path = FOLDER / file_name(card)
    return json.loads(path.read_text()) if path.exists() else {}
