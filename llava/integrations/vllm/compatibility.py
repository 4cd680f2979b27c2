"""The hooks of vLLM that this plugin overrides or calls, checked by their signatures before a model is built."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from vllm.multimodal.cache import (
    BaseMultiModalProcessorCache,
    LruKeyReplicatedReceiverCache,
    ShmObjectStoreReceiverCache,
)
from vllm.multimodal.processing import BaseMultiModalProcessor, BaseProcessingInfo

from llava.integrations.vllm.registration import installed_version, unsupported

HOOKS: Mapping[Any, Mapping[str, tuple[str, ...]]] = {
    BaseMultiModalProcessor: {
        "apply": ("inputs", "timing_ctx"),
        "get_dummy_inputs": ("seq_len", "mm_counts", "mm_options"),
        "_get_mm_hashes": ("inputs",),
        "_cached_apply_hf_processor": ("inputs", "timing_ctx"),
        "_apply_hf_processor_main": ("mm_items", "hf_kwargs"),
        "_get_mm_fields_config": ("hf_inputs", "hf_processor_mm_kwargs"),
        "_get_mm_prompt_updates": ("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
    },
    BaseMultiModalProcessorCache: {"is_cached_item": ("mm_hash",), "invalidate": ("mm_hash",)},
    LruKeyReplicatedReceiverCache: {"get_and_update_features": ("mm_features",)},
    ShmObjectStoreReceiverCache: {"get_and_update_features": ("mm_features",)},
    BaseProcessingInfo: {"get_mm_max_tokens_per_item": ("seq_len", "mm_counts")},
}


def check_hooks(*more: tuple[Any, str, tuple[str, ...]]) -> None:
    """Raise RuntimeError unless vLLM has every hook with the parameters that this plugin relies on.

    Args:
        more: (class, method, parameters) of a family's own hooks.
    """
    version = installed_version()
    reason = unsupported(version)
    if reason is not None:
        raise RuntimeError(reason)
    wanted = [(owner, name, names) for owner, hooks in HOOKS.items() for name, names in hooks.items()]
    for owner, name, parameters in [*wanted, *more]:
        found = getattr(owner, name, None)
        has = tuple(inspect.signature(found).parameters)[1:] if found is not None else None
        if has != parameters:
            raise RuntimeError(
                f"vLLM {version} is not as Script's plugin knows it: {owner.__name__}.{name} has "
                f"{'no such method' if has is None else 'parameters ' + ', '.join(has)}, expected "
                f"{', '.join(parameters)}. Install a version that docs/serving.md names as tested"
            )
