"""Where the text and the pictures of a padded batch of prompts are, and how dropping visual tokens shortens it.

A method inside the decoder leaves every stretch of layers a batch of its own: shorter rows, other padding, positions
and masks. This is the bookkeeping of that, as data and one pure function; attachment.py puts it to work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PictureSpan:
    """Where a picture is in a prompt, and how much of it is to be kept.

    Args:
        start: its first position, counted from the first real token of its row.
        count: how many positions it takes.
        target: the budget, in the sense of `DecoderPruner`.
        eligible: (count,) bool on the CPU, False at tokens that must not be chosen; ``None`` means that all may be.
    """

    start: int
    count: int
    target: int = 0
    eligible: Tensor | None = None

    def cut_at(self, length: int) -> PictureSpan:
        """What is left of it in a row that is cut to ``length``."""
        count = max(0, min(self.count, length - self.start))
        return replace(self, count=count, eligible=None if self.eligible is None else self.eligible[:count])

    @property
    def able(self) -> int:
        return self.count if self.eligible is None else int(self.eligible.sum())


@dataclass(frozen=True)
class PromptRow:
    """A prompt in a padded batch: ``start`` padding positions, ``length`` real ones with pictures among them."""

    start: int
    length: int
    pictures: tuple[PictureSpan, ...] = ()

    def text_after(self, picture: int) -> list[int]:
        """Positions of the text after a picture; where there is none, that of the last token."""
        visual = {p for span in self.pictures for p in range(span.start, span.start + span.count)}
        span = self.pictures[picture]
        return [p for p in range(span.start + span.count, self.length) if p not in visual] or [self.length - 1]


@dataclass
class Stage:
    """The layers from ``first_layer`` to the next cut, and the prompts as these see them.

    Args:
        rows: the prompts of the batch.
        columns: length of the padded prompts; tokens written since follow.
        valid: (B, columns) bool, False at padding.
        origin: (B, columns or more) column of the whole prompt that a position comes from, -1 at padding and at tokens
            that a method made.
        positions: (B, columns or more) position ids at prefill.
        dropped: (B, 1) how many tokens a row has fewer than at the first layer.
    """

    first_layer: int
    rows: list[PromptRow]
    columns: int
    valid: Tensor
    origin: Tensor
    positions: Tensor
    dropped: Tensor

    @property
    def is_full(self) -> bool:
        return all(row.length == self.columns for row in self.rows)


@dataclass
class PrunedPrompt:
    """What later steps must know of a shortened prompt; kept on the cache that it filled, and holds data only."""

    columns: int
    renumbers: bool
    stages: list[Stage] = field(default_factory=list)


def valid_positions(rows: Sequence[PromptRow], columns: int) -> Tensor:
    """(B, columns) bool on the CPU, True at real tokens."""
    starts, lengths = (torch.tensor([getattr(row, part) for row in rows])[:, None] for part in ("start", "length"))
    places = torch.arange(columns)
    return (places >= starts) & (places < starts + lengths)


def next_stage(
    stage: Stage,
    first_layer: int,
    hidden: Tensor,
    chosen: dict[tuple[int, int], tuple[Tensor, Tensor | None]],
    renumbers: bool,
) -> tuple[Stage, Tensor]:
    """The next stage, and the hidden states (B, N, d) that enter it.

    Args:
        chosen: by row and picture, the ascending numbers (k,) of the picture's tokens that are kept, and tokens
            (1, c, d) that follow them; pictures that are not named are kept whole.
        renumbers: count positions anew from each row's first.
    """
    batch, total, width = hidden.shape
    device = hidden.device
    bank_size = max((made.shape[1] for _, made in chosen.values() if made is not None), default=0)
    pictures = max(len(row.pictures) for row in stage.rows)
    bank = hidden.new_zeros(batch, bank_size * pictures, width)
    rows: list[PromptRow] = []
    sources: list[Tensor] = []  # per row, where each of its new tokens is in [hidden | bank]; 0 where chosen
    fills: list[tuple[int, int, Tensor]] = []  # row, place in the row, sources known on the device alone
    for number, row in enumerate(stage.rows):
        parts, spans, done, place = [], [], 0, 0
        for picture, span in enumerate(row.pictures):
            parts.append(torch.arange(row.start + done, row.start + span.start))
            place += span.start - done
            done = span.start + span.count
            if (number, picture) not in chosen:
                parts.append(torch.arange(row.start + span.start, row.start + done))
                spans.append(replace(span, start=place))
                place += span.count
                continue
            kept, made = chosen[number, picture]
            fills.append((number, place, kept + row.start + span.start))
            parts.append(torch.zeros(len(kept), dtype=torch.int64))
            count = len(kept)
            if made is not None:
                slot = bank_size * picture
                bank[number, slot : slot + made.shape[1]] = made[0]
                parts.append(torch.arange(total + slot, total + slot + made.shape[1]))
                count += made.shape[1]
            spans.append(PictureSpan(place, count, span.target))
            place += count
        parts.append(torch.arange(row.start + done, row.start + row.length))
        sources.append(torch.cat(parts))
        rows.append(PromptRow(0, len(sources[-1]), tuple(spans)))
    columns = max(row.length for row in rows)
    if all(row.start + row.length == stage.columns for row in stage.rows):  # none ends early: none shall end early now
        rows = [replace(row, start=columns - row.length) for row in rows]

    source = torch.zeros(batch, columns, dtype=torch.int64)
    steps = torch.zeros(batch, columns, dtype=torch.int64)
    for number, row in enumerate(rows):
        source[number, row.start : row.start + row.length] = sources[number]
        steps[number, row.start : row.start + row.length] = torch.arange(row.length)
    written = torch.arange(stage.columns, total).expand(batch, -1)
    source = torch.cat([source, written], dim=1).to(device, non_blocking=True)
    for number, place, known in fills:
        place += rows[number].start
        source[number, place : place + len(known)] = known
    valid = valid_positions(rows, columns).to(device, non_blocking=True)
    lost = torch.tensor([[old.length - new.length] for old, new in zip(stage.rows, rows, strict=True)])
    lost = lost.to(device, non_blocking=True)

    old_positions, old_origin = stage.positions.to(device), stage.origin.to(device)
    if renumbers:
        starts = torch.tensor([[row.start] for row in stage.rows]).to(device, non_blocking=True)
        positions = old_positions.gather(1, starts) + steps.to(device, non_blocking=True)
        positions = torch.cat([positions, old_positions[:, stage.columns :] - lost], dim=1)
    else:
        positions = old_positions.gather(1, source)
    origin = torch.cat([old_origin, old_origin.new_full((batch, bank.shape[1]), -1)], dim=1).gather(1, source)
    origin[:, :columns].masked_fill_(~valid, -1)
    whole = torch.cat([hidden, bank], dim=1) if bank_size else hidden
    hidden = whole.gather(1, source[:, :, None].expand(-1, -1, width))
    dropped = stage.dropped.to(device) + lost
    return Stage(first_layer, rows, columns, valid, origin, positions, dropped), hidden
