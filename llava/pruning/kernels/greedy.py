"""Greedy loops as Triton kernels: one launch for all views up to 1,024 tokens each, one launch a step beyond.

Same arguments and results as the loops of `llava.pruning.greedy`, with two differences. Nothing waits for the GPU:
where the data decide when to stop, a kernel decides. And the vectors w that a MAP step leaves are written over the row
of the similarity that the step has just read, which no later step reads: the loop needs no memory of its own, and the
similarity is lost.

One program holds a view's variances in registers and runs the loop to its end. Its step costs the latency of a few
dependent reads, and the reading of all earlier vectors by one processor of the GPU; the latter grows with steps x n,
which is why longer views get a launch a step that all processors share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE_LAUNCH = 1024  # the longest view that one program works through
TILE = 16384  # numbers of earlier vectors that a program reads at a time
STEP_BLOCK = 128  # tokens per program where a step is a launch


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
    """As `llava.pruning.greedy.place_by_map`; ``similarity`` (B, n, n), contiguous, is overwritten."""
    _run("map", rank, similarity, variance, k, relevance, member, epsilon, stop)


def place_by_max_min(rank: Tensor, distance: Tensor, k: int, score: Tensor) -> None:
    """As `llava.pruning.greedy.place_by_max_min`."""
    _run("max_min", rank, distance, score, k, None, None, 0.0, -torch.inf)


def place_unprojected(
    rank: Tensor, similarity: Tensor, k: int, relevance: Tensor, variance: Tensor, epsilon: float
) -> None:
    """As `llava.pruning.greedy.place_unprojected`."""
    _run("unprojected", rank, similarity, variance, k, relevance, None, epsilon, -torch.inf)


def _run(
    rule: str,
    rank: Tensor,
    matrix: Tensor,
    values: Tensor,
    k: int,
    relevance: Tensor | None,
    member: Tensor | None,
    epsilon: float,
    stop: float,
) -> None:
    """Choose by the largest of ``values`` (B, n), step by step, and write the steps into ``rank`` (B, n)."""
    views, n, _ = matrix.shape
    order = torch.empty(views, n, dtype=torch.int32, device=rank.device)
    # Arguments that a rule does not read still have to be tensors.
    weight = values if relevance is None else relevance.to(matrix.dtype).contiguous()
    counted = order if member is None else member.contiguous()
    whole = triton.next_power_of_2(n)
    options = {
        "RULE": rule,
        "WEIGHTED": relevance is not None,
        "COUNTED": member is not None,
        "ALL": whole,
        "num_warps": min(max(whole // 64, 4), 16),
        "enable_fp_fusion": True,  # whatever the version's default: duplicates are computed alike either way
    }
    if n <= ONE_LAUNCH:
        with torch.cuda.device_of(matrix):
            _loop[(views,)](
                rank, matrix, values, weight, counted, order, n, k, epsilon, stop,
                CHUNK=min(TILE // whole, 16), **options,
            )  # fmt: skip
        return
    here, there = values, torch.empty_like(values)
    placed_here, placed_there = (torch.zeros(views, dtype=torch.int32, device=rank.device) for _ in range(2))
    grid = (views, triton.cdiv(n, STEP_BLOCK))
    for step in range(k if member is None else n):  # views that are done return at once
        with torch.cuda.device_of(matrix):
            _step[grid](
                rank, matrix, here, there, placed_here, placed_there, weight, counted, order,
                step, n, k, epsilon, stop, BLOCK=STEP_BLOCK, CHUNK=TILE // STEP_BLOCK, **options,
            )  # fmt: skip
        here, there, placed_here, placed_there = there, here, placed_there, placed_here


@triton.jit
def _largest(values, RULE: tl.constexpr):
    """The largest value and its lowest index. A variance that is not a number comes first and ends the view."""
    worst = float("inf") if RULE == "map" else float("-inf")
    comparable = tl.where(values == values, values, worst)
    return tl.max(comparable, axis=0, return_indices=True, return_indices_tie_break_left=True)


@triton.jit
def _is_alive(best, stop, RULE: tl.constexpr):
    alive = best > stop
    if RULE == "map":
        alive = alive & (best < float("inf"))
    return alive


@triton.jit
def _projection(matrix, order, steps, j, token, inside, n, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """<w_j, w_i> over the steps so far for some tokens i; every i is summed in the same order."""
    total = tl.zeros([CHUNK, BLOCK], dtype=matrix.dtype.element_ty)
    for first in range(0, steps, CHUNK):
        t = first + tl.arange(0, CHUNK)
        known = t < steps
        start = tl.load(order + t, mask=known, other=0).to(tl.int64) * n
        coefficient = tl.load(matrix + start + j, mask=known, other=0.0)
        w = tl.load(matrix + start[:, None] + token[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        total += coefficient[:, None] * w
    return tl.sum(total, axis=0)


@triton.jit
def _update(values, row, best, own, weight, step, epsilon, RULE: tl.constexpr, WEIGHTED: tl.constexpr):
    """What is left of the values once a token with the row ``row`` is chosen, and its vector w."""
    if RULE == "max_min":
        w = row
        left = tl.minimum(tl.where((step > 0) | (values == float("-inf")), values, float("inf")), row)
    else:
        scale = tl.sqrt(best + epsilon) if RULE == "map" else tl.sqrt(tl.maximum(best, 0.0)) + epsilon
        w = row / scale
        if WEIGHTED:
            w = w * own
        if RULE == "unprojected":
            w = tl.where(best > 0, w, 0.0)
        fall = w * weight if WEIGHTED else w
        left = values - fall * fall
    return left, w


@triton.jit
def _loop(
    rank, matrix, values_in, weight_in, counted, order, n, k, epsilon, stop,
    RULE: tl.constexpr, WEIGHTED: tl.constexpr, COUNTED: tl.constexpr, ALL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The whole loop of one view."""
    view = tl.program_id(0).to(tl.int64)
    rank += view * n
    order += view * n
    matrix += view * n * n
    values_in += view * n
    weight_in += view * n
    counted += view * n
    token = tl.arange(0, ALL)
    inside = token < n
    values = tl.load(values_in + token, mask=inside, other=float("-inf"))
    weight = tl.load(weight_in + token, mask=inside, other=0.0) if WEIGHTED else values
    placed = tl.full([], 0, tl.int32)
    step = tl.full([], 0, tl.int32)
    best, j = _largest(values, RULE)
    alive = _is_alive(best, stop, RULE)
    while alive & (placed < k):
        tl.store(rank + j, step.to(tl.int64))
        row = tl.load(matrix + j.to(tl.int64) * n + token, mask=inside, other=0.0)
        own = tl.load(weight_in + j) if WEIGHTED else best
        placed += tl.load(counted + j).to(tl.int32) if COUNTED else 1
        if RULE == "map":
            row -= _projection(matrix, order, step, j, token, inside, n, ALL, CHUNK)
        values, w = _update(values, row, best, own, weight, step, epsilon, RULE, WEIGHTED)
        values = tl.where(token == j, float("-inf"), values)
        if RULE == "map":
            tl.store(matrix + j.to(tl.int64) * n + token, w, mask=inside)
            tl.store(order + step, j)
            tl.debug_barrier()  # other threads of the program read both in the next step
        step += 1
        best, j = _largest(values, RULE)
        alive = _is_alive(best, stop, RULE)


@triton.jit(do_not_specialize=["step"])
def _step(
    rank, matrix, values_in, values_out, placed_in, placed_out, weight_in, counted, order,
    step, n, k, epsilon, stop,
    RULE: tl.constexpr, WEIGHTED: tl.constexpr, COUNTED: tl.constexpr, ALL: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One step for some tokens of a view. Every program finds the chosen token by itself; the first notes it."""
    view = tl.program_id(0).to(tl.int64)
    notes = tl.program_id(1) == 0
    rank += view * n
    order += view * n
    matrix += view * n * n
    values_in += view * n
    values_out += view * n
    weight_in += view * n
    counted += view * n
    placed = tl.load(placed_in + view)
    if placed < k:
        everyone = tl.arange(0, ALL)
        best, j = _largest(tl.load(values_in + everyone, mask=everyone < n, other=float("-inf")), RULE)
        if _is_alive(best, stop, RULE):
            token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            inside = token < n
            values = tl.load(values_in + token, mask=inside, other=float("-inf"))
            weight = tl.load(weight_in + token, mask=inside, other=0.0) if WEIGHTED else values
            row = tl.load(matrix + j.to(tl.int64) * n + token, mask=inside, other=0.0)
            own = tl.load(weight_in + j) if WEIGHTED else best
            if RULE == "map":
                row -= _projection(matrix, order, step, j, token, inside, n, BLOCK, CHUNK)
            values, w = _update(values, row, best, own, weight, step, epsilon, RULE, WEIGHTED)
            values = tl.where(token == j, float("-inf"), values)
            tl.store(values_out + token, values, mask=inside)
            if RULE == "map":
                tl.store(matrix + j.to(tl.int64) * n + token, w, mask=inside)
            if notes:
                tl.store(rank + j, step.to(tl.int64))
                tl.store(order + step, j)
                placed += tl.load(counted + j).to(tl.int32) if COUNTED else 1
        else:
            placed = k  # the rank is used up
    if notes:
        tl.store(placed_out + view, placed)
