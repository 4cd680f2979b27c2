"""One form of attaching for every model that a method can be attached to.

    with pruner(model, processor) as handle:
        model.generate(...)

A model that knows pruning itself (our LLaVA) brings ``attach_pruner``; any other is handed to the hosts in `HOSTS`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Modules with a function ``attach(method, model, processor, **options)``: named, not imported, because methods know no
# host. The first that is there for every model is the Transformers library's.
HOSTS = ("llava.integrations.transformers",)


def attach(method: Any, model: Any, processor: Any = None, **options: Any) -> Any:
    """Prune with ``method`` in every call of ``model``, until the handle's ``remove()``.

    Args:
        model: an instance of a class of the Transformers library such as ``LlavaForConditionalGeneration``, or a
            LLaVA that `llava.model.builder.load_pretrained_model` loaded.
        processor: its processor or tokenizer, for methods that read the question.
        options: ``query``, ``positions``, ``clip``, ``siglip`` ...: see the host's own handle.

    Returns:
        A handle with ``kept`` (what was kept of each picture of the last call), ``method`` and ``remove()``.

    Raises:
        ValueError: the model cannot be pruned, or not by this method; says why, and which can.
        RuntimeError: a pruner is attached to this model already.
    """
    if hasattr(model, "attach_pruner"):
        return model.attach_pruner(method, processor, **options)
    return import_module(HOSTS[0]).attach(method, model, processor, **options)
