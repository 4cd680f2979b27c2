"""Rows of a study: runs put together by method and budget, averages over them, and why some cannot be compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

from llava.eval.benchmarks import COLUMNS, SCALES
from llava.eval.tables.runs import UNPRUNED, StudyRun

# What runs of one row, or a row and its unpruned one, should share beside checkpoint and code.
SHARED = {
    "libraries": ("libraries",),
    "device": ("device",),
    "decoding": ("dtype", "attention", "attn_implementation", "conversation"),
}


def average(scores: Mapping[str, float]) -> float:
    """Acc.: plain mean over columns, MME divided by 20 and OCRBench by 10."""
    return fmean(score / SCALES.get(name, 1.0) for name, score in scores.items())


@dataclass
class Row:
    """A method at a budget, over benchmarks; scores are means over seeds."""

    model: str
    checkpoint: str
    tag: str
    method: str
    code: str
    method_code: str | None = None
    grid: tuple[int, int] | None = None
    scores: dict[str, float] = field(default_factory=dict)
    seeds: int = 1
    tokens: float = 0.0
    average: float = 0.0
    newlines: float = 0.0
    tera_flops: float | None = None
    seconds: float = 0.0
    rate: float = 0.0
    skipped: int = 0
    unreadable: int = 0
    acc: float | None = None
    relative: float | None = None

    @property
    def name(self) -> str:
        return f"{self.tag} ({self.method})" if self.method not in self.tag else self.tag


def make_rows(runs: Iterable[StudyRun], values: Mapping[tuple[str, str], float]) -> list[Row]:
    """Rows from runs, by model and falling number of tokens; the unpruned one first.

    Runs share a row if checkpoint, tag and the code of their answers are the same; other methods' code does not count.

    Args:
        values: (benchmark, tag) -> score that a server gave.
    """
    groups: dict[tuple, list[StudyRun]] = defaultdict(list)
    for run in runs:
        groups[key_of(run)].append(run)
    rows = [_row(key, own, values) for key, own in groups.items()]
    rows.sort(key=lambda row: (row.model, row.checkpoint, row.method != UNPRUNED, -row.average, row.method))
    for checkpoint in dict.fromkeys(row.checkpoint for row in rows):
        _fill_averages([row for row in rows if row.checkpoint == checkpoint])
    return rows


def key_of(run: StudyRun) -> tuple:
    """What the runs of a row have in common."""
    code = run.settings["code"], run.settings.get("method_code")
    return (*run.checkpoint, run.tag, run.method, *code, run.grid)


def _row(key: tuple, runs: list[StudyRun], values: Mapping[tuple[str, str], float]) -> Row:
    row = Row(*key)
    scores, seen = defaultdict(list), {}
    for run in runs:
        same = seen.setdefault((run.settings["benchmark"], run.settings["seed"]), run)
        if same is not run:
            raise ValueError(f"{same.folder} and {run.folder} are the same benchmark, tag and seed: give one of them")
        if run.score is not None:
            for name, score in run.score.get("columns", {run.settings["benchmark"]: run.score["score"]}).items():
                scores[name].append(score)
    for (benchmark, of_tag), value in values.items():
        if of_tag == row.tag:
            scores[benchmark] = [value]
    row.scores = {name: fmean(scores[name]) for name in COLUMNS if scores.get(name)}
    row.seeds = len({run.settings["seed"] for run in runs})
    row.tokens = fmean(run.summary["visual_tokens"] for run in runs)
    row.average = fmean(run.summary.get("average_tokens", run.summary["visual_tokens"]) for run in runs)
    row.newlines = fmean(run.summary["newline_tokens"] for run in runs)
    if all("prefill_flops" in run.summary for run in runs):  # runs of older versions did not note it
        row.tera_flops = fmean(run.summary["prefill_flops"] for run in runs) / 1e12
    row.seconds = sum(run.summary["wall_seconds"] for run in runs)
    questions = sum(run.summary["questions"] for run in runs)
    row.rate = questions / row.seconds if row.seconds else 0.0
    row.skipped = sum(run.summary["skipped"] for run in runs)
    row.unreadable = sum(run.summary.get("unreadable", 0) for run in runs)
    return row


def _fill_averages(rows: list[Row]) -> None:
    """Acc. over the benchmarks that all rows of a checkpoint have; Relative to the unpruned row of the same code, of
    pictures cut for the same grid.

    Where all rows have none in common, Acc. is empty and Relative is over what a row shares with the unpruned one.
    """
    common = common_columns(rows)
    for row in rows:
        if common:
            row.acc = _average_over(row, common)
        unpruned = (other for other in rows if other.method == UNPRUNED)
        whole = next((other for other in unpruned if (other.code, other.grid) == (row.code, row.grid)), None)
        if whole is not None:
            columns = common or common_columns([row, whole])
            reference = _average_over(whole, columns) if columns else 0.0
            if reference:
                row.relative = 100.0 * _average_over(row, columns) / reference


def _average_over(row: Row, columns: Sequence[str]) -> float:
    return average({name: row.scores[name] for name in columns})


def common_columns(rows: Sequence[Row]) -> list[str]:
    """The columns in which all rows have a score."""
    return [name for name in COLUMNS if all(name in row.scores for row in rows)]


# --- why rows cannot be compared -----------------------------------------------------------------------------------


def explanations(runs: Sequence[StudyRun], rows: Sequence[Row]) -> list[str]:
    """A sentence for everything that keeps runs apart or a cell empty."""
    lines = []
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        lines += _split_rows(own, runs) + _empty_relatives(own) + _left_out(own)
    return lines + _unlike_runs(runs)


def _split_rows(rows: Sequence[Row], runs: Sequence[StudyRun]) -> list[str]:
    """Rows of one tag that could not become one."""
    lines = []
    for first, second in _pairs(rows, lambda row: (row.tag, row.method)):
        names = ("checkpoint", "code", "method_code")
        differing = [name.replace("_", " ") for name in names if getattr(first, name) != getattr(second, name)]
        benchmarks = [", ".join(COLUMNS[name] for name in row.scores) or "no score" for row in (first, second)]
        lines.append(
            f"{first.name} has two rows, because its runs ({benchmarks[0]}; {benchmarks[1]}) differ in "
            f"{' and '.join(differing)}: answer the older ones again to join them."
        )
    return lines


def _empty_relatives(rows: Sequence[Row]) -> list[str]:
    whole = [row for row in rows if row.method == UNPRUNED]
    lines = []
    for row in rows:
        if row.relative is not None or row.method == UNPRUNED:
            continue
        if not whole:
            reason = f"no unpruned run of {row.model} was given"
        elif all(other.checkpoint != row.checkpoint for other in whole):
            reason = "the unpruned run has another checkpoint"
        elif all(other.code != row.code for other in whole if other.checkpoint == row.checkpoint):
            reason = "the unpruned run was answered by other code (of model, prompt or decoding)"
        elif all(other.grid != row.grid for other in whole if other.checkpoint == row.checkpoint):
            reason = "the unpruned run cut pictures for another --image-grid"
        else:
            reason = "it has no benchmark of the unpruned run, or that one's score is 0"
        lines.append(f"Relative of {row.name} is empty: {reason}.")
    return lines


def _left_out(rows: Sequence[Row]) -> list[str]:
    """Columns that are no part of Acc."""
    lines = []
    for checkpoint in dict.fromkeys(row.checkpoint for row in rows):
        own = [row for row in rows if row.checkpoint == checkpoint]
        if not common_columns(own):
            lines.append(
                f"Acc. is empty: no benchmark has a score in all rows of {own[0].model}. Relative is over the "
                "benchmarks that a row shares with the unpruned one."
            )
            continue
        for name in COLUMNS:
            lacking = [row.name for row in own if name not in row.scores]
            if lacking and len(lacking) < len(own):
                lines.append(f"{COLUMNS[name]} is no part of Acc.: {', '.join(lacking)} has no score of it.")
    return lines


def _unlike_runs(runs: Sequence[StudyRun]) -> list[str]:
    """Runs of one checkpoint in one table that should not be compared without thought."""
    lines = []
    for what, names in SHARED.items():
        for first, second in _pairs(runs, lambda run: run.checkpoint):
            pairs = [(first.settings.get(name), second.settings.get(name)) for name in names]
            unlike = [_apart(*pair) for pair in pairs if None not in pair and pair[0] != pair[1]]
            if unlike:
                lines.append(
                    f"{first.title} and {second.title} differ in {what} ({'; '.join(unlike)}): compare them with care."
                )
                break
    return lines


def _apart(first: Any, second: Any) -> str:
    """Two values of a setting, or of tables of versions what differs in them."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
        return ", ".join(f"{name} {first.get(name)} and {second.get(name)}" for name in names)
    return f"{first} and {second}"


def _pairs(items: Sequence[Any], key: Callable[[Any], Any]) -> Iterable[tuple[Any, Any]]:
    """Neighbours among the items of one key."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return (pair for own in groups.values() for pair in pairwise(own))
