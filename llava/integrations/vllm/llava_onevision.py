"""LLaVA-OneVision: some tokens of every view of a picture, or frame of a video, whose newline token stays."""

from __future__ import annotations

import math
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
from llava.integrations.vllm.llava_next import (
    encode_tiles,
    grids_of,
    in_reading_order,
    most_of_tiles,
    patches_beside_padding,
    shape_of_tiles,
    tile_grid,
)
from llava.integrations.vllm.model import PrunedModel
from llava.integrations.vllm.options import PruningOptions
from llava.integrations.vllm.plan import PictureShape
from llava.integrations.vllm.processing import PrunedProcessingInfo, PrunedProcessor, decode_plans, field_name

check_hooks(
    (LlavaOnevisionForConditionalGeneration, "_image_pixels_to_features", ("vision_tower", "pixel_values")),
    (LlavaOnevisionForConditionalGeneration, "_video_pixels_to_features", ("vision_tower", "pixel_values")),
    (LlavaOnevisionForConditionalGeneration, "_parse_and_validate_multimodal_inputs", ("kwargs",)),
)


class ScriptLlavaOnevisionProcessingInfo(PrunedProcessingInfo, LlavaOnevisionProcessingInfo):
    script_modalities = ("image", "video")

    def script_tokens_per_frame(self) -> int:
        return self._get_num_frame_tokens(image_width=1, image_height=1)  # frames are resized to one size

    def script_most_tokens(
        self, modality: str, options: PruningOptions, seq_len: int, mm_counts: Mapping[str, int]
    ) -> int:
        if modality == "video":
            frames = self.get_num_frames_with_most_features(seq_len, mm_counts)
            return options.most(frames, self.script_tokens_per_frame()) + 1
        side = self.get_vision_encoder_info().get_patch_grid_length()
        return most_of_tiles(options, grids_of(self.get_hf_config()), side, self.get_max_image_tokens())


class ScriptLlavaOnevisionProcessor(PrunedProcessor, LlavaOnevisionMultiModalProcessor):
    def script_placeholder(self, modality: str) -> list[int]:
        config = self.info.get_hf_config()
        return [config.image_token_index if modality == "image" else config.video_token_index]

    def script_shape(self, modality: str, index: int, mm_items: Any, out_mm_kwargs: Any) -> PictureShape:
        if modality == "video":
            frames = len(out_mm_kwargs["video"][index]["pixel_values_videos"].data)
            return PictureShape(frames, self.info.script_tokens_per_frame(), beside=1)
        size = mm_items["image"].get_image_size(index)
        return shape_of_tiles((size.width, size.height), self.info.get_hf_config())


@MULTIMODAL_REGISTRY.register_processor(
    ScriptLlavaOnevisionProcessor,
    info=ScriptLlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class ScriptLlavaOnevisionForConditionalGeneration(PrunedModel, LlavaOnevisionForConditionalGeneration):
    """vLLM's LLaVA-OneVision that gives some of the visual tokens of every view and frame."""

    script_info = ScriptLlavaOnevisionProcessingInfo

    def embed_multimodal(self, **kwargs: object) -> tuple[Tensor, ...]:
        plans = {name: decode_plans(kwargs.pop(field_name(name), None)) for name in ("image", "video")}
        embeddings: tuple[Tensor, ...] = ()
        for modality, given in self._parse_and_validate_multimodal_inputs(**kwargs).items():
            rows = self.script_images if modality == "image" else self.script_videos
            embeddings += rows(given, plans[modality])
        return embeddings

    def script_images(self, given: Any, plans: list[Any]) -> tuple[Tensor, ...]:
        """Rows of every picture: (k, d) in reading order, or all with their newline tokens."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        sizes = [(width, height) for height, width in given["image_sizes"].tolist()]
        grids = [tile_grid(size, self.config) for size in sizes]

        def encode(numbers: list[int]) -> list[PictureFeatures]:
            tiles = encode_tiles(self, given["pixel_values"], numbers, [grids[number] for number in numbers])
            return [
                PictureFeatures(features, valid=patches_beside_padding(sizes[number], grids[number], side))
                for number, (features, _) in zip(numbers, tiles, strict=True)
            ]

        shapes = [(1 + columns * rows, side * side) for columns, rows in grids]
        pictures = self.script_features(plans, shapes, encode, self.image_newline.device)
        chosen = self.script_choose(pictures, plans)
        return tuple(
            self._merge_image_patch_embeddings(
                torch.tensor([size[1], size[0]]),
                picture.features,
                image_newline=self.image_newline,
                strategy="spatial_unpad",
            )
            if numbers is None
            else picture.features.flatten(0, 1)[in_reading_order(numbers, grid, side)]
            for size, grid, picture, numbers in zip(sizes, grids, pictures, chosen, strict=True)
        )

    def script_videos(self, given: Any, plans: list[Any]) -> tuple[Tensor, ...]:
        """Rows (k + 1, d) of every video: those of its frames, and the newline token at the end."""
        videos = given["pixel_values_videos"]
        frames = [len(video) for video in videos]

        def encode(numbers: list[int]) -> list[PictureFeatures]:
            features = in_small_batches(
                lambda part: self._video_pixels_to_features(self.vision_tower, part),
                torch.cat([videos[number] for number in numbers]),
                self.script_server.views_at_once,
            )
            return [PictureFeatures(own) for own in features.split([frames[number] for number in numbers])]

        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        tokens = math.ceil(side / 2) ** 2  # of a frame: pooled two by two
        shapes = [(count, tokens) for count in frames]
        clips = self.script_features(plans, shapes, encode, self.image_newline.device)
        chosen = self.script_choose(clips, plans)
        newline = self.image_newline[None]
        return tuple(
            torch.cat([clip.features.flatten(0, 1) if kept is None else clip.features.flatten(0, 1)[kept], newline])
            for clip, kept in zip(clips, chosen, strict=True)
        )
