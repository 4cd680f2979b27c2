"""What is asked: one question, however its benchmark's list writes it down."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """One thing to ask.

    Args:
        question_id: as in the question list; not unique in every benchmark.
        text: what follows the image placeholder, answer instruction included.
        prompt: what the answer line records.
        image: the picture's file; ``None`` for a question without one.
        image_data: the picture as base64 text, where the table holds it.
        extra: further fields of the answer line.
        fault: why it cannot be asked, as far as the list tells.
    """

    question_id: int | str
    text: str
    prompt: str
    image: Path | None = None
    image_data: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None

    @property
    def has_image(self) -> bool:
        return self.image is not None or self.image_data is not None
