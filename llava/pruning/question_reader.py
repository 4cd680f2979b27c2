"""What the methods share that read the question: where relevance comes from, and its sign."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llava.pruning.base import ViewMethod
from llava.pruning.functional import relevance_scores
from llava.pruning.inputs import PruningInputs
from llava.pruning.options import option_types

Source = Literal["auto", "clip", "language", "qk", "words", "projector", "hawk", "none"]
JOINT_FIELDS = frozenset({"image_embeds", "text_embeds"})
FIELDS: dict[str, frozenset[str]] = {  # of `PruningInputs`, that each source needs
    "auto": JOINT_FIELDS,  # where no host has settled it
    "clip": JOINT_FIELDS,
    "language": frozenset({"relevance"}),
    "qk": frozenset({"relevance"}),
    "words": frozenset({"relevance"}),
    "projector": frozenset({"query_embeds"}),
    "hawk": frozenset({"relevance"}),
    "none": frozenset(),
}
SIGNED = ("auto", "clip", "projector")  # sources that a sign means something to
BY_HEADS = ("auto", "language", "qk", "hawk")  # sources that read attention heads


@dataclass(frozen=True, kw_only=True)
class QuestionReader(ViewMethod):
    """Mixed in before `Pruner` or `TokenMaker`: the method reads how relevant a token is to the question.

    Args:
        relevance: where the question is compared with the tokens. "clip": the joint space of the CLIP or SigLIP that
            the vision tower is; "language": the language model's own embeddings and first attention, averaged; "qk"
            and "words": each of these two alone; "projector": cosine with the mean embedding of the question's words,
            a weak signal; "hawk": the first attention's products, as `hawk` adds them up; "none": all tokens equally
            relevant; "auto": "clip" where it can be had, else "language". The host settles "auto" and says what it
            took.
        relevance_sign: sign under which the cosine grows with relevance; ``None`` takes what the host states, -1 for
            CLIP towers, +1 for "projector". The other sources have no sign.
        heads: file with a weight for each head of the first attention (`llava.relevance.heads`), for "language",
            "qk" and "hawk"; ``None`` weighs all heads the same.
    """

    relevance: Source = "auto"
    relevance_sign: Literal[-1, 1] | None = None
    heads: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.relevance_sign is not None and self.relevance not in SIGNED:
            raise ValueError(
                f"relevance_sign={self.relevance_sign} means nothing with relevance={self.relevance}: it is for "
                f"{' and '.join(SIGNED[1:])}"
            )
        if self.heads is not None and self.relevance not in BY_HEADS:
            raise ValueError(
                f"heads={self.heads} means nothing with relevance={self.relevance}: it is for "
                f"{' and '.join(BY_HEADS[1:])}"
            )

    @property
    def needs(self) -> frozenset[str]:
        return FIELDS[self.relevance]

    @property
    def reads_question(self) -> bool:
        return self.relevance != "none"

    def read(self, question: Hashable) -> Hashable:
        """The part of a question that the method reads, in the form in which the host has it: text or token ids."""
        return question

    @property
    def sources(self) -> tuple[Source, ...]:
        """What the option ``relevance`` may be."""
        return typing.get_args(option_types(type(self))["relevance"])

    def from_source(self, source: Source) -> QuestionReader:
        """The method with its source of relevance settled.

        Raises:
            ValueError: an option belongs to another source.
        """
        return self if source == self.relevance else dataclasses.replace(self, relevance=source)

    def lacking(self, inputs: PruningInputs) -> list[str]:
        brought = frozenset() if inputs.relevance is None else FIELDS[self.relevance]
        return [name for name in super().lacking(inputs) if name not in brought]

    def sign(self, inputs: PruningInputs) -> int:
        """Sign of the cosine in the joint space."""
        return inputs.relevance_sign if self.relevance_sign is None else self.relevance_sign

    def raw_relevance(self, inputs: PruningInputs, normalise: bool = True) -> Tensor:
        """Relevance (B, n) before scaling, or the scores that the caller brought.

        Args:
            normalise: in the joint space, take the cosine; else the plain product.
        """
        if self.relevance == "none":
            return torch.zeros(inputs.features.shape[:2], device=inputs.features.device)
        if inputs.relevance is not None:
            return inputs.relevance
        if self.relevance == "projector":
            sign = 1 if self.relevance_sign is None else self.relevance_sign
            return relevance_scores(inputs.features, pooled_query(inputs), sign=sign)
        return relevance_scores(
            inputs.image_embeds, inputs.text_embeds, inputs.text_mask, self.sign(inputs), normalise
        )


def pooled_query(inputs: PruningInputs) -> Tensor:
    """Mean of the question's embeddings (B or 1, l, d) over its real tokens: (B or 1, 1, d)."""
    query = inputs.query_embeds.to(torch.promote_types(inputs.query_embeds.dtype, torch.float32))
    if inputs.query_mask is None:
        return query.mean(1, keepdim=True)
    weight = inputs.query_mask.to(query.dtype)[:, :, None]
    return (query * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1.0)
