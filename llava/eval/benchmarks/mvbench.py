"""MVBench (through lmms-eval): multiple choice in twenty tasks about short videos, the mean over the tasks."""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.benchmarks.base import Benchmark, HarnessSample, HarnessTask
from llava.eval.benchmarks.shared.grouped import grouped, mean
from llava.eval.benchmarks.shared.letters import OPTION_LETTERS, mvbench_letter


def score(rows: Sequence[dict]) -> dict:
    """Mean in percent over tasks; items with an empty answer are left out of their task's denominator.

    Releases 0.5 and 0.7 of lmms-eval agree.

    Args:
        rows: ``prediction``, ``sub_task``, and ``gt_answer`` (a letter), or ``candidates`` and ``answer``.
    """
    targets = [row.get("gt_answer") or OPTION_LETTERS[row["candidates"].index(row["answer"])] for row in rows]
    scores = [float(mvbench_letter(row["prediction"]) == target) for row, target in zip(rows, targets, strict=True)]
    answered = [number for number, row in enumerate(rows) if row["prediction"].strip()]
    tasks = grouped([rows[i] for i in answered], [scores[i] for i in answered], "sub_task")
    per_task = {name: 100.0 * value for name, value in tasks.items()}
    return {
        "metric": "mean over tasks",
        "score": mean(per_task.values()),
        "per_task": per_task,
        "targets": targets,
        "items": scores,
    }


def harness_score(samples: Sequence[HarnessSample], release: str) -> float:
    rows = [{**one.record, "prediction": one.answer, "sub_task": one.fields["task"]} for one in samples]
    return score(rows)["score"]


class MVBench(Benchmark):
    name, columns, place = "mvbench", {"mvbench": "MVBench"}, 12
    harness = HarnessTask("mvbench", ("mvbench_accuracy",), 1.0, rescore=harness_score, members="mvbench_")


BENCHMARK = MVBench()
