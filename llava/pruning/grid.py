"""Evenly spaced tokens in two dimensions: a control without information and without column aliasing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.base import Pruner, register
from llava.pruning.functional import lowest_ranked, stable_rank
from llava.pruning.inputs import PruningInputs

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@register
@dataclass(frozen=True, kw_only=True)
class Grid(Pruner):
    """Keep a grid of rows x columns spread over a square layout of tokens.

    Input: features (B, n, d), of which only the shape is used (n a square number), and valid. Output: indices (B, m).
    The grid is the one whose size is closest to m, the squarest among equals; where rows x columns is not m, some
    rows carry one token more or less, so that the count stays exactly m. Grid points that are not valid move to
    other valid tokens, spread by the golden ratio.
    """

    name: ClassVar[str] = "grid"

    def check_tokens(self, tokens: int) -> None:
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"pruner 'grid' needs a square layout of tokens, got {tokens} tokens per view")

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        views, tokens = inputs.features.shape[:2]
        self.check_tokens(tokens)
        points = torch.tensor(grid_points(tokens, keep)).to(inputs.features.device, non_blocking=True)
        if inputs.valid is None:
            return points.expand(views, -1), {}
        spread = torch.arange(tokens, device=points.device, dtype=torch.float64) * GOLDEN_RATIO % 1
        spread.index_fill_(0, points, -1.0)
        return lowest_ranked(stable_rank(spread.expand(views, -1)), keep, inputs.valid), {}


def grid_shape(side: int, keep: int) -> tuple[int, int]:
    """(rows, columns), each at most ``side``, whose product is closest to ``keep``; the squarest among equals."""
    sizes = [(rows, columns) for rows in range(1, side + 1) for columns in range(1, side + 1)]
    return min(sizes, key=lambda size: (abs(size[0] * size[1] - keep), abs(size[0] - size[1]), size[0]))


def grid_points(tokens: int, keep: int) -> list[int]:
    """Raster indices of the grid of ``keep`` points on a square layout of ``tokens`` tokens, ascending."""
    side = math.isqrt(tokens)
    rows, _ = grid_shape(side, keep)
    points = []
    for row in range(rows):
        columns = (row + 1) * keep // rows - row * keep // rows
        line = (2 * row + 1) * side // (2 * rows)
        points += [line * side + (2 * column + 1) * side // (2 * columns) for column in range(columns)]
    return points
