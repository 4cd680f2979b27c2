"""Greedy orders as plain loops: slow on purpose, what `functional` is held against in tests and measurements.

Each step says what the definition says, with no thought for time or memory. Nothing that selects tokens uses this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.pruning.blocks import CosineRows
from llava.pruning.functional import conditional_kernel, stable_rank
from llava.pruning.screening import ROWS

AHEAD = 63  # rows computed beside that of a chosen token


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


@torch.no_grad()
def map_rank_by_rows(
    features: Tensor,
    k: int,
    relevance: Tensor | None,
    member: Tensor | None,
    candidates: Tensor | None,
    epsilon: float,
) -> Tensor:
    """`blocks.map_rank_by_rows` of one view (n, d) -> (n,), every token looked at after every choice.

    The row of a chosen token is computed together with those of the `AHEAD` likeliest next ones.
    """
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
