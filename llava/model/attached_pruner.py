"""A method that prunes in every call of our LLaVA without being given to each: the handle of ``attach_pruner``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from llava.model.kept_tokens import KeptTokens
from llava.model.prompt_splicing import EmbeddedPrompts
from llava.pruning import Method


class AttachedPruner:
    """The handle of a method on one model, until `remove`. Made by `LlavaMetaForCausalLM.attach_pruner`.

    Args:
        model: the model, which holds this handle and nothing else of it.
        method: what it prunes with where a call brings no ``pruner=`` of its own.
        tokenizer: reads questions out of prompts where the model has none.
        query: the question for all calls; a call's own ``query=`` wins.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        tokenizer: Any = None,
        query: str | Sequence[str] | None = None,
    ) -> None:
        self.model = model
        self.method = method
        self.tokenizer = tokenizer
        self.query = query
        self.prompts: EmbeddedPrompts | None = None  # of the last call

    @property
    def kept(self) -> list[KeptTokens]:
        """What was kept of each picture of the last call, in the order of the prompts."""
        return [] if self.prompts is None else self.prompts.kept

    def remove(self) -> None:
        """Take the method off the model; a second time does nothing."""
        if self.model.attached_pruner is self:
            del self.model.attached_pruner
