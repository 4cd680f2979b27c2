"""The first tokens in raster order: a control that shows what an uninformed cut costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.base import Pruner, register
from llava.pruning.functional import lowest_ranked
from llava.pruning.inputs import PruningInputs


@register
@dataclass(frozen=True, kw_only=True)
class First(Pruner):
    """Keep the tokens 0..m-1: the top rows of the view.

    Input: features (B, n, d), of which only the shape is used, and valid. Output: indices (B, m). Where some tokens
    are not valid, the first m of those that are.
    """

    name: ClassVar[str] = "first"

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        order = torch.arange(inputs.tokens, device=inputs.features.device)
        return lowest_ranked(order.expand(inputs.views, -1), keep, inputs.valid), {}
