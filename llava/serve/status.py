"""What a session tells while it answers: the words as they come, how long each stage took, a line about the work."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import TextStreamer

from llava.model.encoded_images import EncodedImages
from llava.model.prompt_splicing import EmbeddedPrompts
from llava.pruning import Pruner
from llava.terminal import printable


class Stopped(Exception):
    """The listener wants no more of an answer."""


class Terminal:
    """Who listens to a session: here the terminal. A page has a listener of its own, with the same methods."""

    def stage(self, name: str) -> None:
        """Work of this name begins: "vision", "selection" or "answer". Raises `Stopped` if it need not."""

    def text(self, piece: str, end: bool) -> None:
        """The next piece of the answer; ``end`` with the last one. Raises `Stopped` if it is enough."""
        print(printable(piece), flush=True, end="\n" if end else "")

    def line(self, text: str) -> None:
        """A line about the work."""
        print(text)


def now(device: torch.device) -> float:
    """Seconds on a clock that only differences of mean anything; what a GPU was given before is done by then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class TimedStreamer(TextStreamer):
    """Hands the answer on as it comes, and notes when each token came.

    Attributes:
        times: when each token came.
        written: the answer so far.
        stopped: whether Ctrl-C or the listener ended it, see `stoppable`.
    """

    def __init__(self, tokenizer: Any, stop_string: str, listener: Terminal | None = None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop_string = stop_string
        self.listener = listener or Terminal()
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
        self.listener.text(text, stream_end)

    def stages(self, start: float, **before: float) -> dict[str, float]:
        """Seconds of each stage: those ``before``, from ``start`` to the first token, and of each token after it."""
        stages = dict(before)
        if self.times:
            stages["prefill"] = self.times[0] - start
        if len(self.times) > 1:
            stages["decode, per token"] = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
        return stages


@contextmanager
def stoppable(streamer: TimedStreamer) -> Iterator[None]:
    """A block that Ctrl-C or the listener leaves early; what is written so far is all. Sets ``streamer.stopped``."""
    try:
        yield
    except (KeyboardInterrupt, Stopped):
        streamer.stopped = True
        with suppress(Stopped):
            streamer.end()
        streamer.listener.line("[stopped]")


def status_line(
    prompt: EmbeddedPrompts,
    pictures: EncodedImages | None,
    pruner: Pruner | None,
    stages: Mapping[str, float],
) -> str:
    """One line after each answer: tokens kept of tokens there were, and where the time went.

    Args:
        stages: seconds, by `TimedStreamer.stages`; 0 for a vision side that did not run.
    """
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
        parts.append(f"vision {stages['vision'] * 1e3:.0f} ms" if stages["vision"] else "vision cached")
        if prompt.kept[0].selections:
            parts.append(f"selection {stages['selection'] * 1e3:.1f} ms")
            parts += graph_warning(prompt, pruner)
    if "prefill" in stages:
        parts.append(f"prefill {stages['prefill'] * 1e3:.0f} ms")
    if "decode, per token" in stages:
        parts.append(f"decode {stages['decode, per token'] * 1e3:.1f} ms/token")
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
