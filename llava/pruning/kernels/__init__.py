"""Triton versions of what a selection spends its time on, for tensors on CUDA.

The functions of `functional` say what is computed and ask `usable` where; nothing else calls these modules. They
give the same selections, not the same bits: sums are taken in another order. PyTorch for CUDA brings Triton along;
without it (``pip install "script-llava[triton]"``) the same functions run as PyTorch operations, and the greedy MAP
loop then waits for the GPU each time that it asks how many tokens are still missing.

The first use on a device is a trial (trial.py): where a kernel fails or gives something else than PyTorch, a warning
names it, and PyTorch's operations are used on that device from then on. `use` decides otherwise.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

CHOICES = ("auto", "torch", "triton")

_choice = "auto"
_trial: Callable[[torch.device], str | None] | None = None
_passed: dict[torch.device, bool] = {}  # devices on which the kernels were tried
_trying = threading.RLock()
_forced: ContextVar[bool | None] = ContextVar("forced", default=None)


def use(choice: str) -> None:
    """What selections on CUDA run by, in this process, from now on.

    Args:
        choice: "auto": kernels where they pass a trial; "torch": PyTorch's operations; "triton": kernels without a
            trial, whatever comes of it.

    Raises:
        ValueError: another choice.
        ImportError: "triton" where Triton cannot be imported.
    """
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"kernels must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "triton" and not is_installed():
        raise ImportError('kernels=triton needs Triton: pip install "script-llava[triton]"')
    _choice = choice


def try_by(trial: Callable[[torch.device], str | None]) -> None:
    """Name the trial of a device: it returns what is wrong with the kernels there, ``None`` for nothing."""
    global _trial
    _trial = trial


@contextmanager
def forced(fused: bool) -> Iterator[None]:
    """Within, in this thread, every computation without a gradient is one for the kernels, or none is."""
    token = _forced.set(fused)
    try:
        yield
    finally:
        _forced.reset(token)


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
    if tensor.requires_grad and torch.is_grad_enabled():
        return False
    forced = _forced.get()
    if forced is not None:
        return forced
    return tensor.is_cuda and _chosen(tensor.device)


def _chosen(device: torch.device) -> bool:
    """Whether the kernels are chosen on a device; the first question there is answered by a trial."""
    if _choice != "auto":
        return _choice == "triton"
    if device not in _passed:
        with _trying:  # another thread waits for the one trial
            if device not in _passed:
                _passed[device] = is_installed() and _passes(device)
    return _passed[device]


def _passes(device: torch.device) -> bool:
    problem = _trial(device)
    if problem is not None:
        warnings.warn(
            f"the Triton kernels do not work on {device}: {problem}. Selections there are computed by PyTorch's "
            "operations instead: the same tokens, more slowly",
            RuntimeWarning,
            stacklevel=2,
        )
    return problem is None


def multiplies_half_precision(rows: Tensor, others: Tensor) -> bool:
    """Whether ``torch.bmm`` multiplies half precision into float32 by itself: on NVIDIA, from torch 2.8 on."""
    same = rows.is_cuda and rows.dtype == others.dtype and not (rows.requires_grad or others.requires_grad)
    return same and torch.version.cuda is not None and hasattr(torch.ops.aten.bmm, "dtype")


def fused_scores() -> ModuleType:
    """The scores as kernels; imports Triton."""
    from llava.pruning.kernels import scores

    return scores


def fused_loops() -> ModuleType:
    """The greedy loops as kernels; imports Triton."""
    from llava.pruning.kernels import greedy

    return greedy
