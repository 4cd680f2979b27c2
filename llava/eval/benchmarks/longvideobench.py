"""LongVideoBench (through lmms-eval): multiple choice about long videos, in two levels of question."""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.benchmarks.base import Benchmark, HarnessSample, HarnessTask
from llava.eval.benchmarks.shared.grouped import grouped, mean
from llava.eval.benchmarks.shared.letters import OPTION_LETTERS, first_capital

# Question categories: level 1 asks what is seen, level 2 how it hangs together.
PERCEPTION = ("S2E", "S2O", "S2A", "E2O", "O2E", "T2E", "T2O", "T2A")
RELATION = ("E3E", "O3O", "SSS", "SOS", "SAA", "T3E", "T3O", "TOS", "TAA")


def score(rows: Sequence[dict]) -> dict:
    """Accuracy 0..1, overall and per level. An answer without a letter counts as wrong (the reference draws one).

    Args:
        rows: ``prediction``, ``correct_choice`` (an index), ``level``.
    """
    letters = [first_capital(row["prediction"], "ABCDE") for row in rows]
    scores = [
        float(letter == OPTION_LETTERS[row["correct_choice"]]) for letter, row in zip(letters, rows, strict=True)
    ]
    per_level = {name: round(value, 5) for name, value in grouped(rows, scores, "level").items()}
    return {
        "metric": "accuracy",
        "score": round(mean(scores), 5),
        "per_level": per_level,
        "extracted": letters,
        "items": scores,
    }


def harness_score(samples: Sequence[HarnessSample], release: str) -> float:
    """Of an answer without a letter, the letter that the harness drew for it is taken."""
    read = [first_capital(sample.answer, "ABCDE") or sample.record["parsed_pred"] for sample in samples]
    right = [letter == sample.record["answer"] for letter, sample in zip(read, samples, strict=True)]
    return round(mean(right), 5)


class LongVideoBench(Benchmark):
    name, place = "longvideobench", 13
    columns = {  # noqa: RUF012 (read by all, written by none)
        "longvideobench": "LVB",
        "longvideobench_perception": "LVB-perception",
        "longvideobench_relation": "LVB-relation",
    }
    harness = HarnessTask(
        "longvideobench_val_v",
        ("lvb_acc",),
        parts=(
            ("longvideobench_perception", lambda record: record["question_category"] in PERCEPTION),
            ("longvideobench_relation", lambda record: record["question_category"] in RELATION),
        ),
        rescore=harness_score,
    )


BENCHMARK = LongVideoBench()
