"""Tokens, kept tokens and scores of a class of the Transformers library, as grids of the views that it sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from llava.eval.audit.library import LibrarySubject
from llava.eval.figures.sources import Seen, Source
from llava.integrations.transformers import KeptPicture
from llava.integrations.transformers.capture import Capture, capture_prompt
from llava.integrations.transformers.pictures import SEPARATOR, find_pictures
from llava.serve.transformers_picture import check_drawable, seen_views

QUESTION = "What is in the image?"  # of a prompt that only the picture's tokens are read from


@dataclass(frozen=True)
class Prompt:
    """A picture in a prompt of its own.

    Args:
        image: the picture that was given.
        parts: what it became in the prompt, with all tokens kept: more than one where text stands between its tiles.
    """

    image: Image.Image
    capture: Capture
    parts: list[KeptPicture]
    seen: list[Seen]
    grid: tuple[int, int] | None

    @property
    def columns(self) -> Tensor:
        """(t,) places in the prompt of all tokens, newlines and row breaks among them."""
        return torch.cat([part.picture.columns for part in self.parts])

    @property
    def stands_alone(self) -> Tensor:
        """(t,) bool, False at newlines and row breaks."""
        return torch.cat([part.picture.views != SEPARATOR for part in self.parts])


class LibrarySource(Source):
    """Square or upright views, tiles (LLaVA-NeXT, InternVL), or one grid (Qwen2-VL and its like).

    Tokens are numbered over all that a picture became in the prompt, newlines and row breaks among them.
    """

    subject: LibrarySubject

    def __init__(self, subject: LibrarySubject) -> None:
        super().__init__(subject)
        self._last: Prompt | None = None

    @torch.inference_mode()
    def prompt(self, picture: Image.Image) -> Prompt:
        """The picture in a prompt; that of the last picture is remembered.

        Raises:
            ValueError: it is not known which part of the picture a token shows.
        """
        if self._last is not None and self._last.image is picture:
            return self._last
        subject, model = self.subject, self.subject.model
        inputs = subject.inputs([picture], [QUESTION])
        try:
            check_drawable(model, inputs, None)
        except ValueError:
            raise self._unknown() from None
        capture = capture_prompt(subject.host, inputs, observe_projector=True)
        found = find_pictures(subject.host, capture, inputs["input_ids"], inputs.get("attention_mask"))
        parts = [KeptPicture(one, torch.ones(len(one.columns), dtype=torch.bool)) for one in found]
        views = seen_views(model, subject.processor, inputs, [picture], parts)
        # A picture all white beside one all black: they differ where the picture is and not its padding.
        covers = []
        for shade in ("white", "black"):
            plain = Image.new("RGB", picture.size, shade)
            of_plain = subject.inputs([plain], [QUESTION])
            covers.append(seen_views(model, subject.processor, of_plain, [plain], parts))
        first = torch.tensor([0, *(len(part.kept) for part in parts)]).cumsum(0)
        seen = []
        for view, white, black in zip(views, *covers, strict=True):
            cells = torch.where(view.tokens >= 0, view.tokens + first[view.picture], -1)
            lit = (torch.tensor(white.colours).float() - torch.tensor(black.colours).float()).mean(-1)
            shows = (adaptive_avg_pool2d(lit[None], cells.shape)[0] > 0) & (cells >= 0)
            seen.append(Seen(cells, torch.tensor(view.colours).float() / 255, shows))
        self._last = Prompt(picture, capture, parts, seen, views[0].grid)
        placed = torch.cat([one.cells[one.cells >= 0] for one in seen])
        whole = self._last.stands_alone.nonzero().flatten()
        if not torch.equal(placed.sort().values, whole) or not _views_agree(seen, parts):
            self._last = None
            raise self._unknown()
        return self._last

    def _unknown(self) -> ValueError:
        name = type(self.subject.model).__name__
        return ValueError(f"it is not known where the visual tokens of {name} stand in its pictures")

    def seen(self, picture: Image.Image) -> list[Seen]:
        return self.prompt(picture).seen

    def grid(self, picture: Image.Image) -> tuple[int, int] | None:
        return self.prompt(picture).grid

    def tokens(self, picture: Image.Image, features: str) -> Tensor:
        prompt = self.prompt(picture)
        if features == "projector":
            embeds = prompt.capture.inputs_embeds
            return embeds[0, prompt.columns.to(embeds.device)]
        rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in prompt.capture.projector_inputs])
        alone, packing = prompt.stands_alone, prompt.capture.packing
        if packing is not None and packing.tiles == [(len(prompt.seen), len(rows) // len(prompt.seen))]:
            return packing.replay([rows.reshape(*packing.tiles[0], -1)])[0]
        if len(rows) != int(alone.sum()):
            raise ValueError(
                f"{type(self.subject.model).__name__}: what enters its projector is not one vector a token; "
                "--features projector reads what leaves it"
            )
        found = rows.new_full((len(alone), rows.shape[-1]), torch.nan)
        found[alone.to(rows.device)] = rows
        return found

    def told(self, kept: Sequence[KeptPicture]) -> tuple[Tensor, Mapping[str, Tensor]]:
        details = [one.details for one in kept]
        names = [name for name in details[0] if all(name in one for one in details)]
        return (
            torch.cat([one.kept for one in kept]).cpu(),
            {name: torch.cat([one[name] for one in details]) for name in names},
        )


def _views_agree(seen: Sequence[Seen], parts: Sequence[KeptPicture]) -> bool:
    """Whether the tokens of each grid are those of one view, as the model itself packed them."""
    start, owners = 0, []
    for part in parts:
        views = part.picture.views
        owners.append(torch.where(views == SEPARATOR, SEPARATOR, views + start))
        start += part.picture.count
    owner = torch.cat(owners)
    found = [owner[one.cells[one.cells >= 0]].unique() for one in seen]
    return all(len(one) <= 1 for one in found) and len(torch.cat(found).unique()) == sum(map(len, found))
