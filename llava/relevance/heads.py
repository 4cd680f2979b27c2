"""Weights of the first attention's heads, for one checkpoint: a JSON file, and the rule that makes one without labels.

A head is worth listening to if it looks elsewhere when another question is asked about the same picture, and if it
looks somewhere::

    m_h, m'_h  where head h looks for two questions about one picture, each a distribution over its n tokens
    w_h        = (1 - correlation(m_h, m'_h)) * (1 - (entropy(m_h) + entropy(m'_h)) / (2 log n)), mean over pictures

The file names the sizes of the model that it was made on; a model of other sizes refuses it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from llava.relevance.first_attention import FirstAttention

SIZES = ("layers", "layer", "heads", "head_dim")


class HeadFileError(ValueError):
    """A file of head weights that cannot be used; the message names the file and what is wrong."""


@dataclass(frozen=True)
class HeadWeights:
    """Weights of the heads of a checkpoint's first softmax attention.

    Args:
        model_type: of the decoder's configuration. Told, not compared: hosts name one checkpoint differently.
        layers, layer: how many layers the decoder has, and which of them the attention is in.
        heads, head_dim: its query heads and their width.
        weights: one a head, finite, at least 0, not all 0.
        made: how, in a sentence.
    """

    model_type: str
    layers: int
    layer: int
    heads: int
    head_dim: int
    weights: tuple[float, ...]
    made: str

    def __post_init__(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise HeadFileError(f"{name} is {value!r}, not a whole number")
        if not isinstance(self.weights, tuple) or len(self.weights) != self.heads:
            given = len(self.weights) if isinstance(self.weights, tuple) else repr(self.weights)
            raise HeadFileError(f"weights is {given}, not a list of one number for each of {self.heads} heads")
        for head, weight in enumerate(self.weights):
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight < 0:
                raise HeadFileError(f"the weight of head {head} is {weight!r}, not a finite number of at least 0")
        if not any(self.weights):
            raise HeadFileError("all weights are 0")

    @classmethod
    def read(cls, path: str | Path) -> HeadWeights:
        """From a file. Raises HeadFileError: it is missing, no JSON, lacks a field, or its weights are no weights."""
        try:
            data = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise HeadFileError(f"heads={path} cannot be read: {error}; {HOW_TO_MAKE}") from error
        fields = cls.__dataclass_fields__
        if not isinstance(data, dict) or set(data) != set(fields):
            given = ", ".join(data) if isinstance(data, dict) else type(data).__name__
            raise HeadFileError(f"heads={path} holds {given}, not {', '.join(fields)}; {HOW_TO_MAKE}")
        weights = data["weights"]
        try:
            return cls(**{**data, "weights": tuple(weights) if isinstance(weights, list) else weights})
        except HeadFileError as error:
            raise HeadFileError(f"heads={path}: {error}; {HOW_TO_MAKE}") from None

    def text(self) -> str:
        """What stands in a file."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def for_attention(self, attention: FirstAttention, path: str | Path = "FILE") -> Tensor:
        """(heads,) float32 for an attention. Raises HeadFileError where layers or heads are another model's.

        Args:
            path: what the file is called in the message.
        """
        sizes, theirs = ([getattr(holder, name) for name in SIZES] for holder in (self, attention))
        if sizes != theirs:
            raise HeadFileError(
                f"heads={path} was made for {self.model_type}: {_told(self)}; here it is {_told(attention)}. "
                f"{HOW_TO_MAKE}"
            )
        return torch.tensor(self.weights)


HOW_TO_MAKE = "python -m llava.eval.calibrate_heads makes one for a checkpoint"


def _told(holder: HeadWeights | FirstAttention) -> str:
    layer, layers, heads, width = holder.layer, holder.layers, holder.heads, holder.head_dim
    return f"layer {layer} of {layers}, {heads} heads of width {width}"


def head_worth(one: Tensor, other: Tensor) -> Tensor:
    """What each head is worth by two questions' maps (..., h, n) of one picture; (..., h), at least 0.

    A map without mass, or the same everywhere, is worth 0. With one token there is nowhere to look: all are 0.
    """
    maps = torch.stack([one, other]).double()
    maps = maps / maps.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    centred = maps - maps.mean(-1, keepdim=True)
    norms = centred.square().sum(-1).sqrt()
    flat = (norms < 1e-12).any(0)
    correlation = (centred[0] * centred[1]).sum(-1) / norms.prod(0).masked_fill(flat, 1.0)
    evenness = torch.special.entr(maps).sum(-1).mean(0) / max(math.log(maps.shape[-1]), 1e-12)
    worth = (1 - correlation).clamp(min=0.0) * (1 - evenness).clamp(min=0.0)
    return worth.masked_fill(flat, 0.0).to(one.dtype)
