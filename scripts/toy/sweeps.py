"""Options of Script on the toy, one at a time: do the defaults stand?

    python scripts/toy/sweeps.py

Both toys (LLaVA-1.5's and LLaVA-NeXT's, whose budgets are per view) are asked the same questions with every value of
an option, the others as they come; what is told is the paired difference to the defaults. Goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from bench import Bench, Job, Row, add_options, configure, describe_run, list_jobs, measure_all, method
from files import write_text
from results_report import Measured, Table
from world import SKILLS

TOYS = ("playground/toy/llava-toy-v1.5", "playground/toy/llava-toy-v1.6")
BUDGETS = (16, 8, 4)
DEFAULT = "script"
VALUES = {
    "gsp_ratio": (0.0, 0.25, 0.75, 0.9),
    "tau": (0.3, 0.7),
    "gamma": (0.0, 2.0),
    "kernel_exponent": (0.5, 2.0),
    "restrict": (True,),
}


def settings() -> Iterator[tuple[str, dict]]:
    for option, values in VALUES.items():
        for value in values:
            yield f"{option}={str(value).lower()}", {option: value}


def make_rows(sign: int, options: argparse.Namespace) -> list[Row]:
    return [Row(DEFAULT, method("script")), *(Row(label, method("script", **given)) for label, given in settings())]


def part(title: str, table: Table) -> list[str]:
    """A table per skill and for all: a row per setting, a column per budget."""
    lines = [f"## {title}", ""]
    for skill in (None, *SKILLS):
        columns = " | ".join(f"{m} tokens" for m in table.budgets)
        lines += [f"| {skill or 'all questions'} | {columns} |", "|---|" + "---|" * len(table.budgets)]
        base = (table.cell(DEFAULT, m, skill) for m in table.budgets)
        lines.append("| defaults | " + " | ".join(f"{cell.mean:.1f} ± {cell.half:.1f}" for cell in base) + " |")
        for label, _ in settings():
            cells = (table.cell(label, m, skill, DEFAULT) for m in table.budgets)
            shown = (f"{cell.points}{cell.arrow}" for cell in cells)
            lines.append(f"| `{label}` | " + " | ".join(shown) + " |")
        lines.append("")
    return lines


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(TOYS))
    add_options(parser, scenes=48, crowded=100, few=100, budgets=BUDGETS)
    parser.set_defaults(worlds=["crowded"])
    parser.add_argument("--out", type=Path, default=Path("playground/toy/SWEEPS.md"))
    options = parser.parse_args(given)
    lines, command = [], f"python scripts/toy/sweeps.py {shlex.join(given)}".strip()
    for path in options.models:
        options.model_path = path
        bench = Bench(options, make_rows)
        jobs = list_jobs(list(bench.rows.values()), options.budgets, options.worlds)
        name = Path(path).name
        store = options.out.with_name(f"{options.out.stem}-{name}.json")
        cells = measure_all(bench, make_rows, jobs, configure(bench, command), store)
        for world in options.worlds:
            own = [job for job in jobs if job.world == world]
            title = f"{name}, {world} scenes, {len(bench.worlds[world].asked)} questions"
            lines += part(title, table_of(bench, own, cells))
    run = describe_run(options)
    head = [
        "# Options of Script on the toy, one at a time",
        "",
        f"`{command}` at commit {run['commit']}, {run['machine']}.",
        "First the defaults' right answers in percent ± half of the 95 % interval, then how many points more or fewer "
        "with one option changed, with the paired difference's 95 % interval (bootstrap over scenes). ▲ ▼: told from "
        "nothing; of a hundred cells five are so by chance. Budgets of llava-toy-v1.6 are per view.",
        "",
    ]
    write_text(options.out, "\n".join([*head, *lines]).rstrip() + "\n")
    print(options.out.read_text())


def table_of(bench: Bench, jobs: list[Job], cells: dict[str, str]) -> Table:
    measured = [Measured(*job.key.split("|"), np.array([c == "1" for c in cells[job.key]])) for job in jobs]
    return Table.of([(a.scene, a.skill) for a in bench.worlds[jobs[0].world].asked], measured)


if __name__ == "__main__":
    main()
