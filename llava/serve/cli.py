"""Ask a LLaVA checkpoint about pictures or a video, with N visual tokens of each view or frame."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, conv_templates, template_for
from llava.layout.pooling import POOL_MODES
from llava.layout.visuals import IMAGE, VIDEO, Reading
from llava.mm_utils import load_image, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.encoded_images import EncodedImages
from llava.pruning import Pruner
from llava.relevance.policy import settle
from llava.serve import flags
from llava.serve.flags import make_pruner
from llava.serve.status import TimedStreamer, status_line
from llava.serve.token_picture import draw_kept_tokens, drawn_cell, join_panels, with_caption
from llava.serve.transformers_session import TransformersSession, check_options
from llava.video import Video, load_video, process_video

COMMANDS = "/image PATH ...   /video PATH   /keep N|full   /pruner NAME [key=value ...]   /clear   /quit"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m llava.serve.cli", description=__doc__)
    flags.add_checkpoint(parser)
    parser.add_argument(
        "--hf", action="store_true", help="--model-path is a model of the Transformers library's own classes"
    )
    parser.add_argument("--clip-path", metavar="PATH", help="with --hf: the CLIP that the model's tower comes from")
    flags.add_base(parser)
    parser.add_argument("--image-file", nargs="+", default=[], metavar="FILE", help="pictures: files or addresses")
    parser.add_argument("--video-file", metavar="FILE", help="a video: a file, or a folder with a picture per frame")
    parser.add_argument("--num-frames", type=int, default=64, metavar="N", help="frames of the video, spread evenly")
    parser.add_argument("--pool-mode", choices=POOL_MODES, help="of videos; default: the checkpoint's")
    parser.add_argument("--siglip-path", metavar="PATH", help="folder of the full SigLIP, for relevance in its space")
    parser.add_argument(
        "--query", nargs="+", metavar="TEXT", help="answer these, each on its own, and exit; without it: chat"
    )
    flags.add_method(parser)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--repetition-penalty", type=float, metavar="P", help="default: the checkpoint's; 1 is none")
    flags.add_template(parser)
    parser.add_argument("--image-grid", metavar="WxH", help="cut every picture for this resolution, such as 672x672")
    flags.add_device(parser)
    parser.add_argument("--device-map", help="spread the language model over GPUs: auto, balanced, ...")
    flags.add_dtype(parser)
    flags.add_attention(parser)
    parser.add_argument(
        "--compile-tower", action="store_true", help="torch.compile the vision tower: the first picture is slow"
    )
    parser.add_argument("--load-4bit", action="store_true")
    parser.add_argument("--load-8bit", action="store_true")
    parser.add_argument(
        "--show-tokens", type=Path, metavar="OUT.png", help="write a picture of the kept tokens, a panel per --query"
    )
    return parser.parse_args(arguments)


@dataclass
class Session:
    """A loaded model, the pictures on the table, and the conversation about them."""

    arguments: argparse.Namespace
    pruner: Pruner | None

    def __post_init__(self) -> None:
        options = self.arguments
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
        if options.image_grid:
            changes["image_grid_pinpoints"] = [parse_grid(options.image_grid)]
        self.reading = Reading.of(self.model.config, **changes)
        self.template = conv_templates[options.conv_mode or template_for(self.model.model_name)]
        self.pictures: EncodedImages | None = None
        self.vision_seconds = 0.0
        self.use_pruner(self.pruner)
        self.clear()

    def use_pruner(self, pruner: Pruner | None) -> None:
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

    def encode(self) -> None:
        """Run the tower: once, whatever is asked about the pictures."""
        start = self._now()
        self.pictures = self.model.encode_pictures(self.visuals)
        self.vision_seconds = self._now() - start

    def ask(self, question: str) -> str:
        """Answer a question in the conversation so far, printing the answer and a line about the work done."""
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
                self.encode()
            start = self._now()
            prompt = self.model.embed_prompts(
                ids.to(self.model.device),
                images=self.pictures,
                pruner=self.pruner,
                query=question,
                padding_side="left",
                truncate=False,
            )
            selected = self._now()
            streamer = TimedStreamer(self.tokenizer, conversation.stop_string)
            sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
            if conversation.stop_string != self.tokenizer.eos_token:
                sampling |= {"stop_strings": [conversation.stop_string], "tokenizer": self.tokenizer}
            if options.repetition_penalty:
                sampling["repetition_penalty"] = options.repetition_penalty
            if options.temperature <= 0:
                sampling |= {"do_sample": False, "temperature": None, "top_p": None}
            answer_ids = self.model.generate(
                prompt,
                max_new_tokens=options.max_new_tokens,
                streamer=streamer,
                **sampling,
            )
        answer = self.tokenizer.decode(answer_ids[0], skip_special_tokens=True).split(conversation.stop_string)[0]
        conversation.messages[-1] = (conversation.roles[1], answer.strip())
        self.conversation = conversation
        print(status_line(prompt, self.pictures, self.pruner, self.vision_seconds, start, selected, streamer.times))
        self.vision_seconds = 0.0
        self.last_prompt = prompt
        self.last_turn = question, answer.strip()
        return answer.strip()

    def panel(self) -> Image.Image:
        """The tokens kept for the last question, with it and its answer below."""
        cell = drawn_cell(self.model.get_vision_tower(), self.pictures.pool_mode)
        drawn = draw_kept_tokens(self.pixels, self.last_prompt.kept, self.image_processor, cell)
        return with_caption(drawn, *self.last_turn)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def place_images(question: str, images: int) -> str:
    """Put the image placeholders before a question that has none. Raises ValueError if their number is wrong."""
    written = question.count(DEFAULT_IMAGE_TOKEN)
    if written not in (0, images):
        raise ValueError(
            f"the question has {written} {DEFAULT_IMAGE_TOKEN} placeholders, but there are {images} images"
        )
    return question if written else f"{DEFAULT_IMAGE_TOKEN}\n" * images + question


def parse_grid(text: str) -> list[int]:
    """Read "672x672". Raises ValueError."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise ValueError(f"--image-grid is written WIDTHxHEIGHT, got {text!r}") from None
    return [width, height]


def chat(session: Session | TransformersSession) -> None:
    """Read questions and commands until /quit or the end of the input."""
    print(COMMANDS)
    keep, name, options = session.arguments.keep_tokens, session.arguments.pruner, session.arguments.pruner_args
    while True:
        try:
            line = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, rest = line.partition(" ")
        try:
            match command:
                case "":
                    continue
                case "/quit":
                    return
                case "/clear":
                    session.clear()
                case "/image":
                    session.show([load_image(path) for path in rest.split()])
                case "/video":
                    session.show(video=load_video(rest, session.arguments.num_frames))
                case "/keep":
                    session.use_pruner(make_pruner(name, rest, options))
                    keep = rest
                case "/pruner":
                    new_name, *new_options = rest.split() or [""]
                    session.use_pruner(make_pruner(new_name, keep, new_options))
                    name, options = new_name, new_options
                case _ if command.startswith("/"):
                    print(f"unknown command {command}; commands: {COMMANDS}")
                case _:
                    session.ask(line)
                    if session.arguments.show_tokens and len(session.pixels):
                        save_panels([session.panel()], session.arguments.show_tokens)
        except (ValueError, OSError) as error:
            print(f"error: {error}")


def answer_queries(session: Session | TransformersSession) -> None:
    """Answer every --query on its own; one picture shows the tokens kept for all of them."""
    out = session.arguments.show_tokens
    panels = []
    for query in session.arguments.query:
        session.clear()
        session.ask(query)
        if out and len(session.pixels):
            panels.append(session.panel())
    if panels:
        save_panels(panels, out)


def save_panels(panels: Sequence[Image.Image], path: Path) -> None:
    join_panels(panels).save(path)
    print(f"[kept tokens drawn in {path}]")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 2 with one line on standard error if the input was bad."""
    options = parse_arguments(arguments)
    try:
        pruner = make_pruner(options.pruner, options.keep_tokens, options.pruner_args)
        check_options(options)
        if options.image_grid:
            parse_grid(options.image_grid)
        for query in options.query or []:
            place_images(query, len(options.image_file) + (options.video_file is not None))
        if options.video_file and options.image_file:
            raise ValueError("--image-file and --video-file exclude each other")
        pictures = [load_image(path) for path in options.image_file]
        video = load_video(options.video_file, options.num_frames) if options.video_file else None
        session = TransformersSession(options, pruner) if options.hf else Session(options, pruner)
        session.show(pictures, video)
        if options.query:
            answer_queries(session)
        else:
            chat(session)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
