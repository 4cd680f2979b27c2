"""What a user hands to `generate` sees sequences with the whole prompt, although a shorter one is decoded.

Stopping criteria, logits processors, prefix functions and streamers often count the prompt: they skip it by its
length, or look at what stands at a place of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from llava.integrations.transformers.arguments import with_whole_prompt


class WholePrompt:
    """The prompts (B, L) as a user gave them, in front of whatever follows ``shortened`` columns."""

    def __init__(self, prompt: Tensor, shortened: int) -> None:
        self.prompt = prompt
        self.shortened = shortened

    def sequences(self, ids: Tensor) -> Tensor:
        """(B r, shortened + new) -> (B r, L + new)."""
        return with_whole_prompt(ids, self.prompt, self.shortened)

    def merge(self, merged: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """The model's own joining of its criteria or processors with a user's, whose ones then see whole prompts.

        Wrapped afterwards, because the library compares classes to see what a user wants in place of its own.
        """

        def merge(default: Any, custom: Any) -> Any:
            joined = merged(default, custom)
            theirs = {id(one) for one in custom or ()}
            for number, one in enumerate(joined):
                if id(one) in theirs:
                    wrapper = WholePromptCriterion if isinstance(one, StoppingCriteria) else WholePromptProcessor
                    joined[number] = wrapper(one, self)
            return joined

        return merge

    def prefix_function(self, allowed: Callable[[int, Tensor], Sequence[int]]) -> Callable[[int, Tensor], Any]:
        """A ``prefix_allowed_tokens_fn`` that is given whole sequences."""

        def of_whole(row: int, ids: Tensor) -> Any:
            whole = self.prompt[row].to(ids.device)
            return allowed(row, torch.cat([whole, ids[self.shortened :]]))

        return of_whole


class WholePromptCriterion(StoppingCriteria):
    """A user's stopping criterion, given whole sequences."""

    def __init__(self, inner: Any, whole: WholePrompt) -> None:
        self.inner = inner
        self.whole = whole

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Any:
        return self.inner(self.whole.sequences(input_ids), scores, **options)


class WholePromptProcessor(LogitsProcessor):
    """A user's logits processor, given whole sequences."""

    def __init__(self, inner: Any, whole: WholePrompt) -> None:
        self.inner = inner
        self.whole = whole

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # more parameters would mean more to the library
        return self.inner(self.whole.sequences(input_ids), scores)


class WholePromptStreamer(BaseStreamer):
    """A user's streamer, whose first piece is the whole prompt."""

    def __init__(self, inner: Any, prompt: Tensor) -> None:
        self.inner = inner
        self.prompt: Tensor | None = prompt

    def put(self, value: Tensor) -> None:
        if self.prompt is not None:
            value, self.prompt = self.prompt.to(value.device), None
        self.inner.put(value)

    def end(self) -> None:
        self.inner.end()
