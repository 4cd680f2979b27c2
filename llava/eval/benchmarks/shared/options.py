"""Answer options in the cells of a table."""

from __future__ import annotations

from collections.abc import Mapping

LETTERS = "ABCD"


def is_missing(cell: str | None) -> bool:
    """Whether a table's cell counts as no option: empty, or the text nan or none."""
    return cell is None or str(cell).lower() in ("nan", "none")


def named_options(row: Mapping) -> dict[str, str]:
    """All options by letter that the table has: what an answer may name, though the model is not shown "none"."""
    return {letter: row[letter] for letter in LETTERS if row.get(letter) is not None}


def shown_options(row: Mapping) -> dict[str, str]:
    """Options by letter up to the first missing one: what the model is shown."""
    options = {}
    for letter in LETTERS:
        if is_missing(row.get(letter)):
            break
        options[letter] = row[letter]
    return options
