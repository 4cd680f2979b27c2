"""Figure 2 and the sweeps: scores of benchmarks, from runs that are asked or were asked before."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import pi
from typing import Any

from llava.eval.benchmarks import BENCHMARKS, COLUMNS, SCALES
from llava.eval.figures import drawing
from llava.eval.figures.of_tokens import Drawn
from llava.eval.tables.command import add_table_options
from llava.eval.tables.of_the_paper import OF_TABLE_11, table_6
from llava.eval.tables.runs import UNPRUNED
from llava.eval.tables.study import Spec, Study, add_options, interval_of, parse_spec
from llava.pruning import pruner_class

SWEPT = ("tau", "gamma", "gsp_ratio", "kernel_exponent")
SWEEP_VALUES = {
    "tau": ("0.1", "0.3", "0.5", "0.7", "0.9"),
    "gamma": ("0", "0.5", "1", "2", "4"),
    "gsp_ratio": ("0", "0.25", "0.5", "0.75", "0.9"),
    "kernel_exponent": ("0.25", "0.5", "1", "2", "4"),
}


def add_command(name: str, parser: argparse.ArgumentParser) -> None:
    """The options of Figure 2a (those of Table 6), Figure 2b or a sweep."""
    if name == "2a":
        add_table_options("6", parser)
        return
    add_options(parser, "32" if name == "2b" else "16")
    every = list(BENCHMARKS) if name == "2b" else ["pope"]
    parser.add_argument("--benchmarks", nargs="+", choices=list(BENCHMARKS), default=every)
    if name == "2b":
        parser.add_argument("--pruners", nargs="+", default=list(OF_TABLE_11), metavar="NAME[:KEY=VALUE,...]")
        return
    parser.add_argument("--pruner", default="script", metavar="NAME", help="whose option it is (%(default)s)")
    parser.add_argument("--option", required=True, metavar="NAME", help=f"{', '.join(SWEPT)}, or any other")
    parser.add_argument("--values", nargs="+", metavar="V", help="of the option; default: five of those four")


def bars(options: argparse.Namespace) -> Drawn:
    """Figure 2a: Table 6 as bars: POPE F1, time to prefill, cache and work of every method."""
    heads, rows, notes = table_6(options)
    print("\n".join(notes))
    shown = [heads.index(head) for head in heads if head in ("POPE F1", "prefill, ms", "cache, MB", "TFLOPs")]
    figure, axes = drawing.new_figure(1, len(shown), width=3, height=3.2)
    for panel, column in zip(axes[0], shown, strict=True):
        values = [_number(row[column]) for row in rows]
        panel.barh([row[0] for row in rows], values)
        panel.invert_yaxis()
        panel.set_title(heads[column], fontsize=9)
        panel.tick_params(labelsize=7)
        panel.locator_params(axis="x", nbins=4)
    return figure, heads, rows


def _number(cell: str) -> float:
    """The number that a cell begins with; 0 where it has none."""
    text = cell.split()[0]
    return 0.0 if text == "–" else float(text)


def radar(options: argparse.Namespace) -> Drawn:
    """Figure 2b: every benchmark an axis, every method a line, in percent of the unpruned model."""
    study, specs = Study(options), [Spec(UNPRUNED), *map(parse_spec, options.pruners)]
    study.plan(options.benchmarks, specs)
    runs = study.ask_all()
    scored = [name for name in options.benchmarks if runs[name, specs[0]].score]
    left = [COLUMNS[name] for name in options.benchmarks if name not in scored]
    if left:
        print(f"not drawn, because only a server or a judge scores them: {', '.join(left)}")
    if len(scored) < 3:
        raise ValueError(f"a radar needs three benchmarks that are scored here, got {', '.join(scored) or 'none'}")
    whole = {name: runs[name, specs[0]].score["score"] or 1.0 for name in scored}
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(projection="polar")
    angles = [2 * pi * number / len(scored) for number in range(len(scored))]
    rows: list[Sequence[Any]] = []
    for spec in specs:
        shares = [100 * runs[name, spec].score["score"] / whole[name] for name in scored]
        axes.plot([*angles, angles[0]], [*shares, shares[0]], label=spec.label)
        rows += [
            (spec.label, name, runs[name, spec].score["score"], share)
            for name, share in zip(scored, shares, strict=True)
        ]
    axes.set_xticks(angles, [COLUMNS[name] for name in scored])
    axes.legend(loc="upper left", bbox_to_anchor=(1.05, 1.0), fontsize=7)
    return figure, ("method", "benchmark", "score", "percent_of_unpruned"), rows


def sweep(options: argparse.Namespace) -> Drawn:
    """An option of a method against the score at a fixed budget, with 95 % intervals over items."""
    values = options.values or SWEEP_VALUES.get(options.option)
    if values is None:
        raise ValueError(f"--values: say which values {options.option} is to have")
    fields = [field for field in pruner_class(options.pruner).__dataclass_fields__ if field != "keep_tokens"]
    if options.option not in fields:
        raise ValueError(f"{options.pruner} has no option {options.option!r}; it has {', '.join(fields)}")
    specs = [parse_spec(f"{options.pruner}:{options.option}={value}") for value in values]
    study = Study(options)
    study.plan(options.benchmarks, [Spec(UNPRUNED), *specs])
    runs = study.ask_all()
    figure, axes = drawing.new_figure(width=5, height=3.4)
    rows: list[Sequence[Any]] = []
    for name in options.benchmarks:
        scale = SCALES.get(name, 1.0)
        if runs[name, specs[0]].score is None:
            raise ValueError(f"{COLUMNS[name]} is not scored here: only a server or a judge does")
        found = [(runs[name, spec].score["score"], interval_of(runs[name, spec])) for spec in specs]
        rows += [
            (name, options.option, value, score, low, high)
            for value, (score, (low, high)) in zip(values, found, strict=True)
        ]
        scores = [score / scale for score, _ in found]
        errors = [[(s - b[0]) / scale for s, b in found], [(b[1] - s) / scale for s, b in found]]
        line = axes[0][0].errorbar(range(len(values)), scores, errors, capsize=3, marker="o", label=COLUMNS[name])
        unpruned = runs[name, Spec(UNPRUNED)].score["score"]
        axes[0][0].axhline(unpruned / scale, linestyle=":", color=line[0].get_color())
        rows.append((name, options.option, UNPRUNED, unpruned, *interval_of(runs[name, Spec(UNPRUNED)])))
    axes[0][0].set_xticks(range(len(values)), values)
    axes[0][0].set(
        xlabel=f"{options.option} ({options.keep_tokens} tokens; dotted: unpruned)", ylabel="score, percent"
    )
    axes[0][0].legend(fontsize=7)
    return figure, ("benchmark", "option", "value", "score", "low", "high"), rows
