"""The layers of a language model of the library, by its configuration: their work and what they remember.

The pruning papers' formula (cost.py) takes all layers for one kind with as many key heads as query heads. Here each
layer has its own: grouped key heads, heads wider than the model, windows, keys that serve as values, keys and values
of an earlier layer, and recurrent layers whose state does not grow.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderLayer:
    """One layer of a decoder.

    Args:
        weights: entries of all matrices that a token is multiplied with.
        query_width: of all query heads together; 0 without attention.
        cache_width: numbers that the cache keeps of a token: its keys and values; 0 if it keeps none.
        window: tokens that a token sees at most, itself among them; ``None`` for all before it.
        state_macs: multiply-accumulates with a recurrent state for a token.
    """

    weights: int
    query_width: int = 0
    cache_width: int = 0
    window: int | None = None
    state_macs: int = 0

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates of so many tokens in prefill; causal attention counts whole, as in the papers."""
        seen = tokens if self.window is None else min(tokens, self.window)
        return tokens * (self.weights + 2 * seen * self.query_width + self.state_macs)

    def held(self, tokens: int) -> int:
        """Of so many tokens, how many the cache still holds: a window lets go of all that no later token sees."""
        return min(tokens, tokens if self.window is None else self.window - 1) if self.cache_width else 0

    def held_visual(self, before: int, visual: int, after: int) -> int:
        """Of the visual tokens between ``before`` and ``after`` of text, how many the cache still holds."""
        return max(0, min(visual, self.held(before + visual + after) - after))


def decoder_layers(config: Any) -> list[DecoderLayer]:
    """The layers of a text configuration of the library.

    Raises:
        ValueError: it has layers of which this file does not know the work (experts, say).
    """
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    if getattr(config, "enable_moe_block", experts):
        raise ValueError(f"{config.model_type} has experts, whose work depends on what is routed to them")
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    unknown = set(kinds) - {"full_attention", "sliding_attention", "linear_attention"}
    if unknown:
        raise ValueError(f"{config.model_type} has layers of an unknown kind: {', '.join(sorted(unknown))}")
    return [
        linear_layer(config) if kind == "linear_attention" else attention_layer(config, kind, number)
        for number, kind in enumerate(kinds)
    ]


def attention_layer(config: Any, kind: str, number: int) -> DecoderLayer:
    """A layer with softmax attention: Llama's, Qwen's, Gemma 4's."""
    sizes = config.per_layer_config[number] if getattr(config, "per_layer_config", None) else config
    width = config.hidden_size
    head = getattr(sizes, "head_dim", None) or width // config.num_attention_heads
    query, key = config.num_attention_heads * head, sizes.num_key_value_heads * head
    sliding = kind == "sliding_attention"
    shared = bool(getattr(config, "num_kv_shared_layers", 0)) and config.kv_sharing_modes[number] == "reuse"
    one_for_both = getattr(config, "attention_k_eq_v", False) and not sliding
    gated = config.model_type.startswith("qwen3_5")  # its queries come with a gate for what is attended
    mixing = width * (query * (3 if gated else 2) + key * (0 if shared else 1 if one_for_both else 2))
    per_layer_inputs = 2 * width * (getattr(config, "hidden_size_per_layer_input", 0) or 0)
    wide = 2 if shared and getattr(config, "use_double_wide_mlp", False) else 1
    return DecoderLayer(
        weights=mixing + per_layer_inputs + 3 * width * config.intermediate_size * wide,
        query_width=query,
        cache_width=0 if shared else 2 * key,
        window=config.sliding_window if sliding else None,
    )


def linear_layer(config: Any) -> DecoderLayer:
    """A gated delta rule (Qwen3.5): a state of key width x value width a head is read, corrected and read again."""
    heads, width = config.linear_num_value_heads, config.hidden_size
    keys, values = config.linear_num_key_heads * config.linear_key_head_dim, heads * config.linear_value_head_dim
    mixed = 2 * keys + values  # queries, keys and values, which a short convolution goes over
    weights = width * (mixed + 2 * values + 2 * heads) + mixed * config.linear_conv_kernel_dim
    return DecoderLayer(
        weights=weights + 3 * width * config.intermediate_size,
        state_macs=3 * heads * config.linear_key_head_dim * config.linear_value_head_dim,
    )


def language_figures(config: Any, tokens: Sequence[int], before: int, after: int, value_bytes: int) -> dict[str, Any]:
    """What the language model does with the visual tokens, and keeps of them, by its configuration.

    Args:
        config: its text configuration.
        tokens: of every layer, the visual tokens that enter it.
        before, after: text tokens around them, of which nothing is counted; windows may hold them instead.
        value_bytes: of a number in the cache.
    """
    layers = list(zip(decoder_layers(config), tokens, strict=True))
    held = sum(layer.held_visual(before, count, after) * layer.cache_width for layer, count in layers)
    return {
        "visual_tokens": tokens[-1],
        "average_tokens": statistics.fmean(tokens),
        "formula_macs": sum(layer.macs(count) for layer, count in layers),
        "visual_cache_bytes": held * value_bytes,
    }
