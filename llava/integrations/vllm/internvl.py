"""InternVL 2 to 3.5 (`InternVLChatModel`): some of the 256 tokens of every tile, the thumbnail among them, or of every
frame of a video, whose number stands before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.internvl import (
    InternVLChatModel,
    InternVLDummyInputsBuilder,
    InternVLMultiModalProcessor,
    InternVLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import cached_encode

from llava.integrations.vllm.compatibility import check_hooks
from llava.integrations.vllm.features import PictureFeatures, in_small_batches
from llava.integrations.vllm.model import PrunedModel
from llava.integrations.vllm.options import PruningOptions
from llava.integrations.vllm.plan import PictureShape
from llava.integrations.vllm.processing import PrunedProcessingInfo, decode_plans, field_name
from llava.integrations.vllm.views_apart import ViewsApartProcessor

check_hooks(
    (InternVLChatModel, "extract_feature", ("pixel_values",)),
    (InternVLChatModel, "_parse_and_validate_multimodal_inputs", ("kwargs",)),
)


class ScriptInternVLProcessingInfo(PrunedProcessingInfo, InternVLProcessingInfo):
    script_modalities = ("image", "video")

    def script_most_tokens(
        self, modality: str, options: PruningOptions, seq_len: int, mm_counts: Mapping[str, int]
    ) -> int:
        tokens = self.get_hf_processor().image_seq_length
        if modality == "video":  # a longer one than vLLM's longest may keep as many
            return tokens * self.get_num_frames_with_most_features(seq_len, mm_counts)
        return options.most(self.get_max_image_tokens() // tokens, tokens)


class ScriptInternVLProcessor(ViewsApartProcessor, InternVLMultiModalProcessor):
    script_apart = ("video",)

    def script_placeholder(self, modality: str) -> list[int]:
        return cached_encode(self.info.get_tokenizer(), f"<{modality}>", add_special_tokens=False)

    def script_shape(self, modality: str, index: int, mm_items: Any, out_mm_kwargs: Any) -> PictureShape:
        views = int(out_mm_kwargs[modality][index][f"{modality}_num_patches"].data)
        return PictureShape(views, self.info.get_hf_processor().image_seq_length)


@MULTIMODAL_REGISTRY.register_processor(
    ScriptInternVLProcessor, info=ScriptInternVLProcessingInfo, dummy_inputs=InternVLDummyInputsBuilder
)
class ScriptInternVLChatModel(PrunedModel, InternVLChatModel):
    """vLLM's InternVL that gives some of the visual tokens of every tile or frame."""

    script_info = ScriptInternVLProcessingInfo

    def embed_multimodal(self, **kwargs: object) -> tuple[Tensor, ...]:
        plans = {f"{name}s": decode_plans(kwargs.pop(field_name(name), None)) for name in ("image", "video")}
        embeddings: tuple[Tensor, ...] = ()
        for modality, given in self._parse_and_validate_multimodal_inputs(**kwargs).items():
            embeddings += self.script_rows(given, plans[modality])
        return embeddings

    def script_rows(self, given: Any, plans: list[Any]) -> tuple[Tensor, ...]:
        """Rows (k, d) of every picture or video, whose views are tiles or frames."""
        counts = given["num_patches"].flatten().tolist()
        tiles = given["pixel_values_flat"].split(counts)

        def encode(numbers: list[int]) -> list[PictureFeatures]:
            pixels = torch.cat([tiles[number] for number in numbers])
            features = in_small_batches(self.extract_feature, pixels, self.script_server.views_at_once)
            return [PictureFeatures(own) for own in features.split([counts[number] for number in numbers])]

        shapes = [(count, self.num_image_token) for count in counts]
        pictures = self.script_features(plans, shapes, encode, given["pixel_values_flat"].device)
        chosen = self.script_choose(pictures, plans)
        return tuple(
            picture.features.flatten(0, 1) if numbers is None else picture.features.flatten(0, 1)[numbers]
            for picture, numbers in zip(pictures, chosen, strict=True)
        )

    def get_encoder_cudagraph_config(self) -> Any:
        """No graphs of the encoder: they would go past the selection."""
        return dataclasses.replace(super().get_encoder_cudagraph_config(), modalities=[])
