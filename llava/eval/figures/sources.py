"""Where figures come from: tokens, kept tokens and scores of a picture, as grids of the views that the model sees.

A token of a view is a cell of its grid. `Source.cells` says for each view which token stands in which cell; everything
else that is one number or vector a token follows from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt

import torch
from PIL import Image
from torch import Tensor

from llava.eval.audit.library import GRID, LibrarySubject
from llava.eval.audit.ours import OurSubject
from llava.eval.audit.subject import Subject
from llava.eval.figures.scores import token_scores
from llava.integrations.transformers.capture import capture_prompt
from llava.integrations.transformers.pictures import SEPARATOR, find_pictures
from llava.layout.tiles import anyres_grid
from llava.layout.views import NEWLINE, tiled_layout
from llava.pruning import Method

FEATURES = ("projector", "tower")
QUESTION = "What is in the image?"  # of a prompt that only the picture's tokens are read from


@dataclass(frozen=True)
class View:
    """A view of a picture as a grid.

    Args:
        tokens: (r, c, d) float32.
        shows: (r, c) bool, False at tokens of padding and in cells without a token.
        colours: (h, w, 3) float, 0 to 1: the view as the model got it.
    """

    tokens: Tensor
    shows: Tensor
    colours: Tensor


@dataclass(frozen=True)
class Look:
    """What a method made of a picture and a question, a grid (r, c) a view.

    Args:
        kept: bool.
        scores: by name, float; NaN in cells without a token and in views where nothing was chosen.
    """

    kept: list[Tensor]
    scores: Mapping[str, list[Tensor]]


class Source(ABC):
    """A loaded model whose tokens are looked at.

    Args:
        subject: the model with its prompts.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @abstractmethod
    def cells(self, picture: Image.Image) -> list[Tensor]:
        """For each view (r, c) int64: the number of the token in each cell among the picture's, -1 where none is."""

    @abstractmethod
    def tokens(self, picture: Image.Image, features: str) -> Tensor:
        """(t, d) of all tokens, after the projector or as the tower gave them. Raises ValueError where they are not
        one and the same number."""

    @abstractmethod
    def colours(self, picture: Image.Image) -> list[Tensor]:
        """Each view (h, w, 3) float, 0 to 1."""

    @abstractmethod
    def details(self, kept: object) -> Mapping[str, Tensor]:
        """(t,) float on the CPU of what a method told of every token, of an entry of ``handle.kept``."""

    def check(self, methods: list[tuple[str, Method]]) -> None:
        """Raise ValueError for a method that this model cannot host; before any picture is encoded."""
        for label, method in methods:
            try:
                with self.subject.attached(method):
                    pass
            except ValueError as error:
                raise ValueError(f"{label}: {error}") from error

    @torch.inference_mode()
    def views(self, picture: Image.Image, features: str = "projector", padding: bool = False) -> list[View]:
        """The views of a picture.

        Args:
            padding: count tokens of padding like any other.
        """
        tokens, eligible = self.tokens(picture, features).float().cpu(), self.subject.eligible(picture)
        found = []
        for cells, colours in zip(self.cells(picture), self.colours(picture), strict=True):
            place = cells.clamp_min(0)
            shows = cells >= 0
            found.append(View(tokens[place], shows if padding else shows & eligible[place], colours))
        return found

    @torch.inference_mode()
    def look(self, picture: Image.Image, question: str, method: Method) -> Look:
        """Ask about the picture with a method attached, and read what it kept and scored."""
        inputs = self.subject.inputs([picture], [question])
        with self.subject.attached(method) as handle:
            self.subject.model(**inputs, **self.subject.forward_options, use_cache=True)
            entry = handle.kept[0]
        kept, _, _ = self.subject.of_kept(entry)
        details, cells = self.details(entry), self.cells(picture)
        return Look(
            [kept[place.clamp_min(0)] & (place >= 0) for place in cells],
            {
                name: [torch.where(place >= 0, values[place.clamp_min(0)].float(), torch.nan) for place in cells]
                for name, values in details.items()
            },
        )


class OurSource(Source):
    """Our own LLaVA. Raises ValueError for one whose tokens count the class token."""

    subject: OurSubject

    def __init__(self, subject: OurSubject) -> None:
        super().__init__(subject)
        self.tower = subject.model.get_vision_tower()
        if self.tower.select_feature == "cls_patch":
            raise ValueError("this checkpoint's class token is among its patches, which then form no grid")

    def check(self, methods: list[tuple[str, Method]]) -> None:
        super().check(methods)
        for label, method in methods:
            lacking = method.needs & {"class_attention", "class_features"}
            if lacking and not self.tower.class_tokens:
                raise ValueError(
                    f"{label} reads the class token's {' and '.join(sorted(lacking))}, and this checkpoint's vision "
                    "tower has no class token"
                )

    def cells(self, picture: Image.Image) -> list[Tensor]:
        views, side = len(self._pixels(picture)), self.tower.num_patches_per_side
        return list(torch.arange(views * side * side).reshape(views, side, side))

    def tokens(self, picture: Image.Image, features: str) -> Tensor:
        encoded = self.subject.model.encode_pictures(self.subject.pixels([picture]), [picture.size])
        return (encoded.features if features == "projector" else encoded.encoder_features).flatten(0, 1)

    def colours(self, picture: Image.Image) -> list[Tensor]:
        return [_colours(view, self.subject.image_processor) for view in self._pixels(picture)]

    def _pixels(self, picture: Image.Image) -> Tensor:
        pixels = self.subject.pixels([picture])[0]
        return pixels if pixels.ndim == 4 else pixels[None]

    def details(self, kept: object) -> Mapping[str, Tensor]:
        if sum(len(answer.indices) for answer in kept.selections) != kept.layout.views:
            return {}  # inside the decoder, or a view without a token of its own
        parts = [token_scores(answer) for answer in kept.selections]
        return {name: torch.cat([part[name] for part in parts]).flatten().cpu() for name in parts[0]}


class LibrarySource(Source):
    """A class of the Transformers library: square views, tiles of LLaVA-NeXT, or one grid (Qwen2-VL and its like)."""

    subject: LibrarySubject

    def _inputs(self, picture: Image.Image) -> dict:
        return self.subject.inputs([picture], [QUESTION])

    def cells(self, picture: Image.Image) -> list[Tensor]:
        model, inputs = self.subject.model, self._inputs(picture)
        tokens = int((inputs["input_ids"] == self.subject.host.placeholders["image"]).sum())
        vision = model.config.vision_config
        if model.config.model_type == "llava_next":
            side = vision.image_size // vision.patch_size
            pinpoints = [(w, h) for h, w in self.subject.processor.image_processor.image_grid_pinpoints]
            grid = anyres_grid(picture.size, pinpoints, vision.image_size)
            sequence = tiled_layout(picture.size, grid, side, "spatial_unpad").sequence
            sequence = sequence[sequence != NEWLINE]
            cells = torch.full(((1 + grid[0] * grid[1]) * side * side,), -1)
            cells[sequence] = torch.arange(len(sequence))
            return list(cells.reshape(-1, side, side))
        if GRID in inputs:
            _, height, width = (int(length) for length in inputs[GRID][0])
            merge = vision.spatial_merge_size
            return [torch.arange(tokens).reshape(height // merge, width // merge)]
        views = len(inputs["pixel_values"].flatten(0, -4))
        side = isqrt(tokens // views)
        if side * side * views != tokens:
            raise ValueError(f"{tokens} tokens of {views} views of {type(model).__name__} form no square grids")
        return list(torch.arange(tokens).reshape(views, side, side))

    def tokens(self, picture: Image.Image, features: str) -> Tensor:
        inputs, host = self._inputs(picture), self.subject.host
        capture = capture_prompt(host, inputs, observe_projector=features == "tower")
        shown = find_pictures(host, capture, inputs["input_ids"], inputs.get("attention_mask"))[0]
        columns = shown.columns[shown.views != SEPARATOR]
        if features == "projector":
            return capture.inputs_embeds[0, columns.to(capture.inputs_embeds.device)]
        before = [part.reshape(-1, part.shape[-1]) for part in capture.projector_inputs]
        if sum(map(len, before)) != len(columns):
            raise ValueError(
                f"{type(self.subject.model).__name__}: what enters its projector is not one vector a token; "
                "--features projector reads what leaves it"
            )
        return torch.cat(before)

    def colours(self, picture: Image.Image) -> list[Tensor]:
        inputs, images = self._inputs(picture), self.subject.processor.image_processor
        if GRID in inputs:
            patch = self.subject.model.config.vision_config.patch_size
            _, height, width = (int(length) for length in inputs[GRID][0])
            return [_from_picture(picture.convert("RGB").resize((width * patch, height * patch)))]
        return [_colours(view, images) for view in inputs["pixel_values"].flatten(0, -4)[: len(self.cells(picture))]]

    def details(self, kept: object) -> Mapping[str, Tensor]:
        shown = kept.picture.views != SEPARATOR
        return {name: values[shown] for name, values in kept.details.items()}


def _colours(pixels: Tensor, processor: object) -> Tensor:
    """A view (3, h, w) as its processor normalised it -> (h, w, 3), 0 to 1."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return (pixels.float().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)


def _from_picture(picture: Image.Image) -> Tensor:
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.reshape(picture.height, picture.width, 3).float() / 255
