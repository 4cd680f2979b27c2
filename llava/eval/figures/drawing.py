"""Panels of a figure with matplotlib, and the figure's numbers as a CSV beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.eval.files import write_whole
from llava.eval.text import no_formula, printable

FORMATS = (".png", ".svg", ".pdf")
DIMMED = 0.3  # share of the original brightness that a dropped token keeps
PANEL = 2.6  # inches


def check_output(path: Path) -> None:
    """Raise ValueError, OSError or ImportError if no figure can be written there: before the work, not after."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--output {path}: a figure is {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output {path}: there is no folder {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "script-llava[eval]"') from error


def new_figure(rows: int = 1, columns: int = 1, width: float = PANEL, height: float = PANEL) -> tuple[Any, Any]:
    """A figure and its axes [rows][columns], each panel of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Any, path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write the figure, and its numbers as ``<name>.csv`` beside it; say where both are."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    table = path.with_suffix(".csv")
    write_whole(table, buffer.getvalue())
    figure.savefig(path)
    print(f"figure: {path}\nnumbers: {table} ({len(rows)} rows)")


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return no_formula(value) if isinstance(value, str) else value


def bare(axes: Any, title: str = "") -> Any:
    """Axes without ticks, under a title broken into short lines."""
    axes.set_xticks([])
    axes.set_yticks([])
    lines, line = [], ""
    for word in printable(title).split():
        line = f"{line} {word}".strip()
        if len(line) > 26:
            lines, line = [*lines, line], ""
    axes.set_title("\n".join([*lines, line] if line else lines), fontsize=8, parse_math=False)
    return axes


def show_map(axes: Any, colours: Tensor, values: Tensor, title: str) -> None:
    """A map (r, c) laid over its view (h, w, 3)."""
    height, width = colours.shape[:2]
    bare(axes, title).imshow(colours.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    axes.imshow(values.numpy(), cmap="viridis", alpha=0.65, extent=(0, width, height, 0), interpolation="nearest")


def show_mask(axes: Any, colours: Tensor, lit: Tensor, title: str) -> None:
    """A view (h, w, 3) with the cells outside ``lit`` (r, c) dimmed."""
    rows, columns = (
        torch.arange(length) * cells // length for length, cells in zip(colours.shape, lit.shape, strict=False)
    )
    shade = DIMMED + (1 - DIMMED) * lit[rows][:, columns].float()
    bare(axes, title).imshow((colours * shade[..., None]).numpy())
