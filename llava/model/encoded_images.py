"""Pictures after the vision side: encoded once, pruned and asked about as often as one likes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.view_layout import ViewLayout


class EncodedImages:
    """What the vision side knows of a list of pictures: computed once, asked about as often as one likes.

    Args:
        features: (V, n, d) projected tokens of the views of all pictures.
        encoder_features: (V, n, c) the same before the projector.
        layouts: one per picture; their views add up to V.
        layouts_with_padding: the same if padding were not left out.
        class_features: (V, c) class tokens beside ``encoder_features``.
        layer_input: (V, 1 + n, c) what went into the tower's last layer.
        pixels: (V, 3, s, s).

    The last three are for methods that ask for them; without them those methods cannot be used.
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
    ) -> None:
        self.features = features
        self.encoder_features = encoder_features
        self.layouts = layouts
        self.layouts_with_padding = layouts_with_padding
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
        )
        picked._picked_from = (self, views)
        return picked

    @classmethod
    def join(cls, parts: Sequence[EncodedImages]) -> EncodedImages:
        """The pictures of all parts, one after another."""
        raw = [[part._stored(name) for part in parts] for name in ("class_features", "layer_input", "pixels")]
        return cls(
            torch.cat([part.features for part in parts]),
            torch.cat([part.encoder_features for part in parts]),
            [layout for part in parts for layout in part.layouts],
            [layout for part in parts for layout in part.layouts_with_padding],
            *(None if any(value is None for value in values) else torch.cat(values) for values in raw),
        )

    def _stored(self, name: str) -> Tensor | None:
        """A field that is there already, here or where these pictures were picked from: only then is it copied."""
        if name not in self._fields and self._picked_from is not None:
            whole, views = self._picked_from
            value = whole._stored(name)
            if value is not None:
                self._fields[name] = value[views]
        return self._fields.get(name)

    def field(self, name: str, tower: CLIPVisionTower) -> Tensor:
        """What `PruningInputs` calls ``name``, for all views: (V, ...), computed at the first call.

        Raises:
            ValueError: the tower's part of it was not kept.
        """
        stored = self._stored(name)
        if stored is not None:
            return stored
        source = self.encoder_features if name == "image_embeds" else self._stored("layer_input")
        if name in ("class_features", "pixels") or source is None:
            raise ValueError(f"these encoded images hold nothing for {name}: make them with encode_pictures")
        self._fields[name] = getattr(tower, name)(source)
        return self._fields[name]

    def image_embeds(self, tower: CLIPVisionTower) -> Tensor:
        """(V, n, e) patches in the joint image-text space, computed at the first call."""
        return self.field("image_embeds", tower)
