"""ScienceQA: letters read from answers; accuracy over all problems of a split and over those with an image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

LETTERS = "ABCDE"
FAILED, UNKNOWN = "FAILED", "Unknown"  # text and prompt that the published scorer writes for an unanswered problem
IMAGE_MARK = "<image>"  # in the recorded prompt: this, not the problem file, makes a problem multimodal
_PHRASE = re.compile(r"The answer is ([A-Z]).")


def parse(text: str) -> str:
    """The letter that an answer gives, or `FAILED`."""
    if text in LETTERS and len(text) == 1:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = _PHRASE.findall(text)
    return found[0] if len(found) == 1 else FAILED


def score(answers: Sequence[dict], problems: Mapping[str, dict], split: Sequence[str]) -> dict:
    """Accuracy in percent.

    Args:
        answers: ``question_id``, ``prompt``, ``text``; the last of repeated ids counts.
        problems: by id: ``choices``, ``answer`` (index).
        split: ids that count; those without answer are wrong, and not multimodal.

    Returns:
        "score" is the accuracy over multimodal problems (IMG), "accuracy" over all; "output" and "result" are the
        contents of the two files that LLaVA's scorer writes.
    """
    answer_of = {answer["question_id"]: answer for answer in answers}
    items, results, outputs, correct, incorrect = {}, {}, {}, [], []
    for name in split:
        truth = problems[name]["answer"]
        answer = answer_of.get(name)
        text = FAILED if answer is None else answer["text"]
        prompt = UNKNOWN if answer is None else answer["prompt"]
        letter = parse(text)
        choices = LETTERS[: len(problems[name]["choices"])]
        index = choices.index(letter) if letter in choices and letter != FAILED else -1
        right = index == truth
        items[name] = {
            "parsed": letter,
            "index": index,
            "multimodal": IMAGE_MARK in prompt,
            "correct": right,
            "answered": answer is not None,
        }
        results[name], outputs[name] = index, text
        analysis = {"question_id": name, "parsed_ans": letter, "ground_truth": LETTERS[truth], "question": prompt}
        (correct if right else incorrect).append(
            {**analysis, "pred": text, "is_multimodal": items[name]["multimodal"]}
        )
    with_image = [item for item in items.values() if item["multimodal"]]
    accuracy = 100.0 * len(correct) / len(items) if items else 0.0
    image_right = sum(item["correct"] for item in with_image)
    return {
        "metric": "IMG accuracy",
        "score": 100.0 * image_right / len(with_image) if with_image else 0.0,
        "accuracy": accuracy,
        "correct": len(correct),
        "total": len(items),
        "total_with_image": len(with_image),
        "parsed": items,
        "items": {name: float(item["correct"]) for name, item in items.items() if item["multimodal"]},
        "output": {"correct": correct, "incorrect": incorrect},
        "result": {
            "acc": accuracy,
            "correct": len(correct),
            "count": len(items),
            "results": results,
            "outputs": outputs,
        },
    }


def harness_match(text: str, letter: str) -> float:
    """lmms-eval's match of one answer: the bare letter in any case, or the capital and a period first."""
    text = text.strip()
    first = text[:1].isupper() and text[1:2] == "."
    return float(text.lower() == letter.lower() or (first and text[0] == letter))
