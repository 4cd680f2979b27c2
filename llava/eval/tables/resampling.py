"""A benchmark's score over resampled items: intervals, and scores that pair with those of another method.

An item is drawn as often as chance has it; what belongs together (the two questions of an MME image) is drawn
together, and every part that a score averages over (POPE's categories, MME's tasks) keeps its size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from llava.eval.benchmarks.mme import PERCEPTION

RESAMPLES = 1000
TOLERANCE = 1e-6  # between a score and the one that its own items give
COUNTED = ("TP", "FN", "FP")  # of POPE's answers, what F1 is made of
Weights = dict[str, np.ndarray]  # part -> (resamples, units)


class Resampled:
    """The score of a run as a function of how often each of its units counts.

    Args:
        benchmark: its name.
        score: what the benchmark's scorer returned: `OwnBenchmark.score`.

    Raises:
        ValueError: the score does not follow from what the scorer tells of its items.
    """

    def __init__(self, benchmark: str, score: Mapping[str, Any]) -> None:
        self.benchmark = benchmark
        if benchmark == "pope":
            if "kinds" not in score:
                raise ValueError("this POPE run was scored by an older version: score it again")
            self.parts = {part: sorted(map(str, kinds)) for part, kinds in score["kinds"].items() if kinds}
            by_name = {
                part: {str(name): score["kinds"][part][name] for name in score["kinds"][part]} for part in self.parts
            }
            self.values = {
                part: np.array([[by_name[part][name] == kind for kind in COUNTED] for name in names], float).reshape(
                    -1, 3
                )
                for part, names in self.parts.items()
            }
        elif benchmark == "mme":
            images: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
            for name, right in score["items"].items():
                task, image, _ = name.split("/", 2)
                if task in PERCEPTION:
                    images[task][image].append(right)
            self.parts = {task: sorted(own) for task, own in images.items()}
            self.values = {
                task: np.array([[np.mean(images[task][i]), min(images[task][i])] for i in names])
                for task, names in self.parts.items()
            }
        else:
            items = {str(name): float(value) for name, value in score["items"].items()}
            self.parts = {"": sorted(items)}
            self.values = {"": np.array([[items[name]] for name in self.parts[""]])}
        once = {part: np.ones((1, len(names))) for part, names in self.parts.items()}
        own = float(self.scores(once)[0])
        if abs(own - score["score"]) > TOLERANCE:
            raise ValueError(f"{benchmark}: the score {score['score']:g} is not what its items give, {own:g}")

    def scores(self, weights: Weights) -> np.ndarray:
        """The score under each row of weights, in the table's unit: (resamples,)."""
        totals = []
        for part, values in self.values.items():
            counted = weights[part] @ values  # (resamples, columns)
            size = weights[part].sum(-1)
            if self.benchmark == "pope":
                hit, missed, false = counted.T
                totals.append(np.divide(2 * hit, 2 * hit + missed + false, out=np.zeros_like(hit), where=hit > 0))
            elif self.benchmark == "mme":
                totals.append((counted / size[:, None]).sum(-1))
            else:
                totals.append(counted[:, 0] / size)
        return 100.0 * (np.sum(totals, 0) if self.benchmark == "mme" else np.mean(totals, 0))

    def draw(self, count: int, seed: int = 0) -> Weights:
        """How often each unit counts in ``count`` resamples: the same for every run of the same units."""
        generator = np.random.default_rng(seed)
        drawn = {}
        for part, names in self.parts.items():
            size = len(names)
            chances = np.full(size, 1 / max(size, 1))
            drawn[part] = generator.multinomial(size, chances, count).astype(float) if size else np.zeros((count, 0))
        return drawn

    def interval(self, share: float = 0.95, count: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
        """Between which two scores the middle ``share`` of resamples lies (percentile bootstrap)."""
        low, high = np.quantile(self.scores(self.draw(count, seed)), [(1 - share) / 2, (1 + share) / 2])
        return float(low), float(high)


def paired(first: Resampled, second: Resampled, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of two runs on the same ``count`` resamples. Raises ValueError if they answered different questions."""
    if first.parts != second.parts:
        raise ValueError(f"the two runs of {first.benchmark} did not answer the same questions")
    weights = first.draw(count, seed)
    return first.scores(weights), second.scores(weights)
