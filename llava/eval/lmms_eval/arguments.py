"""The model arguments of ``--model_args a=b,c=d``: typed, checked, unknown ones refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from llava.pruning import Pruner
from llava.serve.flags import FULL, make_pruner


@dataclass(frozen=True)
class ModelArguments:
    """Arguments that both models take.

    Args:
        pretrained: the checkpoint.
        pruner: name of the method.
        keep_tokens: visual tokens kept per view (image, tile, frame): a count, a share, "auto" or "full".
        pruner_args: options of the method, ``key=value`` with spaces between them.
        batch_size: prompts at once.
        device: "auto", "cpu", "cuda", ...; with several processes each takes the GPU of its rank.
        dtype: "auto", "float32", "float16" or "bfloat16".
        attn_implementation: as Transformers names them.
        max_frames_num: most frames of a video.
        on_error: "stop" at a visual that cannot be read, or "skip": answer nothing, count it and list it.
        answers: folder in which answers are kept as they come, with settings and a summary; "" keeps none.
    """

    pretrained: str = ""
    pruner: str = "script"
    keep_tokens: int | float | str = FULL
    pruner_args: str = ""
    batch_size: int = 1
    device: str = "auto"
    dtype: str = "auto"
    attn_implementation: str | None = None
    max_frames_num: int = 64
    on_error: str = "stop"
    answers: str = ""

    def __post_init__(self) -> None:
        if not self.pretrained:
            raise ValueError("the model argument pretrained is missing: pretrained=CHECKPOINT")
        if self.batch_size < 1 or self.max_frames_num < 1:
            raise ValueError("batch_size and max_frames_num start at 1")
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"on_error must be stop or skip, got {self.on_error!r}")
        self.make_pruner()

    def make_pruner(self) -> Pruner | None:
        """The method asked for; ``None`` for "full", after checking name and options all the same."""
        return make_pruner(self.pruner, str(self.keep_tokens), self.pruner_args.split())


Arguments = TypeVar("Arguments", bound=ModelArguments)


def read_arguments(kind: type[Arguments], given: Mapping[str, Any]) -> Arguments:
    """Model arguments as the harness hands them over: numbers and true/false parsed, the rest text.

    Raises:
        ValueError: an unknown name, or a value of the wrong type; lists what is valid.
    """
    hints = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    unknown = [name for name in given if name not in fields]
    if unknown:
        raise ValueError(f"unknown model argument {', '.join(unknown)}; known ones: {', '.join(fields)}")
    return kind(**{name: _fit(name, value, hints[name]) for name, value in given.items()})


def _fit(name: str, value: Any, kind: Any) -> Any:
    """A value as a field's type: bool and int strictly, text from anything that was parsed as a number."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if value is None and types.NoneType in kinds:
        return value
    if bool in kinds:
        if isinstance(value, bool):
            return value
        raise ValueError(f"the model argument {name} must be true or false, got {value!r}")
    if int in kinds and float not in kinds:
        try:
            if isinstance(value, bool) or int(value) != float(value):
                raise ValueError
            return int(value)
        except (TypeError, ValueError):
            raise ValueError(f"the model argument {name} must be a whole number, got {value!r}") from None
    return value if float in kinds else str(value)
