"""Where figures come from: tokens, kept tokens and scores of a picture, as grids of the views that the model sees.

A token of a view is a cell of its grid. `Source.seen` says for each view which token stands in which cell; everything
else that is one number or vector a token follows from it. Our own LLaVA is here, the library's classes are in
library_source.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from llava.eval.audit.ours import OurSubject
from llava.eval.audit.subject import Subject
from llava.eval.figures.scores import token_scores
from llava.layout.views import ViewLayout
from llava.pruning import Method
from llava.serve.token_picture import view_colours

FEATURES = ("projector", "tower")


@dataclass(frozen=True)
class Seen:
    """A view as the model got it.

    Args:
        cells: (r, c) int64: the number of the token in each cell among the picture's, -1 where none is.
        colours: (h, w, 3) float, 0 to 1, of the part of the view that the cells cover.
        shows: (r, c) bool, False at tokens that show nothing but padding.
    """

    cells: Tensor
    colours: Tensor
    shows: Tensor


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
class Plane:
    """Views that lie side by side in the picture, and are drawn so.

    Args:
        name: "overview", "tiles" or "view 2"; empty where the picture is one view.
        views: rows of numbers of views, from the top.
    """

    name: str
    views: tuple[tuple[int, ...], ...]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """What views have, (r, c, ...) each, as one (R, C, ...); of those that are in the plane."""
        return torch.cat([torch.cat([parts[number] for number in row], dim=1) for row in self.views])


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
    def seen(self, picture: Image.Image) -> list[Seen]:
        """Its views. Raises ValueError where it is not known which part of the picture a token shows."""

    @abstractmethod
    def grid(self, picture: Image.Image) -> tuple[int, int] | None:
        """(columns, rows) of the tiles that the views after the first are, row by row; ``None`` if they are none."""

    @abstractmethod
    def tokens(self, picture: Image.Image, features: str) -> Tensor:
        """(t, d) of all tokens, after the projector or as the tower gave them. Raises ValueError where they are not
        one and the same number."""

    @abstractmethod
    def told(self, kept: Sequence[object]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """(t,) bool on the CPU which tokens were kept, and (t,) float what the method told of every token, by name.

        Args:
            kept: ``handle.kept`` after a call about one picture.
        """

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
        tokens = self.tokens(picture, features).float().cpu()
        return [
            View(tokens[one.cells.clamp_min(0)], one.cells >= 0 if padding else one.shows, one.colours)
            for one in self.seen(picture)
        ]

    def planes(self, picture: Image.Image) -> list[Plane]:
        """The views as they lie in the picture: tiles side by side, any other view by itself."""
        count, grid = len(self.seen(picture)), self.grid(picture)
        if grid is not None:
            columns, rows = grid
            tiles = tuple(tuple(range(1 + row * columns, 1 + (row + 1) * columns)) for row in range(rows))
            return [Plane("overview", ((0,),)), Plane("tiles", tiles)]
        return [Plane("" if count == 1 else f"view {number}", ((number,),)) for number in range(count)]

    @torch.inference_mode()
    def look(self, picture: Image.Image, question: str, method: Method) -> Look:
        """Ask about the picture with a method attached, and read what it kept and scored."""
        inputs = self.subject.inputs([picture], [question])
        with self.subject.attached(method) as handle:
            self.subject.model(**inputs, **self.subject.forward_options, use_cache=True)
            kept, details = self.told(handle.kept)
        cells = [one.cells for one in self.seen(picture)]
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

    def seen(self, picture: Image.Image) -> list[Seen]:
        pixels = self.subject.pixels([picture])[0]
        pixels = pixels if pixels.ndim == 4 else pixels[None]
        side = self.tower.num_patches_per_side
        covered = side * self.tower.config.patch_size
        cells = torch.arange(len(pixels) * side * side).reshape(-1, side, side)
        shows = self._layout(picture).eligible.reshape(cells.shape).cpu()
        colours = [view_colours(view, self.subject.image_processor).permute(1, 2, 0) for view in pixels]
        return [
            Seen(own, view[:covered, :covered], there) for own, view, there in zip(cells, colours, shows, strict=True)
        ]

    def grid(self, picture: Image.Image) -> tuple[int, int] | None:
        return self._layout(picture).grid

    def _layout(self, picture: Image.Image) -> ViewLayout:
        return self.subject.model.vision.layouts(self.subject.visuals([picture]))[0][0]

    def tokens(self, picture: Image.Image, features: str) -> Tensor:
        encoded = self.subject.model.encode_pictures(self.subject.visuals([picture]))
        return (encoded.features if features == "projector" else encoded.encoder_features).flatten(0, 1)

    def told(self, kept: Sequence[object]) -> tuple[Tensor, Mapping[str, Tensor]]:
        (entry,) = kept
        mask, parts = entry.mask().flatten().cpu(), entry.selections
        if sum(len(answer.indices) * answer.tokens for answer in parts) != mask.numel():
            return mask, {}  # inside the decoder, or a view that was left out
        scores = [token_scores(answer) for answer in parts]
        return mask, {name: torch.cat([part[name].flatten() for part in scores]).cpu() for name in scores[0]}
