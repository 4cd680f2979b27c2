"""``keep_tokens="auto"``: a budget as a rule, and how the rule is written.

    auto                             as many as leave 5 % unexplained: auto:0.95
    auto:0.9                         rule A: the first k tokens that explain 90 %
    auto:gain=0.0006                 rule B: as many as still explain 0.06 % each
    auto:0.9:floor=8:ceiling=0.25    never fewer than 8 tokens of a view, never more than a quarter of them
    auto:mean_tokens=64:curves=FILE  64 on average over the pictures whose curves FILE has: see budget_curves.py

The rules themselves are in adaptive.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

WORD = "auto"
COVERAGE = 0.95
CEILING = 1 / 3  # of the tokens of a view
FLOOR_ALONE, FLOOR_AMONG_VIEWS = 16, 4  # of the only view of a picture, and of one of several
WRITTEN = (
    "auto, auto:0.9 (the share to explain) or auto:gain=0.0006, then :floor=N and :ceiling=N or share if wanted, or "
    "auto:mean_tokens=64:curves=FILE"
)
MEAN, CURVES = "mean_tokens", "curves"


@dataclass(frozen=True)
class AutoBudget:
    """How many tokens a view gives, as a rule.

    Args:
        coverage: rule A, the share q of what the tokens show that the kept ones must explain, 0 < q <= 1.
        gain: rule B, the share eta that every further token must explain; ``None`` where rule A decides.
        floor: tokens that a view gives at least; ``None`` is 16 of a picture's only view, 4 of each of several.
        ceiling: tokens that it gives at most, a count or a share of them. It is what `Method.count` says, and never
            all of the tokens: those would be an unpruned model.
        mean_tokens: the mean that the rule was set for, or with ``curves`` is to be set for.
        curves: file of stored curves that tell the rule, floor and ceiling for ``mean_tokens``; a method takes them
            from there when it is made.
    """

    coverage: float = COVERAGE
    gain: float | None = None
    floor: int | None = None
    ceiling: int | float = CEILING
    mean_tokens: float | None = None
    curves: str | None = None

    def __post_init__(self):
        if not 0 < self.coverage <= 1:
            raise ValueError(f"the share to explain lies above 0 and is at most 1; got {self.coverage}")
        if self.gain is not None and not 0 < self.gain < 1:
            raise ValueError(f"gain lies between 0 and 1, both excluded; got {self.gain}")
        if self.floor is not None and self.floor < 1:
            raise ValueError(f"floor is a count from 1; got {self.floor}")
        if not (self.ceiling >= 1 if isinstance(self.ceiling, int) else 0 < self.ceiling < 1):
            raise ValueError(f"ceiling is a count from 1 or a share between 0 and 1; got {self.ceiling}")
        if isinstance(self.ceiling, int) and self.floor is not None and self.floor > self.ceiling:
            raise ValueError(f"floor is at most ceiling; got floor={self.floor} and ceiling={self.ceiling}")
        if self.mean_tokens is not None and not 1 <= self.mean_tokens < math.inf:
            raise ValueError(f"mean_tokens is a number of tokens from 1; got {self.mean_tokens}")

    def __str__(self) -> str:
        if self.curves is not None:
            return f"{WORD}:{MEAN}={self.mean_tokens:g}:{CURVES}={self.curves}"
        parts = [repr(self.coverage) if self.gain is None else f"gain={self.gain!r}", *self._bounds()]
        return ":".join([WORD, *parts])

    def _bounds(self) -> list[str]:
        floor = [] if self.floor is None else [f"floor={self.floor}"]
        ceiling = [] if self.ceiling == CEILING else [f"ceiling={self.ceiling!r}"]
        return floor + ceiling + ([] if self.mean_tokens is None else [f"{MEAN}={self.mean_tokens:g}"])

    @property
    def tag(self) -> str:
        """For the name of a run: auto95, auto-gain0.0006, auto90-floor8, auto-mean64."""
        if self.mean_tokens is not None:
            return f"{WORD}-mean{self.mean_tokens:g}"
        rule = f"{100 * self.coverage:.10g}" if self.gain is None else f"-gain{self.gain!r}"
        return "-".join([WORD + rule, *(bound.replace("=", "") for bound in self._bounds())])

    def most(self, tokens: int) -> int:
        """The ceiling out of ``tokens``."""
        most = self.ceiling if isinstance(self.ceiling, int) else int(self.ceiling * tokens + 0.5)
        return max(1, min(most, tokens - 1))


@lru_cache(maxsize=64)
def parse_auto(text: str) -> AutoBudget:
    """Read "auto:0.9:floor=8". Raises ValueError, which says how it is written."""
    rule, _, curves = text.partition(f":{CURVES}=")  # the rest is a path
    word, *parts = rule.split(":")
    given: dict[str, int | float | str] = {}
    for number, part in enumerate(parts):
        name, equals, value = part.partition("=")
        if not equals:
            name, value = "coverage", part
        number_is_in_place = equals or number == 0
        if name not in ("coverage", "gain", "floor", "ceiling", MEAN) or name in given or not number_is_in_place:
            raise _miswritten(text)
        try:
            is_count = name == "floor" or (name == "ceiling" and value.isdecimal())
            given[name] = int(value) if is_count else float(value)
        except ValueError:
            raise _miswritten(text) from None
    if word != WORD or ("coverage" in given and "gain" in given) or (f":{CURVES}=" in text and not curves):
        raise _miswritten(text)
    if curves and given.keys() != {MEAN}:
        raise ValueError(f"keep_tokens={text}: {CURVES} goes with {MEAN} alone; rule and bounds are those of the file")
    if not curves and MEAN in given and not given.keys() & {"coverage", "gain"}:
        raise ValueError(f"keep_tokens={text}: {how_to_make_curves(given[MEAN], 'FILE')}")
    try:
        return AutoBudget(**given, curves=curves or None)
    except ValueError as error:
        raise ValueError(f"keep_tokens={text}: {error}") from None


def how_to_make_curves(mean_tokens: float, file: object) -> str:
    """What to do for a mean budget where no curves are stored."""
    return (
        "a mean needs curves of pictures like yours: make them by python -m llava.eval.calibrate_budget "
        f"--mean-tokens {mean_tokens:g} --pictures FOLDER --questions FILE --store {file}, with the model, the method "
        f"and its options, then write {WORD}:{MEAN}={mean_tokens:g}:{CURVES}={file}"
    )


def is_auto(keep_tokens: object) -> bool:
    """Whether a budget is meant as a rule, well written or not."""
    return isinstance(keep_tokens, str) and keep_tokens.split(":")[0] == WORD


def _miswritten(text: str) -> ValueError:
    return ValueError(f"keep_tokens={text}: a budget that finds itself is written {WRITTEN}")
