"""DivPrune: the tokens that are farthest from each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from llava.pruning.base import Pruner, register
from llava.pruning.functional import cosine_similarity, lowest_ranked, max_min_rank
from llava.pruning.inputs import PruningInputs


@register
@dataclass(frozen=True, kw_only=True)
class DivPrune(Pruner):
    """Keep the m tokens that lie farthest apart, chosen one by one; the question plays no part.

    Paper: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models" (arXiv 2503.02175). Input:
    features H (B, n, d). Output: indices (B, m).

    1. D_ij = 1 - cos(h_i, h_j).
    2. The first token is the one whose nearest other is farthest.
    3. Every next one has the largest distance to the nearest chosen token.

    Args:
        scope: beside "view" and "global", "official": one selection over the sequence that the language model would
            read of a picture, its newline tokens and a square's border among the candidates and in the count, which
            is ``keep_tokens`` times the views, or the share of the sequence rounded half to even.

    Deviations from the paper: none.

    Deviations from the released code, all undone by ``scope="official"``: (1) selection is per view, so that every
    view gives m tokens; (2) newline tokens are no candidates, nor is padding; (3) a share is rounded half up. And
    always: (4) distances are computed in float32, the code's in the model's precision; (5) chosen tokens are masked,
    so that no duplicate of one can be chosen in its place.
    """

    name: ClassVar[str] = "divprune"

    scope: Literal["view", "global", "official"] = "view"

    def count(self, tokens: int) -> int:
        if self.scope == "official" and isinstance(self.keep_tokens, float):
            return max(1, round(self.keep_tokens * tokens))  # Python rounds half to even
        return super().count(tokens)

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        rank = max_min_rank(1 - cosine_similarity(inputs.features), keep, inputs.valid)
        return lowest_ranked(rank, keep), {"order": rank}
