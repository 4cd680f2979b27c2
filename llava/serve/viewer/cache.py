"""How large the cache of a prompt is, from the decoder's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ATTENTION = ("full_attention", "sliding_attention")


def prompt_cache_bytes(config: Any, lengths: Sequence[int], value_bytes: int) -> int | None:
    """Keys and values of one prompt in all layers, in bytes.

    Args:
        config: of the language model.
        lengths: positions that enter each layer.
        value_bytes: of a number.

    Returns:
        ``None`` for a decoder with layers that do not keep every position: it is not known what these keep.
    """
    kinds = set(getattr(config, "layer_types", None) or ATTENTION[:1])
    window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
    if not kinds <= set(ATTENTION) or (window is not None and max(lengths) > window):
        return None
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * heads * width * value_bytes * sum(lengths)
