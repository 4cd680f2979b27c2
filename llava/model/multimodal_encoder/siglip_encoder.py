"""SigLIP as LLaVA's eye: LLaVA-OneVision and LLaVA-Video."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from llava.checkpoint import CheckpointError, fill_module, find_folder, read_tensors
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.relevance.siglip import VISION_PREFIX, SiglipJointSpace, check_siglip_folder

# Pillow resizes as LLaVA's training did; the library's default is torchvision, whose bicubic differs, where installed.
SiglipImageProcessor = getattr(transformers, "SiglipImageProcessorPil", None) or transformers.SiglipImageProcessor

SO400M_WIDTH, SO400M_HEADS, SO400M_IMAGE = 1152, 16, 384


class SigLIPVisionTower(VisionTower):
    """All layers of SigLIP but its last, read before the final norm; it has no class token.

    Args:
        name: folder or hub name of SigLIP (``mm_vision_tower``). Needed only where the checkpoint brings no tower of
            its own, and for the joint space; see ``joint_folder``.
        relevance_source: where patches of the joint space come from: "bridge" sends this tower's output through
            SigLIP's own last layer and head, "full" runs a second, untouched SigLIP on the pixels.
    """

    kind: ClassVar[str] = "SigLIP"
    class_tokens: ClassVar[int] = 0
    relevance_sign: ClassVar[int] = SiglipJointSpace.relevance_sign

    def __init__(self, name: str, relevance_source: Literal["bridge", "full"] = "bridge") -> None:
        super().__init__(name)
        if relevance_source not in ("bridge", "full"):
            raise ValueError(f"mm_relevance_source must be 'bridge' or 'full', got {relevance_source!r}")
        self.image_embeds_source = "encoder_features" if relevance_source == "bridge" else "pixels"
        self.joint_folder: Path | None = None  # of the full SigLIP; ``None`` if there is none at hand
        self._joint_space: SiglipJointSpace | None = None

    def load_model(
        self,
        near: Path | None = None,
        weights: dict[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attn_implementation: str | None = None,
    ) -> None:
        folder = folder_at_hand(self.name, near) if weights else find_folder(self.name, near)
        self.joint_folder = self.joint_folder or folder
        tensors = weights or read_tensors(folder, (VISION_PREFIX,))
        tensors = {name.removeprefix(VISION_PREFIX): tensor for name, tensor in tensors.items()}
        config = tower_config(tensors, folder, removed=0 if weights else 1)
        config._attn_implementation = attn_implementation or "sdpa"
        with torch.device("meta"):
            tower = SiglipVisionModel(config)
        fill_module(tower, tensors, folder, dtype)
        self.vision_tower = tower.to(device).requires_grad_(False).eval()
        side = {"height": config.image_size, "width": config.image_size}
        half = [0.5, 0.5, 0.5]
        self.image_processor = SiglipImageProcessor(size=side, resample=3, image_mean=half, image_std=half)

    @property
    def vision_model(self) -> nn.Module:
        return self.vision_tower

    def first_hidden(self, pixels: Tensor, any_size: bool) -> Tensor:
        return self.vision_model.embeddings(pixels, interpolate_pos_encoding=any_size)

    # Script: what the methods that ask for it get, by SigLIP's own head
    def class_attention(self, layer_input: Tensor) -> Tensor:
        """Attention of the head's probe, which stands for the picture as CLIP's class token does: (V, heads, n)."""
        output = self.vision_model.encoder.layers[-1](layer_input, None)
        space = self.joint_space()
        return space.probe_attention(space.last_hidden(output))

    def image_embeds(self, source: Tensor) -> Tensor:
        """Features (V, n, c) or pixels (V, 3, s, s), by ``image_embeds_source`` -> joint space (V, n, e) float32."""
        space = self.joint_space()
        return space.image_embeds_of_pixels(source) if source.ndim == 4 else space.image_embeds(source)

    def why_no_joint_space(self) -> str | None:
        if self._joint_space is not None:
            return None
        if self.joint_folder is None:
            return f"the full SigLIP {self.name} is not at hand; joint_space_path (--siglip-path) says where it is"
        return why_incomplete(self.joint_folder)

    def joint_space(self) -> SiglipJointSpace:
        """SigLIP's text tower, last layer and head, loaded when first asked for.

        Raises:
            CheckpointError: the full SigLIP is not at hand.
        """
        if self._joint_space is None:
            if self.joint_folder is None:
                raise CheckpointError(
                    f"relevance=clip needs the full SigLIP, and {self.name} is not at hand: download it and give its "
                    "folder (joint_space_path, on the command line --siglip-path), or take relevance=language"
                )
            self._joint_space = SiglipJointSpace(self.joint_folder, self.dtype, self.device)
        return self._joint_space


@cache
def why_incomplete(folder: Path) -> str | None:
    """What a folder of SigLIP lacks for its joint space; ``None`` if nothing. Its files are read once."""
    try:
        check_siglip_folder(folder)
    except CheckpointError as error:
        return str(error)
    return None


def folder_at_hand(name: str, near: Path | None) -> Path | None:
    """SigLIP's folder if it is on this machine; ``None`` if it would have to be downloaded."""
    try:
        return find_folder(name, near, download=False)
    except CheckpointError:
        return None


def tower_config(tensors: dict[str, Tensor], folder: Path | None, removed: int) -> SiglipVisionConfig:
    """SigLIP's configuration without its head and without the last ``removed`` of the layers in ``tensors``.

    Read off the shapes; the folder's own file is needed only for a size that is not so400m's.
    """
    layers = 1 + max(int(found[1]) for name in tensors if (found := re.match(r"encoder\.layers\.(\d+)\.", name)))
    patch = tensors["embeddings.patch_embedding.weight"]
    if folder is not None:
        config = SiglipVisionConfig.from_pretrained(folder)
    elif patch.shape[0] == SO400M_WIDTH:
        config = SiglipVisionConfig(num_attention_heads=SO400M_HEADS, image_size=SO400M_IMAGE)
    else:
        raise CheckpointError(
            f"a SigLIP tower of width {patch.shape[0]} needs the config.json of its own folder (mm_vision_tower), "
            f"because the number of heads cannot be read off the weights; only that of width {SO400M_WIDTH} is known"
        )
    config.hidden_size, config.patch_size = patch.shape[0], patch.shape[-1]
    config.intermediate_size = tensors["encoder.layers.0.mlp.fc1.weight"].shape[0]
    config.num_hidden_layers = layers - removed
    config.vision_use_head = False
    patches = (config.image_size // config.patch_size) ** 2
    found = tensors["embeddings.position_embedding.weight"].shape[0]
    if found != patches:
        raise CheckpointError(f"a SigLIP tower for {config.image_size} pixels has {patches} positions, got {found}")
    return config
