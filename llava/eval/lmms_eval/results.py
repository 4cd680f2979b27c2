"""lmms-eval's result files, read for our tables: scores in the tables' units, budget, method and measured tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from llava.eval.benchmarks import HARNESS_TASKS, HarnessTask
from llava.eval.benchmarks.base import HarnessSample
from llava.eval.files import read_json

RESULTS = "_results.json"
LOCAL = "_local"  # ends the name of an official task on data of one's own: EVAL.md
OLDER, PRESENT = "0.5", "0.7"  # the releases whose scorers ours follow
TOLERANCE = 0.01  # between the harness's score and ours of the same answers, in the table's unit: it rounds some


@dataclass
class HarnessScore:
    """A task's scores from one result file, and the scores of its items by document where they were logged.

    Args:
        own: the score that our own scorer gives to the same answers; ``None`` where the samples do not hold what it
            takes, for the reason in ``unchecked``.
    """

    benchmark: str
    tasks: tuple[str, ...]
    scores: dict[str, float]
    items: dict[str, float]
    questions: int
    own: float | None = None
    unchecked: str = ""


def newest_results(folder: Path) -> Path | None:
    """The latest result file below a folder; ``None`` if there is none."""
    files = sorted(folder.rglob(f"*{RESULTS}"), key=lambda path: path.name)
    return files[-1] if files else None


def read_scores(path: Path) -> list[HarnessScore]:
    """The scores of all tasks of a result file that have a column.

    Raises:
        ValueError: it is no result file of the harness.
    """
    results = read_json(path)
    if not isinstance(results, dict) or "results" not in results or "config" not in results:
        raise ValueError(f"{path} is no result file of lmms-eval")
    found = []
    for benchmark, task in HARNESS_TASKS.items():
        own = own_results(task, results["results"])
        if own:
            found.append(_score(benchmark, task, own, path, results))
    return found


def own_results(task: HarnessTask, results: dict[str, dict]) -> dict[str, dict]:
    """Entries of a task, or of a group's members, that have its first metric."""
    names = {task.task, task.task + LOCAL}
    own = {name: entry for name, entry in results.items() if name in names or _is_member(name, task)}
    return {name: entry for name, entry in own.items() if metric(entry, task.metrics[0]) is not None}


def _is_member(name: str, task: HarnessTask) -> bool:
    return bool(task.members) and name.startswith(task.members)


def metric(entry: dict[str, Any], name: str) -> float | None:
    """A metric's value, whatever filter its answers went through."""
    for key, value in entry.items():
        if key.split(",")[0] == name and isinstance(value, int | float):
            return float(value)
    return None


def _score(
    benchmark: str, task: HarnessTask, own: dict[str, dict], path: Path, results: dict[str, Any]
) -> HarnessScore:
    values = [fmean(metric(entry, name) for name in task.metrics) for entry in own.values()]
    scores = {benchmark: task.factor * fmean(values)}
    items: dict[str, float] = {}
    for name in own:
        for sample in read_samples(path, name):
            record = next((sample[key] for key in task.metrics if key in sample), None)
            item = item_score(record)
            if item is not None:
                items[f"{name}/{sample['doc_id']}"] = item
    if task.parts:
        samples = [sample for name in own for sample in read_samples(path, name)]
        records = [sample[task.metrics[0]] for sample in samples if task.metrics[0] in sample]
        for column, belongs in task.parts:
            part = [item_score(record) for record in records if belongs(record)]
            if part:
                scores[column] = 100.0 * fmean(part)
    counts = results.get("n-samples", {})
    questions = sum(counts.get(name, {}).get("effective", 0) for name in own)
    rescored, unchecked = _rescored(task, own, path, str(results.get("lmms_eval_version", "")))
    return HarnessScore(benchmark, tuple(own), scores, items, questions, rescored, unchecked)


def _rescored(task: HarnessTask, own: Sequence[str], path: Path, version: str) -> tuple[float | None, str]:
    """The score of the logged answers by our own scorer, in the table's unit; or why there is none."""
    if task.rescore is None:
        return None, "the harness's samples do not hold the right answers"
    samples = []
    for name in own:
        for sample in read_samples(path, name):
            record = next((sample[key] for key in task.metrics if key in sample), None)
            if record is not None:
                samples.append((sample, record, name))
    if not samples:
        return None, "no samples were logged"
    release = OLDER if version.startswith(("0.1", "0.2", "0.3", "0.4", "0.5", "0.6")) else PRESENT
    try:
        return task.factor * task.rescore([_sample_of(*one) for one in samples], release), ""
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        return None, f"its samples are of another form ({type(error).__name__}: {error})"


def _sample_of(sample: dict[str, Any], record: Any, task: str) -> HarnessSample:
    """A logged sample; its answer is the raw one where a filter has changed it."""
    answer = sample.get("resps", sample.get("filtered_resps"))
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(answer, str):
        raise ValueError(f"document {sample.get('doc_id')} has no single answer")
    return HarnessSample(answer, str(sample.get("target", "")), record, {**sample, "task": task})


def item_score(record: Any) -> float | None:
    """Right or wrong of one logged record; ``None`` where it does not say so by itself."""
    if isinstance(record, int | float):
        return float(record)
    if not isinstance(record, dict):
        return None
    if isinstance(record.get("score"), int | float):
        return float(record["score"])
    answer = record.get("pred_answer", record.get("parsed_pred"))
    return None if answer is None or "answer" not in record else float(answer == record["answer"])


def read_samples(path: Path, task: str) -> list[dict[str, Any]]:
    """The logged samples of a task beside a result file; none if they were not logged."""
    samples = path.with_name(path.name.replace(RESULTS, f"_samples_{task}.jsonl"))
    if not samples.is_file():
        return []
    return [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines() if line]


def harness_arguments(results: dict[str, Any]) -> dict[str, str]:
    """The model arguments of a result file: pretrained, pruner, keep_tokens, ..."""
    pairs: Sequence[str] = str(results["config"].get("model_args") or "").split(",")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
