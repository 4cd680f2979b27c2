"""Qwen3-VL and its mixture of experts: kept tokens of a picture or of each frame take along their rows of every
DeepStack plane, and stand where they stood in the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from llava.integrations.vllm.compatibility import check_hooks
from llava.integrations.vllm.features import PictureFeatures
from llava.integrations.vllm.placed import Block, PlacedModel, PlacedProcessingInfo, PlacedProcessor
from llava.integrations.vllm.views_apart import ViewsApartProcessor

check_hooks(
    (Qwen3VLForConditionalGeneration, "_parse_and_validate_multimodal_inputs", ("kwargs",)),
    (Qwen3VLForConditionalGeneration, "_process_image_input", ("image_input",)),
    (Qwen3VLForConditionalGeneration, "get_mrope_input_positions", ("input_tokens", "mm_features")),
    (
        Qwen3VLForConditionalGeneration,
        "_compute_deepstack_embeds",
        ("inputs_embeds", "multimodal_embeddings", "is_multimodal"),
    ),
)


class ScriptQwen3VLProcessingInfo(PlacedProcessingInfo, Qwen3VLProcessingInfo):
    pass


class ScriptQwen3VLMoeProcessingInfo(PlacedProcessingInfo, Qwen3VLMoeProcessingInfo):
    pass


class ScriptQwen3VLProcessor(ViewsApartProcessor, PlacedProcessor, Qwen3VLMultiModalProcessor):
    script_apart = ("video",)


class FramesApart(PlacedModel):
    """Mixed in before a model whose prompt has each frame of a video between marks of its own."""

    def script_made(self, rows: Tensor) -> PictureFeatures:
        """The planes that go into the first layers lie behind each token: no method chooses by them."""
        main, planes = rows.split([self.visual_dim, rows.shape[-1] - self.visual_dim], dim=-1)
        return PictureFeatures(main, beside=planes if planes.shape[-1] else None)

    def script_blocks(self, feature: Any, input_tokens: list[int]) -> list[Block]:
        place = feature.mm_position.offset
        frames, rows, columns = feature.data[f"{feature.modality}_grid_thw"].data.tolist()
        span = max(rows, columns) // self.config.vision_config.spatial_merge_size
        if feature.modality == "image":
            return [Block(place, feature.mm_position.length, span)]
        blocks = []
        for _ in range(frames):
            first = input_tokens.index(self.config.vision_start_token_id, place) + 1
            place = input_tokens.index(self.config.vision_end_token_id, first)
            blocks.append(Block(first, place - first, span))
        return blocks

    def script_places(self, modality: str, given: Any, index: int) -> Tensor:
        frames, rows, columns = given[f"{modality}_grid_thw"][index].tolist()
        merge = self.visual.spatial_merge_size
        own = torch.cartesian_prod(torch.arange(1), torch.arange(rows // merge), torch.arange(columns // merge))
        return own.repeat(frames, 1)


@MULTIMODAL_REGISTRY.register_processor(
    ScriptQwen3VLProcessor, info=ScriptQwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class ScriptQwen3VLForConditionalGeneration(FramesApart, Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL that gives some of the visual tokens of a picture or frame."""

    script_info = ScriptQwen3VLProcessingInfo


@MULTIMODAL_REGISTRY.register_processor(
    ScriptQwen3VLProcessor, info=ScriptQwen3VLMoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class ScriptQwen3VLMoeForConditionalGeneration(FramesApart, Qwen3VLMoeForConditionalGeneration):
    """The same with a mixture of experts."""

    script_info = ScriptQwen3VLMoeProcessingInfo
