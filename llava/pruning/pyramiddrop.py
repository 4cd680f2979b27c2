"""PyramidDrop: several cuts, each leaving the same share of what there was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from llava.pruning.base import register
from llava.pruning.decoder_pruner import (
    Cut,
    CutInputs,
    DecoderPruner,
    chosen_layers,
    highest,
    last_row_scores,
    parse_layers,
)
from llava.pruning.options import Range


@register
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(DecoderPruner):
    """At stage s keep the int(n lambda^s) visual tokens to which the last prompt token attends most.

    Paper: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction" (arXiv
    2410.17247; Xing et al., CVPR 2025). Inputs at a cut: attention (B, h, 1, n), the last prompt token's row in the
    layer to come, by that layer's norm, queries and keys at the current positions. Output: indices (B, c). After a cut
    the positions are counted anew; decoding goes on from each stage's own length.

    1. c_s = int(n lambda^s), always a share of the first n.
    2. a = mean over heads of softmax(q k^T / sqrt(c) + causal mask) in float32, over the picture's tokens.
    3. The c_s tokens with the largest a stay.

    Args:
        layers: after how many layers the cuts come, as "2/8/16". ``None`` is 2/8/16, scaled in decoders of fewer than
            32 layers.
        ratio: lambda. ``None`` solves it for ``keep_tokens`` on average over the layers; a number (0.5 with layers
            8/16/24 is the published default) decides by itself whatever ``keep_tokens`` says, as long as that is
            less than all.

    Deviations from the paper: (1) cuts after 2/8/16 layers, not 8/16/24, whose average cannot go below n / 4; the
    author proposes these for small budgets.

    Deviations from the released code: (1) ragged batches are supported with padding on either side; (2) each picture
    of a prompt has its own ranking, the code handles the first only; (3) prompts are never truncated after a cut;
    (4) equal scores go to the lower index; (5) patches that show only padding are not chosen unless
    ``exclude_padding`` is off.
    """

    name: ClassVar[str] = "pyramiddrop"
    watches: ClassVar[Literal["layer before", "layer after"]] = "layer after"
    renumbers: ClassVar[bool] = True

    layers: str | None = None
    ratio: Annotated[float, Range(0, 1, open=True)] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.layers is not None:
            parse_layers(self.layers)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"attention"})

    def choose_at(self, inputs: CutInputs, keep: int, make: int = 0) -> tuple[Tensor, Tensor | None]:
        return highest(last_row_scores(inputs.attention), keep, inputs.eligible), None

    def cut_layers(self, layers: int) -> list[int]:
        return chosen_layers(self.layers, [2, 8, 16], layers)

    def average_cuts(self, tokens: int, target: int, layers: int) -> list[Cut] | None:
        places = self.cut_layers(layers)
        ratio = solve_ratio(tokens, target, places, layers) if self.ratio is None else self.ratio
        return None if ratio is None else geometric_cuts(tokens, ratio, places)

    def nominal_cuts(self, tokens: int, target: int, layers: int) -> list[Cut]:
        """2m, m, m/2: the average over the layers after the first cut is then near m."""
        places = self.cut_layers(layers)
        if self.ratio is not None:
            return geometric_cuts(tokens, self.ratio, places)
        if len(places) == 1:
            return [Cut(places[0], target)]
        return [Cut(place, max(1, 2 * target // 2**stage)) for stage, place in enumerate(places)]


def geometric_cuts(tokens: int, ratio: float, places: list[int]) -> list[Cut]:
    """int(n lambda^s) tokens after the s-th place, s from 1, but never none."""
    return [Cut(place, max(1, int(tokens * ratio**stage))) for stage, place in enumerate(places, start=1)]


def solve_ratio(tokens: int, target: int, places: list[int], layers: int) -> float | None:
    """lambda with sum over stages of (K_{s+1} - K_s) n lambda^s = L m; ``None`` if even lambda = 0 gives more."""
    ends = [*places[1:], layers]

    def total(ratio: float) -> float:
        later = sum((end - place) * ratio**s for s, (place, end) in enumerate(zip(places, ends, strict=True), start=1))
        return tokens * (places[0] + later)

    if total(0.0) >= layers * target:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):  # the total grows with lambda: halve until a float cannot tell the ends apart
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) < layers * target else (low, middle)
    return high
