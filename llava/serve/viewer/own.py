"""A look at what our LLaVA did: from its session after an answer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llava.layout.visuals import VIDEO
from llava.model.kept_tokens import KeptTokens
from llava.serve.cli import Session
from llava.serve.token_picture import drawn_cell, view_colours
from llava.serve.viewer.cache import prompt_cache_bytes
from llava.serve.viewer.look import Look, Picture, View, closest_kept, steps_of
from llava.serve.viewer.setting import Setting


def look_of_session(session: Session, setting: Setting) -> Look:
    """What the last answer was made of. Raises ValueError where a view's tokens make no square."""
    prompt, encoded = session.last_prompt, session.pictures
    pictures, first = [], 0
    for number, tokens in enumerate(prompt.kept):
        features = encoded.features[first : first + tokens.layout.views]
        first += tokens.layout.views
        is_video = session.visuals.each[number].modality == VIDEO
        pictures.append(_picture(session, number, tokens, features, is_video))
    visual = [tokens.per_layer or (len(tokens.sequence),) for tokens in prompt.kept]
    layers = session.model.config.num_hidden_layers
    per_layer = tuple(sum(counts[min(layer, len(counts) - 1)] for counts in visual) for layer in range(layers))
    row = prompt.rows[0]
    text = row.length - sum(span.count for span in row.pictures)
    kept = sum(int(tokens.mask().sum()) for tokens in prompt.kept)
    choice = next((tokens.relevance for tokens in prompt.kept if tokens.relevance is not None), None)
    return Look(
        setting,
        session.last_turn[1],
        session.stopped,
        tuple(pictures),
        tokens=sum(tokens.layout.eligible.numel() for tokens in prompt.kept),
        kept=kept,
        made=sum(tokens.patches + tokens.recycled for tokens in prompt.kept) - kept,
        per_layer=per_layer,
        seconds=session.last_stages,
        cache_bytes=prompt_cache_bytes(
            session.model.config, [text + count for count in per_layer], session.model.dtype.itemsize
        ),
        reads="" if choice is None else str(choice),
    )


def _picture(session: Session, number: int, tokens: KeptTokens, features: Tensor, is_video: bool) -> Picture:
    views, cells = tokens.layout.eligible.shape
    side = math.isqrt(cells)
    if side * side != cells:
        raise ValueError(f"the {cells} tokens of a view make no square: it is not known where they stand")
    pixels = session.pixels[number]
    pixels = pixels if pixels.ndim == 4 else pixels[None]
    tower = session.model.get_vision_tower()
    covered = min(side * drawn_cell(tower, session.pictures.pool_mode) / pixels.shape[-1], 1.0)
    mask, details = tokens.mask(), details_of(tokens)
    outside = None
    if session.pruner is not None and session.pruner.exclude_padding and not bool(tokens.layout.eligible.all()):
        outside = ~tokens.layout.eligible & ~mask
    joined = _joined(tokens)
    rank = details.pop("order", None)
    order = closest = cosine = None
    if tokens.selections:
        contests = [slice(None)] if joined else [slice(view, view + 1) for view in range(views)]
        if rank is not None:
            order = torch.cat([steps_of(rank[c].flatten(), mask[c].flatten()) for c in contests]).view(views, cells)
        found = [closest_kept(features[c].flatten(0, 1).cpu(), mask[c].flatten()) for c in contests]
        offsets = [0 if joined else view * cells for view in range(len(found))]
        closest = torch.cat(
            [torch.where(near >= 0, near + o, near) for (near, _), o in zip(found, offsets, strict=True)]
        )
        closest, cosine = closest.view(views, cells), torch.cat([c for _, c in found]).view(views, cells)
    if outside is not None:
        details = {name: values.float().masked_fill(outside, torch.nan) for name, values in details.items()}
        if closest is not None:
            closest, cosine = closest.masked_fill(outside, -1), cosine.masked_fill(outside, torch.nan)

    def square(values: Tensor | None, view: int) -> Tensor | None:
        return None if values is None else values[view].reshape(side, side)

    shown = tuple(
        View(
            _title(tokens, view, is_video),
            (view_colours(pixels[view], session.image_processor) * 255).round().byte().permute(1, 2, 0).numpy(),
            square(mask, view),
            {name: square(values.float(), view) for name, values in details.items()},
            square(order, view),
            square(closest, view),
            square(cosine, view),
            square(outside, view),
            covered,
        )
        for view in range(views)
    )
    return Picture(shown, tokens.layout.grid, is_video)


def _title(tokens: KeptTokens, view: int, is_video: bool) -> str:
    if is_video:
        return f"frame {view + 1}"
    if tokens.layout.views == 1:
        return "image"
    return "overview" if view == 0 else f"tile {view}"


def _joined(tokens: KeptTokens) -> bool:
    views, cells = tokens.layout.eligible.shape
    return len(tokens.selections) == 1 and views > 1 and tokens.selections[0].tokens == views * cells


def details_of(tokens: KeptTokens) -> dict[str, Tensor]:
    """What the method computed of each token, by name (V, n) on the CPU; NaN in views that it was not asked about.

    A method that was asked about another sequence than the views' tokens, newlines among them, tells nothing of them.
    """
    views, cells = tokens.layout.eligible.shape
    found: dict[str, Tensor] = {}
    asked = [view for view, count in enumerate(tokens.per_view()) if count]
    for name, values in tokens.details.items():
        values = values.detach().cpu()
        if values.shape[1:] == (cells,) and len(values) == views:
            found[name] = values
        elif values.shape == (1, views * cells):
            found[name] = values.view(views, cells)
        elif values.shape[1:] == (cells,) and len(values) == len(asked):
            found[name] = torch.full((views, cells), torch.nan).index_copy_(0, torch.tensor(asked), values.float())
    return found
