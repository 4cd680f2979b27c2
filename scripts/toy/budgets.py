"""Automatic against fixed budgets on the toy: right answers against mean tokens, in crowded and in empty scenes.

    python scripts/toy/budgets.py

Every rule is set on other scenes than those asked about, half of them crowded and half empty, so that it keeps each of
the --means on average there. A fixed budget gives the same count to all. Prints a table.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import torch
from tqdm import tqdm
from world import FIRST_SCENE, World, build_world, prompt_of

from llava.eval.measure.calibrate_budget import curves_of
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import DEFAULT_CHECKPOINT, load_pretrained_model
from llava.pruning import Pruner, get_pruner
from llava.pruning.auto_budget import AutoBudget
from llava.pruning.budget_curves import rule_for_mean

OTHER_SCENES = FIRST_SCENE + 50_000  # on which rules are set
BOUNDS = AutoBudget(floor=1, ceiling=96)
METHODS = {
    "script": ("script", {}),
    "script, no question": ("script", {"relevance": "none", "gsp": False}),
    "scope": ("scope", {}),
}


@dataclass(frozen=True)
class Outcome:
    """Of one kind of scenes, a value for each question."""

    tokens: list[int]
    right: list[bool]


def ask(model, tokenizer, world: World, pruner: Pruner | None, batch: int) -> Outcome:
    """Tokens kept for each question of a world, and whether it is answered right."""
    tokens, right = [], []
    for start in range(0, len(world.asked), batch):
        chunk = world.asked[start : start + batch]
        rows = [tokenizer_image_token(prompt_of(asked.question), tokenizer) for asked in chunk]
        length = max(map(len, rows))
        prompts = model.embed_prompts(
            torch.tensor([[0] * (length - len(row)) + row for row in rows]),
            torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
            images=world.encoded.pick([asked.scene for asked in chunk]),
            pruner=pruner,
            query=[asked.question.text for asked in chunk],
            padding_side="left",
        )
        tokens += [kept.patches for kept in prompts.kept]
        answers = tokenizer.batch_decode(model.generate(prompts, max_new_tokens=12), skip_special_tokens=True)
        truths = [asked.question.answer for asked in chunk]
        right += [text.strip().lower() == truth.lower() for text, truth in zip(answers, truths, strict=True)]
    return Outcome(tokens, right)


def curves(model, worlds: list[World], pruner: Pruner) -> list:
    """What the method's orders explain, for each question of the worlds."""
    ids = torch.tensor([tokenizer_image_token("<image>", model.tokenizer)])
    return [
        curves_of(
            pruner,
            model.embed_prompts(
                ids, images=world.encoded.pick([asked.scene]), pruner=pruner, query=asked.question.text
            ).kept[0],
        )
        for world in worlds
        for asked in world.asked
    ]


def line(label: str, budget: str, outcomes: list[Outcome]) -> str:
    """A row of the table: mean tokens and right answers in percent, of each kind of scenes and of all."""
    tokens, right = ([value for one in outcomes for value in getattr(one, name)] for name in ("tokens", "right"))
    both = [*outcomes, Outcome(tokens, right)]
    cells = [f"{statistics.mean(outcome.tokens):.1f}" for outcome in both]
    cells += [f"{100 * statistics.mean(outcome.right):.1f}" for outcome in both]
    return f"| {label} | {budget} | " + " | ".join(cells) + " |"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--scenes", type=int, default=32, help="of each kind, asked about (%(default)s)")
    parser.add_argument("--other-scenes", type=int, default=50, help="of each kind, to set rules on (%(default)s)")
    parser.add_argument("--per-skill", type=int, default=2, help="questions of each skill about a scene")
    parser.add_argument("--objects", type=int, default=3, help="of an empty scene; a crowded one has 8 to 16")
    parser.add_argument("--means", type=int, nargs="+", default=[8, 12, 16, 32])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    tokenizer, model, processor, _ = load_pretrained_model(options.model_path, device="cpu")
    kinds = (options.objects, None)
    worlds = [build_world(model, processor, options.scenes, options.per_skill, most=most) for most in kinds]
    others = [build_world(model, processor, options.other_scenes, 1, OTHER_SCENES, most) for most in kinds]
    asked = " and ".join(str(len(world.asked)) for world in worlds)
    rows = [
        f"{asked} questions about empty and crowded scenes",
        "",
        "| | budget | tokens, empty | crowded | all | right, empty | crowded | all |",
        "|---|---|---|---|---|---|---|---|",
        line("unpruned", "", [ask(model, tokenizer, world, None, options.batch) for world in worlds]),
    ]
    for label in options.methods:
        name, given = METHODS[label]
        found = curves(model, others, get_pruner(name, keep_tokens=str(BOUNDS), **given))
        for mean in tqdm(options.means, desc=label):
            rules = [rule_for_mean(found, mean, BOUNDS, by) for by in ("share", "gain")]
            for budget, shown in zip([mean, *map(str, rules)], [str(mean), "A", "B"], strict=True):
                pruner = get_pruner(name, keep_tokens=budget, **given)
                rows.append(
                    line(label, shown, [ask(model, tokenizer, world, pruner, options.batch) for world in worlds])
                )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
