"""Figures 5, 7 and 8 and the maps: what questions and methods make of pictures."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava.eval.figures import drawing, patches
from llava.eval.figures.of_tokens import Drawn
from llava.eval.figures.scores import check_scores, names_of
from llava.eval.figures.sources import Source
from llava.mm_utils import load_image
from llava.pruning import Method, get_pruner, parse_options

Named = list[tuple[str, Method]]


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


def four_maps(source: Source, pictures: Sequence[Path], options: argparse.Namespace, methods: Named) -> Drawn:
    """Figure 5: attention of the class token, divergence, similarity, relevance and conditional variance, scaled."""
    (_, attentive), (_, script) = methods
    question = options.questions[0]
    panels, rows = [], []
    for path in tqdm(pictures, desc="pictures"):
        picture = load_image(path)
        views = source.views(picture, padding=options.padding)
        attention = source.look(picture, question, attentive).scores["attention"]
        scores = source.look(picture, question, script).scores
        for number, view in enumerate(views):
            relevance = scores["relevance"][number].masked_fill(~view.shows, torch.nan)
            variance = torch.full(relevance.shape, torch.nan, dtype=torch.float64)
            tokens = patches.unit(view.tokens)[view.shows]
            keep = script.count(view.shows.numel())
            variance[view.shows] = patches.variance_at_selection(tokens @ tokens.T, relevance[view.shows], keep)
            maps = {
                "class attention": attention[number],
                "divergence": patches.farthest_cosine(view.tokens, view.shows),
                "similarity": -scores["redundancy"][number],
                "relevance": relevance,
                "variance at selection": variance,
            }
            maps = {
                name: patches.scaled(values.masked_fill(~view.shows, torch.nan).double())
                for name, values in maps.items()
            }
            panels.append((f"{path.name}/{number}", view, maps))
            rows += [
                (f"{path.name}/{number}", name, row, column, float(values[row, column]))
                for name, values in maps.items()
                for row, column in view.shows.nonzero().tolist()
            ]
    shown = panels[:8]
    figure, axes = drawing.new_figure(len(shown), len(shown[0][2]))
    for line, (label, view, maps) in zip(axes, shown, strict=True):
        for panel, (name, values) in zip(line, maps.items(), strict=True):
            drawing.show_map(panel, view.colours, values, f"{label} {name}")
    print("divergence: 1 - the largest cosine with another token; similarity: minus the redundancy score")
    return figure, ("view", "map", "row", "column", "value"), rows


def kept(source: Source, pictures: Sequence[Path], options: argparse.Namespace, methods: Named) -> Drawn:
    """Figure 7: the kept tokens of every method, question by question, with the answer."""
    panels, rows = [], []
    for path, question, label, method in _asked(pictures, options, methods):
        picture = load_image(path)
        look = source.look(picture, question, method)
        answer = source.subject.answer(picture, question, method)
        for number, (lit, colours) in enumerate(zip(look.kept, source.colours(picture), strict=True)):
            panels.append((colours, lit, f"{label}: {question} {answer}", drawing.show_mask))
            places = lit.nonzero().tolist()
            rows += [(path.name, number, question, label, answer, row, column) for row, column in places]
    header = ("picture", "view", "question", "method", "answer", "row", "column")
    return _sheet(panels, len(pictures) * len(options.questions)), header, rows


def score_maps(source: Source, pictures: Sequence[Path], options: argparse.Namespace, methods: Named) -> Drawn:
    """Figure 8 (relevance) and the maps: scores of every method over the picture, question by question."""
    wanted = {label: [options.score] if options.score else list(names_of(method)) for label, method in methods}
    panels, rows = [], []
    for path, question, label, method in _asked(pictures, options, methods):
        picture = load_image(path)
        look = source.look(picture, question, method)
        views = source.views(picture, padding=options.padding)
        for name in wanted[label]:
            if name not in look.scores:
                raise ValueError(f"{label} has told no {name} of {path.name}: its budget keeps every token")
            for number, (values, view) in enumerate(zip(look.scores[name], views, strict=True)):
                values = values.masked_fill(~view.shows, torch.nan)
                panels.append((view.colours, values, f"{label} {name}: {question}", drawing.show_map))
                places = (~values.isnan()).nonzero().tolist()
                rows += [(path.name, number, question, label, name, r, c, float(values[r, c])) for r, c in places]
    header = ("picture", "view", "question", "method", "score", "row", "column", "value")
    return _sheet(panels, len(pictures) * len(options.questions)), header, rows


def _asked(
    pictures: Sequence[Path], options: argparse.Namespace, methods: Named
) -> Iterator[tuple[Path, str, str, Method]]:
    """Every picture with every question and every method."""
    asked = [(path, question, *named) for path in pictures for question in options.questions for named in methods]
    yield from tqdm(asked, desc="questions")


def _sheet(panels: Sequence[Any], questions: int) -> Any:
    """Panels in a row for each question about a picture; at most 64 are drawn, all are in the CSV."""
    shown = panels[:64]
    columns = min(-(-len(panels) // questions), len(shown))
    figure, axes = drawing.new_figure(-(-len(shown) // columns), columns)
    for number, place in enumerate(axes.flat):
        if number >= len(shown):
            place.set_axis_off()
            continue
        colours, values, title, draw = shown[number]
        draw(place, colours, values, title)
    if len(panels) > len(shown):
        print(f"{len(shown)} of {len(panels)} panels are drawn; the numbers of all are beside")
    return figure
