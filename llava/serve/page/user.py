"""One browser tab: its desk, the work that is under way for it, and how that is told while it runs."""

from __future__ import annotations

import base64
import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlencode

import torch
from PIL import Image

from llava.serve.status import Stopped
from llava.serve.viewer.desk import Desk, Silent, read_upload
from llava.serve.viewer.look import MOST_LOOKS, Comparison, Look
from llava.serve.viewer.paths import without_paths
from llava.serve.viewer.setting import Setting
from llava.video import Video

logger = logging.getLogger(__name__)

DOING = {"vision": "looking at the picture", "selection": "choosing the tokens", "answer": "answering"}
WAITING = "waiting for the model"
UNEXPECTED = "something went wrong on the server; its log tells more"


@dataclass(frozen=True)
class Bundled:
    """A picture or a video that the page offers."""

    name: str
    picture: Image.Image | None = None
    video: Video | None = None

    @property
    def thumbnail(self) -> Image.Image:
        return self.picture if self.picture is not None else self.video.frames[0]


@dataclass(frozen=True)
class Progress:
    """What is told while looks are made.

    Args:
        doing: which stage of which look.
        answer: the words so far.
        done: the looks that are finished.
    """

    doing: str
    answer: str = ""
    done: tuple[Look, ...] = ()


class Replaced(Exception):
    """A run came to its end after another one had begun in the same tab."""


class Relay(Silent):
    """Hands on what a session tells to another thread, and stops the session when asked."""

    def __init__(self, told: queue.Queue[tuple[str, str]], stop: threading.Event) -> None:
        self.told, self.stop = told, stop
        self.before = 0

    def waiting(self, before: int) -> None:
        self._check()
        if before != self.before:
            self.told.put(("stage", f"{WAITING}, {before} before this one"))
        self.before = before

    def stage(self, name: str) -> None:
        self._check()
        self.told.put(("stage", DOING[name]))

    def text(self, piece: str, end: bool) -> None:
        if not end:
            self._check()
        self.told.put(("text", piece))

    def _check(self) -> None:
        if self.stop.is_set():
            raise Stopped


@dataclass
class User:
    """What the server holds for a tab, and nobody else sees.

    Args:
        bundled: name of the bundled picture that is on the desk; ``None`` for an own one.
        comparison: what is shown.
        stop: ends the run that is under way; every run has one of its own.
    """

    desk: Desk
    bundled: str | None = None
    comparison: Comparison | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def choose(self, offered: dict[str, Bundled], name: str) -> Image.Image:
        """Put a bundled picture on the desk; its thumbnail. Raises ValueError for an unknown name."""
        if name not in offered:
            raise ValueError(f"there is no picture {name!r}; pictures: {', '.join(offered)}")
        one = offered[name]
        self.desk.show(name, [one.picture] if one.picture is not None else [], one.video)
        self.bundled, self.comparison = name, None
        return one.thumbnail

    def take(self, message: Any, offered: dict[str, Bundled], most_bytes: int, frames: int) -> Image.Image:
        """Put what the page sent on the desk, {"bundled": name} or {"name", "data"} in base64; its thumbnail.

        Raises:
            ValueError, ImportError: see `llava.serve.viewer.desk.read_upload`.
        """
        if not isinstance(message, dict):
            raise ValueError("expected a picture")
        if "bundled" in message:
            return self.choose(offered, str(message["bundled"]))
        name = str(message.get("name") or "picture")[:80]
        if len(message["data"]) > most_bytes * 4 // 3 + 4:
            raise ValueError(f"{name} is larger than the limit of {most_bytes / 2**20:g} MiB")
        data = base64.b64decode(message["data"], validate=True)
        pictures, video = read_upload(data, name, most_bytes, frames)
        self.desk.show(name, pictures, video)
        self.bundled, self.comparison = None, None
        return pictures[0] if pictures else video.frames[0]

    def work(self, settings: Sequence[Setting]) -> Iterator[Progress]:
        """Make the looks one after another in a thread of its own, and tell how it goes; `comparison` has them.

        A run that is under way for this tab is stopped, and tells nothing more.

        Raises:
            ValueError: no look or too many; and whatever a look raises.
        """
        if not 1 <= len(settings) <= MOST_LOOKS:
            raise ValueError(f"one to {MOST_LOOKS} looks stand beside each other, got {len(settings)}")
        self.stop.set()
        self.stop = stop = threading.Event()
        looks: list[Look] = []
        try:
            for number, setting in enumerate(settings, start=1):
                where = f"{number} of {len(settings)}: {setting.label()}, " if len(settings) > 1 else ""
                yield Progress(where + WAITING, done=tuple(looks))
                for progress in self._one(setting, where, looks, stop):
                    if self.stop is stop:
                        yield progress
                if self.stop is not stop:
                    raise Replaced
                self.comparison = self.desk.comparison(looks)
                if looks[-1].stopped:
                    return
        finally:
            stop.set()  # whoever reads this has gone: so does the work

    def _one(self, setting: Setting, where: str, looks: list[Look], stop: threading.Event) -> Iterator[Progress]:
        done = tuple(looks)
        told: queue.Queue[tuple[str, str]] = queue.Queue()
        failed: list[BaseException] = []

        def run() -> None:
            try:
                looks.append(self.desk.look(setting, Relay(told, stop)))
            except BaseException as error:  # told to the reader of the queue
                failed.append(error)
            told.put(("end", ""))

        threading.Thread(target=run, daemon=True).start()
        doing, answer = where + WAITING, ""
        while True:
            kind, text = told.get()
            if kind == "end":
                break
            if kind == "stage":
                doing = where + text
            else:
                answer += text
            yield Progress(doing, answer, done)
        if failed:
            raise failed[0] if self.stop is stop else Replaced


def told_error(error: BaseException) -> str:
    """What the user is told of an error: its message, or that there was one."""
    if isinstance(error, Stopped):
        return "stopped"
    if isinstance(error, torch.OutOfMemoryError):
        return "the model ran out of memory: take a smaller budget, picture or number of frames"
    if isinstance(error, (ValueError, ImportError)) and not isinstance(error, UnicodeError):
        return without_paths(str(error))
    logger.error("unexpected", exc_info=error)
    return UNEXPECTED


def address_of(settings: Sequence[Setting], picture: str | None) -> str:
    """The query of an address that shows the same again; pictures of the user's own are not in it."""
    if len(settings) == 1:
        return settings[0].query(picture)
    named = [("picture", picture)] if picture else []
    return "?" + urlencode([*named, *(("look", setting.query(None)[1:]) for setting in settings)])


def read_address(query: str) -> tuple[str | None, list[Setting]]:
    """The picture's name and the settings of an address. Raises ValueError for what a setting may not have."""
    values = parse_qs(query)
    picture = values.get("picture", [None])[0]
    if "look" in values:
        settings = [Setting.from_query(parse_qs(look)) for look in values["look"]]
        if len(settings) > MOST_LOOKS:
            raise ValueError(f"the address has {len(settings)} looks; at most {MOST_LOOKS} stand beside each other")
        return picture, settings
    return picture, [Setting.from_query(values)] if "question" in values else []
