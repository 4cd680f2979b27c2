"""FastV: one cut early in the decoder, by the attention of the last prompt token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llava.pruning.base import register
from llava.pruning.decoder_pruner import CutInputs, SingleCut, highest, last_row_scores


@register
@dataclass(frozen=True, kw_only=True)
class FastV(SingleCut):
    """After K layers keep the R visual tokens to which the last prompt token attends most.

    Paper: "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language
    Models" (arXiv 2403.06764; Chen et al., ECCV 2024). Inputs at the cut: attention (B, h, 1, n), the last prompt
    token's row in layer K - 1. Output: indices (B, R). Kept tokens keep their positions; decoding goes on from the
    full prompt's length.

    1. a_j = mean over heads of the row at visual token j.
    2. The R tokens with the largest a stay, R = (L m - K n) / (L - K) for m tokens on average over L layers.

    Args:
        layer: K, how many layers see all tokens; see `SingleCut`.

    Deviations from the paper: (1) the paper averages the attention that a token receives over all queries; like the
    released code we read the last query's row alone.

    Deviations from the released code: (1) the row is computed in float32 and beside the fast kernel, from the layer's
    own queries and keys; (2) each prompt of a batch, and each of its pictures, has its own ranking; (3) equal scores
    go to the lower index; (4) the set is chosen once, at prefill; (5) patches that show only padding are not chosen
    unless ``exclude_padding`` is off.
    """

    name: ClassVar[str] = "fastv"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"attention"})

    def choose_at(self, inputs: CutInputs, keep: int, make: int = 0) -> tuple[Tensor, Tensor | None]:
        return highest(last_row_scores(inputs.attention), keep, inputs.eligible), None
