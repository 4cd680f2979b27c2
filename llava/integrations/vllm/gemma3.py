"""Gemma 3: some of the tokens of a picture and of each of its crops, which see each other both ways as all would."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.gemma3_mm import (
    Gemma3DummyInputsBuilder,
    Gemma3ForConditionalGeneration,
    Gemma3MultiModalProcessor,
    Gemma3ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from llava.integrations.vllm.compatibility import check_hooks
from llava.integrations.vllm.features import PictureFeatures, in_small_batches
from llava.integrations.vllm.model import PrunedModel
from llava.integrations.vllm.options import PruningOptions
from llava.integrations.vllm.plan import PictureShape
from llava.integrations.vllm.processing import PrunedProcessingInfo, decode_plans, field_name
from llava.integrations.vllm.views_apart import ViewsApartProcessor

check_hooks(
    (Gemma3ForConditionalGeneration, "_parse_and_validate_image_input", ("kwargs",)),
    (Gemma3ForConditionalGeneration, "_image_pixels_to_features", ("vision_tower", "pixel_values")),
)


class ScriptGemma3ProcessingInfo(PrunedProcessingInfo, Gemma3ProcessingInfo):
    def script_most_tokens(
        self, modality: str, options: PruningOptions, seq_len: int, mm_counts: Mapping[str, int]
    ) -> int:
        size = self.get_image_size_with_most_features()
        tokens = self.get_num_image_tokens(
            image_width=size.width, image_height=size.height, processor=self.get_hf_processor(), mm_kwargs={}
        )
        own = self.get_hf_config().mm_tokens_per_image
        return options.most(tokens // own, own)


class ScriptGemma3Processor(ViewsApartProcessor, Gemma3MultiModalProcessor):
    script_apart = ("image",)

    def script_placeholder(self, modality: str) -> list[int]:
        return [self.info.get_tokenizer().get_vocab()[self.info.get_hf_processor().boi_token]]

    def script_shape(self, modality: str, index: int, mm_items: Any, out_mm_kwargs: Any) -> PictureShape:
        views = int(out_mm_kwargs["image"][index]["num_patches"].data)
        return PictureShape(views, self.info.get_hf_config().mm_tokens_per_image)


@MULTIMODAL_REGISTRY.register_processor(
    ScriptGemma3Processor, info=ScriptGemma3ProcessingInfo, dummy_inputs=Gemma3DummyInputsBuilder
)
class ScriptGemma3ForConditionalGeneration(PrunedModel, Gemma3ForConditionalGeneration):
    """vLLM's Gemma 3 that gives some of the visual tokens of a picture."""

    script_info = ScriptGemma3ProcessingInfo

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        plans = decode_plans(kwargs.pop(field_name("image"), None))
        given = self._parse_and_validate_image_input(**kwargs)
        if given is None:
            return []
        counts = given["num_patches"].tolist()
        views = given["pixel_values"].split(counts)

        def features_of(pixels: Tensor) -> Tensor:
            return self.multi_modal_projector(self._image_pixels_to_features(self.vision_tower, pixels))

        def encode(numbers: list[int]) -> list[PictureFeatures]:
            pixels = torch.cat([views[number] for number in numbers])
            features = in_small_batches(features_of, pixels, self.script_server.views_at_once)
            return [PictureFeatures(own) for own in features.split([counts[number] for number in numbers])]

        shapes = [(count, self.config.mm_tokens_per_image) for count in counts]
        pictures = self.script_features(plans, shapes, encode, given["pixel_values"].device)
        chosen = self.script_choose(pictures, plans)
        return [
            picture.features.flatten(0, 1) if numbers is None else picture.features.flatten(0, 1)[numbers]
            for picture, numbers in zip(pictures, chosen, strict=True)
        ]

    def get_encoder_cudagraph_config(self) -> Any:
        """No graphs of the encoder: they would go past the selection."""
        return dataclasses.replace(super().get_encoder_cudagraph_config(), modalities=[])
