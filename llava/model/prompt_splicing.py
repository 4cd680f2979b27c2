"""Prompts as rows of embeddings: pictures dealt out to placeholders, spliced in, rows cut and padded to a batch."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.decoder.attachment import DecoderPruning
from llava.decoder.stages import PictureSpan, PromptRow
from llava.model.kept_tokens import KeptTokens
from llava.pruning import DecoderPruner

logger = logging.getLogger(__name__)


@dataclass
class EmbeddedPrompts:
    """A padded batch of prompts, ready for the language model.

    Args:
        inputs_embeds: (B, T, d).
        attention_mask: (B, T) bool.
        position_ids: (B, T) int64, 0.. over the real tokens of a row, 0 at padding.
        labels: (B, T) int64 with IGNORE_INDEX at visual tokens and padding; ``None`` if none were given.
        kept: for each picture, which of its tokens are in the prompt; after `generate` with a method inside the
            decoder, which are left after its last cut.
        rows: where the text and the pictures of each prompt are.
        pruner: a method that is still to act, inside the decoder; ``None`` if there is none. It acts where `generate`
            gets the whole of this, not ``inputs_embeds`` alone.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None
    kept: list[KeptTokens]
    rows: list[PromptRow]
    pruner: DecoderPruner | None = None

    def __post_init__(self) -> None:
        self._entering = self.kept

    def decoder_pruning(self, decoder: nn.Module) -> DecoderPruning | None:
        """The method that is still to act, made ready for a decoder; ``None`` if there is none."""
        return None if self.pruner is None else DecoderPruning(decoder, self.pruner, self.rows)

    def note_kept(self, pruning: DecoderPruning) -> None:
        """After the forward: write down in ``kept`` what the decoder has kept of each picture."""
        places = pruning.kept_places()
        self.kept = [tokens.left_at(place) for tokens, place in zip(self._entering, places, strict=True)]


def match_images(placeholders: list[int], images: int) -> tuple[list[list[int]], list[int]]:
    """Deal images out to rows with so many placeholders each.

    Returns:
        For each row the numbers of its pictures among those used, and which of the ``images`` are used: all of them,
        unless every row without placeholder brings one along, as official LLaVA has it.

    Raises:
        ValueError: the numbers do not match.
    """
    needed, text_rows = sum(placeholders), placeholders.count(0)
    with_unused = images == needed + text_rows and images > needed
    if images != needed and not with_unused:
        raise ValueError(f"the prompts have {needed} <image> placeholders, but {images} images were given")
    of_row, used, next_image = [], [], 0
    for count in placeholders:
        of_row.append(list(range(len(used), len(used) + count)))
        used += range(next_image, next_image + count)
        next_image += count + (count == 0 and with_unused)
    return of_row, used


def splice(ids: Tensor, text: Tensor, labels: Tensor | None, pictures: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Replace every placeholder of a row by its picture's tokens: embeddings (t, d) and labels (t,)."""
    if not pictures:
        return text, labels
    embeds, new_labels, start = [], [], 0
    for end, picture in zip((ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist(), pictures, strict=True):
        embeds += [text[start:end], picture.to(text.device, text.dtype)]
        if labels is not None:
            new_labels += [labels[start:end], labels.new_full((len(picture),), IGNORE_INDEX)]
        start = end + 1
    embeds.append(text[start:])
    if labels is None:
        return torch.cat(embeds), None
    return torch.cat(embeds), torch.cat([*new_labels, labels[start:]])


def pad_rows(
    rows: list[tuple[Tensor, Tensor | None]],
    spans: list[list[PictureSpan]],
    kept: list[KeptTokens],
    limit: int,
    left: bool,
) -> EmbeddedPrompts:
    """Spliced rows, embeddings (t, d) and labels (t,), as one batch.

    Args:
        spans: where the pictures of each row are.
        limit: rows beyond this length lose their end, with a warning.
        left: put the padding there.
    """
    longest = max(len(row) for row, _ in rows)
    if longest > limit:
        logger.warning("a prompt of %d tokens is cut to %d, the checkpoint's limit: its end is lost", longest, limit)
        rows = [(row[:limit], None if labels is None else labels[:limit]) for row, labels in rows]
        longest = limit
    first, first_labels = rows[0]
    embeds = first.new_zeros(len(rows), longest, first.shape[-1])
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    positions = torch.zeros(len(rows), longest, dtype=torch.long)
    padded_labels = None
    if first_labels is not None:
        padded_labels = torch.full((len(rows), longest), IGNORE_INDEX, device=first.device)
    places = []
    for i, (row, labels) in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        embeds[i, place] = row
        mask[i, place] = True
        positions[i, place] = torch.arange(len(row))
        inside = tuple(span.cut_at(len(row)) for span in spans[i])
        places.append(PromptRow(place.start, len(row), inside))
        if padded_labels is not None:
            padded_labels[i, place] = labels
    device = first.device
    mask, positions = mask.to(device, non_blocking=True), positions.to(device, non_blocking=True)
    return EmbeddedPrompts(embeds, mask, positions, padded_labels, kept, places)
