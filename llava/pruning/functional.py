"""The mathematics that pruning methods share: pure, batched over views, deterministic.

Its names, from where they are computed: products.py (inner products, cosines), token_scores.py (relevance, redundancy,
their scale) and ranks.py (orders by a score, greedy orders).

Conventions. ``B`` views, ``n`` visual tokens each. Half-precision input is computed in float32, float32 and float64
stay what they are. A row that is zero or not finite, or whose squared norm leaves the range of its dtype (norms below
1e-19 or above 1e19 in float32), has no direction: its cosine with everything is zero. Ties go to the lowest index.
``valid`` (B, n) is False where a token takes no part (padding); ``None`` means that every token does.
"""

from __future__ import annotations

from llava.pruning.products import (
    cosine_similarity,
    inner_products,
    inverse_norm,
    self_products,
    without_autocast,
    working_dtype,
)
from llava.pruning.ranks import (
    coverage_rank,
    greedy_map,
    greedy_map_rank,
    lowest_ranked,
    max_min_rank,
    stable_rank,
    unprojected_rank,
)
from llava.pruning.token_scores import (
    conditional_kernel,
    min_max,
    redundancy_graph,
    redundancy_scores,
    relevance_scores,
)

__all__ = [
    "conditional_kernel",
    "cosine_similarity",
    "coverage_rank",
    "greedy_map",
    "greedy_map_rank",
    "inner_products",
    "inverse_norm",
    "lowest_ranked",
    "max_min_rank",
    "min_max",
    "redundancy_graph",
    "redundancy_scores",
    "relevance_scores",
    "self_products",
    "stable_rank",
    "unprojected_rank",
    "without_autocast",
    "working_dtype",
]
