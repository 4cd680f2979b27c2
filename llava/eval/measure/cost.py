"""The work behind an answer: what the pruning literature quotes for it, and what is really done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]


def prefill_flops(tokens: Sequence[float], width: int, ffn: int) -> float:
    """Multiply-accumulates of visual tokens in prefill: the sum over layers of 4 c d^2 + 2 c^2 d + 3 c d f.

    The formula of CDPruner and Script; one multiply-accumulate is counted once, text and vision not at all.

    Args:
        tokens: c of every layer, the visual tokens that enter it.
        width: d, of the hidden states.
        ffn: f, of the (gated) feed-forward part.
    """
    return sum(4 * c * width**2 + 2 * c**2 * width + 3 * c * width * ffn for c in tokens)


def count_macs(call: Callable[[], object]) -> int:
    """Multiply-accumulates of all matrix products, convolutions and attentions in a call, by torch's own counter.

    Element-wise work and kernels that torch does not know (Triton's) are not among them.
    """

    def attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
        views, heads, rows, width = query
        return 2 * views * heads * rows * key[2] * (width + value[3])

    def product_in_place(_: Shape, left: Shape, right: Shape, *__: Any, **___: Any) -> int:
        return 2 * left[0] * left[1] * left[2] * right[2]

    missing = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten.baddbmm_: product_in_place,
    }
    with FlopCounterMode(display=False, custom_mapping=missing) as counter:
        call()
    return counter.get_total_flops() // 2
