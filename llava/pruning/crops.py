"""Crops of a view: what their tokens have in common, and how a budget is shared among them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava.pruning.functional import cosine_similarity, stable_rank
from llava.pruning.inputs import PruningInputs

TINY = 1e-6  # stabiliser of HoloV's quotients


@dataclass(frozen=True)
class Crops:
    """C crops of at most M tokens in each of B views.

    Args:
        index: (C, M) int64, the tokens of each crop, ascending; 0 where a crop has fewer than M.
        real: (B, C, M) bool, False there and at tokens that take no part.
        tokens: n.
    """

    index: Tensor
    real: Tensor
    tokens: int

    @classmethod
    def of(cls, inputs: PruningInputs, crops: int, layout: str = "runs") -> Crops:
        """The crops of ``inputs``.

        Raises:
            ValueError: squares that do not fit, because ``crops`` or the number of tokens is no square number.
        """
        device = inputs.features.device
        members = [torch.tensor(tokens) for tokens in crop_tokens(inputs.tokens, crops, layout)]
        index = nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=-1)
        index, real = index.clamp_min(0).to(device, non_blocking=True), (index >= 0).to(device, non_blocking=True)
        real = real.expand(inputs.views, -1, -1)
        return cls(index, real if inputs.valid is None else real & inputs.valid[:, index], inputs.tokens)

    def gather(self, values: Tensor) -> Tensor:
        """(B, n, ...) -> (B, C, M, ...)."""
        return values[:, self.index]

    def scatter(self, values: Tensor) -> Tensor:
        """(B, C, M) -> (B, n), False or -inf at tokens that take no part."""
        lowest = False if values.dtype == torch.bool else -torch.inf
        empty = values.new_full((values.shape[0], self.tokens + 1), lowest)
        place = self.index.expand_as(values).masked_fill(~self.real, self.tokens)
        return empty.scatter(1, place.flatten(1), values.flatten(1))[:, :-1]

    def mean(self, values: Tensor) -> Tensor:
        """(B, C, M) -> (B, C), over the tokens that take part; 0 where there are none."""
        return (values * self.real).sum(-1) / self.real.sum(-1).clamp_min(1)

    def variance(self, features: Tensor, itself: bool = False) -> Tensor:
        """Mean square deviation of every token's cosines with the others of its crop from their mean: (B, C, M).

        Args:
            itself: a similarity of 0 with itself counts in the sum, but not in the number, by which it is divided.
        """
        similarity = cosine_similarity(self.gather(features).flatten(0, 1)).unflatten(0, self.real.shape[:2])
        pairs = self.real[..., None] & self.real[..., None, :]  # (B, C, M, M)
        diagonal = torch.eye(pairs.shape[-1], dtype=torch.bool, device=pairs.device)
        others = pairs & ~diagonal
        similarity = similarity * others
        count = others.sum(-1).clamp_min(1)
        deviation = similarity - (similarity.sum(-1) / count)[..., None]
        return (deviation.square() * (pairs if itself else others)).sum(-1) / count

    def best(self, score: Tensor, quota: Tensor) -> Tensor:
        """(B, C, M) bool, the ``quota`` (B, C) tokens of each crop with the largest score."""
        rank = stable_rank(score.masked_fill(~self.real, -torch.inf).flatten(0, 1), descending=True).view_as(score)
        return (rank < quota[..., None]) & self.real


def crop_tokens(tokens: int, crops: int, layout: str) -> list[list[int]]:
    """The raster indices of each crop: see `holov`."""
    if layout == "runs":
        size, more = divmod(tokens, crops)
        starts = [crop * size + min(crop, more) for crop in range(crops + 1)]
        return [list(range(start, end)) for start, end in itertools.pairwise(starts)]
    side, parts = math.isqrt(tokens), math.isqrt(crops)
    if side * side != tokens or parts * parts != crops:
        raise ValueError(f"layout=squares needs square numbers of crops and tokens, got {crops} and {tokens}")
    squares: list[list[int]] = [[] for _ in range(crops)]
    for token in range(tokens):
        row, column = divmod(token, side)
        squares[row * parts // side * parts + column * parts // side].append(token)
    return squares


def quotas(weight: Tensor, keep: int) -> Tensor:
    """floor(w_c m), and what is missing to m one each by falling weight: weights (B, C) -> (B, C) int64."""
    quota = (weight * keep).long()
    missing = keep - quota.sum(-1)
    return quota + one_each(missing, weight, torch.full_like(quota, keep), -(-keep // quota.shape[-1]))


def within_room(quota: Tensor, weight: Tensor, room: Tensor, rounds: int) -> Tensor:
    """Quotas (B, C) that no crop exceeds, of ``room`` (B, C) tokens, at most ``rounds``: step 4 of `holov`."""
    capped = torch.minimum(quota, room)
    surplus, free = (quota - capped).sum(-1, keepdim=True), room - capped
    claim = weight * free
    more = (surplus * claim / claim.sum(-1, keepdim=True).clamp_min(torch.finfo(claim.dtype).tiny)).long()
    more = torch.minimum(more, free)
    capped, free = capped + more, free - more
    return capped + one_each((surplus - more.sum(-1, keepdim=True))[:, 0], weight, free, rounds)


def one_each(count: Tensor, weight: Tensor, room: Tensor, rounds: int) -> Tensor:
    """Give ``count`` (B,) tokens to crops one by one, by falling weight (B, C), round after round.

    Args:
        room: (B, C) int64, the most that a crop can take.
        rounds: at least as many as are needed.

    Returns:
        (B, C) int64.
    """
    round_number = torch.arange(rounds, device=weight.device).view(1, -1, 1)
    turn = stable_rank(weight, descending=True)[:, None] + weight.shape[-1] * round_number  # (B, rounds, C)
    possible = round_number < room[:, None]
    place = stable_rank((turn + ~possible * turn.numel()).flatten(1)).view_as(turn)
    return ((place < count[:, None, None]) & possible).sum(1)
