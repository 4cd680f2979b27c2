"""Pictures as LLaVA-NeXT sees them, for stage 4: an overview and tiles, encoded by the trained tower."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from checkpoints import PINPOINTS
from files import write_bytes, write_with
from PIL import Image
from scenes import Layout, Scene, make_scene, scene_rng
from tower import vision_features
from tqdm import tqdm
from train_language import pick
from views import GRID, VIEW, compressed, patch_objects

from llava.layout.views import ViewLayout, kept_sequence, tiled_layout
from llava.mm_utils import anyres_grid, process_anyres_image
from llava.model.encoded_images import EncodedImages


def view_owners(scene: Scene) -> np.ndarray:
    """Which object covers each patch of the overview and of every tile: (V, 576)."""
    columns, rows = anyres_grid(scene.layout.size, PINPOINTS, VIEW)
    canvas = Image.new("L", (columns * VIEW, rows * VIEW), 255)
    scale = min(canvas.width / scene.layout.size[0], canvas.height / scene.layout.size[1])
    instances = Image.fromarray(scene.instances)
    fitted = instances.resize(tuple(round(scale * side) for side in scene.layout.size), Image.NEAREST)
    canvas.paste(fitted, ((canvas.width - fitted.width) // 2, (canvas.height - fitted.height) // 2))
    tiles = np.asarray(canvas).reshape(rows, VIEW, columns, VIEW).transpose(0, 2, 1, 3).reshape(-1, VIEW, VIEW)
    views = [np.asarray(instances.resize((VIEW, VIEW), Image.NEAREST)), *tiles]
    return np.stack([patch_objects(view, len(scene.layout.objects)) for view in views])


@dataclass
class TiledPictures:
    """``features`` (sum of V, 576, 128) float16 of all pictures, ``starts`` (N + 1,) the first view of each,
    ``owners`` one (V, 576) per picture.
    """

    features: np.ndarray
    starts: np.ndarray
    owners: list[np.ndarray]
    layouts: list[Layout]

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
        for view, owner in enumerate(self.owners[picture]):
            eligible = layout.eligible[view].numpy().nonzero()[0]
            patches = eligible[pick(owner[eligible], targets, tokens, rng, favour)]
            kept.append(torch.from_numpy(patches) + view * owner.size)
        numbers = torch.cat(kept)
        return ViewLayout(kept_sequence(layout, numbers, len(numbers), False), layout.eligible, layout.grid)


@torch.no_grad()
def tiled_pictures(folder: Path, split: str, number: int, clip, image_processor) -> TiledPictures:
    """The first ``number`` scenes of ``split``; stored in ``folder`` and read again at the next call."""
    features_path, rest_path = (folder / f"tiles-{split}-{number}.{kind}" for kind in ("npy", "pkl"))
    if not rest_path.exists():
        features, owners, layouts = [], [], []
        for index in tqdm(range(number), desc=f"tiles {split}", mininterval=5):
            scene = compressed(make_scene(split, index), scene_rng(split, index, 6))
            views = vision_features(clip, process_anyres_image(scene.image, image_processor, PINPOINTS))
            features.append(views[:, 1:].half().numpy())
            owners.append(view_owners(scene))
            layouts.append(scene.layout)
        write_with(features_path, lambda file: np.save(file, np.concatenate(features)))
        write_bytes(rest_path, pickle.dumps((owners, layouts)))
    owners, layouts = pickle.loads(rest_path.read_bytes())
    starts = np.concatenate(([0], np.cumsum([len(views) for views in owners])))
    return TiledPictures(np.load(features_path, mmap_mode="r"), starts, owners, layouts)
