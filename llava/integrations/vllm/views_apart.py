"""Families that write text between the views of a picture or video, such as the time of each frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from vllm.multimodal.processing import PromptUpdateDetails

from llava.integrations.vllm.plan import PicturePlan, PictureShape
from llava.integrations.vllm.processing import PrunedProcessor, UnprunedPicture


class ViewsApartProcessor(PrunedProcessor):
    """Mixed in before the multi-modal processor of such a family."""

    script_apart: tuple[str, ...]  # its modalities whose views stand apart

    def script_pruned(self, update: UnprunedPicture, plan: PicturePlan) -> UnprunedPicture:
        """vLLM's own replacement of a placeholder, with as many visual tokens of each view as the plan says."""
        pruned = super().script_pruned(update, plan)  # checks the budget
        if pruned is update or update.modality not in self.script_apart:
            return pruned
        counts = counts_of_views(plan, update.shape, update.modality)
        return dataclasses.replace(update, content=shortened_by_view(update.content, counts, update.shape.tokens))


def counts_of_views(plan: PicturePlan, shape: PictureShape, modality: str) -> list[int]:
    """How many tokens each view keeps.

    Raises:
        ValueError: that is known only when they are chosen, since the views compete for one budget.
    """
    candidates = plan.candidates(shape)
    if any(len(one.views) > 1 and not one.is_whole for one in candidates):
        raise ValueError(
            f"pruner '{plan.method}' with scope='global' lets the views of this {modality} compete for one budget, "
            "but this model writes text between them, so how many tokens each keeps must be known before they are "
            "chosen; scope='view' is possible, with keep_per='picture' too"
        )
    counts = [shape.tokens] * shape.views
    for one in candidates:
        for view in one.views if len(one.views) == 1 else ():
            counts[view] = min(one.keep, one.tokens)
    return counts


def shortened_by_view(content: PromptUpdateDetails, counts: Sequence[int], tokens: int) -> PromptUpdateDetails:
    """The same text with only the first ``counts[v]`` of the ``tokens`` visual tokens of each view v."""
    visual = torch.ones(len(content.full), dtype=torch.bool)
    if content.is_embed is not None:
        visual = content.is_embed(content.full)
    numbers = visual.cumsum(0) - 1
    stays = ~visual | (numbers % tokens < torch.tensor(counts)[(numbers // tokens).clamp(0, len(counts) - 1)])
    return dataclasses.replace(
        content, full=[token for token, stay in zip(content.full, stays.tolist(), strict=True) if stay]
    )
