"""Measure the method on the toy: accuracy by method and budget, and how well relevance finds the asked object.

    python scripts/toy/results.py

Two worlds: scenes of 8 to 16 objects, and crowded ones of 20 to 32 that share shapes and colours. Questions are drawn
anew from scenes that neither training nor the committed test sets contain; every method is asked the same ones. An
interrupted run goes on where it stopped, as long as the code is the same; RESULTS.md is written at the end.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from bench import Bench, Row, add_options, configure, describe_run, list_jobs, measure_all, method
from files import write_text
from questions import NO, YES
from results_report import Measured, document
from tqdm import tqdm
from world import COMPARISONS, POINTED, World, accuracy, answers_of, area_under_curve, build_world

from llava.mm_utils import tokenizer_image_token
from llava.pruning import get_pruner
from llava.pruning.functional import relevance_scores

BUDGETS = (192, 128, 64, 32, 16, 8, 4)
SHOWN = (16, 8, 4)  # budgets of the table of kept tokens


def make_rows(sign: int, options: argparse.Namespace) -> list[Row]:
    """The six rows of the paper's Table 5 first."""
    return [
        Row("none of the three", method("script", gsp=False, dpp=False, relevance="none")),
        Row("graph", method("script", dpp=False, relevance="none")),
        Row("relevance", method("script", gsp=False, dpp=False)),
        Row("graph + relevance", method("script", dpp=False)),
        Row("relevance + DPP", method("script", gsp=False)),
        Row("script", method("script")),
        Row("DPP, no question", method("script", gsp=False, relevance="none")),
        Row("script, relevance none", method("script", relevance="none")),
        Row("script, relevance language", method("script", relevance="language")),
        Row("script, wrong sign", method("script", relevance_sign=-sign)),
        Row("trim", method("trim")),
        Row("cdpruner", method("cdpruner")),
        *(Row(f"random, seed {s}", method("random", seed=s)) for s in range(options.seeds)),
        Row("uniform", method("uniform")),
        Row("2-D pooling", method("pool")),
        Row("native", method("downsample")),
        Row("unpruned", None),
        Row("blind", None, blind=True),
    ]


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


def comparison_report(bench: Bench, world: str, scenes: int) -> dict[str, list[int]]:
    """What the whole picture is enough for where two things must be compared, by kind: [right, all]."""
    options = bench.options
    asked = build_world(
        bench.model, bench.processor, scenes, options.per_skill, crowded=world == "crowded", skills=COMPARISONS
    )
    right = accuracy(bench.model, bench.tokenizer, asked, None, options.batch)
    report: dict[str, list[int]] = {kind: [0, 0] for kind in COMPARISONS}
    for one, ok in zip(asked.asked, right, strict=True):
        report[one.skill][0] += ok
        report[one.skill][1] += 1
    return report


def relevance_report(model, world: World, budgets: tuple[int, ...], sign: int) -> dict[str, dict[str, float]]:
    """By skill: AUC of relevance on the asked object for both signs, the share of kept tokens that lie on it, and how
    often any does.
    """
    tower = model.get_vision_tower()
    report: dict[str, dict[str, list[float]]] = {skill: {} for skill in POINTED}
    with torch.inference_mode():
        texts, text_mask = tower.text_embeds([asked.question.text for asked in world.asked])
        image_embeds = world.encoded.image_embeds(tower)
    for number, asked in enumerate(tqdm(world.asked, desc="relevance", leave=False, mininterval=5)):
        valid = world.encoded.layouts[asked.scene].eligible[0].numpy()
        if asked.skill not in report or not (asked.target & valid).any():
            continue
        values = report[asked.skill]
        text, mask = texts[number][None], text_mask[number][None]
        raw = relevance_scores(image_embeds[asked.scene][None], text, mask)[0].numpy()
        area = area_under_curve(raw[valid], asked.target[valid])
        values.setdefault("AUC, sign +1", []).append(area)
        values.setdefault("AUC, sign -1", []).append(1 - area)
        shown = world.encoded.pick([asked.scene])
        prompt = torch.tensor([tokenizer_image_token("<image>", model.tokenizer)])
        for m in budgets:
            for label, pruner in {
                "script": get_pruner("script", keep_tokens=m),
                "relevance": get_pruner("script", keep_tokens=m, gsp=False, dpp=False),
                "DPP, no question": get_pruner("script", keep_tokens=m, gsp=False, relevance="none"),
                "wrong sign": get_pruner("script", keep_tokens=m, relevance_sign=-sign),
            }.items():
                kept = model.embed_prompts(prompt, images=shown, pruner=pruner, query=asked.question.text).kept[0]
                hits = asked.target[kept.mask()[0].numpy()]
                values.setdefault(f"kept on it, {label}, {m}", []).append(float(hits.mean()))
                values.setdefault(f"any kept on it, {label}, {m}", []).append(float(hits.any()))
        values.setdefault("patches that are on it", []).append(float(asked.target[valid].mean()))
    return {skill: {k: round(statistics.mean(v), 4) for k, v in values.items()} for skill, values in report.items()}


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="playground/toy/llava-toy-v1.5")
    add_options(parser, scenes=96, crowded=340, few=64, budgets=BUDGETS)
    parser.add_argument("--seeds", type=int, default=3, help="of random (%(default)s)")
    parser.add_argument("--rows", nargs="+", help="labels of the rows to measure, script among them; default: all")
    parser.add_argument("--out", type=Path, default=Path("playground/toy/RESULTS.md"))
    options = parser.parse_args(given)
    bench = Bench(options, make_rows)
    rows = [row for row in bench.rows.values() if not options.rows or row.label in options.rows]
    configuration = configure(bench, f"python scripts/toy/results.py {shlex.join(given)}".strip())
    jobs = list_jobs(rows, options.budgets, options.worlds)
    cells = measure_all(bench, make_rows, jobs, configuration, options.out.with_suffix(".json"))
    relevance, reading, comparing = {}, {}, {}
    shown = tuple(m for m in SHOWN if m in options.budgets)
    for name, world in bench.worlds.items():
        part = world.first(options.few_scenes)
        reading[name] = reading_report(part, answers_of(bench.model, bench.tokenizer, part, None, options.batch))
        comparing[name] = comparison_report(bench, name, options.few_scenes)
        relevance[name] = relevance_report(bench.model, part, shown, bench.model.relevance_sign)
    measured = [Measured(*key.split("|"), np.array([c == "1" for c in cell])) for key, cell in cells.items()]
    asked = {name: [(a.scene, a.skill) for a in world.asked] for name, world in bench.worlds.items()}
    about = configuration | describe_run(options)
    write_text(options.out, document(about, measured, asked, reading, comparing, relevance))
    print(options.out.read_text())


if __name__ == "__main__":
    main()
