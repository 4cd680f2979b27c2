"""What a run writes while it runs, so that nothing is lost and nothing doubled whenever it is killed.

Both runners keep their journal here: our own beside the answers, lmms-eval's in the folder of its results. Beside the
answers ``<name>.jsonl`` of our own lies the folder ``<name>.run`` (for ``<tag>/merge.jsonl``: ``<tag>.run``) with

    config.json           the run's identity; what can change an answer, compared before a run continues; the rest
    journal/*.jsonl       one file per process and session: a line per question, appended whole; until completion
    journal/*.next        how far a session's processes have taken questions to answer
    skipped.jsonl         questions that could not be asked, with the reason
    pictures.jsonl        what the pictures were, once complete
    summary.json          tokens and times, once complete
    lock, workers.lock    held while processes live

Every line of a journal carries the identity of its run and a checksum, so that a line of another run, or one that the
disk has changed, is told apart when it is read back. A question is known by its position in the question list, because
question ids repeat in some benchmarks.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval.files import read_json, write_json, write_whole

LOCK_PATIENCE_SECONDS = 5.0  # processes of a killed run may need a moment to go


class RunRefused(RuntimeError):
    """The run cannot continue as asked; the message says why and what to do."""


def run_folder(answers_file: Path) -> Path:
    """The folder that belongs to an answers file."""
    place = answers_file.parent if answers_file.name == "merge.jsonl" else answers_file
    return place.with_name(place.name.removesuffix(".jsonl") + ".run")


@contextlib.contextmanager
def hold(path: Path, shared: bool = False) -> Iterator[None]:
    """Hold the lock file ``path``; the system lets go of it when the process ends, however it ends.

    Raises:
        RunRefused: another process keeps it for longer than `LOCK_PATIENCE_SECONDS`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunRefused(f"another run is writing to {path.parent}: wait for it, or stop it") from None
                time.sleep(0.1)
        yield


# --- settings ------------------------------------------------------------------------------------------------------


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two settings, in words; "" if nothing does."""
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return "; ".join(f"{name}: {before.get(name)!r} then, {now.get(name)!r} now" for name in names)


def check_settings(folder: Path, settings: dict[str, Any]) -> str | None:
    """The identity of the run that began in ``folder`` with exactly these settings; ``None`` if none began.

    Raises:
        RunRefused: it began with other settings, or by an older version; the message says what differs.
    """
    if not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json")
    changes = differences(config["settings"], json.loads(json.dumps(settings)))
    if changes:
        raise RunRefused(
            f"{folder} holds a run with other settings, whose answers must not mix with new ones ({changes}). "
            "Give the old settings, another --tag, or --overwrite to delete the old answers"
        )
    if "run" not in config:
        raise RunRefused(f"{folder} was begun by an older version without checksums: --overwrite begins it anew")
    return config["run"]


def save_settings(folder: Path, settings: dict[str, Any], record: dict[str, Any]) -> str:
    """Begin a run in ``folder``; returns its identity."""
    run = secrets.token_hex(8)
    write_json(folder / "config.json", {"run": run, "settings": settings, "record": record}, indent=1)
    return run


def identity_of(folder: Path) -> str:
    """The identity of the run that has begun in ``folder``."""
    return read_json(folder / "config.json")["run"]


# --- journal -------------------------------------------------------------------------------------------------------


def _seal(row: Mapping[str, Any], run: str) -> str:
    """A row as its line: with its run's identity, and the checksum of all before it."""
    body = json.dumps({**row, "run": run})  # in ASCII: names of files need not be UTF-8
    return f'{body[:-1]}, "checksum": "{checksum_of(body.encode())}"}}\n'


def checksum_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _open_line(line: bytes) -> dict | None:
    """The row of a line, with its run's identity under "run"; ``None`` if it is not what was written."""
    try:
        body, mark, checksum = line.decode().rpartition(', "checksum": "')
        row = json.loads(body + "}") if mark else None
    except (ValueError, RecursionError):
        return None
    sound = isinstance(row, dict) and checksum == f'{checksum_of(body.encode() + b"}")}"}}'
    return row if sound else None


class Journal:
    """Appends lines to a file of its own; a line is there as a whole or, after a crash, cut and then ignored."""

    def __init__(self, path: Path, run: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.run = path, run
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._file).st_size
        whole = path.read_bytes().rfind(b"\n") + 1 if size else 0
        if whole < size:
            os.ftruncate(self._file, whole)  # the line on which a process was killed
        self._size = whole  # of whole lines; nobody else writes to this file

    def append(self, rows: Sequence[dict]) -> None:
        """Write ``rows``. Raises OSError naming the file (disk full, ...); what was written before is kept."""
        data = "".join(_seal(row, self.run) for row in rows).encode()
        size = self._size + len(data)
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise OSError(
                error.errno, f"{error.strerror}; the answers so far are kept, run again", self.path
            ) from error
        self._size = size

    def close(self) -> None:
        os.close(self._file)


@dataclass
class Journals:
    """What journals hold: the sound rows of one run by file, and the lines that are not its own, in words."""

    rows: dict[str, list[dict]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[dict]:
        for own in self.rows.values():
            yield from own

    def report(self) -> None:
        """Say on standard error which lines were left out."""
        for fault in self.faults:
            print(f"{fault}; left out, what it answered is asked again", file=sys.stderr)


def read_files(paths: Sequence[Path], run: str, has: Callable[[dict], bool]) -> Journals:
    """The rows of journal files; the line on which a process was killed is none.

    Args:
        run: identity of the run whose rows are wanted.
        has: whether a row is one that this run could have written.
    """
    found = Journals()
    for path in paths:
        data = path.read_bytes()
        rows: list[dict] = []
        damaged, foreign = [], []
        for number, line in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
            row = _open_line(line)
            if row is None:
                damaged.append(number)
            elif row.pop("run", None) != run or not has(row):
                foreign.append(number)
            else:
                rows.append(row)
        found.rows[path.name] = rows
        found.faults += [f"{path}, line {number}, is damaged or of another kind" for number in damaged]
        found.faults += [f"{path}, line {number}, is of another run" for number in foreign]
    return found


def read_journals(folder: Path, run: str) -> Journals:
    """The rows of our own runner written so far in ``folder``."""
    paths = sorted((folder / "journal").glob("*.jsonl"))
    return read_files(paths, run, lambda row: isinstance(row.get("position"), int))


def by_position(journals: Journals) -> dict[int, dict]:
    """The first row of every position."""
    entries: dict[int, dict] = {}
    for row in journals:
        entries.setdefault(row["position"], row)
    return entries


class Turns:
    """Hands ``total`` places out to all processes of a session, ``size`` at a time and in order.

    Whoever is done takes the next ones, so that nobody waits long for others at the end. What was taken is noted in a
    file under a lock, which works between machines with a common disk too. Nothing is to be undone after a kill: what
    was taken and not answered is to be answered in the next session, which counts anew.
    """

    WIDTH = 20  # digits: a number is overwritten in one go, and never needs more room on the disk

    def __init__(self, path: Path, total: int, size: int) -> None:
        self.path, self.total, self.size = path, total, size

    def reset(self) -> None:
        """Begin at the first place; for one process to call before the others begin."""
        write_whole(self.path, f"{0:0{self.WIDTH}d}")

    def __iter__(self) -> Iterator[range]:
        while True:
            with self.path.open("r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                start = int(file.read())
                end = min(start + self.size, self.total)
                os.pwrite(file.fileno(), f"{end:0{self.WIDTH}d}".encode(), 0)
            if start == end:
                return
            yield range(start, end)


def sessions(folder: Path) -> int:
    """How many sessions have written a journal."""
    return len({path.name.split("_")[0] for path in (folder / "journal").glob("*.jsonl")})


def seconds_of(journals: Journals) -> float:
    """Wall time of all sessions: of each, the time at which its last process wrote its last line."""
    last: dict[str, float] = {}
    for name, rows in journals.rows.items():
        session = name.split("_")[0]
        for row in rows:
            last[session] = max(last.get(session, 0.0), row["elapsed"])
    return sum(last.values())
