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


def map_rank_by_rows(
    features: Tensor,
    k: int,
    *,
    relevance: Tensor | None = None,
    member: Tensor | None = None,
    candidates: Tensor | None = None,
    epsilon: float = 1e-6,
) -> Tensor:
    """`greedy_map_rank` (B, n) of the cosine similarities of features (B, n, d), one row of them at each step.

    A step costs n d products for the row of the chosen token, and as many as it has predecessors for each token; it
    leaves one row of n numbers.
    """
    cosines = CosineRows(features)
    variance = cosines.diagonal if relevance is None else cosines.diagonal * relevance.square()  # v_i = L_ii
    leftover = cosines.diagonal if relevance is None else relevance
    if candidates is not None:
        variance, leftover = (values.masked_fill(~candidates, -torch.inf) for values in (variance, leftover))
    views, n = variance.shape
    rank = n + stable_rank(leftover, descending=True)
    placed = torch.zeros(views, dtype=torch.int64, device=rank.device)
    basis: list[Tensor] = []  # blocks of e_i of the steps so far, (B, ROWS, n) each
    for step in range(n):
        chosen = variance.argmax(dim=-1, keepdim=True)  # (B, 1), lowest index among equals
        largest = variance.gather(1, chosen)
        alive = largest > epsilon
        row = cosines.rows(chosen)  # (B, 2, n), the same twice: see `CosineRows.rows`
        if relevance is not None:
            row = row * (relevance * relevance.gather(1, chosen))[:, None]
        for block in basis:  # Eq. 11: e_i = (L_ji - <u_j, u_i>) / sqrt(v_j + epsilon)
            row = row - block.gather(2, chosen[:, None].expand(-1, ROWS, 2)).mT @ block
        row = torch.where(alive, row[:, 0] / (largest.clamp_min(epsilon) + epsilon).sqrt(), 0.0)
        if step % ROWS == 0:
            basis.append(row.new_zeros(views, ROWS, n))
        basis[-1][:, step % ROWS] = row
        variance = (variance - row.square()).scatter(1, chosen, torch.where(alive, -torch.inf, largest))
        rank.scatter_(1, chosen, torch.where(alive, step, rank.gather(1, chosen)))
        placed += (alive if member is None else alive & member.gather(1, chosen)).squeeze(1)
        if step + 1 >= k and bool(((placed >= k) | ~alive.squeeze(1)).all()):
            break
    return stable_rank(rank)


class CosineRows:
    """Cosine similarities (B, n, n) of features (B, n, d), of which only the rows asked for are computed."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        norm = torch.linalg.vector_norm(features, dim=-1, dtype=working_dtype(features.dtype))
        self._inverse_norm = inverse_norm(norm.square())  # (B, n)
        self.diagonal = (self._inverse_norm > 0).to(self._inverse_norm.dtype)  # (B, n), 0 without a direction

    def rows(self, chosen: Tensor) -> Tensor:
        """The row of one token per view, twice: chosen (B, 1) int64 -> (B, 2, n).

        With a single vector BLAS does not treat exact duplicates alike, and they must tie (see `greedy_map_rank`).
        """
        own = self.features.gather(1, chosen[:, :, None].expand(-1, 2, self.features.shape[-1]))
        scale = self._inverse_norm * self._inverse_norm.gather(1, chosen)
        rows = (inner_products(own, self.features) * scale[:, None]).nan_to_num(nan=0.0)
        place = chosen[:, :, None].expand(-1, 2, 1)
        return rows.scatter(2, place, self.diagonal.gather(1, chosen)[:, None].expand(-1, 2, 1))


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
