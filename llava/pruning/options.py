"""Options of a method as they are written on a command line: ``--keep-tokens 64 --pruner-args tau=0.3 gsp=false``."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from llava.pruning.base import check_budget, option_types, pruner_class


def parse_budget(text: str) -> int | float:
    """Read ``keep_tokens`` from a command line: "64" is a count, "0.25" a share. Raises ValueError."""
    try:
        budget = int(text)
    except ValueError:
        try:
            budget = float(text)
        except ValueError:
            budget = text
    check_budget(budget)
    return budget


def parse_options(name: str, assignments: Sequence[str]) -> dict[str, Any]:
    """Turn ``["tau=0.3", "gsp=false"]`` into typed keyword arguments of the pruner ``name``.

    Raises:
        ValueError: for text without "=", an unknown option or a value that does not fit the option's type.
    """
    types_of = option_types(pruner_class(name))
    options = {}
    for assignment in assignments:
        option, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"pruner options are written key=value, got {assignment!r}")
        if option not in types_of:
            raise ValueError(f"pruner '{name}' has no option {option}; its options: {', '.join(types_of)}")
        options[option] = (
            parse_budget(text) if option == "keep_tokens" else _parse_value(option, text, types_of[option])
        )
    return options


def _parse_value(option: str, text: str, kind: Any) -> Any:
    """Read ``text`` as one of the types of an option: None, bool, int, float or str."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if types.NoneType in kinds and text.lower() == "none":
        return None
    if bool in kinds:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(f"{option} must be true or false, got {text!r}")
    for number in (int, float):
        if number in kinds:
            try:
                return number(text)
            except ValueError:
                continue
    if any(k is str or typing.get_origin(k) is Literal for k in kinds):
        return text
    raise ValueError(f"{option} must be a number, got {text!r}")
