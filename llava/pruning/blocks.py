"""Similarities among very many tokens, as of all frames of a clip, without the matrix of all pairs.

64 frames of 169 tokens are n = 10,816 tokens: 468 MB of float32 for the n x n matrix, and as much again for each step
that looks at it. Here no tensor has more than `ROWS` rows of n, or a row of n for each token that is chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.pruning.functional import (
    cosine_similarity,
    degree_score,
    inner_products,
    inverse_norm,
    stable_rank,
    working_dtype,
)

ROWS = 256  # rows of similarities that are looked at together
AHEAD = 63  # rows computed beside that of a chosen token


def map_rank_by_rows(
    features: Tensor,
    k: int,
    *,
    relevance: Tensor | None = None,
    member: Tensor | None = None,
    candidates: Tensor | None = None,
    epsilon: float = 1e-6,
) -> Tensor:
    """`greedy_map_rank` (B, n) of the cosine similarities of features (B, n, d), rows of them as they are needed.

    The row of a chosen token is computed together with those of the `AHEAD` likeliest next ones, which turns passes
    over all features into one product. Each step leaves a row of n numbers. Exact duplicates may tie up to rounding.
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
    cosines = CosineRows(features)
    weight = torch.ones_like(cosines.diagonal) if relevance is None else relevance.to(cosines.diagonal.dtype)
    variance = cosines.diagonal * weight.square()  # v_i = L_ii
    leftover = cosines.diagonal if relevance is None else weight
    if candidates is not None:
        variance, leftover = (values.masked_fill(~candidates, -torch.inf) for values in (variance, leftover))
    n = len(variance)
    rank = n + stable_rank(leftover[None], descending=True)[0]
    basis: list[Tensor] = []  # blocks (ROWS, n) of e_i, a row for each step so far
    ahead = torch.empty(0, dtype=torch.int64, device=rank.device)  # tokens whose rows are at hand
    rows = variance.new_empty(0, n)  # L_ji - <u_j, u_i> of these tokens j
    placed = 0
    for step in range(n):
        chosen = int(variance.argmax())  # lowest index among equals
        largest = variance[chosen]
        if not largest > epsilon:
            break
        place = (ahead == chosen).nonzero().flatten()
        if not len(place):
            ahead = torch.cat([ahead.new_tensor([chosen]), variance.topk(min(AHEAD, n)).indices])
            rows = cosines.rows(ahead) * weight[ahead, None] * weight
            for block in basis:
                rows -= block[:, ahead].mT @ block
            place = place.new_zeros(1)
        row = rows[place[0]] / (largest + epsilon).sqrt()  # Eq. 11: e_i = (L_ji - <u_j, u_i>) / sqrt(v_j + epsilon)
        if step % ROWS == 0:
            basis.append(row.new_zeros(ROWS, n))
        basis[-1][step % ROWS] = row
        rows.addr_(row[ahead], row, alpha=-1)
        variance -= row.square()
        variance[chosen] = -torch.inf
        rank[chosen] = step
        placed += 1 if member is None else int(member[chosen])
        if placed >= k:
            break
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
    """`redundancy_graph` (B, n), (B,) of the bipartite graph, a block of rows at a time.

    Twice the products, because each side of the graph is the rows once.
    """
    scores = features.new_empty(features.shape[:2], dtype=working_dtype(features.dtype))
    joined = scores.new_zeros(len(scores))
    for own, other in ((0, 1), (1, 0)):
        rows, others = features[:, own::2], features[:, other::2]
        for start in range(0, rows.shape[1], ROWS):
            part = slice(start, start + ROWS)
            block = cosine_similarity(rows[:, part], others)
            pairs = None
            if valid is not None:
                pairs = valid[:, own::2][:, part, None] & valid[:, None, other::2]
            scores[:, own::2][:, part], share = degree_score(block, tau, gamma, pairs, dim=-1)
            if own == 0:
                possible = block[0].numel() if pairs is None else pairs.sum((1, 2))
                joined += share * possible
    even, odd = (features.shape[1] + 1) // 2, features.shape[1] // 2
    possible = even * odd if valid is None else valid[:, 0::2].sum(1) * valid[:, 1::2].sum(1)
    return scores, joined / torch.as_tensor(possible, device=joined.device).clamp_min(1)
