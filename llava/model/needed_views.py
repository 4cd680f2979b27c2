"""Views that a question needs: the overview of a picture is read first, and tiles that it does not ask about never.

Beyond what pruning after the tower can save: a tile that is left out costs neither tower nor projector, and gives no
tokens. The overview shows the whole picture; where the patches lie that are most relevant to the question tells which
tiles are needed. Nothing uses this unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llava.layout.padding import unpadded_box
from llava.layout.views import NEWLINE, ViewLayout, flat_layout
from llava.layout.visuals import VIDEO, Visuals
from llava.model.encoded_images import EncodedImages
from llava.model.vision_side import VisionSide
from llava.pruning import Method, PruningInputs
from llava.pruning.functional import stable_rank
from llava.pruning.question_reader import QuestionReader

MOST_RELEVANT = 0.1  # share of the overview's patches that vote


def tile_of_patches(size: tuple[int, int], grid: tuple[int, int], side: int) -> Tensor:
    """In which tile the centre of every patch of the overview lies: (side * side,) int64.

    Args:
        size: (width, height) of the picture, which the overview shows whole, squeezed into a square.
        grid: (columns, rows) of tiles, on which the picture lies centred.
        side: patches along one side of a view.
    """
    columns, rows = grid
    top, left, height, width = unpadded_box(size, (columns * side, rows * side))
    centre = (torch.arange(side) + 0.5) / side
    row = ((top + centre * height) / side).long().clamp_max(rows - 1)
    column = ((left + centre * width) / side).long().clamp_max(columns - 1)
    return (row[:, None] * columns + column).flatten()


def votes_for_tiles(relevance: Tensor, tile: Tensor, tiles: int) -> Tensor:
    """Share of the overview's most relevant patches that lie in each tile: (tiles,), adding up to 1.

    Args:
        relevance: (n,) of the overview's patches.
        tile: (n,) int64 `tile_of_patches`.
    """
    voters = max(1, round(MOST_RELEVANT * len(relevance)))
    voting = stable_rank(relevance[None], descending=True)[0] < voters
    return torch.bincount(tile.to(voting.device)[voting], minlength=tiles) / voters


def layout_of_views(layout: ViewLayout, views: Sequence[int]) -> ViewLayout:
    """A layout as if a picture had only some of its views, numbered anew; rows without a token lose their newline."""
    tokens = layout.eligible.shape[1]
    new = torch.full((layout.views,), -1)
    new[list(views)] = torch.arange(len(views))
    patches = layout.sequence >= 0
    view = new[layout.sequence.clamp_min(0) // tokens]
    sequence = torch.where(patches, view * tokens + layout.sequence % tokens, layout.sequence)
    sequence = sequence[~patches | (view >= 0)]
    before = torch.cat([sequence.new_tensor([NEWLINE]), sequence[:-1]])
    starts_a_row = (before == NEWLINE) | (before == tokens - 1)  # the overview has no newline of its own
    sequence = sequence[(sequence != NEWLINE) | ~starts_a_row]
    return replace(layout, sequence=sequence, eligible=layout.eligible[list(views)])


@torch.no_grad()
def encode_needed(
    model: Any,
    shown: Visuals,
    questions: Sequence[str],
    method: Method,
    least: float,
) -> tuple[EncodedImages, list[list[int]]]:
    """Encode pictures but for the tiles that hold too few of their overview's most relevant patches.

    Args:
        model: a LLaVA in the original format.
        shown: its `visuals`.
        questions: one for each picture.
        method: reads the question; its source of relevance is the one that decides.
        least: share of the overview's `MOST_RELEVANT` patches from which a tile is needed, 0 to 1. 0 reads all tiles;
            of the k tiles of a picture one at least is read where it is at most 1 / k.

    Returns:
        What `embed_prompts` takes as ``images``, and for each picture the numbers of the views that it holds.

    Raises:
        ValueError: videos, pictures whose tiles are shrunk behind the tower, a method that reads no question, or a
            share out of range.
    """
    if not 0 <= least <= 1:
        raise ValueError(f"the share from which a tile is needed lies between 0 and 1, got {least}")
    if not (isinstance(method, QuestionReader) and method.reads_question):
        raise ValueError(f"pruner '{method.name}' reads no question here, which is to say which views are needed")
    if len(questions) != len(shown):
        raise ValueError(f"there are {len(shown)} pictures and {len(questions)} questions")
    vision: VisionSide = model.vision
    layouts = vision.layouts(shown)
    if any(visual.modality == VIDEO for visual in shown.each):
        raise ValueError("the frames of a video have no overview: views can be left out of pictures only")
    if any(layout.derived is not None for layout, _ in layouts):
        raise ValueError("tiles that are shrunk behind the tower are read together: none of them can be left out")
    tiled = [number for number, (layout, _) in enumerate(layouts) if layout.grid is not None]
    needed = [list(range(layout.views)) for layout, _ in layouts]
    firsts = _encode_views(vision, [visual.pixels[:1] for visual in shown.each], shown)
    relevance = _relevance(model, firsts.pick(tiled), [questions[number] for number in tiled], method)
    for number, own in zip(tiled, relevance, strict=True):
        grid, side = layouts[number][0].grid, vision.tower.num_patches_per_side
        votes = votes_for_tiles(own, tile_of_patches(shown.each[number].size, grid, side), grid[0] * grid[1])
        needed[number] = [0, *(1 + tile for tile, share in enumerate(votes.tolist()) if share >= least)]
    others = [visual.pixels[views[1:]] for visual, views in zip(shown.each, needed, strict=True)]
    parts = [firsts, *([_encode_views(vision, others, shown)] if any(map(len, others)) else [])]
    order, next_view = [], len(shown)
    for number, views in enumerate(needed):
        order += [number, *range(next_view, next_view + len(views) - 1)]
        next_view += len(views) - 1
    encoded = EncodedImages.join(parts).pick(order)
    pairs = [
        [layout_of_views(layout, views) for layout in pair] if number in tiled else pair
        for number, (pair, views) in enumerate(zip(layouts, needed, strict=True))
    ]
    encoded.layouts, encoded.layouts_with_padding = (list(layouts) for layouts in zip(*pairs, strict=True))
    encoded.derived = [None] * len(shown)
    return encoded, needed


def _encode_views(vision: VisionSide, views: Sequence[Tensor], shown: Visuals) -> EncodedImages:
    """Views (v, 3, s, s) of each picture, all of them as pictures of one view."""
    single = [
        replace(visual, pixels=view[None]) for visual, own in zip(shown.each, views, strict=True) for view in own
    ]
    return vision.encode(Visuals(tuple(single)), [(flat_layout(1, vision.tower.num_patches),) * 2] * len(single))


def _relevance(model: Any, overviews: EncodedImages, questions: Sequence[str], method: QuestionReader) -> Tensor:
    """(P, n) raw relevance of the overviews' patches, each to its question."""
    if not questions:
        return torch.empty(0, 0)
    tower = model.vision.tower
    plan = model.asked(model.plan(overviews, replace(method, keep_tokens=1)), questions)
    fields = plan.asked.fields(
        torch.arange(len(questions)), overviews.features, None, lambda: overviews.image_embeds(tower)
    )
    return plan.method.raw_relevance(PruningInputs(overviews.features, **fields))
