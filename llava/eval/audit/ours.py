"""Our own LLaVA under audit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.eval.audit.subject import Subject, pooled
from llava.layout.visuals import IMAGE, Reading, Visuals
from llava.mm_utils import process_images, tokenizer_image_token, view_side
from llava.model.builder import find_template, load_pretrained_model
from llava.pruning import Method, get_pruner


class OurSubject(Subject):
    """A checkpoint in LLaVA's original format.

    Args:
        template: name of the conversation template; ``None`` takes the checkpoint's.
        grid: (width, height) in pixels for which every picture is cut, whatever its shape; ``None``: the checkpoint's.
        loading: further arguments of `load_pretrained_model`.

    Raises:
        ValueError: a grid for a checkpoint that cuts no tiles, or one that is not made of whole tiles.
    """

    forward_options: ClassVar[dict[str, Any]] = {"padding_side": "left"}

    def __init__(
        self, path: str, template: str | None = None, grid: tuple[int, int] | None = None, **loading: Any
    ) -> None:
        self.tokenizer, self.model, self.image_processor, _ = load_pretrained_model(path, **loading)
        self.template = conv_templates[template or find_template(path)]
        self.reading = Reading.of(self.model.config)
        if grid is not None:
            self.reading = self.reading.with_grid(grid, view_side(self.image_processor))

    @property
    def decoder(self) -> nn.Module:
        return self.model.get_model()

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor | list[Tensor]:
        """As the model takes them."""
        pixels = process_images(pictures, self.image_processor, self.reading)
        device, dtype = self.model.device, self.model.dtype
        return pixels.to(device, dtype) if isinstance(pixels, Tensor) else [p.to(device, dtype) for p in pixels]

    def visuals(self, pictures: Sequence[Image.Image]) -> Visuals:
        """Pictures with all that says how they are read."""
        return self.model.visuals(
            self.pixels(pictures), [picture.size for picture in pictures], IMAGE, reading=self.reading
        )

    def inputs(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> dict[str, Any]:
        rows = []
        for question in questions:
            conversation = self.template.copy()
            image = f"{DEFAULT_IMAGE_TOKEN}\n" if pictures else ""
            conversation.append_message(conversation.roles[0], f"{image}{question}")
            conversation.append_message(conversation.roles[1], None)
            rows.append(tokenizer_image_token(conversation.get_prompt(), self.tokenizer))
        longest = max(map(len, rows))
        ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
        for row, tokens in enumerate(rows):
            ids[row, longest - len(tokens) :], mask[row, longest - len(tokens) :] = torch.tensor(tokens), 1
        inputs: dict[str, Any] = {
            "input_ids": ids.to(self.model.device),
            "attention_mask": mask.to(self.model.device),
        }
        if pictures:
            inputs["images"] = self.visuals(pictures)
        return inputs

    def decoded(self, output: Tensor, inputs: dict[str, Any]) -> str:
        return self.tokenizer.decode(output, skip_special_tokens=True).strip()

    def attached(self, method: Method) -> Any:
        return method(self.model)

    def of_kept(self, kept: Any) -> tuple[Tensor, Tensor | None, int]:
        parts = [one.details["relevance"].flatten() for one in kept.selections if "relevance" in one.details]
        made = 0 if kept.made is None else int((kept.sequence >= kept.layout.eligible.numel()).sum())
        return kept.mask().flatten(), torch.cat(parts).float().cpu() if parts else None, made

    def choosable(self, kept: Any) -> list[Tensor]:
        return list(kept.layout.eligible.cpu())

    def coverage(self, image: Image.Image, canvas: Image.Image) -> Tensor:
        white, black = (self.pixels([one])[0].float().cpu() for one in (canvas, Image.new("RGB", image.size)))
        difference = (white - black).reshape(-1, *white.shape[-3:]).mean(1)  # (V, s, s), 0 where nothing is white
        tower = self.model.get_vision_tower()
        return pooled(difference / difference.max().clamp_min(1e-6), tower.num_patches).flatten()

    def smaller(self, image: Image.Image, tokens: int) -> tuple[Image.Image | None, Method | None]:
        return None, get_pruner("downsample", keep_tokens=tokens)
