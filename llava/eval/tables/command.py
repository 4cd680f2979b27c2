"""Tables 1, 5, 6 and 11 of the paper, each from one command on a checkpoint; an interrupted one goes on.

    python -m llava.eval.tables 5 --keep-tokens 16 --data-root playground/toy/data/eval --limit 40

Square brackets are 95 % intervals over resampled items. docs/paper.md says what differs from the print; all other
tables are made of finished runs by python -m llava.eval.report.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import BENCHMARKS
from llava.eval.files import write_json, write_whole
from llava.eval.tables import of_the_paper as tables
from llava.eval.tables.study import add_options
from llava.eval.text import markdown_cell, no_formula, printable
from llava.serve import flags

TABLES = {"1": tables.table_1, "5": tables.table_5, "6": tables.table_6, "11": tables.table_11}
BUDGETS = {"1": "0.1", "5": "16", "6": "64", "11": "32"}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = parser.add_subparsers(dest="table", required=True, metavar="1|5|6|11")
    for number, make in TABLES.items():
        one = numbers.add_parser(number, help=make.__doc__, description=make.__doc__)
        add_table_options(number, one)
        one.add_argument("--csv", type=Path, metavar="FILE")
        one.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def add_table_options(number: str, one: argparse.ArgumentParser) -> None:
    """What the table of this number is made with."""
    add_options(one, BUDGETS[number])
    if number in ("1", "6"):
        one.add_argument("--repeats", type=flags.at_least_one, default=5, help="of every timing (%(default)s)")
        one.add_argument("--measure-again", action="store_true", help="do not take the times of an earlier table")
    if number == "1":
        one.add_argument("--pictures", type=Path, metavar="DIR", help="of the agreement; default: POPE's")
        one.add_argument("--count", type=flags.at_least_one, default=32, metavar="N", help="so many (%(default)s)")
        one.add_argument("--tau", type=float, default=0.5, help="edge threshold (%(default)s)")
        one.add_argument("--gamma", type=float, default=1.0, help="weight of edge strength (%(default)s)")
    if number == "6":
        one.add_argument("--pruners", nargs="+", default=list(tables.OF_TABLE_6), metavar="NAME[:KEY=VALUE,...]")
        one.add_argument("--new-tokens", type=flags.at_least_one, default=16, help="for the decode column")
    if number == "11":
        text = "methods; the last is held against the others"
        one.add_argument(
            "--pruners", nargs="+", default=list(tables.OF_TABLE_11), metavar="NAME[:KEY=VALUE,...]", help=text
        )
        one.add_argument("--benchmark", choices=sorted(BENCHMARKS), default="mme")
        one.add_argument("--runs", type=int, default=20, help="seeds of a random method, or resamples (%(default)s)")
        one.add_argument("--resample", action="store_true", help="values are resamples of one run's items")


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]], notes: Sequence[str]) -> str:
    lines = [heads, *rows]
    text = [f"| {' | '.join(markdown_cell(str(cell)) for cell in line)} |" for line in lines]
    text.insert(1, f"|{'---|' * len(heads)}")
    return "\n".join([*text, "", *(f"* {note}" for note in notes)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 2 with one line on standard error if it could not."""
    options = parse_arguments(arguments)
    try:
        heads, rows, notes = TABLES[options.table](options)
        print(markdown(heads, rows, notes), end="")
        if options.csv:
            buffer = io.StringIO()
            writer = csv.writer(buffer, lineterminator="\n")
            writer.writerows([no_formula(str(cell)) for cell in line] for line in (heads, *rows))
            write_whole(options.csv, buffer.getvalue())
        if options.json:
            write_json(options.json, {"table": options.table, "heads": heads, "rows": rows, "notes": notes}, indent=1)
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
