"""Models of the library with the sizes of published ones and random weights, and the picture that each is shown.

Sizes are those of the published configurations: of `Qwen/Qwen2.5-VL-7B-Instruct`, `OpenGVLab/InternVL3-8B-hf`,
`Qwen/Qwen3-VL-8B-Instruct`, `Qwen/Qwen3.5-9B` (the library's default text configuration is the same) and
`google/gemma-4-12B-it`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
)

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
QWEN3_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
}
QWEN35_9B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 12288,
    "vocab_size": 248320,
}
QWEN3_VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "num_position_embeddings": 2304,
}
GEMMA4_12B = {
    "hidden_size": 3840,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "intermediate_size": 15360,
    "sliding_window": 1024,
    "vocab_size": 262144,
}
GEMMA4_BUDGETS = (70, 140, 280, 560, 1120)  # tokens at most that its processor resizes a picture to


@dataclass(frozen=True)
class Preset:
    """A model to be built, and one picture for it.

    Args:
        make: builds the model; takes ``dtype`` and ``attn_implementation``.
        visual: arguments of `forward`, of the one picture.
        tokens: that the model makes of it.
        views: on each of which a method keeps its budget.
        resized: for counts of tokens that the model's processor offers itself, the visual arguments of the same
            picture at that size.
    """

    make: Callable[..., torch.nn.Module]
    visual: Mapping[str, Tensor]
    tokens: int
    views: int
    resized: Mapping[int, Mapping[str, Tensor]]


def qwen2_5_vl(text: Mapping[str, Any] = QWEN_7B, vision: Mapping[str, Any] = QWEN_VISION, side: int = 72) -> Preset:
    """Qwen2.5-VL and a square picture of ``side`` x ``side`` patches, a quarter as many tokens, one view."""
    half_head = text["hidden_size"] // text["num_attention_heads"] // 2
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": mrope(half_head)},
        vision_config={**vision, "out_hidden_size": text["hidden_size"]},
        image_token_id=PLACEHOLDER,
    )
    model = partial(Qwen2_5_VLForConditionalGeneration._from_config, config)
    return Preset(model, patches(side, config.vision_config.patch_size), side * side // 4, 1, {})


def internvl3(text: Mapping[str, Any] = QWEN_7B, vision: Mapping[str, Any] = INTERN_VISION, tiles: int = 5) -> Preset:
    """InternVL3 and a picture of ``tiles`` tiles: 5 x 256 tokens at 896 pixels."""
    config = InternVLConfig(
        text_config=Qwen2Config(**text), vision_config=InternVLVisionConfig(**vision), image_token_id=PLACEHOLDER
    )
    (height, width), (patch, _) = vision["image_size"], vision["patch_size"]
    tokens = tiles * (height // patch) * (width // patch) // 4
    visual = {"pixel_values": torch.rand(tiles, 3, height, width)}
    return Preset(partial(InternVLForConditionalGeneration._from_config, config), visual, tokens, tiles, {})


def qwen3_vl(text: Mapping[str, Any] = QWEN3_8B, vision: Mapping[str, Any] = QWEN3_VISION, side: int = 64) -> Preset:
    """Qwen3-VL and a square picture of ``side`` x ``side`` patches: 1,024 tokens at 1024 pixels, one view."""
    return _qwen3("Qwen3VL", text, vision, side)


def qwen3_5(text: Mapping[str, Any] = QWEN35_9B, vision: Mapping[str, Any] = QWEN3_VISION, side: int = 64) -> Preset:
    """Qwen3.5, three of whose four layers are recurrent, and the same picture."""
    return _qwen3("Qwen3_5", text, vision, side)


def _qwen3(name: str, text: Mapping[str, Any], vision: Mapping[str, Any], side: int) -> Preset:
    config_class, model_class = (_of_library(f"{name}{end}") for end in ("Config", "ForConditionalGeneration"))
    rotated = text["head_dim"] // (8 if name == "Qwen3_5" else 2)  # a quarter of each head turns, or all of it
    rope = mrope(rotated) | ({"partial_rotary_factor": 0.25} if name == "Qwen3_5" else {})
    config = config_class(
        text_config={**text, "rope_parameters": rope},
        vision_config={**vision, "out_hidden_size": text["hidden_size"]},
        image_token_id=PLACEHOLDER,
    )
    model = partial(model_class._from_config, config)
    return Preset(model, patches(side, config.vision_config.patch_size), side * side // 4, 1, {})


def gemma4(
    text: Mapping[str, Any] = GEMMA4_12B,
    vision: Mapping[str, Any] | None = None,
    budgets: Sequence[int] = GEMMA4_BUDGETS,
) -> Preset:
    """Gemma 4 12B, which projects pieces of 48 x 48 pixels without a tower, and a square picture at its largest size.

    Args:
        budgets: of its processor; a square picture fills each up to the next square: 33 x 33 of 1120.
    """
    config = _of_library("Gemma4UnifiedConfig")(
        text_config=dict(text),
        vision_config={"mm_embed_dim": text["hidden_size"], "output_proj_dims": text["hidden_size"], **(vision or {})},
        image_token_id=PLACEHOLDER,
    )
    width = 3 * config.vision_config.model_patch_size**2

    def pieces(side: int) -> dict[str, Tensor]:
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)
        return {"pixel_values": torch.rand(1, side * side, width), "image_position_ids": places[None]}

    *smaller, largest = (math.isqrt(budget) for budget in sorted(budgets))
    model = partial(_of_library("Gemma4UnifiedForConditionalGeneration")._from_config, config)
    return Preset(model, pieces(largest), largest**2, 1, {side * side: pieces(side) for side in smaller})


def patches(side: int, patch: int) -> dict[str, Tensor]:
    """The visual arguments of a Qwen for a square picture."""
    return {
        "pixel_values": torch.rand(side * side, 3 * 2 * patch**2),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


def mrope(half_head: int) -> dict[str, Any]:
    """Rotations of a Qwen: 16 / 24 / 24 of 64 by time, row and column, 24 / 20 / 20 in Qwen3; counts are the same."""
    space = 3 * half_head // 8
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half_head - 2 * space, space, space]}


def _of_library(name: str) -> Any:
    found = getattr(transformers, name, None)
    if found is None:
        raise ValueError(f"Transformers {transformers.__version__} has no {name}: this preset needs a newer one")
    return found


TRANSFORMERS_PRESETS: Mapping[str, Callable[[], Preset]] = {
    "qwen2.5-vl-7b": qwen2_5_vl,
    "internvl3-8b": internvl3,
    "qwen3-vl-8b": qwen3_vl,
    "qwen3.5-9b": qwen3_5,
    "gemma4-12b": gemma4,
}
