"""Which rule keeps so many tokens on average: ``keep_tokens="auto"`` for an asked mean budget.

A method's order over a picture, and what each of its tokens explains, tell what every rule would keep. One selection
a question is enough, to the ceiling; the language model does not run. A hundred pictures like those that will be
asked about put the mean within a few percent. ``--store FILE`` keeps these curves for
``--keep-tokens auto:mean_tokens=T:curves=FILE``, with this or another T.

    python -m llava.eval.calibrate_budget --mean-tokens 64 --model-path P --pictures FOLDER --questions FILE

``FILE`` is read as by llava.eval.calibrate_heads: a question a line, or JSON lines with "image" and "text"; two
questions are asked about each picture. The last line printed is the budget, for ``--keep-tokens``.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava.checkpoint import CheckpointError
from llava.eval.measure.calibrate_heads import Case, read_cases
from llava.mm_utils import load_image, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model, pick_device
from llava.model.kept_tokens import KeptTokens
from llava.pruning import Method, Pruner, get_pruner, parse_options
from llava.pruning.auto_budget import CEILING, AutoBudget, parse_auto
from llava.pruning.budget_curves import RULES, Curve, StoredCurves, counts_of, options_of, rule_for_mean
from llava.serve import flags

FEW = 30  # pictures; with fewer, the mean of others may differ by a tenth and more


def curves_of(method: Method, kept: KeptTokens) -> list[Curve]:
    """One for each selection that the method made over a picture: see `BudgetFinder.found`.

    A picture's curves share its units, so that their counts add up.
    """
    units = 1 if method.per == "picture" else kept.layout.views
    names = ("unexplained", "kept_after", "alone")
    return [Curve(*(one.details[name].cpu() for name in names), units) for one in kept.selections]


# --- on a model ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def read_curves(
    model: Any, processor: Any, method: Method, cases: Sequence[Case]
) -> Iterator[tuple[list[Curve], list[Curve]]]:
    """Of each picture, for its two questions."""
    ids = torch.tensor([tokenizer_image_token("<image>", model.tokenizer)], device=model.device)
    for case in cases:
        picture = load_image(case.picture)
        pixels = process_images([picture], processor, model.config)
        encoded = model.encode_pictures([view.to(model.device, model.dtype) for view in pixels], [picture.size])
        first, second = (
            curves_of(method, model.embed_prompts(ids, images=encoded, pruner=method, query=question).kept[0])
            for question in case.questions
        )
        yield first, second


def report(
    pictures: Sequence[tuple[list[Curve], list[Curve]]], mean: float, find: Callable[..., AutoBudget], unit: str
) -> str:
    """The rule for all pictures, how its counts spread, and how half of the pictures would have set it for the other.

    Args:
        find: from curves and a mean to a rule.
        unit: what the budget counts, "view" or "picture".
    """
    asked = [curves for pair in pictures for curves in pair]
    rule = find(asked, mean)
    counts = counts_of(asked, rule)
    low, high = counts.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    lines = [
        f"{len(pictures)} pictures, two questions each: {counts.mean():.1f} tokens of each {unit} on average, "
        f"{low:.0f} to {high:.0f} in nine of ten"
    ]
    if len(pictures) > 1:
        drawn = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0)).tolist()
        halves = [[curves for number in drawn[start::2] for curves in pictures[number]] for start in (0, 1)]
        held_out = [float(counts_of(halves[1 - own], find(halves[own], mean)).mean()) for own in (0, 1)]
        lines.append(f"set on one half of them, the rule keeps {held_out[0]:.1f} and {held_out[1]:.1f} of the other")
    return "\n".join([*lines, str(rule)])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.calibrate_budget",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--mean-tokens",
        type=float,
        required=True,
        metavar="T",
        help="of each view, on average; of each picture with --pruner-args per=picture",
    )
    parser.add_argument("--rule", choices=RULES, default="gain", help="rule B or A (%(default)s)")
    parser.add_argument("--floor", type=int, metavar="N", help="default: 16, of one of several views 4")
    parser.add_argument("--ceiling", metavar="N", help="a count or a share of the tokens; default: a third")
    parser.add_argument("--pictures", type=Path, required=True, help="a folder, or a text file with a path a line")
    parser.add_argument("--questions", type=Path, required=True, help="a question a line, or JSON lines (.jsonl)")
    parser.add_argument("--store", type=Path, metavar="FILE", help="keep the curves, for mean budgets of this method")
    parser.add_argument("--limit", type=int, default=100, metavar="K", help="only the first K pictures (%(default)s)")
    flags.add_checkpoint(parser)
    flags.add_base(parser)
    parser.add_argument("--pruner", default=flags.DEFAULT_METHOD, metavar="NAME", help="default: %(default)s")
    parser.add_argument("--pruner-args", nargs="+", default=[], metavar="KEY=VALUE", help="options of the pruner")
    flags.add_device(parser)
    return parser.parse_args(arguments)


def asked_method(options: argparse.Namespace) -> Pruner:
    """The method, with the bounds asked for. Raises ValueError if it cannot find its budget."""
    floor = [] if options.floor is None else [f"floor={options.floor}"]
    ceiling = [f"ceiling={CEILING if options.ceiling is None else options.ceiling}"]
    budget = str(parse_auto(":".join(["auto", *floor, *ceiling])))
    return get_pruner(options.pruner, **{**parse_options(options.pruner, options.pruner_args), "keep_tokens": budget})


def store(options: argparse.Namespace, method: Pruner, curves: Sequence[tuple[list[Curve], list[Curve]]]) -> None:
    """Write the curves for ``auto:mean_tokens=T:curves=FILE``."""
    asked = [of_question for pair in curves for of_question in pair]
    rule = (method.keep_tokens, options.rule)
    StoredCurves(method.name, options_of(method), options.model_path, *rule, asked).save(options.store)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if a rule was found, 2 with one line on standard error if none could be."""
    options = parse_arguments(arguments)
    try:
        if not (math.isfinite(options.mean_tokens) and options.mean_tokens > 0):
            raise ValueError(f"--mean-tokens must be more than 0, got {options.mean_tokens}")
        if options.limit < 1:
            raise ValueError(f"--limit must be at least 1, got {options.limit}")
        if options.store is not None and not options.store.parent.is_dir():
            raise ValueError(f"--store {options.store}: there is no folder {options.store.parent}")
        method = asked_method(options)
        cases = read_cases(options.pictures, options.questions, options.limit)
        device = pick_device(options.device)
        _, model, processor, _ = load_pretrained_model(options.model_path, options.model_base, device=device)
        curves = list(tqdm(read_curves(model, processor, method, cases), "pictures", len(cases), disable=None))

        def find(pictures: Sequence[Sequence[Curve]], mean: float) -> AutoBudget:
            return replace(rule_for_mean(pictures, mean, method.auto, options.rule), mean_tokens=mean)

        found = report(curves, options.mean_tokens, find, method.per)
        if options.store is not None:
            store(options, method, curves)
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if len(cases) < FEW:
        print(f"warning: {len(cases)} pictures are few; about 100 are enough", file=sys.stderr)
    print(found)
    return 0
