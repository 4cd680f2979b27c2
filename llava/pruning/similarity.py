"""Cosine similarities of a view's tokens, as one matrix or by rows: which of the two is decided by their number.

A matrix of all pairs is fastest, and grows with n^2: 64 frames of 169 tokens are n = 10,816 tokens, 468 MB of float32
and as much again for each step that looks at it. From `BY_ROWS_FROM` tokens on no tensor has more than a block of rows
(blocks.py); both give the same tokens, up to rounding among exact duplicates.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from llava.pruning.adaptive import residual_share, residual_share_of_rows
from llava.pruning.blocks import CosineRows, map_rank_by_rows, redundancy_by_blocks
from llava.pruning.functional import cosine_similarity, greedy_map_rank, redundancy_graph

BY_ROWS_FROM = 8192  # tokens, where a matrix of float32 takes 256 MiB


class Similarity(Protocol):
    """What a method asks of S_ij = cos(h_i, h_j)."""

    def redundancy(self, tau: float, gamma: float, graph: str, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Redundancy scores (B, n) of a graph on S, and its share of edges (B,): see `redundancy_graph`."""

    def map_rank(self, keep: int, **options: Any) -> Tensor:
        """Greedy MAP ranks (B, n) of diag(r) S diag(r): see `greedy_map_rank`. S may be used up by it."""

    def residual_share(self, order: Tensor, **options: Any) -> Tensor:
        """What the choices of an order (B, k) leave unexplained (B, k + 1): see `residual_share` of adaptive.py."""


class DenseSimilarity:
    """All pairs at once: features (B, n, d), S (B, n, n).

    Args:
        all_pairs: S is needed whole; without it the graph multiplies only the pairs that it joins.
        after_rank: S is read after `map_rank` as well.
    """

    def __init__(self, features: Tensor, all_pairs: bool, after_rank: bool) -> None:
        self.features, self.after_rank = features, after_rank
        self.matrix = cosine_similarity(features) if all_pairs else None

    def redundancy(self, tau: float, gamma: float, graph: str, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        return redundancy_graph(self.features, tau, gamma, graph=graph, valid=valid, similarity=self.matrix)

    def map_rank(self, keep: int, **options: Any) -> Tensor:
        return greedy_map_rank(self.matrix, keep, overwrite=not self.after_rank, **options)

    def residual_share(self, order: Tensor, **options: Any) -> Tensor:
        return residual_share(self.matrix, order, **options)


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

    def residual_share(self, order: Tensor, **options: Any) -> Tensor:
        cosines = [CosineRows(features) for features in self.features]
        diagonal = torch.stack([of_view.diagonal for of_view in cosines])

        def rows_of(tokens: Tensor) -> Tensor:
            return torch.stack([of_view.rows(own) for of_view, own in zip(cosines, tokens, strict=True)])

        return residual_share_of_rows(rows_of, diagonal, order, **options)


def similarity_of(features: Tensor, all_pairs: bool = True, after_rank: bool = False) -> Similarity:
    """The similarity of features (B, n, d), in the form that suits their number; options of `DenseSimilarity`."""
    if features.shape[1] >= BY_ROWS_FROM:
        return RowSimilarity(features)
    return DenseSimilarity(features, all_pairs, after_rank)
