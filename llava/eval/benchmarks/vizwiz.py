"""VizWiz: the upload file, and the score on val."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from llava.eval.benchmarks.base import OwnBenchmark, Scoring, print_parts
from llava.eval.benchmarks.shared.ids import id_key
from llava.eval.benchmarks.shared.vqa_text import normalise, soft_score
from llava.eval.files import read_json, write_json


def upload(answers: Sequence[dict], questions: Sequence[dict]) -> list[dict]:
    """Submission entries ``image``, ``answer`` in question order; the last of repeated ids counts.

    Raises:
        ValueError: a question without answer.
    """
    texts = {id_key(answer["question_id"]): answer["text"] for answer in answers}
    missing = [question["question_id"] for question in questions if id_key(question["question_id"]) not in texts]
    if missing:
        raise ValueError(f"{len(missing)} VizWiz questions have no answer, first {missing[0]}: the run is incomplete")
    return [
        {"image": question["image"], "answer": normalise(texts[id_key(question["question_id"])])}
        for question in questions
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


class VizWiz(OwnBenchmark):
    name, columns, place = "vizwiz", {"vizwiz": "VizWiz"}, 3
    section, folder = "VizWiz", "vizwiz"
    question_file, image_folder = "llava_test.jsonl", "test"

    def score(self, run: Scoring) -> dict | None:
        questions = run.questions()
        entries = upload(run.answers_for_upload(len(questions)), questions)
        place = run.beside("answers_upload", ".json")
        write_json(place, entries)
        print(f"to upload: {place}")
        annotations = run.optional("val.json")
        answered = {entry["image"] for entry in entries}
        known = [] if annotations is None else [one for one in read_json(annotations) if one["image"] in answered]
        if not known:
            return None
        result = score(entries, known)
        print(f"on the {len(known)} questions with annotations (val): {result['score']:.2f}%")
        print_parts(result["per_answer_type"])
        return result


BENCHMARK = VizWiz()
