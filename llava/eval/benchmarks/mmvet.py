"""MM-Vet: the submission file, and an optional judge behind any OpenAI-compatible address."""

from __future__ import annotations

import json
import re
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from llava.eval.benchmarks.base import OwnBenchmark, Scoring, percent
from llava.eval.benchmarks.shared.ids import id_key
from llava.eval.files import read_json, write_json

JUDGE_TIMEOUT_SECONDS = 60
INSTRUCTION = (
    "You grade answers about pictures. Compare the prediction with the reference and reply with one number from 0.0 "
    "(entirely wrong) to 1.0 (entirely right), in steps of 0.1, and nothing else. Parts of the reference joined by "
    "<AND> are all required; of parts joined by <OR> one suffices."
)


def upload(answers: Sequence[dict]) -> dict[str, str]:
    """``v1_<id>`` -> text; the last of repeated answers, nothing for a question without one."""
    return {f"v1_{id_key(answer['question_id'])}": answer["text"] for answer in answers}


def ask_judge(address: str, model: str, key: str | None = None) -> Callable[[str, str, str], float]:
    """A grader (question, reference, prediction) -> 0..1 that asks ``<address>/chat/completions``."""

    def grade(question: str, reference: str, prediction: str) -> float:
        content = f"Question: {question}\nReference: {reference}\nPrediction: {prediction}"
        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": content}]
        body = json.dumps({"model": model, "messages": messages, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(address.rstrip("/") + "/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=JUDGE_TIMEOUT_SECONDS) as response:
            reply = json.load(response)
        try:
            return read_grade(reply["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{address} does not reply as an OpenAI-compatible judge does: {reply}") from error

    return grade


def read_grade(reply: str) -> float:
    """The number in a judge's reply. Raises ValueError unless there is one from 0 to 1."""
    found = re.search(r"\d*\.?\d+", reply)
    if found is None or not 0 <= float(found[0]) <= 1:
        raise ValueError(f"the judge must reply with a number from 0 to 1, but said {reply!r}")
    return float(found[0])


def score(
    submission: Mapping[str, str], references: Mapping[str, dict], grade: Callable[[str, str, str], float]
) -> dict:
    """100 x the mean grade over all references (0 where unanswered), and the mean per capability and combination.

    Args:
        references: by ``v1_<id>``: ``question``, ``answer``, ``capability`` (list).
    """
    items, per_capability, per_combination = {}, defaultdict(list), defaultdict(list)
    for name, reference in references.items():
        answered = name in submission
        items[name] = grade(reference["question"], reference["answer"], submission[name]) if answered else 0.0
        for capability in reference["capability"]:
            per_capability[capability].append(items[name])
        per_combination["_".join(sorted(reference["capability"]))].append(items[name])
    return {
        "metric": "judge's mean grade",
        "score": percent(items.values()),
        "per_capability": {name: percent(values) for name, values in per_capability.items()},
        "per_combination": {name: percent(values) for name, values in per_combination.items()},
        "items": items,
    }


class MMVet(OwnBenchmark):
    name, columns, place = "mmvet", {"mmvet": "MM-Vet"}, 10
    section, folder = "MM-Vet", "mm-vet"
    question_file, image_folder, max_new_tokens = "llava-mm-vet.jsonl", "images", 1024

    def score(self, run: Scoring) -> dict | None:
        submission = upload(run.answers())
        place = run.beside("answers_upload", ".json")
        write_json(place, submission)
        print(f"to upload: {place}")
        if run.judge is None:
            return None
        references = read_json(run.file("mm-vet.json"))
        lost = {f"v1_{id_key(name)}" for name in run.skipped}
        result = score(submission, {k: v for k, v in references.items() if k not in lost}, run.judge)
        print(f"Judge's mean grade: {result['score']:.2f}")
        return result


BENCHMARK = MMVet()
