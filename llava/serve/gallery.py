"""Comparisons of kept tokens as one HTML file that opens without a server, made from a list.

    python -m llava.serve.gallery --out gallery.html --list looks.json
    python -m llava.serve.gallery --out gallery.html --image-file scene.jpg --query "What color is the star?" \
        --pruner script divprune --keep-tokens 16

Without ``--list`` every picture is asked every question, and the methods and budgets stand beside each other. A list
is JSON: [{"title": ..., "image": FILE or "video": FILE, "looks": [{"question", "method", "keep", "options"}, ...]}].
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.pictures import load_image
from llava.serve.flags import DEFAULT_METHOD
from llava.serve.options import Parser, add_session
from llava.serve.viewer.desk import Room
from llava.serve.viewer.html import document
from llava.serve.viewer.look import MOST_LOOKS
from llava.serve.viewer.setting import Setting, parse_entry
from llava.terminal import printable
from llava.video import load_video


@dataclass(frozen=True)
class Section:
    """A picture or video and the looks at it that stand beside each other."""

    title: str
    image: str | None
    video: str | None
    settings: tuple[Setting, ...]


def sections_of(entries: Any, folder: Path) -> list[Section]:
    """Read a list, files by their names from ``folder``. Raises ValueError that names the entry."""
    if not isinstance(entries, list) or not entries:
        raise ValueError("a gallery's list is a JSON list of at least one entry")
    sections = []
    for number, entry in enumerate(entries, start=1):
        try:
            sections.append(_section(entry, folder))
        except (ValueError, TypeError) as error:
            raise ValueError(f"entry {number} of the list: {error}") from error
    return sections


def _section(entry: Any, folder: Path) -> Section:
    known = {"title", "image", "video", "looks"}
    if not isinstance(entry, dict) or set(entry) - known or ("image" in entry) == ("video" in entry):
        raise ValueError(f"expected title, image or video, and looks; got {entry!r}")
    looks = entry.get("looks")
    if not isinstance(looks, list) or not 1 <= len(looks) <= MOST_LOOKS:
        raise ValueError(f"looks must be a list of one to {MOST_LOOKS}")
    settings = []
    for look in looks:
        if not isinstance(look, dict) or set(look) - {"question", "method", "keep", "options"}:
            raise ValueError(f"a look has question, method, keep and options; got {look!r}")
        options = tuple(look.get("options", ()))
        keep, method = str(look.get("keep", "full")), look.get("method", DEFAULT_METHOD)
        settings.append(Setting(str(look.get("question", "")), method, keep, options))
    place = {kind: str(folder / entry[kind]) if kind in entry else None for kind in ("image", "video")}
    title = str(entry.get("title") or settings[0].question)
    return Section(title, place["image"], place["video"], tuple(settings))


def crossed(
    pictures: Sequence[str], questions: Sequence[str], methods: Sequence[str], keeps: Sequence[str]
) -> list[Section]:
    """Every question about every picture, methods and budgets beside each other."""
    sections = []
    for picture in pictures:
        for question in questions:
            settings = [
                Setting(question, name, keep, options) for name, options in map(parse_entry, methods) for keep in keeps
            ]
            if len(settings) > MOST_LOOKS:
                raise ValueError(
                    f"{len(settings)} methods times budgets: at most {MOST_LOOKS} stand beside each other"
                )
            sections.append(Section(question, picture, None, tuple(settings)))
    return sections


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava.serve.gallery", description="Comparisons of kept tokens as one HTML file.")
    add_session(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html")
    parser.add_argument("--title", default="Which visual tokens were kept")
    parser.add_argument("--introduction", default="", help="a sentence below the title")
    parser.add_argument("--list", type=Path, metavar="FILE.json", help="pictures and looks; files beside the list")
    parser.add_argument("--image-file", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--query", nargs="+", default=[], metavar="TEXT")
    parser.add_argument(
        "--pruner", nargs="+", default=[DEFAULT_METHOD], metavar="METHOD", help='names, with options "script tau=0.3"'
    )
    parser.add_argument("--keep-tokens", nargs="+", default=["64"], metavar="N")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a gallery.

    Returns:
        0 if all went well, 2 with one line on standard error for bad input, 130 if Ctrl-C ended it.
    """
    options = parse_arguments(arguments)
    try:
        if not options.out.parent.is_dir():
            raise FileNotFoundError(f"--out {options.out}: there is no folder {options.out.parent}")
        if options.list is not None:
            if options.image_file or options.query:
                raise ValueError("--list and --image-file with --query exclude each other")
            sections = sections_of(json.loads(options.list.read_text(encoding="utf-8")), options.list.parent)
        else:
            sections = crossed(options.image_file, options.query, options.pruner, options.keep_tokens)
            if not sections:
                raise ValueError("nothing to show: give --list, or --image-file and --query")
        options.image_file = []
        desk = Room(options).desk()
        shown = []
        for number, section in enumerate(sections, start=1):
            print(f"[{number} of {len(sections)}] {printable(section.title)}", flush=True)
            name = Path(section.image or section.video).name
            if section.video is not None:
                desk.show(name, video=load_video(section.video, options.num_frames))
            else:
                desk.show(name, [load_image(section.image)])
            shown.append((section.title, desk.compare(section.settings)))
        text = document(options.title, shown, options.introduction)
        options.out.write_text(text, encoding="utf-8")
        print(f"[{options.out}: {len(text.encode()) / 1024:.0f} KiB]")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
