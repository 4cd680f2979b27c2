"""The projector from the vision tower's width to the language model's."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

MAX_DEPTH = 64


def build_vision_projector(config: Any) -> nn.Module:
    """Make the projector that ``config.mm_projector_type`` names: "linear", "identity" or "mlp<depth>x_gelu".

    Raises:
        ValueError: for any other type.
    """
    kind = getattr(config, "mm_projector_type", "linear")
    depth = projector_depth(kind)
    if not depth:
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)


def projector_depth(kind: Any) -> int:
    """Linear layers of the projector named ``kind``: 0 for "identity". Raises ValueError for any other type."""
    if kind in ("identity", "linear"):
        return int(kind == "linear")
    mlp = re.fullmatch(r"mlp(\d{1,9})x_gelu", kind) if isinstance(kind, str) else None
    if mlp is None or not 1 <= int(mlp[1]) <= MAX_DEPTH:
        raise ValueError(
            f"mm_projector_type must be linear, identity or mlp<depth>x_gelu with a depth of 1 to {MAX_DEPTH}, got "
            f"{kind!r:.80}"
        )
    return int(mlp[1])
