"""The mathematics that pruning methods share: pure, batched over views, deterministic.

Conventions. ``B`` views, ``n`` visual tokens each. Half-precision input is computed in float32, float32 and float64
stay what they are. A row that is zero or not finite, or whose squared norm leaves the range of its dtype (norms below
1e-19 or above 1e19 in float32), has no direction: its cosine with everything is zero. Ties go to the lowest index.
``valid`` (B, n) is False where a token takes no part (padding); ``None`` means that every token does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType

import torch
from torch import Tensor

from llava.pruning import greedy, greedy_numpy, kernels
from llava.pruning.edges import edge_sums

COLUMN_BLOCK = 512  # columns of half-precision features that are widened at a time
STRIPS = 6  # of a symmetric product; more of them hardly save any more work
STRIP_ROWS = 56  # of a strip at least: BLAS multiplies thin matrices slowly, and the thinnest in another order


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return dtype if dtype == torch.float64 else torch.float32


@contextmanager
def without_autocast() -> Iterator[None]:
    """Products in the dtypes of their factors, also where the caller works under `torch.autocast`."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def cosine_similarity(rows: Tensor, others: Tensor | None = None) -> Tensor:
    """Cosine of every row with every other row.

    The product is scaled, not the rows: a unit copy of all features would outweigh the similarity itself.

    Args:
        rows: (B, n, d), any floating dtype.
        others: (B or 1, q, d); ``None`` compares ``rows`` with itself.

    Returns:
        (B, n, q) float32 (float64 for float64 input). Compared with itself the diagonal is exactly 1, or 0 for a
        row without a direction.
    """
    if others is None:
        similarity = self_products(rows)
        if kernels.usable(similarity):
            return _fused().scale_to_cosines(similarity)
        scale = inverse_norm(similarity.diagonal(dim1=-2, dim2=-1))
        similarity.mul_(scale[:, :, None]).mul_(scale[:, None, :])
        similarity.diagonal(dim1=-2, dim2=-1).copy_(scale > 0)
    else:
        others = others.expand(rows.shape[0], -1, -1)
        similarity = inner_products(rows, others)
        for side, view in ((rows, similarity), (others, similarity.mT)):
            norm = torch.linalg.vector_norm(side, dim=-1, dtype=similarity.dtype)
            view.mul_(inverse_norm(norm.square())[:, :, None])
    return similarity.nan_to_num_(nan=0.0)  # infinity times zero, at rows without a direction


def inner_products(rows: Tensor, others: Tensor) -> Tensor:
    """(B, n, d) and (B, q, d) -> (B, n, q); half precision is multiplied and summed in float32."""
    dtype = working_dtype(rows.dtype)
    if rows.dtype == others.dtype == dtype:
        return rows @ others.mT
    if kernels.multiplies_half_precision(rows, others):
        return torch.bmm(rows, others.mT, out_dtype=dtype)
    product = rows.new_zeros(rows.shape[0], rows.shape[1], others.shape[1], dtype=dtype)
    for left, right in zip(rows.split(COLUMN_BLOCK, -1), others.split(COLUMN_BLOCK, -1), strict=True):
        product.baddbmm_(left.to(dtype), right.to(dtype).mT)
    return product


def self_products(rows: Tensor) -> Tensor:
    """Inner products of rows (B, n, d) with each other: (B, n, n), on a CPU little more than half of them multiplied.

    Strips of rows times the rows from there on, mirrored: 7/12 of the products with six strips. A strip is multiplied
    as the whole would be, number by number in the same order, so that equal rows still have equal products. In float64
    BLAS does not promise that even of the whole, which then stays whole.
    """
    n, dtype = rows.shape[1], working_dtype(rows.dtype)
    strips = min(n // STRIP_ROWS, STRIPS)
    if strips < 2 or rows.device.type != "cpu" or dtype == torch.float64:
        return inner_products(rows, rows)
    parts = [slice(number * n // strips, (number + 1) * n // strips) for number in range(strips)]
    if rows.dtype == dtype:
        products: Iterable[Tensor] = (rows[:, part] @ rows[:, part.start :].mT for part in parts)
    else:
        products = [rows.new_zeros(len(rows), part.stop - part.start, n - part.start, dtype=dtype) for part in parts]
        for block in rows.split(COLUMN_BLOCK, -1):
            wide = block.to(dtype)
            for strip, part in zip(products, parts, strict=True):
                strip.baddbmm_(wide[:, part], wide[:, part.start :].mT)
    product = rows.new_empty(rows.shape[0], n, n, dtype=dtype)
    for strip, part in zip(products, parts, strict=True):
        product[:, part, part.start :] = strip
        product[:, part.stop :, part] = strip[:, :, part.stop - part.start :].mT
    return product


def inverse_norm(square: Tensor) -> Tensor:
    """1 / norm from squared norms; 0 for rows without a direction."""
    limits = torch.finfo(square.dtype)
    directed = (square >= limits.tiny) & (square <= limits.max)
    return torch.where(directed, square, 1.0).rsqrt() * directed


def min_max(scores: Tensor, valid: Tensor | None = None, groups: Tensor | None = None, offset: float = 0.0) -> Tensor:
    """Scale each view's scores (B, n) to [0, 1] over its valid tokens; a view without spread becomes all ones.

    Invalid tokens come out as 0. The spread counts as none below 1e-12.

    Args:
        groups: (B,) int64; views with the same number share their minimum and maximum.
        offset: added to the numerator.
    """
    scores = scores.to(working_dtype(scores.dtype))
    if groups is None and kernels.usable(scores):
        return _fused().min_max(scores, valid, offset)
    lowest, highest = scores, scores
    if valid is not None:
        lowest = scores.masked_fill(~valid, torch.inf)
        highest = scores.masked_fill(~valid, -torch.inf)
    lowest, highest = lowest.amin(-1, keepdim=True), highest.amax(-1, keepdim=True)
    if groups is not None:
        apart = groups[:, None] != groups  # (B, B)
        lowest = lowest.mT.masked_fill(apart, torch.inf).amin(-1, keepdim=True)
        highest = highest.mT.masked_fill(apart, -torch.inf).amax(-1, keepdim=True)
    spread = highest - lowest
    flat = ~(spread >= 1e-12)  # written so that NaN counts as flat
    scaled = torch.where(flat, 1.0, (scores - lowest + offset) / spread.masked_fill(flat, 1.0))
    return scaled if valid is None else scaled.masked_fill(~valid, 0.0)


def relevance_scores(
    embeds: Tensor,
    query_embeds: Tensor,
    query_mask: Tensor | None = None,
    sign: float = 1.0,
    normalise: bool = True,
) -> Tensor:
    """Mean cosine of each visual token with the query's rows, times ``sign``; larger is more relevant.

    Args:
        embeds: (B, n, e) visual tokens in a space that they share with the query.
        query_embeds: (B or 1, M, e) the query's text segments (CLIP) or its pooled embedding.
        query_mask: (B or 1, M) bool, False at padding segments.
        sign: -1 for CLIP patch tokens, whose cosine falls where the query is (see script.py).
        normalise: False takes the plain inner product, into which the tokens' norms leak.

    Returns:
        (B, n) raw scores, cosines in [-1, 1], not yet scaled: see `min_max`.
    """
    if normalise:
        if kernels.usable(embeds):
            return _fused().mean_cosine(embeds, query_embeds, query_mask, sign)
        similarity = cosine_similarity(embeds, query_embeds)
    else:
        similarity = inner_products(embeds, query_embeds.to(embeds.dtype).expand(embeds.shape[0], -1, -1))
    if query_mask is None:
        return sign * similarity.mean(-1)
    weight = query_mask.to(similarity.dtype)
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1.0)
    return sign * (similarity * weight[:, None, :]).sum(-1)


def redundancy_scores(
    features: Tensor | None,
    tau: float = 0.5,
    gamma: float = 1.0,
    *,
    graph: str = "bipartite",
    valid: Tensor | None = None,
    similarity: Tensor | None = None,
) -> Tensor:
    """How much each token repeats others (the GSP of Script): ``d exp(gamma (mu - tau))``, or the mean if isolated.

    Token i is joined to j when they belong to different sets of the graph and S_ij >= tau; ``d`` counts its edges,
    ``mu`` is their mean similarity. A token without an edge scores its mean similarity to the whole opposite set.
    For gamma >= 0 a joined token scores at least 1 and an isolated one below tau.

    Args:
        features: (B, n, d); not read when ``similarity`` is given.
        tau, gamma: edge threshold and weight of the edges' strength.
        graph: "bipartite" (even against odd positions, a quarter of the products) or "exhaustive" (all pairs).
        valid: (B, n) bool; other tokens are nobody's neighbours.
        similarity: (B, n, n) cosine similarities, when they are there already.

    Returns:
        (B, n) scores; smaller is less redundant.
    """
    return redundancy_graph(features, tau, gamma, graph=graph, valid=valid, similarity=similarity)[0]


def redundancy_graph(
    features: Tensor | None,
    tau: float = 0.5,
    gamma: float = 1.0,
    *,
    graph: str = "bipartite",
    valid: Tensor | None = None,
    similarity: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`redundancy_scores` (B, n), and the share of possible pairs that are joined (B,).

    Where nearly all or nearly none of the pairs are, the degree says little and tau should move.
    """
    if graph not in ("bipartite", "exhaustive"):
        raise ValueError(f"graph must be 'bipartite' or 'exhaustive', got {graph!r}")
    if similarity is not None and kernels.usable(similarity):
        return _fused().redundancy_graph(similarity, tau, gamma, graph == "bipartite", valid)
    if graph == "exhaustive":
        block = cosine_similarity(features) if similarity is None else similarity
        others = ~torch.eye(block.shape[-1], dtype=torch.bool, device=block.device)
        pairs = others if valid is None else others & (valid[:, :, None] & valid[:, None, :])
        edges = edge_sums(block, tau, pairs, dim=-1)
        return edges.score(tau, gamma), edges.density()
    if similarity is None:
        block = cosine_similarity(features[:, 0::2], features[:, 1::2])
    else:
        block = similarity[:, 0::2, 1::2]
    pairs = None if valid is None else valid[:, 0::2, None] & valid[:, None, 1::2]
    scores = block.new_empty(block.shape[0], sum(block.shape[1:]))
    even, odd = (edge_sums(block, tau, pairs, dim) for dim in (-1, -2))
    scores[:, 0::2], scores[:, 1::2] = even.score(tau, gamma), odd.score(tau, gamma)
    return scores, even.density()


def conditional_kernel(similarity: Tensor, relevance: Tensor) -> Tensor:
    """L = diag(r) S diag(r): similarity (B, n, n) conditioned on relevance (B, n) (Script, section 4.2)."""
    return relevance[:, :, None] * similarity * relevance[:, None, :]


def stable_rank(scores: Tensor, descending: bool = False) -> Tensor:
    """Rank of every entry along the last axis, 0 first; equal scores in order of index. (B, n) -> (B, n) int64."""
    if kernels.usable(scores):
        return _fused().stable_rank(scores, descending)
    order = scores.argsort(dim=-1, descending=descending, stable=True)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


def lowest_ranked(rank: Tensor, k: int, member: Tensor | None = None) -> Tensor:
    """Ascending indices (B, k) of the k smallest entries of ``rank`` (B, n), those of ``member`` before all others."""
    if member is not None:
        rank = torch.where(member, rank, rank + 2 * rank.shape[-1])
    if kernels.usable(rank):
        return _fused().first_places(stable_rank(rank), k)
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


def _fused() -> ModuleType:
    """The scores as kernels."""
    from llava.pruning.kernels import scores  # imports triton

    return scores


def _loops(tensor: Tensor) -> ModuleType:
    """The greedy loops for a tensor's device."""
    if not kernels.usable(tensor):
        return greedy_numpy if tensor.device.type == "cpu" else greedy
    from llava.pruning.kernels import greedy as fused  # imports triton

    return fused
