"""The benchmarks, one file each: its questions and files, its score, its printed lines, its upload, its columns.

A file here that defines ``BENCHMARK``, an instance of a subclass of `Benchmark`, adds a benchmark: nothing else has
to be told. ``base.py`` says what a benchmark answers for, ``shared/`` holds what several of them read or write.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from llava.eval.benchmarks.base import OUTPUT_ROOT, Benchmark, HarnessTask, OwnBenchmark, locate, run_tag
from llava.eval.benchmarks.question import Question
from llava.eval.benchmarks.shared.question_lists import LETTER_INSTRUCTION, questions_of_lines, questions_of_table

__all__ = [
    "ALL_BENCHMARKS",
    "BENCHMARKS",
    "COLUMNS",
    "HARNESS_TASKS",
    "OUTPUT_ROOT",
    "SCALES",
    "Benchmark",
    "HarnessTask",
    "OwnBenchmark",
    "Question",
    "load_questions",
    "locate",
    "run_tag",
]


def _find() -> list[Benchmark]:
    """Every file's ``BENCHMARK``, in the order of their columns."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    found = [module.BENCHMARK for module in modules if hasattr(module, "BENCHMARK")]
    return sorted(found, key=lambda benchmark: (benchmark.place, benchmark.name))


ALL_BENCHMARKS = {benchmark.name: benchmark for benchmark in _find()}
BENCHMARKS = {name: one for name, one in ALL_BENCHMARKS.items() if isinstance(one, OwnBenchmark)}
HARNESS_TASKS = {name: one.harness for name, one in ALL_BENCHMARKS.items() if one.harness is not None}
COLUMNS = {column: title for one in ALL_BENCHMARKS.values() for column, title in one.columns.items()}
SCALES = {name: one.scale for name, one in ALL_BENCHMARKS.items() if one.scale != 1.0}


def load_questions(name: str | None, question_file: Path, image_folder: Path | None) -> list[Question]:
    """The questions of a benchmark, or of anyone's own JSON-lines file or table (``name`` None), in their order.

    Raises:
        ValueError: a damaged file, or a line without the fields that it needs; names the line.
    """
    if name is not None:
        return BENCHMARKS[name].read_questions(question_file, image_folder)
    if question_file.suffix == ".tsv":
        return questions_of_table(question_file, LETTER_INSTRUCTION)
    return questions_of_lines(question_file, image_folder)
