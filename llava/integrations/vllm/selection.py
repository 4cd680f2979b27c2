"""The worker's part: unpruned features and plans in, indices of the kept tokens out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava.integrations.vllm.features import PictureFeatures
from llava.integrations.vllm.options import JOINT_FIELDS, LANGUAGE_FIELDS, PicturePlan, make_pruner
from llava.pruning import Pruner, PruningInputs
from llava.pruning.functional import relevance_scores
from llava.pruning.question_reader import pooled_query
from llava.relevance.clip import ClipJointSpace


class TokenSelector:
    """Runs `Pruner.select` on the pictures of a step, those of equal shape and method together.

    Args:
        fields: what this host gives of `PruningInputs`.
        embed: token ids (l,) -> embeddings of the language model (l, d).
        joint_space: makes CLIP's joint space when it is first needed; ``None`` where relevance is read in the
            language model's space.
        sign: sign of the joint space's cosine; ``None`` takes the joint space's own.
        agree: makes all tensor-parallel ranks use the same indices.
    """

    def __init__(
        self,
        fields: frozenset[str],
        embed: Callable[[Tensor], Tensor],
        joint_space: Callable[[], ClipJointSpace] | None = None,
        sign: int | None = None,
        agree: Callable[[Tensor], Tensor] = lambda indices: indices,
    ) -> None:
        self.fields = fields
        self.embed = embed
        self.sign = sign
        self.agree = agree
        self._make_joint_space = joint_space
        self._joint_space: ClipJointSpace | None = None

    @property
    def joint_space(self) -> ClipJointSpace | None:
        if self._joint_space is None and self._make_joint_space is not None:
            self._joint_space = self._make_joint_space()
        return self._joint_space

    def select(self, pictures: Sequence[PictureFeatures], plans: Sequence[PicturePlan]) -> list[Tensor | None]:
        """Indices (V, m) int64, ascending, of the kept tokens of every picture; ``None`` where all are kept."""
        groups: dict[tuple, list[int]] = {}
        for number, (picture, plan) in enumerate(zip(pictures, plans, strict=True)):
            tokens = picture.features.shape[1]
            if plan.count(tokens) < tokens:
                key = (plan.method, plan.arguments, plan.count(tokens), tokens)
                groups.setdefault(key, []).append(number)
        chosen: list[Tensor | None] = [None] * len(pictures)
        for (method, arguments, keep, _), members in groups.items():
            pruner = make_pruner(method, arguments, self.fields)
            inputs = self.gather_inputs(pruner, [pictures[i] for i in members], [plans[i] for i in members])
            indices = self.agree(pruner.select(inputs, keep=keep).indices)
            for number, own in zip(members, indices.split([len(pictures[i].features) for i in members]), strict=True):
                chosen[number] = own
        return chosen

    def gather_inputs(
        self, pruner: Pruner, pictures: Sequence[PictureFeatures], plans: Sequence[PicturePlan]
    ) -> PruningInputs:
        """What the method asks for, over the views of all pictures."""
        features = torch.cat([picture.features for picture in pictures])
        device = features.device
        views = torch.tensor([len(picture.features) for picture in pictures])
        of_view = torch.repeat_interleave(torch.arange(len(views)), views).to(device)
        fields: dict[str, Any] = {
            "pictures": of_view,
            "view_ids": torch.cat([torch.arange(count) for count in views.tolist()]).to(device),
        }
        if any(picture.valid is not None for picture in pictures):
            masks = [
                torch.ones(p.features.shape[:2], dtype=torch.bool) if p.valid is None else p.valid for p in pictures
            ]
            fields["valid"] = torch.cat(masks).to(device)
        encoder = None
        if pruner.needs & ({"encoder_features"} | JOINT_FIELDS) and self._make_joint_space is not None:
            encoder = torch.cat([picture.encoder_features for picture in pictures])
        if "encoder_features" in pruner.needs:
            fields["encoder_features"] = encoder
        if pruner.needs & JOINT_FIELDS and encoder is not None:
            fields |= self._joint_fields(encoder, plans, of_view)
        elif pruner.needs & (JOINT_FIELDS | LANGUAGE_FIELDS):
            fields |= self._language_fields(pruner, features, plans, of_view)
        return PruningInputs(features, **fields)

    def _joint_fields(self, encoder: Tensor, plans: Sequence[PicturePlan], of_view: Tensor) -> dict[str, Any]:
        space = self.joint_space
        distinct = list(dict.fromkeys(plan.query or "" for plan in plans))
        row = torch.tensor([distinct.index(plan.query or "") for plan in plans], device=of_view.device)[of_view]
        embeds, mask = space.text_embeds(distinct)
        return {
            "image_embeds": space.image_embeds(encoder),
            "text_embeds": embeds.to(row.device)[row],
            "text_mask": mask.to(row.device)[row],
            "relevance_sign": self.sign or space.relevance_sign,
        }

    def _language_fields(
        self, pruner: Pruner, features: Tensor, plans: Sequence[PicturePlan], of_view: Tensor
    ) -> dict[str, Any]:
        """The question as embeddings, and for methods that read a joint space the relevance that stands for it.

        The projector was trained to put features into the language model's space, so larger cosines are more relevant.
        """
        lengths = torch.tensor([len(plan.query_ids) for plan in plans])
        ids = torch.tensor([token for plan in plans for token in plan.query_ids], dtype=torch.long)
        rows = self.embed(ids.to(features.device)).split(lengths.tolist())
        embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = (torch.arange(embeds.shape[1]) < lengths[:, None]).to(features.device)
        fields: dict[str, Any] = {"query_embeds": embeds[of_view], "query_mask": mask[of_view]}
        if pruner.needs & JOINT_FIELDS:
            query = pooled_query(PruningInputs(features, **fields))
            asked = pruner.relevance_sign
            default = type(pruner).relevance_sign  # about joint spaces, and says nothing of this one
            fields["relevance"] = relevance_scores(features, query, sign=1 if asked in (None, default) else asked)
        return fields
