"""HoloV as its published code computes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from llava.pruning.attention_reader import AttentionReader
from llava.pruning.base import Pruner, register
from llava.pruning.crops import TINY, Crops, quotas
from llava.pruning.functional import lowest_ranked, stable_rank
from llava.pruning.inputs import PruningInputs
from llava.pruning.options import Count, Range

SCALE = 1000.0  # of the attention, in the code


@register
@dataclass(frozen=True, kw_only=True)
class HoloVRelease(AttentionReader, Pruner):
    """Share the budget among bands of the picture by their mean attention, and keep in each what is attended to most.

    Paper: "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention" (arXiv
    2510.02912), whose released code this follows. Inputs: features H (B, n, d) and class_attention (B, heads, n).
    Output: indices (B, m). See `holov` for the method that the paper describes.

    1. a = 1000 x mean over heads of the class token's attention. Crops are C runs of consecutive tokens.
    2. In a crop of M tokens, with S the cosines and 0 on its diagonal: mu_i = sum of S_ij / (M - 1); var_i = sum over
       all j, also i, of (S_ij - mu_i)^2 / (M - 1).
    3. h = a + ``alpha`` (mean of a / mean of var, over the crop) var.
    4. Each crop keeps floor(w_c m) tokens, w_c its share of the sum over crops of the mean of h; what is missing to m
       goes one each to the crops with the largest w. A crop that has fewer tokens keeps them all.
    5. In each crop keep those with the largest a.

    Args:
        crops: C.
        alpha: weight of the diversity, which step 3 cancels: in every crop the mean of h is 1 + ``alpha`` times that
            of a.
        class_token: see `AttentionReader`.

    Deviations from the paper: (1) h decides nothing within a crop; (2) a crop's surplus is not handed on; (3) nothing
    is fetched back inside the decoder.

    Deviations from the released code: (1) places for which the code appends zero vectors, because a crop had fewer
    tokens than its quota, go to the tokens with the largest a; (2) tokens stand in raster order; (3) padding takes no
    part unless ``exclude_padding=False``; (4) tiles of LLaVA-NeXT are selected one by one unless ``scope=global``.
    """

    name: ClassVar[str] = "holov_release"

    crops: Count = 16
    alpha: Annotated[float, Range(0)] = 0.09

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        attention = self.attention(inputs)
        crops = Crops.of(inputs, min(self.crops, inputs.tokens))
        within, variance = SCALE * crops.gather(attention), crops.variance(inputs.features, itself=True)
        ratio = crops.mean(within) / (crops.mean(variance) + TINY)
        mean = crops.mean(within + self.alpha * ratio[:, :, None] * variance)
        asked = quotas(mean / (mean.sum(-1, keepdim=True) + TINY), keep)
        quota = torch.minimum(asked, crops.real.sum(-1))
        member = crops.scatter(crops.best(within, quota))
        rank = stable_rank(crops.scatter(within), descending=True)
        details = {"attention": attention, "crop_score": mean, "asked": asked, "quota": quota, "in_quota": member}
        return lowest_ranked(rank, keep, member), details
