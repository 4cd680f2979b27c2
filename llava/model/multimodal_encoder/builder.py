"""Which eye a checkpoint has."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava.checkpoint import find_folder, read_json
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.siglip_encoder import SigLIPVisionTower
from llava.model.multimodal_encoder.vision_tower import VisionTower


def build_vision_tower(config: Any) -> VisionTower:
    """The tower of ``config.mm_vision_tower_type``, "clip" (also where it says nothing) or "siglip"; not yet loaded.

    SigLIP's tower does not read ``mm_vision_select_layer``: its checkpoints say -2 and mean the last layer of a tower
    that has already lost one.
    """
    kind = getattr(config, "mm_vision_tower_type", "clip")
    if kind == "siglip":
        return SigLIPVisionTower(config.mm_vision_tower, getattr(config, "mm_relevance_source", "bridge"))
    return CLIPVisionTower(
        config.mm_vision_tower,
        getattr(config, "mm_vision_select_layer", -2),
        getattr(config, "mm_vision_select_feature", "patch"),
    )


def tower_type(name: str, near: Path, weights: Iterable[str]) -> str:
    """Kind of the tower called ``name``: by the ``weights`` that a checkpoint has of it, else by its own folder.

    Raises:
        CheckpointError: no such folder.
        ValueError: an encoder of another kind.
    """
    weights = list(weights)
    if weights:
        return "clip" if any(name.endswith("class_embedding") for name in weights) else "siglip"
    folder = find_folder(name, near)
    kind = read_json(folder / "config.json").get("model_type", "clip")
    if not str(kind).startswith(("clip", "siglip")):
        raise ValueError(f"{folder} is a vision tower of the type {kind!r}; known are clip and siglip")
    return "siglip" if kind.startswith("siglip") else "clip"
