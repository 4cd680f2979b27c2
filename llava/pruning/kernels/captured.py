"""A selection as a CUDA graph: one launch for all of its kernels, and for what follows it if that is captured too.

Where the count is exact the shapes behind a selection are known before it, nothing waits for the GPU, and no view has
another length than the rest: what a CUDA graph asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llava.pruning.inputs import PruningInputs, Selection

WARM_UP = 3  # runs before the capture, in which kernels are compiled and libraries set up


class CapturedSelection:
    """``method.select`` for views of one shape, captured once and replayed with other numbers.

    Args:
        method: a `ViewMethod` whose count is exact.
        like: inputs of the shapes, dtypes and device of all later ones; their tensors are copied.
        keep: tokens of each view; ``None`` is the method's own budget.
        then: what is captured behind it, from the selection to any tensors: gathering, the prefill.

    Raises:
        ValueError: inputs that are not on CUDA, or a method whose count depends on what it sees.
    """

    def __init__(
        self, method: Any, like: PruningInputs, keep: int | None = None, then: Callable[[Selection], Any] | None = None
    ) -> None:
        if not like.features.is_cuda:
            raise ValueError(f"a CUDA graph needs inputs on CUDA, got {like.features.device}")
        if not method.count_is_exact:
            raise ValueError(f"pruner '{method.name}' with keep_tokens={method.keep_tokens} finds its count itself: "
                             "the shapes behind it are not known when a CUDA graph is captured")  # fmt: skip
        self._tensors = {name: value.clone() for name, value in tensors_of(like).items()}
        own = dataclasses.replace(like, **self._tensors)

        def run() -> tuple[Selection, Any]:
            selection = method.select(own, keep)
            return selection, None if then is None else then(selection)

        stream = torch.cuda.Stream(like.features.device)
        stream.wait_stream(torch.cuda.current_stream(like.features.device))
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream(like.features.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph), torch.no_grad():
            self.selection, self.followed = run()

    def __call__(self, inputs: PruningInputs) -> tuple[Selection, Any]:
        """The selection of new inputs, and what ``then`` made of it: the same tensors at every call, written anew.

        Raises:
            ValueError: other fields, shapes or dtypes than those captured.
        """
        given = tensors_of(inputs)
        if {name: described(value) for name, value in given.items()} != {
            name: described(value) for name, value in self._tensors.items()
        }:
            raise ValueError("a captured selection takes the fields, shapes and dtypes that it was made with")
        for name, value in given.items():
            self._tensors[name].copy_(value, non_blocking=True)
        self._graph.replay()
        return self.selection, self.followed


def tensors_of(inputs: PruningInputs) -> dict[str, Tensor]:
    """The fields that are tensors."""
    return {name: value for name, value in vars(inputs).items() if isinstance(value, Tensor)}


def described(value: Tensor) -> tuple[torch.Size, torch.dtype]:
    return value.shape, value.dtype
