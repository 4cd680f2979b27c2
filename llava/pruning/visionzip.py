"""VisionZip: what the vision encoder itself attends to, and the rest merged into a few tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from llava.pruning.base import TokenMaker, register
from llava.pruning.functional import cosine_similarity, lowest_ranked, stable_rank
from llava.pruning.inputs import PruningInputs, Selection
from llava.pruning.options import Range


@register
@dataclass(frozen=True, kw_only=True)
class VisionZip(TokenMaker):
    """Keep the class token and the patches it attends to most (dominant), and merge the others (contextual).

    Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models" (arXiv 2412.04467). Inputs, all of
    the last encoder layer that is read: class_attention (B, heads, n), key_metric (B, n, w), encoder_features (B, n,
    c) and class_features (B, c). Output: indices (B, m - 1 - N) and the class token with N contextual tokens (B, 1 +
    N, c), before the projector.

    1. a_j = sum over heads of the class token's attention to patch j.
    2. Dominant: the m - 1 - N patches with the largest a, and the class token.
    3. Targets: of the other patches in raster order every step-th, the first N; step = max(1, others // N).
    4. Every other patch left joins the target whose key has the largest cosine with its own.
    5. contextual = target + mean of those that joined it.

    Args:
        contextual: N; ``None`` takes m * 10 // 64, at least 1, which are the published splits (54 + 10 of 64).
        mean: average over the target and those that joined it, where the code's sum about doubles the norm.
        class_token: False is for encoders without one (SigLIP): patches are ranked by the mean attention that they
            receive, and dominant ones take the class token's place.

    Deviations from the paper: (1) contextual tokens are the sum of step 5, as in the released code.

    Deviations from the released code: (1) padding takes no part unless ``exclude_padding=False``; (2) ties go to the
    lowest index; (3) tiles need not form a 2 x 2 grid; (4) the attention of the class token alone is computed, in
    float32, beside the encoder's own kernel.
    """

    name: ClassVar[str] = "visionzip"
    place: ClassVar[str] = "encoder"
    floor: ClassVar[int] = 3
    below_floor: ClassVar[str] = "no contextual token, and with 1 the class token alone"

    contextual: Annotated[int, Range(0)] | None = None
    mean: bool = False
    class_token: bool = True

    @property
    def needs(self) -> frozenset[str]:
        attention = {"class_attention", "class_features"} if self.class_token else {"mean_attention"}
        return frozenset({"encoder_features", "key_metric"} | attention)

    def count_contextual(self, keep: int) -> int:
        """N, so that of ``keep`` tokens at least one is a dominant patch where there is room for it."""
        asked = max(keep * 10 // 64, 1) if self.contextual is None else self.contextual
        return max(min(asked, keep - self.class_token - 1), 0)

    def count_made(self, keep: int) -> int:
        return self.class_token + self.count_contextual(keep)

    def kept_and_made(self, keep: int, eligible: Tensor) -> tuple[Tensor, Tensor]:
        patches, contextual = eligible.sum(-1), self.count_contextual(keep)
        kept = patches.clamp_max(keep - self.class_token - contextual)
        return kept, (patches - kept).clamp_max(contextual) + self.class_token * (patches > 0)

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        attention = inputs.class_attention if self.class_token else inputs.mean_attention
        scores = attention.float().sum(1)
        return lowest_ranked(stable_rank(scores, descending=True), keep, inputs.valid), {"attention": scores}

    def make(self, inputs: PruningInputs, kept: Selection, count: int) -> Selection:
        parts = [inputs.class_features[:, None]] if self.class_token else []
        if count > self.class_token:
            rest = ~kept.mask if inputs.valid is None else ~kept.mask & inputs.valid
            parts.append(self.merge(inputs, rest, count - self.class_token))
        return dataclasses.replace(kept, made=torch.cat(parts, dim=1), leading=int(self.class_token))

    def merge(self, inputs: PruningInputs, rest: Tensor, count: int) -> Tensor:
        """The patches of ``rest`` (B, n) bool, merged into ``count`` contextual tokens (B, count, c)."""
        place = rest.cumsum(-1) - 1
        step = (rest.sum(-1, keepdim=True) // count).clamp_min(1)
        is_target = rest & (place % step == 0) & (place < step * count)
        targets = (~is_target).int().argsort(dim=-1, stable=True)[:, :count]  # (B, count), in raster order
        real = is_target.gather(1, targets)  # too few patches are left in a view that is nearly all padding

        def of_targets(values: Tensor) -> Tensor:
            return values.gather(1, targets[:, :, None].expand(-1, -1, values.shape[-1]))

        similarity = cosine_similarity(inputs.key_metric, of_targets(inputs.key_metric))  # (B, n, count)
        nearest = similarity.masked_fill(~real[:, None, :], -torch.inf).argmax(-1, keepdim=True)
        joins = torch.zeros_like(similarity).scatter_(-1, nearest, 1.0) * (rest & ~is_target)[:, :, None]
        members = joins.sum(1)[:, :, None]  # (B, count, 1)
        features = inputs.encoder_features.float()
        total = joins.mT @ features
        if self.mean:
            merged = (of_targets(features) + total) / (1 + members)
        else:
            merged = of_targets(features) + total / members.clamp_min(1)
        return merged.to(inputs.encoder_features.dtype)
