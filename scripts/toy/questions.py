"""Questions about a toy scene, with their true answers and what in the picture they ask about.

A question says what it refers to by *descriptors* (shape, colour, text; None = any). Descriptors, unlike boxes, can be
matched against every scene of a batch, which is what the contrastive loss of the tower needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scenes import BACKGROUNDS, COLOR_NAMES, SHAPES, SIGN, TEXTS, THINGS, WORDS, Layout, SceneObject

LETTERS = "ABCD"
YES, NO, UNANSWERABLE = "Yes", "No", "Unanswerable"

# What is said in Chinese.
_CHINESE_THINGS = "球 方块 星星 爱心 月亮 十字 圆环 箭头 房子 树 杯子 鱼 牌子"
_CHINESE_COLORS = "红色 绿色 蓝色 黄色 橙色 紫色 粉色 棕色 白色 黑色"
THINGS_CN = dict(
    zip(
        THINGS,
        ["球", "方块", "星星", "爱心", "月亮", "十字", "圆环", "箭头", "房子", "树", "杯子", "鱼", "牌子"],
        strict=True,
    )
)
COLORS_CN = dict(
    zip(COLOR_NAMES, ["红色", "绿色", "蓝色", "黄色", "橙色", "紫色", "粉色", "棕色", "白色", "黑色"], strict=True)
)
CHINESE = {**THINGS_CN, **COLORS_CN}


@dataclass(frozen=True)
class Descriptor:
    """What a phrase picks out; ``None`` leaves a property open."""

    shape: str | None = None
    color: str | None = None
    text: str | None = None

    def matches(self, thing: SceneObject) -> bool:
        wanted = ((self.shape, thing.shape), (self.color, thing.color), (self.text, thing.text))
        return all(want is None or want == has for want, has in wanted)


@dataclass(frozen=True)
class Question:
    """``text`` as a user asks it, without any answer-format suffix; ``kind`` names the skill it needs."""

    text: str
    answer: str
    kind: str
    asked: tuple[Descriptor, ...] = ()
    options: tuple[str, ...] = ()
    hint: str = ""

    def targets(self, scene: Layout) -> list[int]:
        """Indices of the objects that the question is about."""
        return [k for k, thing in enumerate(scene.objects) if any(d.matches(thing) for d in self.asked)]

    def with_options(self) -> str:
        """Hint, question and lettered options, one per line: what a multiple-choice prompt shows before its suffix."""
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        return "\n".join(([self.hint] if self.hint else []) + [self.text] + lines)


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _pick(rng: np.random.Generator, items):
    items = list(items)
    return items[rng.integers(len(items))] if items else None


def _once(scene: Layout, key: Callable[[SceneObject], object]) -> list[SceneObject]:
    """Objects whose ``key`` occurs exactly once in the scene."""
    counts = Counter(key(thing) for thing in scene.objects)
    return [thing for thing in scene.objects if counts[key(thing)] == 1]


def _pair(thing: SceneObject) -> Descriptor:
    return Descriptor(thing.shape, thing.color)


def _phrase(rng: np.random.Generator, scene: Layout, thing: SceneObject) -> tuple[str, Descriptor]:
    """A phrase that names exactly this object: "star" where that is enough (half of the time), else "red star"."""
    unique = sum(other.shape == thing.shape for other in scene.objects) == 1
    if unique and rng.random() < 0.5:
        return thing.shape, Descriptor(thing.shape)
    return f"{thing.color} {thing.shape}", _pair(thing)


# ------------------------------------------------------------------------------------------ existence


def absent_pairs(scene: Layout, how: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(shape, colour) pairs not in the scene, likeliest to fool first: ``adversarial`` shares shape and colour with
    objects that are there, ``popular`` shares one of the two, ``random`` is any.
    """
    present = {(thing.shape, thing.color) for thing in scene.objects}
    shapes, colors = {s for s, _ in present}, {c for _, c in present}
    pairs = [(s, c) for s in THINGS for c in COLOR_NAMES if (s, c) not in present]
    if how == "adversarial":
        pairs = [(s, c) for s, c in pairs if s in shapes and c in colors]
    elif how == "popular":
        pairs = [(s, c) for s, c in pairs if (s in shapes) != (c in colors)]
    elif how != "random":
        raise ValueError(f"unknown kind of absence {how!r}, expected adversarial, popular or random")
    return [pairs[k] for k in rng.permutation(len(pairs))]


def existence(scene: Layout, rng: np.random.Generator) -> Question:
    """Is there a red star in the image?"""
    if rng.random() < 0.25:
        shapes = {thing.shape for thing in scene.objects}
        wanted = rng.random() < 0.5
        shape = _pick(rng, (thing for thing in THINGS if (thing in shapes) == wanted))  # a set has no fixed order
        answer = YES if shape in shapes else NO
        return Question(f"Is there {article(shape)} in the image?", answer, "existence", (Descriptor(shape),))
    if rng.random() < 0.5:
        thing = _pick(rng, scene.objects)
        shape, color, answer = thing.shape, thing.color, YES
    else:
        how = _pick(rng, ("adversarial", "adversarial", "popular", "random"))
        (shape, color), answer = absent_pairs(scene, how, rng)[0], NO
    noun = article(f"{color} {shape}")
    return Question(f"Is there {noun} in the image?", answer, "existence", (Descriptor(shape, color),))


# ------------------------------------------------------------------------------- attributes and text


def color_of(scene: Layout, rng: np.random.Generator) -> Question | None:
    """What color is the star?"""
    thing = _pick(rng, _once(scene, lambda t: t.shape))
    if thing is None:
        return None
    return Question(f"What color is the {thing.shape}?", thing.color, "attribute", (Descriptor(thing.shape),))


def shape_of(scene: Layout, rng: np.random.Generator) -> Question | None:
    """What is the red object?"""
    thing = _pick(rng, _once(scene, lambda t: t.color))
    if thing is None:
        return None
    return Question(f"What is the {thing.color} object?", thing.shape, "attribute", (Descriptor(None, thing.color),))


def color_check(scene: Layout, rng: np.random.Generator) -> Question | None:
    """Is the star red?"""
    thing = _pick(rng, _once(scene, lambda t: t.shape))
    if thing is None:
        return None
    color = thing.color if rng.random() < 0.5 else _pick(rng, set_without(COLOR_NAMES, thing.color))
    answer = YES if color == thing.color else NO
    return Question(f"Is the {thing.shape} {color}?", answer, "attribute", (Descriptor(thing.shape),))


def written_on(scene: Layout, rng: np.random.Generator) -> Question | None:
    """What number is on the red sign?"""
    sign = _pick(rng, (t for t in scene.objects if t.shape == SIGN))
    if sign is None:
        return None
    alone = sum(t.shape == SIGN for t in scene.objects) == 1
    asked = Descriptor(SIGN) if alone and rng.random() < 0.5 else _pair(sign)
    where = f"the {sign.color} sign" if asked.color else "the sign"
    what = _pick(rng, (f"What {'word' if sign.text in WORDS else 'number'} is on", "What is written on"))
    return Question(f"{what} {where}?", sign.text, "text", (asked,))


def text_check(scene: Layout, rng: np.random.Generator) -> Question | None:
    """Does the red sign say EXIT?"""
    sign = _pick(rng, (t for t in scene.objects if t.shape == SIGN))
    if sign is None:
        return None
    others = [t for t in TEXTS if t != sign.text and (t in WORDS) == (sign.text in WORDS)]
    text = sign.text if rng.random() < 0.5 else _pick(rng, others)
    answer = YES if text == sign.text else NO
    return Question(f"Does the {sign.color} sign say {text}?", answer, "text", (_pair(sign),))


def color_of_text(scene: Layout, rng: np.random.Generator) -> Question | None:
    """What color is the sign that says EXIT?"""
    sign = _pick(rng, (t for t in _once(scene, lambda t: str(t.text)) if t.text))
    if sign is None:
        return None
    asked = (Descriptor(SIGN, None, sign.text),)
    return Question(f"What color is the sign that says {sign.text}?", sign.color, "text", asked)


def count(scene: Layout, rng: np.random.Generator) -> Question:
    """How many stars are there?"""
    counts = Counter(thing.shape for thing in scene.objects)
    shape = _pick(rng, [s for s in counts if counts[s] <= 4] or list(counts))
    plural = {"box": "boxes", "cross": "crosses", "fish": "fish"}.get(shape, f"{shape}s")
    return Question(f"How many {plural} are there?", str(counts[shape]), "count", (Descriptor(shape),))


# ------------------------------------------------------------------------------------------ relations


def _apart(scene: Layout, rng: np.random.Generator) -> tuple[SceneObject, SceneObject, str] | None:
    """Two objects with a clear relation: at least a tenth of the picture apart along one axis."""
    reach, things = max(scene.size), _once(scene, _pair)
    for _ in range(20 if len(things) > 1 else 0):
        first, second = (things[k] for k in rng.permutation(len(things))[:2])
        (x1, y1), (x2, y2) = first.center, second.center
        sideways = bool(rng.random() < 0.5)
        distance = x1 - x2 if sideways else y1 - y2
        if abs(distance) > 0.12 * reach:
            return first, second, (("left", "right") if sideways else ("above", "below"))[int(distance > 0)]
    return None


_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_WHERE = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}


def relation(scene: Layout, rng: np.random.Generator) -> Question | None:
    """Is the red star to the left of the cup?"""
    found = _apart(scene, rng)
    if found is None:
        return None
    first, second, where = found
    claim = where if rng.random() < 0.5 else _OPPOSITE[where]
    (a, asked_a), (b, asked_b) = _phrase(rng, scene, first), _phrase(rng, scene, second)
    answer = YES if claim == where else NO
    return Question(f"Is the {a} {_WHERE[claim]} the {b}?", answer, "relation", (asked_a, asked_b))


def relation_choice(scene: Layout, rng: np.random.Generator) -> Question | None:
    """Is the red star above or below the cup?"""
    found = _apart(scene, rng)
    if found is None:
        return None
    first, second, where = found
    (a, asked_a), (b, asked_b) = _phrase(rng, scene, first), _phrase(rng, scene, second)
    one, other = ("left", "right") if where in ("left", "right") else ("above", "below")
    middle = "to the left or to the right of" if one == "left" else f"{one} or {other}"
    return Question(f"Is the {a} {middle} the {b}?", where, "relation", (asked_a, asked_b))


def half(scene: Layout, rng: np.random.Generator) -> Question | None:
    """Is the red star on the left or on the right of the image?"""
    sides = ("left", "right") if rng.random() < 0.5 else ("top", "bottom")
    axis = int(sides[0] == "top")
    middle, reach = scene.size[axis] / 2, max(scene.size)
    thing = _pick(rng, (t for t in _once(scene, _pair) if abs(t.center[axis] - middle) > 0.08 * reach))
    if thing is None:
        return None
    phrase, asked = _phrase(rng, scene, thing)
    answer = sides[int(thing.center[axis] > middle)]
    text = f"Is the {phrase} at the {sides[0]} or at the {sides[1]} of the image?"
    return Question(text, answer, "relation", (asked,))


def both(scene: Layout, rng: np.random.Generator) -> Question:
    """Are there both a red star and a blue ring?"""
    descriptors, answer = [], YES
    for _ in range(2):
        if rng.random() < 0.7:
            thing = _pick(rng, (t for t in scene.objects if _pair(t) not in descriptors))
            descriptors.append(_pair(thing))
        else:
            descriptors.append(Descriptor(*absent_pairs(scene, _pick(rng, ("adversarial", "popular")), rng)[0]))
            answer = NO
    a, b = (article(f"{d.color} {d.shape}") for d in descriptors)
    return Question(f"Are there both {a} and {b}?", answer, "existence", tuple(descriptors))


def same_color(scene: Layout, rng: np.random.Generator) -> Question | None:
    """Are the star and the ring the same color?"""
    things = _once(scene, lambda t: t.shape)
    if len(things) < 2:
        return None
    pairs = [(a, b) for a in things for b in things if a is not b]
    alike = [pair for pair in pairs if pair[0].color == pair[1].color]
    a, b = _pick(rng, alike if alike and rng.random() < 0.5 else pairs)
    answer = YES if a.color == b.color else NO
    asked = (Descriptor(a.shape), Descriptor(b.shape))
    return Question(f"Are the {a.shape} and the {b.shape} the same color?", answer, "relation", asked)


def background_check(scene: Layout, rng: np.random.Generator) -> Question:
    """Are there bricks behind the objects?"""
    kind = scene.background if rng.random() < 0.5 else _pick(rng, set_without(BACKGROUNDS, scene.background))
    return Question(f"Are there {kind} behind the objects?", YES if kind == scene.background else NO, "scene")


# -------------------------------------------------------------------------- several things, the whole


def which_shapes(scene: Layout, rng: np.random.Generator) -> Question | None:
    """What are the red objects? Two or three kinds, named in the order of THINGS."""
    shapes: dict[str, set[str]] = {}
    for thing in scene.objects:
        shapes.setdefault(thing.color, set()).add(thing.shape)
    color = _pick(rng, (c for c in COLOR_NAMES if len(shapes.get(c, ())) in (2, 3)))
    if color is None:
        return None
    answer = ", ".join(shape for shape in THINGS if shape in shapes[color])
    return Question(f"What are the {color} objects?", answer, "several", (Descriptor(None, color),))


def most_of(scene: Layout, rng: np.random.Generator) -> Question | None:
    """Of which shape are there most? One that is ahead by two at least."""
    (shape, number), *others = Counter(thing.shape for thing in scene.objects).most_common(2)
    if others and number < others[0][1] + 2:
        return None
    return Question("Of which shape are there most?", shape, "scene")


def background_of(scene: Layout, rng: np.random.Generator) -> Question:
    """What is behind the objects?"""
    return Question("What is behind the objects?", scene.background, "scene")


# ---------------------------------------------------------------------------- several-choice and free


def set_without(items, *excluded: str) -> list[str]:
    return [item for item in items if item not in excluded]


def _options(rng: np.random.Generator, answer: str, pool, number: int) -> tuple[tuple[str, ...], str]:
    wrong = [str(w) for w in rng.permutation(set_without(pool, answer))[: number - 1]]
    options = [answer, *wrong]
    order = rng.permutation(number)
    return tuple(options[k] for k in order), LETTERS[int(np.argwhere(order == 0)[0, 0])]


def multiple_choice(scene: Layout, rng: np.random.Generator, number: int | None = None) -> Question | None:
    """A colour, shape or text question with two to four lettered options; the answer is the letter."""
    base = _pick(rng, (color_of, color_of, shape_of, written_on))(scene, rng)
    if base is None:
        return None
    pools = (COLOR_NAMES, THINGS, WORDS, tuple(t for t in TEXTS if t not in WORDS))
    pool = next(pool for pool in pools if base.answer in pool)
    options, letter = _options(rng, base.answer, pool, number or int(rng.integers(2, 5)))
    hint = _pick(rng, ("", "", f"The picture shows small objects and {scene.background}."))
    return Question(base.text, letter, f"{base.kind} choice", base.asked, options, hint)


def multiple_choice_cn(scene: Layout, rng: np.random.Generator, number: int | None = None) -> Question | None:
    """The Chinese sister of :func:`multiple_choice`."""
    english = multiple_choice(scene, rng, number)
    return None if english is None else to_chinese(english)


def to_chinese(question: Question) -> Question:
    """A multiple-choice question in Chinese: same picture, same options, same letter."""
    asked = question.asked[0]
    thing = f"{COLORS_CN[asked.color]}的" if asked.color else ""
    if question.text.startswith("What color"):
        text = f"图中的{THINGS_CN[asked.shape]}是什么颜色?"
    elif question.text.endswith("object?"):
        text = f"图中{thing}东西是什么?"
    else:
        text = f"{thing}牌子上写着什么?"
    options = tuple(CHINESE.get(option, option) for option in question.options)
    hint = "图中有许多小东西。" if question.hint else ""
    return Question(text, question.answer, question.kind, question.asked, options, hint)


def describe(scene: Layout, rng: np.random.Generator) -> Question | None:
    """Free answers: "Describe the star." -> "The star is red."."""
    if rng.random() < 0.5:
        base = color_of(scene, rng)
        if base is None:
            return None
        shape = base.asked[0].shape
        return Question(f"Describe the {shape}.", f"The {shape} is {base.answer}.", "free", base.asked)
    sign = _pick(rng, (t for t in scene.objects if t.shape == SIGN))
    if sign is None:
        return None
    text = f"What does the {sign.color} sign tell us?"
    return Question(text, f"The {sign.color} sign says {sign.text}.", "free", (_pair(sign),))


def unanswerable(scene: Layout, rng: np.random.Generator) -> Question | None:
    """A colour or text question about something that is not there."""
    if rng.random() < 0.5:
        shape = _pick(rng, set_without(SHAPES, *(t.shape for t in scene.objects)))
        return Question(f"What color is the {shape}?", UNANSWERABLE, "unanswerable", (Descriptor(shape),))
    absent = set_without(COLOR_NAMES, *(t.color for t in scene.objects if t.shape == SIGN))
    color = _pick(rng, absent)
    return Question(f"What is written on the {color} sign?", UNANSWERABLE, "unanswerable", (Descriptor(SIGN, color),))


def draw(scene: Layout, rng: np.random.Generator, makers: tuple[tuple[Callable, float], ...]) -> Question:
    """One question by a maker drawn with the given weights; makers that find nothing to ask are drawn again."""
    weights = np.array([weight for _, weight in makers])
    while True:
        maker = makers[rng.choice(len(makers), p=weights / weights.sum())][0]
        question = maker(scene, rng)
        if question is not None:
            return question
