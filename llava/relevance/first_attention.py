"""The first softmax attention of a decoder: its queries and keys, without rotary embedding, of any input embeddings.

Its own modules are called (norm, projections, norms of queries and keys), so that quantised projections, LoRA and
offloading by accelerate work. Only where the keys come from a plain ``nn.Linear`` and nothing is done to them is its
weight read, in `compared`: few words are cheaper taken back through it than many tokens through it. What a family
does differently is told by what its modules are called and by their sizes:

* the layer: the first one with softmax attention by the config's ``layer_types`` (Qwen3.5 begins with recurrent ones);
* the layer's input norm, or none in layers that normalise what they put out (OLMo 2, EXAONE 4);
* one projection each, or a fused one (Phi-3, vLLM's modules), with biases or not, and with an output gate beside
  the queries of each head (Qwen3-Next, Qwen3.5);
* norms of queries and keys per head (Qwen3, Gemma 3) or over the whole width (OLMo 2);
* the scaling of the products (Gemma's ``query_pre_attn_scalar``, Granite's multiplier), as the attention has it;
  soft-capping (Gemma 2) is left out, since it keeps the order of a head's products, and YaRN's factor on rotary
  embeddings is left out with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava.relevance.language import as_distribution, attention_mass

INPUT_NORMS = ("input_layernorm", "operator_norm", "attention_layernorm")
QUERY_NORMS = ("q_norm", "q_layernorm", "query_layernorm", "qk_norm")
KEY_NORMS = ("k_norm", "k_layernorm", "key_layernorm", "qk_norm")


class UnreadableAttentionError(ValueError):
    """The first attention of a decoder cannot be read; ``reason`` says why, for the line that a host prints."""

    def __init__(self, decoder: nn.Module, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the first attention of {type(decoder).__name__} cannot be read: {reason}")


@dataclass(frozen=True)
class FirstAttention:
    """Queries and keys of a decoder's first softmax attention. Made by `find`.

    Args:
        layer: its index among the decoder's layers.
        layers: how many the decoder has.
        heads: query heads of the whole attention; a rank under tensor parallelism computes its share of them.
        head_dim: width of a head.
        scaling: of the products of queries and keys.
        gated: an output gate follows the queries of each head.
        input_scale: by what the decoder multiplies the embeddings that it is given.
        norm: before the projections; ``None`` where the layer has none there.
        attention: the module that holds the projections.
    """

    layer: int
    layers: int
    heads: int
    head_dim: int
    scaling: float
    gated: bool
    input_scale: float
    norm: nn.Module | None
    attention: nn.Module

    @classmethod
    def find(cls, decoder: nn.Module, config: Any = None) -> FirstAttention:
        """The first attention of a decoder.

        Args:
            decoder: the module that is given ``inputs_embeds`` and holds the layers, or one with a head around it.
            config: its configuration; ``None`` takes ``decoder.config``.

        Raises:
            UnreadableAttentionError: layers or projections are not found, are laid out in an unknown way, or have
                their parameters elsewhere.
        """
        config = decoder.config if config is None else config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        decoder = decoder if hasattr(decoder, "layers") else getattr(decoder, "model", decoder)
        layers = getattr(decoder, "layers", None)
        if layers is None:
            raise UnreadableAttentionError(decoder, "it has no layers")
        index = first_softmax_layer(config)
        if index is None or index >= len(layers):
            raise UnreadableAttentionError(decoder, "none of its layers has softmax attention")
        layer, attention = layers[index], getattr(layers[index], "self_attn", None)
        reason = why_unreadable(layer, attention)
        if reason:
            raise UnreadableAttentionError(decoder, f"layer {index}: {reason}")
        heads = config.num_attention_heads
        head_dim = own(attention, "head_dim") or own(config, "head_dim") or config.hidden_size // heads
        scaling = own(attention, "scaling")
        gated = bool(getattr(attention, "attn_output_gate", False))
        if hasattr(attention, "q_proj"):
            gated = getattr(attention.q_proj, "out_features", None) == 2 * heads * head_dim
        found = cls(
            layer=index,
            layers=len(layers),
            heads=heads,
            head_dim=head_dim,
            scaling=head_dim**-0.5 if scaling is None else float(scaling),
            gated=gated,
            input_scale=float(getattr(decoder, "embedding_multiplier", 1.0)),
            norm=None if normalises_outputs(layer) else first(layer, INPUT_NORMS),
            attention=attention,
        )
        reason = found._why_sizes_are_unknown() or found._why_parameters_are_elsewhere()
        if reason:
            raise UnreadableAttentionError(decoder, f"layer {index}: {reason}")
        return found

    @torch.no_grad()
    def queries(self, embeds: Tensor) -> Tensor:
        """Embeddings (..., d) as the decoder is given them -> queries (..., heads, head_dim), not rotated."""
        flat = self._project(embeds, 0)
        if self.gated:
            flat = flat.unflatten(-1, (-1, 2 * self.head_dim))[..., : self.head_dim].flatten(-2)
        return self._by_head(flat, first(self.attention, QUERY_NORMS))

    @torch.no_grad()
    def keys(self, embeds: Tensor) -> Tensor:
        """Embeddings (..., d) as the decoder is given them -> keys (..., key heads, head_dim), not rotated."""
        return self._by_head(self._project(embeds, 1), first(self.attention, KEY_NORMS))

    @torch.no_grad()
    def compared(self, queries: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B or 1, t, h, d_h) and the tokens' embeddings (B, n, d) -> what `attention_mass` multiplies.

        The tokens' keys; or, where that is less work, the tokens as they enter the projection, (B, n, 1, d), beside
        the queries taken back through it, (B or 1, t, h, d): q . (W x + b) = (W^T q) . x, but for q . b, which is the
        same for all tokens and so changes nothing in a softmax over them.
        """
        weight = self._plain_key_weight()
        if weight is None or queries.shape[1] * queries.shape[2] >= weight.shape[0]:
            return queries, self.keys(embeds)
        by_group = weight.unflatten(0, (-1, self.head_dim))  # (key heads, d_h, d)
        own = queries.to(weight.dtype).unflatten(2, (len(by_group), -1))  # (B or 1, t, key heads, h / key heads, d_h)
        back = torch.einsum("btkge,ked->btkgd", own, by_group).flatten(2, 3)
        return back, self._entered(embeds).unflatten(0, embeds.shape[:-1])[..., None, :]

    def _plain_key_weight(self) -> Tensor | None:
        """Weight (width, d) of the keys' projection if it is all that makes them; ``None`` if it is not."""
        projection = getattr(self.attention, "k_proj", None)
        if type(projection) is not nn.Linear or first(self.attention, KEY_NORMS) is not None:
            return None
        hooks = (projection._forward_hooks, projection._forward_pre_hooks, hasattr(projection, "_hf_hook"))
        weight = projection.weight
        plain = type(weight.data) is Tensor and weight.dtype.is_floating_point and not weight.is_meta
        return weight if plain and weight.numel() and not any(hooks) else None

    def mass(
        self,
        words: Tensor,
        tokens: Tensor,
        word_mask: Tensor | None = None,
        valid: Tensor | None = None,
        head_weights: Tensor | None = None,
    ) -> Tensor:
        """`attention_mass` (B, n) of words (B or 1, t, d) and tokens (B, n, d), on the tokens' device.

        Args:
            head_weights: (heads,) of the heads that this process computes.
        """
        queries, keys = self.compared(self.queries(words), tokens)
        masks = [mask if mask is None else mask.to(keys.device) for mask in (word_mask, valid)]
        return attention_mass(queries, keys, self.scaling, *masks, head_weights).to(tokens.device)

    def distribution(
        self,
        words: Tensor,
        tokens: Tensor,
        word_mask: Tensor | None = None,
        valid: Tensor | None = None,
        head_weights: Tensor | None = None,
    ) -> Tensor:
        """p_qk (B, n) of words (B or 1, t, d) and tokens (B, n, d): `mass`, made a distribution."""
        return as_distribution(self.mass(words, tokens, word_mask, valid, head_weights), valid)

    def _project(self, embeds: Tensor, part: int) -> Tensor:
        """Queries (part 0) or keys (part 1) of embeddings, (..., width)."""
        entered = self._entered(embeds)
        if hasattr(self.attention, "q_proj"):
            flat = called((self.attention.q_proj, self.attention.k_proj)[part], entered)
        else:
            flat = called(self.attention.qkv_proj, entered)  # queries, keys and values side by side
            width = own(self.attention, "q_size") or self.heads * self.head_dim  # q_size: the rank's share, in vLLM
            width *= 1 + self.gated
            flat = (flat[:, :width], flat[:, width:].chunk(2, dim=-1)[0])[part].contiguous()
        return flat.unflatten(0, embeds.shape[:-1])

    def _entered(self, embeds: Tensor) -> Tensor:
        """Embeddings (..., d) as they enter the projections: rows (r, d)."""
        device = next((p.device for p in self._parameters() if not p.is_meta), embeds.device)
        entered = embeds.to(device).flatten(0, -2)  # vLLM's kernels take rows
        entered = entered if self.input_scale == 1 else entered * self.input_scale
        return entered if self.norm is None else self.norm(entered)

    def _by_head(self, flat: Tensor, norm: nn.Module | None) -> Tensor:
        """(..., width) -> (..., heads, head_dim), normalised as the family does."""
        if norm is not None and over_whole_width(norm, self.head_dim):
            return norm(flat).unflatten(-1, (-1, self.head_dim))
        by_head = flat.flatten(0, -2).unflatten(-1, (-1, self.head_dim))
        by_head = by_head if norm is None else norm(by_head)
        return by_head.unflatten(0, flat.shape[:-1])

    def _modules(self) -> list[nn.Module]:
        names = ("q_proj", "k_proj", "qkv_proj", *QUERY_NORMS, *KEY_NORMS)
        own_modules = [getattr(self.attention, name, None) for name in names]
        return [module for module in (self.norm, *own_modules) if isinstance(module, nn.Module)]

    def _parameters(self) -> list[Tensor]:
        return [parameter for module in self._modules() for parameter in module.parameters()]

    def _why_sizes_are_unknown(self) -> str | None:
        for name in (*QUERY_NORMS, *KEY_NORMS):
            norm = getattr(self.attention, name, None)
            if isinstance(norm, nn.Module) and any(True for _ in norm.children()):
                return f"its {name} is made of parts ({type(norm).__name__})"
        widths = {
            name: getattr(getattr(self.attention, name, None), "out_features", None) for name in ("q_proj", "k_proj")
        }
        for name, width in widths.items():
            if width is not None and width % self.head_dim:
                return f"its {name} puts out {width} values, no multiple of head_dim {self.head_dim}"
        known = (self.heads * self.head_dim, 2 * self.heads * self.head_dim, None)
        if widths["q_proj"] not in known:
            return f"its q_proj puts out {widths['q_proj']} values for {self.heads} heads of {self.head_dim}"
        return None

    def _why_parameters_are_elsewhere(self) -> str | None:
        """Meta parameters of modules that nothing fills when they are called; and those that ZeRO-3 took elsewhere."""
        for module in self._modules():
            for part in module.modules():
                filled = hasattr(part, "_hf_hook")  # accelerate brings offloaded weights when the module is called
                for name, parameter in part.named_parameters(recurse=False):
                    taken = parameter.numel() == 0 and hasattr(parameter, "ds_id")  # vLLM empties what it packs
                    if (parameter.is_meta and not filled) or taken:
                        return f"the parameter {name} of its {type(part).__name__} is not on this device"
        return None


def first(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The first module among these attributes, which may be something else (``qk_norm`` is a flag in vLLM)."""
    found = (getattr(module, name, None) for name in names)
    return next((part for part in found if isinstance(part, nn.Module)), None)


def own(holder: Any, *names: str) -> Any:
    """The first number of these names that a module or a config holds, else ``None``."""
    values = (getattr(holder, name, None) for name in names)
    return next((value for value in values if isinstance(value, int | float)), None)


def called(projection: nn.Module, entered: Tensor) -> Tensor:
    """A projection's output; vLLM's return a bias to be added later beside it, which here is ``None``.

    vLLM's LoRA layers choose adapters by the tokens of the step that runs, which these are not: their base is called.
    """
    output = (projection.base_layer if hasattr(projection, "punica_wrapper") else projection)(entered)
    return output if isinstance(output, Tensor) else output[0]


def first_softmax_layer(config: Any) -> int | None:
    """Index of the first layer with softmax attention by ``layer_types``; 0 where the config lists none."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if not kinds:
        return 0
    softmax = (i for i, kind in enumerate(kinds) if kind.endswith("attention") and not kind.startswith("linear"))
    return next(softmax, None)


def normalises_outputs(layer: nn.Module) -> bool:
    """Whether a layer gives its input to the attention as it is, and normalises what its parts put out."""
    if getattr(layer, "norm_after", False):  # Molmo 2
        return True
    outputs = ("post_attention_layernorm", "post_feedforward_layernorm")
    return first(layer, INPUT_NORMS) is None and all(hasattr(layer, name) for name in outputs)


def over_whole_width(norm: nn.Module, head_dim: int) -> bool:
    """Whether a norm of queries or keys is over all heads at once, by the shape of its weight."""
    weight = getattr(norm, "weight", None)
    return weight is not None and weight.ndim == 1 and weight.numel() not in (0, head_dim)


def why_unreadable(layer: nn.Module, attention: nn.Module | None) -> str | None:
    """Why the queries and keys of a layer cannot be had from its modules, or ``None``."""
    if attention is None:
        return f"{type(layer).__name__} has no self_attn"
    kind = type(attention).__name__
    latent = [
        name for name in ("kv_a_proj_with_mqa", "kv_a_proj", "q_a_proj", "kv_b_proj") if hasattr(attention, name)
    ]
    if latent:
        return f"{kind} has latent attention ({', '.join(latent)})"
    if not hasattr(attention, "qkv_proj") and not (hasattr(attention, "q_proj") and hasattr(attention, "k_proj")):
        return f"{kind} has neither q_proj and k_proj nor qkv_proj"
    if hasattr(layer, "altup"):
        return "its input is mixed out of several streams (altup)"
    if hasattr(attention, "key_multiplier"):
        return f"{kind} multiplies its keys (key_multiplier)"
    if not normalises_outputs(layer) and first(layer, INPUT_NORMS) is None:
        return f"{type(layer).__name__} has none of {', '.join(INPUT_NORMS)}"
    return None
