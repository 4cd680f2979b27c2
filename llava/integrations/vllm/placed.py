"""Families whose tokens have places (t, h, w): the kept ones stand where they stood in the whole picture.

vLLM lays out the positions of a prompt before the tower runs, when nobody knows which tokens stay. So every visual
token is first given the position where its block (a picture, a video, a frame) begins; how far from there it stands
travels behind its embedding. `embed_input_ids` takes that off the rows, `forward` adds it to the positions. vLLM's
own channel for pruned videos is not used: it is open only with ``--video-pruning-rate`` and never on a CPU, holds a
position in one number of the embedding's precision, and is passed by where tokens come from the prefix cache.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLImagePixelInputs

from llava.integrations.vllm.features import PictureFeatures
from llava.integrations.vllm.model import PrunedModel
from llava.integrations.vllm.plan import PictureShape
from llava.integrations.vllm.processing import PrunedProcessingInfo, PrunedProcessor, decode_plans, field_name
from llava.integrations.vllm.relevance import Reading

BASE = 256  # bfloat16 holds all whole numbers up to this one: an offset is two digits
CHANNELS = 6  # two digits for each of t, h, w
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
DRAFTING_BY_TEXT = ("ngram", "suffix")  # speculation without a second model, which would be given our rows as they are


@dataclass(frozen=True)
class Block:
    """Visual tokens that follow each other in a prompt and come from one grid.

    Args:
        place: of its first token in the prompt.
        count: how many of its tokens are kept.
        span: positions that the whole grid takes up, on its longest axis.
    """

    place: int
    count: int
    span: int


def lay_out(length: int, blocks: Sequence[Block]) -> tuple[Tensor, int]:
    """Positions (3, length) int64 of a prompt, and what is added to a place behind it to have its position.

    Text goes on behind a block where it would behind the whole; the block's own tokens all get its beginning.
    """
    positions = np.empty(length, dtype=np.int64)
    place = position = 0
    for block in blocks:
        text = block.place - place
        positions[place : block.place] = np.arange(position, position + text)
        place, position = block.place + block.count, position + text
        positions[block.place : place] = position
        position += block.span
    positions[place:] = np.arange(position, position + length - place)
    return torch.from_numpy(positions).repeat(3, 1), position - place


def to_channels(offsets: Tensor) -> Tensor:
    """Offsets (..., 3) int64, below 65,536, as digits (..., 6) that any floating type holds exactly."""
    return torch.cat([offsets // BASE, offsets % BASE], dim=-1)


def from_channels(channels: Tensor) -> Tensor:
    """The offsets (..., 3) int64 of `to_channels`."""
    high, low = channels.long().chunk(2, dim=-1)
    return high * BASE + low


class PlacedProcessingInfo(PrunedProcessingInfo):
    """Mixed in before the processing info of a family with places."""

    script_modalities = ("image", "video")

    @cached_property
    def script_reading(self) -> Reading:
        if self.ctx.model_config.multimodal_config.is_multimodal_pruning_enabled():
            raise ValueError(
                "--video-pruning-rate is vLLM's own pruning of videos; here script_pruning in --hf-overrides prunes "
                "pictures and videos: start the server without the flag, or the model under its own architecture"
            )
        return super().script_reading

    def script_most_tokens(self, modality: str, options: Any, seq_len: int, mm_counts: Any) -> int:
        if modality == "video":  # many small frames may all be kept where a few large ones are not
            return self.get_max_video_tokens(seq_len, mm_counts)
        return options.most(1, self.get_max_image_tokens())


class PlacedProcessor(PrunedProcessor):
    """Mixed in before the multi-modal processor of a family with places."""

    def script_placeholder(self, modality: str) -> list[int]:
        config = self.info.get_hf_config()
        return [config.image_token_id if modality == "image" else config.video_token_id]

    def script_shape(self, modality: str, index: int, mm_items: Any, out_mm_kwargs: Any) -> PictureShape:
        frames, rows, columns = out_mm_kwargs[modality][index][f"{modality}_grid_thw"].data.tolist()
        return PictureShape(frames, rows * columns // self.info.get_hf_config().vision_config.spatial_merge_size ** 2)


class PlacedModel(PrunedModel):
    """Mixed in before the model of a family with places. A view is a picture, or what the tower makes of a few frames.

    Raises:
        ValueError: pipeline stages or a draft model, which would not be told the places.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "model") -> None:
        refuse_what_knows_no_places(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.script_offsets = torch.zeros(vllm_config.scheduler_config.max_num_batched_tokens, 3, dtype=torch.long)
        self.script_has_offsets = False

    @abstractmethod
    def script_blocks(self, feature: Any, input_tokens: list[int]) -> list[Block]:
        """A family's own: the blocks of one picture or video of a prompt."""

    @abstractmethod
    def script_places(self, modality: str, given: Any, index: int) -> Tensor:
        """A family's own: offsets (V n, 3) int64 of all tokens of a picture or video from where their blocks begin."""

    def script_made(self, rows: Tensor) -> PictureFeatures:
        """What the tower's rows (V, n, d) of a picture are; a family's own where not all of it is the token itself."""
        return PictureFeatures(rows)

    def embed_multimodal(self, **kwargs: object) -> tuple[Tensor, ...]:
        plans = {modality: decode_plans(kwargs.pop(field_name(modality), None)) for modality in PIXELS}
        embeddings: tuple[Tensor, ...] = ()
        for modality, given in self._parse_and_validate_multimodal_inputs(**kwargs).items():
            embeddings += self.script_rows(modality, given, plans[modality])
        return embeddings

    def script_rows(self, modality: str, given: Any, plans: list[Any]) -> tuple[Tensor, ...]:
        """Rows (k, d + 6) of every picture or video: embeddings, and behind them their offsets."""
        grids = given[f"{modality}_grid_thw"].tolist()
        pixels = given[PIXELS[modality]]
        views = iter(pixels.split([rows * columns for frames, rows, columns in grids for _ in range(frames)]))
        views_of = [[next(views) for _ in range(frames)] for frames, _, _ in grids]

        def encode(numbers: list[int]) -> list[PictureFeatures]:
            pending = [(view, grids[number][1:]) for number in numbers for view in views_of[number]]
            made: list[Tensor] = []
            for start in range(0, len(pending), self.script_server.views_at_once):
                part = pending[start : start + self.script_server.views_at_once]
                inputs = Qwen2_5_VLImagePixelInputs(  # the tower looks at each frame alone, as at a picture
                    type="pixel_values",
                    pixel_values=torch.cat([view for view, _ in part]),
                    image_grid_thw=torch.tensor([[1, *size] for _, size in part]),
                )
                made += self._process_image_input(inputs)
            rows = iter(made)
            return [self.script_made(torch.stack([next(rows) for _ in views_of[number]])) for number in numbers]

        merged = self.visual.spatial_merge_size**2
        shapes = [(frames, rows * columns // merged) for frames, rows, columns in grids]
        pictures = self.script_features(plans, shapes, encode, pixels.device)
        embeddings = []
        for index, (picture, numbers) in enumerate(zip(pictures, self.script_choose(pictures, plans), strict=True)):
            places = to_channels(self.script_places(modality, given, index))
            parts = [picture.features.flatten(0, 1), places.to(picture.features)]
            if picture.beside is not None:
                parts.insert(1, picture.beside.flatten(0, 1))
            embeddings.append(torch.cat([part if numbers is None else part[numbers] for part in parts], dim=1))
        return tuple(embeddings)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Embeddings of a step's tokens; the offsets that came with visual ones are kept for `forward`."""
        self.script_forget()
        if not multimodal_embeddings:
            return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)
        offsets = from_channels(torch.cat([rows[:, -CHANNELS:] for rows in multimodal_embeddings]))
        space = self.script_offsets_of(len(input_ids))
        space.masked_scatter_(is_multimodal[:, None].to(space.device, non_blocking=True), offsets.to(space.device))
        self.script_has_offsets = True
        rows = [rows[:, :-CHANNELS] for rows in multimodal_embeddings]
        return super().embed_input_ids(input_ids, rows, is_multimodal=is_multimodal)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        if inputs_embeds is not None:
            # Answers that run on past the last position the decoder knows stay at it, as there is no entry for more.
            positions = positions + self.script_offsets_of(positions.shape[-1]).T
            positions = positions.clamp(max=self.script_last_position)
        output = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        self.script_forget()
        return output

    def script_offsets_of(self, tokens: int) -> Tensor:
        """The offsets (tokens, 3) of a step. The same memory in all steps, so that CUDA graphs find it."""
        if tokens > len(self.script_offsets):
            more = self.script_offsets.new_zeros(tokens - len(self.script_offsets), 3)
            self.script_offsets = torch.cat([self.script_offsets, more])
        return self.script_offsets[:tokens]

    def script_forget(self) -> None:
        if self.script_has_offsets:
            self.script_offsets.zero_()
            self.script_has_offsets = False

    @cached_property
    def script_last_position(self) -> int:
        """The last one that the decoder's rotary embeddings have."""
        caches = [getattr(module, "cos_sin_cache", None) for module in self.language_model.modules()]
        return min(len(cache) for cache in caches if cache is not None) - 1

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions (3, tokens) of a prompt without the offsets of its visual tokens: see `lay_out`."""
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        return lay_out(
            len(input_tokens), [block for feature in features for block in self.script_blocks(feature, input_tokens)]
        )

    def get_encoder_cudagraph_config(self) -> Any:
        """No graphs of the encoder: they would go past the selection."""
        return dataclasses.replace(super().get_encoder_cudagraph_config(), modalities=[])


def refuse_what_knows_no_places(vllm_config: Any) -> None:
    """Raise ValueError for ways to run a model in which rows or positions go past `PlacedModel`."""
    architecture = vllm_config.model_config.architecture
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            f"{architecture} cannot be served in pipeline stages: vLLM tells later stages no places of kept tokens; "
            "use --tensor-parallel-size"
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in DRAFTING_BY_TEXT:
        raise ValueError(
            f"{architecture} cannot be served with a draft model ({speculative.method}), which is told no places of "
            f"kept tokens; methods that draft from the text are served: {', '.join(DRAFTING_BY_TEXT)}"
        )
