"""Options of a method: the one check of their types and ranges, and how they are written on a command line.

An option is a field of the method's dataclass; its annotation says what it may be, ``Annotated[float, Range(0, 1)]``.
`check_options` holds every method to that when it is made, wherever the values come from.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

from llava.pruning.auto_budget import WRITTEN, is_auto, parse_auto

LARGEST_INT = 2**63 - 1  # of an int64 tensor


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``; ``None`` does not bound. ``open`` leaves both ends out."""

    low: float | None = None
    high: float | None = None
    open: bool = False

    def __contains__(self, value: float) -> bool:
        if self.open:
            return (self.low is None or value > self.low) and (self.high is None or value < self.high)
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.high is None or self.high == LARGEST_INT:
            return f"more than {self.low}" if self.open else f"at least {self.low}"
        return f"between {self.low} and {self.high}" + (", both excluded" if self.open else "")


Seed = Annotated[int, Range(0, LARGEST_INT)]
Positive = Annotated[float, Range(0, open=True)]
Count = Annotated[int, Range(1, LARGEST_INT)]
Cosine = Annotated[float, Range(-1, 1)]
EdgeWeight = Annotated[float, Range(-40, 40)]  # of the graph's exponent: times a difference of cosines it stays finite


@lru_cache(maxsize=256)
def option_types(cls: type) -> dict[str, Any]:
    """The annotation of every option of a method's class, by name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {option.name: hints[option.name] for option in dataclasses.fields(cls)}


def check_options(values: Any) -> None:
    """Raise ValueError unless every field of a dataclass instance is of its annotated type and in its range."""
    for name, kind in option_types(type(values)).items():
        if name == "keep_tokens":
            check_budget(values.keep_tokens)
        else:
            check_value(name, getattr(values, name), kind)


def check_value(name: str, value: Any, kind: Any) -> None:
    """Raise ValueError unless ``value`` is what the annotation ``kind`` allows; says what was expected.

    A float is finite, an int and a float are no bool, an int may stand for a float.
    """
    kinds = _alternatives(kind)
    if not any(_fits(value, each) for each in kinds):
        raise ValueError(f"{name} must be {' or '.join(map(_described, kinds))}; got {value!r}")


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    if kind is types.NoneType:
        return value is None
    if typing.get_origin(kind) is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in typing.get_args(kind))
    if typing.get_origin(kind) is Annotated:
        base, bounds = typing.get_args(kind)
        return _fits(value, base) and value in bounds
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INT
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, typing.get_origin(kind) or kind)


def _described(kind: Any) -> str:
    if kind is types.NoneType:
        return "none"
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is Annotated:
        base, bounds = typing.get_args(kind)
        return f"{_described(base)} {bounds}"
    return {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}.get(kind, kind.__name__)


def check_budget(keep_tokens: Any) -> None:
    """Raise ValueError unless ``keep_tokens`` is a count (int >= 1), a share (float strictly between 0 and 1) or a
    rule of auto_budget.py.
    """
    if is_auto(keep_tokens):
        parse_auto(keep_tokens)
        return
    is_count = isinstance(keep_tokens, int) and not isinstance(keep_tokens, bool) and 1 <= keep_tokens <= LARGEST_INT
    is_share = isinstance(keep_tokens, float) and 0 < keep_tokens < 1
    if not (is_count or is_share):
        raise ValueError(
            f"keep_tokens must be a count (integer from 1), a share of the tokens (between 0 and 1, both excluded) or "
            f"{WRITTEN}; got {keep_tokens!r}"
        )


# --- from text -----------------------------------------------------------------------------------------------------


def parse_budget(text: str) -> int | float | str:
    """Read ``keep_tokens`` from a command line: "64" is a count, "0.25" a share, "auto:0.9" a rule in its full form.

    Raises:
        ValueError: none of these; says how they are written.
    """
    if is_auto(text):
        return str(parse_auto(text))
    budget = _number(text)
    check_budget(text if budget is None else budget)
    return budget


def parse_assignments(cls: type, assignments: Sequence[str]) -> dict[str, Any]:
    """Turn ``["tau=0.3", "gsp=false"]`` into typed keyword arguments of a method's class.

    Raises:
        ValueError: for text without "=", an unknown option, one given twice, or a value that the option may not have.
    """
    types_of = option_types(cls)
    options: dict[str, Any] = {}
    for assignment in assignments:
        option, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"pruner options are written key=value, got {assignment!r}")
        if option not in types_of:
            raise ValueError(f"pruner '{cls.name}' has no option {option}; its options: {', '.join(types_of)}")
        if option in options:
            raise ValueError(f"option {option} is given twice: {options[option]} and {text}")
        options[option] = (
            parse_budget(text) if option == "keep_tokens" else _parse_value(option, text, types_of[option])
        )
    return options


def _parse_value(option: str, text: str, kind: Any) -> Any:
    """Read ``text`` as one of the types that an option may have: none, a bool, a number or text."""
    readings = [text, _number(text)]
    if text.lower() in ("true", "false"):
        readings.insert(0, text.lower() == "true")
    if text.lower() == "none":
        readings.insert(0, None)
    kinds = _alternatives(kind)
    for value in readings:
        if (value is not None or text.lower() == "none") and any(_fits(value, each) for each in kinds):
            return value
    raise ValueError(f"{option} must be {' or '.join(map(_described, kinds))}; got {text!r}")


def _number(text: str) -> int | float | None:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return None
