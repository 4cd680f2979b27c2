"""Where the visual tokens of a prompt stand, and which image, tile or frame each of them belongs to.

A *picture* is an image or a video; its *views* are the tiles or frames among which a method selects one by one. Tokens
that show nothing (newline embeddings, row breaks) are separators: they belong to no view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.integrations.transformers.arguments import embedding_device
from llava.integrations.transformers.capture import Capture, Packing
from llava.integrations.transformers.host import Host, UnsupportedModelError

SEPARATOR = -1
TILES_SIDE_BY_SIDE = {"internvl", "qianfan_ocr"}  # features come tile by tile, without text between an image's tiles
PATCHES_SIDE_BY_SIDE = {"inkling_mm_model"}  # features come patch by patch: an image is a run of placeholders


@dataclass(frozen=True)
class Picture:
    """An image or a video in a prompt.

    Args:
        row: of the batch.
        columns: (t,) int64 on the CPU, ascending: where its tokens stand.
        views: (t,) int64, the view of each token, 0 .. V - 1, or `SEPARATOR`.
        attended: (t,) bool, False at tokens that the prompt's attention mask hides.
    """

    row: int
    columns: Tensor
    views: Tensor
    attended: Tensor

    @property
    def count(self) -> int:
        """V, the number of views."""
        return int(self.views.max()) + 1

    def view_sizes(self) -> list[int]:
        """Number of tokens of each view."""
        return torch.bincount(self.views[self.views != SEPARATOR], minlength=self.count).tolist()

    def attended_sizes(self) -> list[int]:
        """Number of tokens of each view that the attention mask shows."""
        return torch.bincount(self.views[(self.views != SEPARATOR) & self.attended], minlength=self.count).tolist()

    def separators_to_keep(self, kept: Tensor) -> Tensor:
        """(t,) bool, True at separators whose stretch still has a token: for ``newlines="keep"``.

        A stretch is a grid row, the part since the separator before. An overview that comes before the tiles has none.
        """
        is_separator = self.views == SEPARATOR
        stretch = torch.cat([torch.zeros(1, dtype=torch.int64), is_separator.cumsum(0)[:-1]])
        in_stretch = kept & ~is_separator
        if self.count > 1:
            in_stretch = in_stretch & (self.views > 0)
        has_token = torch.zeros(int(stretch.max()) + 1, dtype=torch.bool)
        has_token[stretch[in_stretch]] = True
        return is_separator & has_token[stretch]


def find_pictures(
    host: Host, capture: Capture, input_ids: Tensor, attention_mask: Tensor | None = None
) -> list[Picture]:
    """All pictures of a batch of prompts (B, L), row by row in the order of the prompts.

    Args:
        attention_mask: (B, L); ``None`` shows everything.

    Raises:
        UnsupportedModelError: the placeholders are not where the model's features went.
    """
    ids = input_ids.cpu()
    items: list[tuple[int, Tensor, Tensor]] = []
    for modality in capture.features:
        token = host.placeholders.get(modality, host.placeholders["image"])
        if not bool((ids == token).any()):
            token = host.placeholders["image"]  # GLM-4V writes the image's in videos, too
        places = (ids == token).nonzero()  # (visual tokens, 2), row by row
        first, found = 0, views_of(host, capture, modality)
        shows = torch.ones(len(places), dtype=torch.bool)
        if modality == "video" and len(places) == sum(map(len, found)) + len(found):
            # LLaVA-OneVision before Transformers 5.23 adds the newline behind a video later than its features.
            found = [torch.cat([views, torch.tensor([SEPARATOR])]) for views in found]
            shows[torch.tensor([len(views) for views in found]).cumsum(0) - 1] = False
        placed = 0
        for views in found:
            part = places[first : first + len(views)]
            first += len(views)
            if len(part) < len(views) or len(part[:, 0].unique()) != 1:
                break
            items.append((int(part[0, 0]), part[:, 1], views))
            placed += 1
        if first != len(places) or placed != len(found):
            raise UnsupportedModelError(
                host.model, f"the prompts have {len(places)} {modality} placeholders that do not match its features"
            )
        if not stand_there(host, capture, modality, places[shows], token):
            raise UnsupportedModelError(
                host.model,
                f"what its language model gets at the {modality} placeholders are not its {modality} features",
            )
    items.sort(key=lambda item: (item[0], int(item[1][0])))
    if host.model_type in TILES_SIDE_BY_SIDE:
        items = joined(items)
    elif host.model_type in PATCHES_SIDE_BY_SIDE:
        items = joined(items, one_view=True)
    shown = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
    items = [(row, *with_row_breaks(columns, views)) for row, columns, views in items]
    return [Picture(row, columns, views, shown[row, columns].bool()) for row, columns, views in items]


def stand_there(host: Host, capture: Capture, modality: str, places: Tensor, placeholder: int) -> bool:
    """Whether features stand at the places (t, 2) in the order in which they were computed.

    They stand in place of the ``placeholder`` token's embedding, or are added to it (Molmo 2).
    """
    features = capture.features[modality]
    items = [features] if isinstance(features, Tensor) else features
    embeds = capture.inputs_embeds
    computed = torch.cat([item.detach().reshape(-1, embeds.shape[-1]).to(embeds) for item in items])
    rows, columns = places.to(embeds.device).unbind(-1)
    found = embeds[rows, columns].detach()
    if torch.allclose(found, computed, rtol=0, atol=0, equal_nan=True):
        return True
    embedding = host.model.get_input_embeddings()
    with torch.no_grad():
        own = embedding(torch.tensor([placeholder], device=embedding_device(embedding, embeds.device)))
    return torch.allclose(found, computed + own.to(embeds), rtol=0, atol=0, equal_nan=True)


def views_of(host: Host, capture: Capture, modality: str) -> list[Tensor]:
    """For each image or video the views (t,) of its features, `SEPARATOR` at those that show nothing."""
    features = capture.features[modality]
    if modality == "image" and capture.packing is not None:
        return packed_views(capture.packing)
    width = capture.inputs_embeds.shape[-1]
    counts = [item.numel() // width for item in features]
    if modality == "video":
        return video_views(host, capture, counts)
    tile = getattr(host.base, "image_seq_len", None)
    if tile is not None and not isinstance(features, Tensor):  # Idefics3: all tiles of a row in one tensor
        counts = [tile for count in counts for _ in range(count // tile)]
    return [torch.zeros(count, dtype=torch.int64) for count in counts]


def packed_views(packing: Packing) -> list[Tensor]:
    """Which tile each token of packed images comes from: the model packs tile numbers in place of features.

    Numbers are packed as one-hot vectors, so that a model that resizes the grid mixes them as it mixes features; the
    tile with the largest part owns the token.
    """
    width = max(tiles for tiles, _ in packing.tiles)
    owners = [F.one_hot(torch.arange(v), width).float()[:, None].expand(-1, n, -1) for v, n in packing.tiles]
    packed = packing.replay(owners)
    return [torch.where(own.any(-1), own.argmax(-1), SEPARATOR) for own in packed]


def video_views(host: Host, capture: Capture, counts: Sequence[int]) -> list[Tensor]:
    """Frames of each video; where the model joins neighbouring frames in time, each joint one is a view."""
    grids = capture.arguments.get("video_grid_thw")
    if grids is not None:
        return [frame_numbers(count, int(grid[0])) for count, grid in zip(counts, grids, strict=True)]
    videos, frames = capture.arguments["pixel_values_videos"].shape[:2]
    if len(counts) == videos * frames:  # Video-LLaVA: frame by frame
        return [frame_numbers(sum(counts[v * frames : (v + 1) * frames]), frames) for v in range(videos)]
    newline = getattr(host.base, "image_newline", None)
    found = []
    for item in capture.features["video"]:
        tokens = item.reshape(-1, item.shape[-1])
        separators = torch.zeros(len(tokens), dtype=torch.bool)
        if newline is not None:
            separators = (tokens == newline.to(tokens.device, tokens.dtype)).all(-1).cpu()
        views = torch.full((len(tokens),), SEPARATOR)
        views[~separators] = frame_numbers(int((~separators).sum()), frames)
        found.append(views)
    return found


def frame_numbers(tokens: int, frames: int) -> Tensor:
    """(tokens,) 0, 0, ..., 1, 1, ...: which of the frames each token belongs to."""
    return torch.arange(tokens) // (tokens // frames)


def joined(items: Sequence[tuple[int, Tensor, Tensor]], one_view: bool = False) -> list[tuple[int, Tensor, Tensor]]:
    """Make one picture of tiles or patches that stand side by side, each a view or all of them one."""
    pictures: list[tuple[int, Tensor, Tensor]] = []
    for row, columns, views in items:
        if pictures and pictures[-1][0] == row and pictures[-1][1][-1] + 1 == columns[0]:
            _, before, earlier = pictures[-1]
            own = views if one_view else views + earlier.max() + 1
            pictures[-1] = row, torch.cat([before, columns]), torch.cat([earlier, own])
        else:
            pictures.append((row, columns, views))
    return pictures


def with_row_breaks(columns: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and views of a picture, with text tokens inside a view (Pixtral's row breaks) among its separators."""
    gaps = (columns.diff() > 1) & (views[1:] == views[:-1]) & (views[1:] != SEPARATOR)
    if not bool(gaps.any()):
        return columns, views
    breaks = torch.cat(
        [torch.arange(int(columns[gap]) + 1, int(columns[gap + 1])) for gap in gaps.nonzero().flatten()]
    )
    order = torch.cat([columns, breaks]).argsort()
    return torch.cat([columns, breaks])[order], torch.cat([views, torch.full_like(breaks, SEPARATOR)])[order]
