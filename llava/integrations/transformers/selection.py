"""Ask a method which visual tokens of a batch of prompts go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.integrations.transformers.pictures import SEPARATOR, Picture
from llava.integrations.transformers.shortening import concatenated
from llava.pruning import Pruner, PruningInputs


@dataclass(frozen=True)
class KeptPicture:
    """What is left of an image or a video.

    Args:
        picture: as it stood in the prompt.
        kept: (t,) bool, True at the tokens, separators among them, whose place in the prompt stays.
        made: columns (m + k,) and what stands there (m + k, d), where a method makes k tokens beside the m that it
            keeps: leading ones, kept ones, the other made ones. ``None`` if it makes none.
        per_layer: tokens that enter each layer of the decoder, separators among them, where a method inside it drops
            some; ``None`` where all layers see the same.
    """

    picture: Picture
    kept: Tensor
    made: tuple[Tensor, Tensor] | None = None
    per_layer: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        """Visual tokens before, separators not counted."""
        return int((self.picture.views != SEPARATOR).sum())

    @property
    def per_view(self) -> list[int]:
        """Visual tokens left in each view."""
        views = self.picture.views[self.kept]
        return torch.bincount(views[views != SEPARATOR], minlength=self.picture.count).tolist()

    @property
    def separators(self) -> int:
        """Newlines and row breaks left."""
        return int((self.picture.views[self.kept] == SEPARATOR).sum())


@dataclass(frozen=True)
class Candidates:
    """Tokens among which one selection is made: a view, or what a method's ``scope`` makes of a picture's views."""

    picture: int
    columns: Tensor
    keep: int
    number: int  # among the candidates of its row; seeds random methods


def candidates_of(pruner: Pruner, pictures: Sequence[Picture]) -> list[Candidates]:
    """The selections that a method makes over pictures, in order."""
    found: list[Candidates] = []
    row, number = -1, 0
    for index, picture in enumerate(pictures):
        if picture.row != row:
            row, number = picture.row, 0
        views = picture.view_columns()
        if pruner.scope == "view":
            parts = [(columns, pruner.count(len(columns))) for columns in views]
        elif pruner.scope in ("global", "clip"):
            columns = concatenated(views).sort().values
            parts = [(columns, sum(pruner.count(len(view)) for view in views))]
        else:  # "official": the whole sequence, separators among the candidates
            length = len(picture.columns)
            share = isinstance(pruner.keep_tokens, float)
            keep = pruner.count(length) if share else min(pruner.keep_tokens * len(views), length)
            parts = [(picture.columns, keep)]
        for columns, keep in parts:
            found.append(Candidates(index, columns, keep, number))
            number += 1
    return found


def select_tokens(
    pruner: Pruner,
    pictures: Sequence[Picture],
    inputs_embeds: Tensor,
    describe: Callable[[Sequence[Candidates], Tensor], dict[str, Any]],
    project: Callable[[Tensor], Tensor] | None = None,
) -> list[KeptPicture]:
    """Run a method over all pictures of a batch.

    Selections among equally many tokens are made together.

    Args:
        inputs_embeds: (B, L, d), visual features in their places.
        describe: from `Candidates` of equal size and their features (V, n, d) to the other `PruningInputs` fields
            that the method reads.
        project: the projector, for methods that make tokens before it.
    """
    candidates = candidates_of(pruner, pictures)
    groups: dict[tuple[int, int], list[Candidates]] = {}
    for one in candidates:
        groups.setdefault((len(one.columns), one.keep), []).append(one)
    check_groups(pruner, groups)
    kept_columns: dict[int, list[Tensor]] = {index: [] for index in range(len(pictures))}
    made: dict[int, list[tuple[Tensor, Tensor]]] = {}
    whole = dict.fromkeys(range(len(pictures)), True)
    for (tokens, keep), group in groups.items():
        if keep >= tokens:
            for one in group:
                kept_columns[one.picture].append(one.columns)
            continue
        columns = torch.stack([one.columns for one in group])  # (V, n)
        rows = torch.tensor([pictures[one.picture].row for one in group])
        device = inputs_embeds.device
        features = inputs_embeds[rows.to(device)[:, None], columns.to(device)]
        inputs = PruningInputs(
            features,
            view_ids=torch.tensor([one.number for one in group], device=device),
            pictures=torch.tensor([one.picture for one in group], device=device),
            **describe(group, features),
        )
        selection = pruner.select(inputs, keep=keep)
        chosen = selection.indices.cpu()
        made_tokens = selection.made
        if made_tokens is not None and pruner.place == "encoder":
            made_tokens = project(made_tokens)
        for number, one in enumerate(group):
            whole[one.picture] = False
            own, own_columns = selection.indices[number], one.columns[chosen[number]]
            if selection.eligible is not None:  # only the data told how many
                own, own_columns = own[selection.eligible[number]], own_columns[selection.eligible[number].cpu()]
            kept_columns[one.picture].append(own_columns)
            if made_tokens is not None:
                places = carriers(one.columns, own_columns, made_tokens.shape[1])
                kept_columns[one.picture].append(places)
                lead, follow = made_tokens[number].tensor_split([selection.leading])
                tokens = torch.cat([lead, features[number][own].to(lead), follow])
                made.setdefault(one.picture, []).append((torch.cat([own_columns, places]).sort().values, tokens))
    answers = []
    for index, picture in enumerate(pictures):
        kept = torch.isin(picture.columns, concatenated(kept_columns[index]))
        if whole[index]:
            kept = torch.ones_like(kept)
        elif pruner.newlines == "keep":
            kept = kept | picture.separators_to_keep(kept)
        parts = made.get(index)
        joined = None if parts is None else tuple(torch.cat(part) for part in zip(*parts, strict=True))
        answers.append(KeptPicture(picture, kept, joined))
    return answers


def check_groups(pruner: Pruner, groups: dict[tuple[int, int], list[Candidates]]) -> None:
    """Raise ValueError if a method compares views of a picture that cannot be compared here."""
    if getattr(pruner, "scaling", "view") != "picture":
        return
    seen: dict[int, tuple[int, int]] = {}
    for size, group in groups.items():
        for one in group:
            if seen.setdefault(one.picture, size) != size:
                raise ValueError(
                    f"pruner '{pruner.name}' with scaling=picture needs views of equal size, and this picture's have "
                    f"{seen[one.picture][0]} and {size[0]} tokens: use scaling=view"
                )


def carriers(columns: Tensor, kept: Tensor, count: int) -> Tensor:
    """Columns (count,), evenly spaced among those of a view (n,) that are not ``kept`` (m,): places of made tokens."""
    free = columns[~torch.isin(columns, kept)]
    return free[(2 * torch.arange(count) + 1) * len(free) // (2 * count)]


def with_made_tokens(inputs_embeds: Tensor, kept: Sequence[KeptPicture]) -> Tensor:
    """The prompts (B, L, d) with made tokens in the places that carry them."""
    if all(picture.made is None for picture in kept):
        return inputs_embeds
    inputs_embeds = inputs_embeds.clone()
    for one in kept:
        if one.made is not None:
            places, tokens = one.made
            inputs_embeds[one.picture.row, places.to(inputs_embeds.device)] = tokens.to(inputs_embeds)
    return inputs_embeds
