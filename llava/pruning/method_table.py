"""The table of methods in the documents, made from what the methods say of themselves.

python -m llava.pruning.method_table --write README.md docs/methods.md
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.pruning import list_pruners, pruner_class

START, END = "<!-- methods: made by python -m llava.pruning.method_table -->", "<!-- end of methods -->"
ROOT = Path(__file__).resolve().parents[2]  # of the repository
PLACES = {
    "pixels": "the picture",
    "encoder": "tokens before the projector",
    "projected": "projected tokens",
    "decoder": "decoder layers",
}
NEEDS = {  # fields that every host has are left out
    "image_embeds": "the question",
    "text_embeds": "the question",
    "query_embeds": "the question",
    "relevance": "the question",
    "class_attention": "an encoder with a class token",
    "class_features": "an encoder with a class token",
    "key_metric": "the encoder's keys",
    "pixels": "a second run of the tower",
}
EVERY_HOST = {"encoder_features", "encode"}


def method_table(folder: Path = ROOT) -> str:
    """A Markdown row per method: name, idea, where it acts, what it needs beside the visual tokens, paper.

    Args:
        folder: where the page lies, from which the links to the methods' files start.
    """
    lines = ["| `--pruner` | gives | acts on | needs | paper |", "|---|---|---|---|---|"]
    for name in list_pruners():
        cls = pruner_class(name)
        link = Path(os.path.relpath(inspect.getfile(cls), folder.resolve())).as_posix()
        cells = [f"[`{name}`]({link})", idea(cls), PLACES[cls.place], needs(cls()), paper_link(cls)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def idea(cls: type) -> str:
    """The first sentence of a method's docstring."""
    first = inspect.getdoc(cls).split("\n\n")[0]
    return re.split(r"\.(?:\s|$)", " ".join(first.split()))[0].rstrip(".") + "."


def needs(method: Any) -> str:
    """What a host must give beside the visual tokens, in words."""
    if method.place == "decoder":
        return "a Llama-style decoder"
    words = [NEEDS.get(field, f"`{field}`") for field in sorted(method.needs - EVERY_HOST)]
    return ", ".join(dict.fromkeys(words)) or "-"


def paper(cls: type) -> str | None:
    """Title of the paper that a method's docstring names; ``None`` for a control."""
    found = re.search(r'Paper: "(.+?)"', _words(cls))
    return found[1] if found else None


def paper_link(cls: type) -> str:
    """The paper's title, linked where the docstring has its number: ``Paper: "Title" (arXiv 2403.06764)``."""
    title = paper(cls)
    if title is None:
        return "control"
    number = re.search(r'Paper: ".+?" \(arXiv (\d{4}\.\d{4,5})', _words(cls))
    return f"[{title}](https://arxiv.org/abs/{number[1]})" if number else title


def _words(cls: type) -> str:
    return " ".join(inspect.getdoc(cls).split())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or write it between its marks in files."""
    parser = argparse.ArgumentParser(prog="python -m llava.pruning.method_table", description=__doc__)
    parser.add_argument("--write", type=Path, nargs="+", metavar="PAGE.md", help="pages whose table is replaced")
    options = parser.parse_args(arguments)
    if options.write is None:
        print(method_table())
        return
    texts = [page.read_text(encoding="utf-8") for page in options.write]
    for page, text in zip(options.write, texts, strict=True):
        if text.count(START) != 1 or text.count(END) != 1:
            parser.error(f"{page} must hold the lines {START} and {END} once")
    for page, text in zip(options.write, texts, strict=True):
        before, rest = text.split(START)
        table = method_table(page.parent)
        page.write_text(f"{before}{START}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
