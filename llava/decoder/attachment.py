"""Dropping visual tokens between the layers of a Llama-style decoder.

    with pruning_decoder(decoder, pruner, rows) as pruning:
        decoder(inputs_embeds=..., attention_mask=..., use_cache=True)   # prefill: the cuts happen here
        decoder(input_ids=..., past_key_values=..., attention_mask=...)  # decode steps: each layer on its own cache

Hooks before the layers shorten the hidden states at each cut and give the layers after it their own mask and
positions; they hang on this one decoder and are gone when the block ends, whatever happened in it. A stretch of layers
between two cuts is a `Stage` (stages.py). How long every row is at every stage is known beforehand, so nothing
waits for the device, where alone it is known which tokens are kept.

Attention rows that a method reads are computed from the layer's own queries and keys, beside its kernel, which may be
any that takes Transformers' masks (sdpa, eager, flash).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from llava.decoder.stages import PromptRow, PrunedPrompt, Stage, next_stage, valid_positions
from llava.pruning.decoder_pruner import Cut, CutInputs, DecoderPruner, attention_rows
from llava.pruning.functional import without_autocast


class DecoderPruning:
    """A method at work in one decoder, for one batch of prompts; see `pruning_decoder`."""

    def __init__(self, decoder: nn.Module, pruner: DecoderPruner | None, rows: Sequence[PromptRow] = ()) -> None:
        self.decoder = decoder
        self.pruner = pruner
        self.rows = list(rows)
        self.cuts: dict[int, dict[tuple[int, int], Cut]] = {}
        self.prompt: PrunedPrompt | None = None
        self.rotate = check_host(decoder)
        for row, prompt in enumerate(self.rows):
            for picture, span in enumerate(prompt.pictures):
                for cut in pruner.cuts(span.count, span.target, len(decoder.layers)):
                    self.cuts.setdefault(cut.after, {})[row, picture] = cut
        self._forget()

    def _forget(self) -> None:
        """Drop what is known of the forward under way."""
        self.raters: dict[tuple[int, int], Tensor | None] = {}
        self.watched: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
        self.attention_mask: Tensor | None = None
        self.given: dict[str, Any] = {}
        self.prefill = False
        self.seen = 0
        self.position_ids: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[DecoderPruning]:
        """Hooks on the decoder for the length of a block. Raises RuntimeError if another pruning is attached."""
        if find_pruning(self.decoder) is not None:
            raise RuntimeError("a pruner is attached to this decoder already")
        if not self.cuts and self.prompt is None:
            yield self
            return
        handles = [self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)]
        for index, layer in enumerate(self.decoder.layers):
            handles.append(layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._forget()

    # --- hooks -----------------------------------------------------------------------------------------------------

    def _before_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._forget()
        self.attention_mask = kwargs.get("attention_mask")
        if len(args) > 1 or (self.attention_mask is not None and self.attention_mask.ndim != 2):
            raise ValueError("pruning inside the decoder needs attention_mask= as (B, T), given by name")

    def _before_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        hidden, past = args[0], kwargs.get("past_key_values")
        if index == 0:
            self._begin(hidden, past, kwargs)
        kwargs = kwargs | self.given
        if self.prefill and index in self.cuts:
            hidden = self._cut(index, hidden, kwargs["position_embeddings"])
        stage = next((stage for stage in self.prompt.stages[1:] if stage.first_layer == index), None)
        if stage is not None:
            self.given = self._mask_and_positions(stage, hidden, past)
            kwargs = kwargs | self.given
        if self.prefill and index + 1 in self.cuts and self.pruner.watches == "layer before":
            self.watched = hidden, kwargs["position_embeddings"]
        return (hidden, *args[1:]), kwargs

    def _begin(self, hidden: Tensor, past: Any, kwargs: dict[str, Any]) -> None:
        """A forward begins: the whole prompt, or more tokens behind a prompt that is in the cache."""
        if past is not None and (not isinstance(past, DynamicCache) or any(past.is_sliding)):
            raise ValueError(
                f"pruning inside the decoder leaves caches of different length in its layers, which a "
                f"{type(past).__name__} cannot hold: use a DynamicCache without sliding windows (the default)"
            )
        if kwargs.get("position_embeddings") is None or kwargs.get("position_ids") is None:
            raise ValueError("the decoder does not give its layers position_embeddings and position_ids")
        self.position_ids = kwargs["position_ids"]
        self.seen = 0 if past is None else past.get_seq_length()
        self.prefill = self.seen == 0
        if not self.prefill:
            if self.prompt is None:
                raise ValueError("the cache was filled without this pruning: decoding cannot resume behind it")
            if len(self.prompt.stages[0].rows) != hidden.shape[0]:
                raise ValueError(f"the cached prompts are {len(self.prompt.stages[0].rows)}, not {hidden.shape[0]}")
            return
        if not self.rows:
            raise ValueError("a new prompt came where decoding was to resume behind one in a cache")
        columns = max(row.start + row.length for row in self.rows)
        if hidden.shape[0] % len(self.rows) or hidden.shape[1] < columns:
            raise ValueError(
                f"pruning inside the decoder needs whole prompts: {len(self.rows)} of {columns} tokens, got "
                f"{tuple(hidden.shape[:2])} (no prefill_chunk_size)"
            )
        copies = hidden.shape[0] // len(self.rows)  # beams and returned sequences are beside each other
        rows = [row for row in self.rows for _ in range(copies)]
        device, everything = hidden.device, torch.arange(hidden.shape[1], device=hidden.device)
        valid = valid_positions(rows, columns).to(device, non_blocking=True)
        first = Stage(
            first_layer=0,
            rows=rows,
            columns=columns,
            valid=valid,
            origin=everything.expand(len(rows), -1),
            positions=kwargs["position_ids"].expand(len(rows), -1),
            dropped=torch.zeros(len(rows), 1, dtype=torch.int64, device=device),
        )
        self.prompt = PrunedPrompt(columns, self.pruner.renumbers, [first])
        if past is not None:
            past.decoder_pruning = self.prompt
        if "raters" in self.pruner.reads:
            for row, picture in sorted({pair for pairs in self.cuts.values() for pair in pairs}):
                span, own = self.rows[row].pictures[picture], hidden[row * copies, self.rows[row].start :][None]
                text = own[:, self.rows[row].text_after(picture)]
                with without_autocast():
                    self.raters[row, picture] = self.pruner.rate(own[:, span.start : span.start + span.count], text)

    def _mask_and_positions(self, stage: Stage, hidden: Tensor, past: Any) -> dict[str, Any]:
        """What the layers of a stage get in place of the decoder's own mask and positions."""
        device, new = hidden.device, hidden.shape[1]
        before = 0  # columns in the caches of this stage
        if self.prefill:
            positions = stage.positions
        else:
            positions = self.position_ids - stage.dropped if self.prompt.renumbers else self.position_ids
            before = stage.columns + self.seen - self.prompt.columns
            if past.get_seq_length(stage.first_layer) != before:
                raise ValueError(
                    f"layer {stage.first_layer} has {past.get_seq_length(stage.first_layer)} tokens in its cache, "
                    f"expected {before}: the cache was changed since the prompt was shortened"
                )
        mask = None
        if self.attention_mask is not None or not stage.is_full:
            written = before + new - stage.columns
            tail = torch.ones(hidden.shape[0], written, dtype=torch.bool, device=device)
            if self.attention_mask is not None:
                tail = self.attention_mask[:, self.prompt.columns :].to(device, torch.bool)
            mask = torch.cat([stage.valid.to(device), tail], dim=1)
        return {
            "position_embeddings": self.decoder.rotary_emb(hidden, positions.to(device)),
            # Counted through: flash kernels take gaps for the borders of packed sequences.
            "position_ids": torch.arange(before, before + new, device=device)[None],
            "attention_mask": create_causal_mask(
                config=self.decoder.config,
                inputs_embeds=hidden,
                attention_mask=mask,
                past_key_values=past,
                layer_idx=stage.first_layer,
            ),
        }

    # --- cuts ------------------------------------------------------------------------------------------------------

    def _cut(self, index: int, hidden: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Choose at the cut before layer ``index``, and shorten the hidden states (B, N, d)."""
        stage = self.prompt.stages[-1]
        copies = len(stage.rows) // len(self.rows)
        watched, states = index, hidden
        if self.pruner.watches == "layer before":
            watched = index - 1
            states, embeddings = self.watched
        reader = LayerReader(self, watched, states[::copies], embeddings)
        chosen: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
        for (row, picture), cut in self.cuts[index].items():
            prompt = stage.rows[row * copies]
            span = prompt.pictures[picture]
            keep, make = self.pruner.split(cut, span.able)
            if keep + make < span.count:
                inputs = reader.inputs(row, prompt, picture, hidden[row * copies], self.raters.get((row, picture)))
                with without_autocast():
                    kept, made = self.pruner.choose_at(inputs, keep, make)
                for copy in range(copies):  # copies of a prompt agree, whatever rounding does to them
                    chosen[row * copies + copy, picture] = kept[0].to(hidden.device), made
        stage, hidden = next_stage(stage, index, hidden, chosen, self.prompt.renumbers)
        self.prompt.stages.append(stage)
        return hidden

    # --- answers ---------------------------------------------------------------------------------------------------

    def kept_places(self) -> list[Tensor]:
        """For each picture of each row, which of its tokens are left after the last cut (k,) int64, on the CPU."""
        if self.prompt is None:
            return [torch.arange(span.count) for row in self.rows for span in row.pictures]
        last = self.prompt.stages[-1]
        copies = len(last.rows) // len(self.rows)
        origin = last.origin[::copies].cpu()
        found = []
        for number, (first, now) in enumerate(zip(self.rows, last.rows[::copies], strict=True)):
            for span, left in zip(first.pictures, now.pictures, strict=True):
                columns = origin[number, now.start + left.start : now.start + left.start + left.count]
                found.append(columns[columns >= 0] - first.start - span.start)
        return found

    def labels(self, labels: Tensor, ignored: int) -> Tensor:
        """Labels (B, T) of the positions that are there after the last cut; ``ignored`` elsewhere."""
        if self.prompt is None:
            return labels
        origin = self.prompt.stages[-1].origin.to(labels.device)
        return labels.gather(1, origin.clamp_min(0)).masked_fill(origin < 0, ignored)


class LayerReader:
    """What one layer says about prompts (P, N, d) that enter it: keys, and single rows of its attention."""

    def __init__(self, pruning: DecoderPruning, index: int, states: Tensor, embeddings: tuple[Tensor, Tensor]) -> None:
        self.pruning = pruning
        self.layer = pruning.decoder.layers[index]
        self.device = next(self.layer.parameters()).device
        if self.device.type == "meta":
            raise ValueError(f"layer {index} is offloaded: its queries and keys cannot be read beside its own forward")
        attention = self.layer.self_attn
        self.scaling = getattr(attention, "scaling", attention.head_dim**-0.5)
        self.cos, self.sin = (part.to(self.device) for part in embeddings)
        self.normed = self.layer.input_layernorm(states.to(self.device))
        self.copies = max(1, self.cos.shape[0] // states.shape[0])
        self.keys = None
        if pruning.pruner.reads & {"attention", "keys", "text_keys"}:
            keys = self._heads(attention.k_proj, self.normed)  # (P, h, N, c)
            rows = [self._rotated(keys[row][None], row, slice(None)) for row in range(len(keys))]
            self.keys = torch.cat(rows)

    def _heads(self, projection: nn.Module, normed: Tensor) -> Tensor:
        return projection(normed).unflatten(-1, (-1, self.layer.self_attn.head_dim)).transpose(1, 2)

    def _rotated(self, states: Tensor, row: int, columns: slice | list[int]) -> Tensor:
        """States (1, h, q, c) at the positions of ``columns`` of a row."""
        row = row * self.copies if self.cos.shape[0] > 1 else 0
        cos, sin = self.cos[row, columns][None], self.sin[row, columns][None]
        return self.pruning.rotate(states, states, cos, sin)[0]

    def inputs(self, row: int, prompt: PromptRow, picture: int, hidden: Tensor, raters: Tensor | None) -> CutInputs:
        """What the method asks for about one picture; ``hidden`` (N, d) are the row's states at the cut."""
        pruner, span = self.pruning.pruner, prompt.pictures[picture]
        first = prompt.start + span.start
        visual = slice(first, first + span.count)
        real = slice(prompt.start, prompt.start + prompt.length)
        within = slice(span.start, span.start + span.count)
        asking = [prompt.length - 1] if pruner.queries == "last" else prompt.text_after(picture)
        columns = [prompt.start + place for place in asking]
        found: dict[str, Tensor] = {}
        if "attention" in pruner.reads:
            queries = self._heads(self.layer.self_attn.q_proj, self.normed[row, columns][None])
            queries = self._rotated(queries, row, columns)
            rows = attention_rows(queries, self.keys[row, :, real][None], self.scaling, asking)
            found["attention"] = rows[..., within]
        if "position_products" in pruner.reads:
            ones = torch.ones(1, 1, *self.normed.shape[1:2], self.layer.self_attn.head_dim, device=self.device)
            turned = self._rotated(ones, row, slice(None))[0, 0]
            with without_autocast():
                found["position_products"] = (turned[columns] @ turned[visual].mT * self.scaling)[None]
        if "keys" in pruner.reads:
            flat = self.keys[row].transpose(0, 1).flatten(1)[None]  # (1, N, k)
            found["keys"], found["text_keys"] = flat[:, visual], flat[:, columns]
        if "final" in pruner.reads:
            norm = self.pruning.decoder.norm
            states = norm(hidden.to(next(norm.parameters()).device))[None].to(self.device)
            found["final"], found["text_final"] = states[:, visual], states[:, columns]
        if "hidden" in pruner.reads:
            found["hidden"] = hidden[None, visual].to(self.device)
        if span.eligible is not None:
            found["eligible"] = span.eligible[None].to(self.device, non_blocking=True)
        if raters is not None:
            found["raters"] = raters.to(self.device)
        return CutInputs(able=span.able, **found)


@contextmanager
def pruning_decoder(decoder: nn.Module, pruner: DecoderPruner, rows: Sequence[PromptRow]) -> Iterator[DecoderPruning]:
    """Attach a method to a decoder for the length of a block.

    Args:
        decoder: a Llama-style body (layers, norm, rotary_emb), not the model with a head around it.
        pruner: the method.
        rows: the prompts of the batch that will come, in order. The decoder may get several copies of each, side by
            side, and tokens behind them (generation without a cache).

    Raises:
        ValueError: the host cannot serve the method, the prompts that come are not those announced, or the cache is
            of a kind that cannot hold layers of different length.
        RuntimeError: another pruning is attached to this decoder.
    """
    with DecoderPruning(decoder, pruner, rows).attached() as pruning:
        yield pruning


@contextmanager
def resumed_pruning(decoder: nn.Module, prompt: PrunedPrompt) -> Iterator[DecoderPruning]:
    """Decode further behind a shortened prompt, ``past_key_values.decoder_pruning``, once its own block has ended."""
    pruning = DecoderPruning(decoder, None)
    pruning.prompt = prompt
    with pruning.attached():
        yield pruning


def find_pruning(decoder: nn.Module) -> DecoderPruning | None:
    """The pruning that is attached to a decoder."""
    owners = (getattr(hook, "__self__", None) for hook in decoder._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, DecoderPruning)), None)


def check_host(decoder: nn.Module) -> Any:
    """The rotation that a decoder's attention applies. Raises ValueError that says what a decoder lacks."""
    lacking = [name for name in ("layers", "norm", "rotary_emb", "config") if not hasattr(decoder, name)]
    rotate = None
    if "layers" not in lacking:
        layer = decoder.layers[0]
        attention = getattr(layer, "self_attn", None)
        lacking += [] if hasattr(layer, "input_layernorm") else ["input_layernorm"]
        lacking += [f"self_attn.{name}" for name in ("q_proj", "k_proj", "head_dim") if not hasattr(attention, name)]
        rotate = getattr(inspect.getmodule(type(attention)), "apply_rotary_pos_emb", None)
        lacking += [] if rotate is not None else ["apply_rotary_pos_emb beside its attention"]
        extra = [name for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        if extra:
            raise ValueError(
                f"{type(attention).__name__} has {extra[0]}, which pruning inside the decoder cannot read"
            )
    if lacking:
        raise ValueError(
            f"{type(decoder).__name__} is no Llama-style decoder, as pruning inside it needs: it lacks "
            f"{', '.join(lacking)}"
        )
    kinds = getattr(decoder.config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if getattr(decoder.config, "sliding_window", None) else "full_attention"]
    if set(kinds) != {"full_attention"}:
        raise ValueError(f"pruning inside the decoder needs full attention in all layers, not {', '.join(set(kinds))}")
    return rotate
