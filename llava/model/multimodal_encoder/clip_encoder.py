"""CLIP as LLaVA's eye: patch features, and for pruning the space in which patches and questions meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from llava.checkpoint import fill_module, find_folder, read_tensors
from llava.joint_space.clip import ClipJointSpace

# Pillow resizes as LLaVA's training did; the library's default is torchvision, whose bicubic differs, where installed.
CLIPImageProcessor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor

VISION_PREFIX = "vision_model."


@dataclass(frozen=True)
class TowerOutput:
    """What one pass of the tower leaves behind.

    Args:
        features: (V, n, c) patch features.
        class_features: (V, c) the class token beside them.
        layer_input: (V, 1 + n, c) what went into the last layer, class token first: attention is computed from it for
            the methods that ask.
    """

    features: Tensor
    class_features: Tensor
    layer_input: Tensor


class CLIPVisionTower(nn.Module):
    """The layers of a CLIP vision model that LLaVA reads, loaded apart from the language model.

    Args:
        name: CLIP folder or hub name (``mm_vision_tower``).
        select_layer: hidden state whose patches are the features, -2 for LLaVA; layers after it are not even built.
        select_feature: "patch" drops the class token, "cls_patch" keeps it.
    """

    relevance_sign = ClipJointSpace.relevance_sign

    def __init__(
        self, name: str, select_layer: int = -2, select_feature: Literal["patch", "cls_patch"] = "patch"
    ) -> None:
        super().__init__()
        if select_feature not in ("patch", "cls_patch"):
            raise ValueError(f"mm_vision_select_feature must be 'patch' or 'cls_patch', got {select_feature!r}")
        self.name = name
        self.select_layer = select_layer
        self.select_feature = select_feature
        self.folder: Path | None = None
        self.image_processor: Any = None
        self._joint_space: ClipJointSpace | None = None
        self._compiled_layers: Callable[[Tensor, bool], tuple[Tensor, Tensor]] | None = None

    @property
    def is_loaded(self) -> bool:
        return hasattr(self, "vision_tower")

    def load_model(
        self,
        near: Path | None = None,
        weights: dict[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attn_implementation: str | None = None,
    ) -> None:
        """Build the tower and fill it.

        Args:
            near: folder that a relative ``name`` is looked up from.
            weights: tensors named ``vision_model.*`` that a LLaVA checkpoint brings; they win over the CLIP folder's.

        Raises:
            CheckpointError: the folder or one of its files is missing; names it.
        """
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

    def forward(self, pixels: Tensor, any_size: bool = False) -> Tensor:
        """Pixels (V, 3, s, s) -> patch features (V, n, c) in the tower's dtype."""
        return self.observe(pixels, any_size).features

    def observe(self, pixels: Tensor, any_size: bool = False) -> TowerOutput:
        """Pixels (V, 3, s, s) -> features, and what methods may ask for later.

        Args:
            any_size: read pictures that are not of the tower's own size (V, 3, h, w), with interpolated positions.
        """
        layers = self._compiled_layers or self._layers
        layer_input, hidden = layers(pixels.to(self.device, self.dtype), any_size)
        features = hidden[:, 1:] if self.select_feature == "patch" else hidden
        return TowerOutput(features, hidden[:, 0], layer_input)

    def _layers(self, pixels: Tensor, any_size: bool) -> tuple[Tensor, Tensor]:
        """Pixels -> what goes into the last layer that is read, and what comes out of it: both (V, 1 + n, c)."""
        vision = self.vision_tower.vision_model
        hidden = vision.pre_layrnorm(vision.embeddings(pixels, interpolate_pos_encoding=any_size))
        *before, last = vision.encoder.layers
        for layer in before:
            hidden = layer(hidden, None)
        return hidden, last(hidden, None)

    def compile_layers(self, **options: Any) -> None:
        """Run the tower through `torch.compile` from now on; ``options`` are those of torch.compile."""
        self._compiled_layers = torch.compile(self._layers, **options)

    # Script: the last layer's attention, computed beside its own kernel for methods that ask for it
    def class_attention(self, layer_input: Tensor) -> Tensor:
        """Attention of the class token to the patches in the last layer: (V, 1 + n, c) -> (V, heads, n) float32."""
        query, key = self._queries_and_keys(layer_input)
        return self._attention(query[:, :, :1], key)[:, :, 0, 1:]

    def mean_attention(self, layer_input: Tensor) -> Tensor:
        """Attention that each patch receives there, the mean over all queries: (V, heads, n) float32."""
        query, key = self._queries_and_keys(layer_input)
        received = [
            self._attention(query[view : view + 1], key[view : view + 1]).mean(2) for view in range(len(query))
        ]
        return torch.cat(received)[:, :, 1:]  # view by view: all queries at once would be heads x n x n for each

    def key_metric(self, layer_input: Tensor) -> Tensor:
        """Keys of the patches there, the mean over heads: (V, n, width of a head) float32."""
        return self._queries_and_keys(layer_input)[1].mean(1)[:, 1:]

    def _queries_and_keys(self, layer_input: Tensor) -> tuple[Tensor, Tensor]:
        """(V, 1 + n, c) -> both (V, heads, 1 + n, c / heads) float32."""
        layer = self.vision_tower.vision_model.encoder.layers[-1]
        normed = layer.layer_norm1(layer_input)
        heads = self.config.num_attention_heads
        query, key = (
            projection(normed).float().unflatten(-1, (heads, -1)).transpose(1, 2)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        return query, key

    @staticmethod
    def _attention(query: Tensor, key: Tensor) -> Tensor:
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)

    # Script: the joint space in which patches and question meet, for methods that ask for it
    def image_embeds(self, features: Tensor) -> Tensor:
        """Patches (V, n, c) -> joint space (V, n, e) float32, by CLIP's last norm and projection, patch by patch."""
        return self.joint_space().image_embeds(features, self.vision_tower.vision_model.post_layernorm)

    def text_embeds(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Questions -> joint space; see `ClipJointSpace.text_embeds`."""
        return self.joint_space().text_embeds(texts)

    def joint_space(self) -> ClipJointSpace:
        """CLIP's text tower and projections, loaded when first asked for."""
        if self._joint_space is None:
            self._joint_space = ClipJointSpace.load(self.folder, self.dtype, self.device)
        return self._joint_space

    def use_joint_space(self, space: ClipJointSpace) -> None:
        """Take a text tower and projections that were not loaded from this tower's folder."""
        self._joint_space = space

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.vision_model.post_layernorm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.vision_model.post_layernorm.weight.device

    @property
    def config(self) -> CLIPVisionConfig:
        return self.vision_tower.config

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2
