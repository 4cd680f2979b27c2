"""Evenly spaced tokens: a control without information."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.base import Pruner, register
from llava.pruning.inputs import PruningInputs


@register
@dataclass(frozen=True, kw_only=True)
class Uniform(Pruner):
    """Keep the tokens floor((i + 1/2) n / m), i = 0..m-1, in raster order.

    Input: features (B, n, d), of which only the shape is used, and valid. Output: indices (B, m). Where some tokens
    are not valid, the spacing runs over those that are. On a square grid the columns alias: see `grid`.
    """

    name: ClassVar[str] = "uniform"

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        views, tokens = inputs.features.shape[:2]
        step = torch.arange(keep, device=inputs.features.device)
        if inputs.valid is None:
            return ((2 * step + 1) * tokens // (2 * keep)).expand(views, -1), {}
        # Valid tokens first, each group in raster order; a view with too few of them adds the first invalid ones.
        order = (~inputs.valid).int().argsort(dim=-1, stable=True)
        count = inputs.valid.sum(-1, keepdim=True).clamp_min(keep)
        return order.gather(1, (2 * step + 1) * count // (2 * keep)).sort(dim=-1).values, {}
