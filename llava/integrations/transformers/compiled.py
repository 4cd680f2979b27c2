"""Models that a user has compiled.

A graph that torch compiled before a pruner was attached knows nothing of its hooks, and says nothing. So while one
is attached, the modules that carry its hooks, and those around them, run as they were before they were compiled; what
lies below (the layers of the decoder and the tower) stays compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)
ORIGINAL = "_torchdynamo_orig_callable"  # where torch.compile keeps what it compiled


def is_wrapper(model: nn.Module) -> bool:
    """Whether this is what ``torch.compile(model)`` returns."""
    return isinstance(model, torch._dynamo.OptimizedModule)


def original(function: Callable[..., Any]) -> Callable[..., Any]:
    """What was compiled; the function itself if it is not."""
    return getattr(function, ORIGINAL, function)


def is_compiled(module: nn.Module) -> bool:
    """Whether calling a module runs a graph of its own: by ``module.compile()`` or a compiled ``forward``."""
    forward = module.__dict__.get("forward")
    return module._compiled_call_impl is not None or original(forward) is not forward


class SetAside:
    """Compiled calls of a model's modules, put away until `restore`.

    Args:
        model: the model.
        carriers: those of its modules that carry hooks.
    """

    def __init__(self, model: nn.Module, carriers: Sequence[nn.Module]) -> None:
        self.on_the_way = list(on_the_way(model, carriers).items())
        self.before: list[tuple[nn.Module, Any, Any]] = []
        names = []
        for name, module in self.on_the_way:
            if not is_compiled(module):
                continue
            forward = module.__dict__.get("forward")
            self.before.append((module, module._compiled_call_impl, forward))
            module._compiled_call_impl = None
            if forward is not None:
                object.__setattr__(module, "forward", original(forward))
            names.append(name or type(model).__name__)
        if names:
            logger.warning(
                "%s runs uncompiled while a pruner is attached; compile the layers of its language model instead",
                ", ".join(names),
            )

    def restore(self) -> None:
        """Compiled calls as they were."""
        for module, call, forward in self.before:
            module._compiled_call_impl = call
            if forward is not None:
                object.__setattr__(module, "forward", forward)
        self.before = []

    def check(self) -> None:
        """Raise RuntimeError if a module was compiled since."""
        compiled = [name or "the model" for name, module in self.on_the_way if is_compiled(module)]
        if compiled:
            raise RuntimeError(
                f"{', '.join(compiled)} was compiled while a pruner was attached, which it cannot serve: compile "
                "before attaching, or the layers of the language model alone"
            )


def on_the_way(model: nn.Module, carriers: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """The modules that carry hooks and those that contain them, by name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted = {id(carrier) for carrier in carriers}
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if id(module) in wanted:
            parts = name.split(".") if name else []
            for depth in range(len(parts) + 1):
                found[".".join(parts[:depth])] = modules[".".join(parts[:depth])]
    return found


@torch.compiler.disable
def refuse_to_be_compiled() -> None:
    """Raise RuntimeError; not traced, so that it is raised when a compiled model runs."""
    raise RuntimeError(
        "this model is called by a graph that torch.compile made around it, which a pruner cannot serve: call the "
        "model itself, and compile it before attaching, or the layers of its language model alone"
    )
