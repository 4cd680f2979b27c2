"""Ask a method which visual tokens of a batch of prompts the language model gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.integrations.transformers.pictures import SEPARATOR, Picture
from llava.integrations.transformers.shortening import concatenated
from llava.layout.candidates import candidates_of, check_together
from llava.pruning import PruningInputs
from llava.pruning.base import ViewMethod
from llava.relevance.policy import Choice


@dataclass(frozen=True)
class MadeTokens:
    """What the language model reads of one selection of a method that makes tokens: leading ones, kept ones, others.

    Args:
        columns: (m + k,) of the prompt, ascending, where these stand.
        tokens: (m + k, d).
        kept: (m,) columns of the whole prompt of those that are kept as they are.
        leading: how many made ones stand before these.
        weights: (k, n) of the selection's tokens in each made one, for a method that makes means; else ``None``.
        among: (n,) columns of the selection's tokens.
    """

    columns: Tensor
    tokens: Tensor
    kept: Tensor
    leading: int
    weights: Tensor | None
    among: Tensor

    @property
    def count(self) -> int:
        """k"""
        return len(self.columns) - len(self.kept)

    @property
    def stood(self) -> Tensor:
        """(m + k,) columns whose positions in the whole prompt they take: kept ones their own, made ones free ones."""
        free = self.columns[~torch.isin(self.columns, self.kept)]
        lead, follow = free.tensor_split([self.leading])
        return torch.cat([lead, self.kept, follow])

    def of(self, plane: Tensor) -> Tensor:
        """What stands in the places in another plane of features: (L, e) of the whole prompt -> (m + k, e).

        Made tokens have the same weights there, in float32 at least; kept ones are as they are.
        """
        weights = self.weights.to(plane.device)
        mixed = (weights @ plane[self.among.to(plane.device)].to(weights.dtype)).to(plane.dtype)
        lead, follow = mixed.tensor_split([self.leading])
        return torch.cat([lead, plane[self.kept.to(plane.device)], follow])


@dataclass(frozen=True)
class KeptPicture:
    """What was kept of an image or a video.

    Args:
        picture: as it stood in the prompt.
        kept: (t,) bool, True at the tokens, separators among them, in whose places the language model reads something.
        made: of each selection in which the method made tokens, what is read in the places.
        per_layer: tokens that enter each layer of the decoder, separators among them, where a method inside it drops
            some; ``None`` where all layers see the same.
        relevance: where the question was read, and why; ``None`` for a method that reads none.
        told: for each selection the places (n,) among the t that competed in it, and what the method told of the
            tokens there, (n,) by name, which may be nothing. `details` puts them together.
        features: (t, d) of all tokens as they stood in the prompt, on the model's device; only if they were asked for.
    """

    picture: Picture
    kept: Tensor
    made: tuple[MadeTokens, ...] = ()
    per_layer: tuple[int, ...] | None = None
    relevance: Choice | None = None
    told: tuple[tuple[Tensor, Mapping[str, Tensor]], ...] = ()
    features: Tensor | None = None

    @property
    def details(self) -> dict[str, Tensor]:
        """What the method told of every token, (t,) float32 on the CPU by name; NaN where nothing was selected."""
        names = dict.fromkeys(name for _, values in self.told for name in values)
        found = {name: torch.full(self.kept.shape, torch.nan) for name in names}
        for places, values in self.told:
            for name, value in values.items():
                found[name][places] = value.float().cpu()
        return found

    @property
    def scores(self) -> Tensor | None:
        """(t,) what the method made of the question, scaled within each selection; ``None`` if it computes none."""
        return self.details.get("relevance")

    @property
    def as_they_are(self) -> Tensor:
        """(t,) bool, True at the tokens that the language model reads unchanged; not where a made one stands."""
        unchanged = self.kept.clone()
        for one in self.made:
            unchanged &= ~torch.isin(self.picture.columns, one.columns)
        return unchanged | torch.isin(self.picture.columns, concatenated([one.kept for one in self.made]))

    @property
    def count_made(self) -> int:
        """How many of the tokens that are read the method made."""
        return sum(one.count for one in self.made)

    @property
    def tokens(self) -> int:
        """Visual tokens before, separators not counted."""
        return int((self.picture.views != SEPARATOR).sum())

    @property
    def per_view(self) -> list[int]:
        """Visual tokens kept of each view."""
        views = self.picture.views[self.kept]
        return torch.bincount(views[views != SEPARATOR], minlength=self.picture.count).tolist()

    @property
    def separators(self) -> int:
        """Newlines and row breaks kept."""
        return int((self.picture.views[self.kept] == SEPARATOR).sum())


@dataclass(frozen=True)
class Contest:
    """Tokens of a picture that compete for one budget (layout/candidates.py), and where they stand.

    Args:
        picture: its number in the batch.
        columns: (n,) of the prompt.
        attended: (n,) bool, False at those that the attention mask hides.
        keep: the budget.
        number: among the contests of its row; seeds random methods.
    """

    picture: int
    columns: Tensor
    attended: Tensor
    keep: int
    number: int


Describe = Callable[[Sequence[Contest], Tensor, Tensor | None], dict[str, Any]]


def contests_of(method: ViewMethod, pictures: Sequence[Picture]) -> list[Contest]:
    """The selections that a method makes over the pictures of a batch, in order.

    Raises:
        ValueError: the method compares views that cannot be compared.
    """
    contests: list[Contest] = []
    row, number = -1, 0
    for index, picture in enumerate(pictures):
        if picture.row != row:
            row, number = picture.row, 0
        found = candidates_of(method, picture.view_sizes(), len(picture.columns), picture.attended_sizes())
        check_together(method, found)
        for one in found:
            among = torch.isin(picture.views, torch.tensor(one.views))
            if one.sequence:
                among = torch.ones_like(among)
            contests.append(Contest(index, picture.columns[among], picture.attended[among], one.keep, number))
            number += 1
    return contests


@torch.no_grad()
def select_tokens(
    method: ViewMethod,
    pictures: Sequence[Picture],
    inputs_embeds: Tensor,
    describe: Describe,
    project: Callable[[Tensor], Tensor] | None = None,
    keep_features: bool = False,
) -> list[KeptPicture]:
    """Run a method over all pictures of a batch.

    Selections among equally many tokens are made together.

    Args:
        inputs_embeds: (B, L, d), visual features in their places.
        describe: from contests of equal size, their features (V, n, d) and which of these may be chosen (V, n) to
            the other `PruningInputs` fields that the method reads.
        project: the projector, for methods that make tokens before it.
        keep_features: whether the answer holds `KeptPicture.features`.

    Raises:
        ValueError: the method does not fit what the pictures look like.
    """
    groups: dict[tuple[int, int], list[Contest]] = {}
    contests = contests_of(method, pictures)
    for one in contests:
        groups.setdefault((len(one.columns), one.keep), []).append(one)
    kept_columns: dict[int, list[Tensor]] = {index: [] for index in range(len(pictures))}
    made: dict[int, list[MadeTokens]] = {}
    told: dict[int, list[tuple[Tensor, Mapping[str, Tensor]]]] = {}
    whole = dict.fromkeys(range(len(pictures)), True)
    for (tokens, keep), group in groups.items():
        if keep >= tokens:
            for one in group:
                kept_columns[one.picture].append(one.columns)
            continue
        if keep == 0:  # of a picture's small budget this view has no share
            whole.update((one.picture, False) for one in group)
            continue
        columns = torch.stack([one.columns for one in group])  # (V, n)
        rows = torch.tensor([pictures[one.picture].row for one in group])
        attended = torch.stack([one.attended for one in group])
        device = inputs_embeds.device
        features = inputs_embeds[rows.to(device)[:, None], columns.to(device)]
        valid = None if bool(attended.all()) else attended.to(device)
        inputs = PruningInputs(
            features,
            valid=valid,
            view_ids=torch.tensor([one.number for one in group], device=device),
            pictures=torch.tensor([one.picture for one in group], device=device),
            **describe(group, features, valid),
        )
        selection = method.select(inputs, keep=keep)
        chosen = selection.indices.cpu()
        made_tokens = selection.made
        if made_tokens is not None and method.place == "encoder":
            made_tokens = project(made_tokens)
        _, made_counts = method.kept_and_made(keep, attended)
        of_tokens = {name: value for name, value in selection.details.items() if value.shape == (len(group), tokens)}
        for number, one in enumerate(group):
            whole[one.picture] = False
            competing = torch.searchsorted(pictures[one.picture].columns, one.columns)
            own_details = {name: value[number] for name, value in of_tokens.items()}
            told.setdefault(one.picture, []).append((competing, own_details))
            own, own_columns = selection.indices[number], one.columns[chosen[number]]
            if selection.eligible is not None:  # only the data told how many
                own, own_columns = own[selection.eligible[number]], own_columns[selection.eligible[number].cpu()]
            kept_columns[one.picture].append(own_columns)
            if made_tokens is not None:
                free = one.columns[one.attended & ~torch.isin(one.columns, own_columns)]
                places = evenly_spaced(free, min(int(made_counts[number]), len(free)))
                kept_columns[one.picture].append(places)
                lead, follow = made_tokens[number][: len(places)].tensor_split([selection.leading])
                read = torch.cat([lead, features[number][own].to(lead), follow])
                weights = None if selection.weights is None else selection.weights[number][: len(places)]
                carriers = torch.cat([own_columns, places]).sort().values
                made.setdefault(one.picture, []).append(
                    MadeTokens(carriers, read, own_columns, len(lead), weights, one.columns)
                )
    answers = []
    for index, picture in enumerate(pictures):
        kept = torch.isin(picture.columns, concatenated(kept_columns[index]))
        if whole[index]:
            kept = torch.ones_like(kept)
        elif method.newlines == "keep":
            kept = kept | picture.separators_to_keep(kept & picture.attended)
        parts = tuple(made.get(index, ()))
        features = inputs_embeds[picture.row, picture.columns.to(inputs_embeds.device)] if keep_features else None
        answers.append(
            KeptPicture(picture, kept & picture.attended, parts, told=tuple(told.get(index, ())), features=features)
        )
    return answers


def evenly_spaced(columns: Tensor, count: int) -> Tensor:
    """``count`` of the columns (n,), evenly spaced: the places of made tokens."""
    return columns[(2 * torch.arange(count) + 1) * len(columns) // max(2 * count, 1)]


def with_made_tokens(inputs_embeds: Tensor, kept: Sequence[KeptPicture]) -> Tensor:
    """The prompts (B, L, d) with made tokens in the places that carry them."""
    if not any(picture.made for picture in kept):
        return inputs_embeds
    inputs_embeds = inputs_embeds.clone()
    for picture in kept:
        for one in picture.made:
            inputs_embeds[picture.picture.row, one.columns.to(inputs_embeds.device)] = one.tokens.to(inputs_embeds)
    return inputs_embeds


def with_made_positions(positions: Tensor, kept: Sequence[KeptPicture]) -> Tensor:
    """Positions of the prompts (..., B, L), at the places of made tokens as `MadeTokens.stood` says."""
    moved = positions.clone()
    for picture in kept:
        row = picture.picture.row
        for one in picture.made:
            moved[..., row, one.columns] = positions[..., row, one.stood]
    return moved


def with_made_features(plane: Tensor, kept: Sequence[KeptPicture]) -> Tensor:
    """Another plane of features of the prompts (B, L, e), made tokens as `MadeTokens.of` mixes them there."""
    mixed = plane.clone()
    for picture in kept:
        for one in picture.made:
            mixed[picture.picture.row, one.columns.to(plane.device)] = one.of(plane[picture.picture.row])
    return mixed
