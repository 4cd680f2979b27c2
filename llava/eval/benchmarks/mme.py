"""MME: yes or no twice per image; accuracy plus accuracy over images with both answers right, summed over tasks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from llava.constants import ANSWER_FORMAT_INSTRUCTIONS
from llava.eval.benchmarks.base import HarnessSample, HarnessTask, OwnBenchmark, Scoring, locate
from llava.eval.benchmarks.shared.ids import id_key
from llava.eval.files import read_text, write_whole

# At most 200 points each.
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
YES_OR_NO = " Please answer yes or no."
SHORT_ANSWER = ANSWER_FORMAT_INSTRUCTIONS[0]

Truth = dict[tuple[str, str, str], str]


def read_truth(folder: Path) -> Truth:
    """(category, text file, question) -> "Yes" or "No", from the release's folder in either of its two layouts.

    Raises:
        ValueError: a line that is no question with its answer; names file and line.
    """
    truth: Truth = {}
    for category in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
        nested = category / "questions_answers_YN"
        for file in sorted((nested if nested.is_dir() else category).glob("*.txt")):
            for number, line in enumerate(read_text(file).splitlines(), start=1):
                if line.strip():
                    question, answer = _truth_of(line.strip(), file, number)
                    truth[category.name, file.name, question] = answer
    return truth


def _truth_of(line: str, file: Path, number: int) -> tuple[str, str]:
    parts = line.split("\t")
    if len(parts) != 2 or parts[1].strip().rstrip(".").lower() not in ("yes", "no"):
        raise ValueError(f"{file}, line {number}: expected a question, a tab, and Yes or No; got {line!r}")
    return parts[0], parts[1]


def rows(answers: Sequence[dict], truth: Truth) -> dict[str, list[tuple[str, str, str, str]]]:
    """Per category in answer order: (text file, question as the truth has it, Yes or No, answer).

    Raises:
        ValueError: an answer whose question the truth does not have.
    """
    converted = defaultdict(list)
    for answer in answers:
        path = PurePosixPath(str(answer["question_id"]))
        category, file = path.parts[0], path.name.split(".")[0] + ".txt"
        question = (
            answer["prompt"].replace(SHORT_ANSWER, "").strip()
            if SHORT_ANSWER in answer["prompt"]
            else (answer["prompt"])
        )
        if YES_OR_NO.strip() not in question:
            question += YES_OR_NO
            if (category, file, question) not in truth:
                question = question.replace(YES_OR_NO, " " + YES_OR_NO)
        if (category, file, question) not in truth:
            raise ValueError(f"MME has no question {question!r} in {category}/{file}")
        converted[category].append((file, question, truth[category, file, question], answer["text"]))
    return dict(converted)


def upload(converted: Mapping[str, Sequence[tuple[str, str, str, str]]], compat: bool = False) -> dict[str, str]:
    """Contents of ``<category>.txt``. Line breaks and tabs in answers become spaces, unless ``compat``."""

    def line(row: tuple[str, str, str, str]) -> str:
        text = row[3] if compat else " ".join(row[3].split("\n")).replace("\t", " ").replace("\r", " ")
        return "\t".join((*row[:3], text)) + "\n"

    return {f"{category}.txt": "".join(map(line, own)) for category, own in converted.items()}


def label(text: str) -> str:
    """ "yes", "no" or "other": by the whole answer, else by its first four characters."""
    text = text.lower()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def harness_label(text: str) -> str:
    """lmms-eval's reading: no periods, single letters understood."""
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text, "other") if len(text) == 1 else label(text)


def score(
    converted: Mapping[str, Sequence[tuple[str, str, str, str]]],
    compat: bool = False,
    read: Callable[[str], str] = label,
) -> dict:
    """Points per task, and totals of perception ("score") and cognition; a missing task gives 0 and is listed.

    Args:
        converted: what `rows` makes.
        compat: take consecutive lines as the pair of an image, and refuse answers that break lines, as the published
            scorer does; without it the two questions of an image are found by its name.

    Raises:
        ValueError: an image without exactly two answers; with ``compat``, an answer with a line break or tab.
    """
    tasks, items = {}, {}
    for category, own in converted.items():
        if compat and any(set(row[3]) & set("\n\r\t") for row in own):
            raise ValueError(f"an answer of MME's {category} has a line break or tab, which breaks the published file")
        judged = [(row, read(row[3]), row[2].strip().rstrip(".").lower()) for row in own]
        pairs, asked = defaultdict(list), defaultdict(set)
        for number, (row, said, truth) in enumerate(judged):
            key = number // 2 if compat else row[0]
            pairs[key].append(said == truth)
            asked[key].add(number if compat else row[1])
            items[f"{category}/{row[0]}/{row[1]}"] = float(said == truth)
        uneven = [key for key, right in pairs.items() if not len(right) == len(asked[key]) == 2]
        if uneven:
            raise ValueError(
                f"MME asks two questions about every image, but {category} has not one answer to each for {uneven[0]}"
            )
        tasks[category] = _task(judged, [all(right) for right in pairs.values()])
    totals = {
        name: sum(tasks[task]["points"] for task in members if task in tasks)
        for name, members in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    return {
        "metric": "perception points",
        "score": totals["perception"],
        **totals,
        "missing_tasks": [task for task in (*PERCEPTION, *COGNITION) if task not in tasks],
        "tasks": tasks,
        "items": items,
    }


def _task(judged: Sequence[tuple[tuple, str, str]], both_right: Sequence[bool]) -> dict:
    labels = [said for _, said, _ in judged]
    pairs = [(said, truth) for _, said, truth in judged]
    tp, fn = pairs.count(("yes", "yes")), pairs.count(("no", "yes"))
    tn, fp = pairs.count(("no", "no")), pairs.count(("yes", "no"))
    accuracy, accuracy_plus = (tp + tn) / len(pairs), sum(both_right) / len(both_right)
    return {
        "points": 100.0 * (accuracy + accuracy_plus),
        "acc": accuracy,
        "acc_plus": accuracy_plus,
        "TP": tp,
        "FN": fn,
        "TN": tn,
        "FP": fp,
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn) if tp + fn else 0.0,
        "other_num": labels.count("other"),
        "labels": labels,
    }


def harness_score(samples: Sequence[HarnessSample], release: str) -> float:
    """Perception's points of logged samples; the harness pairs the questions of an image by its question id."""
    own = defaultdict(list)
    for number, sample in enumerate(samples):
        row = (str(sample.record["question_id"]), str(number), sample.target, sample.answer)
        own[sample.record["category"]].append(row)
    return score(own, read=harness_label)["perception"]


class MME(OwnBenchmark):
    name, columns, place, scale = "mme", {"mme": "MME"}, 7, 20.0  # 2000 points of perception
    section, folder = "MME", "MME"
    question_file, image_folder = "llava_mme.jsonl", "MME_Benchmark_release_version"
    harness = HarnessTask("mme", ("mme_perception_score",), 1.0, rescore=harness_score)

    def score(self, run: Scoring) -> dict:
        truth = read_truth(locate(run.roots, f"{self.folder}/{self.image_folder}", self.section, "folder"))
        lost = {id_key(name) for name in run.skipped}
        converted = rows([answer for answer in run.answers() if id_key(answer["question_id"]) not in lost], truth)
        place = run.beside("eval_tool/answers", "")
        for name, text in upload(converted, run.compat).items():
            write_whole(place / name, text)
        result = score(converted, run.compat)
        for task, part in result["tasks"].items():
            print(f"{task}: {part['points']:.2f} (acc {100 * part['acc']:.2f}, acc+ {100 * part['acc_plus']:.2f})")
        if result["missing_tasks"]:
            print(f"tasks without questions here, counted as 0: {', '.join(result['missing_tasks'])}")
        print(f"Perception: {result['perception']:.2f}\nCognition: {result['cognition']:.2f}")
        return result


BENCHMARK = MME()
