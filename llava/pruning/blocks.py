"""Similarities among very many tokens, as of all frames of a clip, without the matrix of all pairs.

64 frames of 169 tokens are n = 10,816 tokens: 468 MB of float32 for the n x n matrix, and as much again for each step
that looks at it. Here no tensor has more than `ROWS` rows of n, or a row of n for each token that is chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.pruning.functional import cosine_similarity, degree_score, inner_products, inverse_norm, working_dtype

ROWS = 256  # rows of similarities that are looked at together


class CosineRows:
    """Cosine similarities (B, n, n) of features (B, n, d), of which only the rows asked for are computed.

    Stands for the matrix in `greedy_map_rank`: k chosen tokens cost k n d products instead of n^2 d, and k rows of n
    instead of n.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.shape = torch.Size((*features.shape[:2], features.shape[1]))
        self.device = features.device
        norm = torch.linalg.vector_norm(features, dim=-1, dtype=working_dtype(features.dtype))
        self._inverse_norm = inverse_norm(norm.square())  # (B, n)

    def new_zeros(self, *shape: int) -> Tensor:
        return self._inverse_norm.new_zeros(*shape)

    def diagonal(self, dim1: int = -2, dim2: int = -1) -> Tensor:
        """(B, n): 1, or 0 for a row without a direction."""
        return (self._inverse_norm > 0).to(self._inverse_norm.dtype)

    def rows(self, chosen: Tensor) -> Tensor:
        """Row of one token per view: chosen (B, 1) int64 -> (B, 1, n)."""
        width = self.features.shape[-1]
        # The row twice: with a single vector BLAS does not treat exact duplicates alike (see `greedy_map_rank`).
        own = self.features.gather(1, chosen[:, :, None].expand(-1, 2, width))
        row = inner_products(own, self.features)[:, :1]
        row = row * self._inverse_norm[:, None] * self._inverse_norm.gather(1, chosen)[:, None]
        row = row.nan_to_num(nan=0.0)
        return row.scatter(2, chosen[:, :, None], self.diagonal().gather(1, chosen)[:, :, None])


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
