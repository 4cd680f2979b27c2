"""Greedy loops on a CPU: as in greedy.py, under the same names, with a step's small operations done by NumPy.

A step works on a few thousand numbers, where calling an operation of torch costs more than its arithmetic. NumPy's
calls cost a fraction of that; tensors lend it their memory. What a step writes goes into buffers made beforehand.
Every sum is taken in the same order for all tokens, so that exact duplicates tie exactly.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

AS_TORCH = np.errstate(divide="ignore", invalid="ignore", over="ignore")  # no warnings: inf and NaN end a view


@AS_TORCH
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
    """As `llava.pruning.greedy.place_by_map`, and by the same formulas."""
    rows, v = _rows(similarity), variance.detach().numpy()
    views, n = v.shape
    r = None if relevance is None else np.ascontiguousarray(relevance.detach().to(similarity.dtype).numpy())
    each, first = np.arange(views), np.arange(views) * n
    order, largest = np.empty((n, views), dtype=np.int64), np.empty((n, views), dtype=v.dtype)
    row, projection, fall = np.empty_like(v), np.empty_like(v), np.empty_like(v)
    basis = np.empty((views, min(n, 2 * k + 16), n), dtype=v.dtype)  # w of the steps so far

    next_look = k
    for step in range(n):
        j = v.argmax(1, out=order[step])  # the lowest index among equals
        place = j + first
        v.take(place, out=largest[step], mode="clip")
        rows.take(place, axis=0, out=row, mode="clip")
        if step == basis.shape[1]:
            more = np.empty((views, min(step, n - step), n), dtype=v.dtype)
            basis = np.concatenate([basis, more], axis=1)
        if step:
            done = basis[:, :step]
            row -= np.einsum("bs,bsn->bn", done[each, :, j], done, out=projection)
        scale = np.sqrt(largest[step] + epsilon, dtype=v.dtype)
        if r is not None:
            scale /= r.take(place)
        w = np.divide(row, scale[:, None], out=basis[:, step])
        np.square(w if r is None else np.multiply(w, r, out=fall), out=fall)
        v -= fall
        v.put(place, -np.inf)
        if step + 1 == min(next_look, n):
            alive = np.logical_and.accumulate(largest[: step + 1] > stop).T  # (B, steps); NaN ends a view as well
            members = alive if member is None else alive & member.numpy()[each[:, None], order[: step + 1].T]
            missing = int(np.where(alive[:, -1], k - members.sum(1), 0).max())
            if missing <= 0:
                break
            next_look = step + 1 + missing  # no view is done before
    _write_steps(rank, order[: step + 1], alive & (members.cumsum(1) - members < k))  # up to a view's k-th member


@AS_TORCH
def place_by_max_min(rank: Tensor, distance: Tensor, k: int, score: Tensor) -> None:
    """As `llava.pruning.greedy.place_by_max_min`, without weights."""
    rows, decides = _rows(distance), score.detach().numpy()
    views, n = decides.shape
    nearest = np.where(decides > -np.inf, np.inf, decides).astype(decides.dtype)
    first = np.arange(views) * n
    order, best = np.empty((k, views), dtype=np.int64), np.empty((k, views), dtype=decides.dtype)
    row = np.empty_like(nearest)
    for step in range(k):
        place = decides.argmax(1, out=order[step]) + first  # the lowest index among equals
        decides.take(place, out=best[step], mode="clip")
        np.minimum(nearest, rows.take(place, axis=0, out=row, mode="clip"), out=nearest)
        nearest.put(place, -np.inf)
        decides = nearest
    _write_steps(rank, order, (best > -np.inf).T)


@AS_TORCH
def place_unprojected(
    rank: Tensor, similarity: Tensor, k: int, relevance: Tensor, variance: Tensor, epsilon: float
) -> None:
    """As `llava.pruning.greedy.place_unprojected`."""
    rows, v, r = _rows(similarity), variance.detach().numpy(), relevance.detach().numpy()
    views, n = v.shape
    first = np.arange(views) * n
    order, largest = np.empty((k, views), dtype=np.int64), np.empty((k, views), dtype=v.dtype)
    row = np.empty_like(v)
    for step in range(k):
        place = v.argmax(1, out=order[step]) + first
        own = v.take(place, out=largest[step], mode="clip")
        rows.take(place, axis=0, out=row, mode="clip")
        row *= r
        row *= (r.take(place) * (own > 0) / (np.sqrt(own.clip(min=0)) + v.dtype.type(epsilon)))[:, None]
        v -= np.square(row, out=row)
        v.put(place, -np.inf)
    _write_steps(rank, order, (largest > -np.inf).T)


def _rows(matrix: Tensor) -> np.ndarray:
    """(B, n, n) as (B n, n)."""
    return matrix.detach().reshape(-1, matrix.shape[-1]).numpy()


def _write_steps(rank: Tensor, order: np.ndarray, alive: np.ndarray) -> None:
    """Write t at token order[t] of ``rank`` (B, n), for every step that is ``alive`` (B, steps).

    A view that is used up chooses tokens that it has chosen before: the smallest number stays.
    """
    steps = np.broadcast_to(np.arange(len(order)), alive.shape)
    places = rank.numpy()
    views = np.broadcast_to(np.arange(len(places))[:, None], alive.shape)
    np.minimum.at(places, (views[alive], order.T[alive]), steps[alive])
