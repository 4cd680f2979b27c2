"""An .xlsx file of one sheet, written without a library."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

from llava.eval.text import no_formula

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


def sheet_cell(value: str | int | None) -> str | int | None:
    """A cell that no spreadsheet program takes for a formula."""
    return no_formula(value) if isinstance(value, str) else value
