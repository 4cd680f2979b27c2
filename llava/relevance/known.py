"""Joint spaces that are known by the shape of a vision tower, and whether their files are on this machine.

LLaVA-1.5 and LLaVA-NeXT see with OpenAI's ViT-L/14 at 336 pixels, LLaVA-OneVision with Google's SigLIP so400m at 384.
Their checkpoints do not say so in the library's format, but no other tower that people use with them has these shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.checkpoint import CheckpointError, find_folder
from llava.relevance.clip import check_joint_space
from llava.relevance.siglip import check_siglip_folder


@dataclass(frozen=True)
class KnownTower:
    """The vision tower of a published CLIP or SigLIP.

    Args:
        model_type: of its vision configuration.
        layers: numbers of layers that it is met with; models that read the last but one leave the last away.
    """

    model_type: str
    hidden_size: int
    layers: tuple[int, ...]
    image_size: int
    patch_size: int


KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": KnownTower("clip_vision_model", 1024, (23, 24), 336, 14),
    "google/siglip-so400m-patch14-384": KnownTower("siglip_vision_model", 1152, (26, 27), 384, 14),
}
CHECKS = {"clip_vision_model": check_joint_space, "siglip_vision_model": check_siglip_folder}


def known_joint_space(vision_config: Any) -> str | None:
    """Hub name of the CLIP or SigLIP whose vision tower has the shape of ``vision_config``; ``None`` if none has."""
    for name, tower in KNOWN_TOWERS.items():
        same = all(
            getattr(vision_config, part, None) == getattr(tower, part)
            for part in ("model_type", "hidden_size", "image_size", "patch_size")
        )
        if same and getattr(vision_config, "num_hidden_layers", None) in tower.layers:
            return name
    return None


def folder_at_hand(name: str) -> Path | None:
    """Folder of a known joint space, if all of its files are on this machine; the network is never asked.

    Args:
        name: one that `known_joint_space` gave.
    """
    try:
        folder = find_folder(name, download=False)
        CHECKS[KNOWN_TOWERS[name].model_type](folder)
    except CheckpointError:
        return None
    return folder
