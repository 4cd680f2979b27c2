"""TextVQA: soft accuracy of normalised answers, each matched by image and question."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llava.eval.benchmarks.base import HarnessTask, OwnBenchmark, Scoring
from llava.eval.benchmarks.shared.ids import id_key
from llava.eval.benchmarks.shared.vqa_text import normalise, soft_score
from llava.eval.files import read_json

OCR_MENTION = "Reference OCR token:"
_FEW_SHOT_FORM = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def question_of(prompt: str) -> str:
    """The question inside a recorded prompt, lower-cased. Raises ValueError for a prompt of unknown form."""
    if prompt.startswith("OCR tokens: "):
        found = _FEW_SHOT_FORM.search(prompt)
        if found:
            return found[1].lower()
    lines = prompt.split("\n")
    if OCR_MENTION in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(OCR_MENTION) else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise ValueError(f"cannot tell the question in this TextVQA prompt: {prompt!r}")


def score(answers: Sequence[dict], annotations: Sequence[dict]) -> dict:
    """Mean soft score over answer lines: a repeated line counts twice, an unanswered question does not count.

    Args:
        answers: ``question_id`` (the image's id), ``prompt``, ``text``.
        annotations: ``image_id``, ``question``, ``question_id``, ``answers`` (ten).

    Raises:
        ValueError: a prompt whose question is not in the annotations; no answers at all.
    """
    if not answers:
        raise ValueError("there are no TextVQA answers to score")
    known = {(id_key(entry["image_id"]), entry["question"].lower()): entry for entry in annotations}
    lines = []
    for answer in answers:
        key = (id_key(answer["question_id"]), question_of(answer["prompt"]))
        if key not in known:
            raise ValueError(f"no annotation for image {key[0]} with the question {key[1]!r}")
        entry = known[key]
        normalised = normalise(answer["text"])
        lines.append(
            {
                "question_id": entry["question_id"],
                "image_id": entry["image_id"],
                "normalized": normalised,
                "score": soft_score(normalised, [normalise(human) for human in entry["answers"]]),
            }
        )
    accuracy = 100.0 * sum(line["score"] for line in lines) / len(lines)
    return {
        "metric": "accuracy",
        "score": accuracy,
        "samples": len(lines),
        "unanswered": len(annotations) - len({line["question_id"] for line in lines}),
        "lines": lines,
        "items": {line["question_id"]: line["score"] for line in lines},
    }


class TextVQA(OwnBenchmark):
    name, columns, place = "textvqa", {"textvqa": "TextVQA"}, 5
    section, folder = "TextVQA", "textvqa"
    question_file, image_folder = "llava_textvqa_val_v051_ocr.jsonl", "train_images"
    annotations = ("TextVQA_0.5.1_val.json",)
    harness = HarnessTask("textvqa_val", ("exact_match",))  # its samples do not hold the ten human answers

    def score(self, run: Scoring) -> dict:
        result = score(run.answers(), read_json(run.file(self.annotations[0]))["data"])
        print(f"Samples: {result['samples']}\nAccuracy: {result['score']:.2f}%")
        return result


BENCHMARK = TextVQA()
