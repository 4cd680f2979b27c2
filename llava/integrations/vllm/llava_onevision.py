"""LLaVA-OneVision: m tokens of every view of a picture, and of every frame of a video, whose newline token stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from llava.integrations.vllm.compatibility import check_hooks
from llava.integrations.vllm.features import PictureFeatures, in_small_batches
from llava.integrations.vllm.llava_next import encode_tiles, in_reading_order, most_tiles, tile_grid
from llava.integrations.vllm.model import PrunedModel, gathered
from llava.integrations.vllm.options import PruningOptions
from llava.integrations.vllm.processing import PrunedProcessingInfo, PrunedProcessor, decode_plans, field_name
from llava.layout.padding import patches_of_tiles

check_hooks(
    (LlavaOnevisionForConditionalGeneration, "_image_pixels_to_features", ("vision_tower", "pixel_values")),
    (LlavaOnevisionForConditionalGeneration, "_video_pixels_to_features", ("vision_tower", "pixel_values")),
    (LlavaOnevisionForConditionalGeneration, "_parse_and_validate_multimodal_inputs", ("kwargs",)),
)


class ScriptLlavaOnevisionProcessingInfo(PrunedProcessingInfo, LlavaOnevisionProcessingInfo):
    script_modalities = ("image", "video")

    def script_tokens_per_view(self, modality: str) -> int:
        if modality == "video":
            return self._get_num_frame_tokens(image_width=1, image_height=1)  # frames are resized to one size
        return self.get_vision_encoder_info().get_patch_grid_length() ** 2

    def script_most_tokens(
        self, modality: str, options: PruningOptions, seq_len: int, mm_counts: Mapping[str, int]
    ) -> int:
        tokens = self.script_tokens_per_view(modality)
        if modality == "video":
            return self.get_num_frames_with_most_features(seq_len, mm_counts) * options.most(tokens) + 1
        if options.most(tokens) >= tokens:
            return self.get_max_image_tokens()
        return (1 + most_tiles(self.get_hf_config())) * options.most(tokens)


class ScriptLlavaOnevisionProcessor(PrunedProcessor, LlavaOnevisionMultiModalProcessor):
    def script_placeholder(self, modality: str) -> list[int]:
        config = self.info.get_hf_config()
        return [config.image_token_index if modality == "image" else config.video_token_index]

    def script_views(self, modality: str, index: int, mm_items: Any, out_mm_kwargs: Any) -> tuple[int, int, int]:
        tokens = self.info.script_tokens_per_view(modality)
        if modality == "video":
            return len(out_mm_kwargs["video"][index]["pixel_values_videos"].data), tokens, 1
        size = mm_items["image"].get_image_size(index)
        columns, rows = tile_grid((size.width, size.height), self.info.get_hf_config())
        return 1 + columns * rows, tokens, 0


@MULTIMODAL_REGISTRY.register_processor(
    ScriptLlavaOnevisionProcessor,
    info=ScriptLlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class ScriptLlavaOnevisionForConditionalGeneration(PrunedModel, LlavaOnevisionForConditionalGeneration):
    """vLLM's LLaVA-OneVision that gives m visual tokens of every view and frame."""

    script_info = ScriptLlavaOnevisionProcessingInfo

    def embed_multimodal(self, **kwargs: object) -> tuple[Tensor, ...]:
        plans = {name: decode_plans(kwargs.pop(field_name(name), None)) for name in ("image", "video")}
        embeddings: tuple[Tensor, ...] = ()
        for modality, given in self._parse_and_validate_multimodal_inputs(**kwargs).items():
            rows = self.script_images if modality == "image" else self.script_videos
            embeddings += rows(given, plans[modality])
        return embeddings

    def script_images(self, given: Any, plans: list[Any]) -> tuple[Tensor, ...]:
        """Rows of every picture: (V * m, d) in reading order, or all with their newline tokens."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        sizes = [(width, height) for height, width in given["image_sizes"].tolist()]
        grids = [tile_grid(size, self.config) for size in sizes]

        def encode(numbers: list[int]) -> list[PictureFeatures]:
            tiles = encode_tiles(self, given["pixel_values"], numbers, [grids[number] for number in numbers])
            valid = [patches_of_tiles(sizes[number], grids[number], side) for number in numbers]
            return [
                PictureFeatures(features, valid=None if bool(own.all()) else own)
                for (features, _), own in zip(tiles, valid, strict=True)
            ]

        pictures = self.script_features(plans, encode, self.image_newline.device)
        chosen = self.script_selector.select(pictures, plans)
        return tuple(
            self._merge_image_patch_embeddings(
                torch.tensor([size[1], size[0]]),
                picture.features,
                image_newline=self.image_newline,
                strategy="spatial_unpad",
            )
            if indices is None
            else picture.features.flatten(0, 1)[in_reading_order(indices, grid, side)]
            for size, grid, picture, indices in zip(sizes, grids, pictures, chosen, strict=True)
        )

    def script_videos(self, given: Any, plans: list[Any]) -> tuple[Tensor, ...]:
        """Rows (frames * m + 1, d) of every video: m of each frame, and the newline token at the end."""
        videos = given["pixel_values_videos"]
        frames = [len(video) for video in videos]

        def encode(numbers: list[int]) -> list[PictureFeatures]:
            features = in_small_batches(
                lambda part: self._video_pixels_to_features(self.vision_tower, part),
                torch.cat([videos[number] for number in numbers]),
                self.script_server.views_at_once,
            )
            return [PictureFeatures(own) for own in features.split([frames[number] for number in numbers])]

        clips = self.script_features(plans, encode, self.image_newline.device)
        chosen = self.script_selector.select(clips, plans)
        newline = self.image_newline[None]
        return tuple(
            torch.cat([clip.features.flatten(0, 1) if kept is None else gathered(clip.features, kept), newline])
            for clip, kept in zip(clips, chosen, strict=True)
        )
