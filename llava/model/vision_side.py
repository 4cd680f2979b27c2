"""The vision side of a LLaVA: from pixels to projected tokens, and back from chosen numbers to rows of embeddings.

Visuals -> tower -> projector (-> pooling) -> EncodedImages        encode
KeptTokens -> rows in reading order, learned tokens between them   gather
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava.layout.pooling import derived_tokens, pool_patches
from llava.layout.views import FRAME_END, NEWLINE, SlowFast, ViewLayout
from llava.layout.visuals import VIDEO, Reading, VideoReading, Visual, Visuals, picture_layouts
from llava.model.encoded_images import EncodedImages
from llava.model.kept_tokens import KeptTokens
from llava.model.multimodal_encoder.vision_tower import VisionTower

Layouts = tuple[ViewLayout, ViewLayout]  # of a picture, and the one it would have if padding counted like the rest


class VisionSide:
    """What a language model's body has of tower, projector and learned tokens, put to work; the body owns them.

    Args:
        body: holds ``vision_tower``, ``mm_projector`` and, where the checkpoint has them, ``image_newline`` and
            ``faster_token``.
        config: the checkpoint's; says how pictures are read unless a call says otherwise.
        crops_are_views: whether single crops (N, 3, s, s) are read like lists of views.
    """

    def __init__(self, body: nn.Module, config: Any, crops_are_views: bool = False) -> None:
        self.body = body
        self.config = config
        self.crops_are_views = crops_are_views

    @property
    def tower(self) -> VisionTower:
        return self.body.vision_tower

    @property
    def relevance_sign(self) -> int:
        """Sign of the joint space's cosine: the checkpoint's ``mm_relevance_sign``, or the kind of tower's."""
        return getattr(self.config, "mm_relevance_sign", None) or self.tower.relevance_sign

    # --- before the tower ------------------------------------------------------------------------------------------

    def visuals(
        self,
        images: Tensor | Sequence[Tensor] | Visuals,
        sizes: Sequence[tuple[int, int] | None] | None = None,
        modalities: str | Sequence[str] | None = None,
        reading: Reading | None = None,
    ) -> Visuals:
        """Pixels with all that says how they are read: see `Visuals.of`; ``reading`` is by default the checkpoint's.

        Raises:
            ValueError: see `Visuals.of`; or sizes, modalities or a reading beside `Visuals`, which hold their own.
        """
        if not isinstance(images, Visuals):
            reading = Reading.of(self.config) if reading is None else reading
            return Visuals.of(images, sizes, modalities, reading, self.crops_are_views)
        beside = {"image_sizes": sizes, "modalities": modalities, "reading": reading}
        given = [name for name, value in beside.items() if value is not None]
        if given:
            raise ValueError(f"Visuals hold their own {', '.join(given)}: give images alone")
        return images

    def layouts(self, visuals: Visuals) -> list[Layouts]:
        """For each picture or video its layout, and the one it would have if padding counted like anything else.

        Raises:
            ValueError: sizes are missing or do not fit the number of views, or the checkpoint cannot read it.
        """
        return [self._layouts(visual) for visual in visuals.each]

    def _layouts(self, visual: Visual) -> Layouts:
        side, tower, views = self.tower.num_patches_per_side, self.tower, len(visual.pixels)
        if visual.modality == VIDEO:
            reading = VideoReading.of(visual.reading)
            if reading.slow_every is not None and not hasattr(self.body, "faster_token"):
                raise ValueError("add_faster_video needs model.faster_token, which this checkpoint does not have")
            return (reading.layout(views, side),) * 2
        tokens = tower.num_patches + (tower.select_feature == "cls_patch")
        pixels = tower.config.image_size
        return picture_layouts(visual.reading, views, side, tokens, pixels, visual.size, visual.in_views)

    # --- the tower -------------------------------------------------------------------------------------------------

    def encode_images(self, pixels: Tensor, any_size: bool = False) -> Tensor:
        """Pixels (V, 3, s, s) -> projected features (V, n, d); ``any_size`` takes other sizes, which give other n."""
        with torch.no_grad():
            features = self.tower(pixels, any_size)
        return self.project(features)

    def project(self, features: Tensor) -> Tensor:
        """Encoder features (..., c) -> the language model's space (..., d)."""
        parameter = next(self.body.mm_projector.parameters(), features)
        return self.body.mm_projector(features.to(parameter.device, parameter.dtype))

    def encode(self, visuals: Visuals, layouts: Sequence[Layouts]) -> EncodedImages:
        """Run the tower on visuals of one group (`Visuals.groups`), whose ``layouts`` are known already."""
        pixels = torch.cat([visual.pixels for visual in visuals.each])
        with torch.no_grad():
            seen = self.tower.observe(pixels)
        patches = self.project(seen.features)
        first = visuals.each[0]
        pool_mode = VideoReading.of(first.reading).pool_mode if first.modality == VIDEO else None
        own = [layout for layout, _ in layouts]
        return EncodedImages(
            patches if pool_mode is None else pool_patches(patches, pool_mode),
            seen.features,
            own,
            [with_padding for _, with_padding in layouts],
            seen.class_features,
            seen.layer_input,
            pixels,
            derived=derived_tokens(patches, own, pool_mode),
            pool_mode=pool_mode,
        )

    # --- behind the selection --------------------------------------------------------------------------------------

    def gather(self, encoded: EncodedImages, kept: Sequence[KeptTokens]) -> list[Tensor]:
        """Visual tokens (t, d) of every picture in reading order, with the learned ones between them."""
        rows, first = [], 0
        for picture, tokens in enumerate(kept):
            table = encoded.features[first : first + tokens.layout.views].flatten(0, 1)
            first += tokens.layout.views
            made = encoded.derived[picture] if tokens.made is None else tokens.made.flatten(0, 1)
            if made is not None:
                table = torch.cat([table, made.to(table.device, table.dtype)])
            sequence = tokens.sequence.to(table.device, non_blocking=True)
            row = table[sequence.clamp_min(0)]
            if tokens.newlines:
                learned = {NEWLINE: "image_newline"}
                if isinstance(tokens.layout.derived, SlowFast):
                    learned[FRAME_END] = "faster_token"
                for number, name in learned.items():
                    token = getattr(self.body, name).to(table.device, table.dtype)
                    row = torch.where((sequence == number)[:, None], token, row)
            rows.append(row)
        return rows
