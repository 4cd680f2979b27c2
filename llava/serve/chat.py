"""The chat at the command line: questions, commands and what they confirm, and Ctrl-C."""

from __future__ import annotations

import argparse
import glob
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from llava.pictures import load_image
from llava.pruning import Method, list_pruners
from llava.serve.flags import make_pruner
from llava.serve.options import without_budget
from llava.serve.token_picture import save_drawing
from llava.terminal import printable
from llava.video import Video, load_video

COMMANDS = {
    "/image": ("PATH ...", "ask about other pictures: files or addresses, quoted where they hold spaces"),
    "/video": ("PATH", "ask about a video: a file, or a folder of frames"),
    "/keep": (
        "N|auto|full",
        "visual tokens kept of each view from now on: a count, a share, as many as it takes, or all",
    ),
    "/pruner": ("NAME [key=value ...]", "the method that chooses them"),
    "/clear": ("", "forget the conversation, not the pictures"),
    "/help": ("", "this list"),
    "/quit": ("", "the end; so is Ctrl-D"),
}
WITH_PATHS = ("/image", "/video")


class AnySession(Protocol):
    """What the chat asks of a session, whatever runs the model."""

    arguments: argparse.Namespace
    pruner: Method | None
    stopped: bool

    def use_pruner(self, pruner: Method | None) -> None: ...
    def clear(self) -> None: ...
    def show(self, pictures: Sequence[Image.Image] = (), video: Video | None = None) -> None: ...
    def shown(self) -> str: ...
    def model_line(self) -> str: ...
    def ask(self, question: str) -> str: ...
    def panel(self) -> Image.Image: ...
    def has_pictures(self) -> bool: ...


def method_line(pruner: Method | None, name: str) -> str:
    """What the chat says of the method that is in use."""
    if pruner is None:
        return f"none, every visual token is kept (/keep N prunes with {name})"
    budget = pruner.keep_tokens
    if pruner.auto is not None:
        return f"{pruner.name}, as many visual tokens of each view as it takes ({budget})"
    kept = f"{budget:.0%} of the visual tokens" if isinstance(budget, float) else f"{budget} visual tokens"
    return f"{pruner.name}, {kept} of each view"


class Chat:
    """Reads questions and commands until /quit or the end of the input.

    Args:
        read: gives the next line for a prompt; raises EOFError at the end.
    """

    def __init__(self, session: AnySession, read: Callable[[str], str] = input) -> None:
        self.session, self.read = session, read
        options = session.arguments
        self.keep, self.name, self.options = options.keep_tokens, options.pruner, options.pruner_args
        self.file_names: list[str] = [*options.image_file, *([options.video_file] if options.video_file else [])]

    def run(self) -> None:
        prepare_keyboard()
        print(f"model    {printable(self.session.model_line())}")
        print(f"method   {method_line(self.session.pruner, self.name)}")
        print(f"picture  {self._pictures()}\n/help lists the commands; Ctrl-C stops an answer")
        interrupted = False
        while True:
            try:
                line = self.read("you: ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                if interrupted:
                    return
                interrupted = True
                print("[Ctrl-C once more, Ctrl-D or /quit ends the chat]")
                continue
            interrupted = False
            if line == "/quit":
                return
            try:
                self.obey(line)
            except EOFError:  # while a path was asked for
                print()
                return
            except KeyboardInterrupt:
                print("\n[stopped]")
            except (ValueError, OSError, ImportError) as error:
                print(f"error: {printable(error)}")

    def obey(self, line: str) -> None:
        """Do what one line says, and say what was done."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command in WITH_PATHS and not rest:
            rest = self.read(f"{command[1:]}: ").strip()
            if not rest:
                print("[nothing changed]")
                return
        match command:
            case "":
                return
            case "/help":
                print(command_list())
            case "/clear":
                self.session.clear()
                print("[conversation forgotten, pictures kept]")
            case "/image":
                names = paths_in(rest)
                self.session.show([load_image(name) for name in names])
                self._confirm_pictures(names)
            case "/video":
                name = " ".join(paths_in(rest))
                self.session.show(video=load_video(name, self.session.arguments.num_frames))
                self._confirm_pictures([name])
            case "/keep":
                if not rest:
                    raise ValueError(f"/keep {COMMANDS['/keep'][0]}; now: {self.keep}")
                self.session.use_pruner(make_pruner(self.name, rest, self.options))
                self.keep = rest
                self._confirm_method()
            case "/pruner":
                name, *options = rest.split() or [""]
                if not name:
                    raise ValueError(f"/pruner NAME [key=value ...]; methods: {', '.join(list_pruners())}")
                self.session.use_pruner(make_pruner(name, self.keep, options))
                self.name, self.options = name, options
                self._confirm_method()
            case _ if command.startswith("/"):
                raise ValueError(f"unknown command {command}; /help lists the commands: {' '.join(COMMANDS)}")
            case _:
                self._ask(line)

    def _ask(self, question: str) -> None:
        self.session.ask(question)
        if self.session.arguments.show_tokens and self.session.has_pictures() and not self.session.stopped:
            save_drawing(self.session.panel(), self.session.arguments.show_tokens)

    def _confirm_method(self) -> None:
        if self.session.pruner is None and self.keep == "full":
            print(f"[{without_budget(self.name)}]")
        else:
            print(f"[method: {method_line(self.session.pruner, self.name)}]")

    def _confirm_pictures(self, names: Sequence[str]) -> None:
        self.file_names = list(names)
        print(f"[{self._pictures()}; a new conversation]")

    def _pictures(self) -> str:
        if not self.session.has_pictures():
            return "none (/image PATH)"
        names = ", ".join(Path(name).name for name in self.file_names)
        return f"{printable(names)}: {self.session.shown()}"


def command_list() -> str:
    """One line for each command."""
    width = max(len(f"{name} {usage}") for name, (usage, _) in COMMANDS.items())
    return "\n".join(f"{f'{name} {usage}':<{width}}  {what}" for name, (usage, what) in COMMANDS.items())


def paths_in(text: str) -> list[str]:
    """Paths as a shell reads them: quoted, escaped, ``~``; a text that is a path as it stands is that one path.

    Raises:
        ValueError: a quote without its partner.
    """
    whole = Path(text).expanduser()
    if whole.exists():
        return [str(whole)]
    try:
        return [os.path.expanduser(part) for part in shlex.split(text)]
    except ValueError as error:
        raise ValueError(f"{text}: {error} (quote a path that holds quotes)") from None


def prepare_keyboard() -> None:
    """History and completion of commands, methods and paths, where there is a keyboard and readline."""
    if not sys.stdin.isatty():
        return
    try:
        import readline
    except ImportError:  # Windows
        return
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")
    readline.set_completer(lambda word, state: [*completions(readline.get_line_buffer(), word), None][state])


def completions(line: str, word: str) -> list[str]:
    """What ``word``, the last one of ``line``, may become."""
    command, space, _ = line.lstrip().partition(" ")
    if not space:
        return [f"{name} " for name in COMMANDS if word and name.startswith(word)]
    if command == "/pruner":
        return [f"{name} " for name in list_pruners() if name.startswith(word)]
    if command in WITH_PATHS:
        found = sorted(glob.glob(f"{glob.escape(os.path.expanduser(word))}*"))
        return [f"{path}/" if os.path.isdir(path) else shlex.quote(path) for path in found]
    return []
