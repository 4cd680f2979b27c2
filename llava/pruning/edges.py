"""Redundancy in a graph of similar tokens (the GSP of Script), from a block of similarities or from several."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EdgeSums:
    """What the redundancy of the tokens on one side of a graph is made of; all (B, n).

    Args:
        degree: number of edges, int64.
        strength: sum of the similarities along them.
        total: sum of all similarities to the other side.
        possible: number of tokens there that count, int64.
    """

    degree: Tensor
    strength: Tensor
    total: Tensor
    possible: Tensor

    def plus(self, others: EdgeSums) -> EdgeSums:
        """With further tokens on the other side."""
        return EdgeSums(
            self.degree + others.degree,
            self.strength + others.strength,
            self.total + others.total,
            self.possible + others.possible,
        )

    def score(self, tau: float, gamma: float) -> Tensor:
        """``d exp(gamma (mu - tau))``, or the mean similarity of a token without an edge: (B, n)."""
        mean_along_edges = self.strength / self.degree.clamp_min(1)
        joined = self.degree * torch.exp(gamma * (mean_along_edges - tau))
        return torch.where(self.degree > 0, joined, self.total / self.possible.clamp_min(1))

    def density(self) -> Tensor:
        """Share of the possible edges that there are: (B,)."""
        return self.degree.sum(-1) / self.possible.sum(-1).clamp_min(1)


def edge_sums(block: Tensor, tau: float, pairs: Tensor | None, dim: int) -> EdgeSums:
    """Summed over ``dim``, -1 or -2, of similarities (B, n, q) of which ``pairs`` (B, n, q) bool count."""
    edges = block >= tau
    if pairs is not None:
        edges = edges & pairs
    degree = edges.sum(dim)
    strength = torch.where(edges, block, 0.0).sum(dim)
    if pairs is None:
        return EdgeSums(degree, strength, block.sum(dim), torch.full_like(degree, block.shape[dim]))
    return EdgeSums(degree, strength, torch.where(pairs, block, 0.0).sum(dim), pairs.sum(dim).expand_as(degree))
