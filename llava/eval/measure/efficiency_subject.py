"""What efficiency is measured on: a model with pictures and prompts, taken apart into the stages of an answer."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.measure.cost import count_macs, prefill_flops
from llava.eval.measure.selection_speed import extra_memory, synchronise
from llava.layout.visuals import Reading, Visuals
from llava.mm_utils import process_images
from llava.model.encoded_images import EncodedImages
from llava.model.llava_arch import EmbeddedPrompts
from llava.model.token_selection import CallPlan, select_tokens
from llava.pruning import DecoderPruner, Pruner
from llava.relevance.policy import settle
from llava.video import process_video

STAGES = ("preprocess", "vision", "text tower", "selection", "prefill", "first token", "decode")
QUESTION = "What color is the star?"
TEXT_BEFORE, TEXT_AFTER = 35, 20  # LLaVA's system prompt, and a question of usual length


@dataclass
class Row:
    """A line of the table: a way to give the language model its visual tokens.

    Args:
        name: of the method, "unpruned", "limit" or "resized": the unpruned model on a smaller picture.
        keep: tokens per view; ``None`` for all.
        pruner: ``None`` for the unpruned model, the limit and "resized".
        seconds: by stage, one entry per repeat.
        note: why a figure is missing.
    """

    name: str
    keep: int | None
    pruner: Pruner | None = None
    seconds: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    figures: dict[str, Any] = field(default_factory=dict)
    note: str = ""


class Clock(BaseStreamer):
    """Notes when `generate` hands out each token."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        synchronise(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Subject:
    """The model under measurement, with a picture or a video and a prompt for each of ``batch`` rows.

    `preprocess` to `prefill` are the stages of the pipeline; `answer` is all of it as a user runs it.
    """

    own_sizes: Sequence[int] = ()

    def __init__(
        self,
        model: Any,
        image_processor: Any,
        size: tuple[int, int],
        batch: int,
        device: str,
        frames: int | None = None,
        reading: Reading | None = None,
    ) -> None:
        self.reading = Reading.of(model.config) if reading is None else reading
        self.model, self.image_processor, self.batch, self.device = model, image_processor, batch, device
        self.frames, self.modality = frames, "image" if frames is None else "video"
        self.dtype = next(model.parameters()).dtype
        self.only_counts = model.lm_head.weight.is_meta
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (size[1] // 8, size[0] // 8, 3), generator=generator, dtype=torch.uint8)
        picture = Image.fromarray(noise.numpy()).resize(size, Image.BICUBIC)
        self.pictures, self.sizes = [picture] * batch, [picture.size] * batch
        text = torch.randint(3, 700, (TEXT_BEFORE + TEXT_AFTER,), generator=generator)
        ids = torch.cat([text[:TEXT_BEFORE], torch.tensor([IMAGE_TOKEN_INDEX]), text[TEXT_BEFORE:]])
        self.ids = ids.expand(batch, -1)
        self.queries = [QUESTION] * batch
        self.chosen: Tensor | None = None
        self.encoded: EncodedImages | None = None
        self.vision_macs = 0
        self.pixels = [pixels.to(device, self.dtype) for pixels in self.preprocess()]
        if frames is None:
            self.pixels = torch.stack(self.pixels)
        self.visuals = self.model.visuals(self.pixels, self.sizes, self.modality, self.reading)
        layout, _ = self.model.vision.layouts(self.visuals)[0]
        self.tokens_per_view = layout.eligible.shape[1]

    def suited(self, pruner: Pruner | None) -> Pruner | None:
        """The form of a method that this model can host. Raises ValueError if there is none."""
        return None if pruner is None else settle(pruner, self.model.relevance_offer())[0]

    def preprocess(self) -> list[Tensor]:
        """Pictures -> pixels of each, (views, 3, s, s) or (3, s, s) float32; videos -> (frames, 3, s, s)."""
        if self.frames is None:
            return [process_images([picture], self.image_processor, self.reading)[0] for picture in self.pictures]
        return [process_video([picture] * self.frames, self.image_processor) for picture in self.pictures]

    def encode(self) -> EncodedImages:
        """Pixels -> projected features, the tower and the projector."""
        return self.model.vision.encode(self.visuals, self.model.vision.layouts(self.visuals))

    def imagined(self) -> tuple[EncodedImages, int]:
        """Random features of the shapes that `encode` gives, and the work that it would be; nothing large is done."""
        tower, projector = self.model.get_vision_tower(), self.model.get_model().mm_projector
        tower, projector = copy.deepcopy(tower).to("meta"), copy.deepcopy(projector).to("meta")
        pixels = torch.cat([visual.pixels for visual in self.visuals.each])
        macs = count_macs(lambda: projector(tower.observe(pixels.to("meta")).features))
        seen = tower.observe(pixels.to("meta"))

        def drawn(like: Tensor | None) -> Tensor | None:
            return None if like is None else torch.randn(like.shape, dtype=like.dtype)

        layouts = self.model.vision.layouts(self.visuals)
        encoded = EncodedImages(
            torch.randn(len(pixels), self.tokens_per_view, self.model.config.hidden_size, dtype=self.dtype),
            drawn(seen.features),
            [layout for layout, _ in layouts],
            [with_padding for _, with_padding in layouts],
            drawn(seen.class_features),
            drawn(seen.layer_input),
            pixels,
            pool_mode=None if self.frames is None else self.model.config.mm_spatial_pool_mode,
        )
        return encoded, macs

    def read_question(self, row: Row, encoded: EncodedImages) -> CallPlan:
        """The text tower, where the method asks for it: of a question that it has not met."""
        self.model.get_vision_tower().forget_texts()
        return self.model.asked(self.model.plan(encoded, row.pruner), self.queries)

    def select(self, row: Row, encoded: EncodedImages, plan: CallPlan) -> list[Tensor]:
        """Features -> the kept ones in reading order, picture by picture."""
        if row.name == "limit":
            return [self.given(row, encoded)]
        return self.model.vision.gather(encoded, select_tokens(self.model.vision, plan, encoded))

    def given(self, row: Row, encoded: EncodedImages) -> Tensor:
        """The limit's tokens (batch, t, d): the first of each view, by numbers that lie on the device already."""
        views, tokens, width = encoded.features.shape
        if self.chosen is None or self.chosen.numel() != views * row.keep:
            first = torch.arange(views)[:, None] * tokens + torch.arange(row.keep)
            self.chosen = first.flatten().to(self.device)
        return encoded.features.flatten(0, 1)[self.chosen].reshape(self.batch, -1, width)

    def embed(self, row: Row, images: Visuals | EncodedImages) -> EmbeddedPrompts | Tensor:
        """The prompts with the visual tokens in their place; embeddings (batch, T, d) alone for the limit.

        The text tower meets the question for the first time, though it is the same in every repeat.
        """
        self.model.get_vision_tower().forget_texts()
        if row.name != "limit":
            return self.model.embed_prompts(
                self.ids, images=images, pruner=row.pruner, query=self.queries, padding_side="left"
            )
        encoded = images if isinstance(images, EncodedImages) else self.encode()
        before, after = (
            self.model.get_input_embeddings()(ids.to(self.device))
            for ids in (self.ids[:, :TEXT_BEFORE], self.ids[:, TEXT_BEFORE + 1 :])
        )
        return torch.cat([before, self.given(row, encoded), after], dim=1)

    def prefill(self, prompts: EmbeddedPrompts | Tensor) -> Any:
        """One pass of the language model over the prompts: its output, with the cache."""
        pruning = None if isinstance(prompts, Tensor) else prompts.decoder_pruning(self.model.get_model())
        embeds = prompts if isinstance(prompts, Tensor) else prompts.inputs_embeds
        with nullcontext() if pruning is None else pruning.attached():
            decoder_device = self.model.lm_head.weight.device  # "meta" where operations are only counted
            return self.model(inputs_embeds=embeds.to(decoder_device), use_cache=True, logits_to_keep=1)

    def answer(self, row: Row, new_tokens: int) -> list[float]:
        """Pixels to ``new_tokens`` tokens, as a user gets them: seconds until each."""
        clock = Clock(self.device)
        synchronise(self.device)
        start = time.perf_counter()
        prompts = self.embed(row, self.visuals)
        if isinstance(prompts, Tensor):
            given = {"inputs_embeds": prompts, "attention_mask": prompts.new_ones(prompts.shape[:2], dtype=torch.long)}
        else:
            given = {"inputs": prompts}
        self.model.generate(**given, max_new_tokens=new_tokens, min_new_tokens=new_tokens, streamer=clock)
        return [moment - start for moment in clock.times[-new_tokens:]]

    def times(self, row: Row, new_tokens: int) -> dict[str, float]:
        """Seconds of every stage, each on its own, and of the whole."""
        seconds: dict[str, float] = {}

        @contextmanager
        def timed(stage: str) -> Iterator[None]:
            synchronise(self.device)
            start = time.perf_counter()
            yield
            synchronise(self.device)
            seconds[stage] = time.perf_counter() - start

        with timed("preprocess"):
            self.preprocess()
        with timed("vision"):
            encoded = self.encode()
        with timed("text tower"):
            plan = self.read_question(row, encoded)
        with timed("selection"):
            self.select(row, encoded, plan)
        prompts = self.embed(row, encoded)
        with timed("prefill"):
            output = self.prefill(prompts)
        del output, prompts, encoded
        moments = self.answer(row, new_tokens)
        seconds["first token"] = moments[0]
        seconds["decode"] = (moments[-1] - moments[0]) / max(1, len(moments) - 1)
        return seconds

    def counts(self, row: Row) -> Iterator[dict[str, Any]]:
        """What does not depend on the clock: tokens and formulas first, then what is counted in a real pass."""
        config = self.model.config
        if self.encoded is None and self.only_counts:
            self.encoded, self.vision_macs = self.imagined()
        elif self.encoded is None:
            self.encoded, self.vision_macs = self.encode(), count_macs(self.encode)
        prompts = self.embed(row, self.encoded)
        if isinstance(prompts, Tensor):
            per_layer = [prompts.shape[1] - TEXT_BEFORE - TEXT_AFTER] * config.num_hidden_layers
        else:
            tokens = prompts.kept[0]
            per_layer = tokens.per_layer or [len(tokens.sequence)] * config.num_hidden_layers
        value_bytes = self.model.lm_head.weight.element_size()
        key_width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
        yield {
            "visual_tokens": per_layer[-1],
            "average_tokens": statistics.fmean(per_layer),
            "formula_macs": prefill_flops(per_layer, config.hidden_size, config.intermediate_size),
            "visual_cache_bytes": 2 * sum(per_layer) * key_width * value_bytes,
        }
        if self.only_counts and isinstance(row.pruner, DecoderPruner):
            return  # it reads what layers without storage do not have
        cache = self.prefill(prompts).past_key_values
        macs = self.vision_macs + count_macs(lambda: self.prefill(self.embed(row, self.encoded)))
        yield {"counted_macs": macs / self.batch, "cache_bytes": cache_bytes(cache) // self.batch}
        del prompts, cache
        if not self.only_counts:
            extra = extra_memory(lambda: self.prefill(self.embed(row, self.visuals)), self.device)
            yield {"extra_memory_bytes": extra}


def cache_bytes(cache: Any) -> int:
    """Bytes of all that a cache holds: keys and values, and the states of recurrent layers."""
    total = 0
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            total += layer.keys.nbytes + layer.values.nbytes
        for states in ("conv_states", "recurrent_states"):
            total += sum(state.nbytes for state in getattr(layer, states, {}).values())
    return total
