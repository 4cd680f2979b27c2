"""A batch of prompts with columns left out: one index per new column, by which everything else is gathered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100  # labels that the library's losses leave out


@dataclass(frozen=True)
class Shortening:
    """Which columns of prompts (B, L) make the shorter ones (B, L').

    Args:
        source: (B, L') int64, column of the long prompt; at padding, that of the row's last token, whose embedding is
            an ordinary one and whose id no penalty has not seen.
        padding: (B, L') bool, True where no column of the long prompt stands.
        valid: (B, L') bool, True where the attention mask shows something.
        dropped: (B, L) bool, True at the visual tokens that are left out.
    """

    source: Tensor
    padding: Tensor
    valid: Tensor
    dropped: Tensor

    @property
    def length(self) -> int:
        return self.source.shape[1]

    @property
    def drops(self) -> bool:
        """Whether any visual token is left out."""
        return bool(self.dropped.any())

    def tokens(self, values: Tensor, padding: int | None = None) -> Tensor:
        """(B, L) -> (B, L'); ``padding`` stands at padded places, where given."""
        shorter = values.gather(1, self.source.to(values.device))
        return shorter if padding is None else shorter.masked_fill(self.padding.to(values.device), padding)

    def embeddings(self, values: Tensor) -> Tensor:
        """(B, L, d) -> (B, L', d)."""
        source = self.source.to(values.device)
        return values.gather(1, source[:, :, None].expand(-1, -1, values.shape[-1]))


def shorten(dropped: Tensor, attention_mask: Tensor, pad_left: bool, may_stay: bool = True) -> Shortening:
    """Prompts (B, L) without their ``dropped`` columns, (B, L) bool, and without those that the mask hides.

    Args:
        attention_mask: (B, L), on the CPU as ``dropped``.
        may_stay: where nothing is dropped, leave the prompts as they are, hidden columns and padding among them.

    Raises:
        ValueError: a row keeps nothing.
    """
    shown = attention_mask.bool()
    if may_stay and not bool(dropped.any()):
        everything = torch.arange(shown.shape[1]).expand(len(shown), -1)
        return Shortening(everything, torch.zeros_like(shown), shown, dropped)
    rows = [row.nonzero().flatten() for row in shown & ~dropped]
    if any(len(row) == 0 for row in rows):
        raise ValueError("a prompt of the batch has no token: its attention_mask is all zeros")
    length = max(len(row) for row in rows)
    source = torch.stack([row[-1].expand(length).clone() for row in rows])
    valid = torch.zeros_like(source, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(length - len(row), length) if pad_left else slice(0, len(row))
        source[number, place] = row
        valid[number, place] = True
    return Shortening(source, ~valid, valid, dropped)


def counted_positions(attention_mask: Tensor) -> Tensor:
    """Positions (B, L) as `generate` counts them: 0 at the first token of a row, and at padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def packed_positions(positions: Tensor, attention_mask: Tensor, shortening: Shortening) -> Tensor:
    """Positions (B, L') without the steps that dropped tokens took, or (A, B, L') counted alike in all A axes.

    Each row starts at its first position in the long prompt.

    Args:
        positions: (B, L) or (A, B, L) of the long prompts.
        attention_mask: (B, L) of the long prompts.
    """
    device = positions.device
    valid, source = shortening.valid.to(device), shortening.source.to(device)
    first = attention_mask.to(device).long().argmax(-1, keepdim=True)  # (B, 1)
    if positions.ndim == 3:
        return counted_positions(valid) + positions.gather(2, first.expand(len(positions), -1, -1))
    if not shortening.drops:
        return positions.gather(1, source)
    steps = positions.diff(dim=1, prepend=positions[:, :1])
    lost = (steps * shortening.dropped.to(device)).cumsum(-1)
    packed = (positions - lost).gather(1, source)
    begin = packed.gather(1, valid.long().argmax(-1, keepdim=True))
    start = positions.gather(1, first)
    return torch.where(valid, packed - begin + start, start)


def original_positions(positions: Tensor, shortening: Shortening) -> Tensor:
    """Positions (B, L') or (A, B, L') that the kept tokens had in the long prompts (B, L) or (A, B, L)."""
    source = shortening.source.to(positions.device)
    return positions.gather(-1, source.expand(*positions.shape[:-1], -1))


def extended(positions: Tensor, length: int) -> Tensor:
    """Positions (..., L') continued by one each up to ``length``."""
    new = length - positions.shape[-1]
    if new <= 0:
        return positions
    steps = torch.arange(1, new + 1, device=positions.device)
    return torch.cat([positions, positions[..., -1:] + steps], dim=-1)


def repeated(values: Tensor, batch: int, dim: int = 0) -> Tensor:
    """Rows side by side as often as beams and returned sequences ask for: (B, ...) -> (batch, ...)."""
    return values.repeat_interleave(batch // values.shape[dim], dim=dim)


def concatenated(parts: Sequence[Tensor]) -> Tensor:
    """Column numbers (k,) of several pieces; none for no piece."""
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])
