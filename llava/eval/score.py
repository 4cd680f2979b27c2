"""Score the answers of a run: the number that tables print, breakdowns, and the file to upload where a server scores.

python -m llava.eval.score gqa --answers-file playground/data/eval/gqa/answers/.../merge.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.eval.benchmarks import BENCHMARKS, OUTPUT_ROOT, Benchmark, find_questions, locate
from llava.eval.files import (
    MissingFile,
    read_json,
    read_lines,
    read_table,
    read_whole_lines,
    require,
    spreadsheet,
    write_json,
    write_whole,
)
from llava.eval.journal import merge_chunks, run_folder
from llava.eval.scorers import gqa, mmbench, mme, mmvet, pope, scienceqa, textvqa, vizwiz, vqav2

ANNOTATIONS = {
    "gqa": ("data/testdev_balanced_questions.json",),
    "sqa": ("problems.json", "pid_splits.json"),
    "textvqa": ("TextVQA_0.5.1_val.json",),
    "pope": tuple(f"coco/coco_pope_{category}.json" for category in pope.CATEGORIES),
    "vqav2": ("llava_vqav2_mscoco_test2015.jsonl",),
}
SCIENCEQA_SPLIT = "test"


@dataclass
class Scoring:
    """What a scorer may read: the answers of a run, its benchmark, and where files are.

    Args:
        skipped: ids of questions that were left out because of their pictures.
        limit: how many questions were asked, if not all.
        compat: reproduce the published scorers where they are fragile.
        judge: MM-Vet's grader, if one was asked for.
    """

    benchmark: Benchmark
    answers_file: Path
    roots: list[Path]
    question_file: Path
    skipped: set
    limit: int | None = None
    compat: bool = False
    judge: Callable[[str, str, str], float] | None = None

    def file(self, relative: str) -> Path:
        """A file of the benchmark under one of the roots. Raises MissingFile."""
        return locate(self.roots, f"{self.benchmark.folder}/{relative}", self.benchmark.section)

    def optional(self, relative: str) -> Path | None:
        try:
            return self.file(relative)
        except MissingFile:
            return None

    def answers(self) -> list[dict]:
        return _with_fields(read_whole_lines(self.answers_file), self.answers_file)

    def answers_for_upload(self, all_questions: int) -> list[dict]:
        """Answers, without the broken lines; prints counts as the published converters do."""
        answers, broken = read_lines(self.answers_file)
        results = len({answer["question_id"] for answer in _with_fields(answers, self.answers_file)})
        print(f"total results: {results}, total split: {all_questions}, error_line: {broken}")
        return answers

    def questions(self) -> list[dict]:
        """The lines of the question list that were asked."""
        lines = read_whole_lines(self.question_file)[: self.limit]
        return [line for line in lines if line["question_id"] not in self.skipped]

    def beside(self, folder: str, suffix: str) -> Path:
        """The place of a derived file: the answers' path with another folder for ``answers``."""
        path = self.answers_file
        name = path.parent if path.name == "merge.jsonl" else path.with_suffix("")
        parts = list(name.parts)
        if "answers" in parts:
            parts[len(parts) - 1 - parts[::-1].index("answers")] = folder
        return Path(*parts[:-1], parts[-1] + suffix)


def _with_fields(answers: list[dict], file: Path) -> list[dict]:
    lacking = [name for answer in answers for name in ("question_id", "text") if name not in answer]
    if lacking:
        raise ValueError(f"{len(lacking)} lines of {file} lack fields of an answer, first {lacking[0]}")
    return answers


def score_gqa(run: Scoring) -> dict:
    predicted = gqa.predictions(run.answers())
    write_json(run.beside("answers", "") / "testdev_balanced_predictions.json", predicted)
    questions = read_json(run.file(ANNOTATIONS["gqa"][0]))
    asked = {line["question_id"] for line in run.questions()}
    known = {name: question for name, question in questions.items() if name in asked}
    counted, balanced = (sum(entry["isBalanced"] for entry in entries.values()) for entries in (known, questions))
    if counted < balanced and run.limit is None and not run.skipped:
        print(f"NOT THE WHOLE BENCHMARK: the question list has {counted} of the {balanced} balanced questions")
    result = gqa.score(predicted, known)
    print(gqa.report(result))
    return result


def score_scienceqa(run: Scoring) -> dict:
    problems, splits = (read_json(run.file(name)) for name in ANNOTATIONS["sqa"])
    split = [name for name in splits[SCIENCEQA_SPLIT] if name not in run.skipped]
    result = scienceqa.score(run.answers(), problems, split)
    write_json(run.beside("answers", "_output.jsonl"), result.pop("output"), indent=2)
    write_json(run.beside("answers", "_result.json"), result.pop("result"), indent=2)
    print(f"Total: {result['total']}, Correct: {result['correct']}, Accuracy: {result['accuracy']:.2f}%")
    print(f"IMG-Accuracy: {result['score']:.2f}% of {result['total_with_image']}")
    return result


def score_textvqa(run: Scoring) -> dict:
    result = textvqa.score(run.answers(), read_json(run.file(ANNOTATIONS["textvqa"][0]))["data"])
    print(f"Samples: {result['samples']}\nAccuracy: {result['score']:.2f}%")
    return result


def score_pope(run: Scoring) -> dict:
    labels = {name: read_whole_lines(run.file(f"coco/coco_pope_{name}.json")) for name in pope.CATEGORIES}
    result = pope.score(run.answers(), run.questions(), labels, run.compat)
    for name, part in result["categories"].items():
        measures = ("accuracy", "precision", "recall", "f1", "yes_ratio")
        print(f"{name} ({part['samples']}): " + ", ".join(f"{measure} {part[measure]:.4f}" for measure in measures))
    print(f"Average F1: {result['average_f1']:.4f}, accuracy over all: {result['accuracy']:.2f}%")
    return result


def score_mme(run: Scoring) -> dict:
    truth = mme.read_truth(
        locate(run.roots, f"{run.benchmark.folder}/{run.benchmark.image_folder}", run.benchmark.section, "folder")
    )
    lost = set(run.skipped)
    converted = mme.rows([answer for answer in run.answers() if answer["question_id"] not in lost], truth)
    place = run.beside("eval_tool/answers", "")
    for name, text in mme.upload(converted, run.compat).items():
        write_whole(place / name, text)
    result = mme.score(converted, run.compat)
    for task, part in result["tasks"].items():
        print(f"{task}: {part['points']:.2f} (acc {100 * part['acc']:.2f}, acc+ {100 * part['acc_plus']:.2f})")
    if result["missing_tasks"]:
        print(f"tasks without questions here, counted as 0: {', '.join(result['missing_tasks'])}")
    print(f"Perception: {result['perception']:.2f}\nCognition: {result['cognition']:.2f}")
    return result


def score_mmbench(run: Scoring) -> dict | None:
    table, answers = read_table(run.question_file)[: run.limit], run.answers()
    place = run.beside("answers_upload", ".xlsx")
    write_whole(place, spreadsheet(*mmbench.upload(answers, table)))
    print(f"to upload: {place}")
    if any(not row.get("answer") for row in table):
        return None
    lost = {int(index) % mmbench.ROTATION for index in run.skipped}
    result = mmbench.score(answers, [row for row in table if int(row["index"]) % mmbench.ROTATION not in lost])
    print(f"Circular accuracy (no judge): {result['score']:.2f}%, single pass: {result['single_pass']:.2f}%")
    return result


def score_vqav2(run: Scoring) -> dict | None:
    questions = run.questions()
    asked = {line["question_id"] for line in questions}
    find = run.file if _is_test(run.question_file) else run.optional
    whole = find(ANNOTATIONS["vqav2"][0])
    everything = read_whole_lines(whole) if whole else []
    if not asked <= {line["question_id"] for line in everything}:  # val
        everything = questions
    answers = run.answers_for_upload(len(everything))
    entries = vqav2.upload(answers, everything)
    place = run.beside("answers_upload", ".json")
    write_json(place, entries)
    print(f"to upload: {place}")
    annotations = run.optional("v2_mscoco_val2014_annotations.json")
    known = [] if annotations is None else read_json(annotations)["annotations"]
    # As a server scores an upload: unanswered questions are wrong, unless this run left them out on purpose.
    part = run.limit is not None or bool(run.skipped)
    scored = asked if part else {entry["question_id"] for entry in entries}
    known = [entry for entry in known if entry["question_id"] in scored]
    if not known:
        return None
    result = vqav2.score(entries, known)
    print(
        f"on the {len(known)} questions with annotations (val, not comparable with test-dev): {result['score']:.2f}%"
    )
    print_parts(result["per_answer_type"])
    return result


def _is_test(question_file: Path) -> bool:
    """Whether a VQAv2 list is of the test set, whose upload needs the list of all its questions."""
    return "test" in question_file.stem


def score_vizwiz(run: Scoring) -> dict | None:
    questions = run.questions()
    entries = vizwiz.upload(run.answers_for_upload(len(questions)), questions)
    place = run.beside("answers_upload", ".json")
    write_json(place, entries)
    print(f"to upload: {place}")
    annotations = run.optional("val.json")
    answered = {entry["image"] for entry in entries}
    known = [] if annotations is None else [entry for entry in read_json(annotations) if entry["image"] in answered]
    if not known:
        return None
    result = vizwiz.score(entries, known)
    print(f"on the {len(known)} questions with annotations (val): {result['score']:.2f}%")
    print_parts(result["per_answer_type"])
    return result


def print_parts(parts: dict[str, float]) -> None:
    for name, value in parts.items():
        print(f"  {name}: {value:.2f}%")


def score_mmvet(run: Scoring) -> dict | None:
    submission = mmvet.upload(run.answers())
    place = run.beside("answers_upload", ".json")
    write_json(place, submission)
    print(f"to upload: {place}")
    if run.judge is None:
        return None
    references = read_json(run.file("mm-vet.json"))
    lost = {f"v1_{name}" for name in run.skipped}
    result = mmvet.score(submission, {k: v for k, v in references.items() if k not in lost}, run.judge)
    print(f"Judge's mean grade: {result['score']:.2f}")
    return result


SCORERS: dict[str, Callable[[Scoring], dict | None]] = {
    "gqa": score_gqa,
    "sqa": score_scienceqa,
    "textvqa": score_textvqa,
    "pope": score_pope,
    "mme": score_mme,
    "mmbench": score_mmbench,
    "mmbench_cn": score_mmbench,
    "vqav2": score_vqav2,
    "vizwiz": score_vizwiz,
    "mmvet": score_mmvet,
}


def check_files(name: str, question_file: Path, data_root: Path, output_root: Path) -> None:
    """Raise MissingFile if scoring will lack a file that it cannot do without."""
    benchmark = BENCHMARKS[name]
    needed = ANNOTATIONS.get(name, ()) if name != "vqav2" or _is_test(question_file) else ()
    for relative in needed:
        locate([data_root, output_root], f"{benchmark.folder}/{relative}", benchmark.section)


def recorded(folder: Path) -> tuple[dict, dict]:
    """Settings and record of the run in ``folder``; empty where there is none."""
    if not (folder / "config.json").is_file():
        return {}, {}
    config = read_json(folder / "config.json")
    return config["settings"], config["record"]


def score_file(
    name: str,
    answers_file: Path,
    data_root: Path = OUTPUT_ROOT,
    output_root: Path = OUTPUT_ROOT,
    question_file: Path | None = None,
    compat: bool = False,
    judge: Callable[[str, str, str], float] | None = None,
) -> dict | None:
    """Score answers, print the result, and keep it as ``score.json`` in the run's folder.

    Returns:
        the result, with "skipped" (how many questions were left out); ``None`` where only a server can score.
    """
    benchmark = BENCHMARKS[name]
    if answers_file.is_dir():
        answers_file = merge_chunks(answers_file)
    require(answers_file, benchmark.section)
    folder = run_folder(answers_file)
    skipped = read_whole_lines(folder / "skipped.jsonl") if (folder / "skipped.jsonl").is_file() else []
    if skipped:
        print(f"NOT THE WHOLE BENCHMARK: {len(skipped)} questions were skipped, first {skipped[0]['question_id']}")
    settings, record = recorded(folder)
    known = Path(record["question_file"]) if "question_file" in record else None
    run = Scoring(
        benchmark,
        answers_file,
        [data_root, output_root],
        question_file or known or find_questions(benchmark, data_root, output_root),
        {line["question_id"] for line in skipped},
        settings.get("limit"),
        compat,
        judge,
    )
    if run.limit is not None:
        print(f"NOT THE WHOLE BENCHMARK: only its first {run.limit} questions were asked")
    result = SCORERS[name](run)
    if result is not None:
        result = {"benchmark": name, "skipped": len(skipped), **result}
        write_json(folder / "score.json", result, indent=1)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 2 with one line on standard error if it could not."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.score", description=__doc__)
    parser.add_argument("benchmark", choices=sorted(SCORERS))
    parser.add_argument("--answers-file", type=Path, required=True, help="or a folder of chunks, to be merged first")
    parser.add_argument("--question-file", type=Path, help="default: that of the run")
    parser.add_argument("--data-root", type=Path, default=OUTPUT_ROOT, help="annotations (%(default)s)")
    parser.add_argument("--output-root", type=Path, default=OUTPUT_ROOT)
    parser.add_argument("--compat", action="store_true", help="the published scorers' pairing by position")
    parser.add_argument("--judge-url", help="MM-Vet: an OpenAI-compatible address, such as http://localhost:8000/v1")
    parser.add_argument("--judge-model", default="gpt-4")
    parser.add_argument("--judge-key-file", type=Path, help="file that holds the address's key")
    options = parser.parse_args(arguments)
    judge = None
    try:
        if options.judge_url:
            key = options.judge_key_file.read_text().strip() if options.judge_key_file else None
            judge = mmvet.ask_judge(options.judge_url, options.judge_model, key)
        score_file(
            options.benchmark,
            options.answers_file,
            options.data_root,
            options.output_root,
            options.question_file,
            options.compat,
            judge,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
