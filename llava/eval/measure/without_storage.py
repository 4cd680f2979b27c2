"""Calls of a model without storage on inputs of which some are real: what shapes depend on must be known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

aten = torch.ops.aten


class WithoutStorage(TorchDispatchMode):
    """What is computed of a tensor without storage (device "meta") and of real ones has no storage either.

    Whole numbers and masks that are real stay so where a model moves them to its own device: the grids of pictures,
    from which a vision tower takes its shapes.
    """

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten._to_copy.default and args[0].device.type == "cpu" and not args[0].is_floating_point():
            kwargs.pop("device", None)
        if func is aten.index.Tensor:
            places = [place for index in args[1] for place in as_places(index)]
            args = (args[0], places, *args[2:])
        leaves, form = tree_flatten((args, kwargs))
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves):
            leaves = [leaf.to("meta") if isinstance(leaf, Tensor) and leaf.dim() else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(leaves, form)
        return func(*args, **kwargs)


def as_places(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """A real mask as the places where it is true, whose number is known; any other index as it is."""
    if index is None or index.dtype is not torch.bool or index.is_meta:
        return (index,)
    return index.nonzero().unbind(1)
