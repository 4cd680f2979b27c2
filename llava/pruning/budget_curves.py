"""What a rule of ``keep_tokens="auto"`` keeps on average, told from stored curves: one greedy pass a question.

A method's order over a picture, and what each of its tokens explains, tell what every rule would keep of it.
`llava.eval.calibrate_budget` makes such curves from pictures and questions and stores them (``--store FILE``);
``keep_tokens="auto:mean_tokens=64:curves=FILE"`` reads them wherever a count is accepted, and finds the rule whose
mean is 64. The curves belong to a model, to a method and to its options; method and options are checked.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.pruning.adaptive import kept_by_rule
from llava.pruning.auto_budget import AutoBudget, how_to_make_curves, parse_auto

STEPS = 60  # of the bisection
FORMAT = "script-llava budget curves 1"
RULES = ("gain", "share")  # B and A


@dataclass(frozen=True)
class Curve:
    """What a method's orders over one picture explain: of each of its B selections.

    Args:
        share, kept, alone: as in `kept_by_rule`.
        units: what the budget counts: views, or 1 for a picture with ``per=picture``.
    """

    share: Tensor
    kept: Tensor
    alone: Tensor
    units: int


def counts_of(pictures: Sequence[Sequence[Curve]], rule: AutoBudget) -> Tensor:
    """Tokens that a rule keeps for each unit, of each picture: (pictures,) float64."""
    return Together(pictures).counts(rule)


class Together:
    """The curves of all pictures, one below the other: longer by their own last values, which changes no count."""

    def __init__(self, pictures: Sequence[Sequence[Curve]]) -> None:
        curves = [curve for picture in pictures for curve in picture]
        length = max(curve.share.shape[1] for curve in curves)

        def long(values: Tensor) -> Tensor:
            return torch.cat([values, values[:, -1:].expand(-1, length - values.shape[1])], dim=1)

        self.share = torch.cat([long(curve.share) for curve in curves])
        self.kept = torch.cat([long(curve.kept) for curve in curves])
        self.alone = torch.cat([curve.alone for curve in curves])
        self.pictures = len(pictures)
        rows = [(number, curve) for number, picture in enumerate(pictures) for curve in picture]
        self.picture = torch.tensor([number for number, curve in rows for _ in curve.share])
        self.units = torch.tensor([curve.units for _, curve in rows for _ in curve.share], dtype=torch.float64)

    def counts(self, rule: AutoBudget) -> Tensor:
        """`counts_of` these pictures."""
        kept = kept_by_rule(rule, self.share, self.kept, self.alone) / self.units
        return torch.zeros(self.pictures, dtype=torch.float64).index_add_(0, self.picture, kept)


def rule_for_mean(pictures: Sequence[Sequence[Curve]], mean: float, bounds: AutoBudget, by: str) -> AutoBudget:
    """The rule that keeps ``mean`` tokens for each unit on average over pictures.

    Args:
        bounds: whose floor and ceiling the rule has.
        by: "share", rule A, or "gain", rule B.

    Raises:
        ValueError: no rule within these bounds keeps so many or so few.
    """
    together = Together(pictures)

    def rule_at(x: float) -> AutoBudget:
        """x from 0, which keeps least, to 1: log-spaced, since the thresholds that matter lie close to an end."""
        tiny = float(f"{0.999 * 10 ** (-9 * x):.5g}")
        return replace(bounds, gain=tiny) if by == "gain" else replace(bounds, coverage=round(1 - tiny, 12))

    def mean_at(x: float) -> float:
        return float(together.counts(rule_at(x)).mean())

    least, most = mean_at(0.0), mean_at(1.0)
    if not least <= mean <= most:
        raise ValueError(
            f"a mean of {mean:g} tokens cannot be had: within this floor and ceiling rules keep {least:.1f} to "
            f"{most:.1f}"
        )
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if mean_at(middle) > mean else (middle, high)
    return min((rule_at(low), rule_at(high)), key=lambda rule: abs(float(together.counts(rule).mean()) - mean))


# --- stored --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredCurves:
    """Curves of pictures, one list for each question, and what they belong to.

    Args:
        method: its name.
        options: its other options than the budget.
        model: checkpoint that they were made with, for people.
        bounds: whose floor and ceiling every rule has, as text.
        rule: "gain" or "share".
    """

    method: str
    options: dict[str, Any]
    model: str
    bounds: str
    rule: str
    pictures: list[list[Curve]]

    def save(self, path: Path) -> None:
        """Write JSON; numbers of float32 come back as they were."""
        pictures = [[_listed(curve) for curve in picture] for picture in self.pictures]
        fields = {name: getattr(self, name) for name in ("method", "options", "model", "bounds", "rule")}
        text = json.dumps({"format": FORMAT} | fields | {"pictures": pictures}, separators=(",", ":"))
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> StoredCurves:
        """Raises ValueError if the file does not hold curves, OSError if it cannot be read."""
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            if held.pop("format") != FORMAT:
                raise ValueError
            pictures = [[_curve(**curve) for curve in picture] for picture in held.pop("pictures")]
            parse_auto(held["bounds"])
            if not pictures or held["rule"] not in RULES:
                raise ValueError
            return cls(**held, pictures=pictures)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} holds no curves of llava.eval.calibrate_budget") from None


def options_of(method: Any) -> dict[str, Any]:
    """A method's options but for the budget, as JSON has them."""
    names = [option.name for option in dataclasses.fields(method) if option.name != "keep_tokens"]
    return {name: getattr(method, name) for name in names}


def set_by_curves(rule: AutoBudget, method: Any) -> AutoBudget:
    """The rule for ``rule.mean_tokens`` by the curves in the file that it names.

    Raises:
        ValueError: no such file, curves of another method or of other options, or a mean that no rule has; says how
            to make the curves.
    """
    path = Path(rule.curves)
    asked = f"keep_tokens={rule}"
    if not path.is_file():
        raise ValueError(f"{asked}: there is no file {path}; {how_to_make_curves(rule.mean_tokens, path)}")
    stamp = path.stat()
    stored, found = _read_and_set(path, rule.mean_tokens, (stamp.st_mtime_ns, stamp.st_size))
    own = options_of(method)
    if stored.method != method.name or stored.options != own:
        differing = [f"{name}={value}" for name, value in stored.options.items() if own.get(name, ...) != value]
        made_for = f"{stored.method} with {', '.join(differing)}" if stored.method == method.name else stored.method
        raise ValueError(
            f"{asked}: these curves were made for {made_for} (model {stored.model}), not for this method and its "
            f"options; {how_to_make_curves(rule.mean_tokens, 'FILE')}"
        )
    if isinstance(found, str):
        raise ValueError(f"{asked}: {found}")
    return found


@lru_cache(maxsize=8)
def _read_and_set(path: Path, mean: float, stamp: tuple[int, int]) -> tuple[StoredCurves, AutoBudget | str]:
    """The curves of a file and the rule, or why there is none; ``stamp`` tells one state of the file from another."""
    stored = StoredCurves.load(path)
    try:
        found = rule_for_mean(stored.pictures, mean, parse_auto(stored.bounds), stored.rule)
    except ValueError as error:
        return stored, str(error)
    return stored, replace(found, mean_tokens=mean)


def _listed(curve: Curve) -> dict[str, Any]:
    share = [[float(f"{value:.9g}") for value in row] for row in curve.share.tolist()]
    return {"share": share, "kept": curve.kept.tolist(), "alone": curve.alone.tolist(), "units": curve.units}


def _curve(share: list, kept: list, alone: list, units: int) -> Curve:
    return Curve(torch.tensor(share), torch.tensor(kept), torch.tensor(alone), int(units))
