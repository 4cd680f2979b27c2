"""The table of a study: methods x budgets against benchmarks, with averages, tokens, theoretical work and time.

python -m llava.eval.report playground/data/eval/*/answers/*/llava-v1.5-7b/*.run

Runs of this evaluation and of lmms-eval (`llava.eval.harness`) share one table.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from llava.eval.benchmarks import COLUMNS
from llava.eval.files import write_json, write_whole
from llava.eval.lmms_eval.results import TOLERANCE
from llava.eval.tables.paper import PAPER_NOTES, PAPER_ROWS, TABLES, PaperRow
from llava.eval.tables.rows import Row, common_columns, explanations, make_rows
from llava.eval.tables.runs import StudyRun, read_runs
from llava.eval.tables.significance import compare_items, compare_seeds
from llava.eval.text import markdown_cell, no_formula, printable

COST_NOTE = (
    "Tokens: visual tokens of a picture that are kept at the end of its way through the decoder. Average: their mean "
    "over layers, for methods inside the decoder with newline tokens, which they rank like any other. TFLOPs: "
    "multiply-accumulates of the visual tokens in prefill, from the numbers of all layers."
)


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


def paper_cells(rows: Sequence[Row], papers: Sequence[PaperRow]) -> list[list[str]]:
    """The paper's rows in the table's columns, where they have a value there; a dagger marks what is not right."""
    columns = header(rows)
    titles = {**COLUMNS, "acc": "Acc.", "relative": "Relative"}
    lines = []
    for paper in papers:
        line = dict.fromkeys(columns, "–")
        line |= {"Model": paper.model, "Method": f"{paper.method} (paper)", "Run": f"Table {paper.table}"}
        line["Tokens"] = str(paper.tokens)
        shown = {titles[name]: name for name in paper.printed if titles.get(name) in columns}
        for title, name in shown.items():
            right = f" † ({paper.right[name]:g})" if name in paper.right else ""
            line[title] = f"{paper.printed[name]:.2f}{right}"
        if shown and "tflops" in paper.printed:
            line["TFLOPs"] = f"{paper.printed['tflops'] / 2:g}"  # the paper counts two for a multiply-accumulate
        if shown:
            lines.append(list(line.values()))
    return lines


def markdown(rows: Sequence[Row], papers: Sequence[PaperRow] = (), notes: Sequence[str] = ()) -> str:
    """The table, and below it what its averages are over, and ``notes``."""
    lines = [header(rows)] + [cells(row, rows) for row in rows] + paper_cells(rows, papers)
    lines = [[markdown_cell(cell) for cell in line] for line in lines]
    text = [f"| {' | '.join(lines[0])} |", f"|{'---|' * len(lines[0])}"]
    text += [f"| {' | '.join(line)} |" for line in lines[1:]]
    for checkpoint in dict.fromkeys(row.checkpoint for row in rows):
        own = [row for row in rows if row.checkpoint == checkpoint]
        common = common_columns(own)
        titles = ", ".join(COLUMNS[name] for name in common) or "no common benchmark"
        ocrbench = ", OCRBench / 10" if "ocrbench" in common else ""
        text.append("")
        text.append(f"{markdown_cell(own[0].model)}: Acc. is the mean over {titles} (MME / 20{ocrbench}).")
    text += [f"* {markdown_cell(note)}" for note in notes]
    text += ["", COST_NOTE]
    if papers:
        text += ["", "(paper): as printed. † not what the table's own columns give; those give the value in brackets "]
        text[-1] += "(Tables 6 and 11: Table 3 prints it). --json has every number of these tables."
        text += [f"* {note}" for note in PAPER_NOTES]
    return "\n".join(text) + "\n"


def cross_checks(runs: Sequence[StudyRun]) -> list[str]:
    """lmms-eval's scores beside those that our own scorers give to the answers it logged."""
    agreeing, lines = [], []
    for run in runs:
        if run.score is None or "own_scorer" not in run.score:
            continue
        title, harness, own = COLUMNS[run.settings["benchmark"]], run.score["score"], run.score["own_scorer"]
        if own is None:
            lines.append(f"{title} of {run.name}: lmms-eval's score is not checked, {run.score['unchecked']}.")
        elif abs(harness - own) > TOLERANCE:
            lines.append(
                f"{title} of {run.name}: lmms-eval's score is {harness:.3f}, ours of the answers it logged is "
                f"{own:.3f}; they should be the same."
            )
        else:
            agreeing.append(f"{title} of {run.name}")
    if agreeing:
        lines.append(f"lmms-eval's scores are also those of our own scorers on its samples: {', '.join(agreeing)}.")
    return lines


def comma_separated(rows: Sequence[Row], papers: Sequence[PaperRow] = ()) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header(rows))
    lines = [cells(row, rows) for row in rows] + paper_cells(rows, papers)
    writer.writerows([no_formula(cell.replace("–", "")) for cell in line] for line in lines)
    return buffer.getvalue()


def objects(rows: Sequence[Row], papers: Sequence[PaperRow] = ()) -> list[dict]:
    """Rows for JSON, in full precision; the paper's have "paper": the number of its table."""
    paper = [
        {"paper": row.table, **{name: value for name, value in vars(row).items() if name != "table"}} for row in papers
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


def _check_outputs(options: argparse.Namespace) -> None:
    """Raise ValueError if a table would be written over what it is made from."""
    inputs = {path.resolve() for path in options.runs}
    for name in ("csv", "json", "plot"):
        place = getattr(options, name)
        if place is not None and inputs & {place.resolve(), *place.resolve().parents}:
            raise ValueError(f"--{name} {place} lies in a run that the table is made from: name another place")


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
    parser.add_argument(
        "--paper-table", type=int, action="append", choices=TABLES, metavar="N", help="add those of this table alone"
    )
    parser.add_argument("--compare", nargs=2, metavar="TAG", help="paired tests between two tags")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture of Relative against tokens")
    options = parser.parse_args(arguments)
    try:
        runs = [run for path in options.runs for run in read_runs(path)]
        _check_outputs(options)
        rows = make_rows(runs, dict(map(parse_value, options.value)))
        wanted = options.paper_table or (TABLES if options.paper else ())
        papers = [row for row in PAPER_ROWS if row.table in wanted]
        notes = explanations(runs, rows) + cross_checks(runs)
        print(markdown(rows, papers, notes), end="")
        if options.csv:
            write_whole(options.csv, comma_separated(rows, papers))
        if options.json:
            write_json(options.json, objects(rows, papers), indent=1)
        if options.plot:
            plot(rows, options.plot)
        if options.compare:
            print("\n" + comparison(runs, *options.compare), end="")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
