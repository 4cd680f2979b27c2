"""Ids of questions, which one file writes as numbers and another as text."""

from __future__ import annotations

from typing import Any


def id_key(name: Any) -> str:
    """What two spellings of one id have in common: ``7``, ``7.0`` and ``"7"`` are the same question."""
    if isinstance(name, float) and name.is_integer():
        name = int(name)
    return str(name).strip()
