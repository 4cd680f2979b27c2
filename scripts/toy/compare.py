"""All methods at all budgets on the toy's benchmarks: accuracy, what each cell costs, and the selector's time.

    python scripts/toy/compare.py --limit 200

Every cell is a run of llava.eval.run under --output-root, so the same command goes on where it was stopped; after a
change of code or checkpoint it refuses the old runs: delete that folder. Writes COMPARISON.md, .json and .svg.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path

import torch
from compare_report import Measured, Task, differences, document, make_cells, plot
from files import write_bytes, write_text
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar
from world import describe_commit

from llava.eval.benchmarks import BENCHMARKS
from llava.eval.files import write_whole
from llava.eval.measure.selection_speed import time_rows
from llava.eval.runner import identity, run
from llava.eval.tables.runs import UNPRUNED, read_run
from llava.model.builder import DEFAULT_CHECKPOINT, TOY_FOLDER
from llava.model.encoded_images import EncodedImages
from llava.model.token_selection import select_tokens
from llava.pruning import DecoderPruner, Pruner, get_pruner, list_pruners, pruner_class
from llava.pruning.budget_finder import BudgetFinder

BUDGETS = (192, 128, 64, 32, 16)
SEEDED = "random"  # the one method whose default is chance
JSON_LINES = ("gqa", "pope", "textvqa", "vizwiz", "vqav2")  # one question a line, each with a score of its own


# --- answering -----------------------------------------------------------------------------------------------------


def list_tasks(
    methods: Sequence[str], budgets: Sequence[int], benchmarks: Sequence[str], seeds: int, rules: Sequence[str] = ()
) -> list[Task]:
    """The unpruned model first; only `random` takes several seeds, and only methods that can take ``rules``."""
    tasks = [Task(UNPRUNED, None, benchmark) for benchmark in benchmarks]
    for method in methods:
        for seed in range(seeds if method == SEEDED else 1):
            tasks += [Task(method, budget, name, seed) for budget in budgets for name in benchmarks]
        if issubclass(pruner_class(method), BudgetFinder):
            tasks += [Task(method, rule, name) for rule in rules for name in benchmarks]
    return tasks


def draw_questions(benchmark: str, options: argparse.Namespace) -> Path:
    """A list of ``--limit`` questions drawn from all parts of a benchmark, in their order; the whole list without.

    Not the first ones: POPE's categories follow one another.
    """
    whole = BENCHMARKS[benchmark].find_questions(options.data_root, options.output_root)
    lines = whole.read_text(encoding="utf-8").splitlines()
    if options.limit is None or options.limit >= len(lines):
        return whole
    drawn = sorted(random.Random(0).sample(range(len(lines)), options.limit))
    path = options.output_root / "questions" / f"{whole.stem}-{options.limit}-of-{len(lines)}.jsonl"
    write_whole(path, "".join(f"{lines[number]}\n" for number in drawn))
    return path


def arguments_of(task: Task, questions: Path, options: argparse.Namespace) -> list[str]:
    """The command line of llava.eval.run for a task."""
    method = ["--keep-tokens", "full"]
    if task.budget is not None:
        method = ["--pruner", task.method, "--keep-tokens", str(task.budget), "--seed", str(task.seed)]
    return [
        *("--benchmark", task.benchmark, "--question-file", str(questions), "--model-path", str(options.model_path)),
        *("--data-root", str(options.data_root), "--output-root", str(options.output_root), "--device", "cpu"),
        *("--batch-size", str(options.batch_size), "--workers", "1", "--score", *method),
    ]


def begin_worker() -> None:
    torch.set_num_threads(1)
    disable_progress_bar()


def answer(arguments: Sequence[str]) -> Measured:
    """Do a run, or find it done; what it prints is dropped, its answers and scores lie in its folder."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        task = run.Run(run.parse_arguments(arguments))
        run.execute(task)
    done = read_run(task.folder)
    items = tuple(value for _, value in sorted(done.score["items"].items()))  # "score" is F1 for POPE
    counts = (done.summary[name] for name in ("visual_tokens", "average_tokens", "prefill_flops"))
    return Measured(100 * statistics.fmean(items), *counts, items)


def answer_all(tasks: Sequence[tuple[Task, list[str]]], workers: int) -> dict[Task, Measured]:
    """All runs, shared out among processes that stay. Raises RuntimeError at the first that fails, and names it."""
    measured = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=begin_worker) as pool:
        tasks_of = {pool.submit(answer, arguments): task for task, arguments in tasks}
        for future in tqdm(as_completed(tasks_of), total=len(tasks), unit="run", smoothing=0.05):
            try:
                measured[tasks_of[future]] = future.result()
            except Exception as error:
                pool.shutdown(cancel_futures=True)
                raise RuntimeError(f"{tasks_of[future]}: {error}") from error
    return measured


# --- timing --------------------------------------------------------------------------------------------------------


def time_methods(arguments: Sequence[str], methods: Sequence[str], budget: int, pictures: int) -> dict[str, dict]:
    """Median milliseconds of "selection" (not inside the decoder) and "prefill" (selection included), one thread.

    Pictures are encoded beforehand. A selection begins with the tower's output, and computes anew whatever else the
    method asks for: the question's embedding, attention to the class token, a smaller picture through the tower.
    """
    begin_worker()
    asked = run.Run(run.parse_arguments(arguments))
    answerer = asked.load("cpu")
    model = answerer.model
    distinct = list({question.image: question for question in asked.questions}.values())[:pictures]
    shown = [answerer.prepare(number, question) for number, question in enumerate(distinct)]
    with torch.inference_mode():
        encoded = EncodedImages.join(
            [model.encode_pictures(item.prompt.pixels[0][None], item.prompt.sizes) for item in shown]
        )

    def select(pruner: Pruner | None, turns: Iterator[int]) -> None:
        number = next(turns)
        picked = encoded.pick([number])
        model.get_vision_tower().forget_texts()  # met in an earlier turn
        plan = model.asked(model.plan(picked, pruner), [shown[number].prompt.query])
        select_tokens(model.vision, plan, picked)

    def prefill(pruner: Pruner | None, turns: Iterator[int]) -> None:
        number = next(turns)
        query = shown[number].prompt.query
        picked = encoded.pick([number])
        model.get_vision_tower().forget_texts()
        model(
            shown[number].prompt.ids[None], images=picked, pruner=pruner, query=query, use_cache=True, logits_to_keep=1
        )

    rows = {}
    for name in (UNPRUNED, *methods):
        pruner = None if name == UNPRUNED else get_pruner(name, keep_tokens=budget)
        steps = {"selection": select, "prefill": prefill}
        if pruner is None or isinstance(pruner, DecoderPruner):
            del steps["selection"]
        for step, call in steps.items():
            turns = cycle(range(len(shown)))
            rows[f"{name} {step}"] = lambda call=call, pruner=pruner, turns=turns: call(pruner, turns)
    with torch.inference_mode():
        seconds = time_rows(rows, len(shown), "cpu")
    times: dict[str, dict] = {}
    for key, values in seconds.items():
        name, step = key.split()
        times.setdefault(name, {})[step] = 1e3 * statistics.median(values)
    return times


# --- all of it -----------------------------------------------------------------------------------------------------


def describe(options: argparse.Namespace, questions: dict[str, Path], timed: dict[str, int]) -> dict:
    """What a reader needs to do it again."""
    return {
        "command": " ".join(["python scripts/toy/compare.py", *options.given]),
        "commit": describe_commit(),
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores, {options.workers} processes of one thread",
        "versions": identity.library_versions(),
        "model": options.model_path.name,
        "questions": {name: len(path.read_text("utf-8").splitlines()) for name, path in questions.items()},
        "timed": timed,
    }


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmarks", nargs="+", choices=JSON_LINES, default=["gqa", "pope", "textvqa"])
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--rules", nargs="*", default=["auto", "auto:0.9"], help="budgets that find themselves")
    parser.add_argument("--methods", nargs="+", choices=list_pruners(), default=list_pruners(), metavar="NAME")
    parser.add_argument("--limit", type=int, help="questions of each benchmark, drawn from all; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="of random (%(default)s)")
    parser.add_argument("--model-path", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--data-root", type=Path, default=TOY_FOLDER / "data" / "eval")
    parser.add_argument("--output-root", type=Path, default=TOY_FOLDER / ".comparison", help="the runs")
    parser.add_argument("--out", type=Path, default=TOY_FOLDER / "COMPARISON.md")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--pictures", type=int, default=24, help="that the times are medians over (%(default)s)")
    options = parser.parse_args(arguments)
    options.given = sys.argv[1:] if arguments is None else arguments
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 2 with one line on standard error if it could not."""
    options = parse_arguments(arguments)
    try:
        questions = {name: draw_questions(name, options) for name in options.benchmarks}
        tasks = list_tasks(options.methods, options.budgets, options.benchmarks, options.seeds, options.rules)
        asked = [(task, arguments_of(task, questions[task.benchmark], options)) for task in tasks]
        measured = answer_all(asked, options.workers)
        cells, found = make_cells(measured), differences(measured)
        budget = 64 if 64 in options.budgets else options.budgets[0]
        times = time_methods(asked[0][1], options.methods, budget, options.pictures)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    configuration = describe(options, questions, {"budget": budget, "pictures": options.pictures})
    figures = {"configuration": configuration, "cells": [asdict(cell) for cell in cells], "milliseconds": times}
    write_text(options.out.with_name("comparison.json"), json.dumps(figures, indent=1) + "\n")
    write_bytes(options.out.with_name("comparison.svg"), plot(cells))
    write_text(options.out, document(configuration, cells, times, found))
    print(options.out.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
