"""Unpruned features of pictures: run through the tower a few views at a time, and kept for the next question."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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


class FeatureCache:
    """The most recently used pictures, in host memory: an accelerator's memory is vLLM's to plan.

    Args:
        limit: bytes that it may hold; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.clear()

    def clear(self) -> None:
        """Forget all pictures: other weights make other features."""
        self.size = 0
        self._pictures: OrderedDict[str, PictureFeatures] = OrderedDict()

    def get(self, picture: str, device: torch.device | str, views: int, tokens: int) -> PictureFeatures | None:
        """The features of a picture, unless they are not (``views``, ``tokens``, d): then they are another's."""
        found = self._pictures.get(picture)
        if found is None:
            return None
        if tuple(found.features.shape[:2]) != (views, tokens):
            self.size -= self._pictures.pop(picture).nbytes
            return None
        self._pictures.move_to_end(picture)
        return found.to(device)

    def put(self, picture: str, features: PictureFeatures) -> None:
        if features.nbytes > self.limit or picture in self._pictures:
            return
        self._pictures[picture] = features.to("cpu")
        self.size += features.nbytes
        while self.size > self.limit:
            self.size -= self._pictures.popitem(last=False)[1].nbytes


def in_small_batches(run: Callable[[Tensor], Tensor], pixels: Tensor, views_at_once: int) -> Tensor:
    """``run`` on views (V, ...), at most ``views_at_once`` together."""
    parts = [run(part) for part in pixels.split(views_at_once)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
