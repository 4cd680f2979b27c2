"""Cosine similarities of a view's tokens, as one matrix or by rows: which of the two is decided by their number.

A matrix of all pairs is fastest, and grows with n^2: 64 frames of 169 tokens are n = 10,816 tokens, 468 MB of float32
and as much again for each step that looks at it. From `BY_ROWS_FROM` tokens on no tensor has more than a block of rows
(blocks.py); both give the same tokens, up to rounding among exact duplicates.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from llava.pruning.blocks import map_rank_by_rows, redundancy_by_blocks
from llava.pruning.functional import cosine_similarity, greedy_map_rank, redundancy_graph

BY_ROWS_FROM = 8192  # tokens, where a matrix of float32 takes 256 MiB


class Similarity(Protocol):
    """What a method asks of S_ij = cos(h_i, h_j)."""

    def redundancy(self, tau: float, gamma: float, graph: str, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Redundancy scores (B, n) of a graph on S, and its share of edges (B,): see `redundancy_graph`."""

    def map_rank(self, keep: int, **options: Any) -> Tensor:
        """Greedy MAP ranks (B, n) of diag(r) S diag(r): see `greedy_map_rank`. Asked for last: S may be used up."""


class DenseSimilarity:
    """All pairs at once: features (B, n, d), S (B, n, n).

    Args:
        all_pairs: S is needed whole; without it the graph multiplies only the pairs that it joins.
    """

    def __init__(self, features: Tensor, all_pairs: bool) -> None:
        self.features = features
        self.matrix = cosine_similarity(features) if all_pairs else None

    def redundancy(self, tau: float, gamma: float, graph: str, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        return redundancy_graph(self.features, tau, gamma, graph=graph, valid=valid, similarity=self.matrix)

    def map_rank(self, keep: int, **options: Any) -> Tensor:
        return greedy_map_rank(self.matrix, keep, overwrite=True, **options)


class RowSimilarity:
    """Blocks of rows as they are needed: features (B, n, d), memory in proportion to n."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def redundancy(self, tau: float, gamma: float, graph: str, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        if graph != "bipartite":
            raise ValueError(
                f"a graph of all pairs of {self.features.shape[1]} tokens takes too much memory: use graph=bipartite, "
                "or scope=view"
            )
        return redundancy_by_blocks(self.features, tau, gamma, valid=valid)

    def map_rank(self, keep: int, **options: Any) -> Tensor:
        return map_rank_by_rows(self.features, keep, **options)


def similarity_of(features: Tensor, all_pairs: bool = True) -> Similarity:
    """The similarity of features (B, n, d), in the form that suits their number."""
    return RowSimilarity(features) if features.shape[1] >= BY_ROWS_FROM else DenseSimilarity(features, all_pairs)
