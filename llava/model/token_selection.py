"""Between the model and a method: gather what the method asks for, select, and put the kept tokens in order.

    plan (counts, questions) + EncodedImages -> for each group of candidates one selection -> KeptTokens

A method is asked once for all views with equally many tokens and equal budgets, whatever pictures they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llava.layout.candidates import Candidates
from llava.layout.plan import PicturePlan
from llava.layout.views import kept_places, kept_sequence, with_made_tokens
from llava.model.encoded_images import EncodedImages
from llava.model.kept_tokens import KeptTokens
from llava.model.vision_side import Layouts, VisionSide
from llava.pruning import Method, PruningInputs, Selection
from llava.relevance.asked import Asked
from llava.relevance.policy import Choice

BESIDE_PATCHES = {"class_attention", "mean_attention", "key_metric", "class_features"}
TOWER_FIELDS = BESIDE_PATCHES | {"encoder_features", "pixels"}
VIEWS_OF_A_SAMPLE = 4096  # more than any picture or video has; keeps the seeds of samples apart


@dataclass(frozen=True)
class CallPlan:
    """All that is decided about the pictures and videos of a call before the tower runs.

    Args:
        pictures: for each, its counts.
        layouts: for each, the layout that it is encoded with, and the one where padding counts like the rest.
        method: with its source of relevance settled; ``None`` keeps all.
        asked: the questions, for the method; ``None`` where it selects nothing before the decoder.
        choice: of the source of relevance, where the method reads the question.
        sample_ids: a number for each that seeds random methods; 0 where not given.
    """

    pictures: tuple[PicturePlan, ...] = ()
    layouts: tuple[Layouts, ...] = ()
    method: Method | None = None
    asked: Asked | None = None
    choice: Choice | None = None
    sample_ids: tuple[int, ...] | None = None

    @property
    def selects(self) -> bool:
        """Whether anything is dropped before the decoder."""
        return any(picture.candidates for picture in self.pictures)


@dataclass(frozen=True)
class Contest:
    """Candidates of one picture, and the rows of the encoded views that they come from."""

    picture: int
    candidates: Candidates
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """What a method answered about some views of a picture.

    Args:
        views: numbers of the views.
        numbers: (m,) flat numbers of the chosen patches in the picture.
        made: (V', k, d) tokens of its own, projected; ``None`` if it makes none.
    """

    views: tuple[int, ...]
    selection: Selection
    numbers: Tensor
    made: Tensor | None = None

    def by_view(self) -> list[tuple[int, Selection]]:
        return [(view, self.selection.of_views(slice(row, row + 1))) for row, view in enumerate(self.views)]


def keep_everything(picture: PicturePlan) -> KeptTokens:
    """A picture with all its tokens, as official LLaVA reads it."""
    layout = picture.layout
    return KeptTokens(layout.sequence, layout, int((layout.sequence >= 0).sum()), per_layer=picture.per_layer)


def select_tokens(
    vision: VisionSide, plan: CallPlan, encoded: EncodedImages, numbers: Sequence[int] | None = None
) -> list[KeptTokens]:
    """Choose the tokens of all pictures of ``encoded`` as planned.

    Args:
        numbers: which of the plan's pictures they are; by default all, in order.
    """
    numbers = range(len(encoded)) if numbers is None else numbers
    pictures = [plan.pictures[number] for number in numbers]
    answers: list[list[Answer]] = [[] for _ in pictures]
    if any(picture.candidates for picture in pictures):
        inputs = gather_inputs(vision, plan, encoded, numbers)
        for group in contests_of(pictures):
            if group[0].candidates.sequence:
                answer = choose_in_sequence(vision, plan.method, encoded, pictures, group[0])
                answers[group[0].picture].append(answer)
                continue
            for picture, answer in choose_together(vision, plan, encoded, inputs, numbers, group):
                answers[picture].append(answer)
    return [
        in_order(plan, picture, given) if given else keep_everything(picture)
        for picture, given in zip(pictures, answers, strict=True)
    ]


def contests_of(pictures: Sequence[PicturePlan]) -> list[list[Contest]]:
    """The selections to make, those that are made by one call of the method together.

    Candidates without a budget, views that show nothing, are left out.
    """
    groups: dict[Any, list[Contest]] = {}
    first_row = 0
    for number, picture in enumerate(pictures):
        for one in picture.candidates:
            key = (one.tokens, one.keep) if len(one.views) == 1 and not one.sequence else (number, "joined")
            contest = Contest(number, one, tuple(first_row + view for view in one.views))
            if one.keep:
                groups.setdefault(key, []).append(contest)
        first_row += picture.layout.views
    return list(groups.values())


def choose_together(
    vision: VisionSide,
    plan: CallPlan,
    encoded: EncodedImages,
    inputs: PruningInputs,
    numbers: Sequence[int],
    group: Sequence[Contest],
) -> list[tuple[int, Answer]]:
    """One call of the method: about single views, or about the joined views of one picture; answers by picture."""
    method, candidates, device = plan.method, group[0].candidates, inputs.features.device
    rows = torch.tensor([row for contest in group for row in contest.rows])
    everything = len(rows) == inputs.views
    picked = rows.to(device, non_blocking=True)
    chosen = inputs if everything else inputs.of_views(picked)
    joined = len(candidates.views) > 1
    if joined:
        chosen = chosen.joined()

    def image_embeds() -> Tensor:
        embeds = encoded.field("image_embeds", vision.tower).to(device)
        embeds = embeds if everything else embeds[picked]
        return embeds.flatten(0, 1)[None] if joined else embeds

    of_picture = torch.tensor([numbers[contest.picture] for contest in group])
    asked = plan.asked.fields(of_picture, chosen.features, chosen.valid, image_embeds)
    selection = method.select(replace(chosen, **asked), candidates.keep)
    made = selection.made
    if made is not None and method.place == "encoder":
        made = vision.project(made)
    if joined:
        flat = numbers_of(method, selection, selection.indices)
        return [(group[0].picture, Answer(candidates.views, selection, flat, made))]
    found, start = [], 0
    for picture in dict.fromkeys(contest.picture for contest in group):
        views = tuple(contest.candidates.views[0] for contest in group if contest.picture == picture)
        own = slice(start, start + len(views))
        start += len(views)
        answer = selection.of_views(own)
        offsets = (torch.tensor(views)[:, None] * candidates.tokens).to(device, non_blocking=True)
        flat = numbers_of(method, answer, answer.indices + offsets)
        found.append((picture, Answer(views, answer, flat, None if made is None else made[own])))
    return found


def numbers_of(method: Method, selection: Selection, numbers: Tensor) -> Tensor:
    """Flat numbers (m,) of what was chosen; where only the data tell the count, of what counts as kept."""
    if method.count_is_exact or selection.eligible is None:  # views of so few tokens that all are kept
        return numbers.flatten()
    return numbers[selection.eligible]


def choose_in_sequence(
    vision: VisionSide, method: Method, encoded: EncodedImages, pictures: Sequence[PicturePlan], contest: Contest
) -> Answer:
    """Select among all that the language model would read of one picture, newline tokens included."""
    whole = keep_everything(pictures[contest.picture])
    rows = vision.gather(encoded.pick([contest.picture]), [whole])[0]
    selection = method.select(PruningInputs(rows[None]), contest.candidates.keep)
    numbers = whole.sequence.to(selection.indices.device)[selection.indices[0]]
    return Answer(contest.candidates.views, selection, numbers)


def in_order(plan: CallPlan, picture: PicturePlan, answers: Sequence[Answer]) -> KeptTokens:
    """Put the chosen patches and the made tokens of a picture in reading order."""
    method, layout = plan.method, picture.layout
    numbers = answers[0].numbers if len(answers) == 1 else torch.cat([answer.numbers for answer in answers])
    selections, made = (answers[0].selection,), answers[0].made
    if len(answers) > 1:
        by_view = sorted((pair for answer in answers for pair in answer.by_view()), key=lambda pair: pair[0])
        selections = tuple(selection for _, selection in by_view)
    if picture.candidates[0].sequence:
        return KeptTokens(numbers, layout, int((numbers >= 0).sum()), selections)
    kept = picture.kept if method.count_is_exact else len(numbers)
    keep_newlines = method.newlines == "keep"
    if made is None:
        sequence = kept_sequence(layout, numbers, kept, keep_newlines)
    else:
        places = kept_places(layout, numbers, kept, keep_newlines)
        sequence = with_made_tokens(layout, places, picture.made, made.shape[1], selections[0].leading)
    return KeptTokens(sequence, layout, kept + sum(picture.made), selections, made, relevance=plan.choice)


def gather_inputs(vision: VisionSide, plan: CallPlan, encoded: EncodedImages, numbers: Sequence[int]) -> PruningInputs:
    """What the method asks for over the V views of all pictures, the question apart; expensive fields on demand."""
    method, features = plan.method, encoded.features
    device = features.device
    counts = torch.tensor([layout.views for layout in encoded.layouts])
    picture_of_view = torch.repeat_interleave(torch.arange(len(counts)), counts)
    view_in_picture = torch.cat([torch.arange(count) for count in counts])
    ids = torch.tensor([plan.sample_ids[number] if plan.sample_ids else 0 for number in numbers])
    seeds = ids[picture_of_view] * VIEWS_OF_A_SAMPLE + view_in_picture
    fields: dict[str, Any] = {
        "view_ids": seeds.to(device, non_blocking=True),
        "relevance_sign": vision.relevance_sign,
        "pictures": picture_of_view.to(device, non_blocking=True),
    }
    if method.exclude_padding:
        valid = torch.cat([layout.eligible for layout in encoded.layouts])
        if not bool(valid.all()):  # on the CPU: nothing waits for a GPU
            fields["valid"] = valid.to(device, non_blocking=True)
    beside = sorted(method.needs & BESIDE_PATCHES)
    if beside and vision.tower.select_feature == "cls_patch":
        raise ValueError(
            f"pruner '{method.name}' needs {', '.join(beside)} beside the patches, but this checkpoint's features "
            "count the class token among them (mm_vision_select_feature: cls_patch)"
        )
    for name in sorted(method.needs & TOWER_FIELDS):
        fields[name] = encoded.field(name, vision.tower).to(device)
    if "encode" in method.needs:
        fields["encode"] = partial(vision.encode_images, any_size=True)
    return PruningInputs(features, **fields)
