"""Both forms of the harness's requests, read into conversations of text and visuals.

A *simple* request brings a text and a function that gives a document's visuals; a *chat* request brings a function
that gives messages. Either way the same document gives the same conversation here, unless its task writes chat
messages of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

PLACEHOLDER = "<image>"
DEFAULT_NEW_TOKENS = 1024  # of tasks that name no limit, as the harness's own LLaVA models have it
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class UnreadableVisual(ValueError):
    """An image or video of a document is missing, damaged or of a kind that the model cannot read."""


@dataclass(frozen=True)
class Visual:
    """An image or a video in a conversation.

    Args:
        kind: "image" or "video".
        content: a picture, the path of a file, or for a video the path of a folder of frames or a list of pictures.
    """

    kind: str
    content: Any

    @property
    def name(self) -> str:
        return str(self.content) if isinstance(self.content, str | Path) else f"an {type(self.content).__name__}"


@dataclass(frozen=True)
class Message:
    """A turn.

    Args:
        role: "user", "assistant" or "system".
        parts: texts and visuals in order.
        running: the parts are one running text, visuals where it has a place for them, and not a piece each.
    """

    role: str
    parts: tuple[str | Visual, ...]
    running: bool = False

    @property
    def text(self) -> str:
        """Its texts without the visuals, a line each."""
        return "\n".join(part for part in self.parts if isinstance(part, str))

    @property
    def visuals(self) -> list[Visual]:
        return [part for part in self.parts if isinstance(part, Visual)]


def last_text(messages: Sequence[Message]) -> str:
    """What the user said last. A pruner selects by it, without what only asks for a form of answer."""
    return next((message.text for message in reversed(messages) if message.role == "user"), "")


@dataclass(frozen=True)
class Decoding:
    """How a task wants its answers decoded; the same for all prompts of a batch."""

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    until: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `generate`, without ``until``."""
        sampling = self.temperature > 0
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": sampling,
            "temperature": self.temperature if sampling else None,
            "top_p": self.top_p if sampling else None,
            "num_beams": self.num_beams,
        }

    def cut(self, text: str) -> str:
        """An answer up to the first of the strings that end it."""
        ends = [text.find(stop) for stop in self.until if stop in text]
        return text[: min(ends)] if ends else text


def read_decoding(arguments: Mapping[str, Any]) -> Decoding:
    """A task's generation arguments. Names that are not about decoding, such as a task's image options, are not read.

    ``do_sample: false`` wins over a temperature, and a temperature of 0 means greedy.
    """
    until = arguments.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    temperature = float(arguments.get("temperature") or 0.0)
    if arguments.get("do_sample") is False:
        temperature = 0.0
    elif arguments.get("do_sample") and not arguments.get("temperature"):
        temperature = 1.0
    return Decoding(
        max_new_tokens=int(arguments.get("max_new_tokens") or DEFAULT_NEW_TOKENS),
        temperature=temperature,
        top_p=arguments.get("top_p"),
        num_beams=int(arguments.get("num_beams") or 1),
        until=tuple(stop for stop in until if stop),
    )


@dataclass(frozen=True)
class Asked:
    """A request, not opened yet: the document's visuals are read when its turn has come.

    Args:
        number: 0 for the first asking of this question, 1 for the first repetition of it, ...
    """

    text: str
    decoding: Decoding
    task: str
    split: str
    document: int
    number: int
    opener: Any
    is_chat: bool

    @property
    def key(self) -> str:
        """Names the question and how it is to be answered, the same in every run."""
        asked = [self.task, self.split, self.document, self.number, self.text, vars(self.decoding)]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]

    def open(self, documents: Mapping[str, Any]) -> list[Message]:
        """The conversation. Raises UnreadableVisual."""
        document = documents[self.task][self.split][self.document]
        try:
            found = self.opener(document)
        except SystemExit as error:  # some tasks end the whole process over a missing video
            raise UnreadableVisual(str(error)) from error
        except (OSError, SyntaxError) as error:
            raise UnreadableVisual(f"{type(error).__name__}: {error}") from error
        if self.is_chat:
            return chat_messages(found)
        visuals = [visual_of(item) for item in _as_list(found)]
        return [Message("user", interleave(visuals, self.text), running=PLACEHOLDER in self.text)]


def read_request(arguments: Sequence[Any], is_chat: bool, number: int = 0) -> Asked:
    """A request's arguments in the harness's order, which differs between the forms."""
    if is_chat:
        text, opener, decoding, document, task, split = arguments
    else:
        text, decoding, opener, document, task, split = arguments
    return Asked(text, read_decoding(decoding), task, split, document, number, opener, is_chat)


def visual_of(item: Any) -> Visual:
    """Tell a picture from a video, as simple requests leave it open. Raises UnreadableVisual for anything else."""
    if isinstance(item, Image.Image):
        return Visual("image", item)
    if isinstance(item, str | Path):
        return Visual("image" if str(item).lower().endswith(IMAGE_SUFFIXES) else "video", str(item))
    raise UnreadableVisual(f"a visual must be a picture or a path, got {type(item).__name__}")


def interleave(visuals: Sequence[Visual], text: str) -> tuple[str | Visual, ...]:
    """Put visuals where a text has placeholders for them, or in front of a text without.

    Raises:
        UnreadableVisual: there are placeholders, but not as many as visuals.
    """
    pieces = text.split(PLACEHOLDER)
    if len(pieces) == 1:
        return (*visuals, text)
    if len(pieces) != len(visuals) + 1:
        raise UnreadableVisual(f"a prompt has {len(pieces) - 1} {PLACEHOLDER} placeholders for {len(visuals)} visuals")
    parts: list[str | Visual] = [pieces[0]]
    for visual, piece in zip(visuals, pieces[1:], strict=True):
        parts += [visual, piece]
    return tuple(part for part in parts if part != "")


def chat_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Chat messages ``{"role", "content": [{"type": "text" | "image" | "video", ...}]}``, content may be plain text.

    Raises:
        UnreadableVisual: audio, or another kind of content.
    """
    read = []
    for message in messages:
        content = message["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        read.append(Message(message["role"], tuple(_part(piece) for piece in content)))
    return read


def _part(piece: Mapping[str, Any]) -> str | Visual:
    kind = piece["type"]
    if kind == "text":
        return piece["text"]
    if kind in ("image", "video"):
        return Visual(kind, piece["url"])
    raise UnreadableVisual(f"content of type {kind!r}: this model reads text, images and videos")


def _as_list(found: Any) -> list[Any]:
    if found is None:
        return []
    return list(found) if isinstance(found, list | tuple) else [found]
