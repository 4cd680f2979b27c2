"""The runs that a table or a figure of the paper is made of: planned and checked first, then asked, resumed, read.

Answers lie where those of ``python -m llava.eval.run`` lie, and are the same ones: what was asked before is not asked
again, and a table that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import BENCHMARKS, OUTPUT_ROOT
from llava.eval.runner import run
from llava.eval.tables.resampling import Resampled
from llava.eval.tables.runs import UNPRUNED, StudyRun, read_run
from llava.pruning import get_pruner, parse_options
from llava.serve import flags


@dataclass(frozen=True)
class Spec:
    """A row: a method with its options, at a budget.

    Args:
        label: in the table.
        pruner: name of the method; `UNPRUNED` keeps all.
        options: "key=value" each.
        seed: of a random method.
    """

    label: str
    pruner: str = UNPRUNED
    options: tuple[str, ...] = ()
    seed: int = 0

    @property
    def is_random(self) -> bool:
        """Whether another seed is another run. Script draws only where all three of its parts are off."""
        if self.pruner == UNPRUNED:
            return False
        method = get_pruner(self.pruner, **parse_options(self.pruner, self.options))
        parts = [getattr(method, name, None) for name in ("gsp", "dpp")]
        orders_itself = any(parts) or getattr(method, "relevance", "none") != "none"
        return hasattr(method, "seed") and (self.pruner == "random" or not orders_itself)


def parse_spec(text: str) -> Spec:
    """Read "unpruned", "divprune" or "script:dpp=false,tau=0.6". Raises ValueError for what there is not."""
    name, _, options = text.partition(":")
    given = tuple(options.split(",")) if options else ()
    if name == UNPRUNED:
        if given:
            raise ValueError(f"{UNPRUNED} has no options, got {options}")
        return Spec(text)
    get_pruner(name, **parse_options(name, given))
    return Spec(text, name, given)


def add_options(parser: argparse.ArgumentParser, keep: str) -> None:
    """What a study asks with; the same options as those of ``python -m llava.eval.run``."""
    flags.add_checkpoint(parser)
    flags.add_base(parser)
    flags.add_template(parser)
    parser.add_argument("--data-root", type=Path, default=OUTPUT_ROOT, help="images and annotations (%(default)s)")
    parser.add_argument("--output-root", type=Path, default=OUTPUT_ROOT, help="answers and scores (%(default)s)")
    parser.add_argument("--limit", type=flags.at_least_one, metavar="K", help="only the first K questions of each")
    parser.add_argument("--keep-tokens", default=keep, metavar="N", help="budget per view (%(default)s)")
    parser.add_argument("--pruner-args", nargs="+", default=[], metavar="KEY=VALUE", help="options of every method")
    flags.add_image_grid(parser)
    flags.add_device(parser)
    flags.add_dtype(parser)
    flags.add_attention(parser)
    parser.add_argument("--batch-size", type=flags.at_least_one, default=1, help="questions at once (%(default)s)")
    parser.add_argument("--processes", type=flags.at_least_one, help="default: one per visible GPU, or 1")


class Study:
    """Runs of methods on benchmarks.

    Args:
        options: see `add_options`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.planned: dict[tuple[str, Spec], tuple[list[str], Path]] = {}

    def arguments(self, benchmark: str, spec: Spec) -> list[str]:
        """Of ``python -m llava.eval.run``."""
        given = self.options
        words: list[Any] = ["--benchmark", benchmark, "--model-path", given.model_path, "--score", "--seed", spec.seed]
        words += ["--data-root", given.data_root, "--output-root", given.output_root, "--batch-size", given.batch_size]
        words += ["--device", given.device, "--dtype", given.dtype]
        for name in ("model_base", "conv_mode", "limit", "image_grid", "attn_implementation", "processes"):
            value = getattr(given, name)
            words += [] if value is None else [f"--{name.replace('_', '-')}", value]
        if spec.pruner == UNPRUNED:
            words += ["--keep-tokens", flags.FULL]
        else:
            words += ["--pruner", spec.pruner, "--keep-tokens", given.keep_tokens]
            options = (*spec.options, *given.pruner_args)
            words += ["--pruner-args", *options] if options else []
        return list(map(str, words))

    def plan(self, benchmarks: Sequence[str], specs: Sequence[Spec]) -> None:
        """Check all runs before the first begins.

        Raises:
            ValueError, OSError: something that a run needs is missing or does not fit; names it.
        """
        for benchmark in benchmarks:
            if benchmark not in BENCHMARKS:
                raise ValueError(f"there is no benchmark {benchmark!r}; there are {', '.join(BENCHMARKS)}")
            for spec in specs:
                arguments = self.arguments(benchmark, spec)
                planned = run.Run(run.parse_arguments(arguments))
                self.planned[benchmark, spec] = arguments, planned.folder

    def ask(self, benchmark: str, spec: Spec) -> StudyRun:
        """A planned run, answered and scored. Raises RuntimeError if it failed; its own message was printed."""
        arguments, folder = self.planned[benchmark, spec]
        print(f"{benchmark}, {spec.label}: {folder}", file=sys.stderr)
        with contextlib.redirect_stdout(sys.stderr):
            code = run.main(arguments)
        if code:
            raise RuntimeError(f"the run of {spec.label} on {benchmark} ended with {code}; the same command goes on")
        return read_run(folder)

    def ask_all(self) -> dict[tuple[str, Spec], StudyRun]:
        """All planned runs, benchmark by benchmark."""
        return {key: self.ask(*key) for key in self.planned}


def interval_of(found: StudyRun) -> tuple[float, float] | None:
    """The 95 % interval of a run's score over its items; ``None`` where only a server scores."""
    if found.score is None:
        return None
    return Resampled(found.settings["benchmark"], found.score).interval()
