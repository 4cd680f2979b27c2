"""Text that other programs read: no formulas in spreadsheets, no broken tables, nothing that steers a terminal."""

import pytest

from llava.eval.benchmarks.shared.spreadsheet import sheet_cell
from llava.eval.text import markdown_cell, no_formula, printable


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " =1"])
def test_formulas_become_text(text):
    assert no_formula(text) == f"'{text}"
    assert sheet_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["A", "-1.5", "+3", "a = b", "", "1e-3", "–"])
def test_other_text_is_left_as_it_is(text):
    assert no_formula(text) == text


def test_numbers_and_gaps_are_left_as_they_are():
    assert [sheet_cell(cell) for cell in (7, None)] == [7, None]


def test_a_cell_of_a_markdown_table_is_one_cell():
    assert markdown_cell("a|b\nc") == r"a\|b c"
    assert markdown_cell("<img src=x>") == "&lt;img src=x>"
    assert markdown_cell("plain (x) 1.5 †") == "plain (x) 1.5 †"


def test_a_terminal_is_not_steered():
    assert printable("a\x1b[2Jb\nc\x07") == "a\\x1b[2Jb\nc\\x07"
    assert printable("\u202egnp.exe") == "\\u202egnp.exe"
    assert printable("\ud83d") == "\\ud83d"
    assert printable("Où 火") == "Où 火"
