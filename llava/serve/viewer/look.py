"""A look: what one method kept of a picture or a video for one question, and what the model answered.

Nothing here runs a model or knows a page. Cells are the places of a view's visual tokens, in rows; the cells of a
picture are numbered view after view, row after row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava.pruning.functional import cosine_similarity
from llava.pruning.redundancy import intersection_over_union
from llava.serve.viewer.setting import Setting

MOST_LOOKS = 6  # beside each other


@dataclass(frozen=True)
class View:
    """An image, a tile or a frame, and what was computed of its tokens.

    Args:
        title: "image", "overview", "tile 2", "frame 3".
        colours: (h, w, 3) uint8, as the model saw it.
        kept: (rows, columns) bool.
        scores: by name (rows, columns) float32; NaN where there is none.
        order: (rows, columns) int64, 0 at the token chosen first of those that competed with it, -1 where not kept;
            ``None`` for a method that has no order.
        closest: (rows, columns) int64, the kept cell of the picture whose token has the largest cosine with this one,
            among those that competed with it; -1 where none did. ``None`` where the host does not tell.
        cosine: (rows, columns) float32, that cosine.
        outside: (rows, columns) bool, cells that take no part: padding, or their token is not read; ``None`` for none.
        covered: share of the view's height and width that its cells cover; pooling leaves a rest.
    """

    title: str
    colours: np.ndarray
    kept: Tensor
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    order: Tensor | None = None
    closest: Tensor | None = None
    cosine: Tensor | None = None
    outside: Tensor | None = None
    covered: float = 1.0


@dataclass(frozen=True)
class Picture:
    """The views of a picture: ``grid`` (columns, rows) of the tiles behind its overview; ``None`` without tiles."""

    views: tuple[View, ...]
    grid: tuple[int, int] | None = None
    is_video: bool = False


@dataclass(frozen=True)
class Look:
    """One method, one budget, one question.

    Args:
        answer: of the model; what was written until then, if ``stopped``.
        tokens: visual tokens before; ``kept`` of them were kept, and ``made`` ones of the method's own come on top.
        per_layer: visual tokens that enter each layer of the decoder, newlines counted; equal numbers unless a method
            inside it drops some.
        seconds: of each stage, by name, in the order of the work; 0 for a vision side that had run before.
        cache_bytes: keys and values of the prompt in all layers; ``None`` for a decoder that does not keep them all.
        reads: where the method read the question, in words; "" if it reads none.
        notes: what the method warned of.
    """

    setting: Setting
    answer: str
    stopped: bool
    pictures: tuple[Picture, ...]
    tokens: int
    kept: int
    per_layer: tuple[int, ...]
    seconds: Mapping[str, float]
    cache_bytes: int | None
    made: int = 0
    reads: str = ""
    notes: tuple[str, ...] = ()

    def mask(self) -> Tensor:
        """(cells,) bool over all pictures and views: what was kept."""
        masks = [view.kept.flatten() for picture in self.pictures for view in picture.views]
        return torch.cat(masks) if masks else torch.zeros(0, dtype=torch.bool)


@dataclass(frozen=True)
class Comparison:
    """Looks at one picture beside each other; the first one is what the others are compared with.

    Raises:
        ValueError: no look, or more than `MOST_LOOKS`.
    """

    picture: str
    model: str
    looks: tuple[Look, ...]

    def __post_init__(self):
        if not 1 <= len(self.looks) <= MOST_LOOKS:
            raise ValueError(f"one to {MOST_LOOKS} looks stand beside each other, got {len(self.looks)}")

    def overlap(self) -> Tensor:
        """(looks, looks) intersection over union of the kept sets."""
        masks = torch.stack([look.mask() for look in self.looks])
        return torch.stack([intersection_over_union(mask.expand_as(masks), masks) for mask in masks])

    def varying(self) -> list[str]:
        """Names of the settings in which the looks differ: question, method, budget, options."""
        names = {"question": "question", "method": "method", "budget": "keep", "options": "options"}
        looks = [look.setting for look in self.looks]
        return [name for name, key in names.items() if len({getattr(one, key) for one in looks}) > 1]


def steps_of(rank: Tensor, kept: Tensor) -> Tensor:
    """At which step each kept token was chosen: ranks (n,) and kept (n,) bool -> (n,) int64, 0 first, -1 not kept."""
    steps = torch.full(kept.shape, -1)
    chosen = kept.nonzero().flatten()
    steps[chosen[rank[chosen].argsort(stable=True)]] = torch.arange(len(chosen))
    return steps


def closest_kept(features: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """For each token (n, d) the kept one (n,) bool with the largest cosine, never itself: numbers (n,), cosines (n,).

    -1 and NaN where no other token is kept.
    """
    chosen = kept.nonzero().flatten()
    if not len(chosen):
        return torch.full(kept.shape, -1), torch.full(kept.shape, torch.nan)
    cosine = cosine_similarity(features[None], features[None, chosen])[0].cpu()
    cosine[chosen, torch.arange(len(chosen))] = -torch.inf
    largest, place = cosine.max(dim=1)
    alone = largest == -torch.inf
    return chosen[place].masked_fill(alone, -1), largest.masked_fill(alone, torch.nan)


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """All that a comparison says, pictures apart, as JSON takes it.

    "kept" of a view are the numbers of its kept cells, "order" the step at which each of them was chosen, "scores" and
    "cosine" have a number for each cell, "closest" a cell of the picture, counted over its views; "outside" are the
    cells that take no part.
    """
    return {
        "picture": comparison.picture,
        "model": comparison.model,
        "overlap": rounded(comparison.overlap().tolist()),
        "looks": [_look_dict(look) for look in comparison.looks],
    }


def _look_dict(look: Look) -> dict[str, Any]:
    return {
        **look.setting.as_dict(),
        "answer": look.answer,
        "stopped": look.stopped,
        "reads": look.reads,
        "notes": list(look.notes),
        "tokens": look.tokens,
        "kept": look.kept,
        "made": look.made,
        "per_layer": list(look.per_layer),
        "milliseconds": {name: round(seconds * 1e3, 3) for name, seconds in look.seconds.items()},
        "cache_megabytes": None if look.cache_bytes is None else round(look.cache_bytes / 2**20, 4),
        "pictures": [_picture_dict(picture) for picture in look.pictures],
    }


def _picture_dict(picture: Picture) -> dict[str, Any]:
    views = []
    for view in picture.views:
        one: dict[str, Any] = {"title": view.title, "rows": view.kept.shape[0], "columns": view.kept.shape[1]}
        one["kept"] = view.kept.flatten().nonzero().flatten().tolist()
        if view.order is not None:
            one["order"] = view.order[view.kept].tolist()
        one["scores"] = {name: rounded(values.flatten().tolist()) for name, values in view.scores.items()}
        if view.outside is not None:
            one["outside"] = view.outside.flatten().nonzero().flatten().tolist()
        if view.closest is not None:
            one["closest"] = view.closest.flatten().tolist()
            one["cosine"] = rounded(view.cosine.flatten().tolist())
        views.append(one)
    return {"grid": picture.grid, "video": picture.is_video, "views": views}


def rounded(values: Sequence[Any]) -> list[Any]:
    """Nested lists of numbers with four digits; NaN becomes ``None``, as JSON has none."""
    if values and isinstance(values[0], list):
        return [rounded(row) for row in values]
    return [None if value != value else _plain(float(f"{value:.4g}")) for value in values]


def _plain(value: float) -> int | float:
    return int(value) if value.is_integer() else value
