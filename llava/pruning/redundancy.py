"""Three ways to find the least redundant tokens, compared in the first table of Script's paper."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.pruning.base import PruningInputs
from llava.pruning.functional import lowest_ranked, redundancy_scores, stable_rank
from llava.pruning.random import random_scores

ESTIMATORS = ("exhaustive", "bipartite", "random")


def least_redundant(
    features: Tensor, estimator: str, keep: int, tau: float = 0.5, gamma: float = 1.0, seed: int = 0
) -> Tensor:
    """The ``keep`` least redundant tokens of every view: features (B, n, d) -> (B, n) bool.

    Args:
        estimator: "exhaustive" compares every token with all others, "bipartite" with those at positions of the other
            parity, "random" with none: it draws tokens.
        tau, gamma: of the graph, see `redundancy_scores`.
        seed: of the draw.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if estimator == "random":
        scores = random_scores(PruningInputs(features), seed)
    else:
        scores = redundancy_scores(features, tau, gamma, graph=estimator)
    kept = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
    return kept.scatter_(1, lowest_ranked(stable_rank(scores), keep), True)


def compared_pairs(estimator: str, tokens: int) -> int:
    """How many pairs of a view's tokens an estimator looks at."""
    even, odd = (tokens + 1) // 2, tokens // 2
    return {"exhaustive": tokens * (tokens - 1) // 2, "bipartite": even * odd, "random": 0}[estimator]


def intersection_over_union(first: Tensor, second: Tensor) -> Tensor:
    """Agreement of two sets of tokens per view: (B, n) bool twice -> (B,); 1 for two empty sets."""
    union = (first | second).sum(-1)
    return torch.where(union > 0, (first & second).sum(-1) / union.clamp_min(1), 1.0)
