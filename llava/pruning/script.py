"""Script: graph-structured pruning, query-conditioned semantic pruning, and their intersection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from llava.pruning.auto_budget import FLOOR_ALONE
from llava.pruning.base import Pruner, register
from llava.pruning.budget_finder import BudgetFinder, first_of
from llava.pruning.functional import lowest_ranked, min_max, stable_rank
from llava.pruning.inputs import PruningInputs
from llava.pruning.options import Cosine, EdgeWeight, Positive, Range, Seed
from llava.pruning.question_reader import QuestionReader
from llava.pruning.random import random_scores
from llava.pruning.similarity import Similarity, similarity_of


@register
@dataclass(frozen=True, kw_only=True)
class Script(QuestionReader, BudgetFinder, Pruner):
    """Drop tokens that repeat others, order the rest by a DPP conditioned on the question, keep the first m.

    Paper: "Script: Graph-Structured and Query-Conditioned Semantic Token Pruning for Multimodal Large Language Models"
    (arXiv 2512.01949), section 4. Inputs: features H (B, n, d), and what the source of relevance needs: for "clip"
    image_embeds (B, n, e) and text_embeds (B, M, e). Output: indices (B, m).

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
        relevance: see `QuestionReader`; "projector" is the paper's Eq. 3-4 read literally.
        dpp: ablation, False orders by descending relevance (by ascending redundancy where there is none).
        kernel_exponent: r enters the kernel as r ** kernel_exponent; 1/2 gives the root of Eq. 5.
        restrict: run the DPP on G alone, so that discarded tokens no longer repel their neighbours.
        graph: "bipartite", or "exhaustive" for a graph of all pairs (four times the products).
        seed: of the random order when all three parts are switched off.

    With ``keep_tokens="auto"`` step 4 ends where D explains enough of L, and step 5 keeps D_k and G, walking on to the
    floor; G is then the share 1 - ``gsp_ratio``, never fewer than the floor. It needs ``dpp``.

    With ``scope="global"`` over a long clip no matrix of all pairs is built: see similarity.py.

    Deviations from the paper: (1) the relevance comes from CLIP's joint space with a negative sign, as in every
    released implementation of this family, or from the decoder's own reading of the question, not from the projector's
    space (kept as an option); (2) p is a share of
    its own, because "GSP keeps exactly m" would make the fusion return GSP's or the DPP's set unchanged; (3) rank
    exhaustion, ties and equal relevance are settled: fill up by descending r, then index.

    Deviations from the released code: (1) GSP drops the most redundant tokens, the code keeps them; (2) the graph is
    bipartite with tau 0.5, the code's is complete with self-edges, tau 0.2 and a minimum degree; (3) the greedy loop
    orthogonalises (Eq. 11); (4) the fusion depends on GSP; (5) relevance is a cosine, the code's is a plain product.
    """

    name: ClassVar[str] = "script"

    gsp_ratio: Annotated[float, Range(0, 1)] = 0.5
    tau: Cosine = 0.5
    gamma: EdgeWeight = 1.0
    epsilon: Positive = 1e-6
    gsp: bool = True
    dpp: bool = True
    kernel_exponent: Positive = 1.0
    restrict: bool = False
    graph: Literal["bipartite", "exhaustive"] = "bipartite"
    seed: Seed = 0

    def __post_init__(self):
        if self.scope == "clip":
            raise ValueError("scope=clip is no option any more: write scope=global, which saves the memory by itself")
        super().__post_init__()
        if self.auto is not None and not self.dpp:
            raise ValueError(f"keep_tokens={self.keep_tokens} reads the DPP's order: it needs dpp=true")

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        details: dict[str, Tensor] = {}
        similarity = similarity_of(inputs.features, all_pairs=self.dpp, after_rank=self.auto is not None)  # 1
        kept_by_gsp = self.graph_filter(inputs, keep, similarity, details) if self.gsp else None  # 2
        relevance = self.scaled_relevance(inputs, details) if self.relevance != "none" else None  # 3
        rank = self.order(inputs, keep, similarity, relevance, kept_by_gsp, details)  # 4
        return lowest_ranked(rank, keep, kept_by_gsp), details  # 5

    def graph_filter(
        self, inputs: PruningInputs, keep: int, similarity: Similarity, details: dict[str, Tensor]
    ) -> Tensor:
        """G (B, n) bool: the n_G = max(m, floor((1 - p) n + 1/2)) tokens with the lowest score, valid ones first."""
        redundancy, density = similarity.redundancy(self.tau, self.gamma, self.graph, inputs.valid)
        details |= {"redundancy": redundancy, "edge_density": density}
        if inputs.valid is None:
            share = torch.tensor(float(redundancy.shape[-1]))  # a number on the CPU, whatever the device
        else:
            share = inputs.valid.sum(-1, keepdim=True).float()
            redundancy = redundancy.masked_fill(~inputs.valid, torch.inf)
        least = keep if self.auto is None else min(self.auto.floor or FLOOR_ALONE, keep)
        size = ((1 - self.gsp_ratio) * share + 0.5).floor().clamp_min(least)
        details["kept_by_gsp"] = stable_rank(redundancy) < size
        return details["kept_by_gsp"]

    def scaled_relevance(self, inputs: PruningInputs, details: dict[str, Tensor]) -> Tensor:
        """r (B, n) between 0 and 1 (Eq. 4)."""
        details["relevance"] = min_max(self.raw_relevance(inputs), inputs.valid)
        return details["relevance"]

    def order(
        self,
        inputs: PruningInputs,
        keep: int,
        similarity: Similarity,
        relevance: Tensor | None,
        kept_by_gsp: Tensor | None,
        details: dict[str, Tensor],
    ) -> Tensor:
        """D as ranks (B, n), 0 first: the part of the method that is switched on decides."""
        valid = inputs.valid
        if self.dpp:
            candidates = valid
            if self.restrict and kept_by_gsp is not None:
                candidates = kept_by_gsp if valid is None else kept_by_gsp & valid
            weight = relevance if relevance is None or self.kernel_exponent == 1 else relevance**self.kernel_exponent
            rank = similarity.map_rank(
                keep, relevance=weight, member=kept_by_gsp, candidates=candidates, epsilon=self.epsilon
            )
            if self.auto is not None:
                order = first_of(rank, steps_taken(rank, keep, kept_by_gsp))
                share = similarity.residual_share(order, relevance=weight, candidates=candidates)
                details |= self.found(inputs, rank, order, share, kept_by_gsp)
        else:
            if relevance is not None:
                score = -relevance
            else:
                score = details["redundancy"] if self.gsp else random_scores(inputs, self.seed)
            rank = stable_rank(score if valid is None else score.masked_fill(~valid, torch.inf))
        details["order"] = rank
        return rank


def steps_taken(rank: Tensor, keep: int, member: Tensor | None) -> int:
    """Length of the order D (B, n) until every view has ``keep`` members, or all that there are."""
    if member is None:
        return keep
    place = rank.masked_fill(~member, rank.shape[-1]).sort(dim=-1).values[:, :keep]  # of the members, in order
    return int(place.masked_fill(place == rank.shape[-1], -1).amax()) + 1
