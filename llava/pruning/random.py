"""Random tokens: the control that every method has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.base import Pruner, register
from llava.pruning.functional import lowest_ranked, stable_rank
from llava.pruning.inputs import PruningInputs
from llava.pruning.options import Seed


@register
@dataclass(frozen=True, kw_only=True)
class Random(Pruner):
    """Keep m tokens of each view, drawn uniformly without replacement.

    Input: features (B, n, d), of which only the shape is used. Output: indices (B, m). The draw depends on ``seed``
    and on the view's id alone, so it is the same in every batch, on every device.

    Args:
        seed: another seed, another draw.
    """

    name: ClassVar[str] = "random"

    seed: Seed = 0

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        scores = random_scores(inputs, self.seed)
        return lowest_ranked(stable_rank(scores), keep, inputs.valid), {}


def random_scores(inputs: PruningInputs, seed: int) -> Tensor:
    """Counter-based random numbers (B, n) float64 in [0, 1): a hash of (seed, view id, token), no generator state."""
    views, tokens = inputs.features.shape[:2]
    device = inputs.features.device
    ids = torch.arange(views, device=device) if inputs.view_ids is None else inputs.view_ids.to(device)
    stream = _mix(_mix(torch.full_like(ids, seed)) ^ ids)
    hashed = _mix(stream[:, None] ^ _mix(torch.arange(tokens, device=device))[None, :])
    return _shift_right(hashed, 11).double() * 2.0**-53


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Shift int64 as if it were unsigned."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    """SplitMix64's step and finaliser (Steele, Lea and Flood, OOPSLA 2014) on int64 tensors; products wrap."""
    value = value + (0x9E3779B97F4A7C15 - 2**64)
    value = (value ^ _shift_right(value, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    value = (value ^ _shift_right(value, 27)) * (0x94D049BB133111EB - 2**64)
    return value ^ _shift_right(value, 31)
