"""The questions that belong to the pictures of a prompt of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava.relevance.question import QueryScope, find_questions

MARK = "<image>"  # known to question.py as a picture, whatever this model's own placeholder looks like


def questions_of_pictures(
    prompt: Sequence[int], placeholder: Sequence[int], tokenizer: Any, scope: QueryScope, pictures: int
) -> list[str]:
    """The question of each picture, read out of the prompt by its chat template.

    Args:
        prompt: token ids with one placeholder for each picture.
        placeholder: the token ids that stand for a picture.
        pictures: how many there are; all get the latest question where the prompt shows another number.
    """
    pieces = split_at(list(prompt), list(placeholder))
    texts = [tokenizer.decode(piece, skip_special_tokens=False) if piece else "" for piece in pieces]
    if len(texts) - 1 != pictures:
        return [find_questions(MARK.join(texts), (), "latest_turn")[0].text] * pictures
    places, length = [], 0
    for text in texts[:-1]:
        length += len(text)
        places.append(length)
        length += len(MARK)
    return [question.text for question in find_questions(MARK.join(texts), places, scope)] if pictures else []


def split_at(ids: list[int], mark: list[int]) -> list[list[int]]:
    """Pieces of ``ids`` between the occurrences of ``mark``."""
    pieces, start, place = [], 0, 0
    while place <= len(ids) - len(mark):
        if ids[place : place + len(mark)] == mark:
            pieces.append(ids[start:place])
            place = start = place + len(mark)
        else:
            place += 1
    return [*pieces, ids[start:]]
