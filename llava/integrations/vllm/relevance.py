"""Where a server reads how relevant a token is to the question: one rule, for the front end and the workers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.checkpoint import CheckpointError, find_folder
from llava.integrations.vllm.options import PruningOptions, ServerOptions
from llava.integrations.vllm.plan import arguments_of, make_pruner
from llava.integrations.vllm.reuse import without_question
from llava.pruning import Method
from llava.relevance.clip import check_joint_space
from llava.relevance.known import folder_at_hand, known_joint_space
from llava.relevance.policy import Choice, Offer, settle

READABLE_DECODERS = (  # by their first softmax attention
    *("llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen3", "qwen3_moe", "qwen3_vl_text", "qwen3_vl_moe_text"),
    *("qwen3_5_text", "qwen3_5_moe_text", "gemma3_text"),
)
HOW_TO_NAME = '--hf-overrides \'{"script_pruning": {"clip": "openai/clip-vit-large-patch14-336"}}\''


@dataclass(frozen=True)
class Reading:
    """How a server reads questions.

    Args:
        options: the server's own.
        method: its method, with the source of relevance settled.
        choice: that source and why; ``None`` where the method reads no question.
        offer: the sources that a request may ask for.
        joint_space: folder of the CLIP that is loaded when the server starts; ``None`` for none.
        has_encoder_features: whether methods can be given the patches before the projector.
    """

    options: PruningOptions
    method: Method
    choice: Choice | None
    offer: Offer
    joint_space: Path | None
    has_encoder_features: bool

    def settle(self, options: PruningOptions) -> tuple[Method, str]:
        """The method that a request asks for, settled, and its arguments as a plan carries them.

        Raises:
            ValueError: an option out of range, a method that cannot be served, a source that cannot be had.
        """
        given = options.image_pruning_args
        asked = made_for(options, self.has_encoder_features)
        method, _ = settle(asked, self.offer)
        arguments = arguments_of(method, given)
        return make_pruner(options.image_pruning_method, arguments), arguments


def read_by(server: ServerOptions, options: PruningOptions, config: Any, near: Path | None, has_clip: bool) -> Reading:
    """How a server reads questions.

    A CLIP is loaded where the server's own method takes it or where it is named: requests may ask for it then.

    Args:
        config: the model's configuration.
        near: folder of the checkpoint, if it is one.
        has_clip: whether the model's family gives patches as CLIP has them.

    Raises:
        ValueError: a source asked for by name that cannot be had, or a CLIP that is named and not found.
    """
    folder: Path | None = None
    lacking: str | None = "this model's vision tower is no CLIP that patches could be compared in"
    if has_clip:
        try:
            folder, lacking = joint_space_folder(server, config, near), None
        except CheckpointError as error:
            lacking = f"{error}. Name the CLIP that the vision tower comes from: {HOW_TO_NAME}"
    if server.clip is not None and folder is None:
        raise ValueError(f"script_pruning names the clip {server.clip!r}, but {lacking}")
    text = config.get_text_config()
    unreadable = None
    if text.model_type not in READABLE_DECODERS:
        unreadable = f"the first attention of a {text.model_type} decoder cannot be read in vLLM"
    offer = Offer(no_joint_space=lacking, no_attention=unreadable, joint_space=str(folder))
    asked = made_for(options, has_clip)
    method, choice = settle(asked, offer)
    if options.reuse != "none":
        without_question(options, method)
    if server.clip is None and (choice is None or choice.source != "clip") and folder is not None:
        folder = None
        offer = replace(offer, no_joint_space=f"no CLIP was loaded when the server started. Name it: {HOW_TO_NAME}")
    return Reading(options, method, choice, offer, folder, has_clip)


def made_for(options: PruningOptions, has_encoder_features: bool) -> Method:
    """The method that options ask for, its source of relevance not settled yet."""
    method = make_pruner(options.image_pruning_method, arguments_of(None, options.image_pruning_args))
    if "encoder_features" in method.needs and not has_encoder_features:
        raise ValueError(
            f"image_pruning_method {method.name!r} needs encoder_features, which this model's family does not give"
        )
    return method


def joint_space_folder(server: ServerOptions, config: Any, near: Path | None) -> Path:
    """Folder with the text tower and projections of the CLIP that a model of ``config`` sees with.

    Raises:
        CheckpointError: not known, or not to be had.
    """
    name = server.clip or getattr(config, "mm_vision_tower", None)
    if name is not None:
        folder = find_folder(name, near=near).resolve()
        check_joint_space(folder)
        return folder
    name = known_joint_space(config.vision_config)
    if name is None:
        raise CheckpointError("no CLIP is named, and none is known with a vision tower of this shape")
    folder = folder_at_hand(name)
    if folder is None:
        raise CheckpointError(f"{name}, which has a vision tower of this shape, is not on this machine")
    return folder


def relevance_sign(server: ServerOptions, config: Any) -> int | None:
    """Sign of CLIP's cosine that the server or the checkpoint states; ``None`` where neither does."""
    return server.relevance_sign or getattr(config, "mm_relevance_sign", None)
