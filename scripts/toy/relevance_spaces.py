"""How well each source of relevance finds the asked object's patches on the toy, and how much of that is the question.

    python scripts/toy/relevance_spaces.py --json playground/results/relevance_spaces_toy.json

Mean area under the ROC curve (0.5 is chance) over 360 questions about scenes that training has not seen:

* *asked*: patches of the asked object against all others of the picture, by the question itself;
* *another*, *describe*: the same by another question about the same scene, whose objects share no patch with the asked
  ones, and by "Describe the image.". What they reach is not the question: any object sticks out of the background;
* *pair*, *pair describe*: patches of the asked object against those of the other question's object alone, where
  sticking out of the background helps nothing.

Prints a table and, on the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from files import write_text
from torch import Tensor
from tqdm import tqdm
from world import Asked, World, area_under_curve, build_world

from llava.eval.measure.how_made import how_made
from llava.model.builder import DEFAULT_CHECKPOINT, load_pretrained_model
from llava.pruning.functional import relevance_scores
from llava.relevance.first_attention import FirstAttention
from llava.relevance.heads import HeadWeights
from llava.relevance.language import language_relevance, word_distribution

SOURCES = ("clip", "language", "qk", "words", "projector", "none")
MEASURES = ("asked", "another", "describe", "pair", "pair describe")
DESCRIBE = "Describe the image."
PER_SKILL = 3  # questions about a scene


class Reader:
    """Scores a picture's patches by a text, in every space that the toy has.

    Args:
        heads: weights of the first attention's heads; ``None`` weighs all alike.
    """

    def __init__(self, model, tokenizer, world: World, heads: HeadWeights | None = None) -> None:
        self.model, self.tokenizer, self.world = model, tokenizer, world
        self.tower = model.get_vision_tower()
        self.patches = world.encoded.image_embeds(self.tower)
        self.attention = FirstAttention.find(model.get_model())
        self.heads = None if heads is None else heads.for_attention(self.attention)

    @cache  # noqa: B019 - a reader lives as long as the command
    def scores(self, text: str, scene: int) -> dict[str, Tensor]:
        """(n,) of each source."""
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)
        words = self.model.get_input_embeddings()(ids)[None]
        tokens = self.world.encoded.features[scene][None]
        valid = self.world.encoded.layouts[scene].eligible
        embeds, mask = self.tower.text_embeds([text])
        p_words = word_distribution(words, tokens, None, valid)
        p_qk = self.attention.distribution(words, tokens, None, valid, self.heads)
        sources = {
            "clip": relevance_scores(self.patches[scene][None], embeds, mask, self.model.relevance_sign),
            "language": language_relevance(p_words, p_qk, valid),
            "qk": language_relevance(None, p_qk, valid),
            "words": language_relevance(p_words, None, valid),
            "projector": relevance_scores(tokens, words.mean(1, keepdim=True)),
            "none": torch.ones_like(p_qk),
        }
        return {name: score[0] for name, score in sources.items()}


def another_question(world: World, asked: Asked) -> Asked | None:
    """The next question about the same scene, in a circle, whose objects share no patch with those of ``asked``."""
    same = [other for other in world.asked if other.scene == asked.scene]
    start = same.index(asked)
    circle = same[start + 1 :] + same[:start]
    return next((other for other in circle if other.target.any() and not (other.target & asked.target).any()), None)


def measure(reader: Reader) -> dict[str, dict[str, list[float]]]:
    """Areas under the curve, by source and by what is measured."""
    areas: dict[str, dict[str, list[float]]] = {source: {name: [] for name in MEASURES} for source in SOURCES}
    for asked in tqdm(reader.world.asked, desc="questions", disable=None):
        shown = reader.world.encoded.layouts[asked.scene].eligible[0].numpy()
        other = another_question(reader.world, asked)
        if not (asked.target & shown).any() or other is None or not (other.target & shown).any():
            continue
        either = shown & (asked.target | other.target)
        for measure, text, among in (
            ("asked", asked.question.text, shown),
            ("another", other.question.text, shown),
            ("describe", DESCRIBE, shown),
            ("pair", asked.question.text, either),
            ("pair describe", DESCRIBE, either),
        ):
            for source, score in reader.scores(text, asked.scene).items():
                area = area_under_curve(score.float().numpy()[among], asked.target[among])
                areas[source][measure].append(area)
    return areas


def summary(areas: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, its standard error and the number of questions, by source and by what was measured."""
    return {
        source: {
            name: {
                "auc": round(statistics.fmean(values), 4),
                "standard_error": round(statistics.stdev(values) / math.sqrt(len(values)), 4),
                "questions": len(values),
            }
            for name, values in by_measure.items()
        }
        for source, by_measure in areas.items()
    }


def print_table(table: dict[str, dict[str, dict[str, float]]]) -> None:
    print(f"{'source':10s}" + "".join(f"{name:>18s}" for name in MEASURES))
    for source, row in table.items():
        cells = (f"{row[name]['auc']:.3f} +- {row[name]['standard_error']:.3f}" for name in MEASURES)
        print(f"{source:10s}" + "".join(f"{cell:>18s}" for cell in cells))


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--scenes", type=int, default=48, help="%(default)s have 360 questions about objects")
    parser.add_argument("--heads", type=Path, help="weights of heads, for qk and language")
    parser.add_argument("--json", type=Path, help="write the figures here, with how they were made")
    options = parser.parse_args(given)
    heads = None if options.heads is None else HeadWeights.read(options.heads)
    tokenizer, model, image_processor, _ = load_pretrained_model(options.model_path, device="cpu")
    world = build_world(model, image_processor, options.scenes, PER_SKILL)
    table = summary(measure(Reader(model, tokenizer, world, heads)))
    print_table(table)
    report = {
        **how_made("python scripts/toy/relevance_spaces.py", given),
        "heads": None if heads is None else heads.made,
        "sources": table,
    }
    if options.json is not None:
        write_text(options.json, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
