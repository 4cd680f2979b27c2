"""Qwen2.5-VL: some tokens of a picture, or of every two frames of a video, each at the place it has in the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from llava.integrations.vllm.compatibility import check_hooks
from llava.integrations.vllm.placed import Block, PlacedModel, PlacedProcessingInfo, PlacedProcessor

check_hooks(
    (Qwen2_5_VLForConditionalGeneration, "_parse_and_validate_multimodal_inputs", ("kwargs",)),
    (Qwen2_5_VLForConditionalGeneration, "_process_image_input", ("image_input",)),
    (Qwen2_5_VLForConditionalGeneration, "iter_mm_grid_thw", ("mm_features",)),
    (Qwen2_5_VLForConditionalGeneration, "get_mrope_input_positions", ("input_tokens", "mm_features")),
)


class ScriptQwen2_5_VLProcessingInfo(PlacedProcessingInfo, Qwen2_5_VLProcessingInfo):
    pass


class ScriptQwen2_5_VLProcessor(PlacedProcessor, Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    ScriptQwen2_5_VLProcessor, info=ScriptQwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class ScriptQwen2_5_VLForConditionalGeneration(PlacedModel, Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL that gives some of the visual tokens of a picture or video."""

    script_info = ScriptQwen2_5_VLProcessingInfo

    def script_blocks(self, feature: Any, input_tokens: list[int]) -> list[Block]:
        ((offset, frames, rows, columns, t_factor),) = self.iter_mm_grid_thw([feature])
        last = max(int((frames - 1) * t_factor), rows - 1, columns - 1)
        return [Block(offset, feature.mm_position.length, last + 1)]

    def script_places(self, modality: str, given: Any, index: int) -> Tensor:
        """Frames stand as far apart as their time says."""
        frames, rows, columns = given[f"{modality}_grid_thw"][index].tolist()
        merge = self.visual.spatial_merge_size
        places = torch.cartesian_prod(
            torch.arange(frames), torch.arange(rows // merge), torch.arange(columns // merge)
        )
        if modality == "video":
            t_factor = float(given["second_per_grid_ts"][index]) * self.config.vision_config.tokens_per_second
            places[:, 0] = (places[:, 0].double() * t_factor).long()
        return places
