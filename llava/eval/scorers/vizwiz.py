"""VizWiz: the upload file, and the score on val."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from llava.eval.normalise import normalise, soft_score


def upload(answers: Sequence[dict], questions: Sequence[dict]) -> list[dict]:
    """Submission entries ``image``, ``answer`` in question order; the last of repeated ids counts.

    Raises:
        ValueError: a question without answer.
    """
    texts = {answer["question_id"]: answer["text"] for answer in answers}
    missing = [question["question_id"] for question in questions if question["question_id"] not in texts]
    if missing:
        raise ValueError(f"{len(missing)} VizWiz questions have no answer, first {missing[0]}: the run is incomplete")
    return [
        {"image": question["image"], "answer": normalise(texts[question["question_id"]])} for question in questions
    ]


def score(entries: Sequence[dict], annotations: Sequence[dict]) -> dict:
    """Mean soft score in percent, overall and per answer type; "unanswerable" is an answer like any other.

    Args:
        entries: what `upload` makes.
        annotations: ``image``, ``answers`` (ten with ``answer``), ``answer_type``.
    """
    answer_of = {entry["image"]: entry["answer"] for entry in entries}
    items, of_type = {}, defaultdict(list)
    for entry in annotations:
        if entry["image"] not in answer_of:
            raise ValueError(f"no answer for {entry['image']}")
        human = [normalise(answer["answer"]) for answer in entry["answers"]]
        items[entry["image"]] = soft_score(normalise(answer_of[entry["image"]]), human)
        of_type[entry["answer_type"]].append(items[entry["image"]])
    return {
        "metric": "accuracy",
        "score": 100.0 * sum(items.values()) / len(items),
        "per_answer_type": {kind: 100.0 * sum(values) / len(values) for kind, values in of_type.items()},
        "items": items,
    }
