"""HAWK: the tokens to which the heads of the first attention point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.base import Pruner, register
from llava.pruning.functional import lowest_ranked, stable_rank
from llava.pruning.inputs import PruningInputs
from llava.pruning.question_reader import QuestionReader, Source


@register
@dataclass(frozen=True, kw_only=True)
class HAWK(QuestionReader, Pruner):
    """Keep the m tokens most relevant to the question, by the heads of the language model's first attention.

    Paper: "HAWK: Head Importance-Aware Visual Token Pruning in Multimodal Models" (arXiv 2604.07812). Input: relevance
    (B, n), which `llava.relevance.language.unit_products` computes. Output: indices (B, m).

    1. u_hj = mean over the question's words i of q_hi . k_hj / sqrt(d_h), head h of the first attention, without
       rotary embedding.
    2. r_j = sum over h of w_h u_hj / norm over j of u_hj.
    3. Keep the m tokens with the largest r.

    Args:
        relevance: "hawk", or another source (see `QuestionReader`), by which alone the tokens are then ranked: a
            control for the methods that also look for variety.
        heads: file with the weights w_h; ``None`` weighs all heads the same. Weights are those of one checkpoint.

    The order for m tokens begins with that for fewer.

    Deviations from the paper: (1) all heads weigh the same unless a file is given, where the paper measures each
    head's weight by leaving it out; (2) its code was not read: steps 1 and 2 follow a description of it.

    Deviations from the released code: (1) not compared with it; (2) ties go to the lowest index; (3) padding cannot be
    chosen unless ``exclude_padding=False``.
    """

    name: ClassVar[str] = "hawk"

    relevance: Source = "hawk"

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        relevance = self.raw_relevance(inputs).nan_to_num(nan=-torch.inf)
        return lowest_ranked(stable_rank(relevance, descending=True), keep, inputs.valid), {"relevance": relevance}
