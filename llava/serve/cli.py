"""Ask a LLaVA checkpoint about pictures, with N visual tokens of each: one question, or a conversation."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import TextStreamer

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, conv_templates, template_for
from llava.mm_utils import load_image, process_images, tokenizer_image_token
from llava.model.builder import DEFAULT_CHECKPOINT, load_pretrained_model
from llava.model.encoded_images import EncodedImages
from llava.model.llava_arch import EmbeddedPrompts
from llava.pruning import Pruner, get_pruner, list_pruners, parse_budget, parse_options
from llava.serve.token_picture import draw_kept_tokens

COMMANDS = "/image PATH ...   /keep N|full   /pruner NAME [key=value ...]   /clear   /quit"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m llava.serve.cli", description=__doc__)
    parser.add_argument(
        "--model-path", default=DEFAULT_CHECKPOINT, help="LLaVA checkpoint: folder or hub name; default: the toy"
    )
    parser.add_argument("--model-base", help="language model that a projector-only --model-path belongs to")
    parser.add_argument("--image-file", nargs="+", default=[], metavar="FILE", help="pictures: files or addresses")
    parser.add_argument(
        "--query", nargs="+", metavar="TEXT", help="answer these, each on its own, and exit; without it: chat"
    )
    parser.add_argument(
        "--keep-tokens", default="full", metavar="N", help="visual tokens kept per view: a count, a share, or full"
    )
    parser.add_argument("--pruner", default="script", metavar="NAME", help=f"one of {', '.join(list_pruners())}")
    parser.add_argument("--pruner-args", nargs="+", default=[], metavar="KEY=VALUE", help="options of the pruner")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
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


class TimedStreamer(TextStreamer):
    """Prints the answer as it comes, and notes when each token came."""

    def __init__(self, tokenizer: Any, stop_string: str) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop_string = stop_string
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text.split(self.stop_string)[0], flush=True, end="\n" if stream_end else "")


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
        )
        if options.image_grid:
            self.model.config.image_grid_pinpoints = [parse_grid(options.image_grid)]
        self.template = conv_templates[options.conv_mode or template_for(self.model.model_name)]
        self.pictures: EncodedImages | None = None
        self.vision_seconds = 0.0
        self.use_pruner(self.pruner)
        self.clear()

    def use_pruner(self, pruner: Pruner | None) -> None:
        """Select with this method from now on; loads the text tower at once, so that no answer waits for it."""
        if pruner is not None and "text_embeds" in pruner.needs:
            self.model.get_vision_tower().joint_space()
        self.pruner = pruner

    def clear(self) -> None:
        self.conversation: Conversation = self.template.copy()

    def show(self, pictures: Sequence[Image.Image]) -> None:
        """Put pictures on the table and start a new conversation."""
        self.clear()
        self.pictures = None
        self.pixels = process_images(pictures, self.image_processor, self.model.config) if pictures else []
        self.sizes = [picture.size for picture in pictures]

    def encode(self) -> None:
        """Run the tower: once, whatever is asked about the pictures."""
        start = self._now()
        self.pictures = self.model.encode_pictures(self.pixels, self.sizes)
        self.vision_seconds = self._now() - start

    def ask(self, question: str) -> str:
        """Answer a question in the conversation so far, printing the answer and a line about the work done."""
        conversation = self.conversation.copy()
        expected = len(self.pixels)
        asked_before = len(conversation.messages) > conversation.offset
        conversation.append_message(conversation.roles[0], place_images(question, 0 if asked_before else expected))
        conversation.append_message(conversation.roles[1], None)
        ids = tokenizer_image_token(conversation.get_prompt(), self.tokenizer, return_tensors="pt")[None]
        options = self.arguments
        with torch.inference_mode():
            if self.pictures is None and expected:
                self.model.check_prompt(ids, self.pixels, self.sizes, self.pruner)
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
        draw_kept_tokens(self.pixels, self.last_prompt.kept, self.image_processor).save(path)
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


def status_line(
    prompt: EmbeddedPrompts,
    pictures: EncodedImages | None,
    pruner: Pruner | None,
    vision: float,
    start: float,
    selected: float,
    token_times: list[float],
) -> str:
    """One line after each answer: tokens kept of tokens there were, and where the time went."""
    parts = []
    if pictures is not None:
        total = sum(layout.eligible.numel() for layout in pictures.layouts)
        kept = sum(tokens.patches for tokens in prompt.kept)
        newlines = sum(tokens.newlines for tokens in prompt.kept)
        per_view = [count for tokens in prompt.kept for count in tokens.per_view()]
        counts = f"{per_view[0]} x {len(per_view)}" if len(set(per_view)) == 1 else " + ".join(map(str, per_view))
        parts.append(
            f"{kept} of {total} visual tokens ({counts} per view{f', and {newlines} newlines' if newlines else ''})"
            + decoder_counts(prompt)
        )
        parts.append(f"vision {vision * 1e3:.0f} ms" if vision else "vision cached")
        if prompt.kept[0].selection:
            parts.append(f"selection {(selected - start) * 1e3:.1f} ms")
            parts += graph_warning(prompt, pruner)
    if token_times:
        parts.append(f"prefill {(token_times[0] - selected) * 1e3:.0f} ms")
    if len(token_times) > 1:
        per_token = (token_times[-1] - token_times[0]) / (len(token_times) - 1)
        parts.append(f"decode {per_token * 1e3:.1f} ms/token")
    return f"[{' | '.join(parts)}]"


def decoder_counts(prompt: EmbeddedPrompts) -> str:
    """What the decoder's layers see, if a method inside it drops some; a word if nothing was pruned."""
    counts = [tokens.per_layer or (len(tokens.sequence),) for tokens in prompt.kept]
    if any(tokens.per_layer for tokens in prompt.kept):
        average = sum(sum(layers) / len(layers) for layers in counts)
        recycled = sum(tokens.recycled for tokens in prompt.kept)
        made = f" and {recycled} made of the others" if recycled else ""
        return f"{made} left after the last cut in the decoder, {average:.1f} averaged over its layers"
    return "" if prompt.kept[0].is_pruned else ", nothing pruned"


def graph_warning(prompt: EmbeddedPrompts, pruner: Pruner | None) -> list[str]:
    """A word where nearly all or nearly no pairs of tokens are joined: then the graph filter tells little."""
    densities = [tokens.selection.details.get("edge_density") for tokens in prompt.kept]
    if any(density is None for density in densities):
        return []
    density = torch.cat(densities).mean().item()
    if 0.01 <= density <= 0.95:
        return []
    return [f"{density:.0%} of the graph's pairs are joined at tau={pruner.tau:g}: move tau"]


def parse_grid(text: str) -> list[int]:
    """Read "672x672". Raises ValueError."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise ValueError(f"--image-grid is written WIDTHxHEIGHT, got {text!r}") from None
    return [width, height]


def chat(session: Session) -> None:
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


def answer_queries(session: Session) -> None:
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
        if options.image_grid:
            parse_grid(options.image_grid)
        for query in options.query or []:
            place_images(query, len(options.image_file))
        pictures = [load_image(path) for path in options.image_file]
        session = Session(options, pruner)
        session.show(pictures)
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
