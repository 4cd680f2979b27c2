"""Models with the sizes of well-known ones and random weights: what efficiency is measured on without a download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava.model.builder import TOY_FOLDER
from llava.model.language_model.llava_causal_lm import LlavaCausalLM
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPImageProcessor
from llava.model.multimodal_encoder.siglip_encoder import SiglipImageProcessor
from llava.relevance.clip import ClipJointSpace

CLIP_FOLDER = TOY_FOLDER / "clip-toy-336"  # its tokenizer and image processor serve all sizes
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONE_CROP = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}
TILES = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": NEXT_PINPOINTS,
}
FRAMES = {
    "mm_patch_merge_type": "spatial_unpad",
    "mm_spatial_pool_mode": "average",
    "mm_newline_position": "grid",
}


@dataclass(frozen=True)
class Geometry:
    """The sizes of a LLaVA: language model, vision tower and text tower, and how a picture or video becomes views.

    Args:
        width, layers, heads, ffn, vocabulary: of the language model: Vicuna, or Qwen2 for videos.
        key_value_heads: ``None`` means as many as ``heads``.
        tower: (width, layers, heads, ffn) of the vision tower with 14-pixel patches: CLIP, or SigLIP for videos.
        view_side: of its pictures, in pixels.
        text_tower: the same as ``tower`` of CLIP's text tower; ``None`` leaves the methods without a joint space.
        joint_width: of the space in which both meet.
        picture: (width, height) in pixels of the picture asked about; 672 x 672 makes five views of LLaVA-NeXT.
        frames: so many of a video instead of a picture.
        reading: configuration keys that say how pictures are cut and read.
    """

    width: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int = 32000
    key_value_heads: int | None = None
    tower: tuple[int, int, int, int] = (1024, 24, 16, 4096)
    view_side: int = 336
    text_tower: tuple[int, int, int, int] | None = (768, 12, 12, 3072)
    joint_width: int = 768
    picture: tuple[int, int] = (336, 336)
    frames: int | None = None
    reading: Mapping[str, Any] = field(default_factory=lambda: ONE_CROP)


VICUNA_7B = {"width": 4096, "layers": 32, "heads": 32, "ffn": 11008}
VICUNA_13B = {"width": 5120, "layers": 40, "heads": 40, "ffn": 13824}
GEOMETRIES = {
    "llava-v1.5-7b": Geometry(**VICUNA_7B),
    "llava-v1.5-13b": Geometry(**VICUNA_13B),
    "llava-v1.6-vicuna-7b": Geometry(**VICUNA_7B, picture=(672, 672), reading=TILES),
    "llava-v1.6-vicuna-13b": Geometry(**VICUNA_13B, picture=(672, 672), reading=TILES),
    "llava-video-7b": Geometry(
        width=3584,
        layers=28,
        heads=28,
        ffn=18944,
        vocabulary=152064,
        key_value_heads=4,
        tower=(1152, 26, 16, 4304),  # all layers but the last
        view_side=384,
        text_tower=None,
        picture=(384, 384),
        frames=64,
        reading=FRAMES,
    ),
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
) -> tuple[LlavaCausalLM, Any]:
    """A model of this geometry with random weights, and its image processor.

    Args:
        decoder_device: of the decoder's layers and its head, where not ``device``: "meta" gives them no storage, so
            that the operations of any size can be counted on any machine.
    """
    of_videos = geometry.frames is not None
    config_class, model_class = LlavaConfig, LlavaLlamaForCausalLM
    if of_videos:
        config_class, model_class = LlavaQwenConfig, LlavaQwenForCausalLM
    config = config_class(
        hidden_size=geometry.width,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.key_value_heads or geometry.heads,
        intermediate_size=geometry.ffn,
        vocab_size=geometry.vocabulary,
        max_position_embeddings=32768 if of_videos else 4096,
        mm_vision_tower=str(CLIP_FOLDER),
        mm_vision_tower_type="siglip" if of_videos else "clip",
        mm_hidden_size=geometry.tower[0],
        mm_projector_type="mlp2x_gelu",
        mm_use_im_patch_token=False,
        **geometry.reading,
    )
    generator = torch.Generator(device).manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(decoder_device or device):
            model = model_class._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        model.get_input_embeddings().to_empty(device=device)
        model.get_model().mm_projector.to_empty(device=device)
        if hasattr(model.get_model(), "image_newline"):
            newline = torch.empty_like(model.get_model().image_newline, device=device)
            model.get_model().image_newline = nn.Parameter(newline)
        with torch.device(device):
            _add_tower(model, geometry, generator, attn_implementation)
    finally:
        torch.set_default_dtype(usual)
    randomise(model, generator)
    toy = TOY_FOLDER / "llava-toy-v1.5"  # its tokenizer reads the question for any vocabulary
    model.tokenizer = AutoTokenizer.from_pretrained(toy, config=LlavaConfig())
    return model.eval(), model.get_vision_tower().image_processor


def _add_tower(
    model: LlavaCausalLM, geometry: Geometry, generator: torch.Generator, attn_implementation: str | None
) -> None:
    """The vision side, built for the current default device and dtype."""
    width, layers, heads, ffn = geometry.tower
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "image_size": geometry.view_side,
        "patch_size": 14,
        "attn_implementation": attn_implementation,
    }
    tower = model.get_vision_tower()
    if geometry.frames is None:
        vision = tower.build(CLIPVisionConfig(**sizes, projection_dim=geometry.joint_width))
        tower.image_processor = CLIPImageProcessor.from_pretrained(CLIP_FOLDER)
        tower.use_joint_space(_random_joint_space(geometry, generator))
    else:
        vision = SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False))
        side = {"height": geometry.view_side, "width": geometry.view_side}
        tower.image_processor = SiglipImageProcessor(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    tower.vision_tower = vision.requires_grad_(False).eval()


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
    """Fill matrices and embeddings with normal numbers that keep the size of what passes through; norms are ones."""
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
