"""Which patches of a view show only padding: they take part in no selection, and fill places that no other can.

The rules are LLaVA's own, for every host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def patches_of_square(size: tuple[int, int], side: int) -> Tensor:
    """(1, side * side) bool, False where a picture of ``size`` (width, height), centred on a square, has no pixel."""
    square = max(size)

    def touched(length: int) -> Tensor:
        start = (square - length) // 2
        patch = torch.arange(side)
        return ((patch + 1) * square > start * side) & (patch * square < (start + length) * side)

    return (touched(size[1])[:, None] & touched(size[0])[None, :]).reshape(1, -1)


def patches_of_tiles(size: tuple[int, int], grid: tuple[int, int], side: int) -> Tensor:
    """(1 + columns * rows, side * side) bool for the overview and the tiles of a picture of ``size`` (width, height).

    Args:
        grid: (columns, rows) of tiles, on which the picture lies centred.
    """
    columns, rows = grid
    top, left, height, width = unpadded_box(size, (columns * side, rows * side))
    plane = torch.zeros(rows * side, columns * side, dtype=torch.bool)
    plane[top : top + height, left : left + width] = True
    tiles = plane.reshape(rows, side, columns, side).permute(0, 2, 1, 3).reshape(rows * columns, side * side)
    return torch.cat([torch.ones(1, side * side, dtype=torch.bool), tiles])


def unpadded_box(size: tuple[int, int], plane: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the part of a ``plane`` (width, height) of patches that a centred picture covers.

    LLaVA-NeXT's own rounding, which keeps a partly covered row or column on both sides or on neither.
    """
    width, height = plane
    if size[0] / size[1] > width / height:
        margin = (height - int(size[1] * (width / size[0]))) // 2
        return margin, 0, height - 2 * margin, width
    margin = (width - int(size[0] * (height / size[1]))) // 2
    return 0, margin, height, width - 2 * margin
