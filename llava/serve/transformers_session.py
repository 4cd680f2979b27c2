"""The command line on models of the Transformers library's own classes: ``--hf``."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.integrations.transformers import KeptPicture, VisualMemory
from llava.integrations.transformers.host import find_host
from llava.integrations.transformers.joint_space import reads_joint_space
from llava.integrations.transformers.loading import load_transformers_model
from llava.integrations.transformers.picture_sizes import check_picture_size
from llava.model.builder import pick_device
from llava.pruning import Method
from llava.serve.status import Stopped, Terminal, TimedStreamer, now, stoppable
from llava.serve.token_picture import with_caption
from llava.serve.transformers_picture import check_drawable, draw_kept
from llava.video import Video, video_inputs


class TransformersSession:
    """A loaded model, the pictures on the table, and the conversation about them; `Session` for ``--hf``.

    Every turn goes to the model as a whole, as a cache with a pruned prompt cannot be gone on with.

    Args:
        keep_features: whether ``last_kept`` holds the features of all tokens.
    """

    def __init__(self, arguments: argparse.Namespace, pruner: Method | None, keep_features: bool = False) -> None:
        self.arguments, self.keep_features = arguments, keep_features
        device = pick_device(arguments.device)
        dtype: Any = arguments.dtype
        if dtype == "auto" and device == "cpu":
            dtype = torch.float32
        self.processor, self.model = load_transformers_model(
            arguments.model_path, device, arguments.device_map, dtype, arguments.attn_implementation
        )
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(f"the processor of {arguments.model_path} has no chat template to write a prompt with")
        self.tokenizer = self.processor.tokenizer
        self.stopped = False
        self.listener = Terminal()
        self.memory = VisualMemory()  # of the pictures on the table
        self.use_pruner(pruner)
        self.pixels: Sequence[Image.Image] = []
        self.video: Video | None = None
        self.clear()

    def another(self, listener: Terminal) -> TransformersSession:
        """A session on the same loaded model with nothing on the table: one for each user of a page."""
        twin = copy.copy(self)
        twin.listener = listener
        twin.show()
        return twin

    def use_pruner(self, pruner: Method | None) -> None:
        """Select with this method from now on, if it can be attached. Raises ValueError where it cannot."""
        with self._attached(pruner):
            self.pruner = pruner

    def _attached(self, pruner: Method | None) -> Any:
        if pruner is None:
            return nullcontext()
        named = {}
        if reads_joint_space(pruner):  # methods are changed while the tower's CLIP stays what it is
            named = {"clip": self.arguments.clip_path, "siglip": self.arguments.siglip_path}
        return pruner(self.model, self.processor, **named, keep_features=self.keep_features, memory=self.memory)

    def clear(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def show(self, pictures: Sequence[Image.Image] = (), video: Video | None = None) -> None:
        """Put pictures or a video on the table and start a new conversation."""
        if video is not None:
            self._check_video()
        for picture in pictures:
            check_picture_size(picture.size, self.processor)
        self.clear()
        self.pixels, self.video = list(pictures), video
        self.memory = VisualMemory()

    def _check_video(self) -> None:
        """Raise ValueError where a video cannot be shown, or what is kept of it cannot be drawn."""
        reads_videos = getattr(self.processor, "video_processor", None) is not None
        if not reads_videos or "video" not in find_host(self.model).placeholders:
            raise ValueError(
                f"{type(self.model).__name__} with {type(self.processor).__name__} takes no videos here; processors "
                'with a part for videos need torchvision: pip install "script-llava[hf]"'
            )
        if self.arguments.show_tokens:
            raise ValueError("--show-tokens draws pictures, not videos, with --hf")

    def has_pictures(self) -> bool:
        return bool(self.pixels) or self.video is not None

    def shown(self) -> str:
        """The sizes of the pictures or frames: what they become in tokens is the processor's matter."""
        if self.video is not None:
            frame = self.video.frames[0]
            return f"{len(self.video.frames)} frames of {frame.width} x {frame.height} pixels"
        return ", ".join(f"{picture.width} x {picture.height} pixels" for picture in self.pixels)

    def model_line(self) -> str:
        """The model's name, class, device and type of numbers."""
        name, kind = str(self.arguments.model_path).rstrip("/").split("/")[-1], str(self.model.dtype)
        return f"{name} ({type(self.model).__name__}, {self.model.device}, {kind.removeprefix('torch.')})"

    def panel(self) -> Image.Image:
        """The tokens kept for the last question; with ``--captions`` it and its answer stand below."""
        drawn = draw_kept(self.model, self.processor, self.last_inputs, self.pixels, self.last_kept)
        return with_caption(drawn, *self.last_turn) if self.arguments.captions else drawn

    def first_inputs(self, question: str) -> Any:
        """What the processor makes of a conversation's first question and what is on the table."""
        return self._inputs(self._asked(question))

    def _asked(self, question: str) -> list[dict[str, Any]]:
        """The conversation with this question; the first one shows what is on the table."""
        content: list[dict[str, str]] = [{"type": "text", "text": question.replace(DEFAULT_IMAGE_TOKEN, "").strip()}]
        if not self.messages:
            shown = [{"type": "image"}] * len(self.pixels) + [{"type": "video"}] * (self.video is not None)
            content = shown + content
        return [*self.messages, {"role": "user", "content": content}]

    def _inputs(self, messages: Sequence[dict[str, Any]]) -> Any:
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        visuals: dict[str, Any] = {"images": list(self.pixels)} if self.pixels else {}
        if self.video is not None:
            visuals |= video_inputs([self.video])
        inputs = self.processor(text=text, return_tensors="pt", **visuals)
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def ask(self, question: str) -> str:
        """Answer a question in the conversation so far, telling the listener the words and a line about the work.

        Ctrl-C while the answer is written, or a listener that has enough, ends it there (``stopped``); what was
        written is in the conversation.
        """
        self.stopped = False
        messages = self._asked(question)
        inputs = self._inputs(messages)
        if self.pixels and self.arguments.show_tokens:
            check_drawable(self.model, inputs, self.pruner)
        options = self.arguments
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
        if options.temperature <= 0:
            sampling = {"do_sample": False, "temperature": None, "top_p": None}
        if options.repetition_penalty:
            sampling["repetition_penalty"] = options.repetition_penalty
        streamer = TimedStreamer(self.tokenizer, self.tokenizer.eos_token, self.listener)
        self.listener.stage("vision")
        with torch.inference_mode(), self._attached(self.pruner) as handle:
            if handle is not None:
                handle.query = question
            looks = int(handle is not None and self.has_pictures())  # of a pruner at the features
            start = now(self.model.device)
            with self._at_the_door(looks + 1) as door, self._remembered(inputs, handle), stoppable(streamer):
                output = self.model.generate(
                    **inputs, max_new_tokens=options.max_new_tokens, streamer=streamer, num_beams=1, **sampling
                )
        if door.refused:
            raise Stopped
        self.stopped, answer = streamer.stopped, streamer.written.strip()
        if not self.stopped:
            answer = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.last_inputs, self.last_kept = inputs, None if handle is None else handle.kept
        self.last_turn = question, answer
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        ids = inputs["input_ids"]
        total = sum(int((ids == placeholder).sum()) for placeholder in find_host(self.model).placeholders.values())
        times = [start, *door.times]
        if self.memory.reused and door.times:  # what the tower did not do is none of its time
            times[1:2] = []
            times.insert(0, start)
        before = dict(zip(("vision", "selection"), (end - begin for begin, end in pairwise(times)), strict=False))
        self.last_stages = streamer.stages(times[-1], **before)
        self.listener.line(status_line(total, None if handle is None else handle.kept, self.last_stages))
        return answer

    def _remembered(self, inputs: Any, handle: Any) -> Any:
        """The features of the pictures, if they were computed before; a pruner looks for them itself."""
        if handle is not None:
            return nullcontext()
        host = find_host(self.model)
        return self.memory.at_work(host, inputs, reuse=self.memory.holds(host, inputs))

    @contextmanager
    def _at_the_door(self, most: int) -> Iterator[Door]:
        """Note when the language model is entered, the first ``most`` times.

        A pruner's pass up to the language model comes before the model's own.
        """
        door = Door()

        def note(*_: Any) -> None:
            if len(door.times) == most:
                return
            door.times.append(now(self.model.device))
            try:
                self.listener.stage("selection" if len(door.times) < most else "answer")
            except Stopped:
                door.refused = True
                raise

        hook = find_host(self.model).language_model.register_forward_pre_hook(note)
        try:
            yield door
        finally:
            hook.remove()


@dataclass
class Door:
    """When the language model was entered, and whether the listener wanted no more there."""

    times: list[float] = field(default_factory=list)
    refused: bool = False


def status_line(total: int, kept: Sequence[KeptPicture] | None, stages: Mapping[str, float]) -> str:
    """One line after each answer: tokens kept of ``total`` placeholders there were, and where the time went."""
    parts = []
    if total and kept is None:
        parts.append(f"{total} of {total} visual tokens, nothing pruned")
    elif total:
        per_view = [count for picture in kept for count in picture.per_view]
        separators = sum(picture.separators for picture in kept)
        counts = f"{per_view[0]} x {len(per_view)}" if len(set(per_view)) == 1 else " + ".join(map(str, per_view))
        more = f", and {separators} newlines" if separators else ""
        parts.append(
            f"{sum(per_view)} of {sum(picture.tokens for picture in kept)} visual tokens ({counts} per view{more})"
            + decoder_counts(kept)
        )
    names = ("vision", "selection", "prefill") if total else ("prefill",)
    parts += [f"{name} {stages[name] * 1e3:.0f} ms" for name in names if name in stages]
    if "decode, per token" in stages:
        parts.append(f"decode {stages['decode, per token'] * 1e3:.1f} ms/token")
    return f"[{' | '.join(parts)}]"


def decoder_counts(kept: Sequence[KeptPicture]) -> str:
    """What the decoder's layers see, if a method inside it drops some."""
    if all(picture.per_layer is None for picture in kept):
        return ""
    average = sum(fmean(picture.per_layer or (len(picture.picture.columns),)) for picture in kept)
    return f" left after the last cut in the decoder, {average:.1f} averaged over its layers"
