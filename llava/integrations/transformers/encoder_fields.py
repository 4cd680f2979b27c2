"""What a host's CLIP says of its patches, for methods that act on the features before the projector.

They are served where an image is one view and every token one patch: with tiles, the tokens that they make would stand
in an order of which the library's model knows nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava.integrations.transformers.capture import Capture
from llava.integrations.transformers.host import Host
from llava.pruning import Method

ENCODER_FIELDS = frozenset({"encoder_features", "class_features", "class_attention", "mean_attention", "key_metric"})


class EncoderFields:
    """Fields of `PruningInputs` that a vision tower gives.

    Raises:
        ValueError: this host cannot give them; says why.
    """

    def __init__(self, host: Host, method: Method) -> None:
        config = host.model.config
        vision = getattr(config, "vision_config", None)
        layer = getattr(config, "vision_feature_layer", None)
        reason = None
        if getattr(vision, "model_type", None) != "clip_vision_model":
            reason = f"its vision tower is a {getattr(vision, 'model_type', None)}, not a CLIP with a class token"
        elif hasattr(host.base, "pack_image_features") or not hasattr(host.base, "vision_tower"):
            reason = "its tokens are not one patch each of one view"
        elif not isinstance(layer, int) or config.vision_feature_select_strategy != "default":
            reason = f"it reads the layers {layer} with the class token among the patches"
        if reason is not None:
            raise ValueError(
                f"pruner '{method.name}' acts on the features before the projector, which it cannot do in "
                f"{type(host.model).__name__}: {reason}"
            )
        self.needs = method.needs & ENCODER_FIELDS
        depth = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
        tower = host.base.vision_tower
        self.layer: nn.Module = getattr(tower, "vision_model", tower).encoder.layers[depth - 1]
        self.heads = vision.num_attention_heads

    def of(self, capture: Capture) -> dict[str, Tensor]:
        """The fields that the method names, over the N images of a prompt in order."""
        entered, left = capture.watched
        found: dict[str, Tensor] = {"encoder_features": capture.projector_inputs[0], "class_features": left[:, 0]}
        if self.needs & {"class_attention", "mean_attention", "key_metric"}:
            normed = self.layer.layer_norm1(entered)
            attention = self.layer.self_attn
            query, key = (
                projection(normed).float().unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj)
            )  # (N, heads, 1 + n, width of a head)
            found["key_metric"] = key.mean(1)[:, 1:]
            scale = query.shape[-1] ** -0.5
            if "class_attention" in self.needs:
                found["class_attention"] = (query[:, :, :1] @ key.mT * scale).softmax(-1)[:, :, 0, 1:]
            if "mean_attention" in self.needs:
                received = [(q @ k.mT * scale).softmax(-1).mean(-2) for q, k in zip(query, key, strict=True)]
                found["mean_attention"] = torch.stack(received)[:, :, 1:]
        return {name: found[name] for name in self.needs}
