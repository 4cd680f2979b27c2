"""PruneSID: groups of tokens along principal directions, and in each what is attended to and not a repetition."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.attention_reader import AttentionReader
from llava.pruning.base import TokenMaker, register
from llava.pruning.functional import cosine_similarity, lowest_ranked, stable_rank
from llava.pruning.inputs import PruningInputs, Selection


@register
@dataclass(frozen=True, kw_only=True)
class PruneSID(AttentionReader, TokenMaker):
    """Group patches by the principal direction that they load on most, drop repetitions in each, keep what is salient.

    Paper: "Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via Synergistic Importance-Diversity"
    (arXiv 2603.09480). Inputs: encoder_features V (B, n, c), class_attention (B, heads, n) and class_features (B, c).
    Output: indices (B, m - 1) and the class token (B, 1, c), before the projector.

    1. X = sigmoid(V), less each token's mean over the channels. W (n, K): the first K = m // 4 principal directions
       over tokens, the eigenvectors of X X' with the largest eigenvalues. Token i belongs to group argmax_k |W_ik|.
    2. tau = m / 32 x the mean cosine of V over all pairs.
    3. In each group, by falling a (mean attention of the class token): a token survives if its cosine with no survivor
       of the group exceeds tau. c_k of the group's s_k tokens survive.
    4. Quotas: at least lo_k = min(1, s_k), at most up_k = min(5 ceil(m / 64), c_k), and one more each, within s_k,
       until the up_k add up to m. The rest of the m - 1 is shared in proportion to c_k, rounded along the cumulative
       sum and cut at up_k; what is cut goes to the groups with the largest c_k.
    5. Each group keeps its survivors, then others, by falling a.

    Args:
        class_token: False keeps m patches and no class token, and ranks the patches of a group by |W_ik|, as the code
            for Qwen does: for encoders without a class token.

    Step 1 is computed in float64: where eigenvalues are close, groups depend on the last digits.

    Deviations from the paper, as in the released code: (1) tokens are centred over channels, not channels over tokens;
    (2) attention ranks within a group, not |W_ik|; (3) quotas have bounds; (4) the class token is kept, and counts.
    And: (5) the count is the budget, and not decided by the redundancy.

    Deviations from the released code: (1) the factorisation is exact, where the code's is random, so that its choice
    differs from run to run; (2) kept patches stand in raster order, the code's group after group; (3) padding takes no
    part unless ``exclude_padding=False``; (4) ties go to the lowest index.
    """

    name: ClassVar[str] = "prunesid"
    floor: ClassVar[int] = 4
    below_floor: ClassVar[str] = "a single group of all patches"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"encoder_features"} | ({"class_attention", "class_features"} if self.class_token else set()))

    def count_made(self, keep: int) -> int:
        return int(self.class_token)

    def kept_and_made(self, keep: int, eligible: Tensor) -> tuple[Tensor, Tensor]:
        patches = eligible.sum(-1)
        return patches.clamp_max(keep - self.class_token), self.class_token * (patches > 0).long()

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        total, valid = keep + self.class_token, inputs.valid
        loading = principal_loadings(inputs.encoder_features, max(total // 4, 1), valid)
        strength, group = loading.max(-1)
        score = self.attention(inputs) if self.class_token else strength
        rank = stable_rank(score if valid is None else score.masked_fill(~valid, -torch.inf), descending=True)
        similarity = cosine_similarity(inputs.encoder_features)
        threshold = total / 32 * mean_of_pairs(similarity, valid)
        repeats = (similarity > threshold[:, None, None]) & (group[:, :, None] == group[:, None])
        survives = first_of_repeats(repeats, rank)

        groups = torch.arange(loading.shape[-1], device=group.device)
        members = group[:, None] == groups[:, None]  # (B, K, n)
        members = members if valid is None else members & valid[:, None]
        size, survivors = members.sum(-1), (members & survives[:, None]).sum(-1)
        quota = group_quotas(size, survivors, total, keep)
        own = rank + inputs.tokens * (~survives).long()  # survivors first
        place = stable_rank(torch.where(members, own[:, None], 2 * inputs.tokens).flatten(0, 1)).view_as(members)
        chosen = ((place < quota[:, :, None]) & members).any(1)
        details = {"group": group, "survives": survives, "survivors": survivors, "quota": quota}
        return lowest_ranked(rank, keep, chosen), details

    def make(self, inputs: PruningInputs, kept: Selection, count: int) -> Selection:
        return dataclasses.replace(kept, made=inputs.class_features[:, None], leading=1)


def principal_loadings(features: Tensor, count: int, valid: Tensor | None = None) -> Tensor:
    """|W| (B, n, count) float64: step 1 of `PruneSID`, by falling eigenvalue; 0 at tokens that take no part."""
    tokens = features.double().sigmoid().nan_to_num(nan=0.5)
    tokens = tokens - tokens.mean(-1, keepdim=True)
    if valid is not None:
        tokens = tokens * valid[:, :, None]
    return torch.linalg.eigh(tokens @ tokens.mT).eigenvectors[..., -count:].flip(-1).abs()


def mean_of_pairs(similarity: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean of (B, n, n) over pairs i < j of tokens that take part: (B,)."""
    pairs = torch.ones_like(similarity, dtype=torch.bool).triu(1)
    if valid is not None:
        pairs = pairs & valid[:, :, None] & valid[:, None]
    return (similarity * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)


def first_of_repeats(repeats: Tensor, rank: Tensor) -> Tensor:
    """(B, n) bool: tokens that repeat no token which survives itself and comes before them.

    Args:
        repeats: (B, n, n) bool, symmetric: i and j repeat each other.
        rank: (B, n) int64, a permutation: which comes first.
    """
    order = rank.argsort(dim=-1)
    n = order.shape[-1]
    ordered = repeats.gather(1, order[:, :, None].expand(-1, -1, n)).gather(2, order[:, None].expand(-1, n, -1))
    later = ordered.triu(1).unbind(1)  # n times (B, n): what the token in that place rules out
    survives = torch.ones_like(rank, dtype=torch.bool)
    for place in range(n):
        survives &= ~(later[place] & survives[:, place, None])
    return survives.gather(1, rank)


def group_quotas(size: Tensor, survivors: Tensor, total: int, keep: int) -> Tensor:
    """Step 4 of `PruneSID`: how many of each group's tokens are kept.

    Args:
        size, survivors: (B, K) int64 s and c.
        total: m, with the class token.
        keep: patches among them.

    Returns:
        (B, K) int64.
    """
    low = size.clamp_max(1)
    high = torch.minimum(survivors, size).clamp_max(5 * -(-total // 64))
    more = torch.arange(total + 1, device=size.device)  # rounds of one more each
    raised = torch.minimum(high[:, :, None] + more, size[:, :, None])  # (B, K, rounds)
    rounds = (raised.sum(1) < total).sum(-1).clamp_max(total)
    high = raised.gather(2, rounds[:, None, None].expand(-1, size.shape[1], 1))[:, :, 0]

    rest = (keep - low.sum(-1, keepdim=True)).clamp_min(0)
    share = survivors.cumsum(-1) / survivors.sum(-1, keepdim=True).clamp_min(1)
    steps = (rest * share).round().long()  # half to even
    quota = torch.minimum(low + steps.diff(dim=-1, prepend=torch.zeros_like(rest)), high)
    room, order = high - quota, survivors.argsort(dim=-1, descending=True, stable=True)
    ordered = room.gather(1, order)
    before = ordered.cumsum(-1) - ordered
    deficit = (keep - quota.sum(-1, keepdim=True)).clamp_min(0)
    filled = torch.minimum((deficit - before).clamp_min(0), ordered)
    return quota.scatter_add(1, order, filled)
