"""Short clips of the toy's objects, with questions about what moves, appears and comes first; and what Script keeps.

    python scripts/toy/clips.py --clips 24 --keep-tokens 8
    python scripts/toy/clips.py --write FOLDER

No language model was trained on clips: the image toy sees them frame by frame, through the path of LLaVA-Video (pooled
features, one selection of all frames). What can be measured with it is whether the selection follows the asked object
over time; the answers to the questions stand beside them for a model that could give them.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from questions import NO, YES, Descriptor, Question, article
from scenes import CELL, COLOR_NAMES, REFERENCE_SIDE, SHAPES, Scene, SceneObject, draw_shape, make_scene, scene_rng

from llava.conversation import conv_templates
from llava.layout.visuals import Reading
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import DEFAULT_CHECKPOINT, load_pretrained_model
from llava.model.encoded_images import EncodedImages
from llava.pruning import Pruner, get_pruner
from llava.video import Video, process_video

FIRST_CLIP = 200_000  # of the test split: no picture of the toy's data has such a number
FRAMES = 8
WIDTH = 3  # cells of a moving object
GRID = REFERENCE_SIDE // CELL
POOLED = GRID // 2  # tokens along one side of a frame


@dataclass(frozen=True)
class Actor:
    """An object that moves or comes later: ``boxes`` has (left, top, right, bottom) for each frame, or ``None``."""

    shape: str
    color: str
    boxes: tuple[tuple[int, int, int, int] | None, ...]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def moves(self) -> bool:
        return len({box for box in self.boxes if box is not None}) > 1

    @property
    def first_frame(self) -> int:
        return next(t for t, box in enumerate(self.boxes) if box is not None)

    def cells(self) -> np.ndarray:
        """(T, n) bool: tokens of the pooled frames whose centre lies on it."""
        centre = (np.arange(POOLED) + 0.5) * 2 * CELL
        masks = np.zeros((len(self.boxes), POOLED, POOLED), dtype=bool)
        for mask, box in zip(masks, self.boxes, strict=True):
            if box is not None:
                left, top, right, bottom = box
                mask |= ((centre >= top) & (centre < bottom))[:, None] & ((centre >= left) & (centre < right))
        return masks.reshape(len(self.boxes), -1)


@dataclass(frozen=True)
class Clip:
    """Frames of a scene with a mover, an object that comes later, and what stays as it is."""

    frames: tuple[Image.Image, ...]
    actors: tuple[Actor, ...]
    questions: tuple[Question, ...]

    def asked(self, question: Question) -> np.ndarray:
        """(T, n) bool: tokens that show an object that the question is about."""
        about = [
            actor.cells()
            for actor in self.actors
            if any(d.matches(SceneObject(actor.shape, actor.color, (0, 0, 0, 0))) for d in question.asked)
        ]
        return np.logical_or.reduce(about)


def make_clip(split: str, index: int, frames: int = FRAMES) -> Clip:
    """Clip number ``index`` of a split: a toy scene of 336 x 336, in which one object moves and one comes later."""
    scene = make_scene(split, index, sizes=((REFERENCE_SIDE, REFERENCE_SIDE),))
    rng = scene_rng(split, index, purpose=11)
    taken = {(thing.shape, thing.color) for thing in scene.layout.objects}
    pairs = [(shape, color) for shape in SHAPES for color in COLOR_NAMES if (shape, color) not in taken]
    mover, comer = (pairs[k] for k in rng.permutation(len(pairs))[:2])
    track = _free_track(rng, scene, frames, ())
    place = _free_track(rng, scene, frames, track, still=True)
    start = int(rng.integers(2, frames - 2))
    actors = (Actor(*mover, track), Actor(*comer, tuple(box if t >= start else None for t, box in enumerate(place))))
    seed = int(rng.integers(2**31))
    pictures = [_draw(scene, actors, t, seed) for t in range(frames)]
    return Clip(tuple(pictures), actors, _questions(actors))


def _free_track(rng: np.random.Generator, scene: Scene, frames: int, beside: tuple, still: bool = False) -> tuple:
    """A box for each frame, a cell further at each, over the fewest pixels of other objects among random tracks."""
    covered = scene.instances > 0
    for left, top, right, bottom in beside:
        covered = covered.copy()
        covered[top:bottom, left:right] = True
    best: tuple[int, tuple] | None = None
    for _ in range(200):
        step = (0, 0) if still else ((1, 0), (-1, 0), (0, 1), (0, -1))[rng.integers(4)]
        column, row = rng.integers(0, GRID - WIDTH, 2)
        cells = [(column + step[0] * t, row + step[1] * t) for t in range(frames)]
        if not all(0 <= x <= GRID - WIDTH and 0 <= y <= GRID - WIDTH for x, y in cells):
            continue
        boxes = tuple(tuple(int(CELL * edge) for edge in (x, y, x + WIDTH, y + WIDTH)) for x, y in cells)
        crossed = sum(int(covered[top:bottom, left:right].sum()) for left, top, right, bottom in boxes)
        if best is None or crossed < best[0]:
            best = crossed, boxes
    return best[1]


def _draw(scene: Scene, actors: tuple[Actor, ...], frame: int, seed: int) -> Image.Image:
    pixels = np.asarray(scene.image).astype(np.float32)
    for actor in actors:
        if actor.boxes[frame] is not None:
            shade = np.random.default_rng(seed)  # the same in every frame
            draw_shape(pixels, scene.instances.copy(), shade, 1, actor.shape, actor.color, actor.boxes[frame])
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _questions(actors: tuple[Actor, ...]) -> tuple[Question, ...]:
    """Two per actor, and one about both."""
    asked = [Descriptor(actor.shape, actor.color) for actor in actors]
    questions = []
    for actor, descriptor in zip(actors, asked, strict=True):
        noun = article(actor.name)
        later = YES if actor.first_frame else NO
        questions.append(Question(f"Is there {noun} that moves?", YES if actor.moves else NO, "moves", (descriptor,)))
        questions.append(Question(f"Is there {noun} that appears later?", later, "appears", (descriptor,)))
    first = min(actors, key=lambda actor: actor.first_frame)
    names = " or ".join(f"the {actor.name}" for actor in actors)
    questions.append(Question(f"What comes first, {names}?", f"The {first.name}", "first", tuple(asked)))
    return tuple(questions)


def kept_per_frame(model, question: Question, pruner: Pruner, encoded: EncodedImages) -> np.ndarray:
    """(T, n) bool: the tokens of each frame that are kept for a question."""
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{question.text}")
    ids = torch.tensor([tokenizer_image_token(conversation.get_prompt(), model.tokenizer)])
    return model.embed_prompts(ids, images=encoded, pruner=pruner, query=question.text).kept[0].mask().numpy()


def encode_clip(model, processor, clip: Clip) -> EncodedImages:
    """A clip after the vision side, pooled as LLaVA-Video's evaluation pools it."""
    video = Video(list(clip.frames), list(range(len(clip.frames))))
    reading = Reading.of(model.config, mm_spatial_pool_mode="average")
    with torch.inference_mode():
        return model.encode_pictures(model.visuals([process_video(video, processor)], None, "video", reading))


def found_over_time(model, processor, clips: int, pruners: dict[str, Pruner]) -> dict[str, dict[str, float]]:
    """By method: in how many frames with an asked object a token on it is kept, and the share of kept tokens on it."""
    values: dict[str, dict[str, list[float]]] = {name: {"frames": [], "share": []} for name in pruners}
    for number in range(clips):
        clip = make_clip("test", FIRST_CLIP + number)
        encoded = encode_clip(model, processor, clip)
        for question in clip.questions:
            asked = clip.asked(question)
            shown = asked.any(1)
            for name, pruner in pruners.items():
                kept = kept_per_frame(model, question, pruner, encoded)
                values[name]["frames"] += (kept & asked).any(1)[shown].tolist()
                values[name]["share"].append((kept & asked)[shown].sum() / max(int(kept[shown].sum()), 1))
    return {name: {k: float(statistics.mean(v)) for k, v in cells.items()} for name, cells in values.items()}


def write_clip(clip: Clip, folder: Path) -> None:
    """Save the frames as a folder that `llava.serve.cli --video-file` reads, and print the questions."""
    folder.mkdir(parents=True, exist_ok=True)
    for t, frame in enumerate(clip.frames):
        frame.save(folder / f"{t}.png")
    for question in clip.questions:
        print(f"{question.text}  {question.answer}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--keep-tokens", type=int, default=8, help=f"of the {POOLED**2} tokens of a frame")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write one clip's frames there, and no report")
    options = parser.parse_args()
    if options.write:
        write_clip(make_clip("test", FIRST_CLIP), options.write)
        return
    _, model, processor, _ = load_pretrained_model(DEFAULT_CHECKPOINT, device="cpu")
    keep = options.keep_tokens
    pruners = {
        "script": get_pruner("script", keep_tokens=keep),
        "script, a budget for the clip": get_pruner("script", keep_tokens=keep, scope="global"),
        "script without the question": get_pruner("script", keep_tokens=keep, relevance="none"),
        "wrong sign": get_pruner("script", keep_tokens=keep, relevance_sign=-model.relevance_sign),
        "random": get_pruner("random", keep_tokens=keep),
    }
    print(f"{options.clips} clips of {FRAMES} frames, {keep} of {POOLED**2} tokens per frame")
    print(f"{'':32}frames found   kept tokens on it")
    for name, cells in found_over_time(model, processor, options.clips, pruners).items():
        print(f"{name:32}{cells['frames']:12.1%}{cells['share']:20.1%}")


if __name__ == "__main__":
    main()
