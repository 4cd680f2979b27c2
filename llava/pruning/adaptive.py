"""How many tokens a view needs: what the kept ones cannot express, and two rules that stop by it.

A greedy DPP over L = diag(r) S diag(r) leaves, after k choices, the residual variances v_i(k): v_i(k) / r_i^2 is the
squared sine of the angle between token i and the span of the chosen ones. Their share of the whole ::

    rho_k = sum over i of v_i(k) / sum over i of r_i^2,   rho_0 = 1

falls with k, to 0 where L's rank is used up. It does not change with the scale of r or of a row. Both rules read this
curve and give the first k of the order that a fixed budget has, whatever their threshold. The curve of any greedy rule
will do that falls from 1 to 0, such as the share that `coverage_rank` has not covered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.pruning.functional import working_dtype


@torch.no_grad()
def residual_share(
    similarity: Tensor,
    order: Tensor,
    relevance: Tensor | None = None,
    candidates: Tensor | None = None,
    stop: float = 1e-10,
) -> Tensor:
    """rho after each choice of an order, that of `greedy_map_rank` or any other.

    Args:
        similarity: (B, n, n) S with a unit diagonal, symmetric positive semi-definite.
        order: (B, k) int64, distinct tokens.
        relevance: (B, n) r; ``None`` means ones.
        candidates: (B, n) bool, the tokens that count; ``None`` means all.
        stop: a choice whose own residual variance is not larger explains nothing more.

    Returns:
        (B, k + 1), from 1 on, never rising, in float32 (float64 for float64 similarities).
    """
    similarity = similarity.to(working_dtype(similarity.dtype))
    weight = torch.ones_like(similarity[:, 0]) if relevance is None else relevance.to(similarity.dtype)
    if candidates is not None:
        weight = weight * candidates
    views, n = weight.shape
    k = order.shape[1]
    residual = similarity.diagonal(dim1=-2, dim2=-1) * weight.square()  # v
    total = residual.sum(-1)
    basis = similarity.new_zeros(views, k, n)
    share = similarity.new_ones(views, k + 1)
    for step in range(k):
        token = order[:, step, None]
        row = similarity.gather(1, token[:, :, None].expand(-1, -1, n))[:, 0] * weight * weight.gather(1, token)
        before = basis[:, :step]
        own = before.gather(2, token[:, None].expand(-1, step, -1))  # (B, step, 1)
        row = row - (own * before).sum(1)
        variance = residual.gather(1, token)
        row = torch.where(variance > stop, row / variance.clamp_min(stop).sqrt(), 0.0)
        basis[:, step] = row
        residual = (residual - row.square()).clamp_min(0)
        share[:, step + 1] = torch.where(total > 0, residual.sum(-1) / total.clamp_min(stop), 0.0)
    return share


def count_at_share(share: Tensor, coverage: float, floor: int, ceiling: int) -> Tensor:
    """Rule A, a quality: the first k with rho_k <= 1 - ``coverage``, within floor and ceiling.

    Args:
        share: (B, K + 1) rho_0 to rho_K, K >= ``ceiling``.
        coverage: q between 0 and 1; the count never falls with it.

    Returns:
        (B,) int64; the ceiling where the curve does not come so low.
    """
    reached = share[:, : ceiling + 1] <= 1 - coverage
    return _first(reached, ceiling).clamp(floor, ceiling)


def count_at_gain(share: Tensor, gain: float, floor: int, ceiling: int, window: int = 8) -> Tensor:
    """Rule B, a mean budget: the first k >= max(floor, window) whose last ``window`` choices gain less than ``gain``.

    Args:
        share: (B, K + 1) rho_0 to rho_K, K >= ``ceiling``.
        gain: eta, of a choice; the count never rises with it.

    Returns:
        (B,) int64; the ceiling where every choice up to it gains as much.
    """
    share = share[:, : ceiling + 1]
    little = torch.zeros_like(share, dtype=torch.bool)
    little[:, window:] = (share[:, :-window] - share[:, window:]) / window < gain
    little[:, :floor] = False
    return _first(little, ceiling).clamp(min(floor, ceiling), ceiling)


def _first(holds: Tensor, otherwise: int) -> Tensor:
    """Index of the first True of each row (B, K) -> (B,) int64."""
    return torch.where(holds.any(-1), holds.int().argmax(-1), otherwise)
