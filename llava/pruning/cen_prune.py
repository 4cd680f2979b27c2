"""Cen-Prune: the similarity of diversity selectors, without the direction that all tokens share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llava.pruning.base import Pruner, register
from llava.pruning.cdpruner import OFFSET, RANK_USED_UP
from llava.pruning.functional import (
    cosine_similarity,
    greedy_map_rank,
    lowest_ranked,
    max_min_rank,
    min_max,
    working_dtype,
)
from llava.pruning.inputs import PruningInputs
from llava.pruning.question_reader import QuestionReader

EPSILON = 1e-6  # in the denominators


@register
@dataclass(frozen=True, kw_only=True)
class CenPrune(QuestionReader, Pruner):
    """Keep what a DPP or a max-min rule picks after the tokens' common direction is taken out of their similarity.

    Paper: "Cen-Prune" (2026), a correction of `cdpruner` and `divprune`. Inputs: features H (B, n, d), and what the
    source of relevance needs. Output: indices (B, m).

    1. g_i = - mean over j != i of cos(h_i, h_j); w = (g - min g) / (max g - min g + 1e-6): what is unlike the others.
    2. S_ij = cos(h_i - mu, h_j - mu), mu the mean of all tokens.
    3. "dpp": relevance r to the question, scaled to [0, 1]; greedy MAP of L = diag(r w) S diag(r w).
       "max_min": the first token is the one whose nearest other is farthest by 1 - S; every next one has the largest
       w_i x (1 - S to the nearest chosen token).

    Args:
        selector: "dpp" or "max_min", which reads no question.
        standardise: divide each dimension of H by its deviation over the tokens first, and take w = sigmoid of (g -
            mean) / deviation: the paper's form for Qwen2.5-VL.
        relevance: see `QuestionReader`; "clip" is the published source, "none" takes r = 1. With
            ``selector="max_min"`` there is nothing to read, and "auto" becomes "none".

    The order for m tokens begins with that for fewer; the token most like the others has weight 0 and comes last.

    Deviations from the paper, of which the formulas alone were at hand: (1) the stabiliser, which it names without a
    value, is 1e-6; (2) with ``standardise`` tokens are those after Qwen's merger, where the paper averages those that
    it merges; (3) padding takes no part unless ``exclude_padding=False``.

    Deviations from the released code: none known; there was none to read.
    """

    name: ClassVar[str] = "cen_prune"

    selector: Literal["dpp", "max_min"] = "dpp"
    standardise: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.selector == "max_min":
            if self.relevance not in ("auto", "none"):
                raise ValueError(f"relevance={self.relevance} means nothing with selector=max_min: it is for dpp")
            object.__setattr__(self, "relevance", "none")

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        features = inputs.features.to(working_dtype(inputs.features.dtype))
        mean = masked_mean(features, inputs.valid)
        if self.standardise:
            features = features / (masked_mean((features - mean).square(), inputs.valid) + EPSILON).sqrt()
            mean = masked_mean(features, inputs.valid)
        unlike = unlikeness(cosine_similarity(features), inputs.valid)
        weight = spread_weight(unlike, inputs.valid, self.standardise)
        similarity = cosine_similarity(features - mean)
        details = {"unlikeness": unlike, "weight": weight}
        if self.selector == "max_min":
            rank = max_min_rank(1 - similarity, keep, inputs.valid, weight)
        else:
            details["relevance"] = min_max(self.raw_relevance(inputs), inputs.valid, offset=OFFSET)
            rank = greedy_map_rank(
                similarity,
                keep,
                relevance=details["relevance"] * weight,
                candidates=inputs.valid,
                epsilon=0.0,
                stop=RANK_USED_UP,
                overwrite=True,
            )
        return lowest_ranked(rank, keep), details | {"order": rank}


def masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of (B, n, d) over the tokens that take part and are finite: (B, 1, d)."""
    real = values.isfinite().all(-1, keepdim=True)
    real = real if valid is None else real & valid[:, :, None]
    return torch.where(real, values, 0.0).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)


def unlikeness(similarity: Tensor, valid: Tensor | None) -> Tensor:
    """g (B, n): minus the mean of (B, n, n) cosines with the other tokens that take part."""
    others = ~torch.eye(similarity.shape[-1], dtype=torch.bool, device=similarity.device)
    others = others if valid is None else others & valid[:, None]
    return -(similarity * others).sum(-1) / others.sum(-1).clamp_min(1)


def spread_weight(unlike: Tensor, valid: Tensor | None, standardise: bool) -> Tensor:
    """w (B, n) between 0 and 1: step 1 of `CenPrune`."""
    if standardise:
        mean = masked_mean(unlike[:, :, None], valid)
        deviation = masked_mean((unlike[:, :, None] - mean).square(), valid).sqrt()
        return ((unlike - mean[:, :, 0]) / (deviation[:, :, 0] + EPSILON)).sigmoid()
    shown = torch.ones_like(unlike, dtype=torch.bool) if valid is None else valid
    low = unlike.masked_fill(~shown, torch.inf).amin(-1, keepdim=True)
    high = unlike.masked_fill(~shown, -torch.inf).amax(-1, keepdim=True)
    return ((unlike - low) / (high - low + EPSILON)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) * shown
