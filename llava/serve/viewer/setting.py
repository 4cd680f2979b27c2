"""What one look is made with, and how it is written in an address: ``?question=...&method=script&keep=16``."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from llava.pruning import Method, pruner_class
from llava.pruning.options import option_types
from llava.serve.flags import DEFAULT_METHOD, FULL, make_pruner

MOST_LETTERS = 2000  # of a question


@dataclass(frozen=True)
class Setting:
    """A question, a method, a budget and the method's options, as they are written on the command line.

    Raises:
        ValueError: an unknown method, or a budget or option that it may not have; no question, or one too long.
    """

    question: str
    method: str = DEFAULT_METHOD
    keep: str = FULL
    options: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.question.strip():
            raise ValueError("no question: type one, such as What color is the star?")
        if len(self.question) > MOST_LETTERS:
            raise ValueError(f"the question has {len(self.question)} letters, more than the limit of {MOST_LETTERS}")
        self.pruner()

    def pruner(self) -> Method | None:
        """The method, ready for use; ``None`` where everything is kept."""
        return make_pruner(self.method, self.keep, self.options)

    def label(self) -> str:
        """Method, budget and options in a line."""
        if self.keep == FULL:
            return "all tokens"
        return " ".join([self.method, self.keep, *self.options])

    def as_dict(self) -> dict[str, Any]:
        return {"question": self.question, "method": self.method, "keep": self.keep, "options": list(self.options)}

    def query(self, picture: str | None) -> str:
        """As the query of an address, with the name of a bundled picture; `from_query` reads it."""
        named = {"picture": picture} if picture else {}
        fields = {**named, "question": self.question, "method": self.method, "keep": self.keep}
        return "?" + urlencode([*fields.items(), *(("option", option) for option in self.options)])

    @classmethod
    def from_query(cls, values: Mapping[str, Sequence[str]]) -> Setting:
        """From the values of an address by name. Raises ValueError for what a setting may not have."""

        def one(name: str, otherwise: str) -> str:
            given = values.get(name) or [otherwise]
            if len(given) > 1:
                raise ValueError(f"{name} is given {len(given)} times in the address")
            return given[0]

        options = tuple(values.get("option") or ())
        return cls(one("question", ""), one("method", DEFAULT_METHOD), one("keep", FULL), options)


def parse_entry(text: str) -> tuple[str, tuple[str, ...]]:
    """Read "script tau=0.3 gsp=false": a method and its options. Raises ValueError for none."""
    name, *options = text.split() or [""]
    pruner_class(name)
    return name, tuple(options)


@dataclass(frozen=True)
class Option:
    """An option of a method as a form shows it.

    Args:
        kind: "choice", "switch" or "text".
        choices: of a choice, as they are written.
        default: as it is written.
        help: from the docstring of the class that has it.
    """

    name: str
    kind: Literal["choice", "switch", "text"]
    default: str
    help: str
    choices: tuple[str, ...] = ()


def options_of(method: str) -> list[Option]:
    """The options of a method, its own before those that it shares with others; the budget is none of them."""
    cls = pruner_class(method)
    types, helps = option_types(cls), docstring_help(cls)
    own = [option for option in dataclasses.fields(cls) if option.name in inspect.get_annotations(cls)]
    shared = [option for option in dataclasses.fields(cls) if option not in own]
    found = []
    for one in (*own, *shared):
        if one.name != "keep_tokens":
            kind, choices = _form_of(types[one.name])
            found.append(Option(one.name, kind, written(one.default), helps.get(one.name, ""), choices))
    return found


def written(value: Any) -> str:
    """A value of an option as the command line takes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _form_of(kind: Any) -> tuple[Literal["choice", "switch", "text"], tuple[str, ...]]:
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Literal:
        return "choice", tuple(map(written, typing.get_args(kind)))
    return ("switch" if kind is bool else "text"), ()


def docstring_help(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its parents say of their arguments, by name; the class's own words win."""
    found: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        _, _, arguments = (parent.__dict__.get("__doc__") or "").partition("    Args:\n")
        for names, text in re.findall(r"^ {8}(\w[\w, ]*): (.*(?:\n {12,}.*)*)", arguments, re.MULTILINE):
            plain = re.sub(r"\s+", " ", text.replace("``", "")).replace("`", "")
            found.update(dict.fromkeys(re.split(r",\s*", names), plain))
    return found
