"""2-D pooling: the control that keeps a little of everything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.base import TokenMaker, keep_none, register
from llava.pruning.functional import working_dtype
from llava.pruning.grid import grid_shape
from llava.pruning.inputs import PruningInputs, Selection


@register
@dataclass(frozen=True, kw_only=True)
class Pool(TokenMaker):
    """Average the tokens of each cell of a grid of rows x columns laid over the view.

    Inputs: features (B, n, d), n a square number, and valid. Output: no index, and the means (B, rows x columns, d).
    The grid is that of `grid`: its size is the closest to m, the squarest among equals; the count is that size.
    Where some tokens are not valid the grid covers the box that holds the valid ones. Neighbouring cells share the
    row or column that the border between them cuts.
    """

    name: ClassVar[str] = "pool"
    makes_means: ClassVar[bool] = True

    def count(self, tokens: int) -> int:
        asked = super().count(tokens)
        return tokens if asked >= tokens else math.prod(grid_shape(square_side(self.name, tokens), asked))

    def count_made(self, keep: int) -> int:
        return keep

    def kept_and_made(self, keep: int, eligible: Tensor) -> tuple[Tensor, Tensor]:
        shown = eligible.any(-1)
        return torch.zeros_like(shown, dtype=torch.int64), keep * shown

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        return keep_none(inputs), {}

    def make(self, inputs: PruningInputs, kept: Selection, count: int) -> Selection:
        side = square_side(self.name, inputs.tokens)
        rows, columns = grid_shape(side, count)
        plane = inputs.features.to(working_dtype(inputs.features.dtype)).unflatten(1, (side, side))
        valid = torch.ones(inputs.views, inputs.tokens, dtype=torch.bool, device=plane.device)
        valid = (valid if inputs.valid is None else inputs.valid).unflatten(1, (side, side))
        down = cell_weights(valid.any(2), rows).to(plane.dtype)
        across = cell_weights(valid.any(1), columns).to(plane.dtype)
        pooled = torch.einsum("bry,byxd,bcx->brcd", down, plane, across)
        weights = torch.einsum("bry,bcx->brcyx", down, across).flatten(3, 4).flatten(1, 2)
        return dataclasses.replace(kept, made=pooled.flatten(1, 2).to(inputs.features.dtype), weights=weights)


def square_side(name: str, tokens: int) -> int:
    """Side of a square of ``tokens`` tokens. Raises ValueError if they do not form one."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"pruner '{name}' needs a square layout of tokens, got {tokens} tokens per view")
    return side


def cell_weights(inside: Tensor, cells: int) -> Tensor:
    """How much each line counts in each of ``cells`` equal parts of a stretch: (B, side) bool -> (B, cells, side).

    The stretch goes from the first to the last True; a part holds every line that it touches, each with the same
    weight.
    """
    line = torch.arange(inside.shape[-1], device=inside.device)
    first = inside.int().argmax(-1, keepdim=True)
    length = torch.where(inside, line + 1, 0).amax(-1, keepdim=True) - first
    cell = torch.arange(cells, device=inside.device)
    start = first + cell * length // cells  # (B, cells)
    end = first + -(-(cell + 1) * length // cells)
    touched = (line >= start[:, :, None]) & (line < end[:, :, None])
    return touched / touched.sum(-1, keepdim=True).clamp_min(1)
