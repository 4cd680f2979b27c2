"""CLIP as LLaVA's eye."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from llava.checkpoint import CheckpointError, fill_module, find_folder, read_tensors
from llava.model.multimodal_encoder.vision_tower import VisionTower, attention
from llava.relevance.clip import ClipJointSpace, check_joint_space

# Pillow resizes as LLaVA's training did; the library's default is torchvision, whose bicubic differs, where installed.
CLIPImageProcessor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor

VISION_PREFIX = "vision_model."


class CLIPVisionTower(VisionTower):
    """The layers of a CLIP vision model that LLaVA reads.

    Args:
        name: CLIP folder or hub name (``mm_vision_tower``).
        select_layer: hidden state whose patches are the features, -2 for LLaVA; layers after it are not even built.
        select_feature: "patch" drops the class token, "cls_patch" keeps it.
    """

    kind: ClassVar[str] = "CLIP"
    class_tokens: ClassVar[int] = 1
    relevance_sign: ClassVar[int] = ClipJointSpace.relevance_sign

    def __init__(
        self, name: str, select_layer: int = -2, select_feature: Literal["patch", "cls_patch"] = "patch"
    ) -> None:
        super().__init__(name, select_feature)
        if select_feature not in ("patch", "cls_patch"):
            raise ValueError(f"mm_vision_select_feature must be 'patch' or 'cls_patch', got {select_feature!r}")
        self.select_layer = select_layer
        self.folder: Path | None = None
        self._joint_space: ClipJointSpace | None = None

    def load_model(
        self,
        near: Path | None = None,
        weights: dict[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attn_implementation: str | None = None,
    ) -> None:
        self.folder = find_folder(self.name, near)
        self.image_processor = CLIPImageProcessor.from_pretrained(self.folder)
        config = CLIPVisionConfig.from_pretrained(self.folder, attn_implementation=attn_implementation)
        with torch.device("meta"):
            tower = self.build(config)
        fill_module(tower, weights or read_tensors(self.folder, (VISION_PREFIX,)), self.folder, dtype)
        self.vision_tower = tower.to(device).requires_grad_(False).eval()

    def build(self, config: CLIPVisionConfig) -> CLIPVisionModelWithProjection:
        """The layers that are read, with new weights. Raises ValueError if ``select_layer`` is not among them."""
        depth = self.select_layer if self.select_layer >= 0 else config.num_hidden_layers + 1 + self.select_layer
        if not 0 < depth <= config.num_hidden_layers:
            raise ValueError(
                f"mm_vision_select_layer {self.select_layer} is outside {config.num_hidden_layers} layers"
            )
        config.num_hidden_layers = depth
        tower = CLIPVisionModelWithProjection(config)
        del tower.visual_projection  # part of the joint space; LLaVA's checkpoints do not have it
        return tower

    @property
    def vision_model(self) -> nn.Module:
        return self.vision_tower.vision_model

    def first_hidden(self, pixels: Tensor, any_size: bool) -> Tensor:
        return self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixels, interpolate_pos_encoding=any_size))

    def class_attention(self, layer_input: Tensor) -> Tensor:
        """Attention of the class token to the patches in the last layer: (V, 1 + n, c) -> (V, heads, n) float32."""
        query, key = self.queries_and_keys(layer_input)
        return attention(query[:, :, :1], key)[:, :, 0, 1:]

    def image_embeds(self, source: Tensor) -> Tensor:
        """Patches (V, n, c) -> joint space (V, n, e) float32, by CLIP's last norm and projection, patch by patch."""
        return self.joint_space().image_embeds(source, self.vision_model.post_layernorm)

    def joint_space(self) -> ClipJointSpace:
        """CLIP's text tower and projections, loaded when first asked for."""
        if self._joint_space is None:
            self._joint_space = ClipJointSpace.load(self.folder, self.dtype, self.device)
        return self._joint_space

    def why_no_joint_space(self) -> str | None:
        if self._joint_space is not None:
            return None
        if self.folder is None:
            return "the vision tower was not loaded from a folder of CLIP"
        return why_incomplete(self.folder)

    def use_joint_space(self, space: ClipJointSpace) -> None:
        """Take a text tower and projections that were not loaded from this tower's folder."""
        self._joint_space = space


@cache
def why_incomplete(folder: Path) -> str | None:
    """What a folder of CLIP lacks for its joint space; ``None`` if nothing. Its files are read once."""
    try:
        check_joint_space(folder)
    except CheckpointError as error:
        return str(error)
    return None
