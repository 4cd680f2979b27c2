"""What Script's released code does, as it does it: not the method of the paper, which is `script`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from llava.pruning.base import Pruner, register
from llava.pruning.functional import (
    cosine_similarity,
    inner_products,
    lowest_ranked,
    stable_rank,
    unprojected_rank,
)
from llava.pruning.inputs import PruningInputs
from llava.pruning.options import Cosine, EdgeWeight, Range
from llava.pruning.question_reader import QuestionReader

EPSILON = 1e-6


@register
@dataclass(frozen=True, kw_only=True)
class ScriptRelease(QuestionReader, Pruner):
    """Keep what the released code of Script keeps, so that it can be compared with the paper's method.

    Paper: "Script: Graph-Structured and Query-Conditioned Semantic Token Pruning for Multimodal Large Language Models"
    (arXiv 2512.01949), by its released code. Inputs: features H (B, n, d), image_embeds (B, n, e), text_embeds (B, M,
    e). Output: indices (B, m).

    1. Graph: all pairs with cos(h_i, h_j) >= tau, a token with itself included; score = d exp(gamma (mu - tau)), half
       and half with the mean similarity below ``minimum_degree``. It marks the m tokens with the *largest* score.
    2. Relevance: minus the mean product e_j . t, nothing normalised, over the better half of the question's segments;
       r = (r - min) / (max - min + 1e-6) within the view.
    3. Greedy loop over L = diag(r) S diag(r): v_i <- v_i - (L_ij / (sqrt(v_j) + 1e-6))^2 after each choice j, without
       Eq. 11's projection on earlier choices; once the largest v is no longer positive nothing changes any more.
    4. Fusion: the marked tokens among the m that the loop chose, then others of those m: always those m.

    Args:
        tau, gamma, minimum_degree: of the graph; they change the details, never the answer.
        relevance: see `QuestionReader`; "clip" is what is released.
        relevance_sign: ``None`` is -1, as released, whatever the host states.

    Deviations from the paper: (1) the graph keeps what it should drop; (2) it is complete, not bipartite, with a
    smaller tau and a minimum degree; (3) relevance is a plain product in CLIP's space with a negative sign; (4) the
    greedy loop does not orthogonalise; (5) the fusion returns the loop's set, so that the graph has no influence.

    Deviations from the released code: (1) float32 throughout; (2) padding cannot be chosen unless
    ``exclude_padding=False``, which together with 2 x 2 tiles is the released setting; (3) pieces of a long question
    each have an end token; (4) the exact greedy loop, which the code computes and does not use, is left out.
    """

    name: ClassVar[str] = "script_release"

    tau: Cosine = 0.2
    gamma: EdgeWeight = 1.0
    minimum_degree: Annotated[int, Range(0)] = 4

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        similarity = cosine_similarity(inputs.features)
        redundancy = self.redundancy(similarity)
        marked = stable_rank(redundancy, descending=True) < keep
        relevance = scale(self.raw_relevance(inputs).nan_to_num(), inputs.valid)
        rank = unprojected_rank(similarity, keep, relevance, inputs.valid, EPSILON)
        chosen = rank < keep
        fused = stable_rank((~chosen).int() * 2 + (~marked).int())  # marked and chosen, then chosen, then the others
        details = {"redundancy": redundancy, "kept_by_gsp": marked, "relevance": relevance, "order": rank}
        return lowest_ranked(fused, keep), details

    def sign(self, inputs: PruningInputs) -> int:
        return -1 if self.relevance_sign is None else self.relevance_sign

    def raw_relevance(self, inputs: PruningInputs, normalise: bool = True) -> Tensor:
        if inputs.relevance is not None or self.relevance in ("projector", "none"):
            return super().raw_relevance(inputs, normalise)
        product = product_with_better_half(inputs.image_embeds, inputs.text_embeds, inputs.text_mask)
        return self.sign(inputs) * product

    def redundancy(self, similarity: Tensor) -> Tensor:
        """Score (B, n) of the complete graph with self-edges on ``similarity`` (B, n, n)."""
        edges = similarity >= self.tau
        degree = edges.sum(-1)
        strength = torch.where(edges, similarity, 0.0).sum(-1) / degree.clamp_min(1)
        score = degree * torch.exp(self.gamma * (strength - self.tau))
        blended = 0.5 * score + 0.5 * similarity.mean(-1)
        return torch.where(degree < self.minimum_degree, blended, score)


def product_with_better_half(embeds: Tensor, text_embeds: Tensor, text_mask: Tensor | None) -> Tensor:
    """Mean product of tokens (B, n, e) with the half of the segments (B or 1, M, e) that they fit best: (B, n)."""
    text = text_embeds.to(embeds.dtype).expand(embeds.shape[0], -1, -1)
    product = inner_products(embeds, text)  # (B, n, M)
    fit = product.mean(1)
    real = torch.ones_like(fit, dtype=torch.bool) if text_mask is None else text_mask.expand_as(fit)
    half = (real.sum(-1, keepdim=True) // 2).clamp_min(1)
    better = stable_rank(fit.masked_fill(~real, -torch.inf), descending=True) < half
    return (product * better[:, None, :]).sum(-1) / half


def scale(raw: Tensor, valid: Tensor | None) -> Tensor:
    """Min-max within each view (B, n), 1e-6 in the denominator; 0 at tokens that are not valid."""
    lowest, highest = raw, raw
    if valid is not None:
        lowest, highest = raw.masked_fill(~valid, torch.inf), raw.masked_fill(~valid, -torch.inf)
    lowest, highest = lowest.amin(-1, keepdim=True), highest.amax(-1, keepdim=True)
    scaled = (raw - lowest) / (highest - lowest + EPSILON)
    return scaled if valid is None else scaled.masked_fill(~valid, 0.0)
