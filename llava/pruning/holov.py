"""HoloV: a budget for every region of the picture, and what is attended to within it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llava.pruning.attention_reader import AttentionReader
from llava.pruning.base import Pruner, register
from llava.pruning.crops import TINY, Crops, quotas, within_room
from llava.pruning.functional import lowest_ranked, stable_rank
from llava.pruning.inputs import PruningInputs
from llava.pruning.options import Count


@register
@dataclass(frozen=True, kw_only=True)
class HoloV(AttentionReader, Pruner):
    """Share the budget among crops of the picture, and keep in each what is attended to and like some of the crop.

    Paper: "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention" (arXiv
    2510.02912). Inputs: features H (B, n, d) and class_attention (B, heads, n). Output: indices (B, m).

    1. a = mean over heads of the class token's attention. The n tokens are cut into C crops.
    2. In a crop of M tokens: mu_i = mean, var_i = mean square deviation of token i's cosines with the M - 1 others.
    3. h = a + (mean of a / mean of var, over the crop) var.
    4. A crop's weight is its share w_c of the sum over crops of the mean of h. It keeps floor(w_c m) tokens, the crops
       with the largest w one more each until m are given; what a crop has no room for goes to crops that have some, in
       proportion to w_c x room, rounded down, and again one each.
    5. In each crop keep those with the largest h.

    Args:
        crops: C; ``None`` takes 16, and 4 for 16 tokens or fewer, where most of 16 crops would have none or one.
        layout: "runs" of consecutive tokens, as in the released code: of 576 tokens, one row and a half each;
            "squares": sqrt(C) x sqrt(C) rectangles, for C a square and tokens on a square grid.
        class_token: see `AttentionReader`.

    Diversity decides within a crop alone: the factor of step 3 makes the mean of h twice that of a in every crop, so
    that quotas are those of the attention (of the paper's formula, too).

    Deviations from the paper: (1) crops are runs of tokens, as in the released code, unless ``layout="squares"``;
    (2) tokens that were dropped are not fetched back inside the decoder.

    Deviations from the released code: (1) a crop keeps the tokens with the largest h, the code's those with the
    largest a; (2) what a crop has no room for is handed on, where the code appends zero vectors; (3) var leaves a
    token's similarity with itself out; (4) tokens stand in raster order; (5) padding takes no part unless
    ``exclude_padding=False``. See `holov_release` for the code's own choice.
    """

    name: ClassVar[str] = "holov"

    crops: Count | None = None
    layout: Literal["runs", "squares"] = "runs"

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        attention = self.attention(inputs)
        crops = Crops.of(inputs, min(self.crops or (16 if keep > 16 else 4), inputs.tokens), self.layout)
        within, variance = crops.gather(attention), crops.variance(inputs.features)
        ratio = crops.mean(within) / (crops.mean(variance) + TINY)
        score = within + ratio[:, :, None] * variance
        mean = crops.mean(score)
        weight = mean / mean.sum(-1, keepdim=True).clamp_min(torch.finfo(mean.dtype).tiny)
        quota = within_room(quotas(weight, keep), weight, crops.real.sum(-1), crops.real.shape[-1])
        member = crops.scatter(crops.best(score, quota))
        rank = stable_rank(crops.scatter(score), descending=True)
        return lowest_ranked(rank, keep, member), {"attention": attention, "quota": quota}
