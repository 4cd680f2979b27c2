"""Triton versions of what a selection spends its time on, for tensors on CUDA.

`functional` says what is computed and asks `usable` where; nothing else calls these modules. They give the same
selections, not the same bits: sums are taken in another order. PyTorch for CUDA brings Triton along; without it
(``pip install "script-llava[triton]"``) the same functions run as PyTorch operations, and the greedy MAP loop then
waits for the GPU each time that it asks how many tokens are still missing.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor


@cache
def is_installed() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def usable(tensor: Tensor) -> bool:
    """Whether a computation on ``tensor`` is one for the kernels."""
    return tensor.is_cuda and is_installed()
