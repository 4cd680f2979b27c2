"""Greedy orders as plain loops: slow on purpose, what `functional` is held against in tests and measurements.

Each step says what the definition says, with no thought for time or memory. Nothing that selects tokens uses this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.pruning.functional import conditional_kernel, stable_rank


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
) -> Tensor:
    """`functional.greedy_map_rank`, arguments and result as there, by Eq. 11 as it is printed."""
    kernel = similarity if relevance is None else conditional_kernel(similarity, relevance)
    views, n, _ = kernel.shape
    every = torch.arange(views, device=kernel.device)
    stop = epsilon if stop is None else stop
    variance = kernel.diagonal(dim1=-2, dim2=-1).clone()
    leftover = variance if relevance is None else relevance
    if candidates is not None:
        variance, leftover = (values.masked_fill(~candidates, -torch.inf) for values in (variance, leftover))
    rank = n + stable_rank(leftover, descending=True)
    basis = kernel.new_zeros(views, n, n)  # (B, step, i): e_i of each step
    placed = torch.zeros_like(every)
    for step in range(n):
        j = variance.argmax(-1)
        v = variance[every, j]
        alive = (v > stop) & (placed < k)
        projection = basis[every, :step, j][:, None] @ basis[:, :step]
        e = (kernel[every, j] - projection[:, 0]) / (v + epsilon).sqrt()[:, None]
        basis[:, step] = torch.where(alive[:, None], e, 0.0)
        variance = variance - basis[:, step].square()
        variance[every, j] = torch.where(alive, -torch.inf, v)
        rank[every, j] = torch.where(alive, step, rank[every, j])
        placed += alive if member is None else alive & member[every, j]
        if not bool(alive.any()):
            break
    return rank.argsort(dim=-1).argsort(dim=-1)


@torch.no_grad()
def max_min_rank(distance: Tensor, k: int, candidates: Tensor | None = None) -> Tensor:
    """`functional.max_min_rank`, arguments and result as there."""
    views, n, _ = distance.shape
    every = torch.arange(views, device=distance.device)
    free = torch.ones(views, n, dtype=torch.bool, device=distance.device) if candidates is None else candidates.clone()
    rank = n + stable_rank((~free).int())
    others = free[:, None, :] & ~torch.eye(n, dtype=torch.bool, device=distance.device)
    score = torch.where(others, distance, torch.inf).amin(-1)
    nearest = torch.full_like(score, torch.inf)
    for step in range(k):
        j = torch.where(free, score, -torch.inf).argmax(-1)
        rank[every, j] = torch.where(free[every, j], step, rank[every, j])
        free[every, j] = False
        nearest = torch.minimum(nearest, distance[every, j])
        score = nearest
    return rank.argsort(dim=-1).argsort(dim=-1)
