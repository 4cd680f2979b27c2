"""The projector from the vision tower's width to the language model's."""

from __future__ import annotations

import re
from typing import Any

from torch import nn


def build_vision_projector(config: Any) -> nn.Module:
    """Make the projector that ``config.mm_projector_type`` names: "linear", "identity" or "mlp<depth>x_gelu".

    Raises:
        ValueError: for any other type.
    """
    kind = getattr(config, "mm_projector_type", "linear")
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    mlp = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if mlp is None:
        raise ValueError(f"mm_projector_type must be linear, identity or mlp<depth>x_gelu, got {kind!r}")
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(int(mlp[1]) - 1):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)
