"""Serve the page: ``python -m llava.serve.page``, then open the address that it prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.model.builder import DEFAULT_CHECKPOINT
from llava.pictures import load_image
from llava.serve.flags import at_least_one
from llava.serve.options import Parser, add_session
from llava.serve.page.limits import LimitedRequests, check_address
from llava.serve.page.user import Bundled
from llava.serve.viewer.desk import MIB, Room
from llava.serve.viewer.html import script, style
from llava.terminal import printable
from llava.video import load_video

BUNDLED = {  # beside the toy, where the repository is at hand
    "toy scene": "toy/data/eval/pope/val2014/COCO_val2014_000000910001.jpg",
    "toy scene with a fish": "toy/data/eval/pope/val2014/COCO_val2014_000000910002.jpg",
    "toy scene with a house": "toy/data/eval/textvqa/train_images/001670f5ce4e00.jpg",
    "astronaut": "audit/astronaut.jpg",
    "chelsea": "audit/chelsea.jpg",
    "coffee": "audit/coffee.jpg",
}
QUICK = 32  # requests beside those that wait for the model: pictures that come, options that are changed
QUESTIONS = ("What color is the star?", "Is there a yellow cup in the image?", "What is written on the green sign?")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava.serve.page", description="A page to ask a model and see what was kept.")
    add_session(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen at; default: this machine")
    parser.add_argument(
        "--open-to-network", action="store_true", help="allow a --host that other machines can reach: all may ask"
    )
    parser.add_argument("--port", type=at_least_one, default=7860)
    parser.add_argument("--image-file", nargs="+", default=[], metavar="FILE", help="pictures that the page offers")
    parser.add_argument("--video-file", nargs="+", default=[], metavar="FILE", help="videos that it offers")
    parser.add_argument("--question", nargs="+", default=list(QUESTIONS), metavar="TEXT", help="examples")
    parser.add_argument("--max-upload-mb", type=at_least_one, default=32, metavar="N", help="of a picture or video")
    parser.add_argument(
        "--max-waiting", type=at_least_one, default=32, metavar="N", help="for the model, which answers one"
    )
    return parser.parse_args(arguments)


def bundled_by(options: argparse.Namespace) -> dict[str, Bundled]:
    """Pictures and videos that the page offers, by name: those named, or those of the repository.

    Raises:
        ValueError, OSError, ImportError: one of those named cannot be read, or two have one name.
    """
    named = [(Path(path).name, path) for path in options.image_file]
    if not named and not options.video_file:
        folder = Path(DEFAULT_CHECKPOINT).parents[1]
        named = [(name, folder / path) for name, path in BUNDLED.items() if (folder / path).is_file()]
    found = [Bundled(name, picture=load_image(path)) for name, path in named]
    found += [Bundled(Path(path).name, video=load_video(path, options.num_frames)) for path in options.video_file]
    by_name = {one.name: one for one in found}
    if len(by_name) < len(found):
        raise ValueError("two of the pictures and videos have one name: rename one")
    return by_name


def serve(options: argparse.Namespace, prevent_thread_lock: bool = False) -> str:
    """Load the model and serve the page until Ctrl-C; its address.

    Args:
        prevent_thread_lock: return at once, for tests.
    """
    try:
        import gradio as gr
        from starlette.middleware import Middleware
    except ImportError as error:
        raise ImportError('the page needs Gradio: pip install "script-llava[page]"') from error
    from llava.serve.page import app

    check_address(options.host, options.open_to_network)
    offered = bundled_by(options)
    options.image_file, options.video_file = [], None
    most_bytes = options.max_upload_mb * MIB
    room = Room(options, options.max_waiting)
    for one in offered.values():  # better now than when somebody chooses it
        room.desk().show(one.name, [one.picture] if one.picture is not None else [], one.video)
    page = app.Page(room, offered, tuple(options.question), most_bytes)
    folder = Path(__file__).parent
    blocks = page.blocks().queue(default_concurrency_limit=4, max_size=QUICK)
    limits = Middleware(LimitedRequests, most_bytes=most_bytes * 4 // 3 + MIB)  # base64, and the form around it
    _, address, _ = blocks.launch(
        server_name=options.host,
        server_port=options.port,
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
        max_threads=options.max_waiting + QUICK,
        app_kwargs={"middleware": [limits]},
        state_session_capacity=app.MOST_TABS,
        max_file_size=1,
        enable_monitoring=False,
        footer_links=[],
        theme=gr.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="blue"
        ),
        css=style() + (folder / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(folder / 'page.js').read_text(encoding='utf-8')}{script()}</script>",
    )
    print(f"[{address} (Ctrl-C ends it)]", flush=True)
    if not prevent_thread_lock:
        blocks.block_thread()
    return address


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page.

    Returns:
        0 after Ctrl-C, 2 with one line on standard error for bad input.
    """
    try:
        serve(parse_arguments(arguments))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
