"""lmms-eval's result files, read for our tables: scores in the tables' units, budget, method and measured tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from llava.eval.files import read_json
from llava.eval.harness_tasks import JUDGE_FREE

RESULTS = "_results.json"
LOCAL = "_local"  # ends the name of an official task on data of one's own: EVAL.md
# LongVideoBench's question categories: level 1 asks what is seen, level 2 how it hangs together.
PERCEPTION = ("S2E", "S2O", "S2A", "E2O", "O2E", "T2E", "T2O", "T2A")
RELATION = ("E3E", "O3O", "SSS", "SOS", "SAA", "T3E", "T3O", "TOS", "TAA")


@dataclass(frozen=True)
class HarnessTask:
    """A task and its numbers for a table.

    Args:
        task: its name in the harness.
        metrics: whose mean is the score.
        factor: from the harness's unit to the table's.
        parts: further columns, from the logged samples: name -> (whether a sample's record belongs to it).
    """

    task: str
    metrics: tuple[str, ...]
    factor: float = 100.0
    parts: tuple[tuple[str, Callable[[dict[str, Any]], bool]], ...] = ()


def _duration(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda record: record["duration"] == name


TASKS = {
    "mlvu": HarnessTask("mlvu_dev", ("mlvu_percetion_score",), 1.0),  # the harness spells it so
    "mvbench": HarnessTask("mvbench", ("mvbench_accuracy",), 1.0),
    "longvideobench": HarnessTask(
        "longvideobench_val_v",
        ("lvb_acc",),
        parts=(
            ("longvideobench_perception", lambda record: record["question_category"] in PERCEPTION),
            ("longvideobench_relation", lambda record: record["question_category"] in RELATION),
        ),
    ),
    "videomme": HarnessTask(
        "videomme",
        ("videomme_perception_score",),
        1.0,
        parts=tuple((f"videomme_{name}", _duration(name)) for name in ("short", "medium", "long")),
    ),
    "ai2d": HarnessTask("ai2d", ("exact_match",)),
    "chartqa": HarnessTask("chartqa", ("relaxed_overall",)),
    "ocrbench": HarnessTask("ocrbench", ("ocrbench_accuracy",), 1000.0),
    "hallusionbench": HarnessTask(JUDGE_FREE, ("aAcc", "qAcc", "fAcc")),
    "pope": HarnessTask("pope", ("pope_f1_score",)),
    "mme": HarnessTask("mme", ("mme_perception_score",), 1.0),
    "gqa": HarnessTask("gqa", ("exact_match",)),
    "textvqa": HarnessTask("textvqa_val", ("exact_match",)),
}


@dataclass
class HarnessScore:
    """A task's scores from one result file, and the scores of its items by document where they were logged."""

    benchmark: str
    tasks: tuple[str, ...]
    scores: dict[str, float]
    items: dict[str, float]
    questions: int


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
    for benchmark, task in TASKS.items():
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
    return task.task == "mvbench" and name.startswith("mvbench_")


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
    return HarnessScore(benchmark, tuple(own), scores, items, questions)


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
