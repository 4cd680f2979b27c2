"""HallusionBench (through lmms-eval): yes or no about figures, with the metrics that ask no judge."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from llava.eval.benchmarks.base import Benchmark, HarnessSample, HarnessTask
from llava.eval.benchmarks.shared.grouped import mean

JUDGE_FREE = "hallusion_bench_image_judge_free"  # the task file is ours: lmms_eval/judge_free.py


def score(rows: Sequence[dict], judgements: Sequence[int] | None = None) -> dict:
    """aAcc ("score"), qAcc and fAcc, 0..1.

    Args:
        rows: ``model_prediction``, ``gt_answer`` ("0" or "1"), ``category``, ``subcategory``, ``set_id``,
            ``question_id``, ``figure_id``.
        judgements: 0 wrong, 1 right, 2 unclear for each row. Unclear counts as right where a question of kind VS is
            asked without figure, and those questions are left out of fAcc. Without it an answer that contains "yes" is
            yes, any other no.
    """
    if judgements is None:
        right = [row["gt_answer"] == str(int("yes" in row["model_prediction"].lower())) for row in rows]
        in_figures = list(range(len(rows)))
    else:
        without_figure = [row["category"] == "VS" and str(row["figure_id"]) == "0" for row in rows]
        right = [
            judged == 1 or (judged == 2 and bare) for judged, bare in zip(judgements, without_figure, strict=True)
        ]
        in_figures = [number for number, bare in enumerate(without_figure) if not bare]
    keys = ("category", "subcategory", "set_id")
    return {
        "metric": "aAcc",
        "score": mean(right),
        "qAcc": _all_right(rows, right, range(len(rows)), (*keys, "question_id")),
        "fAcc": _all_right(rows, right, in_figures, (*keys, "figure_id")),
        "items": [float(value) for value in right],
    }


def _all_right(rows: Sequence[dict], right: Sequence[bool], members: Sequence[int], keys: Sequence[str]) -> float:
    """Share of groups (rows equal in ``keys``) with every member right."""
    groups = defaultdict(list)
    for number in members:
        groups[tuple(rows[number][key] for key in keys)].append(right[number])
    return mean(float(all(group)) for group in groups.values())


def harness_score(samples: Sequence[HarnessSample], release: str) -> float:
    found = score([{**sample.record, "model_prediction": sample.answer} for sample in samples])
    return fmean([found["score"], found["qAcc"], found["fAcc"]])


class HallusionBench(Benchmark):
    name, columns, place = "hallusionbench", {"hallusionbench": "HallusionBench"}, 18
    harness = HarnessTask(JUDGE_FREE, ("aAcc", "qAcc", "fAcc"), rescore=harness_score)


BENCHMARK = HallusionBench()
