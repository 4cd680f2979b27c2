"""Metrics of the video and further image benchmarks, as lmms-eval 0.7 computes them (and 0.5 where that differs).

Every function takes rows: annotation fields and ``prediction``.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

from llava.eval.letters import (
    BEST_ANSWER_PHRASES,
    first_capital,
    general_letter,
    letter_before_parenthesis,
    mvbench_letter,
)

MLVU_TYPES = ("anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning")
OPTION_LETTERS = "ABCDEFGH"
# A missing comma in that release makes one phrase of the last two.
VIDEOMME_PHRASES_0_5 = (*BEST_ANSWER_PHRASES[:-2], "".join(BEST_ANSWER_PHRASES[-2:]))
CHART_TOLERANCE = 0.05
OCRBENCH_POINTS = 1000  # by which the harness divides, however many items there are


def _mean(values: Sequence[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def _grouped(rows: Sequence[dict], scores: Sequence[float], column: str) -> dict[str, float]:
    groups = defaultdict(list)
    for row, score in zip(rows, scores, strict=True):
        groups[row[column]].append(score)
    return {name: _mean(values) for name, values in groups.items()}


def mlvu(rows: Sequence[dict], release: str = "0.7") -> dict:
    """Mean in percent over the seven types' accuracies; a type without items counts 0."""
    read = general_letter if release == "0.7" else letter_before_parenthesis
    letters = [read(row["prediction"]) for row in rows]
    scores = [float(letter == row["answer"]) for letter, row in zip(letters, rows, strict=True)]
    per_type = {name: 100.0 * value for name, value in _grouped(rows, scores, "task_type").items()}
    total = sum(per_type.get(name, 0.0) for name in MLVU_TYPES) / len(MLVU_TYPES)
    return {"metric": "m-avg", "score": total, "per_type": per_type, "extracted": letters, "items": scores}


def videomme(rows: Sequence[dict], release: str = "0.7") -> dict:
    """Accuracy in percent, overall and per duration."""
    texts = [row["prediction"] for row in rows]
    if release == "0.7":
        letters = [general_letter(text) for text in texts]
    else:
        letters = [first_capital(text, "ABCD", VIDEOMME_PHRASES_0_5) for text in texts]
    scores = [float(letter == row["answer"]) for letter, row in zip(letters, rows, strict=True)]
    per_duration = {name: 100.0 * value for name, value in _grouped(rows, scores, "duration").items()}
    return {
        "metric": "accuracy",
        "score": 100.0 * _mean(scores),
        "per_duration": per_duration,
        "extracted": letters,
        "items": scores,
    }


def mvbench(rows: Sequence[dict]) -> dict:
    """Mean in percent over tasks; items with an empty answer are left out of their task's denominator.

    Releases 0.5 and 0.7 agree.
    """
    targets = [OPTION_LETTERS[row["candidates"].index(row["answer"])] for row in rows]
    scores = [float(mvbench_letter(row["prediction"]) == target) for row, target in zip(rows, targets, strict=True)]
    answered = [number for number, row in enumerate(rows) if row["prediction"].strip()]
    tasks = _grouped([rows[i] for i in answered], [scores[i] for i in answered], "sub_task")
    per_task = {name: 100.0 * value for name, value in tasks.items()}
    return {
        "metric": "mean over tasks",
        "score": _mean(per_task.values()),
        "per_task": per_task,
        "targets": targets,
        "items": scores,
    }


def longvideobench(rows: Sequence[dict]) -> dict:
    """Accuracy 0..1, overall and per level. An answer without a letter counts as wrong (the reference draws one)."""
    letters = [first_capital(row["prediction"], "ABCDE") for row in rows]
    scores = [
        float(letter == OPTION_LETTERS[row["correct_choice"]]) for letter, row in zip(letters, rows, strict=True)
    ]
    per_level = {name: round(value, 5) for name, value in _grouped(rows, scores, "level").items()}
    return {
        "metric": "accuracy",
        "score": round(_mean(scores), 5),
        "per_level": per_level,
        "extracted": letters,
        "items": scores,
    }


def ai2d(rows: Sequence[dict]) -> dict:
    """Exact match 0..1, ignoring case and ASCII punctuation, after a leading ``A.`` has been cut to its letter."""
    delete = str.maketrans("", "", string.punctuation)
    filtered = []
    for row in rows:
        start = re.match(r"\s*([A-Z])\.", row["prediction"])
        filtered.append(start[1] if start else row["prediction"])
    scores = [
        float(text.strip().lower().translate(delete) == OPTION_LETTERS[int(row["answer"])].lower())
        for text, row in zip(filtered, rows, strict=True)
    ]
    return {"metric": "exact match", "score": _mean(scores), "filtered": filtered, "items": scores}


def chart_match(prediction: str, target: str) -> bool:
    """Numbers within 5 % of a target that is not zero; anything else by equality ignoring case."""
    predicted, wanted = _number(prediction), _number(target)
    if predicted is not None and wanted:
        return abs(predicted - wanted) / abs(wanted) <= CHART_TOLERANCE
    return prediction.lower() == target.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def chartqa(rows: Sequence[dict]) -> dict:
    """Relaxed accuracy 0..1, overall and per kind of question."""
    scores = [float(chart_match(row["prediction"].strip(), row["answer"])) for row in rows]
    return {
        "metric": "relaxed accuracy",
        "score": _mean(scores),
        "per_type": _grouped(rows, scores, "type"),
        "items": scores,
    }


def ocrbench(rows: Sequence[dict], release: str = "0.7") -> dict:
    """Points: a target occurs in the answer; formulas (``HME100k``) keep case and lose all spaces.

    Release 0.5 folds no full-width characters, and lower-cases the answer to a formula but not its target.
    """
    fold = _half_width if release == "0.7" else str
    scores = []
    for row in rows:
        targets = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        formula, answer = row["dataset"] == "HME100k", fold(row["prediction"])
        form = _without_spaces if formula else _one_line
        answer = form(answer.lower() if formula and release != "0.7" else answer)
        scores.append(int(any(form(fold(target)) in answer for target in targets)))
    points = defaultdict(int)
    for row, score in zip(rows, scores, strict=True):
        points[row["question_type"]] += score
    return {
        "metric": "points",
        "score": sum(scores),
        "harness_final": sum(scores) / OCRBENCH_POINTS,
        "per_question_type": dict(points),
        "items": [float(score) for score in scores],
    }


def _without_spaces(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _one_line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _half_width(text: str) -> str:
    """Full-width ASCII and the wide space to their ordinary forms; other compatibility characters stay."""
    return "".join(unicodedata.normalize("NFKC", c) if "！" <= c <= "～" or c == "\u3000" else c for c in text)


def hallusionbench(rows: Sequence[dict], judgements: Sequence[int] | None = None) -> dict:
    """aAcc, qAcc and fAcc, 0..1.

    Args:
        judgements: 0 wrong, 1 right, 2 unclear for each row. Unclear counts as right where a question of kind VS is
            asked without figure, and those questions stay out of fAcc. Without it an answer that contains "yes" is
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
        "score": _mean(right),
        "qAcc": _all_right(rows, right, range(len(rows)), (*keys, "question_id")),
        "fAcc": _all_right(rows, right, in_figures, (*keys, "figure_id")),
        "items": [float(value) for value in right],
    }


def _all_right(rows: Sequence[dict], right: Sequence[bool], members: Sequence[int], keys: Sequence[str]) -> float:
    """Share of groups (rows equal in ``keys``) with every member right."""
    groups = defaultdict(list)
    for number in members:
        groups[tuple(rows[number][key] for key in keys)].append(right[number])
    return _mean([float(all(group)) for group in groups.values()])
