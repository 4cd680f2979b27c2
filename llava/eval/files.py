"""Reading what benchmarks ship and writing what runs leave behind: JSON, JSON lines, tables."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# What table readers take for a missing value, beside the empty cell.
MISSING_CELLS = frozenset(
    ("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN")
    + ("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")
)


class MissingFile(FileNotFoundError):
    """A file of a benchmark is not where it belongs; the message tells its full path and where to read on."""


def require(path: Path, section: str, kind: str = "file") -> Path:
    """``path`` if it is there.

    Raises:
        MissingFile: names the full path and the section of EVAL.md that says where it comes from.
    """
    path = Path(path)
    if not (path.is_dir() if kind == "folder" else path.is_file()):
        raise MissingFile(f"no {kind} at {path.absolute()}; EVAL.md, section {section!r}, says where to get it")
    return path


def read_text(path: Path) -> str:
    """Contents of a text file, without a byte order mark. Raises ValueError naming the line that is not UTF-8."""
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}, is not UTF-8 ({error.reason}): save the file as UTF-8") from error


def read_json(path: Path) -> Any:
    """Contents of a JSON file. Raises ValueError naming the path where it is damaged."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error


def read_lines(path: Path) -> tuple[list[dict], int]:
    """Objects of a JSON-lines file, and how many lines hold none: broken ones, and blank ones amid the file."""
    found = [_object(line) for line in _lines(path)]
    return [row for row in found if row is not None], sum(row is None for row in found)


def read_whole_lines(path: Path) -> list[dict]:
    """Objects of a JSON-lines file; blank lines are none. Raises ValueError if a line is broken; names the first."""
    lines = [(number, line) for number, line in enumerate(_lines(path), start=1) if line.strip()]
    rows = [_object(line) for _, line in lines]
    broken = [number for (number, _), row in zip(lines, rows, strict=True) if row is None]
    if broken:
        raise ValueError(
            f"{path} has {len(broken)} broken lines, first line {broken[0]}: it is damaged, or not JSON lines in UTF-8"
        )
    return rows


def _lines(path: Path) -> list[bytes]:
    data = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    return data.removesuffix(b"\n").split(b"\n") if data else []


def _object(line: bytes) -> dict | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def encoded(text: str) -> bytes:
    """A text as its file holds it; halves of characters, as in names that are no UTF-8, as JSON's escapes."""
    return text.encode(errors="backslashreplace")


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old contents or the new ones and nothing between.

    A link is followed, and what is no file (a device, a pipe) is written to, not replaced.

    Raises:
        OSError: it cannot be written (disk full, ...); names the path.
    """
    path = Path(os.path.realpath(path))
    content = encoded(data) if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    replaced = not path.exists() or path.is_file()
    target = path.with_name(f".{path.name}.partial") if replaced else path  # one name: kills leave no more than one
    try:
        with target.open("wb") as file:
            file.write(content)
            file.flush()
            if replaced:
                os.fsync(file.fileno())
        if replaced:
            os.replace(target, path)
    except OSError as error:
        if replaced:
            target.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror}; run again when that is mended", str(path)) from error


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    write_whole(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def json_lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_table(path: Path, columns: Sequence[str] = ()) -> list[dict[str, str | None]]:
    """Rows of a tab-separated table with a header; cells that table readers take for missing become None.

    Raises:
        ValueError: one of ``columns`` is missing, or the file is no UTF-8; names it.
    """
    csv.field_size_limit(2**31 - 1)  # pictures are in the cells
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        there = ", ".join(reader.fieldnames or ()) or "none"
        raise ValueError(f"the table {path} has no column {' and no column '.join(missing)}; its columns: {there}")
    return [
        {name: None if not cell or cell in MISSING_CELLS else cell for name, cell in row.items() if name is not None}
        for row in reader
    ]
