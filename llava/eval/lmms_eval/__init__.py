"""lmms-eval: pruned models for it, so that its tasks run with ``pruner=NAME,keep_tokens=N``, and its launcher.

Two models, each in the harness's simple and chat form:

* ``script_llava``: our own host, checkpoints in LLaVA's original format;
* ``script_transformers``: classes of the Transformers library with a pruner attached.

    launcher.py      python -m llava.eval.harness: checks a run, names its arguments, starts the harness
    adapter.py       what both models share: the harness's interface, batches, accounting
    arguments.py     the model arguments, typed and checked
    requests.py      both forms of request, as conversations
    answers.py       answers kept on disk as they come: a killed run continues where it was
    llava_model.py, transformers_model.py   the two models
    judge_free.py    a task file of our own
    results.py, finished_runs.py   the harness's result files, for our tables

The harness imports this package at every start: nothing heavy here.
"""

from __future__ import annotations

from typing import Any

MODELS = {
    "script_llava": ("llava.eval.lmms_eval.llava_model.SimpleLlava", "llava.eval.lmms_eval.llava_model.ChatLlava"),
    "script_transformers": (
        "llava.eval.lmms_eval.transformers_model.SimpleTransformersModel",
        "llava.eval.lmms_eval.transformers_model.ChatTransformersModel",
    ),
}


def manifests() -> list[Any]:
    """What the entry point in the group ``lmms_eval.models`` gives the harness: a manifest per model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(name, simple, chat) for name, (simple, chat) in MODELS.items()]
