"""CDPruner: a determinantal point process conditioned on relevance to the question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from llava.pruning.adaptive import residual_share
from llava.pruning.base import Pruner, register
from llava.pruning.budget_finder import BudgetFinder, first_of
from llava.pruning.functional import cosine_similarity, greedy_map_rank, lowest_ranked, min_max
from llava.pruning.inputs import PruningInputs
from llava.pruning.options import Range
from llava.pruning.question_reader import QuestionReader

OFFSET = 1e-6  # keeps the least relevant token in the kernel
RANK_USED_UP = 1e-10  # a smaller remaining variance is rounding


@register
@dataclass(frozen=True, kw_only=True)
class CDPruner(QuestionReader, BudgetFinder, Pruner):
    """Keep the m tokens that a DPP, weighted by relevance to the question, picks greedily.

    Paper: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs" (arXiv
    2506.10967). Inputs: features H (B, n, d), image_embeds (B, n, e), text_embeds (B, M, e), and pictures (B,) with
    ``scaling="picture"``. Output: indices (B, m).

    1. S_ij = cos(h_i, h_j).
    2. Relevance: the mean cosine of a token with the question's text segments, times the sign of the joint space;
       r = (r - min + 1e-6) / (max - min).
    3. Greedy MAP of L = diag(r) S diag(r), m steps, without a stabiliser.

    Args:
        scaling: over which tokens min and max of the relevance are taken: those of a "view" or of the whole "picture".
        theta: weight of relevance against diversity, between 0 and 1: exp(theta / (2 (1 - theta)) r) stands for r.
            ``None`` takes r itself.
        relevance: see `QuestionReader`; "clip" is the published source.

    ``keep_tokens="auto"`` ends step 3 where the kept tokens explain enough of L; with ``scaling="picture"`` views in
    which nothing is relevant then give few.

    The released code's own setting is ``scaling="picture"``, ``exclude_padding=False``.

    Deviations from the paper: (1) the sign of the relevance is negative for CLIP towers, as in the released code.

    Deviations from the released code: (1) relevance is scaled within each view unless ``scaling="picture"``;
    (2) padding cannot be chosen unless ``exclude_padding=False``; (3) where all tokens are equally relevant the code
    divides by zero, here all weigh 1; (4) where the kernel's rank is used up the code returns tokens twice, here the
    rest follows by descending relevance, then index; (5) pieces of a long question each have an end token.
    """

    name: ClassVar[str] = "cdpruner"

    scaling: Literal["view", "picture"] = "view"
    theta: Annotated[float, Range(0, 1, open=True)] | None = None

    @property
    def compares_views(self) -> bool:
        return self.scaling == "picture"

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        groups = inputs.pictures if self.scaling == "picture" else None
        relevance = min_max(self.raw_relevance(inputs), inputs.valid, groups, OFFSET)
        weight = relevance
        if self.theta is not None:
            weight = (self.theta / (2 * (1 - self.theta)) * relevance).exp()
        similarity = cosine_similarity(inputs.features)
        rank = greedy_map_rank(
            similarity,
            keep,
            relevance=weight,
            candidates=inputs.valid,
            epsilon=0.0,
            stop=RANK_USED_UP,
            overwrite=self.auto is None,
        )
        details = {"relevance": relevance, "order": rank}
        if self.auto is not None:
            order = first_of(rank, keep)
            share = residual_share(similarity, order, weight, inputs.valid, RANK_USED_UP)
            details |= self.found(inputs, rank, order, share)
        return lowest_ranked(rank, keep), details
