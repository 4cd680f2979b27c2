"""What LLaVA asks of an eye, whatever encoder it is: patch features, and beside them what pruning methods ask for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava.relevance.clip import ClipJointSpace
from llava.relevance.siglip import SiglipJointSpace


@dataclass(frozen=True)
class TowerOutput:
    """What one pass of the tower leaves behind.

    Args:
        features: (V, n, c) patch features.
        class_features: (V, c) the class token beside them; ``None`` if the encoder has none.
        layer_input: (V, n, c) what went into the last layer, class token first where there is one: attention is
            computed from it for the methods that ask.
    """

    features: Tensor
    class_features: Tensor | None
    layer_input: Tensor


class VisionTower(nn.Module, ABC):
    """The layers of a vision transformer that LLaVA reads, loaded apart from the language model.

    Args:
        name: folder or hub name of the encoder (``mm_vision_tower``).
        select_feature: "patch", or "cls_patch" where the class token counts among the patches.
    """

    kind: ClassVar[str]  # whose joint space it brings, as messages name it
    class_tokens: ClassVar[int]  # how many stand before the patches
    relevance_sign: ClassVar[int]  # sign under which the joint space's cosine grows with relevance
    image_embeds_source: str = "encoder_features"  # what `image_embeds` is computed from, or "pixels"

    def __init__(self, name: str, select_feature: str = "patch") -> None:
        super().__init__()
        self.name = name
        self.select_feature = select_feature
        self.image_processor: Any = None
        self._compiled_layers: Callable[[Tensor, bool], tuple[Tensor, Tensor]] | None = None

    @abstractmethod
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
            weights: tensors named ``vision_model.*`` that a LLaVA checkpoint brings; they win over those of ``name``.

        Raises:
            CheckpointError: the folder or one of its files is missing; names it.
        """

    @property
    @abstractmethod
    def vision_model(self) -> nn.Module:
        """The library's module with ``embeddings``, ``encoder.layers`` and ``post_layernorm``."""

    @abstractmethod
    def joint_space(self) -> ClipJointSpace | SiglipJointSpace:
        """The space in which patches and questions meet, loaded when first asked for."""

    @abstractmethod
    def image_embeds(self, source: Tensor) -> Tensor:
        """What ``image_embeds_source`` names -> patches in the joint space (V, n, e) float32."""

    @abstractmethod
    def class_attention(self, layer_input: Tensor) -> Tensor:
        """Attention to the patches of what stands for the whole picture: (V, n, c) -> (V, heads, n) float32."""

    @abstractmethod
    def why_no_joint_space(self) -> str | None:
        """Why `joint_space` cannot be had of files on this machine, and what would help; ``None`` if it can."""

    @property
    def is_loaded(self) -> bool:
        return hasattr(self, "vision_tower")

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
        patches = hidden[:, self.class_tokens :] if self.select_feature == "patch" else hidden
        return TowerOutput(patches, hidden[:, 0] if self.class_tokens else None, layer_input)

    @abstractmethod
    def first_hidden(self, pixels: Tensor, any_size: bool) -> Tensor:
        """What goes into the first layer: (V, class tokens + n, c)."""

    def _layers(self, pixels: Tensor, any_size: bool) -> tuple[Tensor, Tensor]:
        """What goes into the last layer that is read, and what comes out, before any norm: (V, n, c) both."""
        hidden = self.first_hidden(pixels, any_size)
        *before, last = self.vision_model.encoder.layers
        for layer in before:
            hidden = layer(hidden, None)
        return hidden, last(hidden, None)

    def compile_layers(self, **options: Any) -> None:
        """Run the tower through `torch.compile` from now on; ``options`` are those of torch.compile."""
        self._compiled_layers = torch.compile(self._layers, **options)

    # Script: the last layer's attention, computed beside its own kernel for methods that ask for it
    def mean_attention(self, layer_input: Tensor) -> Tensor:
        """Attention that each patch receives there, the mean over all queries: (V, heads, n) float32."""
        query, key = self.queries_and_keys(layer_input)
        received = [attention(query[view : view + 1], key[view : view + 1]).mean(2) for view in range(len(query))]
        return torch.cat(received)[:, :, self.class_tokens :]  # all views at once would be heads x n x n for each

    def key_metric(self, layer_input: Tensor) -> Tensor:
        """Keys of the patches there, the mean over heads: (V, n, width of a head) float32."""
        return self.queries_and_keys(layer_input)[1].mean(1)[:, self.class_tokens :]

    def queries_and_keys(self, layer_input: Tensor) -> tuple[Tensor, Tensor]:
        """(V, n, c) -> both (V, heads, n, c / heads) float32, class token among the n where there is one."""
        layer = self.vision_model.encoder.layers[-1]
        normed = layer.layer_norm1(layer_input)
        heads = self.config.num_attention_heads
        query, key = (
            projection(normed).float().unflatten(-1, (heads, -1)).transpose(1, 2)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        return query, key

    # Script: the joint space in which patches and question meet, for methods that ask for it
    def text_embeds(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Questions -> joint space (T, M, e) and a mask (T, M) of their segments."""
        return self.joint_space().text_embeds(texts)

    def forget_texts(self) -> None:
        """Texts that the text tower has met are new to it again; see relevance/remembered.py."""
        if self._joint_space is not None:
            self._joint_space.remembered.forget()

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_model.post_layernorm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_model.post_layernorm.weight.device

    @property
    def config(self) -> Any:
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


def attention(query: Tensor, key: Tensor) -> Tensor:
    """Softmax of the scaled products: (V, heads, q, w) and (V, heads, n, w) -> (V, heads, q, n)."""
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
