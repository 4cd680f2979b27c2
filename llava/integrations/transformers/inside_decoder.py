"""Methods inside the decoder on a host of the library: its whole prompt goes in, its layers drop tokens.

The mechanism is llava/decoder/attachment.py; here is what it must be told of the prompts, and what it says afterwards.
Tokens that the attention mask hides are not in its prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llava.decoder.attachment import DecoderPruning, check_host
from llava.decoder.stages import PictureSpan, PromptRow
from llava.integrations.transformers.host import Host
from llava.integrations.transformers.pictures import Picture
from llava.integrations.transformers.selection import KeptPicture
from llava.integrations.transformers.shortening import Shortening
from llava.layout.candidates import candidates_of
from llava.pruning import DecoderPruner


def check_decoder(host: Host, method: DecoderPruner) -> None:
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
            f"pruner '{method.name}' acts inside the decoder, which it cannot do in {type(host.model).__name__}: "
            f"{reason}"
        )


def all_that_is_read(pictures: Sequence[Picture]) -> list[KeptPicture]:
    """Every picture whole, but for what the attention mask hides."""
    return [KeptPicture(picture, picture.attended) for picture in pictures]


def target_of(method: DecoderPruner, picture: Picture) -> int:
    """A picture's budget: what any other method would keep of it; separators are among the tokens."""
    budget = candidates_of(method, picture.view_sizes(), len(picture.columns), picture.attended_sizes())[0]
    return len(picture.columns) if budget.is_whole else budget.keep


def decoder_pruning(
    host: Host, method: DecoderPruner, pictures: Sequence[Picture], prompts: Shortening
) -> DecoderPruning:
    """The method made ready for a batch of prompts (B, L').

    Raises:
        ValueError: a picture's tokens do not stand side by side.
    """
    columns = torch.where(prompts.valid, prompts.source, -1)
    first = prompts.valid.long().argmax(-1).tolist()
    lengths = prompts.valid.sum(-1).tolist()
    spans: list[list[PictureSpan]] = [[] for _ in lengths]
    for picture in pictures:
        places = torch.isin(columns[picture.row], picture.columns[picture.attended]).nonzero().flatten()
        if not len(places):
            continue
        start, count = int(places[0]), len(places)
        if int(places[-1]) - start + 1 != count:
            raise ValueError(
                f"pruner '{method.name}' ranks all tokens of a picture together, and text stands between those of "
                "this one: take a method that selects before the decoder"
            )
        spans[picture.row].append(PictureSpan(start - first[picture.row], count, target_of(method, picture)))
    rows = [PromptRow(*row) for row in zip(first, lengths, map(tuple, spans), strict=True)]
    return DecoderPruning(host.language_model, method, rows)


def kept_at_the_end(kept: Sequence[KeptPicture], pruning: DecoderPruning) -> list[KeptPicture]:
    """What is kept of each picture after the last cut, and what entered each layer."""
    layers = len(pruning.decoder.layers)
    found = iter(zip([span for row in pruning.rows for span in row.pictures], pruning.kept_places(), strict=True))
    answers = []
    for one in kept:
        if not bool(one.kept.any()):
            answers.append(one)
            continue
        span, places = next(found)
        at_the_end = torch.zeros_like(one.kept)
        at_the_end[one.kept.nonzero().flatten()[places]] = True
        counts = tuple(pruning.pruner.counts(span.count, span.target, layers))
        answers.append(replace(one, kept=at_the_end, per_layer=counts if min(counts) < span.count else None))
    return answers
