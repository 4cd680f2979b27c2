"""What a model made of its last pictures, so that a second question about them need not run the vision tower again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from llava.integrations.transformers.host import Host
from llava.integrations.transformers.replacing import replaced

INSIDE = ("hidden_states", "attentions")  # of the tower: large, and read before its output is handed on


class VisualMemory:
    """The last visual inputs of a model, and what its ``get_image_features`` and ``get_video_features`` returned.

    One for whoever asks about one set of pictures; a model may be asked with another memory in between.

    Attributes:
        reused: whether the last block of `at_work` took what was here.
        seen: what was observed inside the tower on the way, by name, for who observes; `None` where nobody did.
    """

    def __init__(self) -> None:
        self.reused = False
        self.seen: dict[str, Any] | None = None
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}

    def holds(self, host: Host, arguments: dict[str, Any]) -> bool:
        """Whether the pictures among the arguments of a call are those of the last block."""
        inputs = host.visual_inputs(arguments)
        known = host.modalities(arguments) <= self._outputs.keys()
        return known and inputs.keys() == self._inputs.keys() and all(map(same, inputs.values(), self._in(inputs)))

    def _in(self, inputs: dict[str, Any]) -> list[Any]:
        return [self._inputs[name] for name in inputs]

    @contextmanager
    def at_work(self, host: Host, arguments: dict[str, Any], reuse: bool) -> Iterator[None]:
        """For the length of a block the model takes the features that are here, or gives those that it computes.

        Args:
            arguments: of the call in the block.
            reuse: take what is here, of the same pictures (`holds`); otherwise it is forgotten.
        """
        self.reused = reuse
        if not reuse:
            self._outputs, self.seen = {}, None
            self._inputs = dict(host.visual_inputs(arguments))
        with ExitStack() as stack:
            for modality in host.modalities(arguments):
                name = f"get_{modality}_features"
                if hasattr(host.base, name):
                    compute = getattr(host.base, name)
                    stack.enter_context(replaced(host.base, name, self._answering(modality, compute)))
            yield

    def _answering(self, modality: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(compute)  # generate reads its signature
        def answer(*positional: Any, **named: Any) -> Any:
            if not self.reused:
                self._outputs[modality] = without_the_inside(compute(*positional, **named))
            return self._outputs[modality]

        return answer


def without_the_inside(output: Any) -> Any:
    """A tower's output without the states of its layers."""
    if isinstance(output, ModelOutput):
        for name in INSIDE:
            if output.get(name) is not None:
                output = type(output)(**{key: value for key, value in output.items() if key not in INSIDE})
                break
    return output


def same(one: Any, other: Any) -> bool:
    """Whether two arguments of a call are equal, numbers of tensors and their types."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)
