"""Models of the Transformers library under a pruner, as models of lmms-eval: ``--model script_transformers``.

The conversation is rendered by the processor's own chat template and the pruner attached as `llava.integrations.
transformers` attaches it, so what holds there (families, positions, joint spaces) holds here. Frames are read by
`llava.video`, as for our own host, and handed to the processor as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from llava.conversation import clean_question
from llava.eval.lmms_eval.adapter import PrunedModel
from llava.eval.lmms_eval.answers import Answer
from llava.eval.lmms_eval.arguments import ModelArguments
from llava.eval.lmms_eval.requests import Asked, Decoding, Message, Visual, last_text
from llava.eval.runner import identity
from llava.integrations.transformers.loading import check_processor
from llava.integrations.transformers.picture_sizes import check_picture_size
from llava.mm_utils import load_image, to_rgb
from llava.serve.flags import parse_grid
from llava.video import Video, load_video, video_inputs


@dataclass(frozen=True)
class TransformersArguments(ModelArguments):
    """Arguments of ``script_transformers`` beside those of every model.

    Args:
        device_map: spread the model over the GPUs of one process.
        positions, clip, siglip: of `AttachedPruner`.
        picture_size: "WxH": every picture is resized to so many pixels before the processor sees it; 896x896 makes
            InternVL's five tiles of any picture.
        force_sample: always ``max_frames_num`` frames, spread evenly; without it a frame a second where that is less.
    """

    device_map: str | None = None
    positions: str = "auto"
    clip: str | None = None
    siglip: str | None = None
    picture_size: str | None = None
    force_sample: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.picture_size is not None:
            parse_grid(self.picture_size, "the model argument picture_size")


# What is told apart by a name of its own, or changes no answer.
NOT_COMPARED = ("pruner", "keep_tokens", "pruner_args", "device", "on_error", "answers")


class TransformersModel(PrunedModel):
    """A class of the library with a processor that has a chat template."""

    Arguments = TransformersArguments

    def settings(self) -> dict[str, Any]:
        options = self.arguments
        return {
            "host": "transformers",
            "form": "simple" if self.is_simple else "chat",
            "model": options.pretrained.rstrip("/").rsplit("/", 1)[-1],
            "checkpoint": options.pretrained,
            "pruner": None if self.pruner is None else {"name": self.pruner.name, **asdict(self.pruner)},
            **{name: value for name, value in vars(options).items() if name not in NOT_COMPARED},
            "device": self.device.type,
            "code": identity.transformers_code(__name__),
            "method_code": None if self.pruner is None else identity.method_code(self.pruner),
            "libraries": identity.library_versions(),
        }

    def load(self) -> None:
        options = self.arguments
        self.processor = AutoProcessor.from_pretrained(options.pretrained)
        check_processor(self.processor, AutoConfig.from_pretrained(options.pretrained), options.pretrained)
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(f"the processor of {options.pretrained} has no chat template to write prompts with")
        self.model = AutoModelForImageTextToText.from_pretrained(
            options.pretrained,
            dtype=_dtype(options.dtype, self.device),
            device_map=options.device_map,
            attn_implementation=options.attn_implementation,
        ).eval()
        if options.device_map is None:
            self.model.to(self.device)
        self.handle = None
        if self.pruner is not None:
            space = {"clip": options.clip, "siglip": options.siglip}
            self.handle = self.pruner.attach(self.model, self.processor, positions=options.positions, **space)

    def read_visual(self, visual: Visual) -> Image.Image | Video:
        if visual.kind == "video":
            return load_video(visual.content, self.arguments.max_frames_num, force=self.arguments.force_sample)
        picture = load_image(visual.content) if isinstance(visual.content, str) else to_rgb(visual.content)
        if self.arguments.picture_size is not None:
            picture = picture.resize(parse_grid(self.arguments.picture_size), Image.BICUBIC)
        check_picture_size(picture.size, self.processor)
        return picture

    @torch.inference_mode()
    def respond(self, batch: Sequence[tuple[Asked, list[Message], list[Any]]], decoding: Decoding) -> list[Answer]:
        texts = [
            self.processor.apply_chat_template(chat_of(messages), add_generation_prompt=True, tokenize=False)
            for _, messages, _ in batch
        ]
        shown = [visual for _, _, visuals in batch for visual in visuals]
        pictures = [visual for visual in shown if not isinstance(visual, Video)]
        videos = [visual for visual in shown if isinstance(visual, Video)]
        visual_inputs: dict[str, Any] = {"images": pictures} if pictures else {}
        if videos:
            visual_inputs |= video_inputs(videos)
        inputs = self.processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **visual_inputs)
        inputs = inputs.to(self.device, self.model.dtype)
        options = decoding.options()
        if decoding.until:
            options |= {"stop_strings": list(decoding.until), "tokenizer": self.processor.tokenizer}
        if self.handle is not None:
            options["query"] = [clean_question(last_text(messages)) for _, messages, _ in batch]
        output = self.model.generate(**inputs, **options)
        new_ids = output[:, inputs["input_ids"].shape[1] :]
        costs, left = self._costs(inputs["input_ids"], len(batch))
        lengths = inputs["attention_mask"].sum(-1).tolist()
        answers = []
        for row, text in enumerate(self.processor.batch_decode(new_ids, skip_special_tokens=True)):
            cost = costs[row] if batch[row][2] else {}
            new_tokens = int((new_ids[row] != self.processor.tokenizer.pad_token_id).sum())
            answers.append(Answer(text, cost, lengths[row] - left[row], new_tokens))
        return answers

    def _costs(self, ids: torch.Tensor, rows: int) -> tuple[list[dict[str, float]], list[int]]:
        """For each prompt the visual tokens and newlines left in it, and how many positions were dropped."""
        if self.handle is None:
            marks = [getattr(self.model.config, f"{kind}_token_id", None) for kind in ("image", "video")]
            counts = sum((ids == mark).sum(-1) for mark in marks if mark is not None).tolist()
            return [{"visual_tokens": count, "newline_tokens": 0} for count in counts], [0] * rows
        costs = [{"visual_tokens": 0, "newline_tokens": 0} for _ in range(rows)]
        dropped = [0] * rows
        for one in self.handle.kept:
            cost = costs[one.picture.row]
            cost["visual_tokens"] += sum(one.per_view)
            cost["newline_tokens"] += one.separators
            dropped[one.picture.row] += int((~one.kept).sum())
        return costs, dropped


class SimpleTransformersModel(TransformersModel):
    """Requests of a text and its visuals."""

    is_simple = True


class ChatTransformersModel(TransformersModel):
    """Requests of chat messages."""

    is_simple = False


def chat_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A conversation as chat templates read it; visuals are given to the processor apart."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": part.kind} if isinstance(part, Visual) else {"type": "text", "text": part}
                for part in message.parts
            ],
        }
        for message in messages
    ]


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    """A dtype by its name; "auto" is the checkpoint's own, and float32 on a CPU. Raises ValueError."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be auto, float32, float16 or bfloat16, got {name!r}")
    return found
