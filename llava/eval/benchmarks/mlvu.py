"""MLVU (through lmms-eval): multiple choice about long videos, the mean over seven types of question."""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.benchmarks.base import Benchmark, HarnessSample, HarnessTask
from llava.eval.benchmarks.shared.grouped import grouped
from llava.eval.benchmarks.shared.letters import general_letter, letter_before_parenthesis

TYPES = ("anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning")


def score(rows: Sequence[dict], release: str = "0.7") -> dict:
    """Mean in percent over the seven types' accuracies; a type without items counts 0.

    Args:
        rows: ``prediction``, ``answer`` (a letter), ``task_type``.
        release: of lmms-eval, whose reading of letters is taken; "0.5" means all before 0.7.
    """
    read = letter_before_parenthesis if release == "0.5" else general_letter
    letters = [read(row["prediction"]) for row in rows]
    scores = [float(letter == row["answer"]) for letter, row in zip(letters, rows, strict=True)]
    per_type = {name: 100.0 * value for name, value in grouped(rows, scores, "task_type").items()}
    total = sum(per_type.get(name, 0.0) for name in TYPES) / len(TYPES)
    return {"metric": "m-avg", "score": total, "per_type": per_type, "extracted": letters, "items": scores}


def harness_score(samples: Sequence[HarnessSample], release: str) -> float:
    return score([{**sample.record, "prediction": sample.answer} for sample in samples], release)["score"]


class MLVU(Benchmark):
    name, columns, place = "mlvu", {"mlvu": "MLVU"}, 11
    harness = HarnessTask("mlvu_dev", ("mlvu_percetion_score",), 1.0, rescore=harness_score)  # the harness's spelling


BENCHMARK = MLVU()
