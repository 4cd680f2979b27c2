"""What a model made of its last pictures, so that a second question about them need not run the vision tower again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from llava.integrations.transformers.host import Host
from llava.integrations.transformers.replacing import replaced

INSIDE = ("hidden_states", "attentions")  # of the tower: large, and read before its output is handed on


@dataclass(frozen=True)
class Observed:
    """What was seen inside the vision tower on the way to its features.

    Args:
        projector: whether what enters ``multi_modal_projector`` was recorded.
        layer: the layer of the tower that was watched; ``None`` for none.
        projector_inputs: what entered the projector, (N, n, c) each.
        layer_states: what entered and left the layer.
        packing: how tiles were packed, of classes that do; ``None`` for others.
    """

    projector: bool
    layer: nn.Module | None
    projector_inputs: list[Tensor]
    layer_states: tuple[Tensor, Tensor] | None
    packing: Any

    def covers(self, projector: bool, layer: nn.Module | None) -> bool:
        """Whether all that is to be recorded was."""
        return (self.projector or not projector) and (layer is None or layer is self.layer)


class VisualMemory:
    """The last visual inputs of a model, and what its ``get_image_features`` and ``get_video_features`` returned.

    One for whoever asks about one set of pictures; a model may be asked with another memory in between. Inputs are
    copied, so that a buffer that is filled anew is another picture. Weights are not looked at: whoever changes them
    takes a new memory. Where gradients are wanted nothing is taken from here, as a graph can be gone through once.

    Attributes:
        reused: whether the last block of `at_work` took what was here.
        observed: what was seen inside the tower on the way; ``None`` where nobody looked.
    """

    def __init__(self) -> None:
        self.reused = False
        self.observed: Observed | None = None
        self._model: nn.Module | None = None
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}

    def holds(self, host: Host, arguments: dict[str, Any]) -> bool:
        """Whether the model and the pictures among the arguments of a call are those of the last block."""
        if host.model is not self._model or torch.is_grad_enabled():
            return False
        inputs = host.visual_inputs(arguments)
        known = host.modalities(arguments) <= self._outputs.keys() and inputs.keys() == self._inputs.keys()
        return known and all(same(value, self._inputs[name]) for name, value in inputs.items())

    @contextmanager
    def at_work(self, host: Host, arguments: dict[str, Any], reuse: bool) -> Iterator[None]:
        """For the length of a block the model takes the features that are here, or gives those that it computes.

        Args:
            arguments: of the call in the block.
            reuse: take what is here, of the same pictures (`holds`); otherwise it is forgotten.
        """
        self.reused = reuse
        if not reuse:
            self._outputs, self.observed, self._model = {}, None, host.model
            self._inputs = {name: copied(value) for name, value in host.visual_inputs(arguments).items()}
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


def copied(value: Any) -> Any:
    """An argument of a call, its tensors copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return type(value)(map(copied, value)) if isinstance(value, (list, tuple)) else value


def same(one: Any, other: Any) -> bool:
    """Whether two arguments of a call are equal, numbers of tensors and their types."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)
