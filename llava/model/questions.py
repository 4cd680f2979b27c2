"""The questions of a batch, embedded for the methods that select by them: on a GPU beside the vision tower."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llava.mm_utils import encode_text
from llava.pruning import Pruner

if TYPE_CHECKING:
    from llava.model.llava_arch import LlavaMetaForCausalLM

logger = logging.getLogger(__name__)


class Questions:
    """What a pruner asks to know of the question that goes with each picture.

    Made before the pictures are encoded: on a GPU the text tower runs on a stream of its own, so that its many short
    kernels fill the gaps of the vision tower instead of standing behind it. A question asked about several pictures
    is embedded once.

    Args:
        pruner: says which embeddings are needed; ``None``, or one that keeps all of a view's ``tokens``, needs none.
        queries: one per picture; ``None`` where the prompt could not be read.

    Attributes:
        pruner: the one that will select, in the form that `suited` gives it; ``None`` if none will.

    Raises:
        ValueError: the pruner selects by the question and there is none.
    """

    def __init__(
        self, model: LlavaMetaForCausalLM, pruner: Pruner | None, tokens: int, queries: Sequence[str | None]
    ) -> None:
        selects = pruner is not None and pruner.count(tokens) < tokens
        self.pruner = suited(model, pruner) if selects else None
        needs = self.pruner.needs & {"text_embeds", "query_embeds"} if selects else frozenset()
        self._embedded: dict[str, Tensor] = {}  # rows: distinct questions
        self._stream: torch.cuda.Stream | None = None
        if not needs:
            return
        distinct = list(dict.fromkeys(queries))
        if None in distinct:
            raise ValueError(f"pruner '{pruner.name}' selects by the question: pass query=, or load a tokenizer")
        self._row = torch.tensor([distinct.index(query) for query in queries])  # (pictures,)
        tower = model.get_vision_tower()
        if tower.device.type == "cuda":
            self._stream = torch.cuda.Stream(tower.device)
            self._stream.wait_stream(torch.cuda.current_stream(tower.device))
        with torch.cuda.stream(self._stream):
            if "text_embeds" in needs:
                self._embedded["text_embeds"], self._embedded["text_mask"] = tower.text_embeds(distinct)
            if "query_embeds" in needs:
                self._embedded["query_embeds"], self._embedded["query_mask"] = embed_queries(model, distinct)

    def of_views(self, picture_of_view: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The `PruningInputs` fields of the views that show the pictures ``picture_of_view`` (V,), on the CPU."""
        if not self._embedded:
            return {}
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for value in self._embedded.values():
                if value.device == self._stream.device:  # the language model may be on another GPU
                    value.record_stream(current)
        row = self._row[picture_of_view].to(device, non_blocking=True)
        return {name: value.to(device)[row] for name, value in self._embedded.items()}


def embed_queries(model: LlavaMetaForCausalLM, queries: Sequence[str]) -> tuple[Tensor, Tensor]:
    """T questions -> input embeddings of the language model (T, l, d), and a mask (T, l)."""
    if model.tokenizer is None:
        raise ValueError("relevance=projector needs the model's tokenizer: load it with load_pretrained_model")
    embed = model.get_input_embeddings()
    device = embed.weight.device
    ids = [torch.tensor(encode_text(query, model.tokenizer), dtype=torch.long) for query in queries]
    lengths = torch.tensor([len(row) for row in ids])
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return embed(padded.to(device, non_blocking=True)), mask.to(device, non_blocking=True)


def suited(model: LlavaMetaForCausalLM, pruner: Pruner) -> Pruner:
    """The pruner itself, or its form for a model whose joint space is not at hand.

    Raises:
        ValueError: it has none.
    """
    if "text_embeds" not in pruner.needs or model.get_vision_tower().has_joint_space:
        return pruner
    logger.warning(
        "the full %s is not at hand: relevance comes from the projector's space, a weak signal; joint_space_path "
        "(--siglip-path) says where it is",
        model.get_vision_tower().name,
    )
    return pruner.without_joint_space()
