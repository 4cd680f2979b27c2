"""VQAv2: the upload file, and the score of the evaluation code on val."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from llava.eval.benchmarks.base import OwnBenchmark, Scoring, print_parts
from llava.eval.benchmarks.shared.ids import id_key
from llava.eval.benchmarks.shared.vqa_text import normalise, vqa_score
from llava.eval.files import read_json, read_whole_lines, write_json

DIGITS = 10  # to which the evaluation code rounds percentages


def upload(answers: Sequence[dict], all_questions: Sequence[dict]) -> list[dict]:
    """Submission entries in the order of the full question list; unanswered ones empty, the last of repeated ids."""
    texts = {id_key(answer["question_id"]): answer["text"] for answer in answers}
    return [
        {"question_id": question["question_id"], "answer": normalise(texts.get(id_key(question["question_id"]), ""))}
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
    texts = {id_key(prediction["question_id"]): prediction["answer"] for prediction in predictions}
    items, of_answer_type, of_question_type = {}, defaultdict(list), defaultdict(list)
    for entry in annotations:
        if id_key(entry["question_id"]) not in texts:
            raise ValueError(f"question {entry['question_id']} has no prediction")
        value = rule(texts[id_key(entry["question_id"])], [human["answer"] for human in entry["answers"]])
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


def is_test(question_file: Path) -> bool:
    """Whether a list is of the test set, whose upload needs the list of all its questions."""
    return "test" in question_file.stem


class VQAv2(OwnBenchmark):
    name, columns, place = "vqav2", {"vqav2": "VQAv2"}, 1
    section, folder, chunked = "VQAv2", "vqav2", True
    question_file, image_folder = "llava_vqav2_mscoco_test-dev2015.jsonl", "test2015"
    annotations = ("llava_vqav2_mscoco_test2015.jsonl",)

    def needed_annotations(self, question_file: Path) -> tuple[str, ...]:
        return self.annotations if is_test(question_file) else ()

    def score(self, run: Scoring) -> dict | None:
        questions = run.questions()
        asked = {id_key(line["question_id"]) for line in questions}
        find = run.file if is_test(run.question_file) else run.optional
        whole = find(self.annotations[0])
        everything = read_whole_lines(whole) if whole else []
        if not asked <= {id_key(line["question_id"]) for line in everything}:  # val
            everything = questions
        entries = upload(run.answers_for_upload(len(everything)), everything)
        place = run.beside("answers_upload", ".json")
        write_json(place, entries)
        print(f"to upload: {place}")
        annotations = run.optional("v2_mscoco_val2014_annotations.json")
        known = [] if annotations is None else read_json(annotations)["annotations"]
        # As a server scores an upload: unanswered questions are wrong, unless this run left them out on purpose.
        part = run.limit is not None or bool(run.skipped)
        scored = asked if part else {id_key(entry["question_id"]) for entry in entries}
        known = [entry for entry in known if id_key(entry["question_id"]) in scored]
        if not known:
            return None
        result = score(entries, known)
        print(
            f"on the {len(known)} questions with annotations (val, not comparable with test-dev): "
            f"{result['score']:.2f}%"
        )
        print_parts(result["per_answer_type"])
        return result


BENCHMARK = VQAv2()
