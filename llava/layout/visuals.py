"""Pictures and videos as a call brings them, and how a checkpoint reads them: views, order of tokens.

The place where LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision and LLaVA-Video differ in how they read what they see.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from llava.layout.pooling import pooled_side
from llava.layout.tiles import anyres_grid, check_grid, most_tiles, parse_pinpoints, reads_as_squares
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

logger = logging.getLogger(__name__)

IMAGE, VIDEO = "image", "video"
MODALITIES = (IMAGE, VIDEO)


def modality_list(modalities: str | Sequence[str] | None, count: int) -> list[str]:
    """One modality for each of ``count`` visuals.

    Args:
        modalities: "image" or "video", one per visual in the order of the placeholders, never per row; a single one
            holds for all. ``None``: all are pictures.

    Raises:
        ValueError: another word, or another number of them.
    """
    given = [modalities] if isinstance(modalities, str) else list(modalities or [IMAGE])
    unknown = [kind for kind in given if kind not in MODALITIES]
    if unknown:
        raise ValueError(f"a modality is one of {', '.join(MODALITIES)}; got {unknown[0]!r}")
    if len(given) == 1:
        given *= count
    if len(given) != count:
        raise ValueError(f"modalities are given per visual: {count} images and videos, but {len(given)} modalities")
    return given


@dataclass(frozen=True)
class Reading:
    """How pictures and videos are read: the keys of a checkpoint's configuration that say so, under their own names.

    ``Reading.of(model.config, image_grid_pinpoints=[[672, 672]])`` reads in another way for a call; it is taken in
    place of the configuration by `process_images`, and goes with the pixels in `Visuals`. The configuration itself is
    not changed.

    Args:
        image_aspect_ratio, image_grid_pinpoints, mm_patch_merge_type: of pictures; see `picture_layouts`.
        mm_spatial_pool_mode, mm_spatial_pool_stride, mm_newline_position, add_faster_video, faster_token_stride: of
            videos; see `VideoReading`.
    """

    image_aspect_ratio: str | None = None
    image_grid_pinpoints: str | Sequence[Sequence[int]] | None = None
    mm_patch_merge_type: str = "flat"
    mm_spatial_pool_mode: str | None = None
    mm_spatial_pool_stride: int | None = None
    mm_newline_position: str | None = None
    add_faster_video: bool = False
    faster_token_stride: int | None = None

    @classmethod
    def of(cls, config: Any, **changes: Any) -> Reading:
        """As a configuration (or another reading) says, with some keys changed.

        Raises:
            TypeError: a change that is none of the keys.
        """
        found = {each.name: getattr(config, each.name, each.default) for each in fields(cls)}
        return cls(**found | changes)

    def with_grid(self, grid: Sequence[int], side: int | None = None) -> Reading:
        """The same, but every picture is cut for one resolution, whatever its shape.

        Args:
            grid: (width, height) in pixels.
            side: pixels along one side of a view; ``None`` leaves unchecked that the grid is made of whole views.

        Raises:
            ValueError: pictures are not cut into tiles here, or not into whole ones.
        """
        if not str(self.image_aspect_ratio).startswith("anyres"):
            raise ValueError(
                "a fixed grid is for checkpoints that cut pictures into tiles (LLaVA-NeXT, LLaVA-OneVision); this one "
                f"reads them as image_aspect_ratio={self.image_aspect_ratio}"
            )
        if side is not None:
            check_grid(grid, side)
        return replace(self, image_grid_pinpoints=[list(grid)])

    def for_pictures(self, count: int) -> Reading:
        """How ``count`` pictures of one prompt are read: LLaVA-OneVision reads several as padded squares."""
        return replace(self, image_aspect_ratio="pad") if reads_as_squares(self.image_aspect_ratio, count) else self


@dataclass(frozen=True)
class Visual:
    """One picture or video.

    Args:
        pixels: (V, 3, s, s), V views; the views of a video are its frames.
        size: (width, height) of the picture before it was cut or padded; ``None`` if unknown. Not read for videos.
        modality: "image" or "video".
        reading: how it is read.
        in_views: whether it came as a list of views, which end in newlines, rather than as LLaVA-1.5's one crop.
    """

    pixels: Tensor
    size: tuple[int, int] | None
    modality: str
    reading: Reading
    in_views: bool


@dataclass(frozen=True)
class Visuals:
    """The pictures and videos of a call, in the order of their placeholders: made by `Visuals.of`."""

    each: tuple[Visual, ...]

    @classmethod
    def of(
        cls,
        images: Tensor | Sequence[Tensor],
        sizes: Sequence[tuple[int, int] | None] | None,
        modalities: str | Sequence[str] | None,
        reading: Reading,
        crops_are_views: bool = False,
    ) -> Visuals:
        """From what `process_images` and `process_video` return.

        Args:
            images: (N, 3, s, s), one view each; or (N, V, 3, s, s) or a list of (V, 3, s, s) or (3, s, s).
            sizes: (width, height) of each; needed for tiles, and to know the padding of squares.
            modalities: see `modality_list`.
            crops_are_views: whether (N, 3, s, s) is read like a list of views.

        Raises:
            ValueError: another number of sizes or modalities than of images; an unknown modality.
        """
        views = as_views(images)
        if sizes is not None and len(sizes) != len(views):
            raise ValueError(f"{len(views)} images but {len(sizes)} image_sizes")
        known = [None] * len(views) if sizes is None else [size and tuple(map(int, size)) for size in sizes]
        in_views = crops_are_views or not isinstance(images, Tensor) or images.ndim == 5
        kinds = modality_list(modalities, len(views))
        return cls(tuple(Visual(*one, reading, in_views) for one in zip(views, known, kinds, strict=True)))

    def __len__(self) -> int:
        return len(self.each)

    def pick(self, numbers: Sequence[int]) -> Visuals:
        """Some of them."""
        return Visuals(tuple(self.each[number] for number in numbers))

    def in_prompts(self, of_prompt: Sequence[Sequence[int]]) -> Visuals:
        """The same, read as it is right for pictures that are together in a prompt: see `Reading.for_pictures`.

        Tiles are read as tiles: whoever cut several pictures into them has chosen to.

        Args:
            of_prompt: numbers of the visuals in each prompt.
        """
        each = list(self.each)
        for numbers in of_prompt:
            pictures = [number for number in numbers if each[number].modality == IMAGE]
            for number in pictures:
                if len(each[number].pixels) == 1:
                    reading = each[number].reading.for_pictures(len(pictures))
                    each[number] = replace(each[number], reading=reading)
        return Visuals(tuple(each))

    def groups(self) -> list[list[int]]:
        """Numbers of those that go through the tower and the selection together: all pictures, videos read alike."""
        found: dict[Any, list[int]] = {}
        for number, visual in enumerate(self.each):
            kind = visual.modality, visual.reading.mm_spatial_pool_mode if visual.modality == VIDEO else None
            found.setdefault(kind, []).append(number)
        return list(found.values())


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
    def of(cls, config: Reading | Any) -> VideoReading:
        """From the keys ``mm_spatial_pool_mode``, ``mm_newline_position``, ``add_faster_video``, ...

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
        """The order of the tokens of a video of so many frames of side x side patches."""
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
    config: Reading | Any,
    views: int,
    side: int,
    tokens: int,
    view_pixels: int,
    size: tuple[int, int] | None,
    in_views: bool,
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
