"""Our own host as a model of lmms-eval: ``--model script_llava --model_args pretrained=...,pruner=...,keep_tokens=N``.

Batches are answered as our own runner answers them (`llava.eval.runner.answering`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.eval.lmms_eval.adapter import PrunedModel
from llava.eval.lmms_eval.answers import Answer
from llava.eval.lmms_eval.arguments import ModelArguments
from llava.eval.lmms_eval.requests import Asked, Decoding, Message, Visual, last_text
from llava.eval.runner import identity
from llava.eval.runner.answering import Prompt
from llava.eval.runner.loading import Checkpoint
from llava.layout.pooling import POOL_MODES
from llava.layout.views import NEWLINE_POSITIONS
from llava.layout.visuals import IMAGE, VIDEO, Reading
from llava.mm_utils import load_image, process_images, to_rgb, tokenizer_image_token
from llava.serve.flags import parse_grid
from llava.video import Video, load_video, process_video


@dataclass(frozen=True)
class LlavaArguments(ModelArguments):
    """Arguments of ``script_llava`` beside those of every model.

    Args:
        model_base: language model that a projector-only checkpoint belongs to.
        conv_template: the prompt's template; ``None`` takes it by the checkpoint's name.
        device_map: spread the language model over the GPUs of one process.
        joint_space_path: folder of the full SigLIP, see `load_pretrained_model`.
        image_grid: cut every picture for this resolution, such as 672x672.
        mm_spatial_pool_mode, mm_newline_position: how videos are read, in place of the checkpoint's own.
        force_sample: always ``max_frames_num`` frames, spread evenly; without it a frame a second where that is less.
        add_time_instruction: tell the model when the frames are, before the question.
    """

    model_base: str | None = None
    conv_template: str | None = None
    device_map: str | None = None
    joint_space_path: str | None = None
    image_grid: str | None = None
    mm_spatial_pool_mode: str | None = None
    mm_newline_position: str | None = None
    force_sample: bool = False
    add_time_instruction: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_grid is not None:
            parse_grid(self.image_grid, "the model argument image_grid")
        for name, valid in (
            ("conv_template", sorted(conv_templates)),
            ("mm_spatial_pool_mode", POOL_MODES),
            ("mm_newline_position", NEWLINE_POSITIONS),
        ):
            value = getattr(self, name)
            if value is not None and value not in valid:
                raise ValueError(f"the model argument {name} must be one of {', '.join(valid)}, got {value!r}")


# What changes no answer, or is told apart by more than its name.
NOT_COMPARED = ("pretrained", "model_base", "conv_template", "pruner", "keep_tokens", "pruner_args", "device")
NOT_COMPARED += ("image_grid", "on_error", "answers")


class LlavaModel(PrunedModel):
    """A checkpoint in LLaVA's original format, its visual tokens pruned before the language model."""

    Arguments = LlavaArguments

    def settings(self) -> dict[str, Any]:
        options = self.arguments
        grid = None if options.image_grid is None else parse_grid(options.image_grid)
        self.checkpoint = Checkpoint(options.pretrained, options.model_base, options.joint_space_path, grid)
        self.checkpoint.check(self.pruner)
        self.template = options.conv_template or self.checkpoint.template()
        return {
            "host": "llava",
            "form": "simple" if self.is_simple else "chat",
            "model": self.checkpoint.name,
            "checkpoint": identity.checkpoint_identity(options.pretrained, options.model_base),
            "conversation": self.template,
            "image_grid": grid,
            "pruner": None if self.pruner is None else {"name": self.pruner.name, **asdict(self.pruner)},
            **{name: value for name, value in vars(options).items() if name not in NOT_COMPARED},
            "device": identity.device_name(str(self.device)),
            **identity.code_of(self.pruner),
            "surface_code": identity.surface_code(__name__),
            "libraries": identity.library_versions(),
        }

    def load(self) -> None:
        options = self.arguments
        self.answerer = self.checkpoint.load(
            self.pruner,
            self.template,
            device=str(self.device),
            device_map=options.device_map,
            dtype=options.dtype,
            attn_implementation=options.attn_implementation,
        )
        self.model = self.answerer.model
        names = ("mm_spatial_pool_mode", "mm_newline_position")
        changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
        self.answerer.reading = Reading.of(self.answerer.reading or self.model.config, **changes)

    def read_visual(self, visual: Visual) -> Image.Image | Video:
        if visual.kind == VIDEO:
            if self.answerer.reading.mm_spatial_pool_mode is None:
                # No ValueError: the file is sound, and on_error=skip must not count every question as unreadable.
                raise NotImplementedError(
                    f"{visual.name} is a video, and {self.checkpoint.name} was not made for videos"
                )
            return load_video(visual.content, self.arguments.max_frames_num, force=self.arguments.force_sample)
        return load_image(visual.content) if isinstance(visual.content, str) else to_rgb(visual.content)

    def respond(self, batch: Sequence[tuple[Asked, list[Message], list[Any]]], decoding: Decoding) -> list[Answer]:
        prompts = [self._prompt_of(*one) for one in batch]
        replies = self.answerer.reply(prompts, decoding.options(), decoding.until)
        return [Answer(one.text, one.cost, one.prompt_tokens, one.new_tokens) for one in replies]

    def _prompt_of(self, asked: Asked, messages: Sequence[Message], visuals: Sequence[Image.Image | Video]) -> Prompt:
        return Prompt(
            tokenizer_image_token(self.prompt(messages, visuals), self.answerer.tokenizer, return_tensors="pt"),
            last_text(messages),
            asked.document,
            self._pixels(visuals),
            [(0, 0) if isinstance(visual, Video) else visual.size for visual in visuals],
            [VIDEO if isinstance(visual, Video) else IMAGE for visual in visuals],
        )

    def _pixels(self, visuals: Sequence[Image.Image | Video]) -> list[torch.Tensor]:
        """Of the visuals of one prompt, whose pictures are read together."""
        processor, pictures = self.answerer.image_processor, [v for v in visuals if not isinstance(v, Video)]
        of_pictures = iter(process_images(pictures, processor, self.answerer.reading) if pictures else ())
        return [process_video(v, processor) if isinstance(v, Video) else next(of_pictures) for v in visuals]

    def prompt(self, messages: Sequence[Message], visuals: Sequence[Image.Image | Video]) -> str:
        """The whole prompt, a placeholder at the place of each of the ``visuals``."""
        conversation = conv_templates[self.template].copy()
        coming = iter(visuals)
        for message in messages:
            times = [getattr(next(coming), "time_instruction", None) for _ in message.visuals]
            text = with_placeholders(message, times if self.arguments.add_time_instruction else ())
            if message.role == "system":
                conversation.system = system_like(conversation.system, text)
            else:
                conversation.append_message(conversation.roles[message.role == "assistant"], text)
        conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()


class SimpleLlava(LlavaModel):
    """Requests of a text and its visuals."""

    is_simple = True


class ChatLlava(LlavaModel):
    """Requests of chat messages."""

    is_simple = False


def with_placeholders(message: Message, after: Sequence[str | None] = ()) -> str:
    """A turn's text: neighbouring visuals on a line of their own, joined by spaces, as LLaVA's prompts have them.

    Args:
        after: for each visual a line that follows it, or ``None``.
    """
    lines = iter(after)
    text, before = "", None
    for part in message.parts:
        is_visual = isinstance(part, Visual)
        piece = DEFAULT_IMAGE_TOKEN if is_visual else part
        if is_visual and (line := next(lines, None)):
            piece += f"\n{line}"
        if before is not None and not message.running:
            text += " " if is_visual and before else "\n"
        text, before = text + piece, is_visual
    return text


def system_like(template: str, text: str) -> str:
    """A task's system text in place of the template's, behind the mark that the template begins its own with."""
    mark, separator, _ = template.partition("\n")
    return f"{mark}{separator}{text}" if mark.startswith("<|im_start|>") else text
