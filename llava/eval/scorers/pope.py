"""POPE: yes or no about objects, in three categories of sampling; the mean of the three F1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

CATEGORIES = ("adversarial", "random", "popular")
NEGATIVES = {"No", "no", "not"}


def says_no(text: str) -> bool:
    """Whether an answer counts as no: `NEGATIVES` as a word of what precedes the first period, else yes."""
    return not NEGATIVES.isdisjoint(text.split(".")[0].replace(",", "").split(" "))


def score(
    answers: Sequence[dict],
    questions: Sequence[dict],
    labels: Mapping[str, Sequence[dict]],
    compat: bool = False,
) -> dict:
    """Accuracy, precision, recall, F1 and share of yes per category; "score" is 100 x the mean F1.

    Args:
        answers: ``question_id``, ``text``.
        questions: ``question_id``, ``image``, ``text``, ``category``.
        labels: for each category, ``image``, ``text`` (the bare question) and ``label``.
        compat: pair answers with labels by position within a category and stop at the shorter list, as the published
            scorer does; a lost or repeated answer then shifts all that follow.

    Raises:
        ValueError: without ``compat``, a question without answer or with two, or without label.
    """
    category_of = {question["question_id"]: question["category"] for question in questions}
    categories = [name for name in dict.fromkeys([*CATEGORIES, *labels]) if name in labels]
    result, items = {}, {}
    for category in categories:
        if compat:
            own = [answer for answer in answers if category_of[answer["question_id"]] == category]
            pairs = [
                (answer["question_id"], says_no(answer["text"]), entry["label"] == "no")
                for answer, entry in zip(own, labels[category], strict=False)
            ]
        else:
            pairs = _pair_by_id(answers, [q for q in questions if q["category"] == category], labels[category])
        result[category] = _measure([(not no, not truth) for _, no, truth in pairs])
        items |= {name: float(no == truth) for name, no, truth in pairs}
    mean_f1 = sum(part["f1"] for part in result.values()) / len(result)
    total = sum(part["samples"] for part in result.values())
    return {
        "metric": "mean F1",
        "score": 100.0 * mean_f1,
        "accuracy": 100.0 * sum(part["accuracy"] * part["samples"] for part in result.values()) / total,
        "average_f1": mean_f1,
        "categories": result,
        "items": items,
    }


def _pair_by_id(
    answers: Sequence[dict], questions: Sequence[dict], labels: Sequence[dict]
) -> list[tuple[int, bool, bool]]:
    texts: dict = {}
    own = {question["question_id"] for question in questions}
    for answer in answers:
        name = answer["question_id"]
        if name in own and name in texts:
            raise ValueError(f"POPE question {name} is answered twice; --compat pairs by position nevertheless")
        texts[name] = answer["text"]
    label_of = {(entry["image"], entry["text"]): entry["label"] for entry in labels}
    pairs = []
    for question in questions:
        name, key = question["question_id"], (question["image"], question["text"].split("\n")[0])
        if name not in texts:
            raise ValueError(f"POPE question {name} has no answer; --compat pairs by position nevertheless")
        if key not in label_of:
            raise ValueError(f"POPE question {name} ({key[0]}: {key[1]}) has no label")
        pairs.append((name, says_no(texts[name]), label_of[key] == "no"))
    return pairs


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


def harness_score(pairs: Sequence[tuple[str, str]]) -> dict:
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
