"""Text that others wrote, made fit for a terminal."""

from __future__ import annotations

import unicodedata

KEPT = "\n\t"
CATEGORIES = ("Cc", "Cf", "Cs")  # control characters, invisible ones that turn or hide text, lone halves of pairs
JOINERS = "\u200c\u200d"  # parts of words and of emoji


def printable(text: object) -> str:
    """``text`` with everything that would steer a terminal written out (``\\x1b``); lines and tabs stay.

    Answers of a model, names of files and values of a checkpoint are others' text: an escape sequence in them could
    rewrite what is on the screen, its title or the clipboard.
    """
    return "".join(_written(letter) for letter in str(text))


def _written(letter: str) -> str:
    if letter in KEPT or letter in JOINERS or unicodedata.category(letter) not in CATEGORIES:
        return letter
    return letter.encode("unicode_escape").decode() if letter.isascii() else f"\\u{ord(letter):04x}"
