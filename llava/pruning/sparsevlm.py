"""SparseVLM: three cuts guided by the question's words, dropped tokens recycled as cluster means."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from llava.pruning.base import register
from llava.pruning.decoder_pruner import (
    REFERENCE_LAYERS,
    Cut,
    CutInputs,
    DecoderPruner,
    chosen_layers,
    highest,
    parse_layers,
)
from llava.pruning.functional import inner_products, stable_rank, working_dtype
from llava.pruning.options import Count, Range

SCHEDULE_TOKENS = 576  # of the published schedules
SCHEDULES = {  # version: budget -> tokens kept by each cut
    1: {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    2: {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}


@register
@dataclass(frozen=True, kw_only=True)
class SparseVLM(DecoderPruner):
    """Let the text tokens that look at the picture rate its tokens; keep the best, merge some of the others.

    Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference" (arXiv 2410.04417;
    Zhang et al., ICML 2025). Inputs at a cut: attention (B, h, t, n), the rows of the text after the picture in the
    layer just run; raters (B, t), found once from the embeddings that enter the decoder; hidden (B, n, d). Output:
    indices (B, c) and, in version 1, cluster means (B, C, d) that follow them in the prompt and count as visual tokens
    from then on. Version 1 counts positions anew after a cut, version 2 keeps them and has no recycling.

    1. Raters: text tokens whose mean over visual tokens of softmax_text(H_v H_t^T) exceeds the mean of these.
    2. relation_j = mean over heads and raters of the attention to visual token j; the c largest are kept, but
       at least one token is dropped.
    3. Of the P dropped, the int(0.3 P) + 1 with the largest relation form the pool, C = |pool| // 10 + 1 clusters by
       density peaks.

    Args:
        version: 1 is that of the result tables; 2 divides the attention, a probability, by the scaled product of
            queries and keys of ones after rotary, which is no probability and may be negative, and reads only the
            heads in which the raters look at the picture most.
        layers: after how many layers the cuts come. ``None`` is 3/7/16 (after layers 2, 6 and 15 counted from 0),
            scaled in decoders of fewer than 32 layers.
        heads: how many heads version 2 reads.

    Budgets of pictures of up to 576 tokens follow the published schedules, between these by interpolation, for other
    n in proportion; their count *leaving* the layers averages ``keep_tokens``, the count entering is up to 29 % more.
    Smaller budgets, larger pictures and ``budget="nominal"`` have a single cut: kept + recycled = ``keep_tokens``.
    In decoders of fewer than 32 layers, for which nothing is published, the schedule is scaled down until the count
    entering averages ``keep_tokens``, where that can be reached.

    Deviations from the paper: (1) fixed schedules, like the released code, instead of the rank of the relation.

    Deviations from the released code: (1) no random noise in the densities, equal densities rank by index; (2) rows
    are computed beside the fast kernel; (3) batches and several pictures per prompt, whose raters are the text tokens
    after each picture; (4) where no text token exceeds the mean, all rate; (5) padding is neither chosen nor recycled
    unless ``exclude_padding`` is off.
    """

    name: ClassVar[str] = "sparsevlm"
    watches: ClassVar[Literal["layer before", "layer after"]] = "layer before"
    queries: ClassVar[Literal["last", "text"]] = "text"

    version: Annotated[int, Range(1, 2)] = 1
    layers: str | None = None
    heads: Count = 14

    def __post_init__(self):
        super().__post_init__()
        if self.layers is not None and len(parse_layers(self.layers)) > 3:
            raise ValueError(f"sparsevlm has at most three cuts, got layers {self.layers}")

    @property
    def renumbers(self) -> bool:
        return self.version == 1

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"attention", "raters", "hidden" if self.version == 1 else "position_products"})

    def rate(self, visual: Tensor, text: Tensor) -> Tensor | None:
        return text_raters(visual, text)[1]

    def choose_at(self, inputs: CutInputs, keep: int, make: int = 0) -> tuple[Tensor, Tensor | None]:
        attention = inputs.attention
        if self.version == 2:
            attention = attention / inputs.position_products[:, None]
            attention = best_heads(attention, inputs.raters, self.heads)[0]
        relation = text_relation(attention, inputs.raters)
        kept = highest(relation, keep, inputs.eligible)
        if make == 0:
            return kept, None
        dropped = torch.ones_like(relation, dtype=torch.bool).scatter(1, kept, False)
        if inputs.eligible is not None:
            dropped = dropped & inputs.eligible
        pool = recycling_pool(relation, dropped, pool_size(inputs.able - keep))
        features = inputs.hidden.gather(1, pool[:, :, None].expand(-1, -1, inputs.hidden.shape[-1]))
        return kept, recycle(features, make)[0]

    def kept(self, keep: int, able: int) -> int:
        return max(1, min(keep, able - 1))

    def made(self, dropped: int) -> int:
        return cluster_count(pool_size(dropped)) if self.version == 1 and dropped > 0 else 0

    def cut_layers(self, layers: int) -> list[int]:
        return chosen_layers(self.layers, [3, 7, 16], layers)

    def average_cuts(self, tokens: int, target: int, layers: int) -> list[Cut] | None:
        places = self.cut_layers(layers)
        smallest = min(SCHEDULES[self.version]) * tokens / SCHEDULE_TOKENS
        if layers >= REFERENCE_LAYERS and (tokens > SCHEDULE_TOKENS or target < smallest):
            return None
        schedule = published_schedule(self.version, tokens, max(target, smallest))

        def scaled(share: float) -> list[Cut]:
            keeps = [max(1, int(keep * share + 0.5)) for keep in schedule]
            return [Cut(place, keep) for place, keep in zip(places, keeps, strict=False)]

        def fits(share: float) -> bool:
            return sum(self.counts_of(scaled(share), tokens, layers)) <= target * layers

        if layers >= REFERENCE_LAYERS or fits(1.0):
            return scaled(1.0)
        if not fits(0.0):
            return None
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return scaled(low)

    def nominal_cuts(self, tokens: int, target: int, layers: int) -> list[Cut]:
        """One cut whose kept and recycled tokens make ``target``; without recycling where that alone is too much."""
        place = self.cut_layers(layers)[0]
        for keep in range(target, 0, -1):
            if keep + self.made(tokens - keep) <= target:
                return [Cut(place, keep)]
        return [Cut(place, target, merge=False)]


def published_schedule(version: int, tokens: int, target: float) -> list[int]:
    """What the three cuts keep of n = ``tokens``, in proportion to the published schedules for 576.

    Between published budgets, and between the largest and all tokens, each entry is interpolated.
    """
    schedules = SCHEDULES[version] | {SCHEDULE_TOKENS: (SCHEDULE_TOKENS,) * 3}
    budget = target * SCHEDULE_TOKENS / tokens
    known = sorted(schedules)
    above = bisect_left(known, budget)
    low, high = known[max(0, above - 1)], known[above]
    share = 1.0 if low == high else (budget - low) / (high - low)
    pairs = zip(schedules[low], schedules[high], strict=True)
    return [int((start + share * (end - start)) * tokens / SCHEDULE_TOKENS + 0.5) for start, end in pairs]


# --- mathematics ---------------------------------------------------------------------------------------------------


def text_raters(visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the text tokens (B, t), and which exceed their mean (B, t) bool: all, where none does.

    Args:
        visual: (B, n, d) embeddings entering the decoder.
        text: (B, t, d) likewise, of the text tokens after the picture.
    """
    scores = inner_products(visual, text).softmax(-1).mean(1)
    raters = scores > scores.mean(-1, keepdim=True)
    return scores, raters | ~raters.any(-1, keepdim=True)


def text_relation(attention: Tensor, raters: Tensor) -> Tensor:
    """Mean attention of the raters (B, t) to each visual token, over heads: (B, h, t, n) -> (B, n)."""
    weight = raters.to(attention.dtype)[:, :, None]
    return (attention.mean(1) * weight).sum(1) / weight.sum(1)


def best_heads(attention: Tensor, raters: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The rows (B, h', t, n) of the heads whose raters look at the picture most, and their numbers (B, h')."""
    mass = (attention.sum(-1) * raters.to(attention.dtype)[:, None]).sum(-1)  # (B, h)
    best = highest(mass, min(heads, mass.shape[1]))
    return attention.gather(1, best[:, :, None, None].expand(-1, -1, *attention.shape[2:])), best


def pool_size(dropped: int) -> int:
    """How many of the dropped tokens are recycled."""
    return int(dropped * 0.3) + 1


def cluster_count(pool: int) -> int:
    """How many tokens are made of a pool."""
    return pool // 10 + 1


def recycling_pool(relation: Tensor, dropped: Tensor, size: int) -> Tensor:
    """Indices (B, size) of the ``dropped`` (B, n) tokens with the largest relation (B, n), in falling order."""
    return relation.masked_fill(~dropped, -torch.inf).argsort(dim=-1, descending=True, stable=True)[:, :size]


def recycle(features: Tensor, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means of density-peak clusters (Rodriguez and Laio, Science 2014, in the nearest-neighbour form of TCFormer).

    Args:
        features: (B, p, d) the pool in falling order of relation.
        clusters: C <= p.

    Returns:
        means (B, C, d) in the features' dtype, each token's cluster (B, p), and the centres' places (B, C).
    """
    points = features.to(working_dtype(features.dtype))
    batch, pool, width = points.shape
    # Differences, not products: equal tokens are at distance zero, and a batch gives what its members give.
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / width**0.5
    nearest = distance.topk(clusters, dim=-1, largest=False).values
    density = (-nearest.square().mean(-1)).exp()
    rank = stable_rank(density, descending=True)
    denser = rank[:, None, :] < rank[:, :, None]  # (B, i, j): j is denser than i, or as dense and before it
    farthest = distance.flatten(1).amax(-1)[:, None]
    delta = distance.masked_fill(~denser, torch.inf).amin(-1)
    delta = torch.where(rank == 0, farthest, delta)  # nothing is denser than the densest
    centres = (density * delta).argsort(dim=-1, descending=True, stable=True)[:, :clusters]
    to_centres = distance.gather(1, centres[:, :, None].expand(-1, -1, pool))  # (B, C, p)
    cluster = to_centres.argmin(1)
    cluster = cluster.scatter(1, centres, torch.arange(clusters, device=points.device).expand(batch, -1))
    member = torch.nn.functional.one_hot(cluster, clusters).to(points.dtype).mT  # (B, C, p)
    weight = member / (member.sum(-1, keepdim=True) + 1e-6)
    return (weight @ points).to(features.dtype), cluster, centres
