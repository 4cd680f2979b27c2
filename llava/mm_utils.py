"""From files and strings to what the model takes: pictures to pixels, prompts to token ids."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.layout.tiles import anyres_grid as anyres_grid  # geometry, also known from here
from llava.layout.tiles import most_tiles as most_tiles
from llava.layout.tiles import parse_pinpoints, select_best_resolution
from llava.layout.visuals import Reading
from llava.pictures import (  # LLaVA's code has the readers here
    TooLarge,
    check_canvas,
    to_rgb,
)
from llava.pictures import decode_image as decode_image
from llava.pictures import load_image as load_image
from llava.pictures import load_image_from_base64 as load_image_from_base64

# --- pictures ------------------------------------------------------------------------------------------------------


def process_images(images: Sequence[Image.Image], image_processor: Any, model_cfg: Any) -> Tensor | list[Tensor]:
    """Preprocess pictures the way the checkpoint was trained (``model_cfg.image_aspect_ratio``).

    "pad" centres each picture on a square of the mean colour: one view. "anyres", with or without a maximum behind it
    ("anyres_max_9"), adds tiles of a larger version: 1 + columns x rows views. Anything else resizes and crops to one
    view. With such a maximum (LLaVA-OneVision) several pictures of one prompt are padded squares.

    Args:
        images: the pictures of one prompt. Prompts of a batch whose checkpoint has a maximum are preprocessed one by
            one, because there the number of pictures decides.
        model_cfg: the model's configuration, or a `llava.layout.visuals.Reading` that differs from it.

    Returns:
        float32 (images, 3, s, s), with a views axis after the first for "anyres"; a list of (views, 3, s, s) where
        the numbers of views differ.

    Raises:
        ValueError: a picture that would take more memory than it may once it is padded or resized, or than there is;
            or a checkpoint whose pinpoints cannot be read.
    """
    reading = Reading.of(model_cfg).for_pictures(len(images))
    aspect_ratio = reading.image_aspect_ratio
    pinpoints = None
    if str(aspect_ratio).startswith("anyres"):
        pinpoints = parse_pinpoints(reading.image_grid_pinpoints, view_side(image_processor))
    pixels = []
    for image in images:
        try:
            pixels.append(_process_image(to_rgb(image), image_processor, aspect_ratio, pinpoints))
        except MemoryError as error:
            width, height = image.size
            raise TooLarge(f"a picture of {width} x {height} pixels needs more memory than there is") from error
    return torch.stack(pixels) if len({p.shape for p in pixels}) == 1 else pixels


def _process_image(
    image: Image.Image, image_processor: Any, aspect_ratio: str | None, pinpoints: Sequence[Sequence[int]] | None
) -> Tensor:
    """One RGB picture -> (3, s, s), or with pinpoints (views, 3, s, s)."""
    if pinpoints is not None:
        return process_anyres_image(image, image_processor, pinpoints)
    if aspect_ratio == "pad":
        background = tuple(int(channel * 255) for channel in image_processor.image_mean)
        square = expand_to_square(image, background)
        side = image_processor.size.get("shortest_edge") or image_processor.size["height"]
        image = square.resize((side, side), image_processor.resample)  # as the processor does, from a smaller copy
    return preprocess([image], image_processor)[0]


def preprocess(images: Sequence[Image.Image], image_processor: Any) -> Tensor:
    """Pictures as the tower takes them: float32 (images, 3, s, s). Raises TooLarge before a resize that is."""
    for image in images:
        check_resized(image.size, image_processor)
    return image_processor(images=list(images), return_tensors="pt")["pixel_values"]


def check_resized(size: tuple[int, int], image_processor: Any) -> None:
    """Raise TooLarge if a processor that resizes the shorter side makes too long a strip of ``size`` (w, h)."""
    shorter = (getattr(image_processor, "size", None) or {}).get("shortest_edge")
    if shorter:
        width, height = (math.ceil(side * shorter / min(size)) for side in size)
        check_canvas(size, width, height, "its shorter side is resized for the vision tower")


def view_side(image_processor: Any) -> int:
    """Pixels along one side of a view: CLIP's processor crops to it, SigLIP's resizes to it."""
    size = getattr(image_processor, "crop_size", None) or image_processor.size
    return size["height"]


def expand_to_square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Centre the picture on a square canvas; an odd border is one pixel wider below or on the right."""
    side = max(image.size)
    check_canvas(image.size, side, side, "padded to a square")
    canvas = Image.new("RGB", (side, side), background)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def process_anyres_image(image: Image.Image, image_processor: Any, pinpoints: Sequence[Sequence[int]]) -> Tensor:
    """LLaVA-NeXT's views of a picture: the whole squeezed into a square, then the tiles row by row.

    Returns:
        float32 (1 + columns x rows, 3, s, s).
    """
    side = view_side(image_processor)
    resolution = select_best_resolution(image.size, pinpoints)
    canvas = resize_and_pad(image, resolution)
    tiles = [
        canvas.crop((left, top, left + side, top + side))
        for top in range(0, canvas.height, side)
        for left in range(0, canvas.width, side)
    ]
    overview_side = image_processor.size.get("shortest_edge") or side
    return preprocess([image.resize((overview_side, overview_side)), *tiles], image_processor)


def resize_and_pad(image: Image.Image, resolution: tuple[int, int]) -> Image.Image:
    """Fit the picture into (width, height), centred on black."""
    width, height = resolution
    scale_width, scale_height = width / image.width, height / image.height
    if scale_width < scale_height:
        fitted = (width, min(math.ceil(image.height * scale_width), height))
    else:
        fitted = (min(math.ceil(image.width * scale_height), width), height)
    canvas = Image.new("RGB", (width, height), (0, 0, 0))
    canvas.paste(image.resize(fitted), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    return canvas


# --- prompts -------------------------------------------------------------------------------------------------------


def tokenizer_image_token(
    prompt: str,
    tokenizer: Any,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | Tensor:
    """Token ids of a prompt, ``<image>`` replaced by ``image_token_index``.

    The text between placeholders is tokenised piece by piece, as in training. A BOS stands in front where the
    tokenizer itself puts one. Where the loader has given it ``image_marks``, for checkpoints with
    ``mm_use_im_start_end``, these two ids stand around every placeholder that has none.

    Returns:
        list of ids, or with ``return_tensors="pt"`` int64 (length,).
    """
    begin, end = getattr(tokenizer, "image_marks", None) or (None, None)
    pieces = [encode_text(piece, tokenizer) for piece in prompt.split(DEFAULT_IMAGE_TOKEN)]
    ids = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
    for i, piece in enumerate(pieces):
        if i:
            marked = begin is None or ids[-1:] == [begin]
            ids += [image_token_index] if marked else [begin, image_token_index, end]
        ids += piece
    if return_tensors is None:
        return ids
    if return_tensors != "pt":
        raise ValueError(f"return_tensors must be 'pt' or None, got {return_tensors!r}")
    return torch.tensor(ids, dtype=torch.long)


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a BOS before texts (``add_bos_token``)."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """Ids of a piece of text without BOS, as SentencePiece gives them.

    SentencePiece puts a space before every text; the library's fast Llama tokenizer leaves it out where the text
    begins with a space of its own. One space more restores it. Tokenizers that keep leading spaces are left alone.
    """

    def encode(piece: str) -> list[int]:
        return tokenizer(piece, add_special_tokens=False).input_ids

    swallows_space = text.startswith(" ") and encode(" a") == encode("a")
    return encode(" " + text if swallows_space else text)


def get_model_name_from_path(model_path: str) -> str:
    """Last part of a path or hub name; for a training checkpoint, the folder above it as well.

    A snapshot in the hub's cache (``models--owner--name/snapshots/<commit>``) has the model's name, not the commit's.
    """
    cached = re.search(r"models--(?:[^/]+?--)?([^/]+)/snapshots/[^/]+/?$", model_path)
    if cached:
        return cached[1]
    parts = model_path.rstrip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") and len(parts) > 1 else parts[-1]
