"""Paired tests between two methods: over the items of a benchmark, or over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

Alternative = Literal["two-sided", "greater"]


@dataclass(frozen=True)
class Comparison:
    """Mean difference (first minus second) over pairs, and the p-values of the paired t-test and of Wilcoxon's test.

    A p-value is None where the test says nothing: all differences equal (t-test), or all zero (Wilcoxon).
    """

    pairs: int
    difference: float
    t_test: float | None
    wilcoxon: float | None

    def __str__(self) -> str:
        p_values = ("undefined" if p is None else f"{p:.3g}" for p in (self.t_test, self.wilcoxon))
        return "{} pairs, difference {:+.4f}, p = {} (t-test), {} (Wilcoxon)".format(
            self.pairs, self.difference, *p_values
        )


def compare(first: Sequence[float], second: Sequence[float], alternative: Alternative = "two-sided") -> Comparison:
    """Paired tests of two equally long lists.

    Args:
        alternative: "greater" is one-sided: that the first is larger.

    Raises:
        ValueError: fewer than two pairs.
        ImportError: scipy is not installed; says how to install it.
    """
    try:
        from scipy.stats import ttest_rel, wilcoxon
    except ImportError as error:
        raise ImportError('paired tests need scipy: pip install "script-llava[eval]"') from error
    if len(first) < 2:
        raise ValueError(f"a paired test needs at least two pairs, got {len(first)}")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    spread = max(differences) - min(differences)
    return Comparison(
        len(differences),
        fmean(differences),
        float(ttest_rel(first, second, alternative=alternative).pvalue) if spread else None,
        float(wilcoxon(first, second, alternative=alternative).pvalue) if any(differences) else None,
    )


def compare_items(
    first: Sequence[Mapping[str, float]],
    second: Sequence[Mapping[str, float]],
    alternative: Alternative = "two-sided",
) -> Comparison:
    """Over the items that all runs of both sides answered; an item's value is its mean over a side's runs (seeds)."""
    names = sorted(set.intersection(*(set(run) for run in (*first, *second))))
    sides = ([fmean(run[name] for run in side) for name in names] for side in (first, second))
    return compare(*sides, alternative)


def compare_seeds(first: Mapping[int, float], second: Mapping[int, float]) -> Comparison:
    """Over the seeds that both sides have."""
    seeds = sorted(first.keys() & second.keys())
    return compare([first[seed] for seed in seeds], [second[seed] for seed in seeds])
