"""``--hf --show-tokens``: the pictures as a model of the Transformers library saw them, dropped tokens dimmed.

Where a token stands in its picture is known of three kinds of model: tiles with their padding cut off (LLaVA-NeXT),
one grid as wide and high as the picture asks for (Qwen2-VL and its successors), and whole views (LLaVA, Gemma 3,
Idefics 3, ...), which InternVL cuts out of the picture as tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava.integrations.transformers import KeptPicture
from llava.integrations.transformers.host import find_host
from llava.integrations.transformers.pictures import SEPARATOR
from llava.layout.views import NEWLINE, tiled_layout
from llava.mm_utils import anyres_grid
from llava.pruning import Pruner
from llava.serve.token_picture import DIMMED, SHEET_COLUMNS, join, tiles_side_by_side

TILED = "llava_next"
TILES_FIRST = "internvl"  # the tiles of a picture row by row, then its overview
GRID = "image_grid_thw"


def check_drawable(model: Any, inputs: dict[str, Any], pruner: Pruner | None) -> None:
    """Raise ValueError where it is not known which part of a picture a token shows; before anything is answered."""
    name = type(model).__name__
    if pruner is not None and pruner.place == "encoder":
        raise ValueError(f"--show-tokens: pruner '{pruner.name}' makes tokens of many patches, which stand nowhere")
    if model.config.model_type == TILED or GRID in inputs:
        return
    views = _square_views(inputs)
    tokens = _placeholders(model, inputs)
    if views is None or tokens % len(views) or _shape(tokens // len(views), views) is None:
        raise ValueError(f"--show-tokens does not know where the visual tokens of {name} stand in its pictures")


@dataclass(frozen=True)
class SeenView:
    """A view of a picture as its model saw it, and which of the picture's tokens stand in it.

    Args:
        picture: its number in the prompt.
        colours: (h, w, 3) uint8.
        tokens: (rows, columns) int64, places among the picture's tokens, separators counted; -1 at a cell whose token
            the model does not read.
        grid: (columns, rows) of the tiles that the view is one of, or the overview of; ``None`` if it is no tile.
    """

    picture: int
    colours: np.ndarray
    tokens: Tensor
    grid: tuple[int, int] | None = None

    def at(self, values: Tensor, nothing: Any = 0) -> Tensor:
        """Values (t,) of the picture's tokens -> (rows, columns); ``nothing`` where there is no token."""
        return torch.where(self.tokens >= 0, values[self.tokens.clamp_min(0)], nothing)


def seen_views(
    model: Any,
    processor: Any,
    inputs: dict[str, Any],
    pictures: Sequence[Image.Image],
    kept: Sequence[KeptPicture] | None,
) -> list[SeenView]:
    """All views of a prompt's pictures, picture by picture, the overview before its tiles.

    What `check_drawable` refuses has none.

    Args:
        inputs: what the processor made of prompt and pictures.
        kept: of the last call, in the order of the prompt; ``None`` if nothing was pruned.
    """
    if model.config.model_type == TILED:
        return _tiled_views(model, processor, inputs, pictures)
    if GRID in inputs:
        return _grid_views(model, inputs, pictures)
    views = _whole_views(model, processor, inputs, kept)
    return _with_overviews_first(views, processor, pictures) if model.config.model_type == TILES_FIRST else views


def draw_kept(
    model: Any,
    processor: Any,
    inputs: dict[str, Any],
    pictures: Sequence[Image.Image],
    kept: Sequence[KeptPicture] | None,
) -> Image.Image:
    """All pictures of a prompt below each other, dropped tokens dimmed; arguments as of `seen_views`."""
    views = seen_views(model, processor, inputs, pictures, kept)
    tiled = any(view.grid is not None for view in views)

    def drawn(view: SeenView) -> np.ndarray:
        lit = view.tokens >= 0 if kept is None else view.at(kept[view.picture].kept)
        return dim(view.colours, lit)

    if tiled:
        rows = []
        for number in dict.fromkeys(view.picture for view in views):
            overview, *tiles = (view for view in views if view.picture == number)
            beside = [tiles_side_by_side([drawn(tile) for tile in tiles], overview.grid)] if tiles else []
            rows.append(join([drawn(overview), *beside], 1))
        return Image.fromarray(join(rows, axis=0))
    columns = SHEET_COLUMNS if len(views) > len(pictures) else 1
    parts = [drawn(view) for view in views]
    rows = [join(parts[i : i + columns], axis=1) for i in range(0, len(parts), columns)]
    return Image.fromarray(join(rows, axis=0))


def dim(colours: np.ndarray, lit: Tensor) -> np.ndarray:
    """A picture (h, w, 3) uint8 with the cells outside ``lit`` (rows, columns) dimmed."""
    rows, columns = (torch.arange(n) * cells // n for n, cells in zip(colours.shape[:2], lit.shape, strict=True))
    share = DIMMED + (1 - DIMMED) * lit[rows][:, columns].float().numpy()
    return (colours * share[..., None]).round().astype(np.uint8)


def colours_of(pixels: Tensor, processor: Any) -> np.ndarray:
    """A view (3, h, w) as an image or video processor normalised it -> (h, w, 3) uint8."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return ((pixels.float().cpu() * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _square_views(inputs: dict[str, Any]) -> Tensor | None:
    """The views (V, 3, s, s) of all pictures, where there is nothing else in ``pixel_values``."""
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5) or pixels.shape[-3] != 3:
        return None
    return pixels.flatten(0, -4)


def _placeholders(model: Any, inputs: dict[str, Any]) -> int:
    return int((inputs["input_ids"] == find_host(model).placeholders["image"]).sum())


def _shape(tokens: int, views: Tensor) -> tuple[int, int] | None:
    """(rows, columns) of so many tokens in views (V, 3, h, w) of square patches; ``None`` if they fill no grid."""
    height, width = views.shape[-2:]
    rows = round(math.sqrt(tokens * height / width))
    if rows == 0 or tokens % rows or rows * width != tokens // rows * height:
        return None
    return rows, tokens // rows


def _whole_views(
    model: Any, processor: Any, inputs: dict[str, Any], kept: Sequence[KeptPicture] | None
) -> list[SeenView]:
    """Views of equally many tokens, in their order; row breaks may stand between them."""
    pixels = _square_views(inputs)
    if kept is None:
        count = _placeholders(model, inputs) // len(pixels)
        cells = torch.arange(count).reshape(_shape(count, pixels))
        return [SeenView(0, colours_of(view, processor.image_processor), cells) for view in pixels]
    places = [(one.picture.views != SEPARATOR).nonzero().flatten() for one in kept]
    count = sum(map(len, places)) // len(pixels)
    of_view = [(number, part) for number, own in enumerate(places) for part in own.split(count)]
    return [
        SeenView(number, colours_of(view, processor.image_processor), part.reshape(_shape(count, pixels)))
        for view, (number, part) in zip(pixels, of_view, strict=True)
    ]


def _with_overviews_first(views: list[SeenView], processor: Any, pictures: Sequence[Image.Image]) -> list[SeenView]:
    """InternVL's views with the overview of each picture before its tiles, and their grid by the processor's rule."""
    images = processor.image_processor
    canvas = import_module(type(images).__module__).get_optimal_tiled_canvas
    side = images.size["height"], images.size["width"]
    grids = [
        canvas((picture.height, picture.width), side, images.min_patches, images.max_patches) for picture in pictures
    ]
    counts = [columns * rows + (columns * rows > 1) for columns, rows in grids]
    if sum(counts) != len(views):
        return views  # a processor that was told to cut no tiles
    found: list[SeenView] = []
    for number, (grid, count) in enumerate(zip(grids, counts, strict=True)):
        *tiles, last = (replace(view, picture=number) for view in views[len(found) : len(found) + count])
        found += [replace(view, grid=grid) for view in (last, *tiles)] if tiles else [last]
    return found


def _grid_views(model: Any, inputs: dict[str, Any], pictures: Sequence[Image.Image]) -> list[SeenView]:
    merge, patch = model.config.vision_config.spatial_merge_size, model.config.vision_config.patch_size
    views = []
    for number, (picture, (_, height, width)) in enumerate(zip(pictures, inputs[GRID].tolist(), strict=True)):
        colours = np.asarray(picture.convert("RGB").resize((width * patch, height * patch)))
        rows, columns = height // merge, width // merge
        views.append(SeenView(number, colours, torch.arange(rows * columns).reshape(rows, columns)))
    return views


def _tiled_views(
    model: Any, processor: Any, inputs: dict[str, Any], pictures: Sequence[Image.Image]
) -> list[SeenView]:
    """The overview and the tiles of each picture; the library reads tokens in the order of LLaVA's own layout."""
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    pinpoints = [(width, height) for height, width in processor.image_processor.image_grid_pinpoints]
    found = []
    for number, picture in enumerate(pictures):
        grid = anyres_grid(picture.size, pinpoints, vision.image_size)
        sequence = tiled_layout(picture.size, grid, side, "spatial_unpad").sequence
        is_patch = sequence != NEWLINE
        places = torch.full((1 + grid[0] * grid[1], side, side), -1)
        places.view(-1)[sequence[is_patch]] = is_patch.nonzero().flatten()
        views = inputs["pixel_values"][number, : len(places)]
        found += [
            SeenView(number, colours_of(view, processor.image_processor), cells, grid)
            for view, cells in zip(views, places, strict=True)
        ]
    return found
