"""Greedy loops on any device: one token of every view a step, in place, with few and small operations a step.

Each loop writes the step at which a token was chosen into ``rank`` (B, n), and leaves the other entries as they are.
On CUDA the kernels of `llava.pruning.kernels` take their place, under the same names, except for `place_by_coverage`,
whose steps are large. Buffers of the loops are made beforehand; what a step writes goes into them. The one exception
is the result (B, n) of ``embedding_bag``, which has no form with ``out``.

A view that is done goes on choosing until all views are: what it chooses then is not written, and no view reads
another's numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def place_by_map(
    rank: Tensor,
    similarity: Tensor,
    k: int,
    variance: Tensor,
    relevance: Tensor | None,
    member: Tensor | None,
    epsilon: float,
    stop: float,
) -> None:
    """The steps of `functional.greedy_map_rank`, into ``rank`` (B, n) int64.

    ``variance`` (B, n) holds v_i = L_ii, and -inf at tokens that may not be chosen; it is overwritten.

    With u_i = r_i w_i, Eq. 11 is w_i = r_j (S_ji - <w_j, w_i>) / sqrt(v_j + epsilon), and v_i falls by (r_i w_i)^2:
    the row of L is never built. <w_j, w_i> for all i is a weighted sum of the rows that earlier steps left.
    ``embedding_bag`` adds them up in the same order for every i, so that exact duplicates tie exactly; a matrix
    product does not promise that, and is two to three times slower at these shapes.
    """
    views, n, _ = similarity.shape
    rows = similarity.reshape(views * n, n)
    weight = None if relevance is None else relevance.to(similarity.dtype).contiguous()
    first_of_view = torch.arange(views, device=rank.device)[:, None] * n
    chosen, largest = rank.new_empty(n, views, 1), similarity.new_empty(n, views, 1)
    place = rank.new_empty(views)  # of the chosen tokens among the B n of all views
    own_weight, scale = similarity.new_empty(views), similarity.new_empty(views, 1)
    row, fall = similarity.new_empty(views, n), similarity.new_empty(views, n)
    basis = _Basis(similarity, min(n, 2 * k + 16))
    # A view of a tensor costs as much as arithmetic on it: those that every step needs are made once.
    place_column, own_column, all_variances = place[:, None], own_weight[:, None], variance.view(-1)
    all_weights = None if weight is None else weight.view(-1)

    next_look = k
    for step in range(n):
        j, v = chosen[step], largest[step]
        torch.max(variance, dim=1, keepdim=True, out=(v, j))  # the lowest index among equals
        torch.add(j, first_of_view, out=place_column)
        torch.index_select(rows, 0, place, out=row)
        if step:
            row.sub_(basis.projection(step, j))
        torch.add(v, epsilon, out=scale).sqrt_()
        if weight is not None:
            torch.index_select(all_weights, 0, place, out=own_weight)
            scale.div_(own_column)
        w = torch.div(row, scale, out=basis.row(step))
        if weight is not None:
            w = torch.mul(w, weight, out=fall)
        variance.addcmul_(w, w, value=-1)
        all_variances.index_fill_(0, place, -torch.inf)
        if step + 1 == min(next_look, n):
            alive = (largest[: step + 1, :, 0] > stop).cumprod(0).bool().mT  # (B, steps); NaN ends a view as well
            order = chosen[: step + 1, :, 0].mT
            counted = alive if member is None else alive & member.gather(1, order)
            missing = int(torch.where(alive[:, -1], k - counted.sum(-1), 0).max())
            if missing <= 0:
                break
            next_look = step + 1 + missing  # no view is done before
    _write_steps(rank, order, alive & (counted.cumsum(-1) - counted.long() < k))  # a view ends with its k-th member


class _Basis:
    """The vectors w of the steps so far (B, steps, n), and what `projection` needs to read them."""

    def __init__(self, similarity: Tensor, capacity: int) -> None:
        self._hold(similarity.new_empty(similarity.shape[0], capacity, similarity.shape[2]))

    def _hold(self, vectors: Tensor) -> None:
        views, capacity, n = vectors.shape
        self.vectors, self.rows, self.by_step = vectors, vectors.view(-1, n), vectors.unbind(1)
        self.numbers = torch.arange(views * capacity, device=vectors.device).view(views, capacity)  # of the rows
        steps = torch.arange(capacity + 1, device=vectors.device)[:, None]
        self.starts = (steps * torch.arange(views, device=vectors.device)).unbind()
        self.read, self.entries = torch.empty_like(self.numbers).view(-1), torch.empty_like(self.numbers).view(-1)
        self.coefficients = vectors.new_empty(views * capacity)

    def row(self, step: int) -> Tensor:
        """Where the vectors (B, n) of a step belong."""
        if step == len(self.by_step):
            views, capacity, n = self.vectors.shape
            more = self.vectors.new_empty(views, min(capacity, n - capacity), n)
            self._hold(torch.cat([self.vectors, more], dim=1))
        return self.by_step[step]

    def projection(self, steps: int, j: Tensor) -> Tensor:
        """<w_j, w_i> over the first ``steps`` steps, for the tokens ``j`` (B, 1) and all i: (B, n).

        Mode 0 of ``embedding_bag`` is a sum; a view's bag are its vectors, weighted by their entries at j.
        """
        views, _, n = self.vectors.shape
        read, entries, coefficients = (
            buffer.narrow(0, 0, views * steps) for buffer in (self.read, self.entries, self.coefficients)
        )
        numbers = read.view(views, steps).copy_(self.numbers.narrow(1, 0, steps))
        torch.add(j, numbers, alpha=n, out=entries.view(views, steps))
        torch.take(self.vectors, entries, out=coefficients)
        return torch.embedding_bag(self.rows, read, self.starts[steps], mode=0, per_sample_weights=coefficients)[0]


def place_by_max_min(rank: Tensor, distance: Tensor, k: int, score: Tensor, weight: Tensor | None = None) -> None:
    """The steps of `functional.max_min_rank`, into ``rank`` (B, n) int64.

    ``score`` (B, n) decides the first choice; -inf at tokens that may not be chosen. ``weight`` (B, n) counts from the
    second on; the kernels have none.
    """
    views, n, _ = distance.shape
    rows = distance.reshape(views * n, n)
    nearest = torch.where(score > -torch.inf, torch.inf, score)  # distance to the nearest chosen token
    first_of_view = torch.arange(views, device=rank.device)[:, None] * n
    chosen, best = rank.new_empty(k, views, 1), distance.new_empty(k, views, 1)
    place, row = rank.new_empty(views), distance.new_empty(views, n)
    for step in range(k):
        torch.max(score, dim=1, keepdim=True, out=(best[step], chosen[step]))  # the lowest index among equals
        torch.add(chosen[step], first_of_view, out=place[:, None])
        torch.minimum(nearest, torch.index_select(rows, 0, place, out=row), out=nearest)
        nearest.view(-1).index_fill_(0, place, -torch.inf)
        score = nearest if weight is None else torch.where(nearest > -torch.inf, weight * nearest, nearest)
    _write_steps(rank, chosen[..., 0].mT, (best[..., 0] > -torch.inf).mT)


def place_by_coverage(
    rank: Tensor, reach: Tensor, k: int, weight: Tensor | None, blocked: Tensor, rounding: float
) -> None:
    """The steps of `functional.coverage_rank`, into ``rank`` (B, n) int64.

    ``blocked`` (B, n) bool is True at tokens that may not be chosen; chosen ones are added to it. A token's gain is a
    sum over its own row, so that equal rows tie exactly.
    """
    views, n, targets = reach.shape
    rows = reach.view(views * n, targets)
    first_of_view = torch.arange(views, device=rank.device)[:, None] * n
    chosen, best = rank.new_empty(k, views, 1), reach.new_empty(k, views, 1)
    place, row = rank.new_empty(views), reach.new_empty(views, targets)
    covered, excess, gain = reach.new_zeros(views, targets), torch.empty_like(reach), reach.new_empty(views, n)
    for step in range(k):
        nn.functional.threshold_(torch.sub(reach, covered[:, None], out=excess), rounding, 0.0)
        torch.sum(excess, dim=-1, out=gain)
        if weight is not None:
            gain.mul_(weight)
        gain.masked_fill_(blocked, -torch.inf)
        torch.max(gain, dim=1, keepdim=True, out=(best[step], chosen[step]))  # the lowest index among equals
        torch.add(chosen[step], first_of_view, out=place[:, None])
        torch.maximum(covered, torch.index_select(rows, 0, place, out=row), out=covered)
        blocked.view(-1).index_fill_(0, place, True)
    _write_steps(rank, chosen[..., 0].mT, (best[..., 0] > -torch.inf).mT)


def place_unprojected(
    rank: Tensor, similarity: Tensor, k: int, relevance: Tensor, variance: Tensor, epsilon: float
) -> None:
    """The steps of `functional.unprojected_rank`, into ``rank`` (B, n) int64; ``variance`` as in `place_by_map`."""
    views, n, _ = similarity.shape
    rows = similarity.reshape(views * n, n)
    first_of_view = torch.arange(views, device=rank.device)[:, None] * n
    chosen, largest = rank.new_empty(k, views, 1), similarity.new_empty(k, views, 1)
    place, row = rank.new_empty(views), similarity.new_empty(views, n)
    for step in range(k):
        v = largest[step]
        torch.max(variance, dim=1, keepdim=True, out=(v, chosen[step]))
        torch.add(chosen[step], first_of_view, out=place[:, None])
        torch.index_select(rows, 0, place, out=row).mul_(relevance)
        own = relevance.view(-1)[place][:, None]
        row.mul_(own * (v > 0) / (v.clamp_min(0).sqrt() + epsilon))
        variance.addcmul_(row, row, value=-1)
        variance.view(-1).index_fill_(0, place, -torch.inf)
    _write_steps(rank, chosen[..., 0].mT, (largest[..., 0] > -torch.inf).mT)


def _write_steps(rank: Tensor, order: Tensor, alive: Tensor) -> None:
    """Write t at token order[:, t] of ``rank`` (B, n), for every step that is ``alive`` (B, steps).

    A view that is used up chooses tokens that it has chosen before: the smallest number stays.
    """
    steps = torch.arange(order.shape[1], device=rank.device)
    rank.scatter_reduce_(1, order, torch.where(alive, steps, 2 * rank.shape[1]), reduce="amin")
