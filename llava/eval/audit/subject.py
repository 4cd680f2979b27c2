"""The model under audit: one interface over our own LLaVA and the Transformers library's classes.

What the language model is given is read by a hook on its decoder, so that every promise is checked where it counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from llava.eval.audit.pictures import Box, painted
from llava.layout.candidates import candidates_of
from llava.pruning import Method

COVERED = 0.5  # share of a token's area from which it shows a box


@dataclass(frozen=True)
class Trace:
    """One call of the model with pictures, as the language model saw it.

    Args:
        embeds: (L, d) what the decoder was given, without padding.
        positions: (L,) or (axes, L) of these.
        planes: deep features that later layers add at the visual tokens, each (v, d); none in most families.
        logits: (vocabulary,) after the prompt.
        cache: tokens that each layer holds after the prompt.
        kept: per picture (t,) bool, which of its tokens were kept as they are, in the subject's own order; separators
            left out.
        made: tokens that the method made itself.
        promised: how many tokens the method gives, kept and made, by its own word; ``None`` where only data tell.
        relevance: per picture (t,) what the method made of the question, scaled; ``None`` where it reads none.
        source: which source of relevance was taken, and why; ``None`` where none was.
    """

    embeds: Tensor
    positions: Tensor | None
    planes: tuple[Tensor, ...]
    logits: Tensor
    cache: tuple[int, ...]
    kept: tuple[Tensor, ...] = ()
    made: int = 0
    promised: tuple[int, int] | None = None
    relevance: tuple[Tensor | None, ...] = ()
    source: str | None = None


class Subject(ABC):
    """A loaded model that pictures are shown to."""

    model: nn.Module
    processor: Any = None
    forward_options: ClassVar[dict[str, Any]] = {}  # for batches, whose prompts are padded on the left

    @property
    @abstractmethod
    def decoder(self) -> nn.Module:
        """What is given ``inputs_embeds``."""

    @abstractmethod
    def inputs(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> dict[str, Any]:
        """Arguments of a call about one picture each, in a batch; ``pictures`` may be empty."""

    @abstractmethod
    def decoded(self, output: Tensor, inputs: dict[str, Any]) -> str:
        """The answer in what `generate` returned."""

    @abstractmethod
    def attached(self, method: Method) -> Any:
        """A context manager in which every call is pruned; gives the handle."""

    @abstractmethod
    def of_kept(self, kept: Any) -> tuple[Tensor, Tensor | None, int]:
        """(t,) kept, (t,) scaled relevance, and the number of made tokens, of one entry of ``handle.kept``."""

    @abstractmethod
    def choosable(self, kept: Any) -> list[Tensor]:
        """(n,) bool of each view, which of its tokens may be chosen, of one entry of ``handle.kept``."""

    @abstractmethod
    def coverage(self, image: Image.Image, canvas: Image.Image) -> Tensor:
        """(t,) share of each token's area that is white in ``canvas``, a painted picture of the image's size."""

    @abstractmethod
    def smaller(self, image: Image.Image, tokens: int) -> tuple[Image.Image | None, Method | None]:
        """How the model itself reads a picture with about ``tokens`` tokens: a smaller picture, or a method that
        shrinks it; both ``None`` where its resolution is fixed."""

    def shows(self, image: Image.Image, boxes: tuple[Box, ...]) -> Tensor:
        """(t,) bool, which tokens show the boxes; the one that shows most of them where none shows half."""
        share = self.coverage(image, painted(image, boxes))
        shown = share >= COVERED
        return shown if bool(shown.any()) else share == share.max()

    def eligible(self, image: Image.Image) -> Tensor:
        """(t,) bool, which tokens show the picture at all and not only padding."""
        return self.coverage(image, painted(image, ((0, 0, *image.size),))) > 0

    @contextmanager
    def _watching(self, seen: dict[str, Any]) -> Iterator[None]:
        def watch(module: nn.Module, positional: tuple, named: dict[str, Any]) -> None:
            seen.clear()  # the last call counts: a host may look at the whole prompt first
            seen.update(named)

        hook = self.decoder.register_forward_pre_hook(watch, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @torch.inference_mode()
    def traces(self, pictures: Sequence[Image.Image], questions: Sequence[str], method: Method | None) -> list[Trace]:
        """A `Trace` for each of a batch of pictures and questions."""
        inputs, seen = self.inputs(pictures, questions), {}
        with self.attached(method) if method is not None else nullcontext() as handle, self._watching(seen):
            output = self.model(**inputs, **self.forward_options, use_cache=True)
            kept = [] if handle is None else list(handle.kept)
        embeds = seen["inputs_embeds"]
        mask = seen.get("attention_mask")
        layers = tuple(layer.get_seq_length() for layer in output.past_key_values.layers)
        planes = tuple(seen.get("deepstack_visual_embeds") or ())
        found = []
        for row in range(len(questions)):
            real = torch.ones(embeds.shape[1], dtype=torch.bool, device=embeds.device)
            if isinstance(mask, Tensor) and mask.ndim == 2:
                real = mask[row].bool().to(embeds.device)
            parts = [self.of_kept(kept[row])] if kept else []
            promise = promised(method, self.choosable(kept[row])) if kept else None
            positions = seen.get("position_ids")
            if positions is not None:
                positions = positions[..., min(row, positions.shape[-2] - 1), :][..., real.to(positions.device)].cpu()
            last = int(real.nonzero().max()) - embeds.shape[1]
            found.append(
                Trace(
                    embeds[row, real].cpu(),
                    positions,
                    tuple(plane.cpu() for plane in planes) if len(questions) == 1 else (),
                    output.logits[row, last].float().cpu(),
                    layers,
                    tuple(part[0] for part in parts),
                    sum(part[2] for part in parts),
                    promise,
                    tuple(part[1] for part in parts),
                    None if handle is None or getattr(handle, "relevance", None) is None else str(handle.relevance),
                )
            )
        return found

    def trace(self, picture: Image.Image, question: str, method: Method | None) -> Trace:
        """The `Trace` of one picture and question."""
        return self.traces([picture], [question], method)[0]

    @torch.inference_mode()
    def answer(self, picture: Image.Image | None, question: str, method: Method | None) -> str:
        """The greedy answer of a few tokens."""
        inputs = self.inputs([] if picture is None else [picture], [question])
        with self.attached(method) if method is not None and picture is not None else nullcontext():
            output = self.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        return self.decoded(output[0], inputs)


def promised(method: Method, choosable: Sequence[Tensor]) -> tuple[int, int] | None:
    """How many tokens of a picture a method gives, kept and made, before it has seen anything but their number.

    Args:
        choosable: (n,) bool of each view.

    Returns:
        ``None`` for methods whose count depends on data, and for those that do not choose among the tokens of views.
    """
    if method.place in ("pixels", "decoder") or not method.count_is_exact:
        return None
    if not method.exclude_padding:
        choosable = [torch.ones_like(view) for view in choosable]
    found = candidates_of(method, [len(view) for view in choosable], None, [int(view.sum()) for view in choosable])
    if any(one.sequence for one in found):
        return None
    kept = made = 0
    for one in found:
        if one.is_whole:
            kept += one.tokens
            continue
        counts = method.kept_and_made(one.keep, torch.cat([choosable[view] for view in one.views])[None])
        kept, made = kept + int(counts[0]), made + int(counts[1])
    return kept, made


def pooled(planes: Tensor, tokens: int) -> Tensor:
    """Coverage of square views by pixel (V, s, s) -> by token (V, tokens), ``tokens`` a square number.

    Raises:
        ValueError: the tokens do not form a square.
    """
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"{tokens} tokens of a view form no square: boxes cannot be found among them")
    return nn.functional.adaptive_avg_pool2d(planes[:, None], side).flatten(1)
