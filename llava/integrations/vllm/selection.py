"""The worker's part: unpruned features and plans in, numbers of the kept tokens out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llava.integrations.vllm.features import PictureFeatures
from llava.integrations.vllm.plan import PicturePlan
from llava.layout.candidates import Candidates
from llava.pruning import Method, PruningInputs, get_pruner
from llava.relevance.asked import Asked, LanguageSpace
from llava.relevance.clip import ClipJointSpace

logger = logging.getLogger("vllm.script")  # shown with the log of the server


class TokenSelector:
    """Runs `Pruner.select` on the pictures of a step, those of equal shape and method together.

    Args:
        language: the decoder's own reading of a question, which it takes as token ids.
        joint_space: CLIP's joint space; ``None`` where the server has none.
        sign: sign of the joint space's cosine; ``None`` takes the joint space's own.
        agree: makes all tensor-parallel ranks use the same indices.
    """

    def __init__(
        self,
        language: LanguageSpace,
        joint_space: ClipJointSpace | None = None,
        sign: int | None = None,
        agree: Callable[[Tensor], Tensor] = lambda indices: indices,
    ) -> None:
        self.language = language
        self.joint_space = joint_space
        self.sign = sign
        self.agree = agree

    def select(self, pictures: Sequence[PictureFeatures], plans: Sequence[PicturePlan]) -> list[Tensor | None]:
        """Numbers (k,) int64, ascending, of the kept tokens of every picture; ``None`` where all are kept.

        Token j of view v has the number v n + j.
        """
        candidates = [plan.candidates(picture.shape) for picture, plan in zip(pictures, plans, strict=True)]
        groups: dict[tuple, list[int]] = {}
        for number, (picture, plan) in enumerate(zip(pictures, plans, strict=True)):
            if not all(one.is_whole for one in candidates[number]):
                groups.setdefault((plan.method, plan.arguments, picture.shape.tokens), []).append(number)
        kept: list[Tensor | None] = [None] * len(pictures)
        for members in groups.values():
            pruner = plans[members[0]].pruner
            inputs = self.gather_inputs(pruner, [pictures[i] for i in members], [plans[i] for i in members])
            chosen = self._select_group(pruner, inputs, [candidates[i] for i in members])
            for number, own in zip(members, chosen, strict=True):
                kept[number] = own
        return kept

    def _select_group(
        self, pruner: Method, inputs: PruningInputs, pictures: Sequence[Sequence[Candidates]]
    ) -> list[Tensor]:
        """Numbers of the kept tokens of pictures whose views are those of ``inputs``, one after the other."""
        tokens, device = inputs.tokens, inputs.features.device
        parts: list[list[Tensor]] = [[] for _ in pictures]
        alone: dict[int, list[tuple[int, int, int]]] = {}  # budget -> (view of the inputs, picture, view of it)
        first = 0
        for number, candidates in enumerate(pictures):
            views = max(one.views[-1] for one in candidates) + 1
            for one in candidates:
                if one.keep == 0:  # a share of a picture's budget, for a view that shows padding only
                    continue
                if len(one.views) == 1:
                    alone.setdefault(min(one.keep, tokens), []).append((first + one.views[0], number, one.views[0]))
                    continue
                joined = inputs.of_views(slice(first, first + views)).joined()
                parts[number].append(self.agree(surely_selected(pruner, joined, one.keep))[0])
            first += views
        for keep, members in alone.items():
            rows = torch.tensor([row for row, _, _ in members]).to(device)
            indices = self.agree(surely_selected(pruner, inputs.of_views(rows), keep))
            for own, (_, number, view) in zip(indices, members, strict=True):
                parts[number].append(own + view * tokens)
        return [torch.cat(own).sort().values for own in parts]

    def gather_inputs(
        self, pruner: Method, pictures: Sequence[PictureFeatures], plans: Sequence[PicturePlan]
    ) -> PruningInputs:
        """What the method asks for, over the views of all pictures, which have equally many tokens each."""
        features = torch.cat([picture.features for picture in pictures])
        device = features.device
        views = torch.tensor([len(picture.features) for picture in pictures])
        of_view = torch.repeat_interleave(torch.arange(len(views)), views)
        fields: dict[str, Any] = {
            "pictures": of_view.to(device),
            "view_ids": torch.cat([torch.arange(count) for count in views.tolist()]).to(device),
        }
        valid = None
        if pruner.exclude_padding and any(picture.valid is not None for picture in pictures):
            masks = [
                torch.ones(p.features.shape[:2], dtype=torch.bool) if p.valid is None else p.valid for p in pictures
            ]
            valid = fields["valid"] = torch.cat(masks).to(device)

        def encoder_features() -> Tensor:
            return torch.cat([picture.encoder_features for picture in pictures])

        if "encoder_features" in pruner.needs:
            fields["encoder_features"] = encoder_features()
        space = self.joint_space

        def image_embeds() -> Tensor:
            return space.image_embeds(encoder_features())

        reads_clip = getattr(pruner, "relevance", None) == "clip"
        asked = Asked(
            pruner,
            [plan.query if reads_clip else plan.query_ids for plan in plans],
            space,
            self.language,
            sign=(self.sign or space.relevance_sign) if space is not None else 1,
        )
        return PruningInputs(features, **fields, **asked.fields(of_view, features, valid, image_embeds))


def surely_selected(pruner: Method, inputs: PruningInputs, keep: int) -> Tensor:
    """Indices (B, m) by `Pruner.select`, and where that fails evenly spaced ones, with an error in the server's log.

    An exception here would end the engine, and with it the requests of everybody. Options are checked in the front
    end; this is for methods that do not hold what they promise.
    """
    try:
        return pruner.select(inputs, keep=keep).indices
    except (ValueError, TypeError, IndexError, ArithmeticError):
        logger.exception("pruner '%s' failed; evenly spaced tokens were kept instead, of %s", pruner.name, pruner)
        return get_pruner("uniform").select(inputs, keep=keep).indices
