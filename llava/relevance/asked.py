"""What was asked about each picture, embedded where the method compares it with the tokens.

    question -> text tower -> text_embeds                            relevance=clip
    question -> words' input embeddings, first attention -> scores   relevance=language, qk, words, hawk
    question -> words' input embeddings                              relevance=projector

A host gives the spaces that it has; the fields of `PruningInputs` that speak of the question come from here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llava.pruning import Method
from llava.pruning.functional import without_autocast
from llava.pruning.question_reader import QuestionReader
from llava.relevance.first_attention import FirstAttention
from llava.relevance.heads import HeadWeights
from llava.relevance.language import (
    as_distribution,
    attention_mass,
    language_relevance,
    unit_products,
    word_distribution,
)


class JointSpace(Protocol):
    """A space of patches and texts: CLIP's or SigLIP's."""

    def text_embeds(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """T texts -> (T, M, e) and mask (T, M)."""


@dataclass(frozen=True)
class LanguageSpace:
    """The decoder's own reading of a question.

    Args:
        tokenize: a question as the host holds it -> token ids.
        lookup: token ids (...) int64 -> input embeddings (..., d), on whatever device they come.
        attention: its first softmax attention; ``None`` where it cannot be read.
        sum_over_ranks: adds up a tensor over the ranks that share the attention's heads.
        own_heads: which heads of the whole attention this rank computes.
    """

    tokenize: Callable[[Any], Sequence[int]]
    lookup: Callable[[Tensor], Tensor]
    attention: FirstAttention | None = None
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values
    own_heads: slice = field(default_factory=lambda: slice(None))

    def embed(self, questions: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """T questions -> input embeddings (T, l, d) and a mask (T, l). Raises ValueError for one without a token."""
        ids = [torch.tensor(list(self.tokenize(question)), dtype=torch.long) for question in questions]
        for question, row in zip(questions, ids, strict=True):
            if not len(row):
                raise ValueError(f"the question {question!r} has no token in the language model's vocabulary")
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        lengths = torch.tensor([len(row) for row in ids])
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        with torch.no_grad():
            embeds = self.lookup(padded)
        return embeds, mask.to(embeds.device, non_blocking=True)


class Asked:
    """The questions of a batch, embedded for the method that selects by them.

    Made before the pictures are encoded: on a GPU the text tower runs on a stream of its own, so that its many short
    kernels fill the gaps of the vision tower instead of standing behind it. A question asked about several pictures
    is embedded once.

    Args:
        method: with its source of relevance settled (policy.py).
        questions: one for each picture (or prompt row), in the form that the spaces take.
        joint_space: for relevance=clip.
        language: for all sources that read the language model.
        sign: of the joint space's cosine.
        device: of the text tower; on a GPU it gets a stream of its own.

    Raises:
        HeadFileError: the method's file of head weights cannot be read, or is that of another model.
    """

    def __init__(
        self,
        method: Method,
        questions: Sequence[Hashable],
        joint_space: JointSpace | None = None,
        language: LanguageSpace | None = None,
        sign: int = -1,
        device: torch.device | None = None,
    ) -> None:
        self.method = method
        self.sign = sign
        self._language = language
        self._stream: torch.cuda.Stream | None = None
        self._embedded: tuple[Tensor, ...] = ()
        self.source = method.relevance if isinstance(method, QuestionReader) else "none"
        if self.source == "none":
            return
        distinct = list(dict.fromkeys(questions))
        number = {question: row for row, question in enumerate(distinct)}
        self._row = torch.tensor([number[question] for question in questions])  # (pictures,)
        if device is not None and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream), without_autocast():
            if self.source == "clip":
                self._embedded = joint_space.text_embeds(distinct)
            else:
                self._embedded = language.embed([method.read(question) for question in distinct])
                if self.source in ("language", "qk", "hawk") and language.attention is not None:
                    self._embedded += (language.attention.queries(self._embedded[0]),)
        self._weights: Tensor | None = None
        if method.heads is not None:
            weights = HeadWeights.read(method.heads).for_attention(language.attention, method.heads)
            self._weights = weights[language.own_heads]

    def fields(
        self,
        pictures: Tensor,
        features: Tensor,
        valid: Tensor | None = None,
        image_embeds: Callable[[], Tensor] | None = None,
    ) -> dict[str, Any]:
        """The fields of `PruningInputs` that speak of the question.

        Args:
            pictures: (B,) int64 on the CPU, number of each view's picture among the questions.
            features: (B, n, d) the views' tokens as the language model would receive them.
            valid: (B, n) bool, False at tokens that must not be chosen.
            image_embeds: gives the views' patches (B, n, e) in the joint space; called for relevance=clip alone.
        """
        if self.source == "none":
            return {}
        device = features.device
        row = self._row[pictures]
        first, mask, *queries = (value.to(device)[row.to(device, non_blocking=True)] for value in self._waited())
        if self.source == "clip":
            return {
                "image_embeds": image_embeds().to(device),
                "text_embeds": first,
                "text_mask": mask,
                "relevance_sign": self.sign,
            }
        if self.source == "projector":
            return {"query_embeds": first, "query_mask": mask}
        with without_autocast():
            return {"relevance": self._language_relevance(first, mask, queries, features.to(first.dtype), valid)}

    def _language_relevance(
        self, embeds: Tensor, mask: Tensor, queries: Sequence[Tensor], features: Tensor, valid: Tensor | None
    ) -> Tensor:
        """(B, n) from the words (B, l, d), and from the queries of the first attention where there are any."""
        words = looked = None
        if self.source in ("language", "words"):
            words = word_distribution(embeds, features, mask, valid)
        if queries:
            attention = self._language.attention
            if self.source == "hawk":
                asked, keys = queries[0], attention.keys(features)
            else:
                asked, keys = attention.compared(queries[0], features)
            asked, real, shown = (None if value is None else value.to(keys.device) for value in (asked, mask, valid))
            if self.source == "hawk":
                score = unit_products(asked, keys, real, shown, self._weights)
                return self._language.sum_over_ranks(score).to(features.device)
            mass = attention_mass(asked, keys, attention.scaling, real, shown, self._weights)
            looked = as_distribution(self._language.sum_over_ranks(mass).to(features.device), valid)
        return language_relevance(words, looked, valid)

    def _waited(self) -> tuple[Tensor, ...]:
        """What was embedded, ready for the current stream."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for value in self._embedded:
                if value.device == self._stream.device:  # the language model may be on another GPU
                    value.record_stream(current)
        return self._embedded
