"""VisPruner: some tokens that the vision encoder attends to, and some that do not repeat each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from llava.pruning.attention_reader import AttentionReader
from llava.pruning.base import Pruner, register
from llava.pruning.functional import cosine_similarity, lowest_ranked, stable_rank
from llava.pruning.inputs import PruningInputs
from llava.pruning.options import Count, Range


@register
@dataclass(frozen=True, kw_only=True)
class VisPruner(AttentionReader, Pruner):
    """Keep the patches that the class token attends to most, and of the others those that repeat each other least.

    Paper: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs" (arXiv
    2412.01818). Inputs: encoder_features V (B, n, c) and class_attention (B, heads, n). Output: indices (B, m).

    1. a = mean over heads of the class token's attention. The floor(``important`` m) patches with the largest a stay.
    2. The others, by falling a, are a list that has to shrink to the m - floor(``important`` m) that are missing.
       While it is too long: E are its even places, O its odd ones; the ``step`` patches of E that have the largest
       cosine with any of O are dropped, never more than needed; the list goes on as what is left of E, by falling
       cosine, and then O.
    3. What is left of the list stays.

    Args:
        important: share of the budget that attention decides; 1 is `fastervlm`.
        step: how many are dropped at a time.
        class_token: see `AttentionReader`.

    Places in the list decide who is compared with whom, so that two nearly equal attentions that are swapped change
    the choice: cosines are computed in float64, and half precision features do not give the tokens of float32 ones.

    Deviations from the paper: none.

    Deviations from the released code: (1) a list of odd length, on which the code fails, has one patch more in E;
    (2) padding takes no part unless ``exclude_padding=False``; (3) ties go to the lowest index.
    """

    name: ClassVar[str] = "vispruner"

    important: Annotated[float, Range(0, 1)] = 0.5
    step: Count = 8

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"encoder_features"}

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        attention = self.attention(inputs)
        important, tokens = int(keep * self.important), inputs.tokens
        shown = attention if inputs.valid is None else attention.masked_fill(~inputs.valid, -torch.inf)
        rank = stable_rank(shown, descending=True)
        chosen = rank < important
        if important < keep:
            places = rank.argsort(dim=-1)[:, important:]
            count = torch.full_like(rank[:, 0], tokens) if inputs.valid is None else inputs.valid.sum(-1)
            left = least_repeated(
                cosine_similarity(inputs.encoder_features.double()),
                places,
                count - important,
                keep - important,
                self.step,
            )
            chosen = chosen.scatter(1, left, True)
        member = chosen if inputs.valid is None else chosen & inputs.valid
        return lowest_ranked(rank, keep, member), {"attention": attention, "important": rank < important}


def least_repeated(similarity: Tensor, places: Tensor, length: Tensor, keep: int, step: int) -> Tensor:
    """Step 2 of `VisPruner`: (B, keep) tokens that are left of a list.

    Args:
        similarity: (B, n, n) cosines.
        places: (B, l) int64 tokens in the list's order.
        length: (B,) int64, how many of a view's list take part, from the first; the others come last, always.
    """
    n = similarity.shape[-1]
    pairs = similarity.flatten(1)
    while places.shape[1] > keep:
        size = places.shape[1]
        drop = min(step, size - keep)
        live = torch.arange(size, device=places.device) < length[:, None]
        even, odd, live_even, live_odd = places[:, 0::2], places[:, 1::2], live[:, 0::2], live[:, 1::2]
        block = pairs.gather(1, (even[:, :, None] * n + odd[:, None]).flatten(1)).unflatten(1, (even.shape[1], -1))
        likeness = block.masked_fill(~live_odd[:, None], -torch.inf).amax(-1)
        fallen = stable_rank(likeness.masked_fill(~live_even, -torch.inf), descending=True)  # place by falling cosine
        dropped = (length - keep).clamp(0, drop)
        gone = torch.cat([~live_even | (fallen < dropped[:, None]), ~live_odd], dim=1)
        place = torch.cat([fallen, even.shape[1] + torch.arange(odd.shape[1], device=places.device).expand_as(odd)], 1)
        order = (place + gone * size).argsort(dim=-1)[:, : size - drop]
        places = torch.cat([even, odd], dim=1).gather(1, order)
        length = length - dropped
    return places
