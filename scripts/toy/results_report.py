"""RESULTS.md: right answers in percent, with intervals that are paired over what was asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from world import POINTED, SKILLS

RESAMPLES = 2000
REFERENCE = "script"
WHOLE = {"unpruned": "576 tokens", "blind": "no picture"}  # rows without a budget
TABLE_5 = ("none of the three", "graph", "relevance", "graph + relevance", "relevance + DPP", REFERENCE)
TITLES = {
    "crowded": "Crowded scenes, 20 to 32 objects, a flock among them",
    "ordinary": "Ordinary scenes, 8 to 16 objects",
}


@dataclass(frozen=True)
class Measured:
    """Which questions of a world a row got right at a budget ("None" where it has none)."""

    world: str
    label: str
    budget: str
    right: np.ndarray


@dataclass(frozen=True)
class Interval:
    """A mean in percent and the 95 % interval around it."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2

    @property
    def points(self) -> str:
        """A difference: "+1.2 (-0.3 to +2.7)"."""
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval lies on one side of nothing, else 0."""
        return -1 if self.high < 0 else 1 if self.low > 0 else 0

    @property
    def arrow(self) -> str:
        """Of a difference to Script: better, worse, or neither by the interval."""
        return ("", " ▲", " ▼")[self.sign]


class Resampling:
    """The same resamples for every row: scenes are drawn with replacement, each with all of its questions."""

    def __init__(self, scenes: Sequence[int], resamples: int = RESAMPLES, seed: int = 0) -> None:
        self.scenes = np.asarray(scenes)
        number = int(self.scenes.max()) + 1
        rng = np.random.default_rng(seed)
        self.drawn = rng.multinomial(number, np.full(number, 1 / number), size=resamples)  # (R, scenes)
        self.counts = self.drawn @ np.bincount(self.scenes, minlength=number)

    def interval(self, values: np.ndarray) -> Interval:
        """Of the mean of one value per question, in percent."""
        sums = self.drawn @ np.bincount(self.scenes, values, minlength=self.drawn.shape[1])
        low, high = np.percentile(100 * sums / self.counts, (2.5, 97.5))
        return Interval(100 * float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class Table:
    """One world's cells, in the order in which they were measured; seeds of `random` joined to their mean."""

    asked: list[tuple[int, str]]  # scene and skill of each question
    values: dict[tuple[str, str], np.ndarray]

    @classmethod
    def of(cls, asked: list[tuple[int, str]], measured: Sequence[Measured]) -> Table:
        groups: dict[tuple[str, str], list[np.ndarray]] = {}
        for cell in measured:
            groups.setdefault((cell.label.split(", seed")[0], cell.budget), []).append(cell.right.astype(float))
        return cls(asked, {key: np.mean(seeds, axis=0) for key, seeds in groups.items()})

    @property
    def budgets(self) -> list[str]:
        return sorted({m for _, m in self.values if m != "None"}, key=int, reverse=True)

    def questions(self, budget: str) -> int:
        return len(self.values[REFERENCE, budget])

    def cell(self, label: str, budget: str, skill: str | None, against: str | None = None) -> Interval:
        """Accuracy of a row, or its difference to row ``against`` on the same questions; of one skill or of all."""
        own = self.values[label, budget if label not in WHOLE else "None"]
        number = self.questions(budget) if budget in self.budgets else len(own)
        own = own[:number]
        if against is not None:
            own = own - self.values[against, budget][:number]
        chosen = np.array([skill in (None, kind) for _, kind in self.asked[:number]])
        scenes = [scene for scene, _ in self.asked[:number]]
        return Resampling(np.array(scenes)[chosen]).interval(own[chosen])


def cell_text(table: Table, label: str, budget: str, skill: str | None) -> str:
    """ "93.1 ± 1.2", with an arrow where the difference to Script is told from nothing."""
    shown = table.cell(label, budget, skill)
    arrow = "" if label == REFERENCE else table.cell(label, budget, skill, REFERENCE).arrow
    return f"{shown.mean:.1f} ± {shown.half:.1f}{arrow}"


def grid(table: Table, labels: Sequence[str], skill: str | None) -> list[str]:
    lines = ["| tokens | " + " | ".join(table.budgets) + " |", "|---|" + "---|" * len(table.budgets)]
    for label in labels:
        name = f"{label} ({WHOLE[label]})" if label in WHOLE else label
        lines.append(f"| {name} | " + " | ".join(cell_text(table, label, m, skill) for m in table.budgets) + " |")
    return [*lines, ""]


def difference(table: Table, more: str, less: str, budget: str, skill: str | None) -> Interval:
    """What ``more`` answers better than ``less``, one of which may have no budget."""
    if less not in WHOLE:
        return table.cell(more, budget, skill, less)
    found = table.cell(less, budget, skill, more)
    return Interval(-found.mean, -found.high, -found.low)


def steps_of(table: Table, budget: str, skill: str | None) -> dict[str, str]:
    """The differences that the paper's ablation is about."""
    pairs = (
        ("graph", "none of the three"),
        ("relevance", "graph"),
        ("graph + relevance", "relevance"),
        ("relevance + DPP", "relevance"),
        ("relevance + DPP", "DPP, no question"),
        ("script", "relevance + DPP"),
        ("script", "trim"),
        ("script", "cdpruner"),
        ("script", "script, relevance language"),
        ("script", "unpruned"),
    )
    row = {}
    for more, less in pairs:
        if all((label in WHOLE) or (label, budget) in table.values for label in (more, less)):
            found = difference(table, more, less, budget, skill)
            row[f"{more} - {less}"] = found.points
    return row


def world_part(name: str, table: Table, reading: dict, comparing: dict, relevance: dict) -> list[str]:
    labels = list(dict.fromkeys(label for label, _ in table.values))
    labels.sort(key=lambda label: (label not in TABLE_5, TABLE_5.index(label) if label in TABLE_5 else 0))
    few, all_of_them = table.budgets[0], table.budgets[-1]
    lines = [
        f"## {TITLES[name]}",
        "",
        f"{table.questions(all_of_them)} questions a cell at {all_of_them} tokens"
        + (f", {table.questions(few)} at {few}." if table.questions(few) != table.questions(all_of_them) else "."),
        "",
    ]
    for skill in (None, *SKILLS):
        lines += [f"### {'All questions' if skill is None else skill.capitalize()}", "", *grid(table, labels, skill)]
    small = [m for m in table.budgets if int(m) <= 16]
    if small:
        lines += ["### What each part adds, in points, with 95 % intervals", ""]
        for skill in (None, *SKILLS):
            columns = [steps_of(table, m, skill) for m in small]
            lines += [
                f"| {'all questions' if skill is None else skill} | "
                + " | ".join(f"{m} tokens" for m in small)
                + " |",
                "|---|" + "---|" * len(small),
                *(f"| {pair} | " + " | ".join(column[pair] for column in columns) + " |" for pair in columns[0]),
                "",
            ]
    lines += [
        "### What is read of signs, unpruned",
        "",
        "| | right | right but for the order | questions |",
        "|---|---|---|---|",
        *(f"| {kind} | " + " | ".join(map(str, counts)) + " |" for kind, counts in sorted(reading.items())),
        "",
        "### What has not been learned: two things compared, unpruned",
        "",
        "| | right | questions |",
        "|---|---|---|",
        *(f"| {kind} | " + " | ".join(map(str, counts)) + " |" for kind, counts in comparing.items()),
        "",
        "### Does relevance find the asked object?",
        "",
        "AUC: the probability that a patch of the asked object is more relevant than one that is not. "
        "Below it, in percent: the share of the kept tokens that lie on the object, and how often any does.",
        "",
        "| | " + " | ".join(POINTED) + " |",
        "|---|" + "---|" * len(POINTED),
    ]
    for key in sorted(next(iter(relevance.values())), key=lambda key: key.split(",")[0]):
        is_area = key.startswith("AUC")
        values = [relevance[skill][key] for skill in POINTED]
        lines.append(f"| {key} | " + " | ".join(f"{v:.3f}" if is_area else f"{100 * v:.1f}" for v in values) + " |")
    return [*lines, ""]


def document(
    about: dict, measured: Sequence[Measured], asked: dict, reading: dict, comparing: dict, relevance: dict
) -> str:
    """RESULTS.md. ``asked``: scene and skill of every question; ``reading``, ``comparing`` and ``relevance``: reports,
    by world.
    """
    lines = [
        "# The method on the toy",
        "",
        f"`{about['command']}` at commit {about['commit']}, {about['machine']}.",
        "Scenes are new to training and to the committed test sets. Cells are right answers in percent ± half of the "
        f"95 % interval ({RESAMPLES} bootstrap resamples of scenes, each with all of its questions); all rows are "
        "asked the same questions. ▲ and ▼: better and worse than `script` by the interval of the paired difference; "
        "in a table of a hundred cells some are so by chance.",
        "",
        "The first six rows are those of the paper's Table 5. `native` is a smaller picture of about as many tokens, "
        '`blind` no picture at all, `random` the mean of its seeds. "relevance none" is Script without a question, '
        '"relevance language" reads it in the language model instead of CLIP.',
        "",
    ]
    for name, rows in asked.items():
        own = [cell for cell in measured if cell.world == name]
        lines += world_part(name, Table.of(rows, own), reading[name], comparing[name], relevance[name])
    return "\n".join(lines).rstrip() + "\n"
