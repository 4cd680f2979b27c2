"""The comparison's cells, and how they are shown: COMPARISON.md and a picture of it."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from results_report import RESAMPLES, Interval

from llava.eval.benchmarks import COLUMNS
from llava.eval.tables.runs import UNPRUNED
from llava.pruning import DecoderPruner, pruner_class
from llava.pruning.method_table import paper

KINDS = {"before": "-", "decoder": "--", "control": ":"}  # of methods, with the plot's line styles
NOTES = """\
Columns are budgets as asked for (`--keep-tokens`). Accuracy is the share of right answers in percent, for POPE too
(not F1); the mean is plain, over benchmarks, and "relative" is 100 x mean / unpruned mean. Where the visual tokens
are not what was asked for, the mean over the decoder's layers stands in brackets: a method inside the decoder lets
all tokens into its first layers, and the toy has few. Such cells compare by their true count, not by their column.
"""
TIME_NOTE = """\
Milliseconds per picture, at {budget} tokens: median over {pictures} pictures encoded beforehand, all methods in one
run, taken in turn, one thread. Selection: from the tower's output to the kept tokens, with whatever else the method
asks for (the question's embedding, attention to the class token, a smaller picture through the tower). Prefill: the
decoder's pass over the prompt, selection included; methods inside the decoder select there, so for them compare
prefill with the unpruned model's: the difference is what they cost less what they save.
"""


@dataclass(frozen=True)
class Task:
    """One run: a method (`UNPRUNED` without budget) at a budget, or a rule that finds it, on a benchmark."""

    method: str
    budget: int | str | None
    benchmark: str
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """What a run gave: share of right answers in percent, visual tokens left at the end and their mean over layers;
    ``items``: the score of each question, from 0 to 1, in the same order in all runs of a benchmark.
    """

    accuracy: float
    left: float
    average: float
    macs: float
    items: tuple[float, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A method at a budget, or a rule that finds it, over all benchmarks; ``relative`` is to the unpruned mean,
    in percent.
    """

    method: str
    budget: int | str | None
    accuracy: dict[str, float]
    mean: float
    relative: float
    spread: float | None  # of ``relative`` over seeds
    left: float
    average: float
    macs: float


def make_cells(measured: dict[Task, Measured]) -> list[Cell]:
    """Means over benchmarks and seeds. Every method and seed must have all benchmarks."""
    groups: dict[tuple[str, int | str | None], dict[Task, Measured]] = {}
    for task, result in measured.items():
        groups.setdefault((task.method, task.budget), {})[task] = result
    whole = statistics.fmean(result.accuracy for result in groups[UNPRUNED, None].values())
    return [make_cell(*key, own, whole) for key, own in groups.items()]


def make_cell(method: str, budget: int | str | None, own: dict[Task, Measured], whole: float) -> Cell:
    """A cell from its runs; ``whole`` is the unpruned model's mean accuracy."""
    accuracy = {task: result.accuracy for task, result in own.items()}
    mean = statistics.fmean(accuracy.values())
    by_seed = mean_by(accuracy, lambda task: task.seed).values()
    return Cell(
        method,
        budget,
        accuracy=mean_by(accuracy, lambda task: task.benchmark),
        mean=mean,
        relative=100 * mean / whole if whole else 0.0,
        spread=100 * statistics.stdev(by_seed) / whole if len(by_seed) > 1 and whole else None,
        left=statistics.fmean(result.left for result in own.values()),
        average=statistics.fmean(result.average for result in own.values()),
        macs=statistics.fmean(result.macs for result in own.values()),
    )


def mean_by(values: dict[Task, float], key: Callable[[Task], object]) -> dict:
    names = list(dict.fromkeys(key(task) for task in values))
    return {name: statistics.fmean(value for task, value in values.items() if key(task) == name) for name in names}


def differences(measured: dict[Task, Measured], reference: str = "script") -> dict[tuple[str, int], Interval]:
    """Of each method at each fixed budget: its mean less that of ``reference``, in points, with a 95 % interval.

    Questions are drawn with replacement within each benchmark, for both methods the same ones; seeds are averaged.
    """
    benchmarks = list(dict.fromkeys(task.benchmark for task in measured))
    groups: dict[tuple[str, int], dict[str, list[tuple[float, ...]]]] = {}
    for task, result in measured.items():
        if isinstance(task.budget, int):
            groups.setdefault((task.method, task.budget), {}).setdefault(task.benchmark, []).append(result.items)
    means = {key: {name: np.mean(own[name], axis=0) for name in benchmarks} for key, own in groups.items()}
    draws = {}
    for number, name in enumerate(benchmarks):
        questions = len(next(iter(means.values()))[name])
        rng = np.random.default_rng(number)
        draws[name] = rng.multinomial(questions, np.full(questions, 1 / questions), size=RESAMPLES) / questions
    found = {}
    for (method, budget), own in means.items():
        if (reference, budget) in means and method != reference:
            less = {name: 100 * (own[name] - means[reference, budget][name]) for name in benchmarks}
            drawn = np.mean([draws[name] @ less[name] for name in benchmarks], axis=0)
            low, high = np.percentile(drawn, (2.5, 97.5))
            center = float(np.mean([less[name].mean() for name in benchmarks]))
            found[method, budget] = Interval(center, float(low), float(high))
    return found


# --- writing -------------------------------------------------------------------------------------------------------


def kind(method: str) -> str:
    """Where a method acts, or that it is a control."""
    cls = pruner_class(method)
    return "decoder" if issubclass(cls, DecoderPruner) else "before" if paper(cls) else "control"


def ranked(cells: Sequence[Cell]) -> list[str]:
    """Methods, the best mean over budgets first."""
    methods = {cell.method for cell in cells} - {UNPRUNED}
    means = {name: statistics.fmean(cell.mean for cell in fixed(cells) if cell.method == name) for name in methods}
    return sorted(methods, key=lambda name: (-means[name], name))


def fixed(cells: Sequence[Cell]) -> list[Cell]:
    """Cells whose budget is a count, the same for every picture."""
    return [cell for cell in cells if isinstance(cell.budget, int)]


def found_table(cells: Sequence[Cell]) -> list[str]:
    """Markdown: budgets that find themselves, the most tokens first, each beside the method's fixed budgets."""
    own = sorted(
        (cell for cell in cells if isinstance(cell.budget, str)), key=lambda cell: (cell.method, -cell.average)
    )
    lines = [
        "| method | `--keep-tokens` | mean tokens | relative | fixed budgets around it |",
        "|---|---|---:|---:|---|",
    ]
    for cell in own:
        known = sorted((one for one in fixed(cells) if one.method == cell.method), key=lambda one: one.average)
        below = [one for one in known if one.average <= cell.average][-1:]
        above = [one for one in known if one.average > cell.average][:1]
        beside = ", ".join(f"{one.budget}: {one.relative:.1f}" for one in below + above)
        lines.append(f"| `{cell.method}` | `{cell.budget}` | {cell.average:.1f} | {cell.relative:.1f} | {beside} |")
    return lines


def difference_table(cells: Sequence[Cell], found: dict[tuple[str, int], Interval]) -> list[str]:
    """Markdown: a row per method, a column per budget."""
    budgets = sorted({budget for _, budget in found}, reverse=True)
    lines = [f"| method | {' | '.join(map(str, budgets))} |", "|---|" + "---|" * len(budgets)]
    for name in ranked(cells):
        if (name, budgets[0]) in found:
            row = (found[name, budget] for budget in budgets)
            lines.append(f"| `{name}` | " + " | ".join(f"{one.points}{one.arrow}" for one in row) + " |")
    return lines


def table(cells: Sequence[Cell], show: Callable[[Cell], str], ends: dict[str, Callable[[str], str]]) -> list[str]:
    """Markdown: a row per method, a column per budget with what ``show`` says of the cell, and columns at the end."""
    by_key = {(cell.method, cell.budget): cell for cell in cells}
    budgets = sorted({cell.budget for cell in fixed(cells)}, reverse=True)
    whole = by_key[UNPRUNED, None]
    lines = [" | ".join(["| method | where", *map(str, budgets), *ends, ""]).rstrip()]
    lines.append("|---|---|" + "---:|" * (len(budgets) + len(ends)))
    rows = [[UNPRUNED, "-", *[show(whole)] * len(budgets), *(end(UNPRUNED) for end in ends.values())]]
    for name in ranked(cells):
        shown = [show(by_key[name, budget]) for budget in budgets]
        rows.append([f"`{name}`", kind(name), *shown, *(end(name) for end in ends.values())])
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def with_count(cell: Cell, value: float) -> str:
    """A value, and the true count where it is not the one asked for."""
    differs = cell.budget is not None and abs(cell.average - cell.budget) >= 0.5
    return f"{value:.1f} ({cell.average:.0f})" if differs else f"{value:.1f}"


def relative_text(cell: Cell) -> str:
    spread = "" if cell.spread is None else f" ± {cell.spread:.1f}"
    return with_count(cell, cell.relative) + spread


def document(
    configuration: dict,
    cells: Sequence[Cell],
    times: dict[str, dict[str, float]],
    found: dict[tuple[str, int], Interval],
) -> str:
    """COMPARISON.md; ``found`` are the differences to Script."""
    benchmarks = [name for name in COLUMNS if name in cells[0].accuracy]

    def milliseconds(step: str) -> Callable[[str], str]:
        return lambda name: f"{times[name][step]:.1f}" if step in times[name] else "-"

    ends = {"selection, ms": milliseconds("selection"), "prefill, ms": milliseconds("prefill")}
    questions = configuration["questions"]
    total = sum(questions.values())
    parts = [
        "# All methods on the toy",
        f"`{configuration['command']}` at commit {configuration['commit']}; {configuration['machine']}; "
        + ", ".join(f"{name} {version}" for name, version in configuration["versions"].items())
        + f". Model: {configuration['model']}, greedy, options of methods as they come.",
        f"Questions: {', '.join(f'{COLUMNS[name]} {questions[name]}' for name in benchmarks)}. A share of 90% of "
        f"{total} questions has a standard error of {100 * (0.09 / total) ** 0.5:.1f} points; neighbours in the table "
        "that are closer than two of these are not told apart. ± is the standard deviation over seeds.",
        NOTES.rstrip(),
        "![mean accuracy against tokens](comparison.svg)",
        "## Mean, relative to unpruned, and time",
        "\n".join(table(cells, relative_text, ends)),
        TIME_NOTE.format(**configuration["timed"]).rstrip(),
    ]
    if found:
        parts += [
            "## Difference to `script`, in points of the mean",
            "With 95 % intervals of paired differences (bootstrap over questions, within each benchmark). ▲ ▼: told "
            "from nothing; of a hundred cells five are so by chance.",
            "\n".join(difference_table(cells, found)),
        ]
    if any(isinstance(cell.budget, str) for cell in cells):
        parts += ["## Budgets that find themselves, relative to unpruned", "\n".join(found_table(cells))]
    for name in benchmarks:
        parts += [
            f"## {COLUMNS[name]}, accuracy",
            "\n".join(table(cells, lambda cell, name=name: with_count(cell, cell.accuracy[name]), {})),
        ]
    parts += [
        "## Visual tokens: left at the end / mean over layers",
        "\n".join(table(cells, lambda cell: f"{cell.left:.1f} / {cell.average:.1f}", {})),
        "## Prefill of the visual tokens, million multiply-accumulates",
        "\n".join(table(cells, lambda cell: f"{cell.macs / 1e6:.0f}", {})),
    ]
    return "\n\n".join(parts) + "\n"


def plot(cells: Sequence[Cell]) -> bytes:
    """Relative mean against the true mean number of tokens, a line per method, as SVG; same bytes for same cells."""
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    colors = matplotlib.colormaps["tab20"].colors
    for number, name in enumerate(ranked(cells)):
        points = sorted((cell.average, cell.relative) for cell in fixed(cells) if cell.method == name)
        style = {"color": colors[number % len(colors)], "linestyle": KINDS[kind(name)]}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=f"{name} ({kind(name)})", **style)
    axes.axhline(100, color="gray", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("visual tokens per picture, mean over layers")
    axes.set_ylabel("mean accuracy relative to unpruned, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "comparison"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()
