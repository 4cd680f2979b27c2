"""ScienceQA: letters read from answers; accuracy over all problems of a split and over those with an image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.benchmarks.base import OwnBenchmark, Question, Scoring
from llava.eval.benchmarks.shared.ids import id_key
from llava.eval.benchmarks.shared.question_lists import LETTER_INSTRUCTION, check_id, check_text, picture_path
from llava.eval.files import read_json, write_json

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
    answer_of = {id_key(answer["question_id"]): answer for answer in answers}
    items, results, outputs, correct, incorrect = {}, {}, {}, [], []
    for name in split:
        truth = problems[name]["answer"]
        answer = answer_of.get(id_key(name))
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


class ScienceQA(OwnBenchmark):
    name, columns, place = "sqa", {"sqa": "SQA"}, 4
    section, folder = "ScienceQA", "scienceqa"
    question_file, image_folder, max_new_tokens = "llava_test_CQM-A.json", "images/test", 1024
    annotations = ("problems.json", "pid_splits.json")
    split = "test"

    def read_questions(self, file: Path, images: Path | None) -> list[Question]:
        entries = read_json(file)
        if not isinstance(entries, list):
            raise ValueError(f"{file} must hold a list of questions, got {type(entries).__name__}")
        return [_question_of(entry, images, f"{file}, question {n}") for n, entry in enumerate(entries, start=1)]

    def score(self, run: Scoring) -> dict:
        problems, splits = (read_json(run.file(name)) for name in self.annotations)
        lost = {id_key(name) for name in run.skipped}
        split = [name for name in splits[self.split] if id_key(name) not in lost]
        if run.limit is not None:
            asked = {id_key(question.question_id) for question in run.asked}
            split = [name for name in split if id_key(name) in asked]
        result = score(run.answers(), problems, split)
        write_json(run.beside("answers", "_output.jsonl"), result.pop("output"), indent=2)
        write_json(run.beside("answers", "_result.json"), result.pop("result"), indent=2)
        print(f"Total: {result['total']}, Correct: {result['correct']}, Accuracy: {result['accuracy']:.2f}%")
        print(f"IMG-Accuracy: {result['score']:.2f}% of {result['total_with_image']}")
        return result


def _question_of(entry: dict, images: Path | None, where: str) -> Question:
    try:
        name, asked = entry["id"], entry["conversations"][0]["value"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{where}, must have an id and a conversation that begins with the question") from error
    asked = check_text(asked, f"{where}: its text").replace(DEFAULT_IMAGE_TOKEN, "").strip()
    text = f"{asked}\n{LETTER_INSTRUCTION}"
    if "image" not in entry:
        return Question(check_id(name, where), text, text)
    place = picture_path(entry["image"], images, where)
    return Question(check_id(name, where), text, f"{DEFAULT_IMAGE_TOKEN}\n{text}", place)


BENCHMARK = ScienceQA()
