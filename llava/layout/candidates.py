"""Which tokens of a picture compete for which budget: the one place where a method's tokens are counted.

A host knows how many tokens each view of a picture or video has, and turns method and layout into `Candidates`: it
selects for each of them and knows no method's options. Every count is known before the vision tower runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava.pruning import Method


@dataclass(frozen=True)
class Candidates:
    """Tokens of one picture or video that compete with each other for one budget.

    Args:
        views: numbers of the views whose tokens these are, ascending: one view, or all.
        tokens: n, how many there are.
        keep: m, how many of them a method gives, kept and made; n or more is all of them.
        sequence: the separators between the tokens (newlines) compete as well: all that the language model would read.
    """

    views: tuple[int, ...]
    tokens: int
    keep: int
    sequence: bool = False

    @property
    def is_whole(self) -> bool:
        return self.keep >= self.tokens


def candidates_of(
    method: Method, views: Sequence[int], length: int | None = None, eligible: Sequence[int] | None = None
) -> list[Candidates]:
    """The selections that a method makes over one picture, in the order of its views.

    Args:
        views: number of tokens of each view.
        length: of the sequence that the language model would read of the picture, separators among it; by default
            there are none.
        eligible: how many tokens of each view may be chosen; by default all. Only budgets that are dealt over views
            look at it: a view never gives more than it has, so that the picture's count is reached wherever it can
            be. Inside the decoder the budget is what another method would keep of the views.
    """
    total = sum(views)
    everywhere = tuple(range(len(views)))
    keeps_all = all(map(method.keeps_all, views))
    if method.place == "decoder":  # tokens of all views are ranked together
        available = views if eligible is None or keeps_all else eligible
        keep = sum(min(method.count(tokens), most) for tokens, most in zip(views, available, strict=True))
        return [Candidates(everywhere, total, keep, sequence=True)]
    if method.scope == "official":
        length = total if length is None else length
        is_share = isinstance(method.keep_tokens, float)
        keep = method.count(length) if is_share else min(method.keep_tokens * len(views), length)
        return [Candidates(everywhere, length, length if keeps_all else keep, sequence=True)]
    if method.per == "picture":
        budget = method.count(total)
        shares = list(views) if budget >= total else dealt(budget, views if eligible is None else eligible)
    else:
        shares = [method.count(tokens) for tokens in views]
    if method.scope == "global":
        return [Candidates(everywhere, total, min(sum(shares), total))]
    return [Candidates((view,), tokens, shares[view]) for view, tokens in enumerate(views)]


def is_identity(method: Method | None, views: Sequence[int], length: int | None = None) -> bool:
    """Whether a method's budget reaches all tokens of a picture, so that it is read as if nothing were pruned."""
    return method is None or all(one.is_whole for one in candidates_of(method, views, length))


def dealt(budget: int, weights: Sequence[int]) -> list[int]:
    """``budget`` in whole shares proportional to ``weights``, none larger than its weight; the sum is min(both).

    Largest remainders get what rounding down leaves over, the first view among equals.
    """
    total = sum(weights)
    budget = min(budget, total)
    shares = [budget * weight // max(total, 1) for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda view: -(budget * weights[view] % max(total, 1)))
    for view in by_remainder[: budget - sum(shares)]:
        shares[view] += 1
    return shares


def check_together(method: Method, candidates: Sequence[Candidates]) -> None:
    """Raise ValueError if a method compares views of a picture whose selections cannot be made together."""
    sizes = {(one.tokens, one.keep) for one in candidates}
    if method.compares_views and len(sizes) > 1:
        found = ", ".join(f"{keep} of {tokens}" for tokens, keep in sorted(sizes))
        raise ValueError(
            f"pruner '{method.name}' with these options compares the views of a picture, which must have equally many "
            f"tokens and equal budgets; this picture's keep {found}"
        )
