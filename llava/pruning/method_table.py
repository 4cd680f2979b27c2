"""The README's table of methods, made from what the methods say of themselves.

python -m llava.pruning.method_table --write README.md
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Sequence
from pathlib import Path

from llava.pruning import Pruner, list_pruners, pruner_class

START, END = "<!-- methods: made by python -m llava.pruning.method_table -->", "<!-- end of methods -->"
PLACES = {
    "pixels": "the picture",
    "encoder": "tokens before the projector",
    "projected": "projected tokens",
    "decoder": "decoder layers",
}
NEEDS = {  # fields that every host has do not stand here
    "image_embeds": "CLIP's text tower",
    "text_embeds": "CLIP's text tower",
    "query_embeds": "the question's embeddings",
    "class_attention": "an encoder with a class token",
    "class_features": "an encoder with a class token",
    "key_metric": "the encoder's keys",
    "pixels": "a second run of the tower",
}
EVERY_HOST = {"encoder_features", "encode"}


def method_table() -> str:
    """A Markdown row per method: name, idea, where it acts, what it needs beside the visual tokens, paper."""
    lines = ["| `--pruner` | gives | acts on | needs | paper |", "|---|---|---|---|---|"]
    for name in list_pruners():
        cls = pruner_class(name)
        cells = [f"`{name}`", idea(cls), PLACES[cls.place], needs(cls()), paper(cls) or "control"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def idea(cls: type[Pruner]) -> str:
    """The first sentence of a method's docstring."""
    first = inspect.getdoc(cls).split("\n\n")[0]
    return re.split(r"\.(?:\s|$)", " ".join(first.split()))[0].rstrip(".") + "."


def needs(pruner: Pruner) -> str:
    """What a host must give beside the visual tokens, in words."""
    if pruner.place == "decoder":
        return "a Llama-style decoder"
    words = [NEEDS.get(field, f"`{field}`") for field in sorted(pruner.needs - EVERY_HOST)]
    return ", ".join(dict.fromkeys(words)) or "-"


def paper(cls: type[Pruner]) -> str | None:
    """Title of the paper that a method's docstring names; ``None`` for a control."""
    found = re.search(r'Paper: "(.+?)"', " ".join(inspect.getdoc(cls).split()))
    return found[1] if found else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or write it between its marks in a file."""
    parser = argparse.ArgumentParser(prog="python -m llava.pruning.method_table", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="README.md", help="file whose table is replaced")
    options = parser.parse_args(arguments)
    if options.write is None:
        print(method_table())
        return
    text = options.write.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        parser.error(f"{options.write} must hold the lines {START} and {END} once")
    before, rest = text.split(START)
    options.write.write_text(f"{before}{START}\n{method_table()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
