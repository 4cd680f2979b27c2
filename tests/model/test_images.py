"""Pictures of every kind become pixels; tiles and un-padding are LLaVA-NeXT's."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from llava.layout.views import NEWLINE, tiled_layout, unpadded_box
from llava.mm_utils import (
    anyres_grid,
    load_image,
    load_image_from_base64,
    process_images,
    resize_and_pad,
    select_best_resolution,
    to_rgb,
)
from records import GOLDEN, load_picture

GEOMETRY = json.loads((GOLDEN / "records/llava/anyres_geometry.json").read_text())


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


def test_address_without_network_is_a_clear_error():
    with pytest.raises(OSError, match=r"cannot fetch http://127\.0\.0\.1:9/picture\.png within 10 s"):
        load_image("http://127.0.0.1:9/picture.png")
