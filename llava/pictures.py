"""From files, addresses and base64 text to upright RGB pictures, whatever they hold.

What comes in is not trusted: only the decoders of `PICTURE_FORMATS` run (Pillow has others that start programs), sizes
are known before memory is taken, and every fault is a ValueError or OSError that names the picture.
"""

from __future__ import annotations

import base64
import binascii
import io
import logging
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from llava.downloads import download

logger = logging.getLogger(__name__)

PICTURE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF")
MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_PIXELS = 128 * 1024 * 1024  # beyond this a file is taken for a decompression bomb
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
DEPTHS = (8, 10, 12, 16)  # bits that cameras and microscopes fill of 16
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112  # EXIF tag: which of TURNS makes the picture upright


def load_image(source: str | Path) -> Image.Image:
    """Open a picture from a file or an http(s) address as upright RGB.

    Raises:
        ValueError: not a picture in one of `PICTURE_FORMATS`, damaged, or more than `MAX_PIXELS` pixels or
            `MAX_FILE_BYTES`; names the source and the reason.
        FileNotFoundError: no such file.
        OSError: the address cannot be fetched, see `llava.downloads.download`.
    """
    if str(source).lower().startswith(("http://", "https://")):
        return decode_image(download(str(source)), str(source))
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no image file at {path}")
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    return decode_image(data, str(path))


def load_image_from_base64(text: str) -> Image.Image:
    """Decode a picture stored as base64 text, as MMBench's tables do."""
    _check_bytes(len(text) * 3 // 4, "base64 text")
    try:
        data = base64.b64decode(text)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"a picture's base64 text is damaged: {error}") from error
    return decode_image(data, "base64 text")


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode an encoded picture; ``name`` stands in the error message. See `load_image`."""
    _check_bytes(len(data), name)
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=[kind for kind in PICTURE_FORMATS if kind in Image.OPEN])
            _check_pixels(image.size, name)
            image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is larger than the limit of {MAX_PIXELS} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that can be read; formats: {', '.join(PICTURE_FORMATS)}") from error
    except TooLarge:
        raise
    except MemoryError as error:
        raise TooLarge(f"{name} needs more memory than there is") from error
    except Exception as error:  # decoders of damaged data raise whatever they stumble over
        raise ValueError(f"{name} is a damaged or truncated image: {error}") from error
    try:
        return to_rgb(image)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


class TooLarge(ValueError):
    """A picture would take more memory than it may, or than there is."""


def _check_bytes(count: int, name: str) -> None:
    if count > MAX_FILE_BYTES:
        raise TooLarge(f"{name} is larger than the limit of {MAX_FILE_BYTES // 2**20} MiB")


def _check_pixels(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise TooLarge(f"{name} has {width} x {height} pixels, more than the limit of {MAX_PIXELS}")


def check_canvas(size: tuple[int, int], width: int, height: int, what: str) -> None:
    """Refuse a picture of ``size`` that becomes ``width`` x ``height`` pixels, before these are made.

    A strip of 1 x 20,000 pixels is a file of 300 bytes, and 400 million pixels once it is padded to a square.

    Raises:
        TooLarge: says what would be done to it.
    """
    if width * height > MAX_PIXELS:
        raise TooLarge(
            f"a picture of {size[0]} x {size[1]} pixels becomes {width} x {height} when {what}, more than the limit "
            f"of {MAX_PIXELS} pixels: cut it, or make it smaller"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn a picture of any mode upright and into 8-bit RGB; the first frame of an animation, colours under alpha.

    Raises:
        ValueError: a picture opened elsewhere in a format that is not in `PICTURE_FORMATS`, too many pixels, or
            numbers that are no brightness.
    """
    if image.format not in (None, *PICTURE_FORMATS):
        raise ValueError(f"a picture in the format {image.format} is not read; formats: {', '.join(PICTURE_FORMATS)}")
    _check_pixels(image.size, "a picture")
    image.load()
    turn = TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode in DEEP_MODES:
        image = Image.fromarray(_to_bytes(np.asarray(image, dtype=np.float32), image.mode))
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF's number for how the picture was taken; 1 (upright) where EXIF is junk: it is not the picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return image.getexif().get(ORIENTATION, 1)
    except Exception:  # the parser raises whatever it stumbles over
        return 1


def _to_bytes(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey levels of a deep picture as uint8, black staying black.

    Floats up to 1 are shares; NaN is a pixel without a value, and black. Otherwise the largest value tells how many
    bits were filled, as no file says it: 12 bits in a file of 16 would be black, read as 16.

    Raises:
        ValueError: infinite, negative, or beyond 16 bits.
    """
    empty = np.isnan(values)
    if empty.any():
        logger.warning("%d of a picture's %d pixels have no value (NaN): they are black", empty.sum(), empty.size)
        values = np.where(empty, np.float32(0), values)
    low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    if low < 0 or high > 2**16 - 1:
        raise ValueError(f"its values go from {low:g} to {high:g}: write it in 0..1, 0..255 or 0..65535")
    if mode == "F" and high <= 1:
        return (values * 255).round().astype(np.uint8)
    bits = next(bits for bits in DEPTHS if high <= 2**bits - 1)
    if bits < 16 and mode.startswith("I;16"):
        logger.warning("a picture of 16 bits whose largest value is %d is read as one of %d bits", high, bits)
    return (values * (255 / (2**bits - 1))).round().astype(np.uint8)
