"""Figures 5, 7 and 8 and the maps: what questions and methods make of pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from llava.eval.figures import drawing, patches
from llava.eval.figures.of_tokens import Drawn
from llava.eval.figures.scores import check_scores, names_of
from llava.eval.figures.sources import Look, Plane, Source, View
from llava.mm_utils import load_image
from llava.pruning import Method, get_pruner, parse_options

MOST_PANELS = 64

Named = list[tuple[str, Method]]
Panel = tuple[Tensor, Tensor, str, Callable[..., None]]  # colours (h, w, 3), values (r, c), title, how it is drawn


def methods_of(texts: Sequence[str], keep: int | float) -> Named:
    """The methods that "script" or "script:relevance=language,tau=0.6" name, with their labels. Raises ValueError."""
    found = []
    for text in texts:
        name, _, options = text.partition(":")
        given = parse_options(name, options.split(",") if options else [])
        found.append((text, get_pruner(name, **{"keep_tokens": keep, **given})))
    return found


def for_figure(name: str, options: argparse.Namespace) -> Named:
    """The methods whose scores a figure draws. Raises ValueError where one has no such score."""
    if name == "5":
        return [
            ("fastervlm", get_pruner("fastervlm", keep_tokens=options.keep_tokens)),
            ("script", get_pruner("script", keep_tokens=options.keep_tokens)),
        ]
    methods = methods_of(options.pruners, options.keep_tokens)
    if name == "maps":
        check_scores(methods, options.score)
    elif name == "8":
        check_scores(methods, "relevance")
    return methods


@dataclass(frozen=True)
class Shown:
    """A picture that questions are asked about."""

    name: str
    picture: Image.Image
    views: list[View]
    planes: list[Plane]

    def panels(self, parts: Sequence[Tensor], title: str, draw: Callable[..., None]) -> list[Panel]:
        """One panel for each plane, of what the views have (r, c)."""
        return [
            (
                plane.joined([view.colours for view in self.views]),
                plane.joined(parts),
                f"{title} {plane.name}".strip(),
                draw,
            )
            for plane in self.planes
        ]


def _asked(
    source: Source, pictures: Sequence[Path], options: argparse.Namespace, methods: Named
) -> Iterator[tuple[Shown, str, list[tuple[str, Method, Look]]]]:
    """Every picture with every question, and what each method makes of them."""
    with tqdm(total=len(pictures) * len(options.questions) * len(methods), desc="questions") as bar:
        for path in pictures:
            picture = load_image(path)
            views = source.views(picture, padding=options.padding)
            shown = Shown(path.name, picture, views, source.planes(picture))
            for question in options.questions:
                looks = []
                for label, method in methods:
                    looks.append((label, method, source.look(picture, question, method)))
                    bar.update()
                yield shown, question, looks


def four_maps(source: Source, pictures: Sequence[Path], options: argparse.Namespace, methods: Named) -> Drawn:
    """Figure 5: attention of the class token, divergence, similarity, relevance and conditional variance, scaled."""
    lines, rows = [], []
    for shown, _, ((_, _, attentive), (_, script, scored)) in _asked(source, pictures, options, methods):
        maps: dict[str, list[Tensor]] = {}
        for number, view in enumerate(shown.views):
            relevance = scored.scores["relevance"][number].masked_fill(~view.shows, torch.nan)
            variance = torch.full(relevance.shape, torch.nan, dtype=torch.float64)
            tokens = patches.unit(view.tokens)[view.shows]
            keep = script.count(view.shows.numel())
            variance[view.shows] = patches.variance_at_selection(tokens @ tokens.T, relevance[view.shows], keep)
            own = {
                "class attention": attentive.scores["attention"][number],
                "divergence": patches.farthest_cosine(view.tokens, view.shows),
                "similarity": -scored.scores["redundancy"][number],
                "relevance": relevance,
                "variance at selection": variance,
            }
            for name, values in own.items():
                scaled = patches.scaled(values.masked_fill(~view.shows, torch.nan).double())
                maps.setdefault(name, []).append(scaled)
                rows += [
                    (f"{shown.name}/{number}", name, row, column, float(scaled[row, column]))
                    for row, column in view.shows.nonzero().tolist()
                ]
        panels = [shown.panels(parts, f"{shown.name} {name}", drawing.show_map) for name, parts in maps.items()]
        lines += [list(line) for line in zip(*panels, strict=True)]  # a line a plane
    print("divergence: 1 - the largest cosine with another token; similarity: minus the redundancy score")
    return _sheet(lines), ("view", "map", "row", "column", "value"), rows


def kept(source: Source, pictures: Sequence[Path], options: argparse.Namespace, methods: Named) -> Drawn:
    """Figure 7: the kept tokens of every method, question by question, with the answer."""
    lines, rows = [], []
    for shown, question, looks in _asked(source, pictures, options, methods):
        line: list[Panel] = []
        for label, method, look in looks:
            answer = source.subject.answer(shown.picture, question, method)
            line += shown.panels(look.kept, f"{shown.name} {label}: {question} {answer}", drawing.show_mask)
            for number, lit in enumerate(look.kept):
                places = lit.nonzero().tolist()
                rows += [(shown.name, number, question, label, answer, row, column) for row, column in places]
        lines.append(line)
    return _sheet(lines), ("picture", "view", "question", "method", "answer", "row", "column"), rows


def score_maps(source: Source, pictures: Sequence[Path], options: argparse.Namespace, methods: Named) -> Drawn:
    """Figure 8 (relevance) and the maps: scores of every method over the picture, question by question."""
    wanted = {label: [options.score] if options.score else list(names_of(method)) for label, method in methods}
    lines, rows = [], []
    for shown, question, looks in _asked(source, pictures, options, methods):
        line: list[Panel] = []
        for label, _, look in looks:
            for name in wanted[label]:
                if name not in look.scores:
                    raise ValueError(
                        f"{label} has told no {name} of all tokens of {shown.name}: its budget keeps every one, or "
                        "leaves a view out"
                    )
                parts = [
                    values.masked_fill(~view.shows, torch.nan)
                    for values, view in zip(look.scores[name], shown.views, strict=True)
                ]
                line += shown.panels(parts, f"{shown.name} {label} {name}: {question}", drawing.show_map)
                for number, values in enumerate(parts):
                    places = (~values.isnan()).nonzero().tolist()
                    rows += [(shown.name, number, question, label, name, r, c, float(values[r, c])) for r, c in places]
        lines.append(line)
    return _sheet(lines), ("picture", "view", "question", "method", "score", "row", "column", "value"), rows


def _sheet(lines: Sequence[Sequence[Panel]]) -> Any:
    """Lines of panels below each other; about 64 panels are drawn, the numbers of all are in the CSV."""
    columns = max(map(len, lines))
    shown = lines[: max(1, MOST_PANELS // columns)]
    figure, axes = drawing.new_figure(len(shown), columns)
    for places, line in zip(axes, shown, strict=True):
        for place in places[len(line) :]:
            place.set_axis_off()
        for place, (colours, values, title, draw) in zip(places, line, strict=False):
            draw(place, colours, values, title)
    if len(lines) > len(shown):
        print(f"{len(shown)} of {len(lines)} lines of panels are drawn; the numbers of all are beside")
    return figure
