"""What one picture or video gives to the language model: which tokens, in which order, chosen how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava.layout.views import ViewLayout
from llava.pruning import Selection
from llava.relevance.policy import Choice


@dataclass(frozen=True)
class KeptTokens:
    """What one picture gives to the language model.

    Args:
        sequence: (t,) int64 flat patch numbers in reading order, negative at newline tokens; numbers from V * n on
            are tokens that the method made, or the model where nothing was pruned (see layout/views.py).
        layout: the picture's unpruned layout.
        patches: number of visual tokens in ``sequence``, kept and made, newlines not counted.
        selections: the method's answer about the picture; one answer for each view that gives tokens, in their order,
            where their budgets differ; none if nothing was pruned before the decoder.
        made: (V, k, d) the method's own tokens, projected; ``None`` if it makes none.
        per_layer: visual tokens, newlines among them, that enter each layer of the decoder, where a method inside it
            drops some; ``None`` where all layers see ``sequence``.
        recycled: how many tokens a method inside the decoder has made of dropped ones; they are in the prompt behind
            the picture's kept tokens, not in ``sequence``.
        relevance: where the method read the question, and why there; ``None`` if it reads none.
    """

    sequence: Tensor
    layout: ViewLayout
    patches: int
    selections: tuple[Selection, ...] = ()
    made: Tensor | None = None
    per_layer: tuple[int, ...] | None = None
    recycled: int = 0
    relevance: Choice | None = None

    @property
    def is_pruned(self) -> bool:
        return bool(self.selections) or self.per_layer is not None

    @property
    def selection(self) -> Selection | None:
        """The method's answer; ``None`` if nothing was pruned before the decoder.

        Raises:
            ValueError: views had different budgets, and answers of their own.
        """
        if len(self.selections) > 1:
            raise ValueError("the views of this picture had different budgets: read `selections`")
        return self.selections[0] if self.selections else None

    @property
    def details(self) -> Mapping[str, Tensor]:
        """What the method computed on the way, by name, over all views: see `Selection.details`."""
        names = self.selections[0].details if self.selections else ()
        return {name: torch.cat([answer.details[name] for answer in self.selections]) for name in names}

    def left_at(self, places: Tensor) -> KeptTokens:
        """Only the tokens at some places (k,) of ``sequence``: those that a method inside the decoder has kept."""
        sequence = self.sequence[places]
        recycled = 0 if self.per_layer is None else self.per_layer[-1] - len(sequence)
        return replace(self, sequence=sequence, patches=int((sequence >= 0).sum()), recycled=recycled)

    @property
    def newlines(self) -> int:
        return len(self.sequence) - self.patches

    def per_view(self) -> list[int]:
        """How many tokens each view gives, kept and made."""
        views, tokens = self.layout.eligible.shape
        numbers = self.sequence.cpu()
        kept = numbers[(numbers >= 0) & (numbers < views * tokens)] // tokens
        if self.made is not None:
            kept = torch.cat([kept, (numbers[numbers >= views * tokens] - views * tokens) // self.made.shape[1]])
        return torch.bincount(kept, minlength=views).tolist()

    def mask(self) -> Tensor:
        """(V, n) bool on the CPU, True at kept patches; made tokens are none."""
        numbers = self.sequence.cpu()
        mask = torch.zeros(self.layout.eligible.numel(), dtype=torch.bool)
        mask[numbers[(numbers >= 0) & (numbers < mask.numel())]] = True
        return mask.reshape(self.layout.eligible.shape)
