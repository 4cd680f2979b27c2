"""ChartQA (through lmms-eval): questions about charts, numbers within 5 %."""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.benchmarks.base import Benchmark, HarnessSample, HarnessTask
from llava.eval.benchmarks.shared.grouped import grouped, mean

TOLERANCE = 0.05


def match(prediction: str, target: str) -> bool:
    """Numbers within 5 % of a target that is not zero; anything else by equality ignoring case."""
    predicted, wanted = _number(prediction), _number(target)
    if predicted is not None and wanted:
        return abs(predicted - wanted) / abs(wanted) <= TOLERANCE
    return prediction.lower() == target.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def score(rows: Sequence[dict]) -> dict:
    """Relaxed accuracy 0..1, overall and per kind of question.

    Args:
        rows: ``prediction``, ``answer``, ``type``.
    """
    scores = [float(match(row["prediction"].strip(), row["answer"])) for row in rows]
    return {
        "metric": "relaxed accuracy",
        "score": mean(scores),
        "per_type": grouped(rows, scores, "type"),
        "items": scores,
    }


def harness_score(samples: Sequence[HarnessSample], release: str) -> float:
    return mean(float(match(sample.answer.strip(), sample.target)) for sample in samples)


class ChartQA(Benchmark):
    name, columns, place = "chartqa", {"chartqa": "ChartQA"}, 16
    harness = HarnessTask("chartqa", ("relaxed_overall",), rescore=harness_score)


BENCHMARK = ChartQA()
