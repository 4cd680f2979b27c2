"""AI2D (through lmms-eval): multiple choice about diagrams."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from llava.eval.benchmarks.base import Benchmark, HarnessSample, HarnessTask
from llava.eval.benchmarks.shared.grouped import mean
from llava.eval.benchmarks.shared.letters import OPTION_LETTERS


def cut_to_letter(text: str) -> str:
    """An answer that begins with ``A.`` as that letter; any other as it is."""
    start = re.match(r"\s*([A-Z])\.", text)
    return start[1] if start else text


def match(text: str, letter: str) -> float:
    """Whether an answer is the letter, ignoring case and ASCII punctuation."""
    delete = str.maketrans("", "", string.punctuation)
    return float(text.strip().lower().translate(delete) == letter.lower())


def score(rows: Sequence[dict]) -> dict:
    """Exact match 0..1 of the letter.

    Args:
        rows: ``prediction``, ``answer`` (an index).
    """
    filtered = [cut_to_letter(row["prediction"]) for row in rows]
    scores = [match(text, OPTION_LETTERS[int(row["answer"])]) for text, row in zip(filtered, rows, strict=True)]
    return {"metric": "exact match", "score": mean(scores), "filtered": filtered, "items": scores}


def harness_score(samples: Sequence[HarnessSample], release: str) -> float:
    return mean(match(cut_to_letter(sample.answer), sample.target) for sample in samples)


class AI2D(Benchmark):
    name, columns, place = "ai2d", {"ai2d": "AI2D"}, 15
    harness = HarnessTask("ai2d", ("exact_match",), rescore=harness_score)


BENCHMARK = AI2D()
