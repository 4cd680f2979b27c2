"""Mixed in before a family's model: from pictures and plans to the rows that vLLM puts on the placeholders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from llava.integrations.vllm.features import FeatureCache, PictureFeatures
from llava.integrations.vllm.joint_space import joint_space_folder, relevance_sign
from llava.integrations.vllm.options import PicturePlan, host_fields
from llava.integrations.vllm.processing import PrunedProcessingInfo, server_options
from llava.integrations.vllm.selection import TokenSelector
from llava.relevance.clip import ClipJointSpace


class PrunedModel:
    """What a pruned model has beside its family's own code."""

    script_info: type[PrunedProcessingInfo]
    supports_tower_connector_lora = False  # vLLM counts the tower's tokens by the placeholders, which are fewer here

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        server, _ = server_options(vllm_config.model_config)
        self.script_server = server
        self.script_cache = FeatureCache(server.feature_cache_mib * 2**20)
        has_clip = self.script_info.script_has_clip

        def joint_space() -> ClipJointSpace:  # no module: the checkpoint's loader would look for its weights
            parameter = next(self.parameters())
            return ClipJointSpace.load(joint_space_folder(server, self.config), parameter.dtype, parameter.device)

        self.script_selector = TokenSelector(
            host_fields(has_clip),
            self.embed_question,
            joint_space if has_clip else None,
            relevance_sign(server, self.config),
            same_on_all_ranks,
        )

    def embed_question(self, ids: Tensor) -> Tensor:
        """Token ids (l,) -> embeddings of the language model (l, d)."""
        return self.language_model.model.embed_input_ids(ids)

    def script_features(
        self,
        plans: Sequence[PicturePlan],
        encode: Callable[[list[int]], list[PictureFeatures]],
        device: torch.device,
    ) -> list[PictureFeatures]:
        """Unpruned features of every picture; ``encode`` makes those of the numbered ones that are not at hand."""
        found = [self.script_cache.get(plan.picture, device) for plan in plans]
        first: dict[str, int] = {}
        for number, (plan, features) in enumerate(zip(plans, found, strict=True)):
            if features is None:
                first.setdefault(plan.picture, number)
        made = dict(zip(first, encode(list(first.values())), strict=True)) if first else {}
        for picture, features in made.items():
            self.script_cache.put(picture, features)
        return [made[plan.picture] if old is None else old for plan, old in zip(plans, found, strict=True)]


def same_on_all_ranks(indices: Tensor) -> Tensor:
    """The indices of the first tensor-parallel rank: another choice elsewhere would spoil rows silently."""
    group = get_tp_group()
    return group.broadcast(indices.contiguous(), src=0) if group.world_size > 1 else indices


def gathered(features: Tensor, indices: Tensor) -> Tensor:
    """The kept rows of views (V, n, d) by (V, m), one view after another: (V * m, d)."""
    return features.gather(1, indices[:, :, None].expand(-1, -1, features.shape[-1])).flatten(0, 1)
