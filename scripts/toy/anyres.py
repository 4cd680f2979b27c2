"""Pictures as LLaVA-NeXT sees them, for stage 4: an overview and tiles, encoded by the trained tower."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from checkpoints import PINPOINTS
from conversations import ViewMap
from files import write_bytes, write_with
from PIL import Image
from scenes import Layout, Scene, make_scene, scene_rng
from tower import vision_features
from tqdm import tqdm
from train_language import pick
from views import GRID, VIEW, compressed, patch_objects, patch_pixels

from llava.layout.views import ViewLayout, kept_sequence, tiled_layout
from llava.mm_utils import anyres_grid, process_anyres_image
from llava.model.encoded_images import EncodedImages


def cut_views(pixels: np.ndarray, size: tuple[int, int], fill: int) -> list[np.ndarray]:
    """A map of a picture of ``size`` as the overview and every tile show it: V of (336, 336)."""
    columns, rows = anyres_grid(size, PINPOINTS, VIEW)
    canvas = Image.new("L", (columns * VIEW, rows * VIEW), fill)
    scale = min(canvas.width / size[0], canvas.height / size[1])
    whole = Image.fromarray(pixels)
    fitted = whole.resize(tuple(round(scale * side) for side in size), Image.NEAREST)
    canvas.paste(fitted, ((canvas.width - fitted.width) // 2, (canvas.height - fitted.height) // 2))
    tiles = np.asarray(canvas).reshape(rows, VIEW, columns, VIEW).transpose(0, 2, 1, 3).reshape(-1, VIEW, VIEW)
    return [np.asarray(whole.resize((VIEW, VIEW), Image.NEAREST)), *tiles]


def view_maps(scene: Scene) -> list[ViewMap]:
    """What the patches of the overview and of every tile show."""
    layout = scene.layout
    instances = cut_views(scene.instances, layout.size, fill=255)
    letters = cut_views(scene.letters, layout.size, fill=0)
    return [
        ViewMap(patch_objects(where, len(layout.objects)), (patch_pixels(what) > 0).mean(1) > 0.6)
        for where, what in zip(instances, letters, strict=True)
    ]


@dataclass
class TiledPictures:
    """``features`` (sum of V, 576, 128) float16 of all pictures, ``starts`` (N + 1,) the first view of each,
    ``views`` what the patches of each show.
    """

    features: np.ndarray
    starts: np.ndarray
    views: list[list[ViewMap]]
    layouts: list[Layout]

    def maps(self, picture: int) -> list[ViewMap]:
        return self.views[picture]

    def encode(self, model, chosen, asked, tokens, rng, favour=True) -> EncodedImages:
        """Pictures ``chosen`` with ``tokens`` patches of each view, in the order a pruned model reads them."""
        rows, layouts = [], []
        for picture, targets in zip(chosen, asked, strict=True):
            rows.append(self.features[self.starts[picture] : self.starts[picture + 1]])
            size = self.layouts[picture].size
            layout = tiled_layout(size, anyres_grid(size, PINPOINTS, VIEW), GRID, "spatial_unpad")
            layouts.append(layout if tokens is None else self._subset(layout, picture, targets, tokens, rng, favour))
        features = torch.from_numpy(np.concatenate(rows)).float()
        return EncodedImages(model.get_model().mm_projector(features), features, layouts, layouts)

    def _subset(
        self, layout: ViewLayout, picture: int, targets: list[int], tokens: int, rng, favour: bool
    ) -> ViewLayout:
        kept = []
        for number, view in enumerate(self.views[picture]):
            eligible = layout.eligible[number].numpy().nonzero()[0]
            patches = eligible[pick(view.subset(eligible), targets, tokens, rng, favour)]
            kept.append(torch.from_numpy(patches) + number * view.owner.size)
        numbers = torch.cat(kept)
        return ViewLayout(kept_sequence(layout, numbers, len(numbers), False), layout.eligible, layout.grid)


@torch.no_grad()
def tiled_pictures(folder: Path, split: str, number: int, clip, image_processor) -> TiledPictures:
    """The first ``number`` scenes of ``split``, every other one a crowded one; stored in ``folder`` and read again at
    the next call.
    """
    features_path, rest_path = (folder / f"tiles-{split}-{number}.{kind}" for kind in ("npy", "pkl"))
    if not rest_path.exists():
        features, views, layouts = [], [], []
        for index in tqdm(range(number), desc=f"tiles {split}", mininterval=5):
            scene = make_scene(split, index, crowded=index % 2 == 1)
            scene = compressed(scene, scene_rng(split, index, 6))
            seen = vision_features(clip, process_anyres_image(scene.image, image_processor, PINPOINTS))
            features.append(seen[:, 1:].half().numpy())
            views.append(view_maps(scene))
            layouts.append(scene.layout)
        write_with(features_path, lambda file: np.save(file, np.concatenate(features)))
        write_bytes(rest_path, pickle.dumps((views, layouts)))
    views, layouts = pickle.loads(rest_path.read_bytes())
    starts = np.concatenate(([0], np.cumsum([len(some) for some in views])))
    return TiledPictures(np.load(features_path, mmap_mode="r"), starts, views, layouts)
