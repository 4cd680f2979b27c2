"""Scenes as the vision tower sees them (336 x 336 pixels) with one label per patch, stored for training.

A view is the whole picture padded to a square, as LLaVA-1.5 does it, or one of LLaVA-NeXT's: the whole picture
squeezed into a square, or a tile cut from an enlarged picture. Patches carry the class of what covers them; those that
an object's edge covers a little are left out.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from files import write_bytes, write_with
from PIL import Image
from questions import Descriptor
from scenes import BACKGROUNDS, CHARACTERS, COLOR_NAMES, TEXTS, THINGS, Layout, Scene, make_scene, scene_rng
from tqdm import tqdm

VIEW, PATCH = 336, 14
GRID = VIEW // PATCH
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MEAN_COLOR = tuple(int(255 * value) for value in CLIP_MEAN)

BACKGROUND, UNSURE, PADDING = -1, -2, -3
SHAPE_CLASSES = (*THINGS, *BACKGROUNDS, "padding")
IGNORE = -100


@dataclass(frozen=True)
class View:
    """A picture of 336 x 336 and, pixel by pixel, which object is where and which character is written where."""

    image: Image.Image
    instances: np.ndarray
    letters: np.ndarray


def _centred(image: Image.Image, canvas: Image.Image) -> Image.Image:
    canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    return canvas


def padded_view(scene: Scene) -> View:
    """The picture centred on a square of CLIP's mean colour."""
    side = max(scene.layout.size)

    def square(image: Image.Image, fill, resample: Image.Resampling) -> Image.Image:
        canvas = Image.new(image.mode, (side, side), fill)
        return _centred(image, canvas).resize((VIEW, VIEW), resample)

    return _view(scene, square, MEAN_COLOR)


def squeezed_view(scene: Scene) -> View:
    """The picture stretched to 336 x 336."""
    return _view(scene, lambda image, fill, resample: image.resize((VIEW, VIEW), resample), MEAN_COLOR)


def tile_view(scene: Scene, rng: np.random.Generator) -> View:
    """One quarter of the picture enlarged up to twice and centred on black."""
    scale = rng.uniform(1, 2) * VIEW / max(scene.layout.size)
    size = tuple(round(scale * side) for side in scene.layout.size)
    left, top = (int(v) * VIEW for v in rng.integers(0, 2, 2))

    def tile(image: Image.Image, fill, resample: Image.Resampling) -> Image.Image:
        canvas = Image.new(image.mode, (2 * VIEW, 2 * VIEW), fill)
        return _centred(image.resize(size, resample), canvas).crop((left, top, left + VIEW, top + VIEW))

    return _view(scene, tile, (0, 0, 0))


def _view(scene: Scene, transform: Callable[..., Image.Image], fill: tuple[int, int, int]) -> View:
    """Picture and maps through the same ``transform``; outside the picture the instance map is 255."""
    instances = transform(Image.fromarray(scene.instances), 255, Image.NEAREST)
    letters = transform(Image.fromarray(scene.letters), 0, Image.NEAREST)
    return View(transform(scene.image, fill, Image.BICUBIC), np.asarray(instances), np.asarray(letters))


def patch_pixels(pixels: np.ndarray) -> np.ndarray:
    """(336, 336) -> the pixels of each patch (576, 196)."""
    return pixels.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)


def patch_objects(instances: np.ndarray, objects: int) -> np.ndarray:
    """Which object covers each patch: (336, 336) -> (576,) int8, or BACKGROUND, UNSURE, PADDING."""
    blocks = patch_pixels(instances)
    cover = np.stack([(blocks == number).mean(1) for number in range(1, objects + 1)])
    best, share = cover.argmax(0), cover.max(0)
    owner = np.where(share >= 0.2, best, np.where(cover.sum(0) > 0.03, UNSURE, BACKGROUND))
    return np.where((blocks == 255).mean(1) > 0.5, PADDING, owner).astype(np.int8)


def patch_labels(owner: np.ndarray, letters: np.ndarray, layout: Layout) -> np.ndarray:
    """Classes of every patch, (5, 576) int16: shape, colour, text of the object, the character that stands here and
    its position in the text; IGNORE where there is none.
    """
    labels = np.full((5, owner.size), IGNORE, dtype=np.int16)
    labels[0, owner == BACKGROUND] = len(THINGS) + BACKGROUNDS.index(layout.background)
    labels[0, owner == PADDING] = len(SHAPE_CLASSES) - 1
    for number, thing in enumerate(layout.objects):
        here = owner == number
        labels[0, here] = THINGS.index(thing.shape)
        labels[1, here] = COLOR_NAMES.index(thing.color)
        if thing.text:
            labels[2, here] = TEXTS.index(thing.text)
    blocks = patch_pixels(letters)
    for patch in np.flatnonzero((blocks > 0).mean(1) > 0.6):
        counts = np.bincount(blocks[patch])[1:]
        if counts.max() > 0.55 * blocks.shape[1]:
            labels[4, patch], labels[3, patch] = divmod(counts.argmax(), len(CHARACTERS))
    return labels


def descriptor_classes(descriptor: Descriptor) -> tuple[int, int, int]:
    """A descriptor as (shape, colour, text) class numbers, -1 where it is open."""
    pools = ((descriptor.shape, THINGS), (descriptor.color, COLOR_NAMES), (descriptor.text, TEXTS))
    return tuple(-1 if value is None else pool.index(value) for value, pool in pools)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 336, 336, 3) -> float32 (B, 3, 336, 336) as CLIP's image processor gives it."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def compressed(scene: Scene, rng: np.random.Generator) -> Scene:
    """More often than not with the traces of JPEG, as most test pictures have them."""
    if rng.random() < 0.4:
        return scene
    data = io.BytesIO()
    scene.image.save(data, "JPEG", quality=int(rng.integers(50, 91)))
    return replace(scene, image=Image.open(data).convert("RGB"))


@dataclass
class Views:
    """A stored set: pixels (N, 336, 336, 3) uint8, owners (N, 576), labels (N, 5, 576), layouts, padded (N,) bool."""

    pixels: np.ndarray
    owners: np.ndarray
    labels: np.ndarray
    layouts: list[Layout]
    padded: np.ndarray

    def __len__(self) -> int:
        return len(self.layouts)


def _build_view(job: tuple[str, int, bool]) -> tuple:
    """Pixels, owners, labels, layout of scene (split, index, crowded), and whether it is a padded view (80 %)."""
    split, index, crowded = job
    rng = scene_rng(split, index, 22 if crowded else 5)
    scene, kind = compressed(make_scene(split, index, crowded=crowded), rng), rng.random()
    makers = (padded_view, squeezed_view, lambda drawn: tile_view(drawn, rng))
    view = makers[int(np.searchsorted((0.8, 0.9), kind, side="right"))](scene)
    owner = patch_objects(view.instances, len(scene.layout.objects))
    labels = patch_labels(owner, view.letters, scene.layout)
    return np.asarray(view.image), owner, labels, scene.layout, kind < 0.8


def build_views(folder: Path, split: str, number: int, crowded: bool = False) -> Views:
    """Views of the first ``number`` scenes of ``split``, ordinary or crowded ones; stored in ``folder`` and read again
    at the next call.
    """
    name = f"{'crowd' if crowded else 'views'}-{split}-{number}"
    pixels_path, rest_path = (folder / f"{name}.{kind}" for kind in ("npy", "pkl"))
    if not rest_path.exists():
        pixels = np.empty((number, VIEW, VIEW, 3), np.uint8)
        rest = []
        with Pool() as pool:
            views = pool.imap(_build_view, ((split, index, crowded) for index in range(number)), chunksize=16)
            for index, (image, *view) in enumerate(tqdm(views, name, number, mininterval=5)):
                pixels[index] = image
                rest.append(view)
        owners, labels, layouts, padded = zip(*rest, strict=True)
        write_with(pixels_path, lambda file: np.save(file, pixels))
        write_bytes(rest_path, pickle.dumps((np.stack(owners), np.stack(labels), list(layouts), np.array(padded))))
    return Views(np.load(pixels_path, mmap_mode="r"), *pickle.loads(rest_path.read_bytes()))
