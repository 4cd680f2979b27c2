"""Deterministic toy scenes: many small objects on a textured, cluttered background.

A scene is fully determined by (split, index): ``make_scene("train", 7)`` gives the same picture on every machine.
Sizes are in *units* of 1/336 of the longer side. Objects stand on a grid of 14 units and are 2 to 6 cells wide: after
the picture has been padded to a square and resized to 336 px, whatever its own size, cells and patches coincide. A
large tower learns that a shape is the same at every offset; a tiny one would spend most of its training on it.

*Ordinary* scenes have 8 to 16 things. *Crowded* ones have 20 to 32 that share shapes and colours, among them large
textured things and a flock of one kind side by side: many patches that say the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from glyphs import GLYPH_HEIGHT, GLYPH_WIDTH, GLYPHS
from PIL import Image, ImageDraw

SHAPES = ("ball", "box", "star", "heart", "moon", "cross", "ring", "arrow", "house", "tree", "cup", "fish")
SIGN = "sign"
THINGS = (*SHAPES, SIGN)
COLORS = {
    "red": (215, 30, 35),
    "green": (35, 155, 60),
    "blue": (35, 75, 215),
    "yellow": (242, 218, 35),
    "orange": (245, 130, 20),
    "purple": (130, 45, 170),
    "pink": (248, 145, 195),
    "brown": (120, 68, 32),
    "white": (246, 246, 246),
    "black": (22, 22, 22),
}
COLOR_NAMES = tuple(COLORS)
BACKGROUNDS = ("bricks", "stripes", "checks", "dots", "sand", "clouds")
WORDS = (
    "EXIT", "STOP", "OPEN", "CAFE", "BUS", "TAXI", "ZOO", "PARK", "BANK", "SALE", "GO", "HOT",
    "ICE", "FARM", "GYM", "INN", "KEY", "LAB", "MILK", "NEWS", "PUB", "SHOP", "TEA", "WAY",
)  # fmt: skip
NUMBERS = tuple(str(number) for number in range(10, 100))
TEXTS = (*WORDS, *NUMBERS)
CHARACTERS = tuple(GLYPHS)
SIZES = ((336, 336), (336, 336), (336, 252), (252, 336), (336, 224), (224, 336), (448, 336), (336, 448))
COMPACT_SIZES = ((336, 252), (252, 336), (336, 224), (224, 336))
REFERENCE_SIDE = 336
CELL = 14
_SPLIT_IDS = {"train": 1, "test": 2, "val": 3}
_SUPERSAMPLING = 3


@dataclass(frozen=True)
class SceneObject:
    """One object. ``box`` is (left, top, right, bottom) in pixels of the picture; ``text`` only on signs."""

    shape: str
    color: str
    box: tuple[int, int, int, int]
    text: str | None = None

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Layout:
    """What is in a scene, without its pixels: all that a question needs. ``size`` is (width, height)."""

    objects: tuple[SceneObject, ...]
    background: str
    size: tuple[int, int]

    def boxes(self) -> list[dict]:
        """The objects as plain data for a JSON file."""
        return [
            {"shape": o.shape, "color": o.color, "box": list(o.box), **({"text": o.text} if o.text else {})}
            for o in self.objects
        ]


@dataclass(frozen=True)
class Scene:
    """A layout drawn: ``image`` RGB; ``instances`` (H, W) uint8, 0 background, k + 1 where object k is; ``letters``
    (H, W) uint8, 0 where nothing is written, else 1 + character + position * len(CHARACTERS), by its number in
    CHARACTERS and its position in the text.
    """

    layout: Layout
    image: Image.Image
    instances: np.ndarray
    letters: np.ndarray


def scene_rng(split: str, index: int, purpose: int = 0) -> np.random.Generator:
    """The generator of a scene (purpose 0) or of something derived from it; splits never share a seed."""
    return np.random.default_rng([_SPLIT_IDS[split], index, purpose])


# --------------------------------------------------------------------------------------------- shapes


def _polygon(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], side: int) -> None:
    draw.polygon([(x * side, y * side) for x, y in points], fill=255)


def _shape_mask(shape: str, side: int) -> np.ndarray:
    """Coverage of a shape in a square of ``side`` pixels: float (side, side) in 0..1."""
    big = side * _SUPERSAMPLING
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)

    def ellipse(left: float, top: float, right: float, bottom: float, fill: int = 255) -> None:
        draw.ellipse((left * big, top * big, right * big, bottom * big), fill=fill)

    def box(left: float, top: float, right: float, bottom: float, fill: int = 255) -> None:
        draw.rectangle((left * big, top * big, right * big, bottom * big), fill=fill)

    if shape == "ball":
        ellipse(0.04, 0.04, 0.96, 0.96)
    elif shape == "box":
        box(0.08, 0.08, 0.92, 0.92)
    elif shape == "star":
        angles = [-np.pi / 2 + k * np.pi / 5 for k in range(10)]
        radii = [0.54 if k % 2 == 0 else 0.2 for k in range(10)]
        _polygon(draw, [(0.5 + r * np.cos(a), 0.53 + r * np.sin(a)) for a, r in zip(angles, radii, strict=True)], big)
    elif shape == "heart":
        ellipse(0.02, 0.06, 0.54, 0.58)
        ellipse(0.46, 0.06, 0.98, 0.58)
        _polygon(draw, [(0.06, 0.43), (0.94, 0.43), (0.5, 0.98)], big)
    elif shape == "moon":
        ellipse(0.04, 0.02, 0.98, 0.98)
        ellipse(0.36, -0.06, 1.22, 0.8, fill=0)
    elif shape == "cross":
        box(0.36, 0.02, 0.64, 0.98)
        box(0.02, 0.36, 0.98, 0.64)
    elif shape == "ring":
        ellipse(0.02, 0.02, 0.98, 0.98)
        ellipse(0.27, 0.27, 0.73, 0.73, fill=0)
    elif shape == "arrow":
        box(0.02, 0.36, 0.58, 0.64)
        _polygon(draw, [(0.5, 0.08), (0.99, 0.5), (0.5, 0.92)], big)
    elif shape == "house":
        _polygon(draw, [(0.01, 0.48), (0.5, 0.02), (0.99, 0.48)], big)
        box(0.14, 0.48, 0.86, 0.98)
        box(0.4, 0.66, 0.6, 0.98, fill=0)
    elif shape == "tree":
        _polygon(draw, [(0.5, 0.0), (0.86, 0.42), (0.14, 0.42)], big)
        _polygon(draw, [(0.5, 0.22), (0.98, 0.74), (0.02, 0.74)], big)
        box(0.42, 0.74, 0.58, 0.99)
    elif shape == "cup":
        ellipse(0.52, 0.22, 1.0, 0.72)
        ellipse(0.64, 0.34, 0.88, 0.6, fill=0)
        _polygon(draw, [(0.02, 0.1), (0.74, 0.1), (0.64, 0.94), (0.12, 0.94)], big)
    elif shape == "fish":
        ellipse(0.0, 0.2, 0.76, 0.8)
        _polygon(draw, [(0.6, 0.5), (1.0, 0.16), (1.0, 0.84)], big)
    else:
        raise ValueError(f"unknown shape {shape!r}, expected one of {', '.join(SHAPES)}")
    return np.asarray(mask.resize((side, side), Image.BOX), dtype=np.float32) / 255


def _jitter(rng: np.random.Generator, color: str) -> np.ndarray:
    return np.clip(np.array(COLORS[color], dtype=np.float32) + rng.normal(0, 7, 3), 0, 255)


def _paint(pixels: np.ndarray, mask: np.ndarray, color: np.ndarray, left: int, top: int) -> None:
    """Blend ``color`` (3,) or (h, w, 3) into ``pixels`` (H, W, 3) where ``mask`` (h, w) is set."""
    height, width = mask.shape
    region = pixels[top : top + height, left : left + width]
    region += mask[..., None] * (color - region)


def draw_shape(
    pixels, instances, rng, number: int, shape: str, color: str, box: tuple[int, int, int, int], weave: float = 0
) -> None:
    """``weave``: period of a texture in pixels, 0 for none."""
    left, top, right, bottom = box
    mask = _shape_mask(shape, right - left)
    # Light from above: a vertical gradient, so that no object is a flat patch of one value.
    shade = np.linspace(1.08, 0.86, bottom - top, dtype=np.float32)[:, None, None]
    if weave:
        shade = shade * _weave(rng, right - left, weave)[..., None]
    _paint(pixels, mask, np.clip(_jitter(rng, color) * shade, 0, 255), left, top)
    instances[top:bottom, left:right][mask > 0.5] = number


def _weave(rng: np.random.Generator, side: int, period: float) -> np.ndarray:
    """Light and dark bands or checks, (side, side) around 1. At a period of more than a patch patches differ."""
    y, x = (np.mgrid[:side, :side].astype(np.float32) + rng.uniform(0, period, 2)[:, None, None]) % period
    bands, rows = x < period / 2, y < period / 2
    pattern = (bands, rows, bands ^ rows)[rng.integers(3)]
    return np.where(pattern, 1.12, 0.72).astype(np.float32)


def _draw_sign(pixels, instances, letters, rng, number: int, color: str, text: str, box, unit: float) -> None:
    """A plate with half a cell of margin around the characters, each in a cell of its own."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    plate = _jitter(rng, color)
    ink_color = np.array((15.0, 15.0, 15.0) if plate @ (0.3, 0.6, 0.1) > 110 else (250.0, 250.0, 250.0), np.float32)
    _paint(pixels, np.ones((height, width), np.float32), ink_color, left, top)
    _paint(pixels, np.ones((height - 2, width - 2), np.float32), plate, left + 1, top + 1)
    instances[top:bottom, left:right] = number
    size = round(2 * GLYPH_WIDTH * unit), round(2 * GLYPH_HEIGHT * unit)
    for position, character in enumerate(text):
        start, end = (round(left + (position + at) * CELL * unit) for at in (0.5, 1.5))
        ink = np.asarray(Image.fromarray(GLYPHS[character]).convert("L").resize(size, Image.BOX), np.float32) / 255
        _paint(pixels, ink, ink_color, (start + end - size[0]) // 2, round(top + CELL * unit / 2))
        letters[top:bottom, start:end] = 1 + CHARACTERS.index(character) + position * len(CHARACTERS)


# ----------------------------------------------------------------------------------------- background


def _smooth_noise(rng: np.random.Generator, width: int, height: int, cells: int) -> np.ndarray:
    """Bicubic noise (height, width) in about -1..1 with ``cells`` cells along the longer side."""
    step = max(width, height) / cells
    grid = rng.uniform(-1, 1, (int(height / step) + 2, int(width / step) + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.BICUBIC))


def _background(rng: np.random.Generator, kind: str, width: int, height: int) -> np.ndarray:
    """A muted texture (height, width, 3), float32. Patterned kinds are free of noise and compress well as PNG."""
    unit = max(width, height) / REFERENCE_SIDE
    base = rng.uniform(115, 185) + rng.normal(0, 8, 3).astype(np.float32)
    other = base + rng.choice((-1, 1)) * rng.uniform(22, 40)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    period = rng.uniform(12, 26) * unit
    if kind == "bricks":
        row = y // (period / 1.6)
        pattern = ((y % (period / 1.6)) < 2.2 * unit) | (((x + (row % 2) * period) % (2 * period)) < 2.2 * unit)
    elif kind == "stripes":
        angle = rng.choice((0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4))
        pattern = ((x * np.cos(angle) + y * np.sin(angle)) % period) < period / 2
    elif kind == "checks":
        pattern = ((x // (period / 1.5)) + (y // (period / 1.5))) % 2 == 0
    elif kind == "dots":
        pattern = ((x % period) - period / 2) ** 2 + ((y % period) - period / 2) ** 2 < (period / 3.6) ** 2
    elif kind == "sand":
        grain = _smooth_noise(rng, width, height, 110)
        return base + 26 * grain[..., None]
    elif kind == "clouds":
        haze = _smooth_noise(rng, width, height, 7) + 0.5 * _smooth_noise(rng, width, height, 17)
        return base + 30 * haze[..., None]
    else:
        raise ValueError(f"unknown background {kind!r}, expected one of {', '.join(BACKGROUNDS)}")
    return np.where(pattern[..., None], other, base).astype(np.float32)


def _clutter(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Scraps smaller than a patch, in object colours: they cost a method that only looks for variety its tokens."""
    height, width, _ = pixels.shape
    unit = max(width, height) / REFERENCE_SIDE
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(35, 70) * width * height / max(width, height) ** 2)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        color = tuple(int(v) for v in _jitter(rng, str(rng.choice(COLOR_NAMES))))
        size = rng.uniform(2, 5) * unit
        kind = rng.integers(3)
        if kind == 0:
            draw.ellipse((x - size / 2, y - size / 2, x + size / 2, y + size / 2), fill=color)
        elif kind == 1:
            angle = rng.uniform(0, np.pi)
            dx, dy = 1.6 * size * np.cos(angle), 1.6 * size * np.sin(angle)
            draw.line((x - dx, y - dy, x + dx, y + dy), fill=color, width=max(1, round(unit)))
        else:
            draw.rectangle((x, y, x + size, y + size), outline=color)
    return np.asarray(image).astype(np.float32)


# ---------------------------------------------------------------------------------------------- scenes


def _choose_things(rng: np.random.Generator) -> list[tuple[str, str, str | None]]:
    """8 to 16 (shape, colour, text): no pair twice, a few shapes absent, a few shapes exactly once."""
    count = int(rng.integers(8, 17))
    signs = int(rng.integers(1, 4))
    shapes = [str(s) for s in rng.permutation(SHAPES)[: rng.integers(5, 10)]]
    single, repeated = shapes[:3], shapes[3:]
    things: list[tuple[str, str, str | None]] = []
    for color in rng.permutation(COLOR_NAMES)[:signs]:
        text = rng.choice(WORDS) if rng.random() < 0.5 else rng.choice(NUMBERS)
        things.append((SIGN, str(color), str(text)))
    things += [(shape, str(rng.choice(COLOR_NAMES)), None) for shape in single]
    taken = {thing[:2] for thing in things}
    for _ in range(4 * count):
        if len(things) == count:
            break
        pair = (str(rng.choice(repeated)), str(rng.choice(COLOR_NAMES)))
        if pair not in taken:
            taken.add(pair)
            things.append((*pair, None))
    return things


def _choose_crowd(rng: np.random.Generator) -> list[tuple[str, str, str | None]]:
    """16 to 24 (shape, colour, text): two to four signs, three shapes that occur once, two colours
    that no other object has, and a crowd of few shapes in few colours, where neither the shape nor the colour alone
    tells what is meant. No pair twice; the last becomes the flock.
    """
    shapes, colors = [str(s) for s in rng.permutation(SHAPES)], [str(c) for c in rng.permutation(COLOR_NAMES)]
    single, repeated = shapes[:3], shapes[3 : 3 + rng.integers(5, 8)]
    rare, common = colors[:2], colors[2 : 2 + rng.integers(5, 8)]
    things: list[tuple[str, str, str | None]] = []
    for color in rng.permutation(common)[: rng.integers(2, 5)]:
        text = rng.choice(WORDS) if rng.random() < 0.5 else rng.choice(NUMBERS)
        things.append((SIGN, str(color), str(text)))
    things += [(shape, str(rng.choice(common)), None) for shape in single]
    things += [(str(rng.choice(repeated)), color, None) for color in rare]
    pairs = [(shape, color) for shape in repeated for color in common]
    return things + [(*pairs[k], None) for k in rng.permutation(len(pairs))[: rng.integers(9, 16)]]


def _crowd_extent(rng: np.random.Generator, text: str | None) -> tuple[int, int]:
    """Width and height in cells: two for most shapes, so that a crowd finds room, six for a few."""
    if text is None:
        side = int(rng.choice((2, 3, 4, 5, 6), p=(0.52, 0.24, 0.12, 0.07, 0.05)))
        return side, side
    return len(text) + 1, 2


def _flock_places(rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Six to nine boxes of two cells side by side, in a picture of the reference's size."""
    columns, rows = ((3, 2), (2, 3), (4, 2), (2, 4), (3, 3))[rng.integers(5)]
    cells = REFERENCE_SIDE // CELL
    left, top = rng.integers(0, cells - 2 * columns + 1), rng.integers(0, cells - 2 * rows + 1)
    corners = [(CELL * (left + 2 * c), CELL * (top + 2 * r)) for r in range(rows) for c in range(columns)]
    return [(int(x), int(y), int(x) + 2 * CELL, int(y) + 2 * CELL) for x, y in corners]


def _extent(rng: np.random.Generator, text: str | None) -> tuple[int, int]:
    """Width and height in cells: two or three for shapes, now and then four."""
    if text is None:
        side = int(rng.choice((2, 3, 3, 4), p=(0.4, 0.25, 0.25, 0.1)))
        return side, side
    return len(text) + 1, 2


def _place(
    rng: np.random.Generator, cells: tuple[int, int], shift: float, size: tuple[int, int], boxes: list
) -> tuple[int, int, int, int] | None:
    """A free place on the grid, at least a few pixels from all ``boxes``; None when the picture is full."""
    unit = max(size) / REFERENCE_SIDE
    columns, rows = (int(side / unit) // CELL for side in size)
    gap = 3 * unit
    for _ in range(60):
        column = rng.integers(0, columns - cells[0] + (shift == 0)) + shift
        row = rng.integers(0, rows - cells[1] + (shift == 0)) + shift
        left, top, width, height = (round(edge * CELL * unit) for edge in (column, row, *cells))
        right, bottom = left + width, top + height
        if all(right + gap < b[0] or left > b[2] + gap or bottom + gap < b[1] or top > b[3] + gap for b in boxes):
            return left, top, right, bottom
    return None


def make_scene(
    split: str,
    index: int,
    backgrounds: tuple = BACKGROUNDS,
    sizes: tuple = SIZES,
    most: int | None = None,
    crowded: bool = False,
) -> Scene:
    """Scene number ``index`` of ``split`` ("train", "val" or "test"), background and size drawn from those given.

    Args:
        most: objects, taken evenly from those that the scene would have; ``None`` takes all.
        crowded: about 20 to 32 objects, a flock of one kind among them, instead of 8 to 16; the picture is a square.
    """
    rng = scene_rng(split, index, purpose=21 if crowded else 0)
    if crowded:
        sizes = ((REFERENCE_SIDE, REFERENCE_SIDE),)
    choose, extent = (_choose_crowd, _crowd_extent) if crowded else (_choose_things, _extent)
    width, height = sizes[rng.integers(len(sizes))]
    unit = max(width, height) / REFERENCE_SIDE
    background = str(rng.choice(backgrounds))
    pixels = _clutter(rng, _background(rng, background, width, height))
    instances, letters = np.zeros((2, height, width), dtype=np.uint8)
    objects: list[SceneObject] = []
    things = choose(rng)
    if most is not None:
        things = things[:: max(1, len(things) // most)][:most]
    flock = _flock_places(rng) if crowded else []
    wanted = [(things[-1], box) for box in flock] + [(thing, None) for thing in (things[:-1] if flock else things)]
    for (shape, color, text), box in wanted:
        # Signs are shifted by half a cell, which puts every character on one patch.
        if box is None:
            box = _place(rng, extent(rng, text), 0.5 if text else 0.0, (width, height), [o.box for o in objects])
        if box is None:
            continue
        number = len(objects) + 1
        if text is None:
            large = crowded and box[2] - box[0] > 2 * CELL
            weave = rng.uniform(0.8, 2.2) * CELL if large else 0
            draw_shape(pixels, instances, rng, number, shape, color, box, weave)
        else:
            _draw_sign(pixels, instances, letters, rng, number, color, text, box, unit)
        objects.append(SceneObject(shape, color, box, text))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return Scene(Layout(tuple(objects), background, (width, height)), image, instances, letters)
