"""``--hf --show-tokens``: the pictures as a model of the Transformers library saw them, dropped tokens dimmed.

Where a token stands in its picture is known of three kinds of model: tiles with their padding cut off (LLaVA-NeXT),
one grid as wide and high as the picture asks for (Qwen2-VL and its successors), and square views (LLaVA, Gemma 3,
InternVL, Idefics 3, ...).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    if views is None or tokens % len(views) or math.isqrt(tokens // len(views)) ** 2 != tokens // len(views):
        raise ValueError(f"--show-tokens does not know where the visual tokens of {name} stand in its pictures")


def draw_kept(
    model: Any,
    processor: Any,
    inputs: dict[str, Any],
    pictures: Sequence[Image.Image],
    kept: Sequence[KeptPicture] | None,
) -> Image.Image:
    """All pictures of a prompt below each other.

    Args:
        inputs: what the processor made of prompt and pictures.
        kept: of the last call, in the order of the prompt; ``None`` if nothing was pruned.
    """
    masks = None if kept is None else [one.kept for one in kept]
    if model.config.model_type == TILED:
        drawn = _draw_tiled(model, processor, inputs, pictures, masks)
    elif GRID in inputs:
        drawn = _draw_grids(model, inputs, pictures, masks)
    else:
        if kept is not None:  # view by view; row breaks stand between
            masks = torch.cat([one.kept[one.picture.views != SEPARATOR] for one in kept])
        drawn = _draw_squares(
            processor, inputs, masks, SHEET_COLUMNS if len(_square_views(inputs)) > len(pictures) else 1
        )
    return Image.fromarray(join(drawn, axis=0))


def dim(colours: np.ndarray, lit: Tensor) -> np.ndarray:
    """A picture (h, w, 3) uint8 with the cells outside ``lit`` (rows, columns) dimmed."""
    rows, columns = (torch.arange(n) * cells // n for n, cells in zip(colours.shape[:2], lit.shape, strict=True))
    share = DIMMED + (1 - DIMMED) * lit[rows][:, columns].float().numpy()
    return (colours * share[..., None]).round().astype(np.uint8)


def _colours(pixels: Tensor, processor: Any) -> np.ndarray:
    """A view (3, h, w) as its processor normalised it -> (h, w, 3) uint8."""
    images = processor.image_processor
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
    return ((pixels.float().cpu() * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _square_views(inputs: dict[str, Any]) -> Tensor | None:
    """The views (V, 3, s, s) of all pictures, where there is nothing else in ``pixel_values``."""
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5) or pixels.shape[-3] != 3:
        return None
    return pixels.flatten(0, -4)


def _placeholders(model: Any, inputs: dict[str, Any]) -> int:
    return int((inputs["input_ids"] == find_host(model).placeholders["image"]).sum())


def _draw_squares(processor: Any, inputs: dict[str, Any], kept: Tensor | None, columns: int) -> list[np.ndarray]:
    views = _square_views(inputs)
    colours = [_colours(view, processor) for view in views]
    if kept is not None:
        side = math.isqrt(len(kept) // len(views))
        colours = [dim(c, lit) for c, lit in zip(colours, kept.reshape(-1, side, side), strict=True)]
    return [join(colours[i : i + columns], axis=1) for i in range(0, len(colours), columns)]


def _draw_grids(
    model: Any, inputs: dict[str, Any], pictures: Sequence[Image.Image], masks: Sequence[Tensor] | None
) -> list[np.ndarray]:
    merge, patch = model.config.vision_config.spatial_merge_size, model.config.vision_config.patch_size
    drawn = []
    for number, (picture, (_, height, width)) in enumerate(zip(pictures, inputs[GRID].tolist(), strict=True)):
        colours = np.asarray(picture.convert("RGB").resize((width * patch, height * patch)))
        if masks is not None:
            colours = dim(colours, masks[number].reshape(height // merge, width // merge))
        drawn.append(colours)
    return drawn


def _draw_tiled(
    model: Any,
    processor: Any,
    inputs: dict[str, Any],
    pictures: Sequence[Image.Image],
    masks: Sequence[Tensor] | None,
) -> list[np.ndarray]:
    """The overview beside the tiles; the library reads tokens in the order of LLaVA's own layout."""
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    pinpoints = [(width, height) for height, width in processor.image_processor.image_grid_pinpoints]
    drawn = []
    for number, picture in enumerate(pictures):
        grid = anyres_grid(picture.size, pinpoints, vision.image_size)
        sequence = tiled_layout(picture.size, grid, side, "spatial_unpad").sequence
        kept = sequence != NEWLINE
        lit = torch.zeros(1 + grid[0] * grid[1], side * side, dtype=torch.bool)
        lit.view(-1)[sequence[kept if masks is None else kept & masks[number]]] = True
        views = inputs["pixel_values"][number, : len(lit)]
        parts = [
            dim(_colours(view, processor), cells.reshape(side, side)) for view, cells in zip(views, lit, strict=True)
        ]
        drawn.append(join([parts[0], tiles_side_by_side(parts[1:], grid)], axis=1))
    return drawn
