"""Theoretical work of a question's visual tokens, as the pruning literature quotes it (methods.md 1.1)."""

from __future__ import annotations

from collections.abc import Sequence


def prefill_flops(tokens: Sequence[float], width: int, ffn: int) -> float:
    """Multiply-accumulates of visual tokens in prefill: the sum over layers of 4 c d^2 + 2 c^2 d + 3 c d f.

    Args:
        tokens: c of every layer, the visual tokens that enter it.
        width: d, of the hidden states.
        ffn: f, of the (gated) feed-forward part.
    """
    return sum(4 * c * width**2 + 2 * c**2 * width + 3 * c * width * ffn for c in tokens)
