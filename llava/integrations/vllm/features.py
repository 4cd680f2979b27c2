"""Unpruned features of pictures: run through the tower a few views at a time, and kept for the next question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.integrations.vllm.bounded import BoundedCache
from llava.integrations.vllm.plan import PictureShape


@dataclass(frozen=True)
class PictureFeatures:
    """What tower and projector make of one picture, before anything is pruned.

    Args:
        features: (V, n, d) after the projector.
        encoder_features: (V, n, c) before it; ``None`` where no method needs them.
        valid: (V, n) bool on the CPU, False at padding; ``None`` means none.
        beside: (V, n, e) that goes on with the kept tokens and that no method sees (DeepStack's planes).
    """

    features: Tensor
    encoder_features: Tensor | None = None
    valid: Tensor | None = None
    beside: Tensor | None = None

    @property
    def shape(self) -> PictureShape:
        eligible = None if self.valid is None else tuple(self.valid.sum(-1).tolist())
        return PictureShape(*self.features.shape[:2], eligible=eligible)

    def to(self, device: torch.device | str) -> PictureFeatures:
        encoder = None if self.encoder_features is None else self.encoder_features.to(device)
        beside = None if self.beside is None else self.beside.to(device)
        return PictureFeatures(self.features.to(device), encoder, self.valid, beside)

    @property
    def nbytes(self) -> int:
        held = (self.features, self.encoder_features, self.beside)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


class FeatureCache(BoundedCache[PictureFeatures]):
    """The most recently used pictures, in host memory: an accelerator's memory is vLLM's to plan."""

    def find(self, picture: str, device: torch.device | str, views: int, tokens: int) -> PictureFeatures | None:
        """The features of a picture, unless they are not (``views``, ``tokens``, d): then they are another's."""
        found = self.get(picture)
        if found is None:
            return None
        if tuple(found.features.shape[:2]) != (views, tokens):
            self.drop(picture)
            return None
        return found.to(device)

    def keep(self, picture: str, features: PictureFeatures) -> None:
        self.put(picture, features.to("cpu"), features.nbytes)


def in_small_batches(run: Callable[[Tensor], Tensor], pixels: Tensor, views_at_once: int) -> Tensor:
    """``run`` on views (V, ...), at most ``views_at_once`` together."""
    parts = [run(part) for part in pixels.split(views_at_once)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
