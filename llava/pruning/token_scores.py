"""Scores of tokens: relevance to a question, redundancy, and their scale; conventions as in functional.py."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.pruning import kernels
from llava.pruning.edges import edge_sums
from llava.pruning.products import cosine_similarity, inner_products, working_dtype


def min_max(scores: Tensor, valid: Tensor | None = None, groups: Tensor | None = None, offset: float = 0.0) -> Tensor:
    """Scale each view's scores (B, n) to [0, 1] over its valid tokens; a view without spread becomes all ones.

    Invalid tokens come out as 0. The spread counts as none below 1e-12.

    Args:
        groups: (B,) int64; views with the same number share their minimum and maximum.
        offset: added to the numerator.
    """
    scores = scores.to(working_dtype(scores.dtype))
    if groups is None and kernels.usable(scores):
        return kernels.fused_scores().min_max(scores, valid, offset)
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
            return kernels.fused_scores().mean_cosine(embeds, query_embeds, query_mask, sign)
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
        return kernels.fused_scores().redundancy_graph(similarity, tau, gamma, graph == "bipartite", valid)
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
