"""A model of the Transformers library's own classes under audit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from llava.eval.audit.subject import Subject, pooled
from llava.integrations.transformers.host import find_host
from llava.integrations.transformers.loading import load_transformers_model
from llava.integrations.transformers.pictures import SEPARATOR
from llava.layout.tiles import anyres_grid
from llava.layout.views import NEWLINE, tiled_layout
from llava.pruning import Method
from llava.pruning.question_reader import QuestionReader

GRID = "image_grid_thw"


class LibrarySubject(Subject):
    """A folder or hub name that the library's auto classes load.

    Args:
        clip, siglip: the joint space's model, as `AttachedPruner` takes it; for methods that read one.

    Raises:
        ValueError: the model cannot be pruned, or its processor has no chat template.
    """

    def __init__(self, path: str, device: str, dtype: Any, clip: str | None = None, siglip: str | None = None) -> None:
        if dtype == "auto" and device == "cpu":
            dtype = torch.float32
        self.processor, self.model = load_transformers_model(path, device, None, dtype, None)
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(f"the processor of {path} has no chat template to write a prompt with")
        self.processor.tokenizer.padding_side = "left"
        self.host = find_host(self.model)
        self.spaces = {"clip": clip, "siglip": siglip}

    @property
    def decoder(self) -> nn.Module:
        return self.host.language_model

    def inputs(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> dict[str, Any]:
        parts = [{"type": "image"}] if pictures else []
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for question in questions
        ]
        images = [[picture] for picture in pictures] or None
        inputs = self.processor(images=images, text=texts, return_tensors="pt", padding=len(texts) > 1)
        return dict(inputs.to(self.model.device, dtype=self.model.dtype))

    def decoded(self, output: Tensor, inputs: dict[str, Any]) -> str:
        new = output[inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()

    def attached(self, method: Method) -> Any:
        reads_one = isinstance(method, QuestionReader) and method.relevance in ("auto", "clip")
        return method(self.model, self.processor, **(self.spaces if reads_one else {}))

    def of_kept(self, kept: Any) -> tuple[Tensor, Tensor | None, int]:
        shows = kept.picture.views != SEPARATOR
        return kept.as_they_are[shows], None if kept.scores is None else kept.scores[shows], kept.count_made

    def choosable(self, kept: Any) -> list[Tensor]:
        picture = kept.picture
        return [picture.attended[picture.views == view] for view in range(picture.count)]

    def coverage(self, image: Image.Image, canvas: Image.Image) -> Tensor:
        white, black = (self.inputs([one], ["?"]) for one in (canvas, Image.new("RGB", image.size)))
        pixels = (white["pixel_values"].float() - black["pixel_values"].float()).cpu()
        vision = self.model.config.vision_config
        if GRID in white:  # patches in groups of those that become one token
            share = pixels.mean(-1).reshape(-1, vision.spatial_merge_size**2).mean(-1)
            return share / share.max().clamp_min(1e-6)
        planes = pixels.flatten(0, -4).mean(1)  # (V, s, s)
        planes = planes / planes.max().clamp_min(1e-6)
        tokens = int((white["input_ids"] == self.host.placeholders["image"]).sum())
        if self.model.config.model_type == "llava_next":
            side = vision.image_size // vision.patch_size
            pinpoints = [(w, h) for h, w in self.processor.image_processor.image_grid_pinpoints]
            grid = anyres_grid(image.size, pinpoints, vision.image_size)
            sequence = tiled_layout(image.size, grid, side, "spatial_unpad").sequence
            return pooled(planes[: 1 + grid[0] * grid[1]], side * side).flatten()[sequence[sequence != NEWLINE]]
        if tokens % len(planes):
            raise ValueError(f"{type(self.model).__name__}: boxes cannot be found among {tokens} tokens of its views")
        return pooled(planes, tokens // len(planes)).flatten()

    def smaller(self, image: Image.Image, tokens: int) -> tuple[Image.Image | None, Method | None]:
        inputs = self.inputs([image], ["?"])
        if GRID not in inputs:
            return None, None
        now = int((inputs["input_ids"] == self.host.placeholders["image"]).sum())
        scale = (tokens / now) ** 0.5
        return image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1))), None
