"""TRIM: the tokens that CLIP finds relevant, and one that stands for all others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.base import TokenMaker, register
from llava.pruning.functional import lowest_ranked, stable_rank
from llava.pruning.inputs import PruningInputs, Selection
from llava.pruning.question_reader import QuestionReader


@register
@dataclass(frozen=True, kw_only=True)
class Trim(QuestionReader, TokenMaker):
    """Keep the m - 1 tokens most relevant to the question, and the mean of all others as one token more.

    Paper: "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs" (arXiv
    2409.10994). Inputs: encoder_features V (B, n, c), image_embeds (B, n, e), text_embeds (B, M, e). Output: indices
    (B, m - 1) and the mean (B, 1, c) of the other patches, before the projector.

    1. s = softmax over a view's patches of (sign of the joint space) x (e_j . t).
    2. Keep the m - 1 largest; with ``adaptive`` those of the share that lies above Q3 + 1.5 (Q3 - Q1) of s.
    3. Append the mean of the others; zeros if there are none.

    Args:
        normalise: score by the cosine, so that the norms of patches do not count.
        adaptive: let the scores decide how many are kept, the same number in all views of a picture;
            ``keep_tokens`` is then the most that a view gives, and the count is not known beforehand.
        relevance: see `QuestionReader`; "clip" is the published source.

    Deviations from the paper: (1) the product is not normalised and its sign is negative for CLIP towers, as in the
    released code.

    Deviations from the released code: (1) quartiles are those of a picture, the code's those of the batch; (2) padding
    takes no part, nor in the mean, unless ``exclude_padding=False``; (3) the question comes without the instruction on
    the answer's length, and a long one counts with all its pieces; (4) ties go to the lowest index; (5) tiles of
    LLaVA-NeXT, which the code does not treat, each keep m - 1 tokens and their mean.
    """

    name: ClassVar[str] = "trim"
    place: ClassVar[str] = "encoder"
    floor: ClassVar[int] = 2
    below_floor: ClassVar[str] = "the mean of all patches alone"

    normalise: bool = False
    adaptive: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"encoder_features"}

    @property
    def count_is_exact(self) -> bool:
        return not self.adaptive

    def count_made(self, keep: int) -> int:
        return 1

    @property
    def compares_views(self) -> bool:
        return self.adaptive

    def kept_and_made(self, keep: int, eligible: Tensor) -> tuple[Tensor, Tensor]:
        kept, made = super().kept_and_made(keep, eligible)
        return kept, eligible.any(-1).long() if self.adaptive else made

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        raw = self.raw_relevance(inputs, self.normalise).nan_to_num()
        scores = (raw if inputs.valid is None else raw.masked_fill(~inputs.valid, -torch.inf)).softmax(-1).nan_to_num()
        rank = stable_rank(scores, descending=True)
        details = {"relevance": scores}
        if self.adaptive:
            details["outliers"] = rank < outlier_counts(scores, inputs)[:, None]
        return lowest_ranked(rank, keep, inputs.valid), details

    def eligible(self, inputs: PruningInputs, indices: Tensor, details: Mapping[str, Tensor]) -> Tensor | None:
        eligible = super().eligible(inputs, indices, details)
        if not self.adaptive:
            return eligible
        outliers = details["outliers"].gather(1, indices)
        return outliers if eligible is None else outliers & eligible

    def make(self, inputs: PruningInputs, kept: Selection, count: int) -> Selection:
        others = ~kept.mask if inputs.valid is None else ~kept.mask & inputs.valid
        weight = others.float() / others.sum(-1, keepdim=True).clamp_min(1)
        features = inputs.encoder_features
        mean = (weight[:, None] @ features.float()).to(features.dtype)  # (B, 1, c)
        return dataclasses.replace(kept, made=mean)


def outlier_counts(scores: Tensor, inputs: PruningInputs) -> Tensor:
    """(B,) int(n x ratio): patches of a view to keep, from the share of a picture's scores above its upper fence."""
    pictures = inputs.pictures
    if pictures is None:
        pictures = torch.arange(inputs.views, device=scores.device)
    valid = torch.ones_like(scores, dtype=torch.bool) if inputs.valid is None else inputs.valid
    counts = torch.zeros(inputs.views, dtype=torch.int64, device=scores.device)
    for picture in pictures.unique():
        own = pictures == picture
        values = scores[own][valid[own]]
        if values.numel():
            first, third = values.quantile(0.25), values.quantile(0.75)
            ratio = (values > third + 1.5 * (third - first)).sum().double() / values.numel()
            counts[own] = (valid[own].sum(-1) * ratio).long()
    return counts
