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
        valid: (B, L') bool, False at padding.
    """

    source: Tensor
    valid: Tensor

    @property
    def length(self) -> int:
        return self.source.shape[1]

    def tokens(self, values: Tensor, padding: int | None = None) -> Tensor:
        """(B, L) -> (B, L'); ``padding`` stands at padded places, where given."""
        source, valid = self.source.to(values.device), self.valid.to(values.device)
        shorter = values.gather(1, source)
        return shorter if padding is None else shorter.masked_fill(~valid, padding)

    def embeddings(self, values: Tensor) -> Tensor:
        """(B, L, d) -> (B, L', d)."""
        source = self.source.to(values.device)
        return values.gather(1, source[:, :, None].expand(-1, -1, values.shape[-1]))

    def attention_mask(self, like: Tensor) -> Tensor:
        """(B, L') in the dtype and on the device of ``like``."""
        return self.valid.to(like.device, like.dtype)


def shorten(kept: Tensor, pad_left: bool) -> Shortening:
    """The shorter prompts that hold the True columns of ``kept`` (B, L), on the CPU.

    Raises:
        ValueError: a row keeps nothing.
    """
    rows = [row.nonzero().flatten() for row in kept]
    if any(len(row) == 0 for row in rows):
        raise ValueError("a prompt of the batch has no token: its attention_mask is all zeros")
    length = max(len(row) for row in rows)
    source = torch.stack([row[-1].expand(length).clone() for row in rows])
    valid = torch.zeros_like(source, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(length - len(row), length) if pad_left else slice(0, len(row))
        source[number, place] = row
        valid[number, place] = True
    return Shortening(source, valid)


def counted_positions(attention_mask: Tensor) -> Tensor:
    """Positions (B, L) as `generate` counts them: 0 at the first token of a row, and at padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def packed_positions(positions: Tensor, attention_mask: Tensor, shortening: Shortening) -> Tensor:
    """Positions (B, L') without gaps, or (A, B, L') with the same in all A axes, from each row's first one on.

    Args:
        positions: (B, L) or (A, B, L) of the long prompts.
        attention_mask: (B, L) of the long prompts.
    """
    first = attention_mask.to(positions.device).long().argmax(-1, keepdim=True)  # (B, 1)
    axes = positions if positions.ndim == 3 else positions[None]
    start = axes.gather(2, first.expand(len(axes), -1, -1))
    counted = counted_positions(shortening.valid).to(positions.device) + start
    return counted if positions.ndim == 3 else counted[0]


def original_positions(positions: Tensor, shortening: Shortening) -> Tensor:
    """Positions (B, L') or (A, B, L') that the kept tokens had in the long prompts (B, L) or (A, B, L)."""
    source = shortening.source.to(positions.device)
    return positions.gather(-1, source.expand(*positions.shape[:-1], -1))


def extended(positions: Tensor, length: int) -> Tensor:
    """Positions (..., L') gone on with by one each up to ``length``."""
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
