"""VQAv2: the upload file, and the score of the evaluation code on val."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from llava.eval.normalise import normalise, normalise_harness, one_line, soft_score, vqa_score

DIGITS = 10  # to which the evaluation code rounds percentages


def upload(answers: Sequence[dict], all_questions: Sequence[dict]) -> list[dict]:
    """Submission entries in the order of the full question list; unanswered ones empty, the last of repeated ids."""
    texts = {answer["question_id"]: answer["text"] for answer in answers}
    return [
        {"question_id": question["question_id"], "answer": normalise(texts.get(question["question_id"], ""))}
        for question in all_questions
    ]


def score(
    predictions: Sequence[dict], annotations: Sequence[dict], rule: Callable[[str, Sequence[str]], float] = vqa_score
) -> dict:
    """Mean soft score in percent over the annotated questions.

    Args:
        predictions: ``question_id``, ``answer``: what `upload` makes, or raw texts.
        annotations: ``question_id``, ``question_type``, ``answer_type``, ``answers`` (ten with ``answer``).
        rule: `vqa_score` (what the server is taken to run) or `vqa_score_older`.

    Raises:
        ValueError: an annotated question without prediction.
    """
    texts = {prediction["question_id"]: prediction["answer"] for prediction in predictions}
    items, of_answer_type, of_question_type = {}, defaultdict(list), defaultdict(list)
    for entry in annotations:
        if entry["question_id"] not in texts:
            raise ValueError(f"question {entry['question_id']} has no prediction")
        value = rule(texts[entry["question_id"]], [human["answer"] for human in entry["answers"]])
        items[entry["question_id"]] = value
        of_answer_type[entry["answer_type"]].append(value)
        of_question_type[entry["question_type"]].append(value)
    return {
        "metric": "accuracy",
        "score": _percent(list(items.values())),
        "per_answer_type": {kind: _percent(values) for kind, values in of_answer_type.items()},
        "per_question_type": {kind: _percent(values) for kind, values in of_question_type.items()},
        "items": items,
    }


def _percent(values: Sequence[float]) -> float:
    return round(100.0 * sum(values) / len(values), DIGITS)


def harness_score(text: str, human: Sequence[str]) -> float:
    """lmms-eval's score of one answer, 0..1: both sides normalised by steps 2 to 5."""
    return soft_score(normalise_harness(text.strip()), [normalise_harness(one_line(answer)) for answer in human])
