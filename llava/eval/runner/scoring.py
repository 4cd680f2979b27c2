"""Score the answers of a run: the number that tables print, breakdowns, and the file to upload where a server scores.

python -m llava.eval.score gqa --answers-file playground/data/eval/gqa/answers/.../merge.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llava.eval.benchmarks import BENCHMARKS, OUTPUT_ROOT, locate
from llava.eval.benchmarks.base import Scoring
from llava.eval.benchmarks.mmvet import ask_judge
from llava.eval.files import read_json, read_whole_lines, require, write_json
from llava.eval.runner.completion import merge_chunks
from llava.eval.runner.journal import run_folder
from llava.eval.text import printable


def check_files(name: str, question_file: Path, data_root: Path, output_root: Path) -> None:
    """Raise MissingFile if scoring will lack a file that it cannot do without."""
    benchmark = BENCHMARKS[name]
    for relative in benchmark.needed_annotations(question_file):
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
    allow_missing: bool = False,
) -> dict | None:
    """Score answers, print the result, and keep it as ``score.json`` in the run's folder.

    Args:
        allow_missing: leave questions without an answer out, and say so first.

    Returns:
        the result, with "skipped" (how many questions were left out); ``None`` where only a server can score.

    Raises:
        ValueError: a question that was asked has no answer, or another fault of the files; before anything is written.
    """
    benchmark = BENCHMARKS[name]
    if answers_file.is_dir():
        answers_file = merge_chunks(answers_file)
    require(answers_file, benchmark.section)
    folder = run_folder(answers_file)
    skipped = read_whole_lines(folder / "skipped.jsonl") if (folder / "skipped.jsonl").is_file() else []
    settings, record = recorded(folder)
    known = Path(record["question_file"]) if "question_file" in record else None
    run = Scoring(
        benchmark,
        answers_file,
        [data_root, output_root],
        question_file or known or benchmark.find_questions(data_root, output_root),
        {line["question_id"] for line in skipped},
        settings.get("limit"),
        compat,
        judge,
    )
    missing = run.unanswered()
    if missing and not compat:
        said = f"{len(missing)} of {len(run.asked)} questions have no answer, first {missing[0]}"
        if not allow_missing:
            raise ValueError(
                f"{said}: {answers_file} is not complete, or of another list than {run.question_file}; "
                "--allow-missing leaves them out"
            )
        print(printable(f"NOT THE WHOLE BENCHMARK: {said}"))
        run.skip(missing)
    if skipped:
        first = printable(str(skipped[0]["question_id"]))
        print(f"NOT THE WHOLE BENCHMARK: {len(skipped)} questions were skipped, first {first}")
    if run.limit is not None:
        print(f"NOT THE WHOLE BENCHMARK: only its first {run.limit} questions were asked")
    try:
        result = benchmark.score(run)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"a file of the benchmark is of another form than EVAL.md, section {benchmark.section!r}, says "
            f"({type(error).__name__}: {error})"
        ) from error
    if result is not None:
        result = {"benchmark": name, "skipped": len(skipped) + (0 if compat else len(missing)), **result}
        write_json(folder / "score.json", result, indent=1)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 2 with one line on standard error if it could not."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.score", description=__doc__)
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--answers-file", type=Path, required=True, help="or a folder of chunks, to be merged first")
    parser.add_argument("--question-file", type=Path, help="default: that of the run")
    parser.add_argument("--data-root", type=Path, default=OUTPUT_ROOT, help="annotations (%(default)s)")
    parser.add_argument("--output-root", type=Path, default=OUTPUT_ROOT)
    parser.add_argument(
        "--allow-missing", action="store_true", help="leave questions without an answer out, and say so"
    )
    parser.add_argument("--compat", action="store_true", help="the published scorers' pairing by position")
    parser.add_argument("--judge-url", help="MM-Vet: an OpenAI-compatible address, such as http://localhost:8000/v1")
    parser.add_argument("--judge-model", default="gpt-4")
    parser.add_argument("--judge-key-file", type=Path, help="file that holds the address's key")
    options = parser.parse_args(arguments)
    judge = None
    try:
        if options.judge_url:
            key = options.judge_key_file.read_text().strip() if options.judge_key_file else None
            judge = ask_judge(options.judge_url, options.judge_model, key)
        score_file(
            options.benchmark,
            options.answers_file,
            options.data_root,
            options.output_root,
            options.question_file,
            options.compat,
            judge,
            options.allow_missing,
        )
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
