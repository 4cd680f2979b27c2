"""A picture of what was kept: every view as the model saw it, dropped patches dimmed, question and answer below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from llava.layout.pooling import pooled_side
from llava.model.kept_tokens import KeptTokens
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.terminal import printable

DIMMED = 0.3  # share of the original brightness that a dropped patch keeps
GAP = 8  # pixels between views and between pictures
SHEET_COLUMNS = 8  # frames of a video beside each other
FONT_SIZE = 20  # pixels, of the question and the answer
LINE_HEIGHT = 28
QUESTION_COLOUR, ANSWER_COLOUR = (0, 0, 0), (0, 90, 180)


def drawn_cell(tower: VisionTower, pool_mode: str | None) -> float:
    """Pixels along one side of what a token shows. Blocks of pooled patches leave a rest of the view uncovered."""
    if pool_mode == "bilinear":
        return tower.config.image_size / pooled_side(tower.num_patches_per_side, pool_mode)
    return tower.config.patch_size * (1 if pool_mode is None else 2)


def draw_kept_tokens(
    pixels: Sequence[Tensor], kept: Sequence[KeptTokens], image_processor: Any, cell: float
) -> Image.Image:
    """Draw all pictures of a prompt below each other; tiles stand where they were cut, beside the overview.

    The frames of a video make a contact sheet, in the order of time.

    Nothing is dimmed where a method makes all of its tokens itself, out of all patches.

    Args:
        pixels: per picture (V, 3, s, s) or (3, s, s), as the model got them.
        kept: per picture, from `EmbeddedPrompts.kept`.
        image_processor: its mean and standard deviation turn pixels back into colours.
        cell: see `drawn_cell`.
    """
    pictures = []
    for views, tokens in zip(pixels, kept, strict=True):
        views = views if views.ndim == 4 else views[None]
        masks = tokens.mask()
        if tokens.made is not None and not masks.any():
            masks = ~masks
        drawn = [draw_view(view, mask, image_processor, cell) for view, mask in zip(views, masks, strict=True)]
        if tokens.layout.grid is None:
            rows = [drawn[i : i + SHEET_COLUMNS] for i in range(0, len(drawn), SHEET_COLUMNS)]
            pictures.append(join([join(row, axis=1) for row in rows], axis=0))
        else:
            pictures.append(join([drawn[0], tiles_side_by_side(drawn[1:], tokens.layout.grid)], axis=1))
    return Image.fromarray(join(pictures, axis=0))


def draw_view(pixels: Tensor, mask: Tensor, image_processor: Any, cell: float) -> np.ndarray:
    """One view (3, s, s) with the cells outside ``mask`` (n,), and what no cell covers, dimmed: (s, s, 3) uint8."""
    colours = view_colours(pixels, image_processor)
    side = int(mask.numel() ** 0.5)
    position = (torch.arange(pixels.shape[-1]) / cell).floor().long()  # cell of each pixel along a side
    lit = torch.zeros(position.max() + 1, position.max() + 1)
    lit[:side, :side] = mask.reshape(side, side)
    lit = lit[position][:, position]
    return (colours * (DIMMED + (1 - DIMMED) * lit) * 255).round().byte().permute(1, 2, 0).numpy()


def view_colours(pixels: Tensor, image_processor: Any) -> Tensor:
    """A view (3, s, s) as the model got it -> its colours (3, s, s) float32 on the CPU, from 0 to 1."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (image_processor.image_mean, image_processor.image_std))
    return (pixels.float().cpu() * std + mean).clamp(0, 1)


def with_caption(picture: Image.Image, question: str, answer: str) -> Image.Image:
    """The picture with the question and, in another colour, the answer on a white band below it, broken into lines."""
    font = ImageFont.load_default(size=FONT_SIZE)
    lines = [
        (line, colour)
        for text, colour in ((question, QUESTION_COLOUR), (answer, ANSWER_COLOUR))
        for line in _broken(text, font, picture.width - 2 * GAP)
    ]
    captioned = Image.new("RGB", (picture.width, picture.height + GAP + len(lines) * LINE_HEIGHT), "white")
    captioned.paste(picture)
    canvas = ImageDraw.Draw(captioned)
    for number, (line, colour) in enumerate(lines):
        canvas.text((GAP, picture.height + GAP + number * LINE_HEIGHT), line, fill=colour, font=font)
    return captioned


def join_panels(panels: Sequence[Image.Image]) -> Image.Image:
    """One picture of the panels of several questions: side by side if they are upright, else below each other."""
    axis = int(all(panel.height > panel.width for panel in panels))
    return Image.fromarray(join([np.asarray(panel) for panel in panels], axis=axis))


def save_drawing(drawing: Image.Image, path: Path) -> None:
    """Write a picture of kept tokens, and say where it is."""
    drawing.save(path)
    print(f"[kept tokens drawn in {printable(path)}]")


def _broken(text: str, font: Any, width: int) -> list[str]:
    """Lines of the text's words that are at most ``width`` pixels wide; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def tiles_side_by_side(views: list[np.ndarray], grid: tuple[int, int]) -> np.ndarray:
    columns, rows = grid
    lines = [np.concatenate(views[row * columns : (row + 1) * columns], axis=1) for row in range(rows)]
    return np.concatenate(lines, axis=0)


def join(parts: list[np.ndarray], axis: int) -> np.ndarray:
    """Put arrays side by side (axis 1) or below each other (axis 0) on white, with a gap between them."""
    across = 1 - axis
    extent = max(part.shape[across] for part in parts)
    padded = []
    for i, part in enumerate(parts):
        border = [(0, 0), (0, 0), (0, 0)]
        border[across] = (0, extent - part.shape[across])
        border[axis] = (GAP if i else 0, 0)
        padded.append(np.pad(part, border, constant_values=255))
    return np.concatenate(padded, axis=axis)
