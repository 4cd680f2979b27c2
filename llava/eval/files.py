"""Reading what benchmarks ship and writing what runs leave behind: JSON, JSON lines, tables, spreadsheets."""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

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


def read_json(path: Path) -> Any:
    """Contents of a JSON file. Raises ValueError naming the path where it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error


def read_lines(path: Path) -> tuple[list[dict], int]:
    """Objects of a JSON-lines file, and how many lines hold none: broken ones, and blank ones amid the file."""
    rows, broken = [], 0
    for line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken += 1
    return rows, broken


def _lines(path: Path) -> list[str]:
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    return text.removesuffix("\n").split("\n") if text else []


def read_whole_lines(path: Path) -> list[dict]:
    """Objects of a JSON-lines file. Raises ValueError if a line is broken; blank lines are none."""
    rows, broken = read_lines(path)
    broken -= sum(not line.strip() for line in _lines(path)) if broken else 0
    if broken:
        raise ValueError(f"{path} has {broken} broken lines: it is damaged, or not JSON lines")
    return rows


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old contents or the new ones and nothing between.

    Raises:
        OSError: it cannot be written (disk full, ...); names the path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")  # of one name, so that kills leave no more than one behind
    try:
        with partial.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror}; run again when that is mended", str(path)) from error


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    write_whole(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def json_lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_table(path: Path) -> list[dict[str, str | None]]:
    """Rows of a tab-separated table with a header; cells that table readers take for missing become None."""
    csv.field_size_limit(2**31 - 1)  # pictures stand in the cells
    with Path(path).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        return [
            {name: None if not cell or cell in MISSING_CELLS else cell for name, cell in row.items()} for row in reader
        ]


# --- spreadsheets --------------------------------------------------------------------------------------------------

_SHEET_NAMESPACE = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_TYPES = "application/vnd.openxmlformats-officedocument.spreadsheetml"


def spreadsheet(header: Sequence[str], rows: Iterable[Sequence[str | int | None]]) -> bytes:
    """An .xlsx file of one sheet: texts, whole numbers, and nothing where a cell is None."""
    lines = [_sheet_row(1, header)] + [_sheet_row(number, row) for number, row in enumerate(rows, start=2)]
    sheet = f'<worksheet xmlns="{_SHEET_NAMESPACE}"><sheetData>{"".join(lines)}</sheetData></worksheet>'
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{_PACKAGE}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{_TYPES}.sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{_TYPES}.worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{_PACKAGE}/relationships"><Relationship Id="r1" '
        f'Type="{_OFFICE}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{_SHEET_NAMESPACE}" xmlns:r="{_OFFICE}"><sheets>'
        '<sheet name="Sheet1" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{_PACKAGE}/relationships"><Relationship Id="r1" '
        f'Type="{_OFFICE}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": sheet,
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in parts.items():
            archive.writestr(name, _HEAD + text)
    return buffer.getvalue()


def _sheet_row(number: int, cells: Sequence[str | int | None]) -> str:
    written = []
    for column, value in enumerate(cells):
        place = f"{chr(ord('A') + column)}{number}"
        if isinstance(value, int):
            written.append(f'<c r="{place}"><v>{value}</v></c>')
        elif value is not None and value != "":
            text = escape("".join(c for c in value if c in "\t\n" or ord(c) >= 32))
            written.append(f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>')
    return f'<row r="{number}">{"".join(written)}</row>'
