"""MMTok: cover the question's words and the picture together."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from llava.pruning.adaptive import uncovered_share
from llava.pruning.base import Pruner, ViewMethod, register
from llava.pruning.budget_finder import BudgetFinder, first_of
from llava.pruning.functional import cosine_similarity, coverage_rank, lowest_ranked
from llava.pruning.inputs import PruningInputs
from llava.pruning.options import Positive, Range
from llava.pruning.question_reader import QuestionReader

FUNCTION_WORDS = frozenset(
    "a an and answer are at be been being but by did do does for from had has have he how i if into is it onto or "  # noqa: SIM905
    "question she so the then they to upon was we were what when where which who why with you".split()
)


@register
@dataclass(frozen=True, kw_only=True)
class MMTok(QuestionReader, BudgetFinder, Pruner):
    """Keep the m tokens that together cover the question's words and all other tokens best.

    Paper: "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs" (arXiv 2508.18264). Inputs:
    features H (B, n, d), encoder_features V (B, n, c), and query_embeds T (B or 1, t, d) of the question without
    function words. Output: indices (B, m).

    1. P_ij = softmax over patches j of cos(t_i, h_j) / ``tau_text``, divided by the number of words.
    2. Q_ij = softmax over patches j of cos(v_i, v_j) / ``tau_vision``, divided by n.
    3. Targets are the rows of P and of ``alpha`` Q; their cover c_i = 0. m times: take the patch j with the largest
       sum over i of max(0, M_ij - c_i); then c_i = max(c_i, M_ij).

    Args:
        tau_text, tau_vision: temperatures.
        alpha: weight of covering the picture against covering the words.
        relevance: "projector": the words' input embeddings, which is what the paper compares; "none": no words.

    The order for m tokens begins with that for fewer; ``keep_tokens="auto"`` ends it where enough of what all patches
    could cover is covered. Padding cannot be chosen, but is covered and shares in the
    softmax, as in the released code.

    Deviations from the paper: (1) both similarities are cosines, as in the released code, where the paper has products
    with the words; (2) no draft answer of a small model is added to the question, nor does the code add one.

    Deviations from the released code: (1) where a view has fewer than m tokens that may be chosen it gives those, the
    code gives token 0 several times; (2) the words are tokenised together, the code's one by one; (3) a host that has
    the question as token ids, not as text, leaves the function words in it (vLLM); (4) a prompt without a question is
    refused, where the code takes a question of its own; (5) ties go to the lowest index.
    """

    name: ClassVar[str] = "mmtok"
    place: ClassVar[str] = "encoder"

    tau_text: Positive = 0.02
    tau_vision: Positive = 0.2
    alpha: Annotated[float, Range(0)] = 0.5
    relevance: Literal["projector", "none"] = "projector"

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"encoder_features"}

    def read(self, question: Hashable) -> Hashable:
        return keywords(question) if isinstance(question, str) else question

    def lacking(self, inputs: PruningInputs) -> list[str]:
        return ViewMethod.lacking(self, inputs)  # scores of the caller's do not stand for words

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        reach = self.alpha * covering(cosine_similarity(inputs.encoder_features), self.tau_vision)
        if self.relevance != "none":
            sign = 1 if self.relevance_sign is None else self.relevance_sign
            likeness = sign * cosine_similarity(inputs.features, inputs.query_embeds)
            mask = None if inputs.query_mask is None else inputs.query_mask[:, None]
            reach = torch.cat([covering(likeness, self.tau_text, mask), reach], dim=-1)
        rank = coverage_rank(reach, keep, candidates=inputs.valid)
        details = {"order": rank}
        if self.auto is not None:
            order = first_of(rank, keep)
            details |= self.found(inputs, rank, order, uncovered_share(reach, order, inputs.valid))
        return lowest_ranked(rank, keep), details


def covering(similarity: Tensor, temperature: float, real: Tensor | None = None) -> Tensor:
    """(B, n, t) similarities of tokens and targets -> softmax over the n tokens, divided by the number of targets.

    Args:
        real: (B or 1, 1, t) bool, False at targets that are padding; they come out as 0 and do not count.
    """
    share = (similarity / temperature).softmax(dim=1)
    if real is None:
        return share / share.shape[-1]
    return share * real / real.sum(-1, keepdim=True).clamp_min(1)


def keywords(question: str) -> str:
    """The words of a question but `FUNCTION_WORDS`, joined by blanks; the question itself if none is left."""
    words = [word for word in re.findall(r"\w+", question) if word.lower() not in FUNCTION_WORDS]
    return " ".join(words) or question
