"""From files and strings to what the model takes: pictures to pixels, prompts to token ids."""

from __future__ import annotations

import base64
import io
import math
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.layout.tiles import anyres_grid as anyres_grid  # geometry, also known from here
from llava.layout.tiles import most_tiles as most_tiles
from llava.layout.tiles import parse_pinpoints, select_best_resolution
from llava.layout.visuals import Reading

URL_TIMEOUT_SECONDS = 10
URL_MAX_BYTES = 32 * 1024 * 1024
MAX_PIXELS = 128 * 1024 * 1024  # beyond this a file is taken for a decompression bomb
SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")


# --- pictures ------------------------------------------------------------------------------------------------------


def load_image(source: str | Path) -> Image.Image:
    """Open a picture from a file or an http(s) address as upright RGB.

    Raises:
        ValueError: not an image, truncated, or more than `MAX_PIXELS` pixels; names the source and the reason.
        FileNotFoundError: no such file.
        OSError: the address cannot be reached in `URL_TIMEOUT_SECONDS` or holds more than `URL_MAX_BYTES`.
    """
    if str(source).startswith(("http://", "https://")):
        return decode_image(_download(str(source)), str(source))
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no image file at {path}")
    return decode_image(path.read_bytes(), str(path))


def load_image_from_base64(text: str) -> Image.Image:
    """Decode a picture stored as base64 text, as MMBench's tables do."""
    return decode_image(base64.b64decode(text), "base64 text")


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode an encoded picture; ``name`` stands in the error message. See `load_image`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{name} has {image.width} x {image.height} pixels, more than the limit of {MAX_PIXELS}")
        image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is larger than the limit of {MAX_PIXELS} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that Pillow can read") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} is a damaged or truncated image: {error}") from error
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn a picture of any mode upright and into 8-bit RGB; the first frame of an animation, colours under alpha."""
    image = ImageOps.exif_transpose(image)
    if image.mode in (*SIXTEEN_BIT_MODES, "I", "F"):
        values = np.asarray(image, dtype=np.float32)
        if image.mode in SIXTEEN_BIT_MODES or values.max(initial=0.0) > 255:
            values = values / 257.0  # 0..65535 to 0..255
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    return image.convert("RGB")


def _download(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=URL_TIMEOUT_SECONDS) as response:
            data = response.read(URL_MAX_BYTES + 1)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise OSError(f"cannot fetch {address} within {URL_TIMEOUT_SECONDS} s: {error}") from error
    if len(data) > URL_MAX_BYTES:
        raise OSError(f"{address} holds more than {URL_MAX_BYTES // 2**20} MiB")
    return data


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
    """
    reading = Reading.of(model_cfg).for_pictures(len(images))
    aspect_ratio = reading.image_aspect_ratio
    images = [to_rgb(image) for image in images]
    if str(aspect_ratio).startswith("anyres"):
        pinpoints = parse_pinpoints(reading.image_grid_pinpoints, view_side(image_processor))
        pixels = [process_anyres_image(image, image_processor, pinpoints) for image in images]
    else:
        if aspect_ratio == "pad":
            background = tuple(int(channel * 255) for channel in image_processor.image_mean)
            images = [expand_to_square(image, background) for image in images]
        pixels = [_preprocess([image], image_processor)[0] for image in images]
    return torch.stack(pixels) if len({p.shape for p in pixels}) == 1 else pixels


def _preprocess(images: Sequence[Image.Image], image_processor: Any) -> Tensor:
    return image_processor(images=list(images), return_tensors="pt")["pixel_values"]


def view_side(image_processor: Any) -> int:
    """Pixels along one side of a view: CLIP's processor crops to it, SigLIP's resizes to it."""
    size = getattr(image_processor, "crop_size", None) or image_processor.size
    return size["height"]


def expand_to_square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Centre the picture on a square canvas; an odd border is one pixel wider below or on the right."""
    side = max(image.size)
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
    return _preprocess([image.resize((overview_side, overview_side)), *tiles], image_processor)


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
    """Token ids of a prompt, ``<image>`` replaced by ``image_token_index``; one BOS in front.

    The text between placeholders is tokenised piece by piece, as in training.

    Returns:
        list of ids, or with ``return_tensors="pt"`` int64 (length,).
    """
    pieces = [encode_text(piece, tokenizer) for piece in prompt.split(DEFAULT_IMAGE_TOKEN)]
    ids = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    for i, piece in enumerate(pieces):
        ids += [image_token_index] * (i > 0) + piece
    if return_tensors is None:
        return ids
    if return_tensors != "pt":
        raise ValueError(f"return_tensors must be 'pt' or None, got {return_tensors!r}")
    return torch.tensor(ids, dtype=torch.long)


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
    """Last part of a path or hub name; for a training checkpoint, the folder above it as well."""
    parts = model_path.rstrip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") and len(parts) > 1 else parts[-1]
