"""OCRBench (through lmms-eval): a point for every answer that holds the text asked for."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence

from llava.eval.benchmarks.base import Benchmark, HarnessSample, HarnessTask

POINTS = 1000  # by which the harness divides, however many items there are
FORMULAS = "HME100k"
FORMULA_QUESTIONS = "Handwritten Mathematical Expression Recognition"  # that data set's one type of question


def score(rows: Sequence[dict], release: str = "0.7") -> dict:
    """Points: a target occurs in the answer; formulas (``HME100k``) keep case and lose all spaces.

    Args:
        rows: ``prediction``, ``answer`` (a text or several), ``dataset``, ``question_type``.
        release: of lmms-eval; "0.5" (all before 0.7) folds no full-width characters, and lower-cases the answer to a
            formula but not its target.
    """
    fold = str if release == "0.5" else _half_width
    scores = []
    for row in rows:
        targets = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        formula, answer = row["dataset"] == FORMULAS, fold(row["prediction"])
        form = _without_spaces if formula else _one_line
        answer = form(answer.lower() if formula and release == "0.5" else answer)
        scores.append(int(any(form(fold(target)) in answer for target in targets)))
    points = defaultdict(int)
    for row, value in zip(rows, scores, strict=True):
        points[row["question_type"]] += value
    return {
        "metric": "points",
        "score": sum(scores),
        "harness_final": sum(scores) / POINTS,
        "per_question_type": dict(points),
        "items": [float(value) for value in scores],
    }


def _without_spaces(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _one_line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _half_width(text: str) -> str:
    """Full-width ASCII and the wide space to their ordinary forms; other compatibility characters are kept."""
    return "".join(unicodedata.normalize("NFKC", c) if "！" <= c <= "～" or c == "\u3000" else c for c in text)


def harness_score(samples: Sequence[HarnessSample], release: str) -> float:
    rows = [
        {
            "prediction": sample.answer,
            "answer": sample.record["ground_truth"],
            "question_type": sample.record["question_type"],
            "dataset": FORMULAS if sample.record["question_type"] == FORMULA_QUESTIONS else "",
        }
        for sample in samples
    ]
    return score(rows, release)["harness_final"]


class OCRBench(Benchmark):
    name, columns, place, scale = "ocrbench", {"ocrbench": "OCRBench"}, 17, 10.0  # 1000 points
    harness = HarnessTask("ocrbench", ("ocrbench_accuracy",), 1000.0, rescore=harness_score)


BENCHMARK = OCRBench()
