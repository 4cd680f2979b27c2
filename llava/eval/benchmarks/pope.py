"""POPE: yes or no about objects, in three categories of sampling; the mean of the three F1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llava.eval.benchmarks.base import HarnessSample, HarnessTask, OwnBenchmark, Scoring
from llava.eval.benchmarks.shared.ids import id_key
from llava.eval.files import read_whole_lines

CATEGORIES = ("adversarial", "random", "popular")
NEGATIVES = {"No", "no", "not"}
CATEGORY_STEP = 10_000_000  # question ids of the list: number within the category + category * step


def says_no(text: str) -> bool:
    """Whether an answer counts as no: `NEGATIVES` as a word of what precedes the first period, else yes."""
    return not NEGATIVES.isdisjoint(text.split(".")[0].replace(",", "").split(" "))


def is_no(label: str, image: str) -> bool:
    """Whether a label is no, in any spelling of yes and no. Raises ValueError for anything else."""
    word = str(label).strip().rstrip(".").lower()
    if word not in ("yes", "no"):
        raise ValueError(f"POPE's labels are yes or no, got {label!r} for {image}")
    return word == "no"


def score(
    answers: Sequence[dict],
    questions: Sequence[dict],
    labels: Mapping[str, Sequence[dict]],
    compat: bool = False,
) -> dict:
    """Accuracy, precision, recall, F1 and share of yes per category; "score" is 100 x the mean F1.

    "kinds" tells of every answer by category whether it is a TP, FN, FP or TN: what the score follows from.

    Args:
        answers: ``question_id``, ``text``.
        questions: ``question_id``, ``image``, ``text``, ``category``.
        labels: for each category, ``image``, ``text`` (the bare question) and ``label``.
        compat: pair answers with labels by position within a category and stop at the shorter list, as the published
            scorer does; a lost or repeated answer then shifts all that follow.

    Raises:
        ValueError: without ``compat``, a question without answer or with two, or without label.
    """
    category_of = {id_key(question["question_id"]): question["category"] for question in questions}
    strangers = [a["question_id"] for a in answers if id_key(a["question_id"]) not in category_of]
    if strangers:
        raise ValueError(f"{len(strangers)} answers are to no POPE question, first {strangers[0]}")
    categories = [name for name in dict.fromkeys([*CATEGORIES, *labels]) if name in labels]
    result, items, kinds = {}, {}, {}
    for category in categories:
        own = [answer for answer in answers if category_of[id_key(answer["question_id"])] == category]
        if compat:
            pairs = [
                (answer["question_id"], says_no(answer["text"]), is_no(entry["label"], entry["image"]))
                for answer, entry in zip(own, labels[category], strict=False)
            ]
        else:
            pairs = _pair_by_id(own, [q for q in questions if q["category"] == category], labels[category])
        result[category] = _measure([(not no, not truth) for _, no, truth in pairs])
        if compat and own:  # answers beyond the last label are counted here, and only here
            said_yes = sum(not says_no(answer["text"]) for answer in own)
            result[category] |= {"samples": len(own), "yes_ratio": said_yes / len(own)}
        items |= {name: float(no == truth) for name, no, truth in pairs}
        kinds[category] = {name: _kind(no, truth) for name, no, truth in pairs}
    asked = [part["f1"] for part in result.values() if part["samples"]]  # --limit may leave a category out
    mean_f1 = _ratio(sum(asked), len(asked))
    right = sum(part["TP"] + part["TN"] for part in result.values())
    wrong = sum(part["FP"] + part["FN"] for part in result.values())
    return {
        "metric": "mean F1",
        "score": 100.0 * mean_f1,
        "accuracy": 100.0 * _ratio(right, right + wrong),
        "average_f1": mean_f1,
        "categories": result,
        "items": items,
        "kinds": kinds,
    }


def _pair_by_id(
    answers: Sequence[dict], questions: Sequence[dict], labels: Sequence[dict]
) -> list[tuple[int, bool, bool]]:
    """(question id, said no, is no) of a category's questions.

    A label is found by picture and question; where the two files word the question differently, by picture and number.
    """
    texts: dict = {}
    for answer in answers:
        if id_key(answer["question_id"]) in texts:
            raise ValueError(
                f"POPE question {answer['question_id']} is answered twice; --compat pairs by position nevertheless"
            )
        texts[id_key(answer["question_id"])] = answer["text"]
    by_text = {(entry["image"], entry["text"]): entry["label"] for entry in labels}
    by_number = {(entry["image"], entry.get("question_id")): entry["label"] for entry in labels}
    pairs = []
    for question in questions:
        name, image, asked = question["question_id"], question["image"], question["text"].split("\n")[0]
        if id_key(name) not in texts:
            raise ValueError(f"POPE question {name} has no answer; --compat pairs by position nevertheless")
        label = by_text.get((image, asked)) or by_number.get((image, int(name) % CATEGORY_STEP))
        if label is None:
            raise ValueError(f"POPE question {name} ({image}: {asked}) has no label")
        pairs.append((name, says_no(texts[id_key(name)]), is_no(label, image)))
    return pairs


def _kind(said_no: bool, is_no: bool) -> str:
    """TP, FN, FP or TN, yes being positive."""
    return ("FN" if said_no else "TP") if not is_no else ("TN" if said_no else "FP")


def _measure(pairs: Sequence[tuple[bool, bool]]) -> dict:
    """Counts and ratios of (said yes, is yes); a ratio over nothing is 0."""
    tp, fp = pairs.count((True, True)), pairs.count((True, False))
    tn, fn = pairs.count((False, False)), pairs.count((False, True))
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    return {
        "samples": len(pairs),
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "accuracy": _ratio(tp + tn, len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(tp + fp, len(pairs)),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def harness_measures(pairs: Sequence[tuple[str, str]]) -> dict:
    """lmms-eval's measures over (answer, label): only the bare words yes and no are understood."""
    pairs = [(text.strip().lower(), label.strip().lower()) for text, label in pairs]
    tp, fp = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    fn = pairs.count(("no", "yes"))
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    return {
        "samples": len(pairs),
        "accuracy": _ratio(sum(text == label for text, label in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(sum(label == "yes" for _, label in pairs), len(pairs)),
    }


def harness_score(samples: Sequence[HarnessSample], release: str) -> float:
    return harness_measures([(sample.answer, sample.record["ground_truth"]) for sample in samples])["f1"]


class POPE(OwnBenchmark):
    name, columns, place = "pope", {"pope": "POPE"}, 6
    section, folder = "POPE", "pope"
    question_file, image_folder = "llava_pope_test.jsonl", "val2014"
    annotations = tuple(f"coco/coco_pope_{category}.json" for category in CATEGORIES)
    harness = HarnessTask("pope", ("pope_f1_score",), rescore=harness_score)

    def score(self, run: Scoring) -> dict:
        labels = {
            name: read_whole_lines(run.file(file)) for name, file in zip(CATEGORIES, self.annotations, strict=True)
        }
        result = score(run.answers(), run.questions(), labels, run.compat)
        for name, part in result["categories"].items():
            measures = ("accuracy", "precision", "recall", "f1", "yes_ratio")
            print(
                f"{name} ({part['samples']}): " + ", ".join(f"{measure} {part[measure]:.4f}" for measure in measures)
            )
        print(f"Average F1: {result['average_f1']:.4f}, accuracy over all: {result['accuracy']:.2f}%")
        return result


BENCHMARK = POPE()
