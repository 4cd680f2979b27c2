"""A look at what a model of the Transformers library did: from its session after an answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llava.integrations.transformers import KeptPicture
from llava.integrations.transformers.host import find_host
from llava.integrations.transformers.pictures import SEPARATOR
from llava.serve.transformers_picture import SeenView, check_drawable, seen_views
from llava.serve.transformers_session import TransformersSession
from llava.serve.viewer.cache import prompt_cache_bytes
from llava.serve.viewer.look import Look, Picture, View, steps_of
from llava.serve.viewer.setting import Setting


def look_of_hosted(session: TransformersSession, setting: Setting) -> Look:
    """What the last answer was made of; without pictures where it is not known which part of them a token shows."""
    model, inputs, kept = session.model, session.last_inputs, session.last_kept
    pictures: list[Picture] = []
    try:
        if kept is not None and any(one.made for one in kept):
            raise ValueError("made tokens stand in the places of others")
        check_drawable(model, inputs, session.pruner)
    except ValueError:
        seen = []
    else:
        seen = seen_views(model, session.processor, inputs, session.pixels, kept)
    for number in dict.fromkeys(view.picture for view in seen):
        pictures.append(_picture([view for view in seen if view.picture == number], kept))
    placeholders = int((inputs["input_ids"] == find_host(model).placeholders["image"]).sum())
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


def _picture(views: Sequence[SeenView], kept: Sequence[KeptPicture] | None) -> Picture:
    one = None if kept is None else kept[views[0].picture]
    grid = views[0].grid
    if grid is not None:
        titles = ["overview", *(f"tile {number}" for number in range(1, len(views)))]
    else:
        titles = ["image"] if len(views) == 1 else [f"view {number}" for number in range(1, len(views) + 1)]
    if one is None:
        return Picture(
            tuple(View(t, view.colours, view.tokens >= 0) for t, view in zip(titles, views, strict=True)), grid
        )
    details = dict(one.details)
    rank, steps = details.pop("order", None), None
    if rank is not None:
        steps = torch.full(rank.shape, -1)
        together = len({*one.picture.views.tolist()} - {SEPARATOR}) > 1 and _one_order(one)
        for number in range(1 if together else one.picture.count):
            among = one.picture.views != SEPARATOR if together else one.picture.views == number
            steps[among] = steps_of(rank[among].nan_to_num(torch.inf), one.kept[among])
    return Picture(
        tuple(
            View(
                title,
                view.colours,
                view.at(one.kept, False),
                {name: view.at(values, torch.nan) for name, values in details.items()},
                None if steps is None else view.at(steps, -1),
            )
            for title, view in zip(titles, views, strict=True)
        ),
        grid,
    )


def _one_order(one: KeptPicture) -> bool:
    """Whether the tokens of all views were chosen in one order: then no two of them have the same rank."""
    rank = one.details["order"][one.kept & (one.picture.views != SEPARATOR)]
    return len(rank.unique()) == len(rank)
