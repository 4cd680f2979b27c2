"""Reading the chosen letter out of a free answer, by the rules of lmms-eval's multiple-choice tasks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llava.eval.benchmarks.shared.vqa_text import one_line, remove_punctuation

OPTION_LETTERS = "ABCDEFGH"
EDGE_CHARACTERS = ",.!?;:'\""
# Looked for in the lower-cased text, each at its first place.
ANSWER_PHRASES = (
    *("answer is", "best answer is", "best option is", "choice is"),
    *("correct answer is", "correct choice is", "correct option is"),
    *("the answer is", "the best answer is", "the best option is", "the choice is"),
    *("the correct answer is", "the correct choice is", "the correct option is"),
    *("i choose", "i pick", "i select", "my answer is", "my choice is"),
    *("答案是", "答案为", "选", "答えは", "답:", "답은", "옵션", "정답은"),
)
LETTER_FORMS = ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} "))
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

    10 starts with it, 9 ends with it (no letter of any script beside it), 7 its first place anywhere after an answer
    phrase, 6 ``(A)``, 5 ``A.``, 4 ``A:``, 3 ``A)``, 2 ``A`` and a space or the end; any occurrence where no such form
    is found. Capitals only.
    """
    text = text.strip()
    for character in EDGE_CHARACTERS:
        text = text.strip(character)
    padded, bare = f" {text} ", text.strip()
    lowered = padded.lower()
    ends = [lowered.index(phrase) + len(phrase) for phrase in ANSWER_PHRASES if phrase in lowered]
    candidates = []
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            candidates.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            candidates.append((9, len(padded), letter))
        candidates += [(7, padded.index(letter, end), letter) for end in ends if letter in padded[end:]]
        forms = [(priority, form.format(letter)) for priority, form in LETTER_FORMS]
        candidates += [(priority, padded.rindex(form), letter) for priority, form in forms if form in padded]
    if not candidates:
        candidates = [(0, text.rindex(letter), letter) for letter in letters if letter in text]
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
    """MVBench: the letter of a line ``A. text`` in any case, else the first of a-e that stands alone; "" if none."""
    text = text.strip()
    start = re.fullmatch(r"([A-Ea-e])\.\s*.+", text)
    if start:
        return start[1].upper()
    cleaned = remove_punctuation(one_line(text)).lower()
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
