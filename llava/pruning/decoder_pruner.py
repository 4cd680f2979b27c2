"""What the methods inside the decoder share: cuts between layers, budgets over depth, rows of attention.

All visual tokens enter the decoder. A cut after K layers keeps some of those that are left, by what a layer says about
them; the layers from K on work on fewer tokens. A method states its cuts beforehand, from numbers alone, and chooses
at each of them by a pure function; the mechanism that shortens hidden states is llava/decoder/attachment.py.

"m tokens on average" is the mean over layers of the number of visual tokens entering each.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llava.pruning.base import Method, Place
from llava.pruning.functional import lowest_ranked, stable_rank, without_autocast, working_dtype
from llava.pruning.options import Count

REFERENCE_LAYERS = 32  # the depth for which the published layers of the cuts are meant


@dataclass(frozen=True)
class Cut:
    """After ``after`` layers keep at most ``keep`` of the visual tokens; ``merge`` allows making tokens of others."""

    after: int
    keep: int
    merge: bool = True


@dataclass(frozen=True)
class CutInputs:
    """What the decoder says at a cut about the n visual tokens that one picture of each of B prompts still has.

    A method names the fields it reads in ``reads``; the others are ``None``.

    Args:
        attention: (B, h, q, n) probabilities of the q query rows in the watched layer, over all keys of the prompt.
        raters: (B, q) bool, the query rows that count.
        position_products: (B, q, n) scaled products of the query rows and the tokens, before any softmax, if queries
            and keys were ones that rotary has turned to their positions.
        keys: (B, n, k) keys of the watched layer after rotary, all heads side by side.
        text_keys: (B, t, k) those of the text tokens after the picture.
        hidden: (B, n, d) hidden states at the cut.
        final: (B, n, d) the same through the decoder's last norm.
        text_final: (B, t, d) likewise, of the text tokens after the picture.
        eligible: (B, n) bool, False at tokens that must not be chosen (padding); ``None`` means that all may be.
        able: how many are eligible in each of the B, known without looking.
    """

    attention: Tensor | None = None
    raters: Tensor | None = None
    position_products: Tensor | None = None
    keys: Tensor | None = None
    text_keys: Tensor | None = None
    hidden: Tensor | None = None
    final: Tensor | None = None
    text_final: Tensor | None = None
    eligible: Tensor | None = None
    able: int = 0


@dataclass(frozen=True, kw_only=True)
class DecoderPruner(Method):
    """Base of the methods inside the decoder.

    A picture's visual tokens are ranked together, whatever views they come from and newline tokens among them (as all
    published code does); its budget is the count that any other method would keep of it.

    Args:
        budget: "average" makes ``keep_tokens`` the mean over layers, where that can be reached; elsewhere, and with
            "nominal", it is the number of tokens at the cut.
    """

    place: ClassVar[Place] = "decoder"
    watches: ClassVar[Literal["layer before", "layer after"]]  # whose attention and keys the method reads at a cut
    queries: ClassVar[Literal["last", "text"]] = "last"  # rows: the last prompt token, or the text after the picture
    renumbers: ClassVar[bool] = False  # are positions counted anew after a cut?

    budget: Literal["average", "nominal"] = "average"

    @property
    @abstractmethod
    def reads(self) -> frozenset[str]:
        """Names of the `CutInputs` fields that `choose_at` reads."""

    @abstractmethod
    def choose_at(self, inputs: CutInputs, keep: int, make: int = 0) -> tuple[Tensor, Tensor | None]:
        """Ascending indices (B, keep) of the kept tokens, and ``make`` tokens (B, make, d) made of the others."""

    @abstractmethod
    def cut_layers(self, layers: int) -> list[int]:
        """After how many layers the cuts come in a decoder of ``layers`` layers."""

    @abstractmethod
    def average_cuts(self, tokens: int, target: int, layers: int) -> list[Cut] | None:
        """Cuts under which n = ``tokens`` average ``target`` over the layers; ``None`` where there are none."""

    @abstractmethod
    def nominal_cuts(self, tokens: int, target: int, layers: int) -> list[Cut]:
        """Cuts for ``target`` tokens at the cut, whatever that averages to."""

    def kept(self, keep: int, able: int) -> int:
        """How many of ``able`` tokens a cut for ``keep`` leaves."""
        return min(keep, able)

    def made(self, dropped: int) -> int:
        """How many tokens a cut makes of ``dropped`` ones."""
        return 0

    def rate(self, visual: Tensor, text: Tensor) -> Tensor | None:
        """Which text tokens are raters (B, t), from embeddings (B, n, d) and (B, t, d); ``None``: all rows count."""
        return None

    def cuts(self, tokens: int, target: int, layers: int) -> list[Cut]:
        """The cuts for a budget of ``target`` of ``tokens`` tokens, known before any computation.

        Warns where the budget is to be an average and cannot be; says the floor and what is done instead.
        """
        if target >= tokens:
            return []
        if self.budget == "average":
            cuts = self.average_cuts(tokens, target, layers)
            if cuts is not None:
                return cuts
        cuts = self.nominal_cuts(tokens, target, layers)
        if self.budget == "average":
            first = cuts[0].after
            counts = self.counts_of(cuts, tokens, layers)
            kept, places = ("/".join(str(getattr(cut, part)) for cut in cuts) for part in ("keep", "after"))
            floor = first * tokens / layers
            reason = "there is no schedule for that"
            if floor >= target - 1:
                reason = f"the floor is {floor:.1f}: its first cut comes after {first} of {layers} layers"
            warnings.warn(
                f"pruner '{self.name}' cannot average {target} of {tokens} tokens over {layers} layers ({reason}): it "
                f"keeps {kept} after {places} layers, {sum(counts) / layers:.1f} on average",
                stacklevel=1,  # one place, so that the same text comes once
            )
        return cuts

    def counts(self, tokens: int, target: int, layers: int, eligible: int | None = None) -> list[int]:
        """Visual tokens entering each layer, known before any computation; ``eligible`` of them may be chosen."""
        return self.counts_of(self.cuts(tokens, target, layers), tokens, layers, eligible)

    def counts_of(self, cuts: Sequence[Cut], tokens: int, layers: int, eligible: int | None = None) -> list[int]:
        """Visual tokens entering each layer under given cuts."""
        current, able = tokens, tokens if eligible is None else eligible
        cut_before = {cut.after: cut for cut in cuts}
        counts = []
        for layer in range(layers):
            if layer in cut_before:
                current = able = sum(self.split(cut_before[layer], able))
            counts.append(current)
        return counts

    def split(self, cut: Cut, able: int) -> tuple[int, int]:
        """How many of ``able`` tokens a cut keeps, and how many it makes of the others."""
        kept = self.kept(cut.keep, able)
        return kept, self.made(able - kept) if cut.merge else 0


@dataclass(frozen=True, kw_only=True)
class SingleCut(DecoderPruner):
    """Base of the methods that drop tokens once: R of n are kept after K layers.

    R = (L m - K n) / (L - K), rounded, for m tokens on average over L layers.

    Args:
        layer: K, how many layers see all tokens. ``None`` is the published 2 in decoders of 32 layers and more; in
            shallower ones 2 L / 32, at least 1.
    """

    watches: ClassVar[Literal["layer before", "layer after"]] = "layer before"

    layer: Count | None = None

    def cut_layers(self, layers: int) -> list[int]:
        return chosen_layers(self.layer, [2], layers)

    def average_cuts(self, tokens: int, target: int, layers: int) -> list[Cut] | None:
        after = self.cut_layers(layers)[0]
        keep = int((layers * target - after * tokens) / (layers - after) + 0.5)
        return [Cut(after, keep)] if keep >= 1 else None

    def nominal_cuts(self, tokens: int, target: int, layers: int) -> list[Cut]:
        return [Cut(self.cut_layers(layers)[0], target)]


def tokens_per_layer(pruner: Method | None, tokens: int, layers: int) -> list[int]:
    """Visual tokens of one view entering each layer under any method; ``None`` keeps all."""
    if isinstance(pruner, DecoderPruner):
        return pruner.counts(tokens, pruner.count(tokens), layers)
    return [tokens if pruner is None else pruner.count(tokens)] * layers


def scaled_layers(after: Sequence[int], layers: int) -> list[int]:
    """Where cuts that are meant for 32 layers go in a decoder of ``layers`` layers.

    Deeper decoders keep them, as the 13B settings do. In shallower ones a cut after K layers moves to K * layers / 32,
    rounded; the first comes after at least one layer, each at least one layer after the one before, and those that
    would come after the last layer are left out.
    """
    if layers < 2:
        raise ValueError(f"a decoder of {layers} layer has no place between layers to drop tokens at")
    places: list[int] = []
    for cut in after:
        place = cut if layers >= REFERENCE_LAYERS else int(cut * layers / REFERENCE_LAYERS + 0.5)
        place = max(place, places[-1] + 1 if places else 1)
        if place < layers:
            places.append(place)
    return places


def chosen_layers(given: str | int | None, published: Sequence[int], layers: int) -> list[int]:
    """Where cuts go: as an option gives them, "2/8/16", or as published for 32 layers where it is ``None``.

    Raises:
        ValueError: those given do not fit a decoder of ``layers`` layers.
    """
    if given is None:
        return scaled_layers(published, layers)
    places = parse_layers(str(given))
    if places[-1] >= layers:
        raise ValueError(f"a cut after {places[-1]} layers does not fit a decoder of {layers}")
    return places


def parse_layers(text: str) -> list[int]:
    """Read "2/8/16": ascending numbers of layers, from 1. Raises ValueError."""
    try:
        places = [int(part) for part in text.split("/")]
    except ValueError:
        places = []
    if not places or places[0] < 1 or places != sorted(set(places)):
        raise ValueError(f"layers of cuts are written like 2/8/16, ascending from 1; got {text!r}")
    return places


# --- mathematics ---------------------------------------------------------------------------------------------------


@without_autocast()
def attention_rows(queries: Tensor, keys: Tensor, scaling: float, places: Sequence[int] | None = None) -> Tensor:
    """Some rows of causal attention: softmax over all keys of q k^T * scaling, in float32.

    Args:
        queries: (B, h, q, c) after rotary.
        keys: (B, h / g, N, c) after rotary; g query heads share a key head.
        places: place of each query row among the keys; it sees the keys up to there. ``None``: all rows see all keys.

    Returns:
        (B, h, q, N) float32 (float64 for float64 input).
    """
    dtype = working_dtype(queries.dtype)
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    logits = queries.to(dtype) @ keys.to(dtype).mT * scaling
    if places is not None:
        columns = torch.arange(keys.shape[2], device=keys.device)
        last_seen = torch.tensor(places).to(keys.device, non_blocking=True)
        logits = logits.masked_fill(columns > last_seen[:, None], -torch.inf)
    return logits.softmax(-1)


def last_row_scores(attention: Tensor) -> Tensor:
    """Attention that each token gets from the last prompt token, mean over heads: (B, h, 1, n) -> (B, n)."""
    return attention[:, :, -1].mean(1)


def highest(scores: Tensor, keep: int, eligible: Tensor | None = None) -> Tensor:
    """Ascending indices (B, keep) of the largest of ``scores`` (B, n), lowest index first among equals."""
    if eligible is not None:
        scores = scores.masked_fill(~eligible, -torch.inf)
    return lowest_ranked(stable_rank(scores, descending=True), keep)
