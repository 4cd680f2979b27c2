"""SCOPE: cover the picture, salient patches first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from llava.pruning.adaptive import uncovered_share
from llava.pruning.attention_reader import AttentionReader
from llava.pruning.base import Pruner, register
from llava.pruning.budget_finder import BudgetFinder, first_of
from llava.pruning.functional import cosine_similarity, coverage_rank, lowest_ranked
from llava.pruning.inputs import PruningInputs
from llava.pruning.options import Range

ROUNDING = 1e-6  # of a cosine; a copy of a chosen patch covers nothing


@register
@dataclass(frozen=True, kw_only=True)
class SCOPE(AttentionReader, BudgetFinder, Pruner):
    """Keep the m patches that together resemble all others best, each gain weighed by the patch's saliency.

    Paper: "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs" (arXiv 2510.24214). Inputs:
    encoder_features V (B, n, c) and class_attention (B, heads, n). Output: indices (B, m).

    1. S_uv = cos(v_u, v_v); a = mean over heads of the class token's attention.
    2. Cover c_u = 0. m times: take the patch v with the largest [sum over u of max(0, S_uv - c_u)] a_v ** ``alpha``;
       then c_u = max(c_u, S_uv).

    Args:
        alpha: exponent of the saliency; 0 leaves coverage alone.
        class_token: see `AttentionReader`.

    The order for m patches begins with that for fewer. Where everything is covered it goes on by index.
    ``keep_tokens="auto"`` ends it where enough of what all patches could cover is covered.

    Deviations from the paper: none.

    Deviations from the released code: (1) similarities are computed in float32, the code's in the model's precision;
    (2) every view has the whole budget, where the code divides it by the views of a batch; (3) padding is neither
    chosen nor covered unless ``exclude_padding=False``; (4) ties go to the lowest index.
    """

    name: ClassVar[str] = "scope"

    alpha: Annotated[float, Range(0)] = 1.0

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"encoder_features"}

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        attention = self.attention(inputs)
        reach = cosine_similarity(inputs.encoder_features)
        if inputs.valid is not None:
            reach = reach.masked_fill(~inputs.valid[:, None, :], 0.0)
        rank = coverage_rank(reach, keep, attention**self.alpha, inputs.valid, ROUNDING)
        details = {"attention": attention, "order": rank}
        if self.auto is not None:
            order = first_of(rank, keep)
            details |= self.found(inputs, rank, order, uncovered_share(reach, order, inputs.valid))
        return lowest_ranked(rank, keep), details
