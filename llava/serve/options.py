"""Arguments of the command line: what there is, and everything that can be told of them before a model is loaded."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from PIL import Image

from llava.layout.pooling import POOL_MODES
from llava.model.builder import pick_device
from llava.serve import flags
from llava.terminal import printable

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
OURS_ALONE = {  # options that speak of LLaVA's original format or code
    "model_base": "--model-base",
    "video_file": "--video-file",
    "pool_mode": "--pool-mode",
    "conv_mode": "--conv-mode",
    "image_grid": "--image-grid",
    "load_4bit": "--load-4bit",
    "load_8bit": "--load-8bit",
    "compile_tower": "--compile-tower",
}


class Parser(argparse.ArgumentParser):
    """Prints what was wrong with others' text in it made harmless."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def add_session(parser: argparse.ArgumentParser) -> None:
    """The flags of the model and of how it answers: what a session reads, whatever asks it."""
    flags.add_checkpoint(parser)
    parser.add_argument(
        "--hf", action="store_true", help="--model-path is a model of the Transformers library's own classes"
    )
    parser.add_argument("--clip-path", metavar="PATH", help="with --hf: the CLIP that the model's tower comes from")
    parser.add_argument("--siglip-path", metavar="PATH", help="folder of the full SigLIP, for relevance in its space")
    flags.add_base(parser)
    flags.add_template(parser)
    parser.add_argument("--num-frames", type=int, default=64, metavar="N", help="frames of the video, spread evenly")
    parser.add_argument("--pool-mode", choices=POOL_MODES, help="of videos; default: the checkpoint's")
    flags.add_image_grid(parser)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--repetition-penalty", type=float, metavar="P", help="default: the checkpoint's; 1 is none")
    flags.add_device(parser)
    parser.add_argument("--device-map", choices=DEVICE_MAPS, help="spread the language model over GPUs")
    flags.add_dtype(parser)
    flags.add_attention(parser)
    parser.add_argument(
        "--compile-tower", action="store_true", help="torch.compile the vision tower: the first picture is slow"
    )
    parser.add_argument("--load-4bit", action="store_true")
    parser.add_argument("--load-8bit", action="store_true")
    parser.set_defaults(image_file=[], video_file=None, show_tokens=None, captions=False)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; ``pruner_named`` says whether a method or options of one were asked for."""
    parser = Parser(
        prog="python -m llava.serve.cli",
        description="Ask a LLaVA checkpoint about pictures or a video, with N visual tokens of each view or frame.",
    )
    add_session(parser)
    parser.add_argument("--image-file", nargs="+", default=[], metavar="FILE", help="pictures: files or addresses")
    parser.add_argument("--video-file", metavar="FILE", help="a video: a file, or a folder with a picture per frame")
    parser.add_argument(
        "--query", nargs="+", metavar="TEXT", help="answer these, each on its own, and exit; without it: chat"
    )
    flags.add_method(parser, default=None)
    parser.add_argument(
        "--show-tokens",
        type=Path,
        metavar="OUT.png",
        help="write a picture of the kept tokens; of a second --query OUT-2.png, and so on",
    )
    parser.add_argument(
        "--captions",
        action="store_true",
        help="with --show-tokens: question and answer below, and all of several --query beside each other in one file",
    )
    options = parser.parse_args(arguments)
    options.pruner_named = options.pruner is not None or bool(options.pruner_args)
    options.pruner = options.pruner or flags.DEFAULT_METHOD
    return options


def without_budget(name: str) -> str:
    """What to say where a method is named and nothing is to be pruned."""
    return (
        f"{name} without a budget: nothing is pruned. Say how many visual tokens it keeps of each view, a count or a "
        "share (--keep-tokens 64, in the chat /keep 64)"
    )


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError or OSError for what cannot work, whatever the model."""
    pick_device(options.device)
    check_sampling(options)
    if options.image_grid:
        flags.parse_grid(options.image_grid)
    if options.video_file and options.image_file:
        raise ValueError("--image-file and --video-file exclude each other")
    if options.captions and options.show_tokens is None:
        raise ValueError("--captions goes with --show-tokens")
    if options.show_tokens is not None:
        options.show_tokens = options.show_tokens.expanduser()
        check_writable(options.show_tokens)
    if not options.hf:
        if options.clip_path:
            raise ValueError("--clip-path goes with --hf: a checkpoint of LLaVA's own format names its CLIP itself")
        return
    given = [flag for name, flag in OURS_ALONE.items() if getattr(options, name, None)]
    if given:
        raise ValueError(f"{', '.join(given)} goes with LLaVA's own code, not with --hf")


def check_sampling(options: argparse.Namespace) -> None:
    """Raise ValueError for numbers that no distribution of words has."""
    limits = {
        "temperature": (0 <= options.temperature < math.inf, "0 (greedy) or more"),
        "top_p": (0 < options.top_p <= 1, "more than 0 and at most 1"),
        "repetition_penalty": (0 < (options.repetition_penalty or 1) < math.inf, "more than 0"),
        "max_new_tokens": (options.max_new_tokens >= 1, "1 or more"),
        "num_frames": (options.num_frames >= 1, "at least one frame"),
    }
    if options.repetition_penalty == 0:
        limits["repetition_penalty"] = (False, "more than 0")
    for name, (fits, expected) in limits.items():
        if not fits:
            raise ValueError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(options, name):g}")


def check_writable(path: Path) -> None:
    """Raise ValueError or OSError if no picture can be written to ``path``: better before the answer than after."""
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--show-tokens {path}: the ending says no format of pictures, such as .png or .jpg")
    if path.exists() and not path.is_file():
        raise ValueError(f"--show-tokens {path} is there already and is no file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--show-tokens {path}: there is no folder {path.parent}")
    try:
        if path.exists():
            path.open("r+b").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(f"--show-tokens {path} cannot be written: {error.strerror}") from error
