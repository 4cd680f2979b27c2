"""What a checkpoint's configuration says of a picture or video: how many views, where its tokens stand.

The place where LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision and LLaVA-Video differ in how they read what they see.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llava.layout.pooling import pooled_side
from llava.layout.views import (
    MERGE_TYPES,
    ViewLayout,
    flat_layout,
    padded_square_layout,
    single_crop_layout,
    slow_fast_layout,
    tiled_layout,
    video_layout,
)
from llava.mm_utils import anyres_grid, most_tiles, parse_pinpoints

logger = logging.getLogger(__name__)

IMAGE, VIDEO = "image", "video"


def modality_list(modalities: str | Sequence[str] | None, count: int) -> list[str]:
    """One modality for each of ``count`` visuals: "video", or "image" for anything else, as official LLaVA reads them.

    Args:
        modalities: one per visual, in the order of the placeholders, never per row; a single one holds for all.

    Raises:
        ValueError: another number of them.
    """
    given = [modalities] if isinstance(modalities, str) else list(modalities or [IMAGE])
    if len(given) == 1:
        given *= count
    if len(given) != count:
        raise ValueError(f"modalities are given per visual: {count} images and videos, but {len(given)} modalities")
    return [VIDEO if kind == VIDEO else IMAGE for kind in given]


@dataclass(frozen=True)
class VideoReading:
    """How a checkpoint reads videos: `of` takes it from its configuration.

    Args:
        pool_mode: "average", "max" or "bilinear".
        newline_position: see `video_layout`.
        merge_type: likewise.
        slow_every: with the slow/fast option, every so-many-th frame is slow; ``None`` without it.
    """

    pool_mode: str
    newline_position: str
    merge_type: str
    slow_every: int | None = None

    @classmethod
    def of(cls, config: Any) -> VideoReading:
        """Read the keys ``mm_spatial_pool_mode``, ``mm_newline_position``, ``add_faster_video``, ...

        Raises:
            ValueError: a checkpoint that was not made for videos.
        """
        mode = getattr(config, "mm_spatial_pool_mode", None)
        if mode is None:
            raise ValueError(
                "this checkpoint was not made for videos: its configuration has no mm_spatial_pool_mode "
                "(LLaVA-Video and LLaVA-OneVision have it)"
            )
        if getattr(config, "mm_spatial_pool_stride", None) not in (None, 2):
            logger.warning("mm_spatial_pool_stride %s is not read: the stride is 2", config.mm_spatial_pool_stride)
        position = getattr(config, "mm_newline_position", None) or "one_token"
        slow_every = None
        if getattr(config, "add_faster_video", False):
            if position != "grid":
                raise ValueError(f"add_faster_video goes with mm_newline_position grid, got {position!r}")
            slow_every = getattr(config, "faster_token_stride", None) or 10
        return cls(mode, position, merge_type_of(config), slow_every)

    def layout(self, frames: int, side: int) -> ViewLayout:
        """Where the tokens of a video of so many frames of side x side patches stand."""
        slow = pooled_side(side, self.pool_mode)
        if self.slow_every is None:
            layout = video_layout(frames, slow, self.newline_position, self.merge_type)
        else:
            layout = slow_fast_layout(frames, slow, pooled_side(side, self.pool_mode, 4), self.slow_every)
        return replace(layout, pooled=True)


def merge_type_of(config: Any) -> str:
    """``mm_patch_merge_type``. Raises ValueError for an unknown one."""
    merge_type = getattr(config, "mm_patch_merge_type", "flat")
    if merge_type not in MERGE_TYPES:
        raise ValueError(f"mm_patch_merge_type must be one of {', '.join(MERGE_TYPES)}, got {merge_type!r}")
    return merge_type


def picture_layouts(
    config: Any, views: int, side: int, tokens: int, view_pixels: int, size: tuple[int, int] | None, in_views: bool
) -> tuple[ViewLayout, ViewLayout]:
    """Layout of a picture, and the one it would have if padding counted like anything else.

    Args:
        side, tokens: patches along one side of a view, and tokens of it (one more with the class token).
        view_pixels: pixels along one side of a view.
        size: (width, height) of the picture.
        in_views: whether it came as a list of views, which end in newlines, rather than as LLaVA-1.5's one crop.
    """
    merge_type = merge_type_of(config)
    aspect_ratio = getattr(config, "image_aspect_ratio", None)
    flat = flat_layout(views, tokens)
    square = None
    if aspect_ratio == "pad" and views == 1 and size is not None and tokens == side * side:
        square = padded_square_layout(size, side)
    if not in_views or merge_type == "flat":
        return (flat if in_views or square is None else square), flat
    if views == 1:
        if merge_type != "spatial_unpad":
            return flat, flat
        return single_crop_layout((square or flat).eligible), flat
    if size is None:
        raise ValueError("tiled images need image_sizes: (width, height) of each picture")
    grid = anyres_grid(size, parse_pinpoints(config.image_grid_pinpoints, view_pixels), view_pixels)
    if grid[0] * grid[1] + 1 != views:
        raise ValueError(f"a picture of size {size} has 1 + {grid[0]} x {grid[1]} views, got {views}")
    return tiled_layout(size, grid, side, merge_type, most_tiles(aspect_ratio)), tiled_layout(
        size, grid, side, "spatial"
    )


def as_views(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One (V, 3, s, s) per picture or video."""
    return [image if image.ndim == 4 else image[None] for image in images]


def pick_visuals(images: Tensor | Sequence[Tensor], chosen: Sequence[int]) -> Tensor | list[Tensor]:
    """Some of the pictures, in the form that they came in."""
    return images[torch.tensor(chosen)] if isinstance(images, Tensor) else [images[i] for i in chosen]
