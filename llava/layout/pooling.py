"""Tokens that LLaVA-Video and LLaVA-OneVision compute of projected patches, each a mix of neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from llava.layout.views import NEWLINE, SlowFast, ViewLayout

POOL_MODES = ("average", "max", "bilinear")


def pooled_side(side: int, mode: str, stride: int = 2) -> int:
    """Tokens along one side after `pool_patches`. Raises ValueError for an unknown mode."""
    if mode not in POOL_MODES:
        raise ValueError(f"mm_spatial_pool_mode must be one of {', '.join(POOL_MODES)}, got {mode!r}")
    return math.ceil(side / stride) if mode == "bilinear" else side // stride


def pool_patches(patches: Tensor, mode: str, stride: int = 2) -> Tensor:
    """Shorten every frame's square of patches: (T, s s, d) -> (T, t t, d) in the same dtype.

    "average" and "max" of blocks of stride x stride leave out the rows and columns beyond the last whole block;
    "bilinear" samples ceil(s / stride) positions along each side.
    """
    side = math.isqrt(patches.shape[1])
    target = pooled_side(side, mode, stride)
    plane = patches.mT.unflatten(2, (side, side))
    if mode == "bilinear":
        plane = F.interpolate(plane, size=(target, target), mode="bilinear")
    else:
        plane = (F.avg_pool2d if mode == "average" else F.max_pool2d)(plane, stride)
    return plane.flatten(2).mT.contiguous()


def shrink_plane(plane: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a picture's tiles, joined to one plane (h, w, d), to ``size`` (rows, columns): (rows x columns, d)."""
    resized = F.interpolate(plane.permute(2, 0, 1)[None], size=size, mode="bilinear")
    return resized[0].flatten(1).mT


def derived_tokens(
    patches: Tensor, layouts: Sequence[ViewLayout], pool_mode: str | None = None
) -> list[Tensor | None]:
    """For each picture (k, d) the tokens that its unpruned layout reads beside patches, or ``None`` if there are none.

    Args:
        patches: (V, n, d) projected, not pooled, of the views of all pictures.
        pool_mode: of videos.
    """
    derived: list[Tensor | None] = []
    first = 0
    for layout in layouts:
        views = patches[first : first + layout.views]
        first += layout.views
        if layout.derived is None:
            derived.append(None)
        elif isinstance(layout.derived, SlowFast):
            derived.append(pool_patches(views, pool_mode, layout.derived.stride).flatten(0, 1))
        else:
            behind_overview = layout.of_patches.sequence[views.shape[1] :]
            rows = behind_overview.reshape(int((behind_overview == NEWLINE).sum()), -1)[:, :-1]
            derived.append(shrink_plane(views.flatten(0, 1)[rows.to(views.device)], layout.derived.size))
    return derived
