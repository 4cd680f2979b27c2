"""Cells of right and wrong answers on the toy: rows at budgets, asked about worlds by processes that stay.

Every cell is stored as soon as it is measured, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from files import write_text
from tqdm import tqdm
from world import accuracy, build_world, describe_commit

from llava.eval.runner.identity import code_of
from llava.model.builder import load_pretrained_model
from llava.pruning import Pruner, get_pruner, list_pruners, pruner_class

SMALL = 16  # budgets up to this one are asked about all scenes
WORLDS = ("crowded", "ordinary")


@dataclass(frozen=True)
class Row:
    """A method at a budget of m tokens; ``pruner`` None is the whole picture, "blind" none at all."""

    label: str
    pruner: Callable[[int], Pruner] | None
    blind: bool = False

    @property
    def has_budget(self) -> bool:
        return self.pruner is not None


def method(name: str, **options) -> Callable[[int], Pruner]:
    return lambda m: get_pruner(name, keep_tokens=m, **options)


RowMaker = Callable[[int, argparse.Namespace], "list[Row]"]  # of the model's sign of relevance and the options


@dataclass(frozen=True)
class Job:
    """A cell: a row at a budget (None where it has none) about one of the worlds."""

    world: str
    label: str
    budget: int | None

    @property
    def key(self) -> str:
        return f"{self.world}|{self.label}|{self.budget}"


def list_jobs(rows: list[Row], budgets: list[int], worlds: list[str]) -> list[Job]:
    """Small budgets first: they are the most asked for and the most alike in cost."""
    kinds = [(row.label, m) for m in sorted(budgets) for row in rows if row.has_budget]
    kinds += [(row.label, None) for row in rows if not row.has_budget]
    return [Job(world, *kind) for world in worlds for kind in kinds]


class Bench:
    """A worker's model, worlds and rows.

    Args:
        options: model_path, worlds, scenes, crowded_scenes, few_scenes, per_skill and batch, and what ``make_rows``
            reads.
    """

    def __init__(self, options: argparse.Namespace, make_rows: RowMaker) -> None:
        torch.set_num_threads(1)
        self.options = options
        self.tokenizer, self.model, self.processor, _ = load_pretrained_model(options.model_path, device="cpu")
        counts = {"ordinary": options.scenes, "crowded": options.crowded_scenes}
        self.worlds = {
            name: build_world(self.model, self.processor, counts[name], options.per_skill, crowded=name == "crowded")
            for name in options.worlds
        }
        self.rows = {row.label: row for row in make_rows(self.model.relevance_sign, options)}

    def measure(self, job: Job) -> str:
        """ "1" where a question was answered right, "0" where not; in the order of the world's questions."""
        row, world, few = self.rows[job.label], self.worlds[job.world], self.options.few_scenes
        if job.budget is not None and job.budget > SMALL:
            world = world.first(few)
        pruner = None if job.budget is None else row.pruner(job.budget)
        batch = 2 * self.options.batch if job.budget is not None and job.budget <= 64 else self.options.batch
        right = accuracy(self.model, self.tokenizer, world, pruner, batch, row.blind)
        return "".join("01"[ok] for ok in right)


_bench: Bench | None = None


def begin_worker(options: argparse.Namespace, make_rows: RowMaker) -> None:
    global _bench
    _bench = Bench(options, make_rows)


def measure_in_worker(job: Job) -> str:
    return _bench.measure(job)


def measured(bench: Bench, make_rows: RowMaker, jobs: list[Job]) -> Iterator[tuple[Job, str]]:
    """Jobs with their cells as they are done, by other processes where ``workers`` are more than one."""
    options = bench.options
    if options.workers == 1 or not jobs:
        yield from ((job, bench.measure(job)) for job in jobs)
        return
    with ProcessPoolExecutor(options.workers, get_context("spawn"), begin_worker, (options, make_rows)) as pool:
        jobs_of = {pool.submit(measure_in_worker, job): job for job in jobs}
        for future in as_completed(jobs_of):
            yield jobs_of[future], future.result()


def measure_all(
    bench: Bench, make_rows: RowMaker, jobs: list[Job], configuration: dict, store: Path
) -> dict[str, str]:
    """The cells of ``jobs`` by key, those in ``store`` not again if measured under the same configuration."""
    stored = json.loads(store.read_text()) if store.is_file() else {}
    cells = stored.get("cells", {}) if stored.get("configuration") == configuration else {}
    missing = [job for job in jobs if job.key not in cells]
    for job, cell in tqdm(measured(bench, make_rows, missing), "cells", len(missing), mininterval=5):
        cells[job.key] = cell
        write_text(store, json.dumps({"configuration": configuration, "cells": cells}, indent=1))
    return {job.key: cells[job.key] for job in jobs}


def configure(bench: Bench, command: str) -> dict:
    """What the answers depend on."""
    options = bench.options
    return {
        "command": command,
        "model": Path(options.model_path).name,
        "asked": {name: [len(world.asked), world.asked[-1].scene + 1] for name, world in bench.worlds.items()},
        "few_scenes": options.few_scenes,
        "code": {name: code_of(pruner_class(name)) for name in list_pruners()},
        "weights": str(round(sum(float(p.detach().double().abs().sum()) for p in bench.model.parameters()), 3)),
    }


def describe_run(options: argparse.Namespace) -> dict[str, str]:
    """Commit and machine."""
    machine = (
        f"torch {torch.__version__}, {options.workers} processes of one thread, {os.cpu_count()} cores, "
        f"{platform.machine()} CPU"
    )
    return {"commit": describe_commit(), "machine": machine}


def add_options(parser: argparse.ArgumentParser, scenes: int, crowded: int, few: int, budgets: Sequence[int]) -> None:
    """What a `Bench` reads, with these defaults."""
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--scenes", type=int, default=scenes, help="ordinary ones (%(default)s)")
    parser.add_argument("--crowded-scenes", type=int, default=crowded, help="(%(default)s)")
    parser.add_argument("--few-scenes", type=int, default=few, help=f"at budgets above {SMALL} (%(default)s)")
    parser.add_argument("--per-skill", type=int, default=3, help="questions of each skill about a scene")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(budgets))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread (%(default)s)")
