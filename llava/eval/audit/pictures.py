"""Pictures with questions, boxes around what each question asks about, and answers that count as right.

A folder holds ``audit.json`` and the pictures it names:

    {"pictures": [{"image": "cup.jpg", "questions": [
        {"text": "What is in the cup?", "rephrased": "What does the cup hold?",
         "boxes": [[left, top, right, bottom], ...], "answers": ["coffee"]}, ...two or more... ]}, ...]}

Boxes are in pixels of the stored picture. "answers" may be left out: then answers are compared with the unpruned ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava.mm_utils import load_image

AUDIT_FILE = "audit.json"
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class AskedPicture:
    """A question about one picture.

    Args:
        text, rephrased: the question, and the same in other words.
        boxes: (left, top, right, bottom) in pixels, around what it asks about.
        answers: what counts as right, in lower case; none where it is not known.
    """

    text: str
    rephrased: str
    boxes: tuple[Box, ...]
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class AuditPicture:
    """A picture and at least two questions about different things in it."""

    name: str
    image: Image.Image
    questions: tuple[AskedPicture, ...]


def load_pictures(folder: Path, limit: int | None = None) -> list[AuditPicture]:
    """The pictures of an audit folder, the first ``limit`` of them.

    Raises:
        FileNotFoundError: there is no audit.json, or a picture that it names is missing.
        ValueError: an entry lacks something; names the picture.
    """
    file = Path(folder) / AUDIT_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {AUDIT_FILE} in {folder}: see docs/audit.md for what stands in it")
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["pictures"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{file} must be a table with a list "pictures": {error}') from error
    if not entries:
        raise ValueError(f"{file} names no picture")
    return [_read(Path(folder), entry) for entry in entries[:limit]]


def _read(folder: Path, entry: dict[str, Any]) -> AuditPicture:
    name = entry.get("image")
    if not name:
        raise ValueError(f"an entry of {folder / AUDIT_FILE} names no image: {entry}")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"the picture {name} lies outside {folder}")
    questions = entry.get("questions") or []
    if len(questions) < 2:
        raise ValueError(f"the picture {name} has {len(questions)} questions: two are needed, about different things")
    image = load_image(path)
    return AuditPicture(name, image, tuple(_question(name, image, question) for question in questions))


def _question(name: str, image: Image.Image, question: dict[str, Any]) -> AskedPicture:
    missing = [field for field in ("text", "rephrased", "boxes") if not question.get(field)]
    if missing:
        raise ValueError(f"a question about {name} lacks {', '.join(missing)}: {question}")
    boxes = tuple(tuple(box) for box in question["boxes"])
    for box in boxes:
        left, top, right, bottom = box
        if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
            raise ValueError(f"the box {box} of {name} does not lie in its {image.width} x {image.height} pixels")
    answers = tuple(answer.lower() for answer in question.get("answers", ()))
    return AskedPicture(question["text"], question["rephrased"], boxes, answers)


def painted(image: Image.Image, boxes: tuple[Box, ...]) -> Image.Image:
    """A black picture of the same size, white inside the boxes: shows which tokens see them."""
    canvas = Image.new("RGB", image.size)
    for box in boxes:
        canvas.paste((255, 255, 255), box)
    return canvas
