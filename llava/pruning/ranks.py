"""Orders of tokens: by a score, or chosen greedily one by one; conventions as in functional.py."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from llava.pruning import greedy, greedy_numpy, kernels


def stable_rank(scores: Tensor, descending: bool = False) -> Tensor:
    """Rank of every entry along the last axis, 0 first; equal scores in order of index. (B, n) -> (B, n) int64."""
    if kernels.usable(scores):
        return kernels.fused_scores().stable_rank(scores, descending)
    order = scores.argsort(dim=-1, descending=descending, stable=True)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


def lowest_ranked(rank: Tensor, k: int, member: Tensor | None = None) -> Tensor:
    """Ascending indices (B, k) of the k smallest entries of ``rank`` (B, n), those of ``member`` before all others."""
    if member is not None:
        rank = torch.where(member, rank, rank + 2 * rank.shape[-1])
    if kernels.usable(rank):
        return kernels.fused_scores().first_places(stable_rank(rank), k)
    return rank.argsort(dim=-1, stable=True)[:, :k].sort(dim=-1).values


def greedy_map(kernel: Tensor, k: int, epsilon: float = 1e-6, stop: float | None = None) -> Tensor:
    """Greedy maximum a posteriori order of a determinantal point process (Script, Eq. 11; Chen et al. 2018).

    Each step takes the token with the largest conditional variance, v_j = det L_{D+j} / det L_D. When none exceeds
    ``stop`` the kernel's rank is used up and the order goes on by descending diagonal, then index.

    Args:
        kernel: (B, n, n) symmetric positive semi-definite.
        k: length of the order, at most n.
        epsilon: stabiliser inside the root.
        stop: smallest variance that is still selected; ``None`` means ``epsilon``.

    Returns:
        (B, k) int64 token indices in order of selection, distinct.
    """
    if not 1 <= k <= kernel.shape[-1]:
        raise ValueError(f"k must lie between 1 and n = {kernel.shape[-1]}, got {k}")
    return greedy_map_rank(kernel, k, epsilon=epsilon, stop=stop).argsort(dim=-1)[:, :k]


@torch.no_grad()
def greedy_map_rank(
    similarity: Tensor,
    k: int,
    *,
    relevance: Tensor | None = None,
    member: Tensor | None = None,
    candidates: Tensor | None = None,
    epsilon: float = 1e-6,
    stop: float | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Place of every token in the greedy MAP order of L = diag(r) S diag(r), computed until k members are placed.

    The Cholesky recursion keeps, for each token i, the vector u_i of its coefficients on the chosen tokens and its
    remaining variance v_i; L itself is never built. A view's loop ends as soon as k of its chosen tokens belong to
    ``member``, or its rank is used up.

    Args:
        similarity: (B, n, n).
        k: number of members that must be placed.
        relevance: (B, n) r; ``None`` means ones.
        member: (B, n) bool, the tokens that count towards k; ``None`` means all.
        candidates: (B, n) bool, the tokens that may be chosen at all; ``None`` means all.
        epsilon, stop: as in `greedy_map`.
        overwrite: ``similarity`` is not needed any more and may lose its content, which spares a copy on CUDA.

    Returns:
        (B, n) int64, a permutation per view: chosen tokens by step, then the other candidates by descending
        relevance (diagonal of L where none is given) and index, then the tokens that may not be chosen.
    """
    diagonal = similarity.diagonal(dim1=-2, dim2=-1)
    leftover = diagonal if relevance is None else relevance
    variance = diagonal.clone() if relevance is None else diagonal * relevance.square()  # v_i = L_ii
    if candidates is not None:
        variance, leftover = (values.masked_fill(~candidates, -torch.inf) for values in (variance, leftover))
    rank = similarity.shape[-1] + stable_rank(leftover, descending=True)
    stop = epsilon if stop is None else stop
    if kernels.usable(similarity):  # they write into it
        similarity = similarity.contiguous() if overwrite else similarity.clone(memory_format=torch.contiguous_format)
    _loops(similarity).place_by_map(rank, similarity, k, variance, relevance, member, epsilon, stop)
    return stable_rank(rank)


@torch.no_grad()
def max_min_rank(distance: Tensor, k: int, candidates: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Place of every token in the greedy max-min order: each is as far as possible from those before it.

    The first is the token whose nearest other is farthest; every next one has the largest distance to the nearest
    chosen token. An order for k tokens begins with that for fewer.

    Args:
        distance: (B, n, n) symmetric.
        k: number of tokens that must be placed.
        candidates: (B, n) bool, the tokens that may be chosen at all; ``None`` means all.
        weight: (B, n) at least 0, by which a token's distance counts, but for the first choice; ``None``: all alike.

    Returns:
        (B, n) int64, a permutation per view: chosen tokens by step, then other candidates by index, then the rest.
    """
    n = distance.shape[-1]
    itself = torch.eye(n, dtype=torch.bool, device=distance.device)
    blocked = torch.zeros_like(distance[:, 0], dtype=torch.bool) if candidates is None else ~candidates
    score = distance.masked_fill(itself | blocked[:, None, :], torch.inf).amin(-1)  # distance to the nearest other
    rank = n + stable_rank(blocked.int())
    score = score.masked_fill(blocked, -torch.inf)
    if weight is None:
        _loops(distance).place_by_max_min(rank, distance.contiguous(), k, score)
    else:
        greedy.place_by_max_min(rank, distance.contiguous(), k, score, weight)
    return stable_rank(rank)


@torch.no_grad()
def coverage_rank(
    reach: Tensor,
    k: int,
    weight: Tensor | None = None,
    candidates: Tensor | None = None,
    rounding: float = 0.0,
) -> Tensor:
    """Place of every token in the greedy order of coverage: each adds most to what those before it cover.

    A target u is covered by the chosen tokens to the extent c_u = max(0, largest reach to it). The next token is the
    one with the largest w_v x sum over u of max(0, reach_vu - c_u). An order for k tokens begins with that for fewer;
    where everything is covered it goes on by index.

    Args:
        reach: (B, n, t) how well each token stands for each of t targets; finite.
        k: number of tokens that must be placed.
        weight: (B, n) w, at least 0; ``None`` means ones.
        candidates: (B, n) bool, the tokens that may be chosen at all; ``None`` means all.
        rounding: a difference reach_vu - c_u that is not larger counts as none.

    Returns:
        (B, n) int64, as `max_min_rank`.
    """
    blocked = torch.zeros_like(reach[..., 0], dtype=torch.bool) if candidates is None else ~candidates
    rank = reach.shape[1] + stable_rank(blocked.int())
    greedy.place_by_coverage(rank, reach.contiguous(), k, weight, blocked, rounding)
    return stable_rank(rank)


@torch.no_grad()
def unprojected_rank(
    similarity: Tensor, k: int, relevance: Tensor, candidates: Tensor | None = None, epsilon: float = 1e-6
) -> Tensor:
    """Place of every token in the greedy order of L = diag(r) S diag(r) without Eq. 11's projection, k tokens long.

    v_i falls by (L_ij / (sqrt(v_j) + epsilon))^2 after each choice j; once the largest v is no longer positive nothing
    changes any more. What Script's released code does; see script_release.py.

    Args:
        similarity: (B, n, n).
        relevance: (B, n) r.
        candidates: (B, n) bool, the tokens that may be chosen at all; ``None`` means all.

    Returns:
        (B, n) int64, as `max_min_rank`.
    """
    variance = similarity.diagonal(dim1=-2, dim2=-1) * relevance.square()
    blocked = torch.zeros_like(variance, dtype=torch.bool) if candidates is None else ~candidates
    variance.masked_fill_(blocked, -torch.inf)
    rank = variance.shape[1] + stable_rank(blocked.int())
    relevance = relevance.contiguous()
    _loops(similarity).place_unprojected(rank, similarity.contiguous(), k, relevance, variance, epsilon)
    return stable_rank(rank)


def _loops(tensor: Tensor) -> ModuleType:
    """The greedy loops for a tensor's device."""
    if kernels.usable(tensor):
        return kernels.fused_loops()
    return greedy_numpy if tensor.device.type == "cpu" else greedy
