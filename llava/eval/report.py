"""The table of a study: methods x budgets against benchmarks, with averages, tokens, theoretical work and time.

python -m llava.eval.report playground/data/eval/*/answers/*/llava-v1.5-7b/*.run

Runs of this evaluation and of lmms-eval (`llava.eval.harness`) stand in one table.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from llava.eval.files import write_json, write_whole
from llava.eval.paper import PAPER_NOTES, PAPER_ROWS
from llava.eval.significance import compare_items, compare_seeds
from llava.eval.study_runs import UNPRUNED, StudyRun, read_runs

COLUMNS = {
    "vqav2": "VQAv2",
    "gqa": "GQA",
    "vizwiz": "VizWiz",
    "sqa": "SQA",
    "textvqa": "TextVQA",
    "pope": "POPE",
    "mme": "MME",
    "mmbench": "MMB",
    "mmbench_cn": "MMB-CN",
    "mmvet": "MM-Vet",
    "mlvu": "MLVU",
    "mvbench": "MVBench",
    "longvideobench": "LVB",
    "longvideobench_perception": "LVB-perception",
    "longvideobench_relation": "LVB-relation",
    "videomme": "Video-MME",
    "videomme_short": "VMME-short",
    "videomme_medium": "VMME-medium",
    "videomme_long": "VMME-long",
    "ai2d": "AI2D",
    "chartqa": "ChartQA",
    "ocrbench": "OCRBench",
    "hallusionbench": "HallusionBench",
}
SCALES = {"mme": 20.0, "ocrbench": 10.0}  # bring perception's total of 2000 and 1000 points to 0..100
COST_NOTE = (
    "Tokens: visual tokens of a picture that are left at the end of its way through the decoder. Average: their mean "
    "over layers, for methods inside the decoder with newline tokens, which they rank like any other. TFLOPs: "
    "multiply-accumulates of the visual tokens in prefill, from the numbers of all layers."
)


def average(scores: dict[str, float]) -> float:
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


def make_rows(runs: Iterable[StudyRun], values: dict[tuple[str, str], float]) -> list[Row]:
    """Rows from runs, by model and falling number of tokens; the unpruned one first.

    Args:
        values: (benchmark, tag) -> score that a server gave.
    """
    groups: dict[tuple, list[StudyRun]] = defaultdict(list)
    for run in runs:
        groups[(*run.checkpoint, run.tag, run.method, run.settings["code"])].append(run)
    rows = [_row(key, own, values) for key, own in groups.items()]
    rows.sort(key=lambda row: (row.model, row.checkpoint, row.method != UNPRUNED, -row.average, row.method))
    for checkpoint in dict.fromkeys(row.checkpoint for row in rows):
        _fill_averages([row for row in rows if row.checkpoint == checkpoint])
    return rows


def _row(key: tuple, runs: list[StudyRun], values: dict[tuple[str, str], float]) -> Row:
    model, checkpoint, tag, method, code = key
    scores, seen = defaultdict(list), {}
    for run in runs:
        same = seen.setdefault((run.settings["benchmark"], run.settings["seed"]), run)
        if same is not run:
            raise ValueError(f"{same.folder} and {run.folder} are the same benchmark, tag and seed: give one of them")
        if run.score is not None:
            for name, score in run.score.get("columns", {run.settings["benchmark"]: run.score["score"]}).items():
                scores[name].append(score)
    for (benchmark, of_tag), value in values.items():
        if of_tag == tag:
            scores[benchmark] = [value]
    row = Row(model, checkpoint, tag, method, code)
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
    """Acc. over the benchmarks that all rows of a checkpoint have; Relative to the unpruned row of the same code."""
    common = [name for name in COLUMNS if all(name in row.scores for row in rows)]
    if not common:
        return
    for row in rows:
        row.acc = average({name: row.scores[name] for name in common})
    for row in rows:
        whole = next((other for other in rows if other.method == UNPRUNED and other.code == row.code), None)
        if whole is not None and whole.acc:
            row.relative = 100.0 * row.acc / whole.acc


# --- forms of the table --------------------------------------------------------------------------------------------


def header(rows: Sequence[Row]) -> list[str]:
    shown = [name for name in COLUMNS if any(name in row.scores for row in rows)]
    fixed = ["Tokens", "Average", "Newlines", "TFLOPs", "Time s", "Questions/s"]
    return ["Model", "Method", "Run", *(COLUMNS[name] for name in shown), "Acc.", "Relative", *fixed]


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """A row's cells as text, a dash where there is no value."""
    shown = [name for name in COLUMNS if any(name in other.scores for other in rows)]
    numbers = [row.scores.get(name) for name in shown] + [row.acc, row.relative]
    method = row.method + (f" (mean of {row.seeds} seeds)" if row.seeds > 1 else "")
    method += f" ({row.skipped} questions skipped)" if row.skipped else ""
    method += f" ({row.unreadable} unreadable, scored as empty answers)" if row.unreadable else ""
    rest = [
        f"{row.tokens:.1f}",
        f"{row.average:.1f}",
        f"{row.newlines:.1f}",
        "–" if row.tera_flops is None else f"{row.tera_flops:.4g}",
        f"{row.seconds:.1f}",
        f"{row.rate:.2f}",
    ]
    return [row.model, method, row.tag, *("–" if n is None else f"{n:.2f}" for n in numbers), *rest]


def paper_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The paper's rows in the table's columns, where they have a value there; a dagger marks what is not right."""
    columns = header(rows)
    titles = {**COLUMNS, "acc": "Acc.", "relative": "Relative"}
    lines = []
    for paper in PAPER_ROWS:
        line = dict.fromkeys(columns, "–")
        line |= {"Model": paper.model, "Method": f"{paper.method} (paper)", "Run": f"Table {paper.table}"}
        line["Tokens"] = str(paper.tokens)
        shown = {titles[name]: name for name in paper.printed if titles[name] in columns}
        for title, name in shown.items():
            right = f" † ({paper.right[name]:g})" if name in paper.right else ""
            line[title] = f"{paper.printed[name]:.2f}{right}"
        if shown:
            lines.append(list(line.values()))
    return lines


def markdown(rows: Sequence[Row], with_paper: bool = False) -> str:
    """The table, and below it what its averages are over."""
    lines = [header(rows)] + [cells(row, rows) for row in rows] + (paper_cells(rows) if with_paper else [])
    text = [f"| {' | '.join(lines[0])} |", f"|{'---|' * len(lines[0])}"]
    text += [f"| {' | '.join(line)} |" for line in lines[1:]]
    for checkpoint in dict.fromkeys(row.checkpoint for row in rows):
        own = [row for row in rows if row.checkpoint == checkpoint]
        common = [name for name in COLUMNS if all(name in row.scores for row in own)]
        titles = ", ".join(COLUMNS[name] for name in common) or "no common benchmark"
        ocrbench = ", OCRBench / 10" if "ocrbench" in common else ""
        text.append("")
        text.append(f"{own[0].model}: Acc. is the mean over {titles} (MME / 20{ocrbench}).")
        if any(row.relative is None for row in own):
            text.append("Relative is empty where no unpruned run of the same checkpoint and code was given.")
    text += ["", COST_NOTE]
    if with_paper:
        text += ["", "(paper): as printed. † not what the table's own columns give; those give the value in brackets "]
        text[-1] += "(Tables 6 and 11: Table 3 prints it). Of the paper's rows those are here whose values were noted."
        text += [f"* {note}" for note in PAPER_NOTES]
    return "\n".join(text) + "\n"


def comma_separated(rows: Sequence[Row], with_paper: bool = False) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header(rows))
    lines = [cells(row, rows) for row in rows] + (paper_cells(rows) if with_paper else [])
    writer.writerows([cell.replace("–", "") for cell in line] for line in lines)
    return buffer.getvalue()


def objects(rows: Sequence[Row], with_paper: bool = False) -> list[dict]:
    """Rows for JSON, in full precision; the paper's have "paper": the number of its table."""
    paper = [
        {"paper": row.table, **{name: value for name, value in vars(row).items() if name != "table"}}
        for row in (PAPER_ROWS if with_paper else ())
    ]
    return [vars(row) for row in rows] + paper


def plot(rows: Sequence[Row], path: Path) -> None:
    """Relative against tokens, a line per model and method. Raises ImportError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('--plot needs matplotlib: pip install "script-llava[eval]"') from error
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = defaultdict(list)
    for row in rows:
        if row.relative is not None:
            lines[row.model, row.method].append((row.average, row.relative))
    for (model, method), points in lines.items():
        points.sort()
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{model}, {method}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("visual tokens per picture, mean over layers")
    axes.set_ylabel("Relative, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def comparison(runs: Sequence[StudyRun], first: str, second: str) -> str:
    """Paired tests of two tags per benchmark: over items (means over seeds), and over seeds if there are several."""
    lines = []
    for name, title in COLUMNS.items():
        own = [run for run in runs if run.settings["benchmark"] == name and run.score is not None]
        a, b = ([run for run in own if run.tag == tag] for tag in (first, second))
        if not (a and b):
            continue
        lines.append(f"{title}, items: {compare_items([r.score['items'] for r in a], [r.score['items'] for r in b])}")
        by_seed = [{run.settings["seed"]: run.score["score"] for run in side} for side in (a, b)]
        if len(by_seed[0].keys() & by_seed[1].keys()) > 1:
            lines.append(f"{title}, seeds: {compare_seeds(*by_seed)}")
    if not lines:
        raise ValueError(f"no benchmark was scored for both {first} and {second}")
    return f"{first} minus {second}\n" + "\n".join(lines) + "\n"


def parse_value(text: str) -> tuple[tuple[str, str], float]:
    """Read "vqav2:vtn_64=75.6". Raises ValueError."""
    found = re.fullmatch(r"(\w+):(.+)=([\d.]+)", text)
    if not found or found[1] not in COLUMNS:
        raise ValueError(f"--value is written benchmark:tag=score with one of {', '.join(COLUMNS)}; got {text!r}")
    return (found[1], found[2]), float(found[3])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 2 with one line on standard error if it could not."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.report", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="<tag>.run folders, answer files, or lmms-eval's result files",
    )
    parser.add_argument("--value", nargs="+", default=[], metavar="BENCH:TAG=SCORE", help="a server's scores")
    parser.add_argument("--paper", action="store_true", help="add the paper's rows")
    parser.add_argument("--compare", nargs=2, metavar="TAG", help="paired tests between two tags")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture of Relative against tokens")
    options = parser.parse_args(arguments)
    try:
        runs = [run for path in options.runs for run in read_runs(path)]
        rows = make_rows(runs, dict(map(parse_value, options.value)))
        print(markdown(rows, options.paper), end="")
        if options.csv:
            write_whole(options.csv, comma_separated(rows, options.paper))
        if options.json:
            write_json(options.json, objects(rows, options.paper), indent=1)
        if options.plot:
            plot(rows, options.plot)
        if options.compare:
            print("\n" + comparison(runs, *options.compare), end="")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
