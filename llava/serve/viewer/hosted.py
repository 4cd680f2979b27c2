"""A look at what a model of the Transformers library did: from its session after an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava.integrations.transformers import KeptPicture
from llava.integrations.transformers.host import find_host
from llava.pruning import Method
from llava.serve.transformers_picture import SeenView, check_drawable, seen_views
from llava.serve.transformers_session import TransformersSession
from llava.serve.viewer.cache import prompt_cache_bytes
from llava.serve.viewer.frames import seen_frames
from llava.serve.viewer.look import Look, Picture, View, closest_kept, steps_of
from llava.serve.viewer.setting import Setting
from llava.video import Video


def look_of_hosted(session: TransformersSession, setting: Setting) -> Look:
    """What the last answer was made of; without pictures where it is not known which part of them a token shows."""
    model, inputs, kept = session.model, session.last_inputs, session.last_kept
    pictures: list[Picture] = []
    try:
        if kept is not None and any(one.made for one in kept):
            raise ValueError("which of the places that are read hold made tokens is not told")
        seen = _seen(session, inputs, session.pruner, kept)
    except ValueError:
        seen = []
    for number in dict.fromkeys(view.picture for view in seen):
        views = [view for view in seen if view.picture == number]
        pictures.append(_picture(views, None if kept is None else kept[number], session.video))
    placeholders = _placeholders(session, inputs)
    config = model.config.get_text_config()
    length, layers = inputs["input_ids"].shape[1], config.num_hidden_layers
    if kept is None:
        per_layer = (placeholders,) * layers
        tokens = count = placeholders
    else:
        each = [one.per_layer or (int(one.kept.sum()),) for one in kept]
        per_layer = tuple(sum(counts[min(layer, len(counts) - 1)] for counts in each) for layer in range(layers))
        tokens, count = sum(one.tokens for one in kept), sum(sum(one.per_view) for one in kept)
    text = length - (placeholders if kept is None else sum(len(one.picture.columns) for one in kept))
    choice = None if not kept else kept[0].relevance
    return Look(
        setting,
        session.last_turn[1],
        session.stopped,
        tuple(pictures),
        tokens=tokens,
        kept=count,
        per_layer=per_layer,
        seconds=session.last_stages,
        cache_bytes=prompt_cache_bytes(config, [text + visual for visual in per_layer], model.dtype.itemsize),
        reads="" if choice is None else str(choice),
    )


def tokens_of_view(session: TransformersSession) -> int:
    """The most visual tokens that a view of what is on the table has; of all of it, where they are not told apart."""
    inputs = session.first_inputs("What is this?")
    try:
        return max(view.tokens.numel() for view in _seen(session, inputs, None, None))
    except ValueError:
        return _placeholders(session, inputs)


def _placeholders(session: TransformersSession, inputs: dict[str, Any]) -> int:
    marks = set(find_host(session.model).placeholders.values())
    return sum(int((inputs["input_ids"] == mark).sum()) for mark in marks)


def _seen(
    session: TransformersSession, inputs: dict[str, Any], pruner: Method | None, kept: Sequence[KeptPicture] | None
) -> list[SeenView]:
    """Views or frames. Raises ValueError where it is not known which part of them a token shows."""
    if session.video is not None:
        return seen_frames(session.model, session.processor, inputs, session.video, kept)
    check_drawable(session.model, inputs, pruner)
    return seen_views(session.model, session.processor, inputs, session.pixels, kept)


def _titles(views: Sequence[SeenView], video: Video | None) -> list[str]:
    if video is not None:
        step = len(video.frames) // len(views)
        last = [f"-{number + step}" if step > 1 else "" for number in range(0, step * len(views), step)]
        return [f"frame{'s' * (step > 1)} {step * number + 1}{end}" for number, end in enumerate(last)]
    if views[0].grid is not None:
        return ["overview", *(f"tile {number}" for number in range(1, len(views)))]
    return ["image"] if len(views) == 1 else [f"view {number}" for number in range(1, len(views) + 1)]


def _picture(views: Sequence[SeenView], one: KeptPicture | None, video: Video | None) -> Picture:
    titles, grid = _titles(views, video), views[0].grid
    if one is None:
        whole = (View(title, view.colours, view.tokens >= 0) for title, view in zip(titles, views, strict=True))
        return Picture(tuple(whole), grid, video is not None)
    details = dict(one.details)
    rank, steps, cell = details.pop("order", None), None, _cells(views, len(one.kept))
    if rank is not None:
        steps = torch.full(rank.shape, -1)
    closest, cosine = torch.full(one.kept.shape, -1), torch.full(one.kept.shape, torch.nan)
    for places, _ in one.told:
        among = places[cell[places] >= 0]  # newlines have no cell
        if rank is not None:
            steps[among] = steps_of(rank[among].nan_to_num(torch.inf), one.kept[among])
        if one.features is not None:
            near, alike = closest_kept(one.features[among.to(one.features.device)].cpu(), one.kept[among])
            closest[among] = torch.where(near >= 0, cell[among[near.clamp_min(0)]], -1)
            cosine[among] = alike
    compared = bool(one.told) and one.features is not None
    shown = tuple(
        View(
            title,
            view.colours,
            view.at(one.kept, False),
            {name: view.at(values, torch.nan) for name, values in details.items()},
            None if steps is None else view.at(steps, -1),
            view.at(closest, -1) if compared else None,
            view.at(cosine, torch.nan) if compared else None,
            None if bool((view.tokens >= 0).all()) else view.tokens < 0,
        )
        for title, view in zip(titles, views, strict=True)
    )
    return Picture(shown, grid, video is not None)


def _cells(views: Sequence[SeenView], tokens: int) -> Tensor:
    """(tokens,) the cell of a picture, counted over its views, in which each of its tokens stands; -1 for none."""
    places = torch.cat([view.tokens.flatten() for view in views])
    cells = torch.full((tokens,), -1)
    cells[places[places >= 0]] = (places >= 0).nonzero().flatten()
    return cells
