"""Which scores a method computes of every token, found by asking it about random ones: before any model is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from llava.pruning import Method, PruningInputs, Selection

SIDE, HEADS, WIDTH = 12, 2, 16  # of the view that a method is asked about


def token_scores(selection: Selection) -> dict[str, torch.Tensor]:
    """What a method told of every token (B, n), by name."""
    return {name: value for name, value in selection.details.items() if value.shape[1:] == (selection.tokens,)}


def names_of(method: Method) -> tuple[str, ...]:
    """Names of a method's scores; none for one inside the decoder, or one that shrinks the picture."""
    if method.place in ("decoder", "pixels"):
        return ()
    n = SIDE * SIDE
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    inputs = PruningInputs(
        drawn(1, n, WIDTH),
        encoder_features=drawn(1, n, WIDTH),
        image_embeds=drawn(1, n, WIDTH),
        text_embeds=drawn(1, 1, WIDTH),
        query_embeds=drawn(1, 4, WIDTH),
        relevance=drawn(1, n),
        class_attention=drawn(1, HEADS, n),
        mean_attention=drawn(1, HEADS, n),
        key_metric=drawn(1, n, WIDTH),
        class_features=drawn(1, WIDTH),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuple(token_scores(method.select(inputs, keep=n // 4)))


def check_scores(methods: Sequence[tuple[str, Method]], wanted: str | None) -> None:
    """Raise ValueError if a method has no score, or not the one of this name."""
    for label, method in methods:
        names = names_of(method)
        if not names:
            raise ValueError(f"{label} tells no score of every token, so there is no map of it")
        if wanted is not None and wanted not in names:
            raise ValueError(f"{label} has no score called {wanted!r}; it has {', '.join(names)}")
