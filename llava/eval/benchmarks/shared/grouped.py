"""Means over groups of scored rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence


def mean(values: Iterable[float]) -> float:
    """The mean; 0 of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def grouped(rows: Sequence[dict], scores: Sequence[float], column: str) -> dict[str, float]:
    """The mean score of the rows that are equal in a column, by its value."""
    groups = defaultdict(list)
    for row, score in zip(rows, scores, strict=True):
        groups[row[column]].append(score)
    return {name: mean(values) for name, values in groups.items()}
