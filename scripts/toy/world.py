"""The toy's scenes with questions about them, and what a model answers: what all measurements on the toy share.

Questions are drawn anew from scenes that neither training nor the committed test sets contain.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from questions import (
    Question,
    background_of,
    both,
    color_check,
    color_of,
    existence,
    most_of,
    relation,
    same_color,
    shape_of,
    text_check,
    which_shapes,
    written_on,
)
from scenes import Layout, make_scene, scene_rng

from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.encoded_images import EncodedImages
from llava.pruning import Pruner

FIRST_SCENE = 100_000  # of the test split; the committed test sets use the first few hundred
Maker = Callable[[Layout, np.random.Generator], Question | None]
SKILLS: dict[str, tuple[Maker, ...]] = {
    "existence": (existence,),
    "attribute": (color_of, shape_of, color_check),
    "text": (written_on,),
    "several": (which_shapes, both),
    "scene": (most_of, background_of),
}
COMPARISONS = {"text": (text_check,), "relation": (relation,), "colors": (same_color,)}  # what the toy has not learned
POINTED = tuple(skill for skill in SKILLS if skill != "scene")  # whose questions are about some of the things
SUFFIX = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Asked:
    """One question, the number of its scene, and the patches (576,) of the objects that it asks about."""

    question: Question
    skill: str
    scene: int
    target: np.ndarray


@dataclass
class World:
    """The scenes, encoded once, and the questions about them."""

    encoded: EncodedImages
    asked: list[Asked]

    def first(self, scenes: int) -> World:
        """The part of it that is about the first ``scenes``."""
        return replace(self, asked=[asked for asked in self.asked if asked.scene < scenes])


def draw_world(
    scenes: int,
    per_skill: int,
    first: int = FIRST_SCENE,
    most: int | None = None,
    crowded: bool = False,
    skills: Mapping[str, Sequence[Maker]] = SKILLS,
) -> tuple[list, list[Asked]]:
    """Pictures and questions, deterministically.

    Args:
        first: number of the first scene.
        most: objects of a scene; ``None`` takes all.
        crowded: scenes of 20 to 32 objects that share shapes and colours, instead of 8 to 16.
        skills: what makes the questions of each.
    """
    pictures, asked = [], []
    for number in range(scenes):
        scene = make_scene("test", first + number, most=most, crowded=crowded)
        rng = scene_rng("test", first + number, purpose=23 if crowded else 9)
        pictures.append(scene.image)
        for skill, makers in skills.items():
            found: dict[str, Question] = {}
            for _ in range(40):
                question = makers[rng.integers(len(makers))](scene.layout, rng)
                if question is not None and len(found) < per_skill:
                    found.setdefault(question.text, question)
            for question in found.values():
                boxes = [scene.layout.objects[k].box for k in question.targets(scene.layout)]
                asked.append(Asked(question, skill, number, patches_of(boxes, scene.image.size)))
    return pictures, asked


def build_world(
    model,
    processor,
    scenes: int,
    per_skill: int,
    first: int = FIRST_SCENE,
    most: int | None = None,
    crowded: bool = False,
    skills: Mapping[str, Sequence[Maker]] = SKILLS,
) -> World:
    """What `draw_world` draws, after the tower."""
    pictures, asked = draw_world(scenes, per_skill, first, most, crowded, skills)
    sizes = [picture.size for picture in pictures]
    parts = []
    with torch.inference_mode():
        for start in range(0, len(sizes), 16):
            pixels = process_images(pictures[start : start + 16], processor, model.config)
            parts.append(model.encode_pictures(pixels, sizes[start : start + 16]))
        encoded = EncodedImages.join(parts)
        encoded.image_embeds(model.get_vision_tower())
    return World(encoded, asked)


def patches_of(boxes: list[tuple[int, int, int, int]], size: tuple[int, int]) -> np.ndarray:
    """(576,) bool: patches of the padded square whose centre lies in one of the boxes."""
    side = max(size)
    centre = (np.arange(24) + 0.5) * side / 24
    x, y = centre - (side - size[0]) // 2, centre - (side - size[1]) // 2
    mask = np.zeros((24, 24), dtype=bool)
    for left, top, right, bottom in boxes:
        mask |= ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None, :]
    return mask.ravel()


def prompt_of(question: Question, blind: bool = False) -> str:
    """The prompt, with the picture's place in it or without."""
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(
        conversation.roles[0], f"{'' if blind else '<image>'}\n{question.text}{SUFFIX}".lstrip()
    )
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def answers_of(model, tokenizer, world: World, pruner: Pruner | None, batch: int, blind: bool = False) -> list[str]:
    """What the model answers to each question; ``blind``: without the picture."""
    texts = []
    for start in range(0, len(world.asked), batch):
        chunk = world.asked[start : start + batch]
        rows = [tokenizer_image_token(prompt_of(asked.question, blind), tokenizer) for asked in chunk]
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        answers = model.generate(
            ids,
            attention_mask=mask,
            images=None if blind else world.encoded.pick([asked.scene for asked in chunk]),
            pruner=pruner,
            query=[asked.question.text for asked in chunk],
            sample_ids=[asked.scene for asked in chunk],
            max_new_tokens=12,
        )
        texts += [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
    return texts


def accuracy(model, tokenizer, world: World, pruner: Pruner | None, batch: int, blind: bool = False) -> list[bool]:
    """Whether each question is answered right."""
    texts = answers_of(model, tokenizer, world, pruner, batch, blind)
    return [text.lower() == a.question.answer.lower() for text, a in zip(texts, world.asked, strict=True)]


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a patch of the object scores above one that is not (ties count half)."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n, total = positive.sum(), len(positive)
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (total - n)))


def describe_commit() -> str:
    """The commit of these sources, "-dirty" if they were changed since; "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
