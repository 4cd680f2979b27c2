"""The command line on models of the Transformers library's own classes: ``--hf``."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from statistics import fmean
from typing import Any

import torch
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.integrations.transformers import KeptPicture
from llava.integrations.transformers.host import find_host
from llava.integrations.transformers.loading import load_transformers_model
from llava.integrations.transformers.picture_sizes import check_picture_size
from llava.model.builder import pick_device
from llava.pruning import Method
from llava.serve.status import Terminal, TimedStreamer, stoppable
from llava.serve.token_picture import with_caption
from llava.serve.transformers_picture import check_drawable, draw_kept
from llava.video import Video, video_inputs


class TransformersSession:
    """A loaded model, the pictures on the table, and the conversation about them; `Session` for ``--hf``.

    Every turn goes to the model as a whole, as a cache with a pruned prompt cannot be gone on with.
    """

    def __init__(self, arguments: argparse.Namespace, pruner: Method | None) -> None:
        self.arguments = arguments
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
        return pruner(self.model, self.processor, clip=self.arguments.clip_path, siglip=self.arguments.siglip_path)

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

    def ask(self, question: str) -> str:
        """Answer a question in the conversation so far, telling the listener the words and a line about the work.

        Ctrl-C while the answer is written, or a listener that has enough, ends it there (``stopped``); what was
        written is in the conversation.
        """
        self.stopped = False
        content: list[dict[str, str]] = [{"type": "text", "text": question.replace(DEFAULT_IMAGE_TOKEN, "").strip()}]
        if not self.messages:
            shown = [{"type": "image"}] * len(self.pixels) + [{"type": "video"}] * (self.video is not None)
            content = shown + content
        messages = [*self.messages, {"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        visuals: dict[str, Any] = {"images": list(self.pixels)} if self.pixels else {}
        if self.video is not None:
            visuals |= video_inputs([self.video])
        inputs = self.processor(text=text, return_tensors="pt", **visuals)
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)
        if self.pixels and self.arguments.show_tokens:
            check_drawable(self.model, inputs, self.pruner)
        options = self.arguments
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
        if options.temperature <= 0:
            sampling = {"do_sample": False, "temperature": None, "top_p": None}
        if options.repetition_penalty:
            sampling["repetition_penalty"] = options.repetition_penalty
        streamer = TimedStreamer(self.tokenizer, self.tokenizer.eos_token, self.listener)
        self.listener.stage("answer")
        with torch.inference_mode(), self._attached(self.pruner) as handle:
            if handle is not None:
                handle.query = question
            start = time.perf_counter()
            with stoppable(streamer):
                output = self.model.generate(
                    **inputs, max_new_tokens=options.max_new_tokens, streamer=streamer, num_beams=1, **sampling
                )
        self.stopped, answer = streamer.stopped, streamer.written.strip()
        if not self.stopped:
            answer = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.last_inputs, self.last_kept = inputs, None if handle is None else handle.kept
        self.last_turn = question, answer
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        ids = inputs["input_ids"]
        total = sum(int((ids == placeholder).sum()) for placeholder in find_host(self.model).placeholders.values())
        self.last_stages = {
            "first token" if name == "prefill" else name: seconds for name, seconds in streamer.stages(start).items()
        }  # tower and selection are within it
        self.listener.line(status_line(total, None if handle is None else handle.kept, self.last_stages))
        return answer


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
    if "first token" in stages:
        parts.append(f"first token {stages['first token'] * 1e3:.0f} ms")
    if "decode, per token" in stages:
        parts.append(f"decode {stages['decode, per token'] * 1e3:.1f} ms/token")
    return f"[{' | '.join(parts)}]"


def decoder_counts(kept: Sequence[KeptPicture]) -> str:
    """What the decoder's layers see, if a method inside it drops some."""
    if all(picture.per_layer is None for picture in kept):
        return ""
    average = sum(fmean(picture.per_layer or (len(picture.picture.columns),)) for picture in kept)
    return f" left after the last cut in the decoder, {average:.1f} averaged over its layers"
