"""What a host tells a method about the views to prune, and the method's answer.

Every field of `PruningInputs` states its axes once, where it is declared; checking, picking, joining and concatenating
views follow from that.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

VIEW, TOKEN, QUESTION = "view", "token", "question"  # sizes B, n, and B or 1


class Axes(tuple[str, ...]):
    """Names of a tensor field's axes; others than view, token and question have any size."""

    def __new__(cls, *names: str) -> Axes:
        return super().__new__(cls, names)


@dataclass(frozen=True)
class PruningInputs:
    """What a host can tell a method about ``B`` views (images, tiles or frames) of ``n`` visual tokens each.

    Args:
        features: (B, n, d) visual tokens after the projector, in the language model's space.
        encoder_features: (B, n, c) the same patches before the projector.
        image_embeds: (B, n, e) patches in the joint image-text space.
        text_embeds: (B or 1, M, e) the question's segments in the joint space.
        text_mask: (B or 1, M) bool, False at padding segments; ``None`` means that all M are real.
        query_embeds: (B or 1, l, d) the question in the language model's input space.
        query_mask: (B or 1, l) bool, like ``text_mask``.
        relevance: (B, n) scores the caller already has; larger is more relevant, no sign is applied to them.
        valid: (B, n) bool, False where a token must not be chosen (padding).
        class_attention: (B, heads, n) attention of the encoder's class token to the patches, in the last layer read.
        mean_attention: (B, heads, n) attention that a patch receives there, the mean over all queries.
        key_metric: (B, n, w) keys of the patches there, the mean over heads.
        class_features: (B, c) class token beside ``encoder_features``.
        pixels: (B, 3, s, s) the views as the encoder got them.
        encode: turns pixels (B', 3, h, w) of any size into projected features (B', tokens, d).
        pictures: (B,) int64, which views show the same picture; ``None`` means that every view is a picture.
        relevance_sign: the sign under which cos(image_embeds, text_embeds) grows with relevance: -1 for CLIP towers.
        view_ids: (B,) int64, a number per view that does not depend on the batch it comes in; seeds `random`.

    Raises:
        ValueError: a field has other axes than declared, or their sizes do not fit ``features``; names the field.
    """

    features: Annotated[Tensor, Axes(VIEW, TOKEN, "width")]
    encoder_features: Annotated[Tensor | None, Axes(VIEW, TOKEN, "encoder width")] = None
    image_embeds: Annotated[Tensor | None, Axes(VIEW, TOKEN, "joint width")] = None
    text_embeds: Annotated[Tensor | None, Axes(QUESTION, "segment", "joint width")] = None
    text_mask: Annotated[Tensor | None, Axes(QUESTION, "segment")] = None
    query_embeds: Annotated[Tensor | None, Axes(QUESTION, "word", "width")] = None
    query_mask: Annotated[Tensor | None, Axes(QUESTION, "word")] = None
    relevance: Annotated[Tensor | None, Axes(VIEW, TOKEN)] = None
    valid: Annotated[Tensor | None, Axes(VIEW, TOKEN)] = None
    class_attention: Annotated[Tensor | None, Axes(VIEW, "head", TOKEN)] = None
    mean_attention: Annotated[Tensor | None, Axes(VIEW, "head", TOKEN)] = None
    key_metric: Annotated[Tensor | None, Axes(VIEW, TOKEN, "key width")] = None
    class_features: Annotated[Tensor | None, Axes(VIEW, "encoder width")] = None
    pixels: Annotated[Tensor | None, Axes(VIEW, "channel", "height", "width in pixels")] = None
    encode: Callable[[Tensor], Tensor] | None = None
    pictures: Annotated[Tensor | None, Axes(VIEW)] = None
    relevance_sign: int = -1
    view_ids: Annotated[Tensor | None, Axes(VIEW)] = None

    def __post_init__(self):
        if self.features.ndim != 3:
            raise ValueError(f"features must be (views, tokens, width), got shape {tuple(self.features.shape)}")
        allowed = {VIEW: (self.views,), TOKEN: (self.tokens,), QUESTION: (1, self.views)}
        for name, names in AXES.items():
            value = getattr(self, name)
            if value is None:
                continue
            shape = tuple(value.shape)
            fits = len(shape) == len(names) and all(
                size in allowed.get(axis, (size,)) for size, axis in zip(shape, names, strict=True)
            )
            if not fits:
                sizes = [" or ".join(map(str, allowed[axis])) if axis in allowed else axis for axis in names]
                raise ValueError(f"{name} must be ({', '.join(names)}) = ({', '.join(sizes)}), got shape {shape}")

    @property
    def views(self) -> int:
        return self.features.shape[0]

    @property
    def tokens(self) -> int:
        return self.features.shape[1]

    def of_views(self, views: slice | Tensor) -> PruningInputs:
        """Some of the views: a slice, or numbers (B',) int64."""

        def pick(value: Tensor, names: Axes) -> Tensor:
            if names[0] == QUESTION and len(value) == 1:
                return value
            return value[views]

        return self._changed(pick)

    def joined(self) -> PruningInputs:
        """All views as a single one of B n tokens, about which one question is asked, that of the first view.

        What is one per view and not per token (class token, pixels) has no place in it and is left out.
        """

        def join(value: Tensor, names: Axes) -> Tensor | None:
            if TOKEN in names:
                token = names.index(TOKEN)
                return value.movedim(token, 1).flatten(0, 1).movedim(0, token - 1)[None]
            return value[:1] if names[0] == QUESTION or len(names) == 1 else None

        return self._changed(join)

    def _changed(self, change: Callable[[Tensor, Axes], Tensor | None]) -> PruningInputs:
        given = {name: names for name, names in AXES.items() if getattr(self, name) is not None}
        return dataclasses.replace(self, **{name: change(getattr(self, name), names) for name, names in given.items()})


AXES: dict[str, Axes] = {
    name: hint.__metadata__[0]
    for name, hint in typing.get_type_hints(PruningInputs, include_extras=True).items()
    if typing.get_origin(hint) is Annotated
}


@dataclass(frozen=True)
class Selection:
    """The m tokens that a method keeps in each of B views, and the k that it makes itself.

    Args:
        indices: (B, m) int64, distinct and ascending within a view.
        tokens: n, how many there were.
        eligible: (B, m) bool, False where a view had fewer than m valid tokens and an invalid one fills the place;
            ``None`` means that all are eligible.
        details: what the method computed on the way, tensors (B, ...) by name, for viewers and reports.
        made: (B, k, c) tokens that stand after the kept ones of their view, in the space that the method acts on:
            encoder features for a method whose place is "encoder", projected ones otherwise. `Pruner.kept_and_made`
            says how many of them, from the first, a view with padding has. The budget counts m + k. ``None``: none.
        weights: (B, k, n) of the view's tokens in each made one, for a method that ``makes_means``: a host whose
            decoder reads features in deeper layers, too, mixes these by the same weights. ``None`` for all others.
        leading: so many of ``made`` stand before the kept tokens of a view that is read on its own, and before all
            other made tokens of views that are read as one grid.
    """

    indices: Tensor
    tokens: int
    eligible: Tensor | None = None
    details: Mapping[str, Tensor] = field(default_factory=dict)
    made: Tensor | None = None
    leading: int = 0
    weights: Tensor | None = None

    @property
    def is_identity(self) -> bool:
        return self.indices.shape[1] == self.tokens

    @property
    def mask(self) -> Tensor:
        """(B, n) bool, True at the kept tokens."""
        mask = self.indices.new_zeros(self.indices.shape[0], self.tokens, dtype=torch.bool)
        return mask.scatter_(1, self.indices, True if self.eligible is None else self.eligible)

    def gather(self, features: Tensor) -> Tensor:
        """The kept rows of ``features`` (B, n, d) -> (B, m, d), in the features' own dtype, without ``made`` ones."""
        if self.is_identity:
            return features
        return features.gather(1, self.indices[:, :, None].expand(-1, -1, features.shape[-1]))

    def of_views(self, views: slice | Sequence[int]) -> Selection:
        """Some of the views."""

        def pick(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[views]

        return dataclasses.replace(
            self,
            indices=self.indices[views],
            eligible=pick(self.eligible),
            details={name: value[views] for name, value in self.details.items()},
            made=pick(self.made),
            weights=pick(self.weights),
        )
