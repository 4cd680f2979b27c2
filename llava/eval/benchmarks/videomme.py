"""Video-MME (through lmms-eval): multiple choice about short, medium and long videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llava.eval.benchmarks.base import Benchmark, HarnessSample, HarnessTask
from llava.eval.benchmarks.shared.grouped import grouped, mean
from llava.eval.benchmarks.shared.letters import BEST_ANSWER_PHRASES, first_capital, general_letter

DURATIONS = ("short", "medium", "long")
# A missing comma in releases before 0.7 makes one phrase of the last two.
PHRASES_BEFORE_0_7 = (*BEST_ANSWER_PHRASES[:-2], "".join(BEST_ANSWER_PHRASES[-2:]))


def score(rows: Sequence[dict], release: str = "0.7") -> dict:
    """Accuracy in percent, overall and per duration.

    Args:
        rows: ``prediction``, ``answer`` (a letter), ``duration``.
        release: of lmms-eval, whose reading of letters is taken; "0.5" means all before 0.7.
    """
    texts = [row["prediction"] for row in rows]
    if release == "0.5":
        letters = [first_capital(text, "ABCD", PHRASES_BEFORE_0_7) for text in texts]
    else:
        letters = [general_letter(text) for text in texts]
    scores = [float(letter == row["answer"]) for letter, row in zip(letters, rows, strict=True)]
    per_duration = {name: 100.0 * value for name, value in grouped(rows, scores, "duration").items()}
    return {
        "metric": "accuracy",
        "score": 100.0 * mean(scores),
        "per_duration": per_duration,
        "extracted": letters,
        "items": scores,
    }


def harness_score(samples: Sequence[HarnessSample], release: str) -> float:
    return score([{**sample.record, "prediction": sample.answer} for sample in samples], release)["score"]


def _lasts(duration: str) -> Callable[[dict[str, Any]], bool]:
    return lambda record: record["duration"] == duration


class VideoMME(Benchmark):
    name, place = "videomme", 14
    columns = {"videomme": "Video-MME"} | {f"videomme_{name}": f"VMME-{name}" for name in DURATIONS}
    harness = HarnessTask(
        "videomme",
        ("videomme_perception_score",),
        1.0,
        parts=tuple((f"videomme_{name}", _lasts(name)) for name in DURATIONS),
        rescore=harness_score,
    )


BENCHMARK = VideoMME()
