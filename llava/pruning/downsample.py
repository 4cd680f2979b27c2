"""The picture itself made smaller: the control that needs no method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.pruning.base import TokenMaker, keep_none, register
from llava.pruning.inputs import PruningInputs, Selection
from llava.pruning.pool import square_side


@register
@dataclass(frozen=True, kw_only=True)
class Downsample(TokenMaker):
    """Shrink the picture until the vision tower makes about m patches of it, and encode it anew.

    Inputs: features (B, n, d), of which only the shape is used (n a square number), pixels (B, 3, s, s), encode and
    valid. Output: no index, and the projected tokens (B, k, d) of the smaller picture, zeros after those of a view
    that gives fewer.

    A view that shows no padding becomes a square of rows x columns patches close to m. Where some patches are not
    valid, the box that holds the valid ones is cut out first, so that no token is spent on padding, and rows and
    columns follow its shape: the count of such a view is known from its layout (`kept_and_made`). Pixels are averaged
    by area; the tower interpolates its positions. The CPU cuts: on a GPU it waits for ``valid``, where there is one.
    """

    name: ClassVar[str] = "downsample"
    place: ClassVar[str] = "pixels"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"pixels", "encode"})

    def count(self, tokens: int) -> int:
        asked = super().count(tokens)
        side = square_side(self.name, tokens)
        rows, columns = patch_grid((side, side), asked)
        return min(rows * columns, tokens) if asked < tokens else tokens

    def count_made(self, keep: int) -> int:
        return keep

    def kept_and_made(self, keep: int, eligible: Tensor) -> tuple[Tensor, Tensor]:
        made = [grid[0] * grid[1] for _, grid in self.boxes(eligible)]
        return torch.zeros(len(made), dtype=torch.int64), torch.tensor(made, dtype=torch.int64)

    def boxes(self, valid: Tensor) -> list[tuple[tuple[int, int, int, int], tuple[int, int]]]:
        """For each view of ``valid`` (B, n) the box of valid patches and the (rows, columns) that it becomes."""
        side = square_side(self.name, valid.shape[1])
        asked = super().count(valid.shape[1])
        found = [box_of(view) for view in valid.unflatten(1, (side, side))]
        return [(box, patch_grid((box[2] - box[0], box[3] - box[1]), asked)) for box in found]

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        return keep_none(inputs), {}

    def make(self, inputs: PruningInputs, kept: Selection, count: int) -> Selection:
        valid = torch.ones(inputs.views, inputs.tokens, dtype=torch.bool) if inputs.valid is None else inputs.valid
        jobs: dict[tuple, list[int]] = {}  # views that are cut and shrunk alike are encoded together
        for view, job in enumerate(self.boxes(valid.cpu())):
            jobs.setdefault(job, []).append(view)
        patch = inputs.pixels.shape[-1] // square_side(self.name, inputs.tokens)
        longest = max(rows * columns for _, (rows, columns) in jobs)
        made = inputs.features.new_zeros(inputs.views, longest, inputs.features.shape[-1])
        for ((top, left, bottom, right), (rows, columns)), views in jobs.items():
            if rows * columns == 0:
                continue
            chosen = torch.tensor(views).to(made.device, non_blocking=True)
            seen = inputs.pixels[:, :, top * patch : bottom * patch, left * patch : right * patch]
            cut = seen.index_select(0, chosen)
            small = F.interpolate(cut.float(), size=(rows * patch, columns * patch), mode="area")
            made[:, : rows * columns].index_copy_(0, chosen, inputs.encode(small.to(cut.dtype)).to(made.dtype))
        return dataclasses.replace(kept, made=made)


def box_of(plane: Tensor) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of the True entries of a plane (rows, columns); zeros if there are none."""
    rows, columns = (plane.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    return (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1) if rows else (0, 0, 0, 0)


def patch_grid(box: tuple[int, int], asked: int) -> tuple[int, int]:
    """(rows, columns) in the proportions of a ``box`` (height, width) of patches, about ``asked`` in number."""
    height, width = box
    if asked >= height * width:
        return height, width
    rows = min(max(round((asked * height / width) ** 0.5), 1), height)
    return rows, min(max(round(asked / rows), 1), width)
