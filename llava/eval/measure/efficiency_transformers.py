"""The efficiency of pruners on the Transformers library's own classes: models of known sizes with random weights."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from llava.eval.measure.cost import count_macs
from llava.eval.measure.decoder_layers import language_figures
from llava.eval.measure.efficiency_subject import QUESTION, TEXT_AFTER, TEXT_BEFORE, Clock, Row, cache_bytes
from llava.eval.measure.geometry import randomise
from llava.eval.measure.selection_speed import extra_memory, synchronise
from llava.eval.measure.transformers_presets import PLACEHOLDER, Preset
from llava.model.builder import DEFAULT_CHECKPOINT, read_config
from llava.pruning import DecoderPruner, Pruner


@dataclass(frozen=True)
class VisionLanguageModel:
    """A model, and the preset that it was built from."""

    model: torch.nn.Module
    preset: Preset


def build_random_transformers(
    make: Callable[[], Preset],
    dtype: torch.dtype,
    device: torch.device | str,
    attn_implementation: str | None = None,
) -> VisionLanguageModel:
    """A model of a preset's size with random weights, on ``device``; on "meta" without storage."""
    preset = make()
    with torch.device(device):
        model = preset.make(dtype=dtype, attn_implementation=attn_implementation)
    if str(device) != "meta":
        randomise(model, torch.Generator(device).manual_seed(0))
    return VisionLanguageModel(model.eval().requires_grad_(False), preset)


def tokenizer_of_the_question() -> Any:
    """It reads the question for any vocabulary."""
    return AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT, config=read_config(Path(DEFAULT_CHECKPOINT)))


class TransformersSubject:
    """Such a model under measurement, with a picture and a prompt for each of ``batch`` rows.

    What a pruned call takes beyond the vision tower and the language model's pass over as many tokens stands in the
    column of the selection: capturing the prompt, choosing, and shortening it.
    """

    only_counts = False
    own_sizes: Sequence[int] = ()

    def __init__(self, subject: VisionLanguageModel, batch: int, device: str) -> None:
        self.model, self.tokens, self.views = subject.model, subject.preset.tokens, subject.preset.views
        self.batch, self.device = batch, device
        self.tokens_per_view = self.tokens // self.views
        self.dtype = next(self.model.parameters()).dtype
        self.tokenizer = tokenizer_of_the_question()
        self.visual = {
            name: torch.cat([value] * batch).to(device, self.dtype if value.is_floating_point() else None)
            for name, value in subject.preset.visual.items()
        }
        text = torch.randint(3, 700, (TEXT_BEFORE + TEXT_AFTER,), generator=torch.Generator().manual_seed(0))
        placeholders = torch.full((self.tokens,), PLACEHOLDER)
        ids = torch.cat([text[:TEXT_BEFORE], placeholders, text[TEXT_BEFORE:]]).expand(batch, -1).to(device)
        self.arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.visual}
        if "mm_token_type_ids" in inspect.signature(type(self.model).forward).parameters:
            self.arguments["mm_token_type_ids"] = (ids == PLACEHOLDER).int()

    def suited(self, pruner: Pruner | None) -> Pruner | None:
        """The method itself: what this model cannot host is refused when it is attached."""
        return pruner

    def encode(self) -> Any:
        """Pixels -> projected features."""
        return self.model.get_image_features(**self.visual)

    def text_only(self, row: Row) -> dict[str, Tensor]:
        """A prompt of text as long as the row's pruned one: its language model's work without anything visual."""
        visual = self.tokens if row.keep is None else row.keep * self.views
        ids = torch.full((self.batch, TEXT_BEFORE + visual + TEXT_AFTER), 5, device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def attached(self, row: Row) -> AbstractContextManager:
        """The block in which the row's method prunes the model's calls."""
        if row.pruner is None:
            return nullcontext()
        return row.pruner(self.model, self.tokenizer, query=QUESTION)

    def times(self, row: Row, new_tokens: int) -> dict[str, float]:
        """Seconds of every stage that can be told apart, and of the whole."""
        vision = self._seconds(self.encode)
        prefill = self._seconds(lambda: self.model(**self.text_only(row), logits_to_keep=1))
        if row.name == "limit":
            forward = vision + prefill
            start = time.perf_counter()
            self.encode()
            moments = self._moments(self.text_only(row), new_tokens, start)
        else:
            with self.attached(row):
                forward = self._seconds(lambda: self.model(**self.arguments, logits_to_keep=1))
                moments = self._moments(self.arguments, new_tokens, time.perf_counter())
        return {
            "vision": vision,
            "selection": forward - vision - prefill,
            "prefill": prefill,
            "first token": moments[0],
            "decode": (moments[-1] - moments[0]) / max(1, len(moments) - 1),
        }

    def _seconds(self, call: Any) -> float:
        synchronise(self.device)
        start = time.perf_counter()
        call()
        synchronise(self.device)
        return time.perf_counter() - start

    def _moments(self, arguments: Mapping[str, Tensor], new_tokens: int, start: float) -> Sequence[float]:
        clock = Clock(self.device)
        self.model.generate(
            **arguments, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, streamer=clock
        )
        return [moment - start for moment in clock.times[-new_tokens:]]

    def counts(self, row: Row) -> Iterator[dict[str, Any]]:
        """What does not depend on the clock."""
        arguments = self.text_only(row) if row.name == "limit" else self.arguments

        def forward() -> Any:
            return self.model(**arguments, use_cache=True, logits_to_keep=1)

        with self.attached(row):
            cache = forward().past_key_values
            macs = count_macs(forward) + (count_macs(self.encode) if row.name == "limit" else 0)
            extra = extra_memory(forward, self.device)
        keys = [layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None]
        held = [key.shape[-2] - TEXT_BEFORE - TEXT_AFTER for key in keys]
        text = self.model.config.get_text_config()
        # A window or an earlier layer's keys hold fewer than enter; methods inside the decoder have no such host.
        per_layer = held if isinstance(row.pruner, DecoderPruner) else [max(held)] * text.num_hidden_layers
        yield {
            **language_figures(text, per_layer, TEXT_BEFORE, TEXT_AFTER, self.dtype.itemsize),
            "counted_macs": macs / self.batch,
            "cache_bytes": cache_bytes(cache) // self.batch,
            "extra_memory_bytes": extra,
        }
