"""MMBench and MMBench-CN: circular accuracy without a judge, and the table that the server takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava.eval.benchmarks.base import OwnBenchmark, Question, Scoring, percent
from llava.eval.benchmarks.shared.letters import general_letter, letter_by_rules
from llava.eval.benchmarks.shared.options import LETTERS, named_options
from llava.eval.benchmarks.shared.question_lists import LETTER_INSTRUCTION, TABLE_COLUMNS, questions_of_table
from llava.eval.benchmarks.shared.spreadsheet import sheet_cell, spreadsheet
from llava.eval.files import read_table, write_whole

ROTATION = 1_000_000  # index of rotation k of base question i: i + k * ROTATION
DROPPED_COLUMNS = {"hint", "category", "source", "image", "comment", "l2-category"}
PREDICTION_COLUMN = 6


def extract(text: str, options: Mapping[str, str]) -> str:
    """The letter of an answer: by MMBench's rules, else by the general extractor; "" where both find none."""
    return letter_by_rules(text, options) or general_letter(text, LETTERS)


def upload(answers: Sequence[dict], table: Sequence[Mapping]) -> tuple[list[str], list[list]]:
    """Header and rows of the spreadsheet for the server; the last of repeated answers, an empty cell for none."""
    texts = {int(answer["question_id"]): answer["text"] for answer in answers}
    columns = [name for name in table[0] if name not in DROPPED_COLUMNS]
    rows = []
    for row in table:
        cells = [int(row[name]) if name == "index" else row[name] for name in columns]
        rows.append([*cells[:PREDICTION_COLUMN], texts.get(int(row["index"])), *cells[PREDICTION_COLUMN:]])
    return [*columns[:PREDICTION_COLUMN], "prediction", *columns[PREDICTION_COLUMN:]], rows


def score(answers: Sequence[dict], table: Sequence[Mapping]) -> dict:
    """Circular accuracy in percent: a base question is right if the answers of all its rotations are.

    Args:
        answers: ``question_id`` (the row's index), ``text``; the last of repeated ids counts, a missing one is wrong.
        table: rows with ``index``, options, ``answer``, ``category`` and ``l2-category``.

    Raises:
        ValueError: the table has no answers (a test split): only the server can score it.
    """
    if any(not row.get("answer") for row in table):
        raise ValueError("this MMBench table has no answers (test split): upload the .xlsx to the server instead")
    texts = {int(answer["question_id"]): answer["text"] for answer in answers}
    rotations = defaultdict(list)
    extracted, exact = {}, {}
    for row in table:
        index = int(row["index"])
        text = texts.get(index, "")
        extracted[index] = extract(text, named_options(row))
        exact[index] = text == row["answer"]
        rotations[index % ROTATION].append(extracted[index] == row["answer"])
    right = {base: float(all(rows)) for base, rows in rotations.items()}
    base_rows = [row for row in table if int(row["index"]) < ROTATION]
    return {
        "metric": "circular accuracy",
        "score": percent(right.values()),
        "category": _by(base_rows, right, "category"),
        "l2": _by(base_rows, right, "l2-category"),
        "base_questions": len(right),
        "single_pass": percent([extracted[int(row["index"])] == row["answer"] for row in base_rows]),
        "exact_letter_single_pass": percent([exact[int(row["index"])] for row in base_rows]),
        "missing": [int(row["index"]) for row in table if int(row["index"]) not in texts],
        "extracted": extracted,
        "items": right,
    }


def _by(rows: Sequence[Mapping], right: Mapping[int, float], column: str) -> dict[str, float]:
    groups = defaultdict(list)
    for row in rows:
        groups[row[column]].append(right[int(row["index"])])
    return {name: percent(values) for name, values in sorted(groups.items())}


class MMBench(OwnBenchmark):
    name, columns, place = "mmbench", {"mmbench": "MMB"}, 8
    section, folder = "MMBench", "mmbench"
    question_file, max_new_tokens = "mmbench_dev_20230712.tsv", 1024
    instruction = LETTER_INSTRUCTION

    def read_questions(self, file: Path, images: Path | None) -> list[Question]:
        return questions_of_table(file, self.instruction)

    def score(self, run: Scoring) -> dict | None:
        table, answers = read_table(run.question_file, TABLE_COLUMNS)[: run.limit], run.answers()
        place = run.beside("answers_upload", ".xlsx")
        header, rows = upload(answers, table)
        write_whole(place, spreadsheet(header, ([sheet_cell(cell) for cell in row] for row in rows)))
        print(f"to upload: {place}")
        if any(not row.get("answer") for row in table):
            return None
        lost = {int(index) % ROTATION for index in run.skipped}
        result = score(answers, [row for row in table if int(row["index"]) % ROTATION not in lost])
        print(f"Circular accuracy (no judge): {result['score']:.2f}%, single pass: {result['single_pass']:.2f}%")
        return result


BENCHMARK = MMBench()
