"""LLaVA-1.5: one view of n patches, m of them on the placeholders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig

from llava.integrations.vllm.compatibility import check_hooks
from llava.integrations.vllm.features import PictureFeatures, in_small_batches
from llava.integrations.vllm.model import PrunedModel
from llava.integrations.vllm.options import PruningOptions
from llava.integrations.vllm.plan import PictureShape
from llava.integrations.vllm.processing import PrunedProcessingInfo, PrunedProcessor, decode_plans, field_name
from llava.layout.padding import patches_of_square

check_hooks(
    (LlavaForConditionalGeneration, "_process_image_pixels", ("inputs",)),
    (LlavaForConditionalGeneration, "_parse_and_validate_image_input", ("kwargs",)),
)


class ScriptLlavaProcessingInfo(PrunedProcessingInfo, LlavaProcessingInfo):
    script_has_clip = True

    def get_hf_config(self) -> Any:
        config = super().get_hf_config()
        check_clip(config)
        return config

    def script_most_tokens(
        self, modality: str, options: PruningOptions, seq_len: int, mm_counts: Mapping[str, int]
    ) -> int:
        return options.most(1, self.get_max_image_tokens())


class ScriptLlavaProcessor(PrunedProcessor, LlavaMultiModalProcessor):
    def script_placeholder(self, modality: str) -> list[int]:
        return [self.info.get_hf_config().image_token_index]

    def script_shape(self, modality: str, index: int, mm_items: Any, out_mm_kwargs: Any) -> PictureShape:
        patches = out_mm_kwargs["image"][index].get("script_patches")
        eligible = None if patches is None else (int(patches.data.sum()),)
        return PictureShape(1, self.info.get_max_image_tokens(), eligible=eligible)

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        data = super()._apply_hf_processor_main(mm_items=mm_items, hf_kwargs=hf_kwargs)
        if "pixel_values" in data and getattr(self.info.get_hf_processor().image_processor, "do_pad", False):
            images = mm_items["image"]
            sizes = [images.get_image_size(index) for index in range(len(data["pixel_values"]))]
            side = self.info.get_vision_encoder_info().get_patch_grid_length()
            data["script_patches"] = torch.cat([patches_of_square((size.width, size.height), side) for size in sizes])
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> dict[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, "script_patches": MultiModalFieldConfig.batched("image", keep_on_cpu=True)}


@MULTIMODAL_REGISTRY.register_processor(
    ScriptLlavaProcessor, info=ScriptLlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class ScriptLlavaForConditionalGeneration(PrunedModel, LlavaForConditionalGeneration):
    """vLLM's LLaVA-1.5 that gives m visual tokens of a picture."""

    script_info = ScriptLlavaProcessingInfo

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        plans = decode_plans(kwargs.pop(field_name("image"), None))
        patches = kwargs.pop("script_patches", None)
        image_input = self._parse_and_validate_image_input(**kwargs)
        if image_input is None:
            return []
        pixels = image_input["pixel_values"]
        if isinstance(pixels, list):
            pixels = torch.stack(pixels)

        def encode(numbers: list[int]) -> list[PictureFeatures]:
            encoder = in_small_batches(
                lambda part: self._image_pixels_to_features(self.vision_tower, part),
                pixels[numbers],
                self.script_server.views_at_once,
            )
            features = in_small_batches(self.multi_modal_projector, encoder, self.script_server.views_at_once)
            return [
                PictureFeatures(
                    features[row, None],
                    encoder[row, None],
                    valid_patches(patches, number),
                )
                for row, number in enumerate(numbers)
            ]

        shapes = [(1, self.script_tokens)] * len(plans)
        pictures = self.script_features(plans, shapes, encode, pixels.device)
        chosen = self.script_choose(pictures, plans)
        return [
            picture.features[0] if numbers is None else picture.features[0, numbers]
            for picture, numbers in zip(pictures, chosen, strict=True)
        ]

    @property
    def script_tokens(self) -> int:
        """n, of a picture."""
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2


def valid_patches(patches: Any, number: int) -> Tensor | None:
    """(1, n) bool of a picture; ``None`` where no patch is padding."""
    if patches is None:
        return None
    own = patches[number].bool().reshape(1, -1).cpu()
    return None if bool(own.all()) else own


def check_clip(config: Any) -> None:
    """Raise ValueError for a LLaVA whose tower is no CLIP with one feature layer."""
    vision = config.vision_config
    if not isinstance(vision, CLIPVisionConfig) or not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"Script serves LLaVA with a CLIP tower and one feature layer, this checkpoint has a {vision.model_type} "
            f"tower and vision_feature_layer {config.vision_feature_layer}: serve it under its own architecture"
        )
