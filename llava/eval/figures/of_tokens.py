"""Figures 3, 6 and 9: what the tokens of pictures are like, whatever is asked."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from llava.eval.figures import drawing, patches
from llava.eval.figures.sources import Plane, Source, View
from llava.mm_utils import load_image

SHARE_ABOVE = 0.5  # of Figure 3b
MASKS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of Figure 9
MOST_PANELS = 8  # that a figure draws; the numbers of all are in the CSV
SET_SIZE, SETS = 5, 64  # of Figure 6: tokens of a random set, and sets drawn from a view

Drawn = tuple[Any, Sequence[str], list[Sequence[Any]]]  # a figure, the heads of its numbers, the numbers


def all_pictures(
    source: Source, pictures: Sequence[Path], options: argparse.Namespace
) -> Iterator[tuple[str, list[View], list[Plane]]]:
    """Every picture's name, its views, and how they lie in it."""
    for path in tqdm(pictures, desc="pictures"):
        picture = load_image(path)
        yield path.name, source.views(picture, options.features, options.padding), source.planes(picture)


def all_views(source: Source, pictures: Sequence[Path], options: argparse.Namespace) -> Iterator[tuple[str, View]]:
    """Every view of every picture, with a name."""
    for name, views, _ in all_pictures(source, pictures, options):
        yield from ((f"{name}/{number}", view) for number, view in enumerate(views))


def cosine_by_distance(source: Source, pictures: Sequence[Path], options: argparse.Namespace) -> Drawn:
    """Figure 3a: mean cosine of two tokens at Manhattan distance D, averaged over views."""
    sums: dict[int, list[float]] = {}
    pairs: dict[int, int] = {}
    for _, view in all_views(source, pictures, options):
        total, count = patches.profile(view.tokens, view.shows)
        for distance in range(1, len(total)):
            if count[distance]:
                sums.setdefault(distance, []).append(float(total[distance] / count[distance]))
                pairs[distance] = pairs.get(distance, 0) + int(count[distance])
    rows = []
    for distance in sorted(sums):
        values = torch.tensor(sums[distance], dtype=torch.float64)
        spread = float(values.std()) if len(values) > 1 else 0.0
        rows.append((distance, float(values.mean()), spread, len(values), pairs[distance]))
    figure, axes = drawing.new_figure(width=5, height=3.4)
    distances, means, spreads, *_ = zip(*rows, strict=True)
    axes[0][0].errorbar(distances, means, spreads, capsize=2, marker="o", markersize=3)
    axes[0][0].set(xlabel="Manhattan distance", ylabel=f"mean cosine ({options.features})")
    lowest = min(rows, key=lambda row: row[1])
    print(f"{options.features} features: lowest at distance {lowest[0]} ({lowest[1]:.3f}), last {means[-1]:.3f}")
    return figure, ("distance", "mean_cosine", "standard_deviation_over_views", "views", "pairs"), rows


def near_and_far(source: Source, pictures: Sequence[Path], options: argparse.Namespace) -> Drawn:
    """Figure 3b: histograms of the cosines of neighbouring pairs, and of as many random pairs farther apart."""
    generator = torch.Generator().manual_seed(options.seed)
    found = [patches.near_and_far(v.tokens, v.shows, generator) for _, v in all_views(source, pictures, options)]
    names = ("neighbouring", "random")
    values = dict(zip(names, (torch.cat(part) for part in zip(*found, strict=True)), strict=True))
    edges = torch.linspace(-1, 1, 81)
    figure, axes = drawing.new_figure(width=5, height=3.4)
    rows: list[Sequence[Any]] = []
    for name, cosines in values.items():
        counts = torch.histogram(cosines, edges).hist / max(len(cosines), 1)
        axes[0][0].stairs(counts, edges, label=name, fill=True, alpha=0.5)
        rows += [(name, float(low), float(share)) for low, share in zip(edges[:-1], counts, strict=True)]
        above = float((cosines > SHARE_ABOVE).float().mean())
        print(f"{name} pairs: {len(cosines)}, above {SHARE_ABOVE}: {above:.1%}")
        rows.append((f"{name}, share above {SHARE_ABOVE}", SHARE_ABOVE, above))
    axes[0][0].set(xlabel=f"cosine ({options.features})", ylabel="share of pairs")
    axes[0][0].legend()
    return figure, ("pairs", "cosine_from", "share"), rows


@dataclass(frozen=True)
class Measured:
    """A number for every token of a picture: (r, c) for each of its views, NaN at padding."""

    name: str
    views: list[View]
    planes: list[Plane]
    values: list[torch.Tensor]

    def panels(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Title, colours and values of each plane."""
        for plane in self.planes:
            colours = plane.joined([view.colours for view in self.views])
            yield f"{self.name} {plane.name}".strip(), colours, plane.joined(self.values)


def _measured(
    source: Source, pictures: Sequence[Path], options: argparse.Namespace, measure: Callable[[View], torch.Tensor]
) -> list[Measured]:
    return [
        Measured(name, views, planes, list(map(measure, views)))
        for name, views, planes in all_pictures(source, pictures, options)
    ]


def _draw_maps(found: Sequence[Measured], title: str) -> Drawn:
    shown = list(islice((panel for one in found for panel in one.panels()), MOST_PANELS))
    figure, axes = drawing.new_figure(1, len(shown))
    for place, (name, colours, values) in zip(axes[0], shown, strict=True):
        drawing.show_map(place, colours, values, f"{name} {title}")
    rows = [
        (f"{one.name}/{number}", row, column, float(values[row, column]))
        for one in found
        for number, values in enumerate(one.values)
        for row, column in (~values.isnan()).nonzero().tolist()
    ]
    return figure, ("view", "row", "column", title.replace(" ", "_")), rows


def neighbour_map(source: Source, pictures: Sequence[Path], options: argparse.Namespace) -> Drawn:
    """Figure 3c: the mean cosine of every token with its 8 neighbours."""
    found = _measured(source, pictures, options, lambda view: patches.neighbour_cosine(view.tokens, view.shows))
    return _draw_maps(found, "mean cosine")


def entropy_map(source: Source, pictures: Sequence[Path], options: argparse.Namespace) -> Drawn:
    """Figure 3d: the entropy of every token's neighbourhood, and its rank correlation with Figure 3c."""

    def measure(view: View) -> torch.Tensor:
        return patches.entropy_map(view.tokens, view.shows, options.neighbourhood, options.bins)

    found = _measured(source, pictures, options, measure)
    correlations = [
        patches.rank_correlation(patches.neighbour_cosine(view.tokens, view.shows), values)
        for one in found
        for view, values in zip(one.views, one.values, strict=True)
    ]
    mean = torch.tensor(correlations).nanmean()
    print(
        f"{options.neighbourhood} of tokens, {patches.BINS} bins over the {options.bins} range: rank correlation with "
        f"the mean cosine {mean:+.3f} on average over {len(correlations)} views (claimed: negative)"
    )
    return _draw_maps(found, "entropy")


def determinants(source: Source, pictures: Sequence[Path], options: argparse.Namespace) -> Drawn:
    """Figure 6: two curves over rho for k tokens, and random sets of tokens by their mean cosine and determinant."""
    k, generator = options.set_size, torch.Generator().manual_seed(options.seed)
    rho = torch.arange(0, 1, 0.02, dtype=torch.float64)
    upper, equal = patches.bounds(rho, k)
    sets = torch.cat(
        [
            patches.random_determinants(view.tokens, view.shows, k, SETS, generator)
            for _, view in all_views(source, pictures, options)
        ]
    )
    figure, axes = drawing.new_figure(width=5, height=3.4)
    axes[0][0].plot(rho, upper, label=f"(1 + ρ)^{k - 1}")
    axes[0][0].plot(rho, equal, label=f"(1 + {k - 1}ρ)(1 - ρ)^{k - 1}")
    axes[0][0].scatter(*sets.T, s=4, alpha=0.4, color="gray", label=f"random sets of {k} tokens")
    axes[0][0].set(xlabel="ρ, mean cosine", ylabel="determinant", yscale="symlog")
    axes[0][0].set_yscale("symlog", linthresh=1e-3)
    axes[0][0].legend(fontsize=7)
    rows: list[Sequence[Any]] = [
        ("(1+rho)^(k-1)", float(r), float(value)) for r, value in zip(rho, upper, strict=True)
    ]
    rows += [("(1+(k-1)rho)(1-rho)^(k-1)", float(r), float(value)) for r, value in zip(rho, equal, strict=True)]
    rows += [("measured", float(r), float(value)) for r, value in sets]
    print(f"{len(sets)} random sets of {k}: mean cosine {sets[:, 0].mean():.3f}, determinant {sets[:, 1].mean():.3g}")
    return figure, ("curve", "rho", "determinant"), rows


def masks(source: Source, pictures: Sequence[Path], options: argparse.Namespace) -> Drawn:
    """Figure 9: the tokens whose mean cosine with their 8 neighbours is at least tau, a row a view."""
    found = _measured(source, pictures, options, lambda view: patches.neighbour_cosine(view.tokens, view.shows))

    def share(values: torch.Tensor, tau: float) -> float:
        return float((values >= tau).sum() / (~values.isnan()).sum().clamp_min(1))  # False at NaN

    shown = list(islice((panel for one in found for panel in one.panels()), MOST_PANELS))
    figure, axes = drawing.new_figure(len(shown), len(options.tau))
    for places, (name, colours, values) in zip(axes, shown, strict=True):
        for place, tau in zip(places, options.tau, strict=True):
            drawing.show_mask(place, colours, values >= tau, f"{name}: s >= {tau:g}, {share(values, tau):.0%}")
    rows: list[Sequence[Any]] = [
        (f"{one.name}/{number}", tau, share(values, tau))
        for one in found
        for number, values in enumerate(one.values)
        for tau in options.tau
    ]
    return figure, ("view", "tau", "share"), rows


def open_pictures(folder: Path, count: int | None, suffixes: set[str]) -> list[Path]:
    """The first ``count`` pictures of a folder by name, or all of them.

    Raises:
        FileNotFoundError: there are none, or fewer than asked for.
        OSError: one of them is no picture.
    """
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in suffixes)
    if not found or (count is not None and len(found) < count):
        asked = "any" if count is None else f"{count}"
        raise FileNotFoundError(f"{folder} has {len(found)} pictures ({', '.join(sorted(suffixes))}), not {asked}")
    chosen = found[:count]
    for path in chosen:
        with Image.open(path):
            pass
    return chosen
