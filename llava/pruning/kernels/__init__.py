"""Triton versions of what a selection spends its time on, for tensors on CUDA.

`functional` says what is computed and asks `usable` where; nothing else calls these modules. They give the same
selections, not the same bits: sums are taken in another order. PyTorch for CUDA brings Triton along; without it
(``pip install "script-llava[triton]"``) the same functions run as PyTorch operations, and the greedy MAP loop then
waits for the GPU each time that it asks how many tokens are still missing.
"""

from __future__ import annotations

from functools import cache

import torch
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
    """Whether a computation on ``tensor`` is one for the kernels, through which no gradient flows."""
    return tensor.is_cuda and is_installed() and not (tensor.requires_grad and torch.is_grad_enabled())


def multiplies_half_precision(rows: Tensor, others: Tensor) -> bool:
    """Whether ``torch.bmm`` multiplies half precision into float32 by itself: on NVIDIA, from torch 2.8 on."""
    same = rows.is_cuda and rows.dtype == others.dtype and not (rows.requires_grad or others.requires_grad)
    return same and torch.version.cuda is not None and hasattr(torch.ops.aten.bmm, "dtype")
