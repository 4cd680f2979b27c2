"""Which patches of a view show only padding: they take part in no selection, and fill places nothing else can.

The rules are LLaVA's own, as in llava/layout/views.py, which a host outside that package does not import.
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
    width, height = columns * side, rows * side
    left = top = 0
    if size[0] / size[1] > width / height:
        top = (height - int(size[1] * (width / size[0]))) // 2
    else:
        left = (width - int(size[0] * (height / size[1]))) // 2
    plane = torch.zeros(height, width, dtype=torch.bool)
    plane[top : height - top, left : width - left] = True
    tiles = plane.reshape(rows, side, columns, side).permute(0, 2, 1, 3).reshape(rows * columns, side * side)
    return torch.cat([torch.ones(1, side * side, dtype=torch.bool), tiles])
