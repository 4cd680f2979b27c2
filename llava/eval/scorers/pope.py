"""POPE: yes or no about objects, in three categories of sampling; the mean of the three F1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

CATEGORIES = ("adversarial", "random", "popular")
NEGATIVES = {"No", "no", "not"}
CATEGORY_STEP = 10_000_000  # question ids of the list: number within the category + category * step


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
    strangers = [answer["question_id"] for answer in answers if answer["question_id"] not in category_of]
    if strangers:
        raise ValueError(f"{len(strangers)} answers are to no POPE question, first {strangers[0]}")
    categories = [name for name in dict.fromkeys([*CATEGORIES, *labels]) if name in labels]
    result, items = {}, {}
    for category in categories:
        own = [answer for answer in answers if category_of[answer["question_id"]] == category]
        if compat:
            pairs = [
                (answer["question_id"], says_no(answer["text"]), entry["label"] == "no")
                for answer, entry in zip(own, labels[category], strict=False)
            ]
        else:
            pairs = _pair_by_id(own, [q for q in questions if q["category"] == category], labels[category])
        result[category] = _measure([(not no, not truth) for _, no, truth in pairs])
        if compat and own:  # answers beyond the last label are counted here, and only here
            said_yes = sum(not says_no(answer["text"]) for answer in own)
            result[category] |= {"samples": len(own), "yes_ratio": said_yes / len(own)}
        items |= {name: float(no == truth) for name, no, truth in pairs}
    mean_f1 = sum(part["f1"] for part in result.values()) / len(result)
    right = sum(part["TP"] + part["TN"] for part in result.values())
    wrong = sum(part["FP"] + part["FN"] for part in result.values())
    return {
        "metric": "mean F1",
        "score": 100.0 * mean_f1,
        "accuracy": 100.0 * _ratio(right, right + wrong),
        "average_f1": mean_f1,
        "categories": result,
        "items": items,
    }


def _pair_by_id(
    answers: Sequence[dict], questions: Sequence[dict], labels: Sequence[dict]
) -> list[tuple[int, bool, bool]]:
    """(question id, said no, is no) of a category's questions.

    A label is found by picture and question; where the two files word the question differently, by picture and number.
    """
    texts: dict = {}
    for answer in answers:
        if answer["question_id"] in texts:
            raise ValueError(
                f"POPE question {answer['question_id']} is answered twice; --compat pairs by position nevertheless"
            )
        texts[answer["question_id"]] = answer["text"]
    by_text = {(entry["image"], entry["text"]): entry["label"] for entry in labels}
    by_number = {(entry["image"], entry.get("question_id")): entry["label"] for entry in labels}
    pairs = []
    for question in questions:
        name, image, asked = question["question_id"], question["image"], question["text"].split("\n")[0]
        if name not in texts:
            raise ValueError(f"POPE question {name} has no answer; --compat pairs by position nevertheless")
        label = by_text.get((image, asked)) or by_number.get((image, int(name) % CATEGORY_STEP))
        if label is None:
            raise ValueError(f"POPE question {name} ({image}: {asked}) has no label")
        pairs.append((name, says_no(texts[name]), label == "no"))
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
