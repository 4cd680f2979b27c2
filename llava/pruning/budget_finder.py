"""What the methods share that can find their own budget: a greedy order, and how much its first tokens explain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.adaptive import kept_after, kept_by_rule
from llava.pruning.base import ViewMethod
from llava.pruning.functional import stable_rank
from llava.pruning.inputs import PruningInputs


@dataclass(frozen=True, kw_only=True)
class BudgetFinder(ViewMethod):
    """Mixed in before `Pruner`: ``keep_tokens`` may be a rule.

    The method then orders as many tokens as the rule's ceiling lets it, states what each further one leaves
    unexplained, and the first of this order count as kept. They are those that a count of the same size keeps.
    """

    finds_budget: ClassVar[bool] = True

    @property
    def count_is_exact(self) -> bool:
        return self.auto is None

    def found(
        self, inputs: PruningInputs, rank: Tensor, order: Tensor, share: Tensor, member: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What the rule finds, for the details of `choose`.

        Args:
            rank: (B, n) int64, places in an order.
            order: (B, K) its first tokens, enough of them for the ceiling.
            share: (B, K + 1) unexplained after each of them.
            member: (B, n) bool, tokens of the order that may be kept; ``None`` means all.

        Returns:
            "within_budget" (B, n) bool, the tokens that are kept; "unexplained" and "kept_after" (B, K + 1), and
            "alone" (B,), from which `kept_by_rule` tells what another rule would keep.
        """
        if inputs.valid is not None:
            member = inputs.valid if member is None else inputs.valid & member
        kept = kept_after(order, member)
        alone = alone_in_picture(inputs)
        count = kept_by_rule(self.auto, share, kept, alone)
        place = rank if member is None else stable_rank(torch.where(member, rank, rank + rank.shape[-1]))
        return {"within_budget": place < count[:, None], "unexplained": share, "kept_after": kept, "alone": alone}

    def eligible(self, inputs: PruningInputs, indices: Tensor, details: Mapping[str, Tensor]) -> Tensor | None:
        if self.auto is None:
            return super().eligible(inputs, indices, details)
        return details["within_budget"].gather(1, indices)


def alone_in_picture(inputs: PruningInputs) -> Tensor:
    """(B,) bool, the views that are their picture's only one, or their picture's views joined."""
    if inputs.pictures is None:
        return torch.ones(inputs.views, dtype=torch.bool, device=inputs.features.device)
    return (inputs.pictures[:, None] == inputs.pictures).sum(-1) == 1


def first_of(rank: Tensor, count: int) -> Tensor:
    """The tokens in the first ``count`` places of an order given as ranks: (B, n) -> (B, count) int64, in order."""
    return torch.argsort(rank, dim=-1)[:, :count]
