"""When vLLM resets a worker's caches, the features that the model keeps are forgotten with them."""

from __future__ import annotations

import functools
import sys
from typing import Any

RUNNERS = (  # vLLM's two model runners; the one for CPUs inherits
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
)
RESETS = ("reset_mm_cache", "reset_encoder_cache")  # the second also follows weights that are loaded anew


def hook_resets() -> None:
    """Let the runners of this process tell their model about resets; doing it again changes nothing.

    Raises:
        RuntimeError: a runner is not as this plugin knows it, or there is none.
    """
    runners = [getattr(sys.modules[module], name, None) for module, name in RUNNERS if module in sys.modules]
    if not runners or not all(callable(getattr(runner, reset, None)) for runner in runners for reset in RESETS):
        raise RuntimeError(f"vLLM's model runner has no {' and '.join(RESETS)}: install a version that is supported")
    for runner in runners:
        for reset in RESETS:
            method = getattr(runner, reset)
            if not hasattr(method, "tells_script"):
                setattr(runner, reset, telling(method))


def telling(reset: Any) -> Any:
    """A runner's reset that also clears the feature cache of a pruned model."""

    @functools.wraps(reset)
    def told(runner: Any, *arguments: Any, **options: Any) -> Any:
        result = reset(runner, *arguments, **options)
        cache = getattr(runner.get_model(), "script_cache", None)
        if cache is not None:
            cache.clear()
        return result

    told.tells_script = True
    return told
