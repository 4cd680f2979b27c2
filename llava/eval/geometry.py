"""Models with the sizes of well-known ones and random weights: what efficiency is measured on without a download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionConfig

from llava.joint_space.clip import ClipJointSpace
from llava.model.builder import TOY_FOLDER
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPImageProcessor

CLIP_FOLDER = TOY_FOLDER / "clip-toy-336"  # its tokenizer and image processor serve all sizes
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONE_CROP = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}
TILES = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": NEXT_PINPOINTS,
}


@dataclass(frozen=True)
class Geometry:
    """The sizes of a LLaVA: language model, vision tower and text tower of CLIP, and how a picture becomes views.

    Args:
        width, layers, heads, ffn, vocabulary: of the language model.
        tower: (width, layers, heads, ffn) of CLIP's vision tower with 14-pixel patches of 336-pixel pictures.
        text_tower: the same of its text tower.
        joint_width: of the space in which both meet.
        picture: (width, height) in pixels of the picture asked about; 672 x 672 makes five views of LLaVA-NeXT.
        reading: configuration keys that say how pictures are cut and read.
    """

    width: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int = 32000
    tower: tuple[int, int, int, int] = (1024, 24, 16, 4096)
    text_tower: tuple[int, int, int, int] = (768, 12, 12, 3072)
    joint_width: int = 768
    picture: tuple[int, int] = (336, 336)
    reading: Mapping[str, Any] = field(default_factory=lambda: ONE_CROP)


VICUNA_7B = {"width": 4096, "layers": 32, "heads": 32, "ffn": 11008}
VICUNA_13B = {"width": 5120, "layers": 40, "heads": 40, "ffn": 13824}
GEOMETRIES = {
    "llava-v1.5-7b": Geometry(**VICUNA_7B),
    "llava-v1.5-13b": Geometry(**VICUNA_13B),
    "llava-v1.6-vicuna-7b": Geometry(**VICUNA_7B, picture=(672, 672), reading=TILES),
    "llava-v1.6-vicuna-13b": Geometry(**VICUNA_13B, picture=(672, 672), reading=TILES),
    "mid": Geometry(
        width=1536,
        layers=16,
        heads=12,
        ffn=4096,
        tower=(768, 12, 12, 3072),
        text_tower=(512, 12, 8, 2048),
        joint_width=512,
    ),
}


def build_random(
    geometry: Geometry,
    dtype: torch.dtype,
    device: torch.device | str,
    attn_implementation: str | None = None,
    decoder_device: torch.device | str | None = None,
) -> tuple[LlavaLlamaForCausalLM, Any]:
    """A model of this geometry with random weights, and its image processor.

    Args:
        decoder_device: of the decoder's layers and its head, where not ``device``: "meta" gives them no storage, so
            that the operations of any size can be counted on any machine.
    """
    width, layers, heads, ffn = geometry.tower
    config = LlavaConfig(
        hidden_size=geometry.width,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.heads,
        intermediate_size=geometry.ffn,
        vocab_size=geometry.vocabulary,
        max_position_embeddings=4096,
        mm_vision_tower=str(CLIP_FOLDER),
        mm_hidden_size=width,
        mm_projector_type="mlp2x_gelu",
        mm_use_im_patch_token=False,
        **geometry.reading,
    )
    generator = torch.Generator(device).manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(decoder_device or device):
            model = LlavaLlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        model.get_input_embeddings().to_empty(device=device)
        model.get_model().mm_projector.to_empty(device=device)
        if hasattr(model.get_model(), "image_newline"):
            newline = torch.empty_like(model.get_model().image_newline, device=device)
            model.get_model().image_newline = nn.Parameter(newline)
        with torch.device(device):
            tower = model.get_vision_tower()
            vision = CLIPVisionConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=ffn,
                image_size=336,
                patch_size=14,
                projection_dim=geometry.joint_width,
                attn_implementation=attn_implementation,
            )
            tower.vision_tower = tower.build(vision).requires_grad_(False).eval()
            tower.use_joint_space(_random_joint_space(geometry, generator))
    finally:
        torch.set_default_dtype(usual)
    tower.image_processor = CLIPImageProcessor.from_pretrained(CLIP_FOLDER)
    randomise(model, generator)
    return model.eval(), tower.image_processor


def _random_joint_space(geometry: Geometry, generator: torch.Generator) -> ClipJointSpace:
    """Built for the current default device and dtype."""
    width, layers, heads, ffn = geometry.text_tower
    tokenizer = CLIPTokenizer.from_pretrained(CLIP_FOLDER)
    config = CLIPTextConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=ffn,
        projection_dim=geometry.joint_width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_model = CLIPTextModelWithProjection(config)
    randomise(text_model, generator)
    projection = torch.empty(geometry.joint_width, geometry.tower[0], dtype=torch.float32)
    projection.normal_(0.0, geometry.tower[0] ** -0.5, generator=generator)
    return ClipJointSpace(tokenizer, text_model, projection, nn.LayerNorm(geometry.tower[0], dtype=torch.float32))


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Fill matrices and embeddings with normal numbers that keep the size of what passes through; norms stay ones."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        if parameter.ndim > 1:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name.lower():
            parameter.fill_(1.0)
        else:  # the class token and LLaVA-NeXT's newline
            parameter.normal_(0.0, 1.0, generator=generator)
