"""Question lists of the forms that several benchmarks share: JSON lines, and tables with the pictures in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llava.constants import ANSWER_FORMAT_INSTRUCTIONS, DEFAULT_IMAGE_TOKEN
from llava.eval.benchmarks.question import Question
from llava.eval.benchmarks.shared.options import is_missing, shown_options
from llava.eval.files import read_table, read_whole_lines

LETTER_INSTRUCTION, LETTER_INSTRUCTION_CN = ANSWER_FORMAT_INSTRUCTIONS[1], ANSWER_FORMAT_INSTRUCTIONS[2]
TABLE_COLUMNS = ("index", "question", "A", "B", "image")
LONGEST_INDEX = 12  # digits; a picture in base64 is longer


def questions_of_lines(file: Path, images: Path | None) -> list[Question]:
    """JSON lines with ``question_id``, ``text`` and, for a question about a picture, ``image``."""
    return [_from_line(number, line, file, images) for number, line in enumerate(read_whole_lines(file), start=1)]


def _from_line(number: int, line: dict, file: Path, images: Path | None) -> Question:
    where = f"{file}, question {number}"
    missing = [name for name in ("question_id", "text") if name not in line]
    if missing:
        raise ValueError(f"{where}, lacks {' and '.join(missing)}")
    text = check_text(line["text"], f"{where}: text")
    if DEFAULT_IMAGE_TOKEN in text:
        text = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
    image = line.get("image")
    place = None if image is None else picture_path(image, images, where)
    return Question(check_id(line["question_id"], where), text, text, place)


def check_id(name: Any, where: str) -> int | str:
    """An id if it is a number or a text. Raises ValueError naming the question."""
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise ValueError(f"{where}: question_id must be a number or a text, got {name!r}")
    return name


def check_text(text: Any, what: str) -> str:
    """A text if it is one that can be written. Raises ValueError naming the question."""
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a text, got {type(text).__name__}: {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has half of a character at place {error.start}: {text!r}") from error
    return text


def picture_path(image: Any, images: Path | None, where: str) -> Path:
    """The file of a picture, inside the folder of pictures (the present folder without one).

    Raises:
        ValueError: it is no name of a file, or leads out of the folder.
    """
    if isinstance(image, list):
        raise ValueError(f"{where} names several pictures, {image!r}: this runner asks about one")
    name = check_text(image, f"{where}: image")
    folder = os.path.abspath(images or "")
    place = os.path.abspath(os.path.join(folder, name))
    if "\0" in name or os.path.commonpath([folder, place]) != folder or place == folder:
        raise ValueError(f"{where}: the picture {name!r} is not inside the image folder {folder}")
    return Path(images or "") / name


def questions_of_table(file: Path, instruction: str) -> list[Question]:
    """A tab-separated table with a row per question: options in A to D, the picture as base64 text in ``image``.

    A cell that holds the index of another row means that row's picture.

    Raises:
        ValueError: a column is missing, or an index is none; names it.
    """
    rows = read_table(file, TABLE_COLUMNS)
    for number, row in enumerate(rows, start=1):
        if not str(row["index"] or "").strip().isdecimal():
            raise ValueError(f"{file}, row {number}: index must be a whole number, got {row['index']!r}")
    pictures = {int(row["index"]): row["image"] for row in rows}
    return [_from_row(row, pictures, instruction) for row in rows]


def _from_row(row: dict, pictures: dict[int, str | None], instruction: str) -> Question:
    options = shown_options(row)
    lines = [] if is_missing(row.get("hint")) else [row["hint"]]
    lines += [row["question"] or "", *(f"{letter}. {option}" for letter, option in options.items())]
    prompt = "\n".join(lines)
    extra = {"round_id": 0, "options": list(options.values()), "option_char": list(options)}
    image, fault = _picture_of(int(row["index"]), pictures)
    return Question(int(row["index"]), f"{prompt}\n{instruction}", prompt, image_data=image, extra=extra, fault=fault)


def _picture_of(index: int, pictures: dict[int, str | None]) -> tuple[str | None, str | None]:
    """A row's picture, from another row where its cell names one; and why it has none."""
    cell, seen = pictures[index], [index]
    while cell is not None and len(cell) <= LONGEST_INDEX and cell.strip().isdecimal():
        seen.append(int(cell))
        if int(cell) not in pictures or len(set(seen)) < len(seen):
            return None, f"row {index} has no picture: its cell leads to row {' and row '.join(map(str, seen[1:]))}"
        cell = pictures[int(cell)]
    if cell is None or not cell.strip():
        return None, f"row {seen[-1]} has no picture: its cell in the column image is empty"
    return cell, None
