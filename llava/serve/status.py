"""What the command line tells while it answers: the words as they come, and a line about the work done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TextStreamer

from llava.model.encoded_images import EncodedImages
from llava.model.prompt_splicing import EmbeddedPrompts
from llava.pruning import Pruner
from llava.terminal import printable


class TimedStreamer(TextStreamer):
    """Prints the answer as it comes, and notes when each token came.

    Attributes:
        times: when each token came.
        written: the answer so far.
        stopped: whether Ctrl-C ended it, see `stoppable`.
    """

    def __init__(self, tokenizer: Any, stop_string: str) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop_string = stop_string
        self.times: list[float] = []
        self.written = ""
        self.stopped = False

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text.split(self.stop_string)[0]
        self.written += text
        print(printable(text), flush=True, end="\n" if stream_end else "")


@contextmanager
def stoppable(streamer: TimedStreamer) -> Iterator[None]:
    """A block that Ctrl-C leaves early, with what is written so far said to be all; sets ``streamer.stopped``."""
    try:
        yield
    except KeyboardInterrupt:
        streamer.end()
        streamer.stopped = True
        print("[stopped]")


def status_line(
    prompt: EmbeddedPrompts,
    pictures: EncodedImages | None,
    pruner: Pruner | None,
    vision: float,
    start: float,
    selected: float,
    token_times: list[float],
) -> str:
    """One line after each answer: tokens kept of tokens there were, and where the time went."""
    parts = []
    if pictures is not None:
        total = sum(layout.eligible.numel() for layout in pictures.layouts)
        kept = sum(tokens.patches for tokens in prompt.kept)
        newlines = sum(tokens.newlines for tokens in prompt.kept)
        per_view = [count for tokens in prompt.kept for count in tokens.per_view()]
        counts = f"{per_view[0]} x {len(per_view)}" if len(set(per_view)) == 1 else " + ".join(map(str, per_view))
        detail = f"{counts} per view"
        if sum(per_view) != kept:  # tokens that the model computes of several patches belong to no view
            detail = "resized by the model itself"
        parts.append(
            f"{kept} of {total} visual tokens ({detail}{f', and {newlines} newlines' if newlines else ''})"
            + decoder_counts(prompt)
        )
        parts.append(f"vision {vision * 1e3:.0f} ms" if vision else "vision cached")
        if prompt.kept[0].selections:
            parts.append(f"selection {(selected - start) * 1e3:.1f} ms")
            parts += graph_warning(prompt, pruner)
    if token_times:
        parts.append(f"prefill {(token_times[0] - selected) * 1e3:.0f} ms")
    if len(token_times) > 1:
        per_token = (token_times[-1] - token_times[0]) / (len(token_times) - 1)
        parts.append(f"decode {per_token * 1e3:.1f} ms/token")
    return f"[{' | '.join(parts)}]"


def decoder_counts(prompt: EmbeddedPrompts) -> str:
    """What the decoder's layers see, if a method inside it drops some; a word if nothing was pruned."""
    counts = [tokens.per_layer or (len(tokens.sequence),) for tokens in prompt.kept]
    if any(tokens.per_layer for tokens in prompt.kept):
        average = sum(sum(layers) / len(layers) for layers in counts)
        recycled = sum(tokens.recycled for tokens in prompt.kept)
        made = f" and {recycled} made of the others" if recycled else ""
        return f"{made} left after the last cut in the decoder, {average:.1f} averaged over its layers"
    return "" if prompt.kept[0].is_pruned else ", nothing pruned"


def graph_warning(prompt: EmbeddedPrompts, pruner: Pruner | None) -> list[str]:
    """A word where nearly all or nearly no pairs of tokens are joined: then the graph filter tells little."""
    densities = [tokens.details.get("edge_density") for tokens in prompt.kept]
    if any(density is None for density in densities):
        return []
    density = torch.cat(densities).mean().item()
    if 0.01 <= density <= 0.95:
        return []
    return [f"{density:.0%} of the graph's pairs are joined at tau={pruner.tau:g}: move tau"]
