"""What the language model gets in place of a whole prompt: embeddings, positions and deepstack features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from llava.integrations.transformers.boundary import Plan
from llava.integrations.transformers.capture import Capture
from llava.integrations.transformers.selection import (
    KeptPicture,
    with_made_features,
    with_made_positions,
    with_made_tokens,
)
from llava.integrations.transformers.shortening import (
    Shortening,
    counted_positions,
    original_positions,
    packed_positions,
)

Positions = Literal["auto", "packed", "original"]


def dropped_columns(kept: Sequence[KeptPicture], attention_mask: Tensor) -> Tensor:
    """(B, L) bool on the CPU, True at visual tokens of prompts (B, L) that are not kept though the mask shows them."""
    dropped = torch.zeros(attention_mask.shape, dtype=torch.bool)
    for one in kept:
        dropped[one.picture.row, one.picture.columns] = one.picture.attended & ~one.kept
    return dropped


def plan_short_prompt(
    capture: Capture,
    attention_mask: Tensor,
    shortening: Shortening,
    kept: Sequence[KeptPicture],
    generating: bool,
    positions: Positions,
) -> Plan:
    """The plan of one call of `generate` or `forward`.

    Args:
        capture: what the model would have given its language model for the whole prompts (B, L).
        attention_mask: (B, L) of the whole prompts.
        generating: without positions of its own, `generate` counts along the mask and `forward` from the left.
        positions: as `attach` was asked for; "auto" keeps the original ones of models with several axes.
    """
    batch, length = attention_mask.shape
    long, counted = capture.position_ids, capture.position_ids is None
    if counted:
        everything = torch.arange(length, device=attention_mask.device).expand(batch, -1)
        long = counted_positions(attention_mask) if generating else everything
    if long.ndim == 3:
        long = long[-3:]  # in front of mRoPE's axes the plain count may stand
    long = long.expand(*long.shape[:-2], batch, length)
    several_axes = long.ndim == 3
    original = positions == "original" or (positions == "auto" and several_axes)
    gapped = original and (shortening.length < length or shortening.drops)
    if original:
        short = original_positions(with_made_positions(long, kept), shortening)
    else:
        short = packed_positions(long, attention_mask, shortening)
    visual_mask, deepstack = short_deepstack(capture, shortening, kept)
    return Plan(
        embeds=shortening.embeddings(with_made_tokens(capture.inputs_embeds, kept)),
        positions=short,
        gapped=gapped,
        counts_itself=several_axes or (counted and not gapped),
        visual_mask=visual_mask,
        deepstack=deepstack,
    )


def short_deepstack(
    capture: Capture, shortening: Shortening, kept: Sequence[KeptPicture]
) -> tuple[Tensor | None, list[Tensor] | None]:
    """Visual mask (B, L') and features (B, L', d) of each of the first layers; ``None`` for models without them.

    A token that is made of others by weights is so in every layer.
    """
    if capture.deepstack is None:
        return None, None
    device = capture.inputs_embeds.device
    mask = capture.visual_mask.to(device)  # (B, L)
    layers = []
    for features in capture.deepstack:
        dense = features.new_zeros(*mask.shape, features.shape[-1], device=device)
        dense[mask] = features.to(device)
        if any(picture.made for picture in kept):
            dense = with_made_features(dense, kept)
        layers.append(shortening.embeddings(dense))
    return shortening.tokens(mask.long(), padding=0).bool(), layers
