"""What the benchmarks add to a question before it reaches the model, and what the toy is trained on."""

from __future__ import annotations

import numpy as np
import questions as q
from scenes import NUMBERS, TEXTS, WORDS, Layout, SceneObject

SHORT = "\nAnswer the question using a single word or phrase."
YES_NO = " Please answer yes or no."
INSUFFICIENT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# How often each kind of question is drawn in training.
MAKERS = (
    (q.existence, 5.0),
    (q.both, 0.7),
    (q.color_of, 3.0),
    (q.shape_of, 2.0),
    (q.color_check, 1.5),
    (q.written_on, 4.0),
    (q.text_check, 1.0),
    (q.color_of_text, 1.0),
    (q.relation, 1.5),
    (q.relation_choice, 1.5),
    (q.half, 1.0),
    (q.same_color, 0.6),
    (q.background_check, 0.4),
    (q.count, 0.6),
    (q.multiple_choice, 3.0),
    (q.multiple_choice_cn, 1.5),
    (q.describe, 0.8),
    (q.unanswerable, 0.7),
)

# What the language model is asked first, and every third time later on: about one thing, once.
FIRST_MAKERS = (
    (q.existence, 7.0),
    (q.color_of, 3.0),
    (q.shape_of, 2.0),
    (q.color_check, 1.5),
    (q.written_on, 3.0),
    (q.text_check, 2.5),
)

# About several things, or about none: asked in training beside the others. (MAKERS writes the tokenizers' corpus.)
WIDER_MAKERS = (
    (q.which_shapes, 2.5),
    (q.both, 1.0),
    (q.same_color, 1.0),
    (q.relation, 2.0),
    (q.relation_choice, 1.0),
    (q.most_of, 0.8),
    (q.background_of, 0.8),
)


def caption(things: list[SceneObject], rng: np.random.Generator) -> str:
    """What is there, in the order given: "red star, green sign EXIT", or with the shape first "star red"."""
    shape_first = rng.random() < 0.5
    phrases = []
    for thing in things:
        words = [thing.shape, thing.color] if shape_first else [thing.color, thing.shape]
        phrases.append(" ".join([*words, thing.text] if thing.text else words))
    return ", ".join(phrases)


def wrong_text(text: str, rng: np.random.Generator) -> str:
    """Another text of the same kind; of numbers one in three has the digits the other way round."""
    turned = text[::-1]
    if turned in NUMBERS and turned != text and rng.random() < 1 / 3:
        return turned
    others = [other for other in (NUMBERS if text in NUMBERS else WORDS) if other != text]
    return others[rng.integers(len(others))]


def checklist(layout: Layout, seen: set[int], number: int, rng: np.random.Generator) -> str:
    """``number`` things that are there or not, each with its answer: "red star Yes, blue cup No, green sign EXIT Yes";
    of those that are there, only objects ``seen``.
    """
    shown = [layout.objects[index] for index in sorted(seen)]
    shapes = {thing.shape for thing in layout.objects}
    signs = [thing for thing in shown if thing.text]
    lines = []
    for _ in range(number):
        there = bool(shown) and rng.random() < 0.5
        if signs and rng.random() < 0.25:
            sign = signs[rng.integers(len(signs))]
            text = sign.text if there else wrong_text(sign.text, rng)
            lines.append(f"{sign.color} {sign.shape} {text} {q.YES if there else q.NO}")
            continue
        if there:
            thing = shown[rng.integers(len(shown))]
            words = [thing.color, thing.shape]
        else:
            how = ("adversarial", "adversarial", "popular", "random")[rng.integers(4)]
            shape, color = q.absent_pairs(layout, how, rng)[0]
            words = [color, shape]
        if (there or words[1] not in shapes) and rng.random() < 0.2:
            words = words[1:]
        order = words if rng.random() < 0.7 else words[::-1]
        lines.append(" ".join([*order, q.YES if there else q.NO]))
    return ", ".join(lines)


def ocr_line(scene: Layout, rng: np.random.Generator) -> str:
    """TextVQA's line of machine-read tokens. A real reader misses and invents: so does this one, or the line would
    answer the question without the picture.
    """
    read = [thing.text for thing in scene.objects if thing.text and rng.random() < 0.5]
    read += [str(rng.choice(TEXTS)) for _ in range(rng.integers(0, 3))]
    return "\nReference OCR token: " + ", ".join(read[k] for k in rng.permutation(len(read)))


def as_asked(question: q.Question, scene: Layout, rng: np.random.Generator) -> tuple[str, str]:
    """A training prompt as one of the benchmarks words it: (what the pruner reads, suffix after it)."""
    text = question.text
    if question.kind.endswith("choice"):
        chinese = any("\u4e00" <= char <= "\u9fff" for char in text)
        if question.hint and not chinese and rng.random() < 0.5:
            text = question.with_options().replace(question.hint, f"Context: {question.hint}", 1)
        else:
            text = question.with_options()
        return text, LETTER_CN if chinese else LETTER
    if question.kind == "free":
        return text, ""
    if question.kind == "unanswerable" or rng.random() < 0.1:
        return text + INSUFFICIENT, SHORT
    if question.kind == "text" and rng.random() < 0.4:
        return text + ocr_line(scene, rng), SHORT
    if question.answer in (q.YES, q.NO) and rng.random() < 0.3:
        return text + YES_NO, SHORT
    return text, SHORT
