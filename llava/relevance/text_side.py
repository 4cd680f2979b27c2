"""The text side of a joint space: texts cut into what a text tower can read, embedded, and remembered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llava.relevance.remembered import RememberedTexts


class TextSide(ABC):
    """What CLIP's and SigLIP's spaces do alike with texts; how a text is cut and embedded is their own."""

    text_model: nn.Module  # the text tower, with ``device`` and ``dtype``

    def __init__(self) -> None:
        self.remembered = RememberedTexts()

    @abstractmethod
    def segments(self, text: str) -> list[list[int]]:
        """Token ids of a text, cut into pieces that fit the text tower: at least one."""

    @abstractmethod
    def embed_segments(self, segments: list[list[int]]) -> Tensor:
        """M pieces, as `segments` cuts them, of one text or several -> (M, e), in the tower's dtype."""

    @torch.inference_mode()
    def text_embeds(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """T texts -> embeddings (T, M, e) float32 of their segments and mask (T, M), False where a text has fewer."""
        tower = self.text_model
        rows = self.remembered.embeds(texts, self._embed, by=(tower.device, tower.dtype))
        embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(embeds.shape[1]) < torch.tensor([len(segments) for segments in rows])[:, None]
        return embeds, mask.to(embeds.device, non_blocking=True)

    def _embed(self, texts: Sequence[str]) -> Sequence[Tensor]:
        """Texts, together -> the embeddings (M_t, e) float32 of each one's segments."""
        segments = [self.segments(text) for text in texts]
        embeds = self.embed_segments([piece for pieces in segments for piece in pieces])
        return embeds.float().split([len(pieces) for pieces in segments])
