"""DART: keep a few pivots, and the tokens that resemble them least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llava.pruning.base import register
from llava.pruning.decoder_pruner import CutInputs, SingleCut
from llava.pruning.functional import cosine_similarity, stable_rank, working_dtype
from llava.pruning.options import Count


@register
@dataclass(frozen=True, kw_only=True)
class DART(SingleCut):
    """After K layers keep pivot tokens and, for each pivot in turn, the visual tokens least similar to it.

    Paper: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More" (arXiv
    2502.11494; Wen et al., EMNLP 2025). Inputs at the cut: keys (B, n, k) and text_keys (B, t, k) of layer K - 1, and
    final (B, n, d) and text_final (B, t, d), the hidden states through the decoder's last norm. Output: indices (B,
    R), R as in `SingleCut`. Kept tokens keep their positions. No attention is computed.

    1. Pivots: the 4 visual tokens and the 4 text tokens after the picture whose keys have the largest L1 norm.
    2. For each pivot, visual ones first, each by falling norm: of the tokens not yet taken, those with the smallest
       cosine similarity to it, (R - 4) / 8 of them.

    Args:
        layer: K, how many layers see all tokens; see `SingleCut`.
        pivots: how many of each kind.

    Deviations from the paper: none known.

    Deviations from the released code, of which a public port was read: (1) the count is exactly R: what (R - 4) / 8
    leaves over goes to the first pivots, one each (the port keeps 4 + 8 floor(m / 8), 132 for m = 128); (2) the order
    of the pivots is fixed, the port's is that of a hash set, so that R = 132 does not give quite its set: on a
    structured input 118 of 132 tokens are common; (3) a prompt with fewer text tokens after the picture has fewer text
    pivots; (4) every picture of a batch is treated by itself.
    """

    name: ClassVar[str] = "dart"
    queries: ClassVar[Literal["last", "text"]] = "text"

    pivots: Count = 4

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"keys", "text_keys", "final", "text_final"})

    def choose_at(self, inputs: CutInputs, keep: int, make: int = 0) -> tuple[Tensor, Tensor | None]:
        visual, text = pivot_tokens(inputs.keys, inputs.text_keys, self.pivots, inputs.eligible)
        chosen = unlike_pivots(inputs.final, visual[:, :keep], inputs.text_final, text, keep, inputs.eligible)
        return chosen, None


def pivot_tokens(
    keys: Tensor, text_keys: Tensor, pivots: int, eligible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Visual (B, p) and text (B, p or fewer) tokens with the largest L1 norm of their keys, by falling norm."""
    norms = [side.to(working_dtype(side.dtype)).abs().sum(-1) for side in (keys, text_keys)]
    if eligible is not None:
        norms[0] = norms[0].masked_fill(~eligible, -torch.inf)
    visual, text = (norm.argsort(dim=-1, descending=True, stable=True)[:, :pivots] for norm in norms)
    return visual, text


def unlike_pivots(
    features: Tensor,
    visual_pivots: Tensor,
    text_features: Tensor,
    text_pivots: Tensor,
    keep: int,
    eligible: Tensor | None = None,
) -> Tensor:
    """Pivots and the tokens least similar to each in turn.

    Args:
        features: (B, n, d) visual tokens.
        visual_pivots: (B, p) indices into them, p <= keep; they stay.
        text_features: (B, t, d).
        text_pivots: (B, u) indices into those.

    Returns:
        (B, keep) ascending indices.
    """
    width = features.shape[-1]
    pivots = torch.cat(
        [
            features.gather(1, visual_pivots[:, :, None].expand(-1, -1, width)),
            text_features.gather(1, text_pivots[:, :, None].expand(-1, -1, width)),
        ],
        dim=1,
    )
    similarity = cosine_similarity(features, pivots)  # (B, n, p + u)
    if eligible is not None:
        similarity = similarity.masked_fill(~eligible[:, :, None], torch.inf)
    taken = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device).scatter(1, visual_pivots, True)
    left, count = keep - visual_pivots.shape[1], pivots.shape[1]
    for pivot in range(count):
        share = left // count + (pivot < left % count)
        rank = stable_rank(similarity[:, :, pivot].masked_fill(taken, torch.inf))
        taken = taken | ((rank < share) & ~taken)
    order = (~taken).int().argsort(dim=-1, stable=True)
    return order[:, :keep].sort(dim=-1).values
