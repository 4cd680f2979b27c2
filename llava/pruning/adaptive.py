"""How many tokens a view needs: what the kept ones cannot express, and two rules that stop by it.

A greedy DPP over L = diag(r) S diag(r) leaves, after k choices, the residual variances v_i(k): v_i(k) / r_i^2 is the
squared sine of the angle between token i and the span of the chosen ones. Their share of the whole ::

    rho_k = sum over i of v_i(k) / sum over i of r_i^2,   rho_0 = 1

falls with k, to 0 where L's rank is used up. It does not change with the scale of r or of a row. Both rules read this
curve and give the first k of the order that a fixed budget has, whatever their threshold. The curve of any greedy rule
will do that falls from 1 to 0: `uncovered_share` is the one of `coverage_rank`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llava.pruning.auto_budget import FLOOR_ALONE, FLOOR_AMONG_VIEWS, AutoBudget
from llava.pruning.functional import working_dtype

BLOCK = 32  # choices that are projected together on those before them


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

    def rows_of(tokens: Tensor) -> Tensor:
        return similarity.gather(1, tokens[:, :, None].expand(-1, -1, similarity.shape[-1]))

    return residual_share_of_rows(rows_of, similarity.diagonal(dim1=-2, dim2=-1), order, relevance, candidates, stop)


@torch.no_grad()
def residual_share_of_rows(
    rows_of: Callable[[Tensor], Tensor],
    diagonal: Tensor,
    order: Tensor,
    relevance: Tensor | None = None,
    candidates: Tensor | None = None,
    stop: float = 1e-10,
) -> Tensor:
    """`residual_share` from the rows of S alone that belong to chosen tokens, `BLOCK` of them at a time.

    Args:
        rows_of: from tokens (B, q) int64 to their rows of S (B, q, n).
        diagonal: (B, n) of S.
    """
    weight = torch.ones_like(diagonal) if relevance is None else relevance.to(diagonal.dtype)
    if candidates is not None:
        weight = weight * candidates
    views, n = weight.shape
    k = order.shape[1]
    residual = diagonal * weight.square()  # v
    total = residual.sum(-1)
    basis = diagonal.new_empty(views, k, n)
    share = diagonal.new_ones(views, k + 1)
    for start in range(0, k, BLOCK):
        tokens = order[:, start : start + BLOCK]
        rows = rows_of(tokens) * weight[:, None] * weight.gather(1, tokens)[:, :, None]
        if start:
            before = basis[:, :start]
            rows = rows - before.gather(2, tokens[:, None].expand(-1, start, -1)).mT @ before
        for step in range(start, start + tokens.shape[1]):
            token = order[:, step, None]
            within = basis[:, start:step]
            own = within.gather(2, token[:, None].expand(-1, step - start, -1))  # (B, steps of this block, 1)
            row = rows[:, step - start] - (own * within).sum(1)
            variance = residual.gather(1, token)
            row = torch.where(variance > stop, row / variance.clamp_min(stop).sqrt(), 0.0)
            basis[:, step] = row
            residual = (residual - row.square()).clamp_min(0)
            share[:, step + 1] = torch.where(total > 0, residual.sum(-1) / total.clamp_min(stop), 0.0)
    return share


@torch.no_grad()
def uncovered_share(reach: Tensor, order: Tensor, candidates: Tensor | None = None) -> Tensor:
    """The share that is not covered after each choice of an order, as `coverage_rank` counts it.

    A target is covered to the extent of the largest reach of a chosen token, at least 0; what can be covered is what
    all candidates together cover.

    Args:
        reach: (B, n, t) how well each token stands for each of t targets.
        order: (B, k) int64, distinct tokens.
        candidates: (B, n) bool, the tokens that may be chosen; ``None`` means all.

    Returns:
        (B, k + 1), from 1 on, never rising; 0 from the first choice on where nothing can be covered.
    """
    possible = reach if candidates is None else reach.masked_fill(~candidates[:, :, None], 0.0)
    most = possible.amax(1).clamp_min(0).sum(-1, keepdim=True)  # (B, 1)
    chosen = possible.gather(1, order[:, :, None].expand(-1, -1, reach.shape[-1]))
    covered = chosen.cummax(1).values.clamp_min(0).sum(-1)  # (B, k)
    share = torch.where(most > 0, 1 - covered / torch.where(most > 0, most, 1.0), 0.0).clamp_min(0)
    return torch.cat([torch.ones_like(most), share], dim=1)


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


def kept_after(order: Tensor, member: Tensor | None = None) -> Tensor:
    """How many members are among the first k of an order (B, K), k = 0 to K: (B, K + 1) int64.

    Args:
        member: (B, n) bool, the tokens that may be kept; ``None`` means all.
    """
    counted = torch.ones_like(order) if member is None else member.gather(1, order).long()
    return torch.nn.functional.pad(counted.cumsum(-1), (1, 0))


def kept_by_rule(auto: AutoBudget, share: Tensor, kept: Tensor, alone: Tensor) -> Tensor:
    """How many tokens a rule keeps: (B,) int64, between the floor and all that the orders have.

    Args:
        share: (B, K + 1) unexplained after each choice of an order.
        kept: (B, K + 1) `kept_after` of it; the last is the ceiling.
        alone: (B,) bool, views that are all of their picture, which the floor depends on.
    """
    length = share.shape[1] - 1
    most = kept[:, -1]

    def count(floor: int) -> Tensor:
        if auto.gain is None:
            steps = count_at_share(share, auto.coverage, min(floor, length), length)
        else:
            steps = count_at_gain(share, auto.gain, floor, length)
        return kept.gather(1, steps[:, None])[:, 0].clamp_min(floor).minimum(most)

    if auto.floor is not None:
        return count(auto.floor)
    return torch.where(alone, count(FLOOR_ALONE), count(FLOOR_AMONG_VIEWS))
