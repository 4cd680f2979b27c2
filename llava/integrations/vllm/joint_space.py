"""Where the CLIP of a model's vision tower is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.checkpoint import CheckpointError, find_folder
from llava.integrations.vllm.options import ServerOptions
from llava.relevance.clip import check_joint_space

OPENAI_CLIP_336 = "openai/clip-vit-large-patch14-336"  # what LLaVA-1.5 and LLaVA-NeXT were trained with
OPENAI_CLIP_336_SHAPE = (1024, 24, 336, 14)


def joint_space_folder(server: ServerOptions, config: Any) -> Path:
    """Folder with the text tower and projections of the CLIP that a model of ``config`` sees with.

    Raises:
        ValueError: not known, or not to be had; says which options help.
    """
    vision = config.vision_config
    shape = (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size)
    name = server.clip or getattr(config, "mm_vision_tower", None)
    if name is None and shape == OPENAI_CLIP_336_SHAPE:
        name = OPENAI_CLIP_336
    advice = (
        "Name the CLIP that the vision tower comes from in --hf-overrides "
        '\'{"script_pruning": {"clip": "openai/clip-vit-large-patch14-336"}}\', or choose by the language model\'s '
        'embeddings with {"image_pruning_args": {"relevance": "projector"}}'
    )
    if name is None:
        raise ValueError(f"the method reads relevance in CLIP's joint space, but no CLIP is named. {advice}")
    try:
        folder = find_folder(name)
        check_joint_space(folder)
    except CheckpointError as error:
        raise ValueError(f"{error}. {advice}") from error
    return folder


def relevance_sign(server: ServerOptions, config: Any) -> int | None:
    """Sign of CLIP's cosine that the server or the checkpoint states; ``None`` where neither does."""
    return server.relevance_sign or getattr(config, "mm_relevance_sign", None)
