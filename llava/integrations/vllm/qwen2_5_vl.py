"""Qwen2.5-VL: some tokens of a picture, each at the place (t, h, w) that it has in the whole.

vLLM's way for pruned videos carries positions in four channels behind each row; the runner strips them and puts
them in place. It is used here for pictures: the server must run with ``--video-pruning-rate`` above 0. Videos
themselves are pruned by vLLM's own method at that rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLImagePixelInputs,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.video_prune.evs import compute_mrope_for_media

from llava.integrations.vllm.compatibility import check_hooks
from llava.integrations.vllm.features import PictureFeatures
from llava.integrations.vllm.model import PrunedModel
from llava.integrations.vllm.options import PruningOptions
from llava.integrations.vllm.plan import PictureShape
from llava.integrations.vllm.processing import PrunedProcessingInfo, PrunedProcessor, decode_plans, field_name
from llava.integrations.vllm.relevance import Reading

check_hooks(
    (Qwen2_5_VLForConditionalGeneration, "_parse_and_validate_multimodal_inputs", ("kwargs",)),
    (Qwen2_5_VLForConditionalGeneration, "_process_image_input", ("image_input",)),
    (Qwen2_5_VLForConditionalGeneration, "iter_mm_grid_thw", ("mm_features",)),
    (Qwen2_5_VLForConditionalGeneration, "get_mrope_input_positions", ("input_tokens", "mm_features")),
)


class ScriptQwen2_5_VLProcessingInfo(PrunedProcessingInfo, Qwen2_5_VLProcessingInfo):
    @cached_property
    def script_reading(self) -> Reading:
        if not self.ctx.model_config.multimodal_config.is_multimodal_pruning_enabled():
            raise ValueError(
                "pruned Qwen2.5-VL needs vLLM's channel for positions, which is open only with --video-pruning-rate "
                "above 0: start the server with it (any value; it is the share of tokens that videos lose)"
            )
        return super().script_reading

    def script_most_tokens(
        self, modality: str, options: PruningOptions, seq_len: int, mm_counts: Mapping[str, int]
    ) -> int:
        if modality == "video":
            return self.get_max_video_tokens(seq_len, mm_counts)
        return options.most(1, self.get_max_image_tokens())


class ScriptQwen2_5_VLProcessor(PrunedProcessor, Qwen2_5_VLMultiModalProcessor):
    def script_placeholder(self, modality: str) -> list[int]:
        return [self.info.get_hf_config().image_token_id]

    def script_shape(self, modality: str, index: int, mm_items: Any, out_mm_kwargs: Any) -> PictureShape:
        grid = out_mm_kwargs["image"][index]["image_grid_thw"].data
        return PictureShape(1, int(grid.prod()) // self.info.get_hf_config().vision_config.spatial_merge_size ** 2)


@MULTIMODAL_REGISTRY.register_processor(
    ScriptQwen2_5_VLProcessor, info=ScriptQwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class ScriptQwen2_5_VLForConditionalGeneration(PrunedModel, Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL that gives some of the visual tokens of a picture."""

    script_info = ScriptQwen2_5_VLProcessingInfo

    def embed_multimodal(self, **kwargs: object) -> tuple[Tensor, ...]:
        plans = decode_plans(kwargs.pop(field_name("image"), None))
        embeddings: tuple[Tensor, ...] = ()
        for modality, given in self._parse_and_validate_multimodal_inputs(**kwargs).items():
            if modality == "image":
                embeddings += self.script_images(given, plans)
            else:
                embeddings += self._postprocess_video_embeds_evs(self._process_video_input(given), given)
        return embeddings

    def script_images(self, given: Any, plans: list[Any]) -> tuple[Tensor, ...]:
        """Rows (m, d + 4) of every picture: embeddings, and behind them t, h, w and the largest of all."""
        grids = given["image_grid_thw"]
        patches = given["pixel_values"].split(grids.prod(-1).tolist())
        at_once = self.script_server.views_at_once

        def encode(numbers: list[int]) -> list[PictureFeatures]:
            made: list[Tensor] = []
            for start in range(0, len(numbers), at_once):
                part = numbers[start : start + at_once]
                inputs = Qwen2_5_VLImagePixelInputs(
                    type="pixel_values",
                    pixel_values=torch.cat([patches[number] for number in part]),
                    image_grid_thw=grids[part],
                )
                made += self._process_image_input(inputs)
            return [PictureFeatures(rows[None]) for rows in made]

        merged = self.visual.spatial_merge_size**2
        shapes = [(1, int(grid.prod()) // merged) for grid in grids]
        pictures = self.script_features(plans, shapes, encode, given["pixel_values"].device)
        chosen = self.script_choose(pictures, plans)
        rows = []
        for grid, picture, numbers in zip(grids.tolist(), pictures, chosen, strict=True):
            positions = compute_mrope_for_media(grid, self.visual.spatial_merge_size)
            # The text goes on behind the largest of the three, as in the library; vLLM's own channel holds the width.
            positions[:, 3] = positions[:, :3].max() + 1
            whole = torch.cat([picture.features[0], positions.to(picture.features)], dim=1)
            rows.append(whole if numbers is None else whole[numbers])
        return tuple(rows)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions (3, tokens) of a prompt whose pictures take as many places as they keep tokens.

        The text behind a picture goes on where it would behind the whole. Kept tokens get their own positions when
        they are put in; where they come from the prefix cache nobody asks for these again.
        """
        lengths = [f.mm_position.length for f in sorted(mm_features, key=lambda f: f.mm_position.offset)]
        parts: list[np.ndarray] = []
        place = position = 0
        for length, (offset, t, h, w, t_factor) in zip(lengths, self.iter_mm_grid_thw(mm_features), strict=True):
            text = offset - place
            parts.append(np.broadcast_to(np.arange(position, position + text), (3, text)))
            position += text
            grid = np.indices((t, h, w)).reshape(3, -1)
            grid[0] = (grid[0] * t_factor).astype(np.int64)
            parts.append(grid[:, :length] + position)
            position += int(grid.max()) + 1
            place = offset + length
        text = len(input_tokens) - place
        parts.append(np.broadcast_to(np.arange(position, position + text), (3, text)))
        return torch.from_numpy(np.concatenate(parts, axis=1)), position + text - len(input_tokens)
