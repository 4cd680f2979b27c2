"""The efficiency of pruners on the Transformers library's own classes: models of known sizes with random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
)

from llava.eval.measure.cost import count_macs, prefill_flops
from llava.eval.measure.efficiency_subject import QUESTION, TEXT_AFTER, TEXT_BEFORE, Clock, Row, cache_bytes
from llava.eval.measure.geometry import randomise
from llava.eval.measure.selection_speed import extra_memory, synchronise
from llava.model.builder import DEFAULT_CHECKPOINT, read_config
from llava.pruning import Pruner

PLACEHOLDER = 2000  # id of the image token: any that the text does not use
QWEN_7B = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
}
QWEN_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
INTERN_VISION = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": [448, 448],
    "patch_size": [14, 14],
}


@dataclass(frozen=True)
class VisionLanguageModel:
    """A model with the visual arguments of one picture, and how many tokens it makes of it.

    Args:
        visual: arguments of `forward`, of the one picture.
        views: on each of which a method keeps its budget.
    """

    model: torch.nn.Module
    visual: Mapping[str, Tensor]
    tokens: int
    views: int


def qwen2_5_vl(text: Mapping[str, Any] = QWEN_7B, vision: Mapping[str, Any] = QWEN_VISION, side: int = 72) -> Any:
    """Qwen2.5-VL and a square picture of ``side`` x ``side`` patches, a quarter as many tokens, one view."""
    half_head = text["hidden_size"] // text["num_attention_heads"] // 2
    space = 3 * half_head // 8  # 16 / 24 / 24 of the 7B model's 64
    sections = [half_head - 2 * space, space, space]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={**vision, "out_hidden_size": text["hidden_size"]},
        image_token_id=PLACEHOLDER,
    )
    pixels = torch.rand(side * side, 3 * 2 * config.vision_config.patch_size**2)
    visual = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]])}
    model = partial(Qwen2_5_VLForConditionalGeneration._from_config, config)
    return model, visual, side * side // 4, 1


def internvl3(text: Mapping[str, Any] = QWEN_7B, vision: Mapping[str, Any] = INTERN_VISION, tiles: int = 5) -> Any:
    """InternVL3 and a picture of ``tiles`` tiles: 5 x 256 tokens at 896 pixels."""
    config = InternVLConfig(
        text_config=Qwen2Config(**text), vision_config=InternVLVisionConfig(**vision), image_token_id=PLACEHOLDER
    )
    (height, width), (patch, _) = vision["image_size"], vision["patch_size"]
    tokens = tiles * (height // patch) * (width // patch) // 4
    visual = {"pixel_values": torch.rand(tiles, 3, height, width)}
    return partial(InternVLForConditionalGeneration._from_config, config), visual, tokens, tiles


TRANSFORMERS_PRESETS = {"qwen2.5-vl-7b": qwen2_5_vl, "internvl3-8b": internvl3}


def build_random_transformers(
    preset: Any, dtype: torch.dtype, device: torch.device | str, attn_implementation: str | None = None
) -> VisionLanguageModel:
    """A model of a preset's size with random weights, on ``device``."""
    make, visual, tokens, views = preset()
    with torch.device(device):
        model = make(dtype=dtype, attn_implementation=attn_implementation)
    randomise(model, torch.Generator(device).manual_seed(0))
    return VisionLanguageModel(model.eval(), visual, tokens, views)


class TransformersSubject:
    """Such a model under measurement, with a picture and a prompt for each of ``batch`` rows.

    What a pruned call takes beyond the vision tower and the language model's pass over as many tokens stands in the
    column of the selection: capturing the prompt, choosing, and shortening it.
    """

    only_counts = False

    def __init__(self, subject: VisionLanguageModel, batch: int, device: str) -> None:
        self.model, self.tokens, self.views = subject.model, subject.tokens, subject.views
        self.batch, self.device = batch, device
        self.tokens_per_view = self.tokens // self.views
        self.dtype = next(self.model.parameters()).dtype
        self.tokenizer = AutoTokenizer.from_pretrained(
            DEFAULT_CHECKPOINT, config=read_config(Path(DEFAULT_CHECKPOINT))
        )
        self.visual = {
            name: torch.cat([value] * batch).to(device, self.dtype if value.is_floating_point() else None)
            for name, value in subject.visual.items()
        }
        text = torch.randint(3, 700, (TEXT_BEFORE + TEXT_AFTER,), generator=torch.Generator().manual_seed(0))
        placeholders = torch.full((subject.tokens,), PLACEHOLDER)
        ids = torch.cat([text[:TEXT_BEFORE], placeholders, text[TEXT_BEFORE:]]).expand(batch, -1).to(device)
        self.arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.visual}
        if "image_grid_thw" in self.visual:
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
        text = self.model.config.get_text_config()
        arguments = self.text_only(row) if row.name == "limit" else self.arguments

        def forward() -> Any:
            return self.model(**arguments, use_cache=True, logits_to_keep=1)

        with self.attached(row):
            cache = forward().past_key_values
            macs = count_macs(forward) + (count_macs(self.encode) if row.name == "limit" else 0)
            extra = extra_memory(forward, self.device)
        per_layer = [layer.keys.shape[-2] - TEXT_BEFORE - TEXT_AFTER for layer in cache.layers]
        key_width = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
        yield {
            "visual_tokens": per_layer[-1],
            "average_tokens": statistics.fmean(per_layer),
            "formula_macs": prefill_flops(per_layer, text.hidden_size, text.intermediate_size),
            "visual_cache_bytes": 2 * sum(per_layer) * key_width * self.dtype.itemsize,
            "counted_macs": macs / self.batch,
            "cache_bytes": cache_bytes(cache) // self.batch,
            "extra_memory_bytes": extra,
        }
