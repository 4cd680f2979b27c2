"""A call of a model with a pruner on it: what is known while it is under way, and what stands in for `generate`."""

from __future__ import annotations

import copy
import inspect
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llava.decoder.attachment import DecoderPruning
from llava.integrations.transformers.boundary import Plan


@dataclass
class Call:
    """A call of the model that is under way: one of `generate`, or one of `forward` that is no step of it.

    Args:
        generating: which of the two.
        plan: what its language model gets; ``None`` where nothing is pruned.
        in_decoder: a method inside the decoder, at work in this call.
        step: the ids of the step of `generate` that comes next.
        loop: whether the loop of `generate` is a user's own, ``custom_generate``.
    """

    generating: bool
    plan: Plan | None = None
    in_decoder: DecoderPruning | None = None
    step: Tensor | None = None
    loop: bool = False
    hooks: ExitStack = field(default_factory=ExitStack)

    def resume(self) -> None:
        """Hang the method inside the decoder on it."""
        if self.in_decoder is not None:
            self.hooks.enter_context(self.in_decoder.attached())

    def suspend(self) -> None:
        """Take it off again."""
        self.hooks.close()


class PrunedGenerate:
    """What stands in place of a model's ``generate`` while a pruner is attached; a copy of the model copies it.

    Args:
        attached: the `AttachedPruner`.
    """

    def __init__(self, attached: Any) -> None:
        self.attached = attached
        self.__wrapped__ = attached._generate
        self.__doc__ = attached._generate.__doc__
        self.__signature__ = inspect.signature(attached._generate)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self.attached.generate(*positional, **named)

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedGenerate:
        return type(self)(copy.deepcopy(self.attached, memo))
