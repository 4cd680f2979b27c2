"""Attributes that an instance has for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Absent:
    """Stands for an attribute that an instance does not have; a class, so that copies know it again."""


@contextmanager
def replaced(owner: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Give an instance its own attribute for the length of a block; what it had before comes back exactly."""
    before = owner.__dict__.get(name, Absent)  # accelerate keeps a forward of its own there
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if before is Absent:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, before)
