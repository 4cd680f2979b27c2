"""What a benchmark answers for, and where its files are.

Question lists and everything written live under ``playground/data/eval`` (the output root); images and annotations may
live elsewhere (the data root), laid out in the same way. EVAL.md describes every file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from llava.eval.benchmarks.question import Question
from llava.eval.benchmarks.shared.ids import id_key
from llava.eval.benchmarks.shared.question_lists import questions_of_lines
from llava.eval.files import MissingFile, read_lines, read_whole_lines, require
from llava.pruning.auto_budget import parse_auto

OUTPUT_ROOT = Path("playground/data/eval")
TILES = 5  # views of a LLaVA-1.6 image in the layout that run tags count by: an overview and four tiles


@dataclass(frozen=True)
class HarnessTask:
    """A benchmark's task in lmms-eval, its numbers for a table, and how they are computed from logged answers.

    Args:
        task: its name there.
        metrics: whose mean is the score.
        factor: from the harness's unit to the table's.
        parts: further columns, from the logged samples: name -> whether a sample's record belongs to it.
        rescore: logged samples (`HarnessSample`) and the harness's release -> the score in the harness's unit, by our
            own scorer; ``None`` where the samples do not hold what it takes.
        members: the beginning of the names of a group's tasks; "" if it is no group.
    """

    task: str
    metrics: tuple[str, ...]
    factor: float = 100.0
    parts: tuple[tuple[str, Callable[[dict[str, Any]], bool]], ...] = ()
    rescore: Callable[[Sequence[HarnessSample], str], float] | None = None
    members: str = ""


@dataclass(frozen=True)
class HarnessSample:
    """A logged sample: the answer as the harness got it, the right one as it logged it, the task's own record."""

    answer: str
    target: str
    record: Any
    fields: Mapping[str, Any]


class Benchmark(ABC):
    """What every benchmark has: a name, columns in our tables, and perhaps a task in lmms-eval.

    Class attributes:
        name: on the command line, and of its main column.
        columns: name -> title, its main column first.
        place: of its columns among those of others.
        scale: what its score is divided by in averages, to bring it to 0..100.
        harness: its task in lmms-eval, if it has one.
    """

    name: ClassVar[str]
    columns: ClassVar[dict[str, str]]
    place: ClassVar[int]
    scale: ClassVar[float] = 1.0
    harness: ClassVar[HarnessTask | None] = None


class OwnBenchmark(Benchmark):
    """A benchmark that our own runner asks.

    Class attributes:
        section: its heading in EVAL.md.
        folder: under the roots.
        question_file, image_folder: under ``folder``.
        max_new_tokens: limit of an answer.
        chunked: whether answers are ``<tag>/<chunks>_<i>.jsonl`` and ``<tag>/merge.jsonl``, or ``<tag>.jsonl``.
        annotations: files under ``folder`` that scoring cannot do without.
    """

    section: ClassVar[str]
    folder: ClassVar[str]
    question_file: ClassVar[str]
    image_folder: ClassVar[str] = ""
    max_new_tokens: ClassVar[int] = 128
    chunked: ClassVar[bool] = False
    annotations: ClassVar[tuple[str, ...]] = ()

    def read_questions(self, file: Path, images: Path | None) -> list[Question]:
        """The questions of a list, in their order; JSON lines unless a benchmark says otherwise.

        Raises:
            ValueError: a damaged file, or a line without the fields that it needs; names the line.
        """
        return questions_of_lines(file, images)

    @abstractmethod
    def score(self, run: Scoring) -> dict | None:
        """Score a run, print its numbers and write its upload file.

        Returns:
            "score", the number that tables print (percent, or points for MME and MM-Vet), "metric", its name, "items",
            the contribution of every question by id, and breakdowns; ``None`` where only a server can score.
        """

    def needed_annotations(self, question_file: Path) -> tuple[str, ...]:
        """What scoring the questions of this list cannot do without."""
        return self.annotations

    def find_questions(self, data_root: Path, output_root: Path) -> Path:
        """The question list: of the data root if it has one (the toy has), else under the output root."""
        wanted = f"{self.folder}/{self.question_file}"
        if (Path(data_root) / wanted).is_file():
            return Path(data_root) / wanted
        return locate([output_root], wanted, self.section)

    def answers_file(self, root: Path, question_file: Path, checkpoint: str, tag: str) -> Path:
        """Where the (merged) answers of a run lie."""
        place = root / self.folder / "answers" / question_file.stem / checkpoint
        return place / tag / "merge.jsonl" if self.chunked else place / f"{tag}.jsonl"


@dataclass
class Scoring:
    """What a scorer may read: the answers of a run, its benchmark, and where files are.

    Args:
        skipped: ids of questions that were left out because of their pictures.
        limit: how many questions were asked, if not all.
        compat: reproduce the published scorers where they are fragile.
        judge: MM-Vet's grader, if one was asked for.
    """

    benchmark: OwnBenchmark
    answers_file: Path
    roots: list[Path]
    question_file: Path
    skipped: set
    limit: int | None = None
    compat: bool = False
    judge: Callable[[str, str, str], float] | None = None

    def file(self, relative: str) -> Path:
        """A file of the benchmark under one of the roots. Raises MissingFile."""
        return locate(self.roots, f"{self.benchmark.folder}/{relative}", self.benchmark.section)

    def optional(self, relative: str) -> Path | None:
        try:
            return self.file(relative)
        except MissingFile:
            return None

    @cached_property
    def asked(self) -> list[Question]:
        """The questions that were to be answered."""
        questions = self.benchmark.read_questions(self.question_file, Path("/"))[: self.limit]
        lost = {id_key(name) for name in self.skipped}
        return [question for question in questions if id_key(question.question_id) not in lost]

    def answers(self) -> list[dict]:
        return with_fields(read_whole_lines(self.answers_file), self.answers_file)

    def answers_for_upload(self, all_questions: int) -> list[dict]:
        """Answers, without the broken lines; prints counts as the published converters do."""
        answers, broken = read_lines(self.answers_file)
        results = len({answer["question_id"] for answer in with_fields(answers, self.answers_file)})
        print(f"total results: {results}, total split: {all_questions}, error_line: {broken}")
        return answers

    def questions(self) -> list[dict]:
        """The lines of the question list that were asked."""
        lost = {id_key(name) for name in self.skipped}
        lines = read_whole_lines(self.question_file)[: self.limit]
        return [line for line in lines if id_key(line["question_id"]) not in lost]

    def unanswered(self) -> list[int | str]:
        """Ids of questions that were asked and have no answer. An id that repeats in the list wants as many answers.

        Raises:
            ValueError: there are no questions, no answers, or only answers to other questions.
        """
        if not self.asked:
            raise ValueError(f"{self.question_file} has no questions to score")
        answers, _ = read_lines(self.answers_file)
        found = Counter(id_key(answer["question_id"]) for answer in with_fields(answers, self.answers_file))
        if not found:
            raise ValueError(f"{self.answers_file} holds no answers")
        lost = []
        for question in self.asked:
            if found[id_key(question.question_id)] > 0:
                found[id_key(question.question_id)] -= 1
            else:
                lost.append(question.question_id)
        if len(lost) == len(self.asked):
            example = next(iter(found))
            raise ValueError(
                f"no answer of {self.answers_file} (ids such as {example!r}) is to a question of {self.question_file} "
                f"(ids such as {str(lost[0])!r}): --question-file names another list"
            )
        return lost

    def skip(self, names: Sequence[int | str]) -> None:
        """Leave these questions out as well."""
        self.skipped = {*self.skipped, *names}
        self.__dict__.pop("asked", None)

    def beside(self, folder: str, suffix: str) -> Path:
        """The place of a derived file: the answers' path with another folder for ``answers``."""
        path = self.answers_file
        name = path.parent if path.name == "merge.jsonl" else path.with_suffix("")
        parts = list(name.parts)
        if "answers" in parts:
            parts[len(parts) - 1 - parts[::-1].index("answers")] = folder
        return Path(*parts[:-1], parts[-1] + suffix)


def with_fields(answers: list[dict], file: Path) -> list[dict]:
    """``answers`` if all have an id and a text. Raises ValueError naming the first line that lacks one."""
    for number, answer in enumerate(answers, start=1):
        lacking = [name for name in ("question_id", "text") if name not in answer]
        if lacking:
            raise ValueError(f"{file}, answer {number}, lacks {' and '.join(lacking)} of an answer's fields")
        if not isinstance(answer["text"], str) or not isinstance(answer["question_id"], int | str):
            raise ValueError(f"{file}, answer {number}: question_id is a number or a text, and text is a text")
    return answers


def locate(roots: Sequence[Path], relative: str, section: str, kind: str = "file") -> Path:
    """The first of ``roots`` that has ``relative``. Raises MissingFile naming the place under the first root."""
    for root in roots:
        try:
            return require(Path(root) / relative, section, kind)
        except MissingFile:
            continue
    return require(Path(roots[0]) / relative, section, kind)


def print_parts(parts: Mapping[str, float]) -> None:
    """A breakdown in percent, a line each."""
    for name, value in parts.items():
        print(f"  {name}: {value:.2f}%")


def percent(values: Sequence[float]) -> float:
    """The mean in percent; 0 of nothing."""
    values = list(values)
    return 100.0 * sum(values) / len(values) if values else 0.0


def run_tag(
    keep_tokens: int | float | str | None,
    tiled: bool,
    pruner: str = "script",
    options: Sequence[str] = (),
    seed: int = 0,
    grid: Sequence[int] | None = None,
) -> str:
    """Name of a run: ``vtn_<tokens per picture>``, or ``vtn_auto95`` where they are found for each picture.

    A fixed grid of pictures (width, height), and methods, options and seeds other than the default are added.
    """
    if keep_tokens is None:
        name = "full"
    else:
        if isinstance(keep_tokens, str):
            keep_tokens = parse_auto(keep_tokens).tag
        name = f"vtn_{keep_tokens * TILES if tiled and isinstance(keep_tokens, int) else keep_tokens}"
        if pruner != "script" or options:
            name = "-".join([name, pruner, *(option.replace("/", "_") for option in options)])
    if grid is not None:
        name += "-grid{}x{}".format(*grid)
    return f"{name}-seed{seed}" if seed else name
