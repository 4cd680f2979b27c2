"""Scores of tokens as Triton kernels: one pass over a matrix each, every sum by one program and in one order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # tokens per program
COLUMNS = 256  # numbers of a row that are read at a time
WARPS = 8


def scale_to_cosines(products: Tensor) -> Tensor:
    """Inner products (B, n, n) of rows with each other -> `functional.cosine_similarity`, in place."""
    views, n, _ = products.shape
    squares = products.diagonal(dim1=-2, dim2=-1).clone()  # programs write the diagonal while others still scale by it
    limits = torch.finfo(products.dtype)
    with torch.cuda.device_of(products):
        _scale[(views, triton.cdiv(n, ROWS))](
            products, squares, n, limits.tiny, limits.max, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
        )
    return products


def redundancy_graph(
    similarity: Tensor, tau: float, gamma: float, bipartite: bool, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`functional.redundancy_graph` on cosine similarities (B, n, n), even and odd positions in the same pass."""
    views, n, _ = similarity.shape
    similarity = similarity.contiguous()
    scores = similarity.new_empty(views, n)
    pairs = torch.empty(2, views, n, dtype=torch.int32, device=similarity.device)  # joined, possible
    with torch.cuda.device_of(similarity):
        _degree[(views, triton.cdiv(n, ROWS))](
            similarity, scores, pairs[0], pairs[1], scores if valid is None else valid.contiguous(), n, tau, gamma,
            BIPARTITE=bipartite, MASKED=valid is not None, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    joined, possible = pairs.sum(-1)
    return scores, joined / possible.clamp_min(1)


def stable_rank(scores: Tensor, descending: bool) -> Tensor:
    """`functional.stable_rank`, by counting for every entry those that come before it."""
    views, n = scores.shape
    rank = torch.empty(views, n, dtype=torch.int64, device=scores.device)
    with torch.cuda.device_of(scores):
        _count_before[(views, triton.cdiv(n, ROWS))](
            scores.contiguous(), rank, n, DESCENDING=descending, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
        )
    return rank


def mean_cosine(embeds: Tensor, query_embeds: Tensor, query_mask: Tensor | None, sign: float) -> Tensor:
    """`functional.relevance_scores` with normalised rows."""
    views, n, width = embeds.shape
    dtype = torch.float64 if embeds.dtype == torch.float64 else torch.float32
    scores = torch.empty(views, n, dtype=dtype, device=embeds.device)
    embeds, query_embeds = embeds.contiguous(), query_embeds.contiguous()
    mask = scores if query_mask is None else query_mask.contiguous()
    limits = torch.finfo(dtype)
    with torch.cuda.device_of(embeds):
        _mean_cosine[(views, triton.cdiv(n, ROWS))](
            embeds, query_embeds, mask, scores, n, width, query_embeds.shape[1], int(len(query_embeds) > 1), sign,
            int(query_mask is not None and len(query_mask) > 1), limits.tiny, limits.max,
            MASKED=query_mask is not None, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return scores


def min_max(scores: Tensor, valid: Tensor | None, offset: float) -> Tensor:
    """`functional.min_max` within each view."""
    views, n = scores.shape
    scores = scores.contiguous()
    scaled = torch.empty_like(scores)
    with torch.cuda.device_of(scores):
        _min_max[(views,)](
            scores, scaled, scores if valid is None else valid.contiguous(), n, offset,
            MASKED=valid is not None, ALL=triton.next_power_of_2(n), num_warps=WARPS,
        )  # fmt: skip
    return scaled


def first_places(place: Tensor, k: int) -> Tensor:
    """Ascending indices (B, k) of the entries of ``place`` (B, n), a permutation, that are smaller than k."""
    views, n = place.shape
    indices = torch.empty(views, k, dtype=torch.int64, device=place.device)
    with torch.cuda.device_of(place):
        _compact[(views,)](place, indices, n, k, ALL=triton.next_power_of_2(n), num_warps=WARPS)
    return indices


@triton.jit
def _inverse_norm(square, smallest, largest):
    directed = (square > 0) & (square >= smallest) & (square <= largest)
    return tl.where(directed, 1.0 / tl.sqrt(tl.where(directed, square, 1.0)), 0.0)


@triton.jit
def _scale(products, squares, n, smallest, largest, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    view = tl.program_id(0).to(tl.int64)
    products += view * n * n
    squares += view * n
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    own = _inverse_norm(tl.load(squares + i, mask=i < n, other=0.0), smallest, largest)
    for first in range(0, n, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        other = _inverse_norm(tl.load(squares + j, mask=j < n, other=0.0), smallest, largest)
        place = products + i[:, None].to(tl.int64) * n + j[None, :]
        inside = (i < n)[:, None] & (j < n)[None, :]
        cosine = tl.load(place, mask=inside, other=0.0) * own[:, None] * other[None, :]
        cosine = tl.where(cosine == cosine, cosine, 0.0)  # infinity times zero, at rows without a direction
        cosine = tl.where(i[:, None] == j[None, :], (own > 0)[:, None].to(cosine.dtype), cosine)
        tl.store(place, cosine, mask=inside)


@triton.jit
def _degree(
    similarity, scores, joined, possible, valid, n, tau, gamma,
    BIPARTITE: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(0).to(tl.int64)
    similarity += view * n * n
    valid += view * n
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    degree = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
    pairs = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
    strength = tl.zeros([ROWS, COLUMNS], dtype=similarity.dtype.element_ty)
    total = tl.zeros([ROWS, COLUMNS], dtype=similarity.dtype.element_ty)
    for first in range(0, n, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        neighbour = (i < n)[:, None] & (j < n)[None, :]
        if BIPARTITE:
            neighbour = neighbour & ((i[:, None] + j[None, :]) % 2 == 1)
        else:
            neighbour = neighbour & (i[:, None] != j[None, :])
        if MASKED:
            neighbour = neighbour & (tl.load(valid + i, mask=i < n, other=0) != 0)[:, None]
            neighbour = neighbour & (tl.load(valid + j, mask=j < n, other=0) != 0)[None, :]
        value = tl.load(similarity + i[:, None].to(tl.int64) * n + j[None, :], mask=neighbour, other=0.0)
        edge = neighbour & (value >= tau)
        degree += edge.to(tl.int32)
        pairs += neighbour.to(tl.int32)
        strength += tl.where(edge, value, 0.0)
        total += value
    edges = tl.sum(degree, axis=1)
    others = tl.sum(pairs, axis=1)
    edge_mean = tl.sum(strength, axis=1) / tl.maximum(edges, 1)
    mean = tl.sum(total, axis=1) / tl.maximum(others, 1)
    score = tl.where(edges > 0, edges * tl.exp(gamma * (edge_mean - tau)), mean)
    tl.store(scores + view * n + i, score.to(scores.dtype.element_ty), mask=i < n)
    tl.store(joined + view * n + i, edges, mask=i < n)
    tl.store(possible + view * n + i, others, mask=i < n)


@triton.jit
def _count_before(scores, rank, n, DESCENDING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """As a sort has it: what is not a number is larger than any number, and equal entries stay in order."""
    view = tl.program_id(0).to(tl.int64)
    scores += view * n
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    own = tl.load(scores + i, mask=i < n, other=0)[:, None]
    before = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
    for first in range(0, n, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        other = tl.load(scores + j, mask=j < n, other=0)[None, :]
        own_is_nan, other_is_nan = own != own, other != other
        if DESCENDING:
            precedes = (other > own) | (other_is_nan & (own == own))
        else:
            precedes = (other < own) | (own_is_nan & (other == other))
        equal = (other == own) | (own_is_nan & other_is_nan)
        precedes = precedes | (equal & (j[None, :] < i[:, None]))
        before += (precedes & (j < n)[None, :]).to(tl.int32)
    tl.store(rank + view * n + i, tl.sum(before, axis=1).to(tl.int64), mask=i < n)


@triton.jit(do_not_specialize=["query_batched", "mask_batched"])
def _mean_cosine(
    embeds, queries, mask, scores, n, width, segments, query_batched, sign, mask_batched, smallest, largest,
    MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = scores.dtype.element_ty
    embeds += view * n * width
    queries += view * query_batched * segments * width
    mask += view * mask_batched * segments
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], dtype=dtype)
    weight = tl.zeros([ROWS], dtype=dtype)
    for segment in range(0, segments):
        product = tl.zeros([ROWS, COLUMNS], dtype=dtype)
        square = tl.zeros([ROWS, COLUMNS], dtype=dtype)
        query_square = tl.zeros([COLUMNS], dtype=dtype)
        for first in range(0, width, COLUMNS):
            c = first + tl.arange(0, COLUMNS)
            inside = (i < n)[:, None] & (c < width)[None, :]
            own = tl.load(embeds + i[:, None] * width + c[None, :], mask=inside, other=0.0).to(dtype)
            query = tl.load(queries + segment * width + c, mask=c < width, other=0.0).to(dtype)
            product += own * query[None, :]
            square += own * own
            query_square += query * query
        own_scale = _inverse_norm(tl.sum(square, axis=1), smallest, largest)
        query_scale = _inverse_norm(tl.sum(query_square, axis=0), smallest, largest)
        cosine = tl.sum(product, axis=1) * own_scale * query_scale
        cosine = tl.where(cosine == cosine, cosine, 0.0)
        counts = (tl.load(mask + segment) != 0).to(dtype) if MASKED else 1.0
        total += cosine * counts
        weight += counts
    tl.store(scores + view * n + i, sign * total / tl.maximum(weight, 1.0), mask=i < n)


@triton.jit
def _min_max(scores, scaled, valid, n, offset, MASKED: tl.constexpr, ALL: tl.constexpr):
    view = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, ALL)
    counts = i < n
    value = tl.load(scores + view * n + i, mask=counts, other=0.0)
    if MASKED:
        counts = counts & (tl.load(valid + view * n + i, mask=counts, other=0) != 0)
    lowest = tl.min(tl.where(counts, value, float("inf")), axis=0)
    spread = tl.max(tl.where(counts, value, float("-inf")), axis=0) - lowest
    strange = tl.max((counts & (value != value)).to(tl.int32), axis=0)
    flat = (strange > 0) | ~(spread >= 1e-12)
    result = tl.where(flat, 1.0, (value - lowest + offset) / tl.where(flat, 1.0, spread))
    tl.store(scaled + view * n + i, tl.where(counts, result, 0.0), mask=i < n)


@triton.jit
def _compact(place, indices, n, k, ALL: tl.constexpr):
    view = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, ALL)
    chosen = tl.load(place + view * n + i, mask=i < n, other=k) < k
    position = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(indices + view * k + position, i.to(tl.int64), mask=chosen)
