"""Similarities among very many tokens, as of all frames of a clip, without the matrix of all pairs.

64 frames of 169 tokens are n = 10,816 tokens: 468 MB of float32 for the n x n matrix, and as much again for each step
that looks at it. Here no tensor has more than `ROWS` rows of n; a choice leaves a number at each token (screening.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.pruning.edges import edge_sums
from llava.pruning.functional import (
    cosine_similarity,
    inner_products,
    inverse_norm,
    stable_rank,
    working_dtype,
)
from llava.pruning.screening import ROWS, screened_order


@torch.no_grad()
def map_rank_by_rows(
    features: Tensor,
    k: int,
    *,
    relevance: Tensor | None = None,
    member: Tensor | None = None,
    candidates: Tensor | None = None,
    epsilon: float = 1e-6,
) -> Tensor:
    """`greedy_map_rank` (B, n) of the cosine similarities of features (B, n, d), parts of them as they are needed.

    See screening.py, which also keeps a copy of the features that it looks at, in the working dtype.
    """
    views = range(len(features))

    def of_view(values: Tensor | None, view: int) -> Tensor | None:
        return None if values is None else values[view]

    return torch.stack(
        [
            _map_rank_of_view(
                features[view], k, *(of_view(values, view) for values in (relevance, member, candidates)), epsilon
            )
            for view in views
        ]
    )


def _map_rank_of_view(
    features: Tensor,
    k: int,
    relevance: Tensor | None,
    member: Tensor | None,
    candidates: Tensor | None,
    epsilon: float,
) -> Tensor:
    """`map_rank_by_rows` of one view: (n, d) -> (n,)."""
    diagonal = CosineRows(features).diagonal
    weight = torch.ones_like(diagonal) if relevance is None else relevance.to(diagonal.dtype)
    variance = diagonal * weight.square()  # v_i = L_ii
    leftover = diagonal if relevance is None else weight
    if candidates is not None:
        variance, leftover = (values.masked_fill(~candidates, -torch.inf) for values in (variance, leftover))
    rank = len(variance) + stable_rank(leftover[None], descending=True)[0]
    order = torch.tensor(screened_order(features, k, weight, variance, member, epsilon), dtype=torch.int64)
    rank[order.to(rank.device)] = torch.arange(len(order), device=rank.device)
    return stable_rank(rank[None])[0]


class CosineRows:
    """Cosine similarities (n, n) of features (n, d), of which only the rows asked for are computed."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        norm = torch.linalg.vector_norm(features, dim=-1, dtype=working_dtype(features.dtype))
        self._inverse_norm = inverse_norm(norm.square())  # (n,)
        self.diagonal = (self._inverse_norm > 0).to(self._inverse_norm.dtype)  # (n,), 0 without a direction

    def rows(self, tokens: Tensor) -> Tensor:
        """The rows of some tokens: (q,) int64 -> (q, n)."""
        product = inner_products(self.features[tokens][None], self.features[None])[0]
        rows = product * self._inverse_norm[tokens, None] * self._inverse_norm
        return rows.nan_to_num_(nan=0.0).scatter_(1, tokens[:, None], self.diagonal[tokens, None])


def redundancy_by_blocks(
    features: Tensor, tau: float = 0.5, gamma: float = 1.0, *, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`redundancy_graph` (B, n), (B,) of the bipartite graph, a block of rows at a time."""
    rows, others = features[:, 0::2], features[:, 1::2]
    scores = features.new_empty(features.shape[:2], dtype=working_dtype(features.dtype))
    across = None  # of the odd positions, over the blocks so far
    joined = possible = scores.new_zeros(len(scores))
    for start in range(0, rows.shape[1], ROWS):
        part = slice(start, start + ROWS)
        block = cosine_similarity(rows[:, part], others)
        pairs = None if valid is None else valid[:, 0::2][:, part, None] & valid[:, None, 1::2]
        edges = edge_sums(block, tau, pairs, dim=-2)
        across = edges if across is None else across.plus(edges)
        own = edge_sums(block, tau, pairs, dim=-1)
        scores[:, 0::2][:, part] = own.score(tau, gamma)
        joined, possible = joined + own.degree.sum(-1), possible + own.possible.sum(-1)
    scores[:, 1::2] = across.score(tau, gamma)
    return scores, joined / possible.clamp_min(1)
