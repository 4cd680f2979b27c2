"""The visual tokens of a host in the joint space of the CLIP or SigLIP that its vision tower comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, SiglipVisionConfig

from llava.checkpoint import find_folder
from llava.integrations.transformers.capture import Capture
from llava.integrations.transformers.host import Host
from llava.pruning import Method
from llava.pruning.question_reader import QuestionReader
from llava.relevance.clip import ClipJointSpace
from llava.relevance.known import folder_at_hand, known_joint_space
from llava.relevance.siglip import SiglipJointSpace

SAME_IN_BOTH = ("hidden_size", "patch_size", "image_size")
TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def find_joint_space(
    host: Host, method: Method, clip: str | None, siglip: str | None
) -> tuple[HostJointSpace | None, str | None]:
    """The joint space that relevance may be read in, or why there is none.

    It is the one that is named, or the one that the tower is known to come from by its shape, if its files are on this
    machine; the network is not asked for what was not named.

    Args:
        clip, siglip: folder or hub name of the full model.

    Raises:
        ValueError: the named one is not the tower's, or the method reads none.
        CheckpointError: the named one has a file missing.
    """
    if clip is not None and siglip is not None:
        raise ValueError("name one joint space, clip= or siglip=, not both")
    reads_one = reads_joint_space(method)
    if clip is not None or siglip is not None:
        if not reads_one:
            raise ValueError(
                f"pruner '{method.name}' with these options reads no joint space: leave clip= or siglip= out"
            )
        return HostJointSpace(host, clip or siglip, "siglip" if clip is None else "clip"), None
    if not reads_one:
        return None, "relevance=clip was not asked for"
    vision = getattr(host.model.config, "vision_config", None)
    name = known_joint_space(vision)
    if name is None:
        return None, "no clip= or siglip= is named, and the vision tower has the shape of no known CLIP or SigLIP"
    folder = folder_at_hand(name)
    if folder is None:
        return None, (
            f"the vision tower has the shape of {name}, whose files are not on this machine: download it, or name its "
            "folder with clip= or siglip="
        )
    kind = next(kind for kind, tower in TOWERS.items() if tower == vision.model_type)
    try:
        return HostJointSpace(host, str(folder), kind, name), None
    except ValueError as error:
        return None, str(error)


def reads_joint_space(method: Method) -> bool:
    """Whether a method with these options looks for the question in a joint space."""
    return isinstance(method, QuestionReader) and method.relevance in ("auto", "clip")


@lru_cache(maxsize=1)  # people attach for each call anew
def load_space(folder: Path, kind: str, dtype: torch.dtype, device: torch.device) -> ClipJointSpace | SiglipJointSpace:
    """The text half of a CLIP or SigLIP, and the way of patches into its space."""
    return (ClipJointSpace.load if kind == "clip" else SiglipJointSpace)(folder, dtype, device)


class HostJointSpace:
    """A joint space, and the way from a host's features into it.

    Args:
        host: its vision tower must have the shape of the named model's, its projector one input a token.
        name: folder or hub name of the full CLIP or SigLIP.
        kind: "clip" or "siglip".
        known_as: what it is called in messages, where that is not ``name``.

    Raises:
        ValueError: the host's tower cannot be that model.
        CheckpointError: the folder or one of its files is missing.
    """

    def __init__(self, host: Host, name: str, kind: str, known_as: str | None = None) -> None:
        self.host = host
        self.name = known_as or name
        config = getattr(host.model.config, "vision_config", None)
        model_type = TOWERS[kind]
        found = getattr(config, "model_type", None)
        if found != model_type or not hasattr(host.base, "multi_modal_projector"):
            raise ValueError(
                f"{kind}={name!r}: the vision tower of {type(host.model).__name__} is a {found}, whose features are "
                f"not those of a {model_type} one by one. Leave {kind}= out: relevance is then read in the language "
                "model"
            )
        folder = find_folder(name)
        theirs = (CLIPVisionConfig if kind == "clip" else SiglipVisionConfig).from_pretrained(folder)
        for part in SAME_IN_BOTH:
            if getattr(config, part) != getattr(theirs, part):
                raise ValueError(
                    f"{kind}={name!r} is not this model's vision tower: {part} is {getattr(theirs, part)} there and "
                    f"{getattr(config, part)} here"
                )
        self.into_space = self._way(config, theirs, kind)
        self._check_projector(config)
        self.device = _device(host)
        self.space = load_space(folder, kind, host.model.dtype, self.device)
        # A tower whose patches behave otherwise says so in its checkpoint.
        self.relevance_sign = getattr(host.model.config, "mm_relevance_sign", None) or self.space.relevance_sign

    def _way(self, config: Any, theirs: Any, kind: str) -> str:
        """Name of the space's function that takes the features which this host hands to its projector."""
        layer = getattr(self.host.model.config, "vision_feature_layer", None)
        if isinstance(layer, (list, tuple)):
            raise ValueError(
                f"this model reads the layers {list(layer)} of its tower side by side, which stand in no joint space"
            )
        if kind == "clip":
            return "image_embeds"
        if layer is None and config.num_hidden_layers == theirs.num_hidden_layers:
            return "token_embeds"  # the whole tower with its last norm
        depth = None
        if isinstance(layer, int):
            depth = layer if layer >= 0 else config.num_hidden_layers + 1 + layer
        if depth != theirs.num_hidden_layers - 1:
            raise ValueError(
                f"this model reads layer {layer} of a SigLIP of {config.num_hidden_layers} layers; the joint space "
                f"starts from layer {theirs.num_hidden_layers - 1} of {theirs.num_hidden_layers}, or from the whole "
                "tower"
            )
        return "image_embeds"

    def _check_projector(self, config: Any) -> None:
        """Raise ValueError unless the projector makes one token of each patch."""
        projector = self.host.base.multi_modal_projector
        patches = (config.image_size // config.patch_size) ** 2
        weight = next(projector.parameters())
        features = torch.zeros(1, patches, config.hidden_size, dtype=weight.dtype, device=_device(self.host))
        with torch.no_grad():
            tokens = projector(features).shape[1:-1].numel()
        if tokens != patches:
            raise ValueError(
                f"the projector of {type(self.host.model).__name__} makes {tokens} tokens of {patches} patches: no "
                "token has a place of its own in a joint space"
            )

    def text_embeds(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """T questions -> (T, M, e) and mask (T, M)."""
        return self.space.text_embeds(texts)

    def image_embeds(self, capture: Capture, input_ids: Tensor) -> Tensor:
        """(B, L, e) float32, zeros where the prompts (B, L) have no visual token.

        Raises:
            ValueError: tokens and tower patches do not stand for each other one by one.
        """
        embed: Callable[[Tensor], Tensor] = getattr(self.space, self.into_space)
        table: Tensor | None = None
        if len(capture.projector_inputs) != len(capture.features):
            raise ValueError(f"{type(self.host.model).__name__} does not hand its features to a projector once")
        for modality, features in zip(capture.features, capture.projector_inputs, strict=True):
            embeds = self._in_token_order(capture, modality, embed(features))
            token = self.host.placeholders.get(modality, self.host.placeholders["image"])
            places = (input_ids == token).to(embeds.device)
            if int(places.sum()) != len(embeds):
                raise ValueError(
                    f"{type(self.host.model).__name__} makes {int(places.sum())} {modality} tokens of {len(embeds)} "
                    "patches: no token has a place of its own in the joint space. Leave clip= or siglip= out"
                )
            if table is None:
                table = embeds.new_zeros(*input_ids.shape, embeds.shape[-1])
            table[places] = embeds
        return table

    def _in_token_order(self, capture: Capture, modality: str, embeds: Tensor) -> Tensor:
        """Embeddings of patches (V, n, e) -> of visual tokens (t, e), by the model's own packing and pooling."""
        if modality == "image" and capture.packing is not None:
            tiles = embeds.split([tiles for tiles, _ in capture.packing.tiles])
            return torch.cat(capture.packing.replay(tiles))
        if modality == "video" and hasattr(self.host.base, "apply_pooling"):  # LLaVA-OneVision, one newline a video
            videos = len(capture.arguments["pixel_values_videos"])
            pooled = self.host.base.apply_pooling(embeds).reshape(videos, -1, embeds.shape[-1])
            return torch.cat([pooled, pooled.new_zeros(videos, 1, pooled.shape[-1])], dim=1).flatten(0, 1)
        return embeds.flatten(0, 1)


def _device(host: Host) -> torch.device:
    parameter = next(host.base.multi_modal_projector.parameters(), None)
    return host.model.device if parameter is None or parameter.device.type == "meta" else parameter.device
