"""What a picture grows to in the library's own processors, known before it does."""

from __future__ import annotations

import math
from typing import Any

from llava.pictures import check_canvas


def check_picture_size(size: tuple[int, int], processor: Any) -> None:
    """Refuse a picture of ``size`` (width, height) that the processor would make too large.

    Two of the library's ways do: padding to a square, and resizing the shorter side without a limit for the longer.

    Args:
        processor: of pictures and text, or of pictures alone.

    Raises:
        ValueError: says what would be done to the picture.
    """
    images = getattr(processor, "image_processor", processor)
    if type(images).__name__.startswith("LlavaImageProcessor") and images.do_pad:
        check_canvas(size, max(size), max(size), "padded to a square")
        size = (max(size), max(size))
    edges = getattr(images, "size", None) or {}
    shorter = edges.get("shortest_edge")
    if not shorter or edges.get("longest_edge") or getattr(images, "image_grid_pinpoints", None):
        return  # bounded; with both edges they are limits on the area
    width, height = (math.ceil(side * shorter / min(size)) for side in size)
    check_canvas(size, width, height, "its shorter side is resized for the vision tower")
