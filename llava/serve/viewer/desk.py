"""A loaded model and the desks of its users: each has a picture of its own, none sees another's."""

from __future__ import annotations

import argparse
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from llava.pictures import TooLarge, decode_image
from llava.serve.cli import Session
from llava.serve.options import check_options
from llava.serve.status import Terminal
from llava.serve.transformers_session import TransformersSession
from llava.serve.viewer.hosted import look_of_hosted, tokens_of_view
from llava.serve.viewer.look import Comparison, Look
from llava.serve.viewer.own import look_of_session
from llava.serve.viewer.paths import without_paths
from llava.serve.viewer.setting import Setting
from llava.serve.viewer.turns import Turns
from llava.video import Video, load_video

MIB = 2**20
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ogv")  # what is read as a video


class Silent(Terminal):
    """A listener that needs nothing but the look."""

    def waiting(self, before: int) -> None:
        """The model works for others, so many of them. Raises `Stopped` if the look is not wanted any more."""

    def text(self, piece: str, end: bool) -> None:
        pass

    def line(self, text: str) -> None:
        pass


class Room:
    """A loaded model; one call of it runs at a time.

    Args:
        options: what `llava.serve.options.add_session` reads.
        most_waiting: looks that may wait for the model; ``None`` for any number.

    Raises:
        ValueError, OSError, ImportError: the options do not fit, or there is no such checkpoint.
    """

    def __init__(self, options: argparse.Namespace, most_waiting: int | None = None) -> None:
        check_options(options)
        self.options = options
        self.session = TransformersSession(options, None, keep_features=True) if options.hf else Session(options, None)
        self.turns = Turns(most_waiting)

    def desk(self) -> Desk:
        """A place for one user."""
        return Desk(self)


class Desk:
    """One user's picture or video, encoded once for all questions about it.

    Attributes:
        name: what the picture is called; "" where there is none.
        shown: how the model reads it, in words.
    """

    def __init__(self, room: Room) -> None:
        self.room = room
        self.session = room.session.another(Silent())
        self.lock = threading.Lock()  # between a picture that comes and a look at the one before
        self.name = self.shown = ""

    def show(self, name: str, pictures: Sequence[Image.Image] = (), video: Video | None = None) -> None:
        """Put pictures or a video on the desk. Raises ValueError if the model cannot read it."""
        with self.lock:
            self.name = ""
            self.session.show(list(pictures), video)
            self.shown = self.session.shown()
            self.name = name

    def tokens_of_view(self) -> int | None:
        """The most visual tokens that a view of what is here has; ``None`` where there is no picture."""
        if not self.name:
            return None
        if self.room.options.hf:
            return tokens_of_view(self.session)
        layouts = self.session.model.vision.layouts(self.session.visuals)
        return max(layout.eligible.shape[1] for layout, _ in layouts)

    def look(self, setting: Setting, listener: Silent | None = None) -> Look:
        """Ask the question and say what was kept for it.

        Raises:
            ValueError: there is no picture, the method does not fit the model, or too many wait for it.
            Stopped: the listener had enough before the answer began.
        """
        if not self.name:
            raise ValueError("no picture: choose one, upload or paste one")
        listener = listener or Silent()
        with self.room.turns.turn(listener.waiting), self.lock:
            self.session.listener = listener
            self.session.clear()
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always", UserWarning)
                self.session.use_pruner(setting.pruner())
                self.session.ask(setting.question)
            look = look_of_hosted if self.room.options.hf else look_of_session
            notes = dict.fromkeys(str(one.message) for one in told if issubclass(one.category, UserWarning))
            seen = look(self.session, setting)
            return replace(seen, reads=without_paths(seen.reads), notes=tuple(map(without_paths, notes)))

    def compare(self, settings: Sequence[Setting], listener: Callable[[int], Silent] | None = None) -> Comparison:
        """Looks with each of the settings beside each other; see `look`.

        Args:
            listener: who listens to the look of this number.
        """
        looks = [
            self.look(setting, None if listener is None else listener(number))
            for number, setting in enumerate(settings)
        ]
        return self.comparison(looks)

    def comparison(self, looks: Sequence[Look]) -> Comparison:
        return Comparison(self.name, self.session.model_line(), tuple(looks))


def read_upload(data: bytes, name: str, most_bytes: int, frames: int) -> tuple[list[Image.Image], Video | None]:
    """What a user sent: a picture through the checks of every picture (`llava.pictures`), or a video.

    A video is in a file of its own while its frames are read, and nowhere afterwards.

    Args:
        name: as the user's machine called it; stands in the messages, and tells a video by `VIDEO_SUFFIXES`. No file
            is opened by it.
        frames: of a video, at most.

    Raises:
        ValueError, ImportError: neither, damaged, too large; or a video, and PyAV is not installed.
    """
    if len(data) > most_bytes:
        raise TooLarge(f"{name} has {len(data) / MIB:.1f} MiB, more than the limit of {most_bytes / MIB:g} MiB")
    if Path(name).suffix.lower() not in VIDEO_SUFFIXES:
        return [decode_image(data, name)], None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "upload"
        file.write_bytes(data)
        try:
            return [], load_video(file, frames)
        except ValueError as error:
            raise ValueError(str(error).replace(str(file), name)) from None
