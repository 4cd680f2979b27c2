"""The visual tokens of a host in the joint space of the CLIP or SigLIP that its vision tower comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, SiglipVisionConfig

from llava.checkpoint import find_folder
from llava.integrations.transformers.capture import Capture
from llava.integrations.transformers.host import Host
from llava.relevance.clip import ClipJointSpace
from llava.relevance.siglip import SiglipJointSpace

SAME_IN_BOTH = ("hidden_size", "patch_size", "image_size")


class HostJointSpace:
    """A joint space, and the way from a host's features into it.

    Args:
        host: its vision tower must have the shape of the named model's, its projector one input a token.
        name: folder or hub name of the full CLIP or SigLIP.
        kind: "clip" or "siglip".

    Raises:
        ValueError: the host's tower cannot be that model.
        CheckpointError: the folder or one of its files is missing.
    """

    def __init__(self, host: Host, name: str, kind: str) -> None:
        self.host = host
        config = getattr(host.model.config, "vision_config", None)
        model_type = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}[kind]
        found = getattr(config, "model_type", None)
        if found != model_type or not hasattr(host.base, "multi_modal_projector"):
            raise ValueError(
                f"{kind}={name!r}: the vision tower of {type(host.model).__name__} is a {found}, whose features are "
                f"not those of a {model_type} one by one. Leave {kind}= out: relevance is then read in the language "
                "model's space"
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
        load = ClipJointSpace.load if kind == "clip" else SiglipJointSpace
        self.space = load(folder, host.model.dtype, _device(host))
        # A tower whose patches behave otherwise says so in its checkpoint.
        self.relevance_sign = getattr(host.model.config, "mm_relevance_sign", None) or self.space.relevance_sign

    def _way(self, config: Any, theirs: Any, kind: str) -> str:
        """Name of the space's function that takes the features which this host hands to its projector."""
        if kind == "clip":
            return "image_embeds"
        layer = getattr(self.host.model.config, "vision_feature_layer", None)
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
