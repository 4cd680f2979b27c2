"""Measure the method on the toy: accuracy by method and budget, and how well relevance finds the asked object.

    python scripts/toy/results.py

Questions are drawn anew from scenes that neither training nor the committed test sets contain. Every cell is stored
as soon as it is measured, so that an interrupted run goes on where it stopped, as long as the code is the same;
RESULTS.md is written at the end.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from questions import NO, YES, Question, color_check, color_of, existence, shape_of, text_check, written_on
from scenes import make_scene, scene_rng
from tqdm import tqdm

from llava.conversation import conv_templates
from llava.eval.runner.identity import code_of
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.encoded_images import EncodedImages
from llava.pruning import Pruner, get_pruner, list_pruners, pruner_class
from llava.pruning.functional import relevance_scores

FIRST_SCENE = 100_000  # of the test split; the committed test sets use the first few hundred
BUDGETS = (192, 128, 64, 32, 16, 8, 4)
SKILLS = {
    "existence": (existence,),
    "attribute": (color_of, shape_of, color_check),
    "text": (written_on, text_check),
}
SUFFIX = "\nAnswer the question using a single word or phrase."
SCENE_BATCHES = 4  # the spread of a cell is that over this many batches of scenes


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


def build_world(
    model, processor, scenes: int, per_skill: int, first: int = FIRST_SCENE, most: int | None = None
) -> World:
    """Draw scenes and questions, deterministically, and run the tower over them.

    Args:
        first: number of the first scene.
        most: objects of a scene; ``None`` takes all.
    """
    pictures, asked = [], []
    for number in range(scenes):
        scene = make_scene("test", first + number, most=most)
        rng = scene_rng("test", first + number, purpose=9)
        pictures.append(scene.image)
        for skill, makers in SKILLS.items():
            found: dict[str, Question] = {}
            for _ in range(40):
                question = makers[rng.integers(len(makers))](scene.layout, rng)
                if question is not None and len(found) < per_skill:
                    found.setdefault(question.text, question)
            for question in found.values():
                boxes = [scene.layout.objects[k].box for k in question.targets(scene.layout)]
                asked.append(Asked(question, skill, number, patches_of(boxes, scene.image.size)))
    pixels = process_images(pictures, processor, model.config)
    sizes = [picture.size for picture in pictures]
    with torch.inference_mode():
        parts = [model.encode_pictures(pixels[i : i + 16], sizes[i : i + 16]) for i in range(0, len(sizes), 16)]
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


# --- rows of the table ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A method at a budget of m tokens."""

    label: str
    pruner: Callable[[int], Pruner]


def script(**options) -> Callable[[int], Pruner]:
    return lambda m: get_pruner("script", keep_tokens=m, **options)


def rows_of(sign: int, seeds: int) -> list[Row]:
    return [
        Row("script", script()),
        Row("graph alone", script(relevance="none", dpp=False)),
        Row("relevance alone", script(gsp=False, dpp=False)),
        Row("graph + relevance", script(dpp=False)),
        Row("relevance + DPP", script(gsp=False)),
        Row("DPP without the question", script(gsp=False, relevance="none")),
        Row("graph + DPP without the question", script(relevance="none")),
        Row("script, wrong sign", script(relevance_sign=-sign)),
        *(Row(f"random, seed {s}", lambda m, s=s: get_pruner("random", keep_tokens=m, seed=s)) for s in range(seeds)),
        Row("uniform", lambda m: get_pruner("uniform", keep_tokens=m)),
        Row("2-D pooling", lambda m: get_pruner("pool", keep_tokens=m)),
        Row("down-sampled picture", lambda m: get_pruner("downsample", keep_tokens=m)),
    ]


# --- measuring -----------------------------------------------------------------------------------------------------


def answers_of(model, tokenizer, world: World, pruner: Pruner | None, batch: int) -> list[str]:
    """What the model answers to each question."""
    texts = []
    for start in range(0, len(world.asked), batch):
        chunk = world.asked[start : start + batch]
        rows = [tokenizer_image_token(prompt_of(asked.question), tokenizer) for asked in chunk]
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        answers = model.generate(
            ids,
            attention_mask=mask,
            images=world.encoded.pick([asked.scene for asked in chunk]),
            pruner=pruner,
            query=[asked.question.text for asked in chunk],
            sample_ids=[asked.scene for asked in chunk],
            max_new_tokens=6,
        )
        texts += [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
    return texts


def accuracy(model, tokenizer, world: World, pruner: Pruner | None, batch: int) -> list[bool]:
    """Whether each question is answered right."""
    texts = answers_of(model, tokenizer, world, pruner, batch)
    return [text.lower() == a.question.answer.lower() for text, a in zip(texts, world.asked, strict=True)]


def reading_report(world: World, texts: list[str]) -> dict[str, list[int]]:
    """Of the questions about text, by what is to be read: [right, right but for the order of characters, all]."""
    report: dict[str, list[int]] = {}
    for asked, text in zip(world.asked, texts, strict=True):
        truth = asked.question.answer
        if asked.skill != "text":
            continue
        kind = "yes or no" if truth in (YES, NO) else "number" if truth.isdigit() else "word"
        counts = report.setdefault(kind, [0, 0, 0])
        is_right = text.lower() == truth.lower()
        counts[0] += is_right
        counts[1] += not is_right and sorted(text) == sorted(truth)
        counts[2] += 1
    return report


def prompt_of(question: Question) -> str:
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{question.text}{SUFFIX}")
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def summarise(world: World, right: list[bool]) -> dict[str, list[float]]:
    """Per skill: mean accuracy, and its standard deviation over batches of scenes."""
    summary = {}
    for skill in SKILLS:
        batches: list[list[bool]] = [[] for _ in range(SCENE_BATCHES)]
        for asked, ok in zip(world.asked, right, strict=True):
            if asked.skill == skill:
                batches[asked.scene % SCENE_BATCHES].append(ok)
        means = [statistics.mean(batch) for batch in batches if batch]
        everything = [ok for batch in batches for ok in batch]
        summary[skill] = [statistics.mean(everything), statistics.stdev(means) if len(means) > 1 else 0.0]
    return summary


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a patch of the object scores above one that is not (ties count half)."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n, total = positive.sum(), len(positive)
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (total - n)))


def relevance_report(model, world: World, budgets: tuple[int, ...], sign: int) -> dict[str, dict[str, float]]:
    """By skill: AUC of relevance on the asked object for both signs, the share of kept tokens that lie on it, and how
    often any does.
    """
    tower = model.get_vision_tower()
    report: dict[str, dict[str, list[float]]] = {skill: {} for skill in SKILLS}
    with torch.inference_mode():
        texts, text_mask = tower.text_embeds([asked.question.text for asked in world.asked])
        image_embeds = world.encoded.image_embeds(tower)
    for number, asked in enumerate(tqdm(world.asked, desc="relevance", leave=False)):
        valid = world.encoded.layouts[asked.scene].eligible[0].numpy()
        if not (asked.target & valid).any():
            continue
        values = report[asked.skill]
        raw = relevance_scores(image_embeds[asked.scene][None], texts[number][None], text_mask[number][None])[
            0
        ].numpy()
        area = area_under_curve(raw[valid], asked.target[valid])
        values.setdefault("AUC, sign +1", []).append(area)
        values.setdefault("AUC, sign -1", []).append(1 - area)
        shown = world.encoded.pick([asked.scene])
        prompt = torch.tensor([tokenizer_image_token("<image>", model.tokenizer)])
        for m in budgets:
            for label, pruner in {
                "script": get_pruner("script", keep_tokens=m),
                "DPP without the question": get_pruner("script", keep_tokens=m, gsp=False, relevance="none"),
                "wrong sign": get_pruner("script", keep_tokens=m, relevance_sign=-sign),
            }.items():
                kept = model.embed_prompts(prompt, images=shown, pruner=pruner, query=asked.question.text).kept[0]
                hits = asked.target[kept.mask()[0].numpy()]
                values.setdefault(f"kept on it, {label}, {m}", []).append(float(hits.mean()))
                values.setdefault(f"any kept on it, {label}, {m}", []).append(float(hits.any()))
        values.setdefault("patches that are on it", []).append(float(asked.target[valid].mean()))
    return {skill: {k: round(statistics.mean(v), 4) for k, v in values.items()} for skill, values in report.items()}


# --- writing -------------------------------------------------------------------------------------------------------


def merge_seeds(cells: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """Join the rows of `random` into one: mean over seeds, spread over seeds."""
    merged: dict[str, dict[str, list[float]]] = {}
    random: dict[str, list[dict[str, list[float]]]] = {}
    for key, cell in cells.items():
        label, budget = key.rsplit("|", 1)
        if label.startswith("random, seed"):
            random.setdefault(budget, []).append(cell)
        else:
            merged[key] = cell
    for budget, runs in random.items():
        merged[f"random|{budget}"] = {
            skill: [
                statistics.mean(run[skill][0] for run in runs),
                statistics.stdev(run[skill][0] for run in runs) if len(runs) > 1 else 0.0,
            ]
            for skill in SKILLS
        }
    return merged


def describe_commit() -> str:
    """The commit of these sources, "-dirty" if they were changed since; "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def write_report(path: Path, configuration: dict, cells: dict, reading: dict, relevance: dict) -> None:
    cells = merge_seeds(cells)
    labels = list(dict.fromkeys(key.rsplit("|", 1)[0] for key in cells if not key.startswith("unpruned")))
    labels.sort(key=lambda label: label != "script")
    budgets = configuration["budgets"]
    lines = [
        "# The method on the toy",
        "",
        f"`{configuration['command']}` at commit {configuration['commit']}, {configuration['machine']}.",
        f"{configuration['scenes']} scenes that neither training nor the committed test sets contain, "
        f"{configuration['questions']} questions. Each cell is the accuracy in percent; the spread is the standard "
        f"deviation over {SCENE_BATCHES} batches of scenes (`random`: over {configuration['seeds']} seeds).",
        "",
    ]
    for skill in SKILLS:
        mean, spread = cells["unpruned|576"][skill]
        lines += [
            f"## {skill.capitalize()}",
            "",
            f"Unpruned, 576 tokens: **{100 * mean:.1f}** ± {100 * spread:.1f}",
            "",
            "| tokens | " + " | ".join(map(str, budgets)) + " |",
            "|---|" + "---|" * len(budgets),
        ]
        for label in labels:
            row = [cells[f"{label}|{m}"][skill] for m in budgets]
            lines.append(f"| {label} | " + " | ".join(f"{100 * a:.1f} ± {100 * s:.1f}" for a, s in row) + " |")
        lines.append("")
    lines += [
        "## What is read of signs, unpruned",
        "",
        "| | right | right but for the order | questions |",
        "|---|---|---|---|",
        *(f"| {kind} | " + " | ".join(map(str, counts)) + " |" for kind, counts in sorted(reading.items())),
        "",
        "## Does relevance find the asked object?",
        "",
        "AUC: the probability that a patch of the asked object is more relevant than one that is not. "
        "Below it, in percent: the share of the kept tokens that lie on the object, and how often any does.",
        "",
        "| | " + " | ".join(SKILLS) + " |",
        "|---|" + "---|" * len(SKILLS),
    ]
    for name in sorted(next(iter(relevance.values())), key=lambda name: name.split(",")[0]):
        is_area = name.startswith("AUC")
        values = [relevance[skill][name] for skill in SKILLS]
        lines.append(f"| {name} | " + " | ".join(f"{v:.3f}" if is_area else f"{100 * v:.1f}" for v in values) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="playground/toy/llava-toy-v1.5")
    parser.add_argument("--scenes", type=int, default=96)
    parser.add_argument("--per-skill", type=int, default=3, help="questions of each skill about a scene")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of random")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--rows", nargs="+", help="labels of the rows to measure; default: all")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("playground/toy/RESULTS.md"))
    options = parser.parse_args()

    tokenizer, model, processor, _ = load_pretrained_model(options.model_path, device="cpu")
    world = build_world(model, processor, options.scenes, options.per_skill)
    configuration = {
        "command": " ".join(["python scripts/toy/results.py", *sys.argv[1:]]),
        "model": options.model_path,
        "scenes": options.scenes,
        "questions": len(world.asked),
        "seeds": options.seeds,
        "budgets": options.budgets,
        "code": {name: code_of(pruner_class(name)) for name in list_pruners()},
        "weights": str(round(sum(float(p.double().abs().sum()) for p in model.parameters()), 3)),
    }
    store = options.out.with_suffix(".json")
    stored = json.loads(store.read_text()) if store.is_file() else {}
    cells = stored.get("cells", {}) if stored.get("configuration") == configuration else {}
    sign = model.relevance_sign
    rows = [row for row in rows_of(sign, options.seeds) if not options.rows or row.label in options.rows]
    jobs = [("unpruned|576", None, None)] + [(f"{row.label}|{m}", row, m) for row in rows for m in options.budgets]
    for key, row, m in tqdm([job for job in jobs if job[0] not in cells], desc="cells"):
        pruner = None if row is None else row.pruner(m)
        cells[key] = summarise(world, accuracy(model, tokenizer, world, pruner, options.batch))
        partial = store.with_suffix(".tmp")
        partial.write_text(json.dumps({"configuration": configuration, "cells": cells}, indent=1))
        partial.replace(store)
    reading = reading_report(world, answers_of(model, tokenizer, world, None, options.batch))
    relevance = relevance_report(model, world, tuple(options.budgets), sign)
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()} CPU"
    write_report(
        options.out, {**configuration, "commit": describe_commit(), "machine": machine}, cells, reading, relevance
    )
    print(options.out.read_text())


if __name__ == "__main__":
    main()
