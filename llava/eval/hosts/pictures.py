"""Random pictures in the form that a class takes, and prompts with a placeholder for each token of them.

Which form that is, is read from the names of the arguments that a class's ``forward`` takes; where several fit, the
first is taken of which the class computes features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava.eval.hosts.tiny import END, IMAGE, START
from llava.integrations.transformers.capture import features_in
from llava.integrations.transformers.host import parts_of

Visual = dict[str, Tensor]
TILED_SIZES = torch.tensor([(28, 50), (56, 40), (56, 56)])  # (height, width)
PREFIX_TYPES = {"paligemma"}  # token types tell prompt and answer apart, not text and picture


@dataclass
class Pictures:
    """Three pictures for one class.

    Args:
        take: numbers of pictures, and how many of them each row of the batch shows -> arguments of ``forward``.
        patches: of the vision tower, in each picture; ``None`` where the form does not tell.
        form: what it is called.
    """

    take: Callable[[Sequence[int], Sequence[int]], Visual]
    patches: list[int] | None
    form: str


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def first(value: Any) -> int:
    return value[0] if isinstance(value, (list, tuple)) else value


def setting(config: Any, *names: str, default: int = 1) -> int:
    """The first of several fields that a configuration has."""
    found = (getattr(config, name, None) for name in names)
    return next((first(value) for value in found if value is not None), default)


# --- forms ---------------------------------------------------------------------------------------------------------


def in_grids(config: Any) -> Iterator[Pictures]:
    """Qwen's: patches of all pictures in one row, and the grid of each."""
    vision = config.vision_config
    patch, frames = setting(vision, "patch_size"), setting(vision, "temporal_patch_size", "patch_temporal")
    channels = setting(vision, "in_channels", "in_chans", "num_channels", default=3)
    merge = setting(vision, "spatial_merge_size", "merge_size", "merge_kernel_size", default=0) or setting(
        config, "spatial_merge_size", "merge_kernel_size", "downsample_factor", default=2
    )
    grids = torch.tensor([[1, 4, 3], [1, 2, 4], [1, 4, 4]]) * torch.tensor([1, merge, merge])
    sizes = grids.prod(-1).tolist()
    for frame_count in dict.fromkeys((frames, 1)):
        for shape in ((channels * frame_count * patch * patch,), (channels, patch, patch)):
            pieces = noise(sum(sizes), *shape).split(sizes)

            def take(shown: Sequence[int], _: Sequence[int], pieces: Sequence[Tensor] = pieces) -> Visual:
                return {
                    "pixel_values": torch.cat([pieces[i] for i in shown]),
                    "image_grid_thw": grids[list(shown)],
                    "image_merge_sizes": torch.full((len(shown),), merge),
                }

            yield Pictures(take, sizes, "grid")
    cells = (grids // torch.tensor([1, merge, merge])).prod(-1).tolist()
    squares = noise(sum(cells), merge * patch, merge * patch, channels).split(cells)

    def take_cells(shown: Sequence[int], _: Sequence[int]) -> Visual:  # the grid counts what becomes a token
        return {
            "pixel_values": torch.cat([squares[i] for i in shown]),
            "image_grid_thw": grids[list(shown)] // torch.tensor([1, merge, merge]),
        }

    yield Pictures(take_cells, sizes, "grid")


def in_areas(config: Any) -> Iterator[Pictures]:
    """Nemotron's: patches of all pictures in one row, and rows and columns of each."""
    patch = setting(config.vision_config, "patch_size")
    grids = torch.tensor([(8, 6), (4, 8), (8, 8)])
    sizes = grids.prod(-1).tolist()
    pieces = noise(sum(sizes), 3 * patch * patch).split(sizes)

    def take(shown: Sequence[int], _: Sequence[int]) -> Visual:
        return {"pixel_values": torch.cat([pieces[i] for i in shown]), "image_grid_hw": grids[list(shown)]}

    yield Pictures(take, sizes, "areas")


def in_tiles(config: Any) -> Iterator[Pictures]:
    """LLaVA-NeXT's: an overview and four tiles, packed by the model."""
    size = setting(config.vision_config, "image_size")
    pixels = noise(3, 5, 3, size, size)

    def take(shown: Sequence[int], per_row: Sequence[int]) -> Visual:
        return {
            "pixel_values": pixels[list(shown)],
            "image_sizes": TILED_SIZES[list(shown)] * size // 28,
            "batch_num_images": torch.tensor([count for count in per_row if count]),
        }

    yield Pictures(take, None, "tiles")


def in_rows(config: Any) -> Iterator[Pictures]:
    """Idefics's: (rows, most pictures of a row, 3, s, s), zeros where a row has fewer."""
    size, patch = setting(config.vision_config, "image_size"), setting(config.vision_config, "patch_size")
    pixels = noise(3, 3, size, size)

    def take(shown: Sequence[int], per_row: Sequence[int]) -> Visual:
        rows = pixels.new_zeros(len(per_row), max(per_row), *pixels.shape[1:])
        numbers = iter(shown)
        for row, count in enumerate(per_row):
            for place in range(count):
                rows[row, place] = pixels[next(numbers)]
        return {"pixel_values": rows}

    yield Pictures(take, [(size // patch) ** 2] * 3, "rows")

    def take_tiles(shown: Sequence[int], per_row: Sequence[int]) -> Visual:  # padding tiles are told by the mask
        places = torch.arange(max(per_row)) < torch.tensor(per_row)[:, None]
        return take(shown, per_row) | {"pixel_attention_mask": places}

    yield Pictures(take_tiles, [(size // patch) ** 2] * 3, "rows")


def in_strips(config: Any) -> Iterator[Pictures]:
    """MiniCPM-V's: patches of all pictures side by side, and the grid of each."""
    patch = setting(config.vision_config, "patch_size")
    grids = torch.tensor([(8, 12), (8, 8), (12, 8)])
    sizes = grids.prod(-1).tolist()
    pieces = noise(1, 3, patch, sum(sizes) * patch).split([size * patch for size in sizes], dim=-1)

    def take(shown: Sequence[int], _: Sequence[int]) -> Visual:
        return {"pixel_values": torch.cat([pieces[i] for i in shown], -1), "target_sizes": grids[list(shown)]}

    yield Pictures(take, sizes, "strips")


def in_pools(config: Any) -> Iterator[Pictures]:
    """Molmo 2's: crops of flat patches, and which patches each token pools."""
    patch = setting(config.vision_config, "patch_size")
    pixels = noise(3, 16, 3 * patch * patch)
    pooled = torch.arange(16).reshape(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)  # 2 x 2 patches a token

    def take(shown: Sequence[int], _: Sequence[int]) -> Visual:
        chosen = list(shown)
        return {
            "pixel_values": pixels[chosen],
            "image_token_pooling": torch.cat([pooled + 16 * number for number in range(len(chosen))]),
            "image_grids": torch.tensor([(2, 2, 0, 0)] * len(chosen)),
            "image_num_crops": torch.ones(len(chosen), dtype=torch.int64),
        }

    yield Pictures(take, [16] * 3, "pools")


def in_patches(config: Any) -> Iterator[Pictures]:
    """SigLIP 2's: patches of each picture, and its shape."""
    patch = setting(config.vision_config, "patch_size")
    shapes = torch.tensor([(4, 4), (4, 4), (4, 4)])
    pixels = noise(3, 16, 3 * patch * patch)

    def take(shown: Sequence[int], _: Sequence[int]) -> Visual:
        chosen = list(shown)
        mask = torch.ones(len(chosen), 16, dtype=torch.int64)
        return {"pixel_values": pixels[chosen], "spatial_shapes": shapes[chosen], "pixel_attention_mask": mask}

    yield Pictures(take, [16] * 3, "patches")


def in_places(config: Any) -> Iterator[Pictures]:
    """Gemma 4's: patches of each picture, and the place of each patch."""
    patch = setting(config.vision_config, "patch_size", "model_patch_size")
    side = 2 * setting(config.vision_config, "pooling_kernel_size", default=2)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)
    for width in dict.fromkeys((patch, setting(config.vision_config, "model_patch_size", default=patch))):
        pixels = noise(3, side * side, 3 * width * width).sigmoid()

        def take(shown: Sequence[int], _: Sequence[int], pixels: Tensor = pixels) -> Visual:
            chosen = list(shown)
            return {"pixel_values": pixels[chosen], "image_position_ids": places.expand(len(chosen), -1, -1)}

        yield Pictures(take, [side * side] * 3, "places")


def whole(config: Any) -> Iterator[Pictures]:
    """A square picture; with its size for towers that take any."""
    vision = getattr(config, "vision_config", config)
    vision = getattr(vision, "sam_config", vision)
    size, patch = setting(vision, "image_size", default=28), setting(vision, "patch_size", default=7)
    pixels = noise(3, 3, size, size)
    high = setting(getattr(config, "high_res_vision_config", None), "image_size")

    for with_sizes in (False, True):

        def take(shown: Sequence[int], _: Sequence[int], with_sizes: bool = with_sizes) -> Visual:
            chosen = list(shown)
            visual = {"pixel_values": pixels[chosen], "high_res_pixel_values": noise(3, 3, high, high)[chosen]}
            sizes = {"image_sizes": torch.tensor([(size, size)] * len(chosen))}
            return visual | (sizes if with_sizes else {})

        yield Pictures(take, [(size // patch) ** 2] * 3, "picture")

    def take_tile(shown: Sequence[int], _: Sequence[int]) -> Visual:
        return {"pixel_values": pixels[list(shown)][:, None]}

    yield Pictures(take_tile, [(size // patch) ** 2] * 3, "one tile")

    frames = setting(vision, "temporal_patch_size")
    cubes = noise(3, 16, frames, patch, patch, 3)

    def take_cubes(shown: Sequence[int], _: Sequence[int]) -> Visual:  # patches of all pictures, one by one
        return {"pixel_values": cubes[list(shown)].flatten(0, 1)}

    yield Pictures(take_cubes, [16] * 3, "cubes")


def as_flat_patches(config: Any) -> Iterator[Pictures]:
    """Fuyu's: a row of patches for each picture."""
    pixels = noise(3, 6, 3 * config.patch_size**2)

    def take(shown: Sequence[int], _: Sequence[int]) -> Visual:
        return {"image_patches": pixels[list(shown)], "pixel_values": pixels[list(shown)]}

    yield Pictures(take, [6] * 3, "flat patches")


def forms(model: nn.Module) -> Iterator[Pictures]:
    """The forms that a class may take, by the arguments of its ``forward``."""
    names, config = set(inspect.signature(type(model).forward).parameters), model.config
    if "image_grid_thw" in names:
        yield from in_grids(config)
    elif "image_grid_hw" in names:
        yield from in_areas(config)
    elif "target_sizes" in names:
        yield from in_strips(config)
    elif "image_token_pooling" in names:
        yield from in_pools(config)
    elif "image_patches" in names:
        yield from as_flat_patches(config)
    elif "spatial_shapes" in names:
        yield from in_patches(config)
    elif "image_position_ids" in names:
        yield from in_places(config)
    elif hasattr(parts_of(model)[0], "pack_image_features") and "image_sizes" in names:
        yield from in_tiles(config)
    elif "pixel_attention_mask" in names:
        yield from in_rows(config)
    yield from whole(config)


# --- prompts -------------------------------------------------------------------------------------------------------


@dataclass
class Prompts:
    """Prompts for a class: row 0 shows picture 0, row 1 pictures 1 and 2."""

    model: nn.Module
    pictures: Pictures

    def __post_init__(self) -> None:
        self.names = set(inspect.signature(type(self.model).forward).parameters)
        self.base, _ = parts_of(self.model)
        self.feature_names = set(inspect.signature(type(self.base).get_image_features).parameters)
        self.counts = self._counts()

    def visual(self, shown: Sequence[int], per_row: Sequence[int]) -> Visual:
        taken = self.pictures.take(shown, per_row)
        names = {name for name in taken if name in self.names}
        if "image_patches" in names:
            names.discard("pixel_values")
        return {name: value for name, value in taken.items() if name in names}

    def _features(self, shown: Sequence[int], per_row: Sequence[int]) -> Any:
        taken = self.pictures.take(shown, per_row)
        named = {name: value for name, value in taken.items() if name in self.feature_names}
        with torch.no_grad():
            return features_in(self.base.get_image_features(**named))

    def _counts(self) -> list[int]:
        """Tokens of each picture."""
        together = self._features([0, 1, 2], [1, 2])
        if not isinstance(together, Tensor) and len(together) == 3:
            return [item.numel() // item.shape[-1] for item in together]
        counts = []
        for number in range(3):
            alone = self._features([number], [1])
            items = [alone] if isinstance(alone, Tensor) else alone
            counts.append(sum(item.numel() // item.shape[-1] for item in items))
        return counts

    def _line(self, before: Sequence[int], shown: Sequence[int], after: Sequence[int]) -> list[int]:
        line = [1, *before]
        for number in shown:
            line += [START, *[IMAGE] * self.counts[number], END, 7]
        return [*line, *after]

    def batch(self) -> dict[str, Tensor]:
        return self._arguments([0, 1])

    def single(self, row: int) -> dict[str, Tensor]:
        return self._arguments([row])

    def _arguments(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Arguments of a call with some of the rows, padded on the left."""
        shown = {0: [0], 1: [1, 2]}
        lines = [
            self._line([5, 6, 9], [0], [11, 12, 13, 14, 15])
            if row == 0
            else self._line([8, 9], [1, 2], [21, 22, 23, 24])
            for row in rows
        ]
        width = max(map(len, lines))
        ids = torch.tensor([[0] * (width - len(line)) + line for line in lines])
        mask = torch.tensor([[0] * (width - len(line)) + [1] * len(line) for line in lines])
        arguments = {"input_ids": ids, "attention_mask": mask}
        types = (ids == IMAGE).long()
        for name in ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"):
            if name in self.names:
                prefix = name == "token_type_ids" and self.model.config.model_type in PREFIX_TYPES
                arguments[name] = torch.zeros_like(types) if prefix else types
        return arguments | self.visual(
            [number for row in rows for number in shown[row]], [len(shown[row]) for row in rows]
        )


def prompts_for(model: nn.Module) -> Prompts:
    """Prompts with pictures in the first form that the class computes features of.

    Raises:
        ValueError: none of the forms; says what the class made of each.
    """
    problems = []
    for pictures in forms(model):
        try:
            return Prompts(model, pictures)
        except Exception as error:  # whatever a class says to pictures that are not in its form
            problems.append(f"{pictures.form}: {type(error).__name__}: {error}")
    raise ValueError(f"no form of a picture is known that it takes ({'; '.join(problems)})")
