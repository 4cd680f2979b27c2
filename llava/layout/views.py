"""The order of the visual tokens of a picture or video in the prompt, and which of them show only padding.

A picture gives V views of n patches each; patch p of view v has the flat number v * n + p. The views of a video are
its frames, the patches what is left of them after pooling. A layout is the sequence of flat numbers in the order in
which the language model reads them, with `NEWLINE` where the checkpoint's rule puts a newline token. Unpruned and
pruned prompts are both read off this sequence. Tokens that a method made itself, k for each view, have the numbers
after the patches: token j of view v is V * n + v * k + j. Where nothing is pruned these numbers belong to tokens that
the model itself computes of several patches (`Resized`, `SlowFast`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from llava.layout.padding import patches_of_square, patches_of_tiles, unpadded_box

NEWLINE = -1
FRAME_END = -2  # the learned token after every frame of a slow/fast video
MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
NEWLINE_POSITIONS = ("grid", "frame", "one_token", "no_token")
SHRINK_ABOVE = 1.1  # LLaVA-OneVision leaves a picture alone that is only a little above its maximum


@dataclass(frozen=True)
class Resized:
    """The tiles of a large picture are shrunk to ``size`` (rows, columns) tokens, unless something is pruned."""

    size: tuple[int, int]


@dataclass(frozen=True)
class SlowFast:
    """Most frames of a video are pooled with ``stride`` instead of 2."""

    stride: int = 4


@dataclass(frozen=True)
class ViewLayout:
    """Order of a picture's visual tokens, on the CPU.

    Args:
        sequence: (t,) int64 flat patch numbers, `NEWLINE` (-1) at newline tokens.
        eligible: (V, n) bool, False at patches that show only padding.
        grid: (columns, rows) of the tiles that follow the overview; ``None`` where the views do not form a grid.
        derived: how the tokens after the patches come about; ``None`` if there are none.
        pooled: whether a token mixes patches, as those of a video do.
        of_patches: the layout that pruning selects from where this one holds ``derived`` tokens.
    """

    sequence: Tensor
    eligible: Tensor
    grid: tuple[int, int] | None = None
    derived: Resized | SlowFast | None = None
    of_patches: ViewLayout | None = None
    pooled: bool = False

    @property
    def views(self) -> int:
        return self.eligible.shape[0]

    def groups(self) -> list[tuple[range, int, int]]:
        """Views that are read together, with the start and end of their part of the sequence.

        The tiles of a grid are one group, any other view is one by itself.
        """
        tokens, end = self.eligible.shape[1], len(self.sequence)
        if self.views == 1:
            return [(range(1), 0, end)]
        if self.grid is not None:
            return [(range(1), 0, tokens), (range(1, self.views), tokens, end)]
        firsts = torch.arange(self.views)[:, None] * tokens == self.sequence  # (V, t), where each view begins
        starts = [*firsts.int().argmax(1).tolist(), end]
        return [(range(view, view + 1), starts[view], starts[view + 1]) for view in range(self.views)]


def flat_layout(views: int, tokens: int) -> ViewLayout:
    """Views one after another, nothing between them."""
    return ViewLayout(torch.arange(views * tokens), torch.ones(views, tokens, dtype=torch.bool))


def single_crop_layout(eligible: Tensor) -> ViewLayout:
    """One view of ``eligible`` (1, n) patches followed by a newline token, as LLaVA-NeXT treats an untiled crop."""
    return ViewLayout(torch.tensor([*range(eligible.shape[1]), NEWLINE]), eligible)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # kept for later calls, in which gradients may be wanted
def padded_square_layout(size: tuple[int, int], side: int) -> ViewLayout:
    """One view of side x side patches that shows a picture of ``size`` (width, height) centred on a square.

    A patch without a pixel of the picture is not eligible; the sequence still holds it, as LLaVA-1.5 was trained.
    """
    return ViewLayout(torch.arange(side * side), patches_of_square(size, side))


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # kept for later calls, in which gradients may be wanted
def tiled_layout(
    size: tuple[int, int], grid: tuple[int, int], side: int, merge_type: str, most_tiles: int | None = None
) -> ViewLayout:
    """The overview, then the tiles as one grid of patches read row by row ("spatial").

    "spatial_unpad" leaves out the rows or columns that show only padding and ends every row with a newline token.

    Args:
        size: (width, height) of the picture.
        grid: (columns, rows) of tiles.
        side: patches along one side of a view.
        most_tiles: shrink the un-padded plane to about so many tiles' worth of tokens (LLaVA-OneVision's
            ``anyres_max``); ``None`` never does.
    """
    columns, rows = grid
    patches = side * side
    tiles = torch.arange(patches, (1 + rows * columns) * patches).reshape(rows, columns, side, side)
    plane = tiles.permute(0, 2, 1, 3).reshape(rows * side, columns * side)
    if merge_type == "spatial_unpad":
        top, left, height, width = unpadded_box(size, (columns * side, rows * side))
        plane = end_rows(plane[top : top + height, left : left + width])
    sequence = torch.cat([torch.arange(patches), plane.flatten()])
    eligible = torch.ones(1 + rows * columns, patches, dtype=torch.bool)
    if merge_type == "spatial_unpad":
        eligible = patches_of_tiles(size, grid, side)
    layout = ViewLayout(sequence, eligible, grid)
    if merge_type != "spatial_unpad" or most_tiles is None:
        return layout
    shrink = math.sqrt(height * width / (most_tiles * patches))
    if shrink <= SHRINK_ABOVE:
        return layout
    rows, columns = int(height // shrink), int(width // shrink)
    plane = eligible.numel() + torch.arange(rows * columns).reshape(rows, columns)
    sequence = torch.cat([torch.arange(patches), end_rows(plane).flatten()])
    return ViewLayout(sequence, layout.eligible, grid, Resized((rows, columns)), layout)


def video_layout(frames: int, side: int, newline_position: str, merge_type: str) -> ViewLayout:
    """Frames of side x side pooled tokens, in the order of time.

    Args:
        newline_position: "grid" ends every row of every frame with a newline, "frame" every frame, "one_token" the
            video (where ``merge_type`` has "unpad"), "no_token" nothing. "flat" has no newlines in any case.

    Raises:
        ValueError: an unknown position, or newlines of a checkpoint that has no newline token.
    """
    if newline_position not in NEWLINE_POSITIONS:
        raise ValueError(
            f"mm_newline_position must be one of {', '.join(NEWLINE_POSITIONS)}, got {newline_position!r}"
        )
    layout = flat_layout(frames, side * side)
    if merge_type == "flat" or newline_position == "no_token":
        return layout
    has_newline = "unpad" in merge_type
    if newline_position == "one_token":
        sequence = torch.cat([layout.sequence, torch.tensor([NEWLINE])]) if has_newline else layout.sequence
        return ViewLayout(sequence, layout.eligible)
    if not has_newline:
        raise ValueError(
            f"mm_newline_position {newline_position} needs the newline token, which a checkpoint with "
            f"mm_patch_merge_type {merge_type} does not have"
        )
    rows = layout.sequence.reshape(frames, -1, side if newline_position == "grid" else side * side)
    return ViewLayout(end_rows(rows).flatten(), layout.eligible)


def slow_fast_layout(frames: int, side: int, fast_side: int, every: int) -> ViewLayout:
    """A video in which frame t is slow (side x side tokens) where ``every`` divides t, and fast (fast_side) elsewhere.

    Every row ends with a newline, every frame with `FRAME_END`.
    """
    slow = end_rows(torch.arange(frames * side * side).reshape(frames, side, side))
    fast = end_rows(torch.arange(frames * fast_side * fast_side).reshape(frames, fast_side, fast_side))
    fast = torch.where(fast == NEWLINE, NEWLINE, fast + frames * side * side)
    end = torch.tensor([FRAME_END])
    parts = [part for t in range(frames) for part in ((fast if t % every else slow)[t].flatten(), end)]
    layout = flat_layout(frames, side * side)
    return ViewLayout(torch.cat(parts), layout.eligible, derived=SlowFast(), of_patches=layout)


def end_rows(numbers: Tensor) -> Tensor:
    """A newline behind each row: (..., w) -> (..., w + 1)."""
    return torch.cat([numbers, numbers.new_full((*numbers.shape[:-1], 1), NEWLINE)], dim=-1)


def kept_sequence(layout: ViewLayout, kept: Tensor, count: int, keep_newlines: bool) -> Tensor:
    """The part of a layout that pruning leaves.

    Args:
        kept: flat patch numbers in any order, on any device.
        count: how many of ``kept`` are eligible; known without looking at ``kept``, so that nothing waits for a GPU.
        keep_newlines: keep the newline of every row that still has a token (this does look at ``kept``).

    Returns:
        (count,) flat patch numbers in the layout's order, on ``kept``'s device; with newlines, more.
    """
    return layout.sequence.to(kept.device, non_blocking=True)[kept_places(layout, kept, count, keep_newlines)]


def kept_places(layout: ViewLayout, kept: Tensor, count: int, keep_newlines: bool) -> Tensor:
    """Places of the tokens of `kept_sequence` in a layout's sequence, ascending."""
    place = torch.full((layout.eligible.numel(),), layout.sequence.numel())
    patches = layout.sequence != NEWLINE
    place[layout.sequence[patches]] = torch.arange(layout.sequence.numel())[patches]
    place[~layout.eligible.flatten()] = layout.sequence.numel()
    places = place.to(kept.device, non_blocking=True)[kept].sort().values[:count]
    if keep_newlines:
        ends = (~patches).nonzero().flatten()
        overview = 0 if layout.grid is None else layout.eligible.shape[1]
        starts = torch.cat([torch.tensor([overview]), ends + 1])[:-1]
        starts, ends = starts.to(kept.device), ends.to(kept.device)
        has_token = torch.searchsorted(places, ends) > torch.searchsorted(places, starts)
        places = torch.cat([places, ends[has_token]]).sort().values
    return places


def with_made_tokens(layout: ViewLayout, places: Tensor, made: Sequence[int], width: int, leading: int) -> Tensor:
    """Put made tokens between kept ones.

    Those of a group of views come after its kept tokens, view by view; the ``leading`` ones come before the kept
    tokens where the group is one view, and before the other made tokens where it is the tiles of a grid.

    Args:
        places: (t,) of kept tokens and newlines in the layout's sequence, ascending.
        made: how many made tokens each view gives, the first ones.
        width: k, how many it might give.

    Returns:
        (t + sum of made,) flat numbers in the order in which the language model reads them.
    """
    numbers: list[int] = []
    keys: list[int] = []  # a kept token at place p has the key 2 p, so that made tokens fit between any two
    first_made = layout.eligible.numel()
    for views, start, end in layout.groups():
        alone = len(views) == 1
        for lead in (True, False):
            for view in views:
                chosen = range(min(leading, made[view])) if lead else range(min(leading, made[view]), made[view])
                numbers += [first_made + view * width + token for token in chosen]
                keys += [2 * start - 1 if lead and alone else 2 * end - 1] * len(chosen)
    order = torch.cat(
        [2 * places, torch.tensor(keys, dtype=places.dtype).to(places.device, non_blocking=True)]
    ).argsort(stable=True)
    kept = layout.sequence.to(places.device, non_blocking=True)[places]
    return torch.cat([kept, torch.tensor(numbers, dtype=kept.dtype).to(kept.device, non_blocking=True)])[order]
