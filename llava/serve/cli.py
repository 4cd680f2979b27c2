"""Ask a LLaVA checkpoint about pictures or a video: a session with a loaded model, and the command line's entrance."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import expanduser

import torch
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, conv_templates
from llava.layout.visuals import IMAGE, VIDEO, Reading
from llava.mm_utils import load_image, process_images, tokenizer_image_token, view_side
from llava.model.builder import find_template, load_pretrained_model
from llava.model.encoded_images import EncodedImages
from llava.pruning import Method
from llava.relevance.policy import settle
from llava.serve.chat import AnySession, Chat
from llava.serve.flags import make_pruner, parse_grid
from llava.serve.options import check_options, parse_arguments, without_budget
from llava.serve.status import Terminal, TimedStreamer, now, status_line, stoppable
from llava.serve.token_picture import draw_kept_tokens, drawn_cell, join_panels, save_drawing, with_caption
from llava.serve.transformers_session import TransformersSession
from llava.terminal import printable
from llava.video import Video, load_video, process_video

STOPPED = 130  # exit status of a program that Ctrl-C ended


@dataclass
class Session:
    """A loaded model, the pictures on the table, and the conversation about them."""

    arguments: argparse.Namespace
    pruner: Method | None

    def __post_init__(self) -> None:
        options = self.arguments
        self.template_name = options.conv_mode or find_template(options.model_path, options.model_base)
        self.template = conv_templates[self.template_name]
        self.tokenizer, self.model, self.image_processor, _ = load_pretrained_model(
            options.model_path,
            options.model_base,
            load_8bit=options.load_8bit,
            load_4bit=options.load_4bit,
            device_map=options.device_map,
            device=options.device,
            dtype=options.dtype,
            attn_implementation=options.attn_implementation,
            pruner=self.pruner,
            compile_tower=options.compile_tower,
            joint_space_path=options.siglip_path,
        )
        changes = {"mm_spatial_pool_mode": options.pool_mode} if options.pool_mode else {}
        self.reading = Reading.of(self.model.config, **changes)
        if options.image_grid:
            self.reading = self.reading.with_grid(parse_grid(options.image_grid), view_side(self.image_processor))
        self.pictures: EncodedImages | None = None
        self.vision_seconds = 0.0
        self.stopped = False
        self.listener = Terminal()
        self.use_pruner(self.pruner)
        self.clear()

    def another(self, listener: Terminal) -> Session:
        """A session on the same loaded model with nothing on the table: one for each user of a page."""
        twin = copy.copy(self)
        twin.listener, twin.vision_seconds = listener, 0.0
        twin.show()
        return twin

    def use_pruner(self, pruner: Method | None) -> None:
        """Select with this method from now on; loads the text tower at once, so that no answer waits for it."""
        if pruner is not None:
            pruner, choice = settle(pruner, self.model.relevance_offer())
            self.model.announcer.tell(pruner, choice)
            if choice is not None and choice.source == "clip":
                self.model.get_vision_tower().joint_space()
        self.pruner = pruner

    def clear(self) -> None:
        self.conversation: Conversation = self.template.copy()

    def show(self, pictures: Sequence[Image.Image] = (), video: Video | None = None) -> None:
        """Put pictures or a video on the table and start a new conversation."""
        self.clear()
        self.pictures = None
        self.preface = ""
        if video is None:
            self.pixels = process_images(pictures, self.image_processor, self.reading) if pictures else []
            sizes = [picture.size for picture in pictures]
            self.visuals = self.model.visuals(self.pixels, sizes, IMAGE, self.reading)
            return
        self.pixels = [process_video(video, self.image_processor)]
        self.visuals = self.model.visuals(self.pixels, None, VIDEO, self.reading)
        if getattr(self.model.config, "add_time_instruction", False) and video.time_instruction:
            self.preface = video.time_instruction + "\n"

    def has_pictures(self) -> bool:
        return len(self.pixels) > 0

    def shown(self) -> str:
        """How many visual tokens the pictures or the video have before pruning."""
        layouts = [layout for layout, _ in self.model.vision.layouts(self.visuals)]
        views = sum(layout.views for layout in layouts)
        unit = "frame" if any(visual.modality == VIDEO for visual in self.visuals.each) else "view"
        total = sum(layout.eligible.numel() for layout in layouts)
        return f"{total} visual tokens in {views} {unit}{'s' * (views != 1)}"

    def model_line(self) -> str:
        """The model's name, template, device and type of numbers."""
        kind = str(self.model.dtype).removeprefix("torch.")
        return f"{self.model.model_name} (template {self.template_name}, {self.model.device}, {kind})"

    def encode(self) -> None:
        """Run the tower: once, whatever is asked about the pictures."""
        start = now(self.model.device)
        self.pictures = self.model.encode_pictures(self.visuals)
        self.vision_seconds = now(self.model.device) - start

    def ask(self, question: str) -> str:
        """Answer a question in the conversation so far, telling the listener the words and a line about the work.

        Ctrl-C while the answer is written, or a listener that has enough, ends it there (``stopped``); what was
        written is in the conversation.
        """
        self.stopped = False
        conversation = self.conversation.copy()
        expected = len(self.pixels)
        asked_before = len(conversation.messages) > conversation.offset
        message = question if asked_before else place_images(self.preface + question, expected)
        conversation.append_message(conversation.roles[0], message)
        conversation.append_message(conversation.roles[1], None)
        ids = tokenizer_image_token(conversation.get_prompt(), self.tokenizer, return_tensors="pt")[None]
        options = self.arguments
        with torch.inference_mode():
            if self.pictures is None and expected:
                self.model.check_prompt(ids, self.visuals, pruner=self.pruner)
                self.listener.stage("vision")
                self.encode()
            self.listener.stage("selection")
            start = now(self.model.device)
            prompt = self.model.embed_prompts(
                ids.to(self.model.device),
                images=self.pictures,
                pruner=self.pruner,
                query=question,
                padding_side="left",
                truncate=False,
            )
            selected = now(self.model.device)
            streamer = TimedStreamer(self.tokenizer, conversation.stop_string, self.listener)
            self.listener.stage("answer")
            sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
            if conversation.stop_string != self.tokenizer.eos_token:
                sampling |= {"stop_strings": [conversation.stop_string], "tokenizer": self.tokenizer}
            if options.repetition_penalty:
                sampling["repetition_penalty"] = options.repetition_penalty
            if options.temperature <= 0:
                sampling |= {"do_sample": False, "temperature": None, "top_p": None}
            with stoppable(streamer):
                answer_ids = self.model.generate(
                    prompt,
                    max_new_tokens=options.max_new_tokens,
                    streamer=streamer,
                    **sampling,
                )
        self.stopped, answer = streamer.stopped, streamer.written
        if not self.stopped:
            answer = self.tokenizer.decode(answer_ids[0], skip_special_tokens=True).split(conversation.stop_string)[0]
        conversation.messages[-1] = (conversation.roles[1], answer.strip())
        self.conversation = conversation
        self.last_stages = streamer.stages(selected, vision=self.vision_seconds, selection=selected - start)
        self.listener.line(status_line(prompt, self.pictures, self.pruner, self.last_stages))
        self.vision_seconds = 0.0
        self.last_prompt = prompt
        self.last_turn = question, answer.strip()
        return answer.strip()

    def panel(self) -> Image.Image:
        """The tokens kept for the last question; with ``--captions`` it and its answer stand below."""
        cell = drawn_cell(self.model.get_vision_tower(), self.pictures.pool_mode)
        drawn = draw_kept_tokens(self.pixels, self.last_prompt.kept, self.image_processor, cell)
        return with_caption(drawn, *self.last_turn) if self.arguments.captions else drawn


def place_images(question: str, images: int) -> str:
    """Put the image placeholders before a question that has none. Raises ValueError if their number is wrong."""
    written = question.count(DEFAULT_IMAGE_TOKEN)
    if written not in (0, images):
        raise ValueError(
            f"the question has {written} {DEFAULT_IMAGE_TOKEN} placeholders, but there are {images} images"
        )
    return question if written else f"{DEFAULT_IMAGE_TOKEN}\n" * images + question


def answer_queries(session: AnySession) -> None:
    """Answer every --query on its own, until Ctrl-C."""
    out = session.arguments.show_tokens
    panels: list[Image.Image] = []
    for number, query in enumerate(session.arguments.query, start=1):
        session.clear()
        session.ask(query)
        if session.stopped:
            break
        if out and session.has_pictures():
            if session.arguments.captions:
                panels.append(session.panel())
            else:
                save_drawing(session.panel(), out if number == 1 else out.with_stem(f"{out.stem}-{number}"))
    if panels:
        save_drawing(join_panels(panels), out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 if all went well; 2 with one line on standard error if the input was bad; 130 if Ctrl-C ended it.
    """
    options = parse_arguments(arguments)
    try:
        pruner = make_pruner(options.pruner, options.keep_tokens, options.pruner_args)
        check_options(options)
        for query in options.query or []:
            place_images(query, len(options.image_file) + (options.video_file is not None))
        pictures = [load_image(expanduser(path)) for path in options.image_file]
        video = load_video(expanduser(options.video_file), options.num_frames) if options.video_file else None
        if pruner is None and options.pruner_named:
            print(without_budget(options.pruner), file=sys.stderr)
        session = TransformersSession(options, pruner) if options.hf else Session(options, pruner)
        session.show(pictures, video)
        if options.query:
            answer_queries(session)
            return STOPPED if session.stopped else 0
        Chat(session).run()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory: {printable(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
