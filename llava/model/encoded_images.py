"""Pictures and videos after the vision side: encoded once, pruned and asked about as often as one likes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.layout.pooling import pool_patches
from llava.layout.views import ViewLayout
from llava.model.multimodal_encoder.vision_tower import VisionTower

PER_HEAD = ("class_attention", "mean_attention")


class EncodedImages:
    """What the vision side knows of a list of pictures or videos: computed once, asked about as often as one likes.

    Args:
        features: (V, n, d) projected tokens of the views of all pictures, pooled where ``pool_mode`` says how.
        encoder_features: (V, patches, c) what the tower gave: patches = n without pooling.
        layouts: one per picture; their views add up to V.
        layouts_with_padding: the same if padding were not left out.
        class_features: (V, c) class tokens beside ``encoder_features``.
        layer_input: (V, class tokens + patches, c) what went into the tower's last layer.
        pixels: (V, 3, s, s).
        derived: for each picture (k, d) tokens that it is read with where nothing is pruned, or ``None``; see
            layout/views.py.
        pool_mode: of videos, see `pool_patches`; what methods ask for is pooled in the same way.

    Class tokens, layer input and pixels are for methods that ask for them; without, those methods cannot be used.
    """

    def __init__(
        self,
        features: Tensor,
        encoder_features: Tensor,
        layouts: list[ViewLayout],
        layouts_with_padding: list[ViewLayout],
        class_features: Tensor | None = None,
        layer_input: Tensor | None = None,
        pixels: Tensor | None = None,
        derived: Sequence[Tensor | None] | None = None,
        pool_mode: str | None = None,
    ) -> None:
        self.features = features
        self.encoder_features = encoder_features
        self.layouts = layouts
        self.layouts_with_padding = layouts_with_padding
        self.derived = [None] * len(layouts) if derived is None else list(derived)
        self.pool_mode = pool_mode
        given = {"class_features": class_features, "layer_input": layer_input, "pixels": pixels}
        self._fields = {name: value for name, value in given.items() if value is not None}
        self._picked_from: tuple[EncodedImages, list[int]] | None = None

    def __len__(self) -> int:
        return len(self.layouts)

    def pick(self, pictures: Sequence[int]) -> EncodedImages:
        """Some of the pictures, in the given order; a picture asked about twice may be named twice."""
        first_views = [0]
        for layout in self.layouts:
            first_views.append(first_views[-1] + layout.views)
        views = [view for picture in pictures for view in range(first_views[picture], first_views[picture + 1])]
        picked = EncodedImages(
            self.features[views],
            self.encoder_features[views],
            [self.layouts[picture] for picture in pictures],
            [self.layouts_with_padding[picture] for picture in pictures],
            derived=[self.derived[picture] for picture in pictures],
            pool_mode=self.pool_mode,
        )
        picked._picked_from = (self, views)
        return picked

    @classmethod
    def join(cls, parts: Sequence[EncodedImages]) -> EncodedImages:
        """The pictures of all parts, one after another; all pictures, or all videos pooled in the same way."""
        raw = [[part._stored(name) for part in parts] for name in ("class_features", "layer_input", "pixels")]
        return cls(
            torch.cat([part.features for part in parts]),
            torch.cat([part.encoder_features for part in parts]),
            [layout for part in parts for layout in part.layouts],
            [layout for part in parts for layout in part.layouts_with_padding],
            *(None if any(value is None for value in values) else torch.cat(values) for values in raw),
            derived=[tokens for part in parts for tokens in part.derived],
            pool_mode=parts[0].pool_mode,
        )

    def _stored(self, name: str) -> Tensor | None:
        """A field that is there already, here or where these pictures were picked from: only then is it copied."""
        if name not in self._fields and self._picked_from is not None:
            whole, views = self._picked_from
            value = whole._stored(name)
            if value is not None:
                self._fields[name] = value[views]
        return self._fields.get(name)

    def field(self, name: str, tower: VisionTower) -> Tensor:
        """What `PruningInputs` calls ``name``, for all views: (V, ...), computed at the first call.

        Raises:
            ValueError: the tower's part of it was not kept.
        """
        if name == "encoder_features":
            return self._pooled(name, self.encoder_features)
        stored = self._stored(name)
        if stored is not None:
            return stored
        wanted = tower.image_embeds_source if name == "image_embeds" else "layer_input"
        source = self.encoder_features if wanted == "encoder_features" else self._stored(wanted)
        if name == "class_features" and not tower.class_tokens:
            raise ValueError(
                "this checkpoint's vision tower has no class token beside its patches: take a method, or an option of "
                "it, that needs no class_features"
            )
        if name in ("class_features", "pixels") or source is None:
            raise ValueError(f"these encoded images hold nothing for {name}: make them with encode_pictures")
        self._fields[name] = self._pooled(name, getattr(tower, name)(source))
        return self._fields[name]

    def _pooled(self, name: str, value: Tensor) -> Tensor:
        """A field of all patches (V, patches, w), or (V, heads, patches), of the tokens that are left of them."""
        if self.pool_mode is None:
            return value
        if name in PER_HEAD:
            return pool_patches(value.mT, self.pool_mode).mT
        return pool_patches(value, self.pool_mode)

    def image_embeds(self, tower: VisionTower) -> Tensor:
        """(V, n, e) patches in the joint image-text space, computed at the first call."""
        return self.field("image_embeds", tower)
