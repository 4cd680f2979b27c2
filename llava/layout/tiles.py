"""Into how many tiles a picture is cut, as a checkpoint's ``image_grid_pinpoints`` and ``image_aspect_ratio`` say."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

MAX_GRIDS = 4096  # resolutions that a checkpoint may offer for tiles
MAX_CANVAS_SIDE = 16 * 1024  # pixels along one side of such a resolution


def most_tiles(aspect_ratio: str | None) -> int | None:
    """K of "anyres_max_K"; ``None`` where nothing bounds the number of tokens."""
    found = re.fullmatch(r"anyres_max_(\d+)", aspect_ratio or "")
    return int(found[1]) if found else None


def reads_as_squares(aspect_ratio: str | None, pictures: int) -> bool:
    """Whether the pictures of a prompt become one padded square each: LLaVA-OneVision's rule for several of them."""
    return pictures > 1 and most_tiles(aspect_ratio) is not None


def parse_pinpoints(pinpoints: str | Sequence[Sequence[int]], side: int) -> list[list[int]]:
    """``image_grid_pinpoints`` as pairs (width, height) in pixels.

    Args:
        pinpoints: the pairs, or a string: a list in Python's notation, or a range such as "(1x1),...,(6x6)" of tile
            counts between the first and the last one written.
        side: pixels along one side of a tile.

    Raises:
        ValueError: a string that is neither, no pair at all, more than `MAX_GRIDS`, or sides beyond
            `MAX_CANVAS_SIDE`.
    """
    message = f"image_grid_pinpoints must be pairs or a range like (1x1),...,(6x6), got {pinpoints!r:.200}"
    counts: list[tuple[int, ...]] = []
    if isinstance(pinpoints, str):
        counts = [tuple(map(int, pair)) for pair in re.findall(r"\((\d{1,9})x(\d{1,9})\)", pinpoints)]
    if counts:
        spans = [range(counts[0][i], counts[-1][i] + 1) for i in (0, 1)]
        _check_grids(len(spans[0]) * len(spans[1]), pinpoints)
        pairs = [[side * column, side * row] for column in spans[0] for row in spans[1]]
    else:
        try:
            read = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
            pairs = [[int(width), int(height)] for width, height in read]
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise ValueError(message) from None
    _check_grids(len(pairs), pinpoints)
    for pair in pairs:
        if not all(0 < length <= MAX_CANVAS_SIDE for length in pair):
            raise ValueError(f"{message}: sides are 1 to {MAX_CANVAS_SIDE} pixels, not {pair[0]} x {pair[1]}")
    return pairs


def _check_grids(count: int, pinpoints: Any) -> None:
    if not 0 < count <= MAX_GRIDS:
        raise ValueError(f"image_grid_pinpoints offers {count} resolutions, not 1 to {MAX_GRIDS}: {pinpoints!r:.200}")


def check_grid(grid: Sequence[int], side: int) -> None:
    """Raise ValueError unless (width, height) in pixels is cut into whole tiles of ``side`` x ``side``."""
    parse_pinpoints([grid], side)
    if any(length % side for length in grid):
        width, height = grid
        raise ValueError(
            f"a grid of {width}x{height} pixels is not cut into whole tiles of {side} x {side}: both sides are "
            f"multiples of {side}"
        )


def select_best_resolution(size: tuple[int, int], resolutions: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The (width, height) that shows most of a picture of ``size`` (width, height), with the least canvas wasted."""

    def shown_and_waste(resolution: Sequence[int]) -> tuple[int, int]:
        width, height = resolution
        scale = min(width / size[0], height / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, -(width * height - shown)

    return tuple(max(resolutions, key=shown_and_waste))


def anyres_grid(size: tuple[int, int], pinpoints: Sequence[Sequence[int]], view_side: int) -> tuple[int, int]:
    """(columns, rows) of tiles into which a picture of ``size`` (width, height) is cut."""
    width, height = select_best_resolution(size, pinpoints)
    return width // view_side, height // view_side
