"""Methods inside the decoder on a host of the library: its whole prompt goes in, its layers drop tokens.

The mechanism is llava/decoder/attachment.py; here is what it must be told of the prompts, and what it says afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llava.decoder.attachment import DecoderPruning, check_host
from llava.decoder.stages import PictureSpan, PromptRow
from llava.integrations.transformers.host import Host
from llava.integrations.transformers.pictures import Picture
from llava.integrations.transformers.selection import KeptPicture
from llava.integrations.transformers.shortening import Shortening
from llava.pruning import DecoderPruner


def check_decoder(host: Host, pruner: DecoderPruner) -> None:
    """Raise ValueError, with the reason, if a method inside the decoder cannot work in this host's."""
    reason = None
    try:
        check_host(host.language_model)
    except ValueError as error:
        reason = str(error)
    if "mrope_section" in (getattr(host.language_model.config, "rope_parameters", None) or {}):
        reason = "its positions have several axes (mRoPE)"
    if reason is not None:
        raise ValueError(
            f"pruner '{pruner.name}' acts inside the decoder, which it cannot do in {type(host.model).__name__}: "
            f"{reason}"
        )


def keep_until_the_decoder(pictures: Sequence[Picture]) -> list[KeptPicture]:
    """Every picture whole."""
    return [KeptPicture(picture, torch.ones_like(picture.columns, dtype=torch.bool)) for picture in pictures]


def decoder_pruning(
    host: Host, pruner: DecoderPruner, pictures: Sequence[Picture], prompts: Shortening, attention_mask: Tensor
) -> DecoderPruning:
    """The method made ready for a batch of prompts (B, L).

    A picture's budget is what any other method would keep of it; its separators are among the tokens.

    Raises:
        ValueError: a picture's tokens do not stand side by side.
    """
    starts = attention_mask.cpu().long().argmax(-1).tolist()
    spans: list[list[PictureSpan]] = [[] for _ in starts]
    for picture in pictures:
        columns = picture.columns
        if int(columns[-1] - columns[0]) + 1 != len(columns):
            raise ValueError(
                f"pruner '{pruner.name}' ranks all tokens of a picture together, and text stands between those of "
                "this one: take a method that selects before the decoder"
            )
        counts = [len(view) for view in picture.view_columns()]
        kept = [pruner.count(count) for count in counts]
        target = len(columns) if kept == counts else sum(kept)
        spans[picture.row].append(PictureSpan(int(columns[0]) - starts[picture.row], len(columns), target))
    lengths = prompts.valid.sum(-1).tolist()
    first = prompts.valid.long().argmax(-1).tolist()
    rows = [PromptRow(*row) for row in zip(first, lengths, map(tuple, spans), strict=True)]
    return DecoderPruning(host.language_model, pruner, rows)


def with_survivors(kept: Sequence[KeptPicture], pruning: DecoderPruning) -> list[KeptPicture]:
    """What is left of each picture after the last cut, and what entered each layer."""
    layers = len(pruning.decoder.layers)
    spans = [span for row in pruning.rows for span in row.pictures]
    answers = []
    for one, span, places in zip(kept, spans, pruning.kept_places(), strict=True):
        left = torch.zeros_like(one.kept)
        left[places] = True
        counts = tuple(pruning.pruner.counts(span.count, span.target, layers))
        answers.append(replace(one, kept=left, per_layer=counts if min(counts) < span.count else None))
    return answers
