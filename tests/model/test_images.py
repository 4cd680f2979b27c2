"""Pictures of every kind become pixels; tiles and un-padding are LLaVA-NeXT's."""

import base64
import io
import json
import os
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava import pictures
from llava.layout.views import NEWLINE, tiled_layout, unpadded_box
from llava.mm_utils import (
    anyres_grid,
    load_image,
    load_image_from_base64,
    parse_pinpoints,
    process_images,
    resize_and_pad,
    select_best_resolution,
    to_rgb,
)
from llava.model.multimodal_encoder.clip_encoder import CLIPImageProcessor
from records import GOLDEN, golden_bytes, load_picture

GEOMETRY = json.loads(golden_bytes(GOLDEN / "records/llava/anyres_geometry.json"))


@pytest.mark.parametrize("row", GEOMETRY["rows"], ids=lambda row: "x".join(map(str, row["size"])))
def test_recorded_geometry(row):
    size = tuple(row["size"])
    assert list(select_best_resolution(size, GEOMETRY["pinpoints"])) == row["best_resolution"]
    grid = anyres_grid(size, GEOMETRY["pinpoints"], 336)
    assert list(grid) == row["grid_w_h"]
    layout = tiled_layout(size, grid, 24, "spatial_unpad")
    assert layout.views == row["tiles"]
    assert len(layout.sequence) == row["num_visual_tokens"]
    top, left, height, width = unpadded_box(size, (grid[0] * 24, grid[1] * 24))
    assert [height, width] == row["unpadded_h_w"]
    if height and width:
        assert [top, left] == row["crop_top_left"]
    assert int((layout.sequence == NEWLINE).sum()) == height


def test_resized_picture_stands_where_recorded():
    for row in GEOMETRY["rows"][::10]:
        white = Image.new("RGB", tuple(row["size"]), (255, 255, 255))
        canvas = np.asarray(resize_and_pad(white, tuple(row["best_resolution"])))[..., 0] > 127
        rows, columns = canvas.any(1).nonzero()[0], canvas.any(0).nonzero()[0]
        assert [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] == row["resized_bbox"]


MODES = ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "I;16", "I", "F", "YCbCr", "HSV"]


@pytest.mark.parametrize("checkpoint", ["llava-v1.5-tiny", "llava-v1.6-vicuna-tiny"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_pixels(load, checkpoint, mode):
    _, model, processor, _ = load(checkpoint)
    picture = Image.new("L", (40, 30), 100).convert("I").convert("I;16") if mode == "I;16" else None
    picture = picture or Image.new("RGB", (40, 30), (100, 150, 200)).convert("L" if mode in "IF" else "RGB").convert(
        mode
    )
    pixels = process_images([picture], processor, model.config)
    assert pixels.shape[-3:] == (3, 336, 336)
    assert pixels.isfinite().all()


@pytest.mark.parametrize("checkpoint, views", [("llava-v1.5-tiny", 1), ("llava-v1.6-vicuna-tiny", 3)])
@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 2000), (5, 7)])
def test_extreme_sizes_are_answered(load, checkpoint, views, size):
    tokenizer, model, processor, _ = load(checkpoint)
    pixels = process_images([Image.new("RGB", size, (200, 10, 10))], processor, model.config)
    if checkpoint == "llava-v1.6-vicuna-tiny":
        assert pixels.shape[1] >= views
    ids = torch.tensor([[1, -200, *tokenizer("What?").input_ids[1:]]])
    answer = model.generate(ids, images=pixels, image_sizes=[size], max_new_tokens=2, min_new_tokens=2)
    assert answer.shape == (1, 2)


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    grey = np.asarray(to_rgb(Image.fromarray(ramp)))[..., 0]
    assert np.abs(grey.astype(int) - np.arange(256).reshape(16, 16)).max() <= 1


def test_exif_rotation_is_applied(tmp_path):
    picture = Image.new("RGB", (30, 10))
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter to the right
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png")
    assert upright.size == (10, 30)
    assert upright.getpixel((9, 0)) == (255, 0, 0)


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "moving.gif").getpixel((4, 4)) == (255, 0, 0)


def test_base64_picture():
    buffer = io.BytesIO()
    load_picture("square336").save(buffer, "PNG")
    decoded = load_image_from_base64(base64.b64encode(buffer.getvalue()).decode())
    assert np.array_equal(np.asarray(decoded), np.asarray(load_picture("square336").convert("RGB")))


def test_files_that_are_no_pictures_are_named(tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"notes\.png is not an image"):
        load_image(tmp_path / "notes.png")
    whole = (GOLDEN / "images/land640x480.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.png is a damaged or truncated image"):
        load_image(tmp_path / "cut.png")
    with pytest.raises(FileNotFoundError, match=r"no image file at .*gone\.png"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match="no image file"):
        load_image(tmp_path)


def test_image_bombs_are_refused_before_they_are_decoded(tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"20000 x 20000 pixels, more than the limit|larger than the limit"):
        load_image(tmp_path / "bomb.png")


# --- what is not trusted -------------------------------------------------------------------------------------------

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"


def png(*chunks, size=(4, 4)):
    """A grey-free RGB picture with further chunks (type, data) before its pixels."""
    rows = zlib.compress((b"\0" + b"\0\0\0" * size[0]) * size[1])
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("name", ["photo.png", "photo.eps"])
def test_a_picture_starts_no_program(tmp_path, monkeypatch, name):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    stand_in = tmp_path / "gs"
    stand_in.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\necho 10.0\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / name).write_bytes(POSTSCRIPT)
    with pytest.raises(ValueError, match=r"is not an image that can be read; formats: JPEG, MPO, PNG"):
        load_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"base64 text is not an image"):
        load_image_from_base64(base64.b64encode(POSTSCRIPT).decode())
    opened = Image.open(io.BytesIO(POSTSCRIPT))  # by a data set's own code: decoded only when it is first used
    with pytest.raises(ValueError, match="the format EPS is not read"):
        to_rgb(opened)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats_that_people_use(tmp_path, file_format):
    Image.new("RGB", (20, 10), (200, 30, 30)).save(tmp_path / "picture", file_format)
    read = np.asarray(load_image(tmp_path / "picture")).astype(int)
    assert read.shape == (10, 20, 3)
    assert np.abs(read - (200, 30, 30)).max() <= 8


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (3, 60000)])
def test_thin_pictures_are_refused_before_they_grow(load, size):
    """300 bytes of file would be 1.2 GB once padded, and more once the shorter side is resized."""
    processor = load("llava-v1.5-tiny")[2]
    assert isinstance(processor, CLIPImageProcessor)
    strip = Image.new("RGB", size)
    with pytest.raises(ValueError, match=r"becomes (20000 x 20000|60000 x 60000) when padded to a square"):
        process_images([strip], processor, SimpleNamespace(image_aspect_ratio="pad"))
    with pytest.raises(ValueError, match=r"becomes .* when its shorter side is resized for the vision tower"):
        process_images([strip], processor, SimpleNamespace(image_aspect_ratio=None))
    tiled = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=[[336, 672], [672, 336]])
    assert process_images([strip], processor, tiled).shape == (1, 3, 3, 336, 336)  # tiles never grow


def test_memory_that_runs_out_is_one_pictures_error(load, monkeypatch):
    _, model, processor, _ = load("llava-v1.5-tiny")

    def fails(*arguments, **options):
        raise MemoryError

    picture = Image.new("RGB", (40, 30))
    monkeypatch.setattr(Image, "new", fails)
    with pytest.raises(ValueError, match="40 x 30 pixels needs more memory than there is"):
        process_images([picture], processor, model.config)


def test_files_have_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_FILE_BYTES", 1 << 20)
    (tmp_path / "long.png").write_bytes(png() + bytes(1 << 20))
    with pytest.raises(ValueError, match=r"long\.png is larger than the limit of 1 MiB"):
        load_image(tmp_path / "long.png")
    with pytest.raises(ValueError, match="base64 text is larger"):
        load_image_from_base64("A" * (2 << 20))


@pytest.mark.parametrize(
    "text", ["(1x1),...,(99999x99999)", "[[336, 99999999]]", "[[-1, 336]]", "[]", "[1]", "(((((", [[]]]
)
def test_pinpoints_are_bounded(text):
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        parse_pinpoints(text, 336)


def test_junk_in_exif_does_not_matter(tmp_path):
    """EXIF tells how to turn a picture; it is not the picture."""
    (tmp_path / "junk.png").write_bytes(png((b"eXIf", b"garbage!")))
    assert load_image(tmp_path / "junk.png").size == (4, 4)
    for file_format in ("JPEG", "WEBP", "PNG"):
        for junk in (
            b"Exif\0\0junk",
            b"Exif\0\0II*\0\xff\xff\xff\xff",
            b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02",
        ):
            Image.new("RGB", (8, 4)).save(tmp_path / "junk", file_format, exif=junk)
            assert load_image(tmp_path / "junk").size == (8, 4)


RAMP = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)


DEEP = {
    "shares": RAMP,
    "float of 8 bits": RAMP * 255,
    "float of 16 bits": RAMP * 65535,
    "10 bits": (RAMP * 1023).astype(np.uint16),
    "12 bits": (RAMP * 4095).astype(np.uint16),
    "12 of 32 bits": (RAMP * 4095).astype(np.int32),
    "16 of 32 bits": (RAMP * 65535).astype(np.int32),
}


@pytest.mark.parametrize("values", DEEP.values(), ids=DEEP)
def test_deep_pictures_keep_their_content(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "deep.tif")
    grey = np.asarray(load_image(tmp_path / "deep.tif"))[..., 0].astype(int)
    assert np.abs(grey - RAMP * 255).max() <= 1


@pytest.mark.parametrize(
    "value, reason", [(np.inf, "from 0 to inf"), (-np.inf, "from -inf"), (-5, "from -5 to 0"), (1e9, "to 1e")]
)
def test_numbers_that_are_no_brightness_are_refused(tmp_path, value, reason):
    Image.fromarray(np.full((8, 8), value, np.float32)).save(tmp_path / "odd.tif")
    with pytest.raises(ValueError, match=rf"odd\.tif: its values .*{reason}"):
        load_image(tmp_path / "odd.tif")


def test_pixels_without_a_value_are_black_and_said(tmp_path, caplog):
    values = RAMP.copy()
    values[2, 3] = np.nan
    Image.fromarray(values).save(tmp_path / "masked.tif")
    grey = np.asarray(load_image(tmp_path / "masked.tif"))[..., 0].astype(int)
    assert grey[2, 3] == 0
    assert np.abs(grey - np.nan_to_num(values) * 255).max() <= 1
    assert "1 of a picture's 64 pixels have no value" in caplog.text


def test_a_padded_picture_is_resized_as_the_processor_does(load):
    _, model, processor, _ = load("llava-v1.5-tiny")
    picture = load_picture("land640x480")
    background = tuple(int(channel * 255) for channel in processor.image_mean)
    square = Image.new("RGB", (640, 640), background)
    square.paste(picture.convert("RGB"), (0, 80))
    expected = processor(images=[square], return_tensors="pt")["pixel_values"]
    assert torch.equal(process_images([picture], processor, model.config), expected)
