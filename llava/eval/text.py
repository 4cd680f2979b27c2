"""Text from models, files and arguments, where it is printed or put into a table that other programs read."""

from __future__ import annotations

import unicodedata

FORMULA_MARKS = ("=", "+", "-", "@", "\t", "\r")


def printable(text: str) -> str:
    """A text for a terminal: control characters, which may steer one, as their escapes; line breaks are kept."""
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs")
        else character.encode("unicode_escape").decode()
        for character in text
    )


def no_formula(text: str) -> str:
    """A text for a spreadsheet: an apostrophe before what would be read as a formula; numbers are none."""
    if not text.lstrip(" ").startswith(FORMULA_MARKS):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def markdown_cell(text: str) -> str:
    """A text for a cell of a Markdown table: one line, in which nothing ends the cell or begins a tag."""
    line = " ".join(printable(text).split())
    return line.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
