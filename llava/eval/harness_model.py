"""Our own host as a model of lmms-eval: ``--model script_llava --model_args pretrained=...,pruner=...,keep_tokens=N``.

Integrations import `llava.pruning` and no other part of llava. This one drives `llava.model`, so it lives where models
are evaluated; `llava.integrations.lmms_eval` holds what does not need to know the host, and names this class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llava.checkpoint import find_folder
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import clean_question, conv_templates, template_for
from llava.eval import identity
from llava.eval.answering import cost_of
from llava.integrations.lmms_eval.adapter import PrunedModel
from llava.integrations.lmms_eval.answers import Answer
from llava.integrations.lmms_eval.arguments import ModelArguments
from llava.integrations.lmms_eval.requests import Asked, Decoding, Message, Visual
from llava.mm_utils import get_model_name_from_path, load_image, process_images, to_rgb, tokenizer_image_token
from llava.model.builder import check_files, load_pretrained_model, read_config


@dataclass(frozen=True)
class LlavaArguments(ModelArguments):
    """Arguments of ``script_llava`` beside those of every model.

    Args:
        model_base: language model that a projector-only checkpoint belongs to.
        conv_template: the prompt's template; ``None`` takes it by the checkpoint's name.
        device_map: spread the language model over the GPUs of one process.
    """

    model_base: str | None = None
    conv_template: str | None = None
    device_map: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conv_template is not None and self.conv_template not in conv_templates:
            raise ValueError(
                f"unknown conv_template {self.conv_template!r}; known ones: {', '.join(sorted(conv_templates))}"
            )


class LlavaModel(PrunedModel):
    """A checkpoint in LLaVA's original format, its visual tokens pruned before the language model."""

    Arguments = LlavaArguments

    def settings(self) -> dict[str, Any]:
        options = self.arguments
        folder = find_folder(options.pretrained)
        base_folder = folder if options.model_base is None else find_folder(options.model_base)
        check_files(folder, base_folder, read_config(folder), self.pruner)
        self.model_name = get_model_name_from_path(options.pretrained)
        self.template = options.conv_template or template_for(self.model_name)
        return {
            "host": "llava",
            "form": "simple" if self.is_simple else "chat",
            "model": self.model_name,
            "checkpoint": identity.checkpoint_identity(options.pretrained, options.model_base),
            "conversation": self.template,
            "pruner": None if self.pruner is None else {"name": self.pruner.name, **asdict(self.pruner)},
            "dtype": options.dtype,
            "attention": options.attn_implementation,
            "batch_size": options.batch_size,
            "device": identity.device_name(str(self.device)),
            "code": identity.code_version(),
            "libraries": identity.library_versions(),
        }

    def load(self) -> None:
        options = self.arguments
        self.tokenizer, self.model, self.image_processor, _ = load_pretrained_model(
            options.pretrained,
            options.model_base,
            device=str(self.device),
            device_map=options.device_map,
            dtype=options.dtype,
            attn_implementation=options.attn_implementation,
            pruner=self.pruner,
        )

    def read_visual(self, visual: Visual) -> Any:
        if visual.kind == "video":
            raise ValueError(f"{visual.name}: this checkpoint reads no videos")
        return load_image(visual.content) if isinstance(visual.content, str) else to_rgb(visual.content)

    @torch.inference_mode()
    def respond(self, batch: Sequence[tuple[Asked, list[Message], list[Any]]], decoding: Decoding) -> list[Answer]:
        prompts = [self.prompt(messages) for _, messages, _ in batch]
        rows = [tokenizer_image_token(prompt, self.tokenizer, return_tensors="pt") for prompt in prompts]
        length = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        shown = [visual for _, _, visuals in batch for visual in visuals]
        pixels = process_images(shown, self.image_processor, self.model.config) if shown else None
        embedded = self.model.embed_prompts(
            ids.to(self.device),
            mask.to(self.device),
            images=_moved(pixels, self.device),
            image_sizes=[picture.size for picture in shown] or None,
            pruner=self.pruner,
            query=[question_of(messages) for _, messages, _ in batch],
            sample_ids=[asked.document for asked, _, _ in batch],
            padding_side="left",
            truncate=False,
        )
        prompt_tokens = embedded.attention_mask.sum(-1).tolist()
        template_end = conv_templates[self.template].stop_string
        ends = [end for end in (template_end, *decoding.until) if end != self.tokenizer.eos_token]
        output = self.model.generate(
            embedded,
            **decoding.options(),
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            **({"stop_strings": ends, "tokenizer": self.tokenizer} if ends else {}),
        )
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        kept = iter(embedded.kept)
        answers = []
        for (_, _, visuals), text, new_ids, tokens in zip(batch, texts, output, prompt_tokens, strict=True):
            costs = [cost_of(next(kept), self.model.config) for _ in visuals]
            total = {name: sum(cost[name] for cost in costs) for name in (costs[0] if costs else {})}
            new_tokens = self._count_new(new_ids)
            answers.append(Answer(text.split(template_end)[0], total, tokens, new_tokens))
        return answers

    def prompt(self, messages: Sequence[Message]) -> str:
        """The whole prompt, a placeholder where each visual stands."""
        conversation = conv_templates[self.template].copy()
        for message in messages:
            text = with_placeholders(message)
            if message.role == "system":
                conversation.system = system_like(conversation.system, text)
            else:
                conversation.append_message(conversation.roles[message.role == "assistant"], text)
        conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()

    def _count_new(self, ids: torch.Tensor) -> int:
        """Tokens of an answer (t,) up to its end, without the padding of its batch."""
        ends = (ids == self.tokenizer.eos_token_id).nonzero()
        return int(ends[0]) + 1 if len(ends) else len(ids)


class SimpleLlava(LlavaModel):
    """Requests of a text and its visuals."""

    is_simple = True


class ChatLlava(LlavaModel):
    """Requests of chat messages."""

    is_simple = False


def with_placeholders(message: Message) -> str:
    """A turn's text: neighbouring visuals on a line of their own, joined by spaces, as LLaVA's prompts have them.

    A visual that its text has a place for stands there, without a line of its own.
    """
    text, before = "", None
    for part in message.parts:
        visual = isinstance(part, Visual)
        piece = DEFAULT_IMAGE_TOKEN if visual else part
        if before is None:
            text = piece
        elif visual and before:
            text += f" {piece}"
        elif visual or before:
            joint = "" if text.endswith(("\n", " ")) or piece.startswith(("\n", " ")) else "\n"
            text += joint + piece
        else:
            text += f"\n{piece}"
        before = visual
    return text


def question_of(messages: Sequence[Message]) -> str:
    """What the user asked last, without requests for a form of answer: what the pruner selects by."""
    last = next((message for message in reversed(messages) if message.role == "user"), None)
    return clean_question(last.text) if last is not None else ""


def system_like(template: str, text: str) -> str:
    """A task's system text in place of the template's, behind the mark that the template begins its own with."""
    mark, separator, _ = template.partition("\n")
    return f"{mark}{separator}{text}" if mark.startswith("<|im_start|>") else text


def _moved(pixels: Any, device: torch.device) -> Any:
    if pixels is None:
        return None
    return pixels.to(device) if isinstance(pixels, torch.Tensor) else [picture.to(device) for picture in pixels]
