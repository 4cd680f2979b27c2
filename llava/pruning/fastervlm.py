"""FasterVLM: what the vision encoder itself attends to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llava.pruning.attention_reader import AttentionReader
from llava.pruning.base import Pruner, register
from llava.pruning.functional import lowest_ranked, stable_rank
from llava.pruning.inputs import PruningInputs


@register
@dataclass(frozen=True, kw_only=True)
class FasterVLM(AttentionReader, Pruner):
    """Keep the m patches that the encoder's class token attends to most.

    Paper: "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster" (arXiv
    2412.01818, version 1). Input: class_attention (B, heads, n). Output: indices (B, m). The same as `vispruner` with
    ``important=1``, and as the dominant patches of `visionzip`.

    1. a_j = mean over heads of the class token's attention to patch j, in the last encoder layer that is read.
    2. Keep the m largest.

    Args:
        class_token: see `AttentionReader`.

    Deviations from the paper: none.

    Deviations from the released code: (1) ties go to the lowest index; (2) padding cannot be chosen unless
    ``exclude_padding=False``; (3) tiles of LLaVA-NeXT are merged as they always are.
    """

    name: ClassVar[str] = "fastervlm"

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        attention = self.attention(inputs)
        return lowest_ranked(stable_rank(attention, descending=True), keep, inputs.valid), {"attention": attention}
