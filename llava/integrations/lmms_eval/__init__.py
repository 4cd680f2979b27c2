"""Pruned models for lmms-eval, so that all of its tasks run with ``pruner=NAME,keep_tokens=N``.

Two models, each in the harness's simple and chat form:

* ``script_llava``: our own host, checkpoints in LLaVA's original format;
* ``script_transformers``: classes of the Transformers library with a pruner attached.

    answers.py       answers kept on disk as they come: a killed run goes on where it was
    arguments.py     the model arguments, typed and checked
    requests.py      both forms of request, as conversations
    adapter.py       what both models share: the harness's interface, batches, accounting
    transformers_model.py   the models of the Transformers library

The harness imports this package at every start: nothing heavy here. Beside `llava.pruning` the modules use what reads
files and prompts (`llava.mm_utils`, `llava.video`, `llava.conversation`), no host. Our own host's class is only named:
it drives `llava.model`, which integrations do not import, and so lives one floor up, in `llava.eval.harness_model`.
"""

from __future__ import annotations

from typing import Any

MODELS = {
    "script_llava": ("llava.eval.harness_model.SimpleLlava", "llava.eval.harness_model.ChatLlava"),
    "script_transformers": (
        "llava.integrations.lmms_eval.transformers_model.SimpleTransformersModel",
        "llava.integrations.lmms_eval.transformers_model.ChatTransformersModel",
    ),
}


def manifests() -> list[Any]:
    """What the entry point in the group ``lmms_eval.models`` gives the harness: a manifest per model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(name, simple, chat) for name, (simple, chat) in MODELS.items()]
