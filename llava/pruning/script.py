"""Script: graph-structured pruning, query-conditioned semantic pruning, and their intersection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llava.pruning.base import Pruner, PruningInputs, RelevancePruner, register
from llava.pruning.blocks import map_rank_by_rows, redundancy_by_blocks
from llava.pruning.functional import (
    cosine_similarity,
    greedy_map_rank,
    lowest_ranked,
    min_max,
    redundancy_graph,
    relevance_scores,
    stable_rank,
)
from llava.pruning.random import random_scores


@register
@dataclass(frozen=True, kw_only=True)
class Script(RelevancePruner):
    """Drop tokens that repeat others, order the rest by a DPP conditioned on the question, keep the first m.

    Paper: "Script: Graph-Structured and Query-Conditioned Semantic Token Pruning for Multimodal Large Language Models"
    (arXiv 2512.01949), section 4. Inputs: features H (B, n, d); with ``relevance="clip"`` image_embeds (B, n, e) and
    text_embeds (B, M, e); with ``relevance="projector"`` query_embeds (B, l, d). Output: indices (B, m).

    1. S_ij = cos(h_i, h_j).
    2. GSP: redundancy of each token in the bipartite graph of even and odd positions; G is the share
       1 - ``gsp_ratio`` with the lowest scores, never fewer than m.
    3. QCRS: relevance r of each token to the question, scaled to [0, 1] within the view (Eq. 4).
    4. DPP: greedy MAP order D of L = diag(r) S diag(r) (Eq. 5-7, 11).
    5. Fusion: the first m tokens of D that lie in G, the smallest k with |D_k and G| = m.

    Args:
        gsp_ratio: p, the share of tokens that GSP discards. 0 leaves pure QCSP; 1 - m/n or more, pure GSP.
        tau: similarity from which two tokens are joined by an edge.
        gamma: weight of the edges' mean strength in the redundancy score.
        epsilon: stabiliser of Eq. 11, and the smallest variance that is still selected.
        gsp: ablation, False keeps every token in G.
        relevance: where r comes from: "clip" (joint image-text space), "projector" (language model's space) or
            "none" (ablation: all tokens equally relevant).
        dpp: ablation, False orders by descending relevance (by ascending redundancy where there is none).
        relevance_sign: sign of the cosine in r. ``None`` takes what the host states: -1 for CLIP towers, whose patch
            tokens are *less* similar to the question where it is answered (only the class token was trained to match
            text; TRIM and CDPruner found the same); for "projector" +1.
        kernel_exponent: r enters the kernel as r ** kernel_exponent; 1/2 gives the root of Eq. 5.
        restrict: run the DPP on G alone, so that discarded tokens no longer repel their neighbours.
        graph: "bipartite", or "exhaustive" for a graph of all pairs (four times the products).
        seed: of the random order when all three parts are switched off.
        scope: "clip" beside those of every method: as "global", m times the frames of a video are dealt over them by
            the selection itself, but no matrix of all pairs of tokens is built (see blocks.py). The same tokens up to
            rounding. n = 10,816 tokens of 64 frames cost n^2 d / 2 products for the graph, a row of n numbers for
            each of the k steps of the greedy loop, and k n d to 64 k n d products for the similarities of the chosen.

    Deviations from the paper: (1) the relevance comes from CLIP's joint space with a negative sign, as in every
    released implementation of this family, not from the projector's space (kept as an option); (2) p is a share of
    its own, because "GSP keeps exactly m" would make the fusion return GSP's or the DPP's set unchanged; (3) rank
    exhaustion, ties and equal relevance are settled: fill up by descending r, then index.

    Deviations from the released code: (1) GSP drops the most redundant tokens, the code keeps them; (2) the graph is
    bipartite with tau 0.5, the code's is complete with self-edges, tau 0.2 and a minimum degree; (3) the greedy loop
    orthogonalises (Eq. 11); (4) the fusion depends on GSP; (5) relevance is a cosine, the code's is a plain product.
    """

    name: ClassVar[str] = "script"

    gsp_ratio: float = 0.5
    tau: float = 0.5
    gamma: float = 1.0
    epsilon: float = 1e-6
    gsp: bool = True
    relevance: Literal["clip", "projector", "none"] = "clip"
    dpp: bool = True
    kernel_exponent: float = 1.0
    restrict: bool = False
    graph: Literal["bipartite", "exhaustive"] = "bipartite"
    seed: int = 0
    scope: Literal["view", "global", "clip"] = "view"

    def __post_init__(self):
        super().__post_init__()
        if self.scope == "clip" and self.graph != "bipartite":
            raise ValueError(f"scope=clip goes with graph=bipartite, got {self.graph!r}")
        if not 0 <= self.gsp_ratio <= 1:
            raise ValueError(f"gsp_ratio must lie between 0 and 1, got {self.gsp_ratio}")
        for name in ("epsilon", "kernel_exponent"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def needs(self) -> frozenset[str]:
        fields = {"clip": {"image_embeds", "text_embeds"}, "projector": {"query_embeds"}, "none": set()}
        return frozenset(fields[self.relevance])

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        details: dict[str, Tensor] = {}
        many = self.scope == "clip"
        similarity = cosine_similarity(inputs.features) if self.dpp and not many else None
        kept_by_gsp = redundancy = relevance = None
        if self.gsp:
            if many:
                redundancy, density = redundancy_by_blocks(inputs.features, self.tau, self.gamma, valid=inputs.valid)
            else:
                redundancy, density = redundancy_graph(
                    inputs.features, self.tau, self.gamma, graph=self.graph, valid=inputs.valid, similarity=similarity
                )
            kept_by_gsp = self.least_redundant(redundancy, keep, inputs.valid)
            details |= {"redundancy": redundancy, "edge_density": density, "kept_by_gsp": kept_by_gsp}
        if self.relevance != "none":
            relevance = min_max(self.raw_relevance(inputs), inputs.valid)
            details["relevance"] = relevance
        rank = self.order(inputs, keep, similarity, redundancy, relevance, kept_by_gsp)
        details["order"] = rank
        return lowest_ranked(rank, keep, kept_by_gsp), details

    def without_joint_space(self) -> Pruner:
        return replace(self, relevance="projector")

    def least_redundant(self, redundancy: Tensor, keep: int, valid: Tensor | None) -> Tensor:
        """G (B, n) bool: the n_G = max(m, floor((1 - p) n + 1/2)) tokens with the lowest score, valid ones first."""
        if valid is None:
            share = torch.tensor(float(redundancy.shape[-1]))  # a number on the CPU, whatever the device
        else:
            share = valid.sum(-1, keepdim=True).float()
            redundancy = redundancy.masked_fill(~valid, torch.inf)
        size = ((1 - self.gsp_ratio) * share + 0.5).floor().clamp_min(keep)
        return stable_rank(redundancy) < size

    def raw_relevance(self, inputs: PruningInputs) -> Tensor:
        """r (B, n) before scaling (Eq. 4), or the scores that the caller brought."""
        if self.relevance == "clip" or inputs.relevance is not None:
            return self.joint_relevance(inputs)
        sign = 1 if self.relevance_sign is None else self.relevance_sign
        return relevance_scores(inputs.features, pooled_query(inputs), sign=sign)

    def order(
        self,
        inputs: PruningInputs,
        keep: int,
        similarity: Tensor | None,
        redundancy: Tensor | None,
        relevance: Tensor | None,
        kept_by_gsp: Tensor | None,
    ) -> Tensor:
        """D as ranks (B, n), 0 first: the part of the method that is switched on decides."""
        valid = inputs.valid
        if self.dpp:
            candidates = valid
            if self.restrict and kept_by_gsp is not None:
                candidates = kept_by_gsp if valid is None else kept_by_gsp & valid
            weight = relevance if relevance is None or self.kernel_exponent == 1 else relevance**self.kernel_exponent
            rank = partial(map_rank_by_rows, inputs.features)
            if self.scope != "clip":
                rank = partial(greedy_map_rank, similarity, overwrite=True)
            return rank(
                keep,
                relevance=weight,
                member=kept_by_gsp,
                candidates=candidates,
                epsilon=self.epsilon,
            )
        if relevance is not None:
            score = -relevance
        elif redundancy is not None:
            score = redundancy
        else:
            score = random_scores(inputs, self.seed)
        return stable_rank(score if valid is None else score.masked_fill(~valid, torch.inf))


def pooled_query(inputs: PruningInputs) -> Tensor:
    """Mean of the question's embeddings (B or 1, l, d) over its real tokens: (B or 1, 1, d)."""
    query = inputs.query_embeds.to(torch.promote_types(inputs.query_embeds.dtype, torch.float32))
    if inputs.query_mask is None:
        return query.mean(1, keepdim=True)
    weight = inputs.query_mask.to(query.dtype)[:, :, None]
    return (query * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1.0)
