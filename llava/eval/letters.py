"""Reading the chosen letter out of a free answer, by the rules of lmms-eval's multiple-choice tasks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llava.eval.normalise import remove_punctuation

EDGE_CHARACTERS = ",.!?;:'\""
ANSWER_PHRASES = (
    r"(?:answer|option|choice)\s*(?:is|are)?\s*[:：]?\s*",
    r"(?:答案|选择|选项|正确答案|選択肢|答え|正解)\s*(?:是|为|為|は)?\s*[:：]?\s*",
    r"(?:정답|답|선택)\s*(?:은|는)?\s*[:：]?\s*",
)
CIRCULAR_FORMS = (
    ("", "."),
    ("", ","),
    ("", ":"),
    ("", ")"),
    ("", ")."),
    ("(", ")"),
    ("(", ")."),
    (":", ""),
    (":", ","),
    (":", "."),
    (":", ")"),
    (":", ")."),
)
BEST_ANSWER_PHRASES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)


def general_letter(text: str, letters: str = "ABCD") -> str:
    """The letter by the form of highest priority in which one occurs, the last of equals; "" where none occurs.

    10 starts with it, 9 ends with it, 7 after an answer phrase, 6 ``(A)``, 5 ``A.``, 4 ``A:``, 3 ``A)``, 2 ``A`` and
    a space; any occurrence where no such form is found. Capitals only.
    """
    text = text.strip()
    for character in EDGE_CHARACTERS:
        text = text.strip(character)
    one = f"[{letters}]"
    candidates = [(10, m.start(), m[1]) for m in re.finditer(rf"\A\s*({one})(?![A-Za-z])", text)]
    candidates += [(9, m.start(), m[1]) for m in re.finditer(rf"(?<![A-Za-z])({one})\s*\Z", text)]
    for phrase in ANSWER_PHRASES:
        after = re.search(rf"(?i:{phrase})\(?({one})(?![A-Za-z])", text)
        if after:
            candidates.append((7, after.start(1), after[1]))
    for letter in letters:
        forms = ((6, f"({letter})"), (5, f"{letter}."), (4, f"{letter}:"), (3, f"{letter})"), (2, f"{letter} "))
        candidates += [(priority, text.rfind(form), letter) for priority, form in forms if form in text]
    if not candidates:
        candidates = [(0, m.start(), m[0]) for m in re.finditer(one, text)]
    return max(candidates, default=(0, 0, ""))[2]


def letter_by_rules(text: str, options: Mapping[str, str]) -> str | None:
    """MMBench's judge-free reading: a letter alone among the words, then a decorated one, then an option's text.

    Args:
        options: text of every option by letter.

    Returns:
        The letter, or None where no rule finds exactly one.
    """
    words = text.split()
    alone = [letter for letter in "ABCDE" if letter in words]
    if len(alone) == 1 and not (alone[0] == "A" and len(words) > 3):  # "A" may be an article there
        return alone[0]
    for before, after in CIRCULAR_FORMS:
        found = [letter for letter in "ABCDE" if f"{before}{letter}{after}" in words]
        if len(found) == 1:
            return found[0]
    named = [letter for letter, option in options.items() if str(option).lower() in text.lower()]
    return named[0] if len(named) == 1 else None


def mvbench_letter(text: str) -> str:
    """MVBench: ``A. ...`` at the start in any case, else the first letter a-e that stands alone; "" if none."""
    text = text.strip()
    start = re.match(r"([A-Ea-e])\.\s", text + " ")
    if start:
        return start[1].upper()
    cleaned = remove_punctuation(text).lower()
    alone = re.search(r"\b([a-e])\b", cleaned)
    return alone[1].upper() if alone else ""


def without_answer_phrases(text: str, phrases: Sequence[str] = BEST_ANSWER_PHRASES) -> str:
    text = text.strip()
    for phrase in phrases:
        text = text.replace(phrase, "")
    return text


def first_capital(text: str, letters: str, phrases: Sequence[str] = BEST_ANSWER_PHRASES) -> str:
    """First of ``letters`` anywhere after deleting answer phrases; "" if there is none."""
    found = re.search(f"[{letters}]", without_answer_phrases(text, phrases))
    return found[0] if found else ""


def letter_before_parenthesis(text: str) -> str:
    """MLVU in lmms-eval 0.3 to 0.6: the character before the first ``)``, else the whole text."""
    text = text.strip()
    return text[: text.index(")")][-1:] if ")" in text else text
