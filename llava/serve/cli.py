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
from llava.conversation import Conversation, conv_templates
from llava.layout.pooling import POOL_MODES
from llava.layout.visuals import IMAGE, VIDEO
from llava.mm_utils import load_image, most_tiles, process_images, tokenizer_image_token
from llava.model.builder import DEFAULT_CHECKPOINT, find_template, load_pretrained_model
from llava.model.encoded_images import EncodedImages
from llava.model.questions import suited
from llava.pruning import Pruner, get_pruner, list_pruners, parse_budget, parse_options
from llava.serve.status import TimedStreamer, status_line
from llava.serve.token_picture import draw_kept_tokens, drawn_cell
from llava.serve.transformers_session import TransformersSession, check_options
from llava.video import Video, load_video, process_video

COMMANDS = "/image PATH ...   /video PATH   /keep N|full   /pruner NAME [key=value ...]   /clear   /quit"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m llava.serve.cli", description=__doc__)
    parser.add_argument(
        "--model-path", default=DEFAULT_CHECKPOINT, help="LLaVA checkpoint: folder or hub name; default: the toy"
    )
    parser.add_argument(
        "--hf", action="store_true", help="--model-path is a model of the Transformers library's own classes"
    )
    parser.add_argument("--clip-path", metavar="PATH", help="with --hf: the CLIP that the model's tower comes from")
    parser.add_argument("--model-base", help="language model that a projector-only --model-path belongs to")
    parser.add_argument("--image-file", nargs="+", default=[], metavar="FILE", help="pictures: files or addresses")
    parser.add_argument("--video-file", metavar="FILE", help="a video: a file, or a folder with a picture per frame")
    parser.add_argument("--num-frames", type=int, default=64, metavar="N", help="frames of the video, spread evenly")
    parser.add_argument("--pool-mode", choices=POOL_MODES, help="of videos; default: the checkpoint's")
    parser.add_argument("--siglip-path", metavar="PATH", help="folder of the full SigLIP, for relevance in its space")
    parser.add_argument(
        "--query", nargs="+", metavar="TEXT", help="answer these, each on its own, and exit; without it: chat"
    )
    parser.add_argument(
        "--keep-tokens",
        default="full",
        metavar="N",
        help="visual tokens kept per view or frame: a count, a share, or full",
    )
    parser.add_argument("--pruner", default="script", metavar="NAME", help=f"one of {', '.join(list_pruners())}")
    parser.add_argument("--pruner-args", nargs="+", default=[], metavar="KEY=VALUE", help="options of the pruner")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--repetition-penalty", type=float, metavar="P", help="default: the checkpoint's; 1 is none")
    parser.add_argument("--conv-mode", choices=sorted(conv_templates), help="template; default: by the model's name")
    parser.add_argument("--image-grid", metavar="WxH", help="cut every picture for this resolution, such as 672x672")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--device-map", help="spread the language model over GPUs: auto, balanced, ...")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16")
    parser.add_argument("--attn-implementation", help="sdpa, eager, flash_attention_2, ...")
    parser.add_argument(
        "--compile-tower", action="store_true", help="torch.compile the vision tower: the first picture is slow"
    )
    parser.add_argument("--load-4bit", action="store_true")
    parser.add_argument("--load-8bit", action="store_true")
    parser.add_argument("--show-tokens", type=Path, metavar="OUT.png", help="write a picture of the kept tokens")
    return parser.parse_args(arguments)


def make_pruner(name: str, keep_tokens: str, options: Sequence[str]) -> Pruner | None:
    """The pruner that the command line asks for; ``None`` for "full", after checking name and options all the same."""
    keywords = parse_options(name, options)
    if keep_tokens == "full":
        get_pruner(name, **keywords)
        return None
    return get_pruner(name, **{"keep_tokens": parse_budget(keep_tokens), **keywords})


@dataclass
class Session:
    """A loaded model, the pictures on the table, and the conversation about them."""

    arguments: argparse.Namespace
    pruner: Pruner | None

    def __post_init__(self) -> None:
        options = self.arguments
        self.template = conv_templates[options.conv_mode or find_template(options.model_path, options.model_base)]
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
        if options.pool_mode:
            self.model.config.mm_spatial_pool_mode = options.pool_mode
        self.aspect_ratio = getattr(self.model.config, "image_aspect_ratio", None)
        if options.image_grid:
            self.model.config.image_grid_pinpoints = [parse_grid(options.image_grid)]
        self.pictures: EncodedImages | None = None
        self.vision_seconds = 0.0
        self.use_pruner(self.pruner)
        self.clear()

    def use_pruner(self, pruner: Pruner | None) -> None:
        """Select with this method from now on; loads the text tower at once, so that no answer waits for it."""
        if pruner is not None:
            pruner = suited(self.model, pruner)
            if "text_embeds" in pruner.needs:
                self.model.get_vision_tower().joint_space()
        self.pruner = pruner

    def clear(self) -> None:
        self.conversation: Conversation = self.template.copy()

    def show(self, pictures: Sequence[Image.Image] = (), video: Video | None = None) -> None:
        """Put pictures or a video on the table and start a new conversation.

        Of several pictures LLaVA-OneVision, whose single ones are many tiles, reads one padded square each.
        """
        self.clear()
        self.pictures = None
        self.modality = IMAGE if video is None else VIDEO
        self.preface = ""
        if video is None:
            several_tiled = len(pictures) > 1 and most_tiles(self.aspect_ratio) is not None
            self.model.config.image_aspect_ratio = "pad" if several_tiled else self.aspect_ratio
            self.pixels = process_images(pictures, self.image_processor, self.model.config) if pictures else []
            self.sizes = [picture.size for picture in pictures]
            return
        self.pixels, self.sizes = [process_video(video, self.image_processor)], None
        if getattr(self.model.config, "add_time_instruction", False) and video.time_instruction:
            self.preface = video.time_instruction + "\n"

    def encode(self) -> None:
        """Run the tower: once, whatever is asked about the pictures."""
        start = self._now()
        self.pictures = self.model.encode_pictures(self.pixels, self.sizes, self.modality)
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
                self.model.check_prompt(ids, self.pixels, self.sizes, self.pruner, self.modality)
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
        return answer.strip()

    def save_picture(self, path: Path) -> None:
        """Write the picture of the tokens kept for the last question."""
        cell = drawn_cell(self.model.get_vision_tower(), self.pictures.pool_mode)
        draw_kept_tokens(self.pixels, self.last_prompt.kept, self.image_processor, cell).save(path)
        print(f"[kept tokens drawn in {path}]")

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
                        session.save_picture(session.arguments.show_tokens)
        except (ValueError, OSError) as error:
            print(f"error: {error}")


def answer_queries(session: Session | TransformersSession) -> None:
    """Answer every --query on its own."""
    out = session.arguments.show_tokens
    for number, query in enumerate(session.arguments.query, start=1):
        session.clear()
        session.ask(query)
        if out and len(session.pixels):
            session.save_picture(out if number == 1 else out.with_stem(f"{out.stem}-{number}"))


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
