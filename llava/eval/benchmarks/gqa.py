"""GQA: exact match on the balanced questions, with the breakdowns of the published scorer."""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from llava.eval.benchmarks.base import HarnessSample, HarnessTask, OwnBenchmark, Scoring, percent
from llava.eval.benchmarks.shared.ids import id_key
from llava.eval.files import read_json, write_json

LOOKUPS = ("exist", "query: name", "choose name")  # operations that the published scorer does not count as a step


def predictions(answers: Sequence[dict]) -> list[dict]:
    """``questionId``, ``prediction``: text without trailing periods, lower-cased, and nothing else."""
    return [
        {"questionId": id_key(answer["question_id"]), "prediction": answer["text"].rstrip(".").lower()}
        for answer in answers
    ]


def score(predicted: Sequence[dict], questions: Mapping[str, dict]) -> dict:
    """Accuracy in percent over balanced questions, by type, and the distance of the answer distributions.

    Args:
        predicted: what `predictions` makes; the last of repeated ids counts.
        questions: by id: ``question``, ``answer``, ``isBalanced``, ``types``, ``groups``, ``semantic``.

    Raises:
        ValueError: a balanced question without prediction.
    """
    text = {entry["questionId"]: entry["prediction"] for entry in predicted}
    balanced = {name: question for name, question in questions.items() if question["isBalanced"]}
    missing = [name for name in balanced if name not in text]
    if missing:
        raise ValueError(f"{len(missing)} balanced GQA questions have no prediction, first {missing[0]}")
    items = {name: float(text[name] == question["answer"]) for name, question in balanced.items()}
    groups: dict[str, dict] = {
        name: defaultdict(list)
        for name in ("kind", "structural type", "semantic type", "steps number", "words number")
    }
    for name, question in balanced.items():
        structural = question["types"]["structural"]
        groups["kind"]["open" if structural == "query" else "binary"].append(items[name])
        groups["structural type"][structural].append(items[name])
        groups["semantic type"][question["types"]["semantic"]].append(items[name])
        groups["steps number"][steps(question)].append(items[name])
        groups["words number"][len(question["question"].split())].append(items[name])
    kinds = groups.pop("kind")
    return {
        "metric": "accuracy",
        "score": percent(items.values()),
        "binary": percent(kinds["binary"]),
        "open": percent(kinds["open"]),
        "distribution": distribution_distance(balanced, text),
        "breakdowns": {
            name: {str(key): (percent(values), len(values)) for key, values in sorted(parts.items())}
            for name, parts in groups.items()
        },
        "items": items,
    }


def steps(question: Mapping) -> int:
    """Reasoning steps of a question's program."""
    operations = (f"{step['operation']}: {step['argument']}" for step in question["semantic"])
    return sum(not any(lookup in operation for lookup in LOOKUPS) for operation in operations)


def distribution_distance(questions: Mapping[str, dict], text: Mapping[str, str]) -> float:
    """Hundredth of the chi-square between true and given answers per global group, averaged by group size."""
    true, given = defaultdict(Counter), defaultdict(Counter)
    for name, question in questions.items():
        group = question["groups"]["global"]
        if group is not None:
            true[group][question["answer"]] += 1
            given[group][text[name]] += 1
    total = sum(sum(counts.values()) for counts in true.values())
    if not total:
        return 0.0
    weighted = (
        sum(counts.values()) * sum((given[group][answer] - count) ** 2 / count for answer, count in counts.items())
        for group, counts in true.items()
    )
    return sum(weighted) / total / 100.0


def report(result: Mapping) -> str:
    """The text that the published scorer prints; validity and plausibility need a file that the release lacks."""
    lines = [f"Binary: {result['binary']:.2f}%", f"Open: {result['open']:.2f}%", f"Accuracy: {result['score']:.2f}%"]
    lines += ["Validity: 0.00%", "Plausibility: 0.00%"]
    lines.append(f"Distribution: {result['distribution']:.2f} (lower is better)")
    for name, parts in result["breakdowns"].items():
        lines += ["", f"Accuracy / {name}:"]
        lines += [f"  {key}: {value:.2f}% ({count} questions)" for key, (value, count) in parts.items()]
    return "\n".join(lines)


def harness_match(text: str, answer: str) -> float:
    """lmms-eval's exact match: case and ASCII punctuation do not count."""
    table = str.maketrans("", "", string.punctuation)
    return float(text.strip().lower().translate(table) == answer.lower().translate(table))


def harness_score(samples: Sequence[HarnessSample], release: str) -> float:
    return sum(harness_match(sample.answer, sample.target) for sample in samples) / len(samples)


class GQA(OwnBenchmark):
    name, columns, place = "gqa", {"gqa": "GQA"}, 2
    section, folder, chunked = "GQA", "gqa", True
    question_file, image_folder = "llava_gqa_testdev_balanced.jsonl", "data/images"
    annotations = ("data/testdev_balanced_questions.json",)
    harness = HarnessTask("gqa", ("exact_match",), rescore=harness_score)

    def score(self, run: Scoring) -> dict:
        predicted = predictions(run.answers())
        write_json(run.beside("answers", "") / "testdev_balanced_predictions.json", predicted)
        questions = read_json(run.file(self.annotations[0]))
        asked = {id_key(question.question_id) for question in run.asked}
        known = {name: question for name, question in questions.items() if name in asked}
        if not known:
            raise ValueError(f"{run.file(self.annotations[0])} has none of the questions of {run.question_file}")
        counted, balanced = (sum(entry["isBalanced"] for entry in entries.values()) for entries in (known, questions))
        if counted < balanced and run.limit is None and not run.skipped:
            print(f"NOT THE WHOLE BENCHMARK: the question list has {counted} of the {balanced} balanced questions")
        result = score(predicted, known)
        print(report(result))
        return result


BENCHMARK = GQA()
