"""RESTORE: what a method drops is merged into a few tokens, around any method."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from llava.pruning.base import (
    Pruner,
    TokenMaker,
    keep_none,
    list_pruners,
    parse_options,
    pruner_class,
    register,
)
from llava.pruning.functional import cosine_similarity, lowest_ranked, stable_rank, working_dtype
from llava.pruning.inputs import PruningInputs, Selection
from llava.pruning.options import Range, check_options
from llava.pruning.question_reader import QuestionReader, Source

NOT_INSIDE = frozenset(  # options that are those of the budget, and with them of the wrapper
    {"keep_tokens", "exclude_padding", "newlines", "scope", "per", "relevance", "relevance_sign", "heads"}
)


@register
@dataclass(frozen=True, kw_only=True)
class Restore(QuestionReader, TokenMaker):
    """Let another method choose a share of the budget, and merge all other tokens into the rest of it.

    Paper: "Improving Visual Token Reduction via Rectifying Distortions for Efficient Multimodal LLM Inference" (arXiv
    2606.01711), RESTORE. Inputs: features H (B, n, d), and what the other method needs. Output: indices (B, b) and
    merged tokens (B, m - b, d), b = ``gamma`` m rounded half up.

    1. The other method keeps b tokens. Steps 2 and 3 are among those that it drops.
    2. C_ij = cos(h_i, h_j); R_i = sum of C_ij over j. Of the tokens j with R_j > R_i the most similar to i has C_ij =
       red_i. The m - b tokens with the largest R_i (1 - red_i) are anchors; the one with the largest R always is.
    3. Every other token joins the anchor with the largest C. A merged token is the mean of an anchor's group.

    Args:
        method: name of a method that keeps tokens as they are and gives the same number in every view.
        options: its options, written as on the command line and divided by commas: "tau=0.3,gsp=false".
        gamma: share of the budget that it decides; 0 merges everything.
        relevance, relevance_sign, heads: those of the other method. ``None`` is its own default, and "none" if it
            reads no question.

    Merged tokens stand after the kept ones of their view. The sizes of their groups and their places are in the
    details, and `calibration_bias` is what the paper adds to the decoder's attention by them; no host adds it.

    Deviations from the paper: (1) merging alone: positions count on without gaps and attention is not calibrated,
    which is what the paper's ablation calls merging (93.5 of its 96.5, where the method alone has 92.2); (2) R is
    summed over the tokens that are dropped, on which the paper is silent; (3) padding takes no part unless
    ``exclude_padding=False``.

    Deviations from the released code: (1) not compared with it.
    """

    name: ClassVar[str] = "restore"
    makes_means: ClassVar[bool] = True

    method: str = "script"
    options: str = ""
    gamma: Annotated[float, Range(0, 1)] = 0.5
    relevance: Source | None = None

    def __post_init__(self):
        check_options(self)
        reads = isinstance(self.inner, QuestionReader)
        if not reads and self.relevance not in (None, "none"):
            raise ValueError(f"relevance={self.relevance} means nothing: {self.method} reads no question")
        object.__setattr__(self, "relevance", self.inner.relevance if reads else "none")
        super().__post_init__()

    @cached_property
    def inner(self) -> Pruner:
        """The other method.

        Raises:
            ValueError: it is unknown, or has no such options, or makes tokens or cuts in the decoder.
        """
        cls = pruner_class(self.method)
        if not issubclass(cls, Pruner) or not cls().count_is_exact:
            names = [name for name in list_pruners() if issubclass(pruner_class(name), Pruner)]
            raise ValueError(f"restore goes around a method that keeps tokens as they are: {', '.join(names)}")
        options = parse_options(self.method, self.options.split(",") if self.options else [])
        outer = [name for name in options if name in NOT_INSIDE]
        if outer:
            raise ValueError(f"{', '.join(outer)} cannot be among the options of the method inside restore")
        if issubclass(cls, QuestionReader):
            options |= {"relevance_sign": self.relevance_sign, "heads": self.heads}
            options |= {} if self.relevance is None else {"relevance": self.relevance}
        return cls(**options)

    @property
    def needs(self) -> frozenset[str]:
        return self.inner.needs

    @property
    def compares_views(self) -> bool:
        return self.inner.compares_views

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.inner.sources if isinstance(self.inner, QuestionReader) else ("none",)

    def read(self, question: Hashable) -> Hashable:
        return self.inner.read(question) if isinstance(self.inner, QuestionReader) else question

    def lacking(self, inputs: PruningInputs) -> list[str]:
        return self.inner.lacking(inputs)

    def count_made(self, keep: int) -> int:
        return keep - int(self.gamma * keep + 0.5)

    def choose(self, inputs: PruningInputs, keep: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        if keep == 0:
            return keep_none(inputs), {}
        selection = self.inner.select(inputs, keep)
        return selection.indices, selection.details

    def make(self, inputs: PruningInputs, kept: Selection, count: int) -> Selection:
        rest = ~kept.mask if inputs.valid is None else ~kept.mask & inputs.valid
        similarity = cosine_similarity(inputs.features)
        anchors, real = anchor_tokens(similarity, rest, count)
        joins = groups_of_anchors(similarity, rest, anchors, real)
        dtype = working_dtype(inputs.features.dtype)
        size = joins.sum(-1)  # (B, count)
        members = torch.where(rest[:, :, None], inputs.features.to(dtype), 0.0)
        merged = (joins.to(dtype) @ members) / size.clamp_min(1)[:, :, None]
        details = {"anchors": anchors, "sizes": size, "positions": median_index(joins)}
        weights = joins.to(dtype) / size.clamp_min(1)[:, :, None]
        return dataclasses.replace(
            kept, made=merged.to(inputs.features.dtype), details={**kept.details, **details}, weights=weights
        )


def anchor_tokens(similarity: Tensor, rest: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Step 2 of `Restore`: (B, count) int64 anchors, ascending, and (B, count) bool, which of them are real.

    Args:
        similarity: (B, n, n) cosines C.
        rest: (B, n) bool, the tokens that were dropped; where they are fewer than ``count``, the last anchors are not
            among them.
    """
    mass = (similarity * rest[:, None]).sum(-1)  # R
    superior = (mass[:, None] > mass[:, :, None]) & rest[:, None]  # (B, i, j)
    likeness = similarity.masked_fill(~superior, -torch.inf).amax(-1)
    score = torch.where(likeness > -torch.inf, mass * (1 - likeness), torch.inf)
    rank = stable_rank(score.masked_fill(~rest, -torch.inf), descending=True)
    anchors = lowest_ranked(rank, count, rest)
    real = rest.gather(1, anchors)
    order = (~real).int().argsort(dim=-1, stable=True)
    return anchors.gather(1, order), real.gather(1, order)


def groups_of_anchors(similarity: Tensor, rest: Tensor, anchors: Tensor, real: Tensor) -> Tensor:
    """Step 3 of `Restore`: (B, count, n) bool, which tokens of the ``rest`` (B, n) each anchor's group holds."""
    likeness = similarity.gather(1, anchors[:, :, None].expand(-1, -1, similarity.shape[-1]))  # (B, count, n)
    nearest = likeness.masked_fill(~real[:, :, None], -torch.inf).argmax(1)
    itself = torch.arange(anchors.shape[1], device=anchors.device).expand_as(anchors)
    nearest = nearest.scatter(1, torch.where(real, anchors, anchors[:, :1]), torch.where(real, itself, 0))
    numbers = torch.arange(anchors.shape[1], device=anchors.device)
    return (nearest[:, None] == numbers[:, None]) & rest[:, None] & real[:, :, None]


def median_index(members: Tensor) -> Tensor:
    """The lower median of the members' indices: (B, k, n) bool -> (B, k) int64; 0 for a group of none."""
    upto = members.cumsum(-1)
    return (upto >= (upto[..., -1:] + 1) // 2).int().argmax(-1) * (upto[..., -1] > 0)


def rotary_decay(distance: Tensor, head_dim: int, base: float = 10000.0) -> Tensor:
    """D(x) = mean over frequencies j of cos(x base^(-2j / head_dim)), of distances of any shape; 1 at 0."""
    distance = distance.to(torch.promote_types(distance.dtype, torch.float32))
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=distance.device, dtype=distance.dtype) / head_dim)
    return (distance[..., None] * frequencies).cos().mean(-1)


def calibration_bias(positions: Tensor, sizes: Tensor, head_dim: int, base: float = 10000.0, c: float = 2.0) -> Tensor:
    """What the paper adds to the logits of every decoder layer: log(s_n (c - D(|p_m - p_n|))).

    Args:
        positions: (..., N) of a prompt's tokens where nothing is pruned; a merged token has its group's median.
        sizes: (..., N) s, tokens that each of them stands for; 1 but for merged ones.
        head_dim, base: of the decoder's rotary embedding.
        c: more than 1; the bias between a token and itself is log(s (c - 1)).

    Returns:
        (..., N, N), queries in rows and keys in columns, float32 (float64 for float64 sizes).
    """
    sizes = sizes.to(torch.promote_types(sizes.dtype, torch.float32))
    distance = (positions[..., :, None] - positions[..., None, :]).abs().to(sizes.dtype)
    return (sizes[..., None, :] * (c - rotary_decay(distance, head_dim, base))).log()
