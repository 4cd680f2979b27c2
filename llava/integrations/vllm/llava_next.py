"""LLaVA-NeXT: some tokens of the overview and of every tile, in reading order; no newline tokens when pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from llava.integrations.vllm.compatibility import check_hooks
from llava.integrations.vllm.features import PictureFeatures, in_small_batches
from llava.integrations.vllm.llava import check_clip
from llava.integrations.vllm.model import PrunedModel
from llava.integrations.vllm.options import PruningOptions
from llava.integrations.vllm.plan import PictureShape
from llava.integrations.vllm.processing import PrunedProcessingInfo, PrunedProcessor, decode_plans, field_name
from llava.layout.padding import patches_of_tiles

check_hooks(
    (LlavaNextForConditionalGeneration, "_image_pixels_to_features", ("vision_tower", "pixel_values")),
    (LlavaNextForConditionalGeneration, "_parse_and_validate_image_input", ("kwargs",)),
    (
        LlavaNextForConditionalGeneration,
        "_merge_image_patch_embeddings",
        ("image_size", "patch_embeddings", "strategy"),
    ),
)


def tile_grid(size: tuple[int, int], config: Any) -> tuple[int, int]:
    """(columns, rows) of tiles of a picture of ``size`` (width, height)."""
    rows, columns = get_anyres_image_grid_shape(
        (size[1], size[0]), config.image_grid_pinpoints, config.vision_config.image_size
    )
    return columns, rows


def in_reading_order(numbers: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Numbers (k,) of kept patches, view after view, in the order in which the language model reads them.

    The overview first, then the tiles as one plane of patches, row by row: the order of the unpruned prompt.
    """
    columns, _ = grid
    tile, patch = numbers // (side * side) - 1, numbers % (side * side)  # the overview is tile -1
    row, column = tile // columns * side + patch // side, tile % columns * side + patch % side
    place = torch.where(tile < 0, numbers - side * side, row * columns * side + column)
    return numbers[place.argsort()]


def encode_tiles(
    model: Any, pixels: Any, numbers: list[int], grids: list[tuple[int, int]]
) -> list[tuple[Tensor, Tensor]]:
    """Features (V, n, d) after the projector and (V, n, c) before it, of the numbered pictures of a batch.

    Pictures of one call are padded to the largest: views beyond a picture's grid are not looked at.
    """
    views = [1 + columns * rows for columns, rows in grids]
    stacked = torch.cat([pixels[number][:count] for number, count in zip(numbers, views, strict=True)])
    at_once = model.script_server.views_at_once
    encoder = in_small_batches(
        lambda part: model._image_pixels_to_features(model.vision_tower, part), stacked, at_once
    )
    features = in_small_batches(model.multi_modal_projector, encoder, at_once)
    return list(zip(features.split(views), encoder.split(views), strict=True))


def grids_of(config: Any) -> set[tuple[int, int]]:
    """(columns, rows) of all grids that a picture may be cut into."""
    side = config.vision_config.image_size
    return {(width // side, height // side) for height, width in config.image_grid_pinpoints}


def most_of_tiles(options: PruningOptions, grids: set[tuple[int, int]], side: int, unpruned: int) -> int:
    """The most tokens that a picture gives under a server's budget.

    Args:
        side: patches along a view.
        unpruned: the most that one gives with all of its tokens, newline tokens among them.
    """
    most = 0
    for columns, rows in grids:
        views, tokens = 1 + columns * rows, side * side
        kept = options.most(views, tokens)
        whole = views * tokens + rows * side  # a newline token ends every row of patches
        most = max(most, kept if kept < views * tokens else min(whole, unpruned))
    return most


def shape_of_tiles(size: tuple[int, int], config: Any) -> PictureShape:
    """Views of a picture of ``size`` (width, height), and how many of their patches show no padding."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    columns, rows = grid = tile_grid(size, config)
    eligible = patches_of_tiles(size, grid, side).sum(-1)
    return PictureShape(1 + columns * rows, side * side, eligible=tuple(eligible.tolist()))


def patches_beside_padding(size: tuple[int, int], grid: tuple[int, int], side: int) -> Tensor | None:
    """(V, n) bool, False at padding of the tiles; ``None`` where there is none."""
    own = patches_of_tiles(size, grid, side)
    return None if bool(own.all()) else own


class ScriptLlavaNextProcessingInfo(PrunedProcessingInfo, LlavaNextProcessingInfo):
    script_has_clip = True

    def get_hf_config(self) -> Any:
        config = super().get_hf_config()
        check_clip(config)
        return config

    def script_most_tokens(
        self, modality: str, options: PruningOptions, seq_len: int, mm_counts: Mapping[str, int]
    ) -> int:
        config = self.get_hf_config()
        side = self.get_vision_encoder_info().get_patch_grid_length()
        return most_of_tiles(options, grids_of(config), side, self.get_max_image_tokens())


class ScriptLlavaNextProcessor(PrunedProcessor, LlavaNextMultiModalProcessor):
    def script_placeholder(self, modality: str) -> list[int]:
        return [self.info.get_hf_config().image_token_index]

    def script_shape(self, modality: str, index: int, mm_items: Any, out_mm_kwargs: Any) -> PictureShape:
        size = mm_items["image"].get_image_size(index)
        return shape_of_tiles((size.width, size.height), self.info.get_hf_config())


@MULTIMODAL_REGISTRY.register_processor(
    ScriptLlavaNextProcessor, info=ScriptLlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class ScriptLlavaNextForConditionalGeneration(PrunedModel, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT that gives some of the visual tokens of every view of a picture."""

    script_info = ScriptLlavaNextProcessingInfo

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        plans = decode_plans(kwargs.pop(field_name("image"), None))
        image_input = self._parse_and_validate_image_input(**kwargs)
        if image_input is None:
            return []
        pixels = image_input["pixel_values"]
        sizes = [(width, height) for height, width in image_input["image_sizes"].tolist()]
        grids = [tile_grid(size, self.config) for size in sizes]

        def encode(numbers: list[int]) -> list[PictureFeatures]:
            tiles = encode_tiles(self, pixels, numbers, [grids[number] for number in numbers])
            return [
                PictureFeatures(
                    features,
                    encoder,
                    patches_beside_padding(sizes[number], grids[number], side),
                )
                for number, (features, encoder) in zip(numbers, tiles, strict=True)
            ]

        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        shapes = [(1 + columns * rows, side * side) for columns, rows in grids]
        pictures = self.script_features(plans, shapes, encode, self.image_newline.device)
        chosen = self.script_choose(pictures, plans)
        return [
            self._merge_image_patch_embeddings(
                torch.tensor([size[1], size[0]]), picture.features, strategy="spatial_unpad"
            )
            if numbers is None
            else picture.features.flatten(0, 1)[in_reading_order(numbers, grid, side)]
            for size, grid, picture, numbers in zip(sizes, grids, pictures, chosen, strict=True)
        ]
