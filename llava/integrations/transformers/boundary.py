"""The hook before the language model: it puts the kept embeddings in their places, and owns the positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava.integrations.transformers.shortening import extended, repeated


@dataclass
class Plan:
    """What the language model is to get for one call of `generate` or `forward`.

    Args:
        embeds: (B, L', d) of the shortened prompts.
        positions: (B, L') or (A, B, L').
        gapped: whether positions jump where tokens were dropped.
        counts_itself: whether `generate`, left alone, would give the same positions to the tokens after the prompt.
        visual_mask: (B, L') bool, and deepstack: for each of the first layers (B, L', d): Qwen3-VL's.
    """

    embeds: Tensor
    positions: Tensor
    gapped: bool
    counts_itself: bool
    visual_mask: Tensor | None = None
    deepstack: list[Tensor] | None = None

    def apply(self, _: nn.Module, positional: tuple, arguments: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Forward pre-hook of the language model; sees whole prompts, pieces of them, and tokens after them."""
        if self.counts_itself and torch.compiler.is_compiling():
            return None  # a compiled decode step; a length read from the cache would break its graph
        given, cache = arguments["inputs_embeds"], arguments.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        batch, new = given.shape[:2]
        prompt = max(0, min(new, self.embeds.shape[1] - past))  # how many of these tokens belong to the prompt
        arguments = dict(arguments)
        if prompt:
            own = repeated(self.embeds, batch)[:, past : past + prompt].to(given)
            arguments["inputs_embeds"] = torch.cat([own, given[:, prompt:]], dim=1)
            if self.visual_mask is not None:
                self._give_deepstack(arguments, past, prompt, given)
        positions = repeated(self.positions, batch, dim=-2).to(given.device)
        arguments["position_ids"] = extended(positions, past + new)[..., past : past + new]
        if self.gapped and cache is None and arguments.get("attention_mask") is None:
            # Without a mask the library takes jumps for the borders of packed documents.
            arguments["attention_mask"] = torch.ones(batch, new, dtype=torch.int64, device=given.device)
        return positional, arguments

    def _give_deepstack(self, arguments: dict[str, Any], past: int, prompt: int, given: Tensor) -> None:
        """Features that are added in the first layers, for the visual tokens among the given ones."""
        batch, new = given.shape[:2]
        mask = torch.zeros(batch, new, dtype=torch.bool, device=given.device)
        mask[:, :prompt] = repeated(self.visual_mask, batch)[:, past : past + prompt].to(given.device)
        arguments["visual_pos_masks"] = mask
        arguments["deepstack_visual_embeds"] = [
            repeated(layer, batch)[:, past : past + prompt].to(given)[mask[:, :prompt]] for layer in self.deepstack
        ]
