"""Embeddings of the questions asked last: one that is asked again does not go through the text tower again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock

import torch
from torch import Tensor

LIMIT = 256  # texts; of CLIP's 768 numbers each, 0.8 MB


class RememberedTexts:
    """What a text tower made of texts, for the ``limit`` that were asked for last.

    Texts that are new are embedded together. A text keeps the numbers that it came out with at first, whatever it is
    asked beside later. On a GPU an embedding may be read on another stream than the one that made it.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._known: OrderedDict[tuple[Hashable, str], tuple[Tensor, torch.cuda.Event | None]] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[RememberedTexts], tuple[int]]:
        """A copy remembers nothing: it may go to another device or process."""
        return RememberedTexts, (self.limit,)

    def embeds(
        self, texts: Sequence[str], embed: Callable[[list[str]], Sequence[Tensor]], by: Hashable
    ) -> list[Tensor]:
        """The embeddings of texts, each (M_t, e), which nobody may write into.

        Args:
            embed: new texts -> the embedding of each.
            by: what beside the text decides an embedding, as the device and the dtype of the tower.
        """
        with self._lock:
            found = {text: self._known[by, text] for text in texts if (by, text) in self._known}
        new = [text for text in dict.fromkeys(texts) if text not in found]
        ready = {text: _awaited(*entry) for text, entry in found.items()}
        if new:
            made = [rows.clone() for rows in embed(new)]  # a view would hold the whole batch
            ready |= zip(new, made, strict=True)
            found |= {text: (rows, _event(rows)) for text, rows in zip(new, made, strict=True)}
        with self._lock:
            for text in dict.fromkeys(texts):
                self._known[by, text] = found[text]
                self._known.move_to_end((by, text))
            while len(self._known) > self.limit:
                self._known.popitem(last=False)
        return [ready[text] for text in texts]

    def forget(self) -> None:
        """Every text is new again, as measurements of the text tower need it."""
        with self._lock:
            self._known.clear()


def _event(rows: Tensor) -> torch.cuda.Event | None:
    """The moment from which rows can be read; ``None`` where nothing runs behind Python's back."""
    return torch.cuda.current_stream(rows.device).record_event() if rows.is_cuda else None


def _awaited(rows: Tensor, made: torch.cuda.Event | None) -> Tensor:
    """Rows that the current stream can read, and whose memory stays until it has."""
    if made is not None:
        current = torch.cuda.current_stream(rows.device)
        current.wait_event(made)
        rows.record_stream(current)
    return rows
