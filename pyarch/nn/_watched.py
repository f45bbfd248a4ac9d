"""Modules that count changes of their attributes, so that a shortcut can prove cheaply that none has changed."""

from __future__ import annotations

from typing import Any

import torch


class Watched(torch.nn.Module):
    """`Watched.changes` counts the attributes set or deleted in all modules of this kind. Writing to a module's
    dictionaries goes around it."""

    changes = 0

    def __setattr__(self, name: str, value: Any) -> None:
        Watched.changes += 1
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        Watched.changes += 1
        super().__delattr__(name)
