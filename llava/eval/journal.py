"""What a run writes while it runs, so that nothing is lost and nothing doubled whenever it is killed.

Beside the answers ``<name>.jsonl`` stands the folder ``<name>.run`` (for ``<tag>/merge.jsonl``: ``<tag>.run``) with

    config.json           what can change an answer, compared before a run goes on; and the rest, for the record
    journal/*.jsonl       one file per process and session: a line per question, appended whole; until completion
    journal/*.next        how far a session's processes have taken questions to answer
    skipped.jsonl         questions that could not be asked, with the reason
    summary.json          tokens and times, once complete
    lock, workers.lock    held while processes live

A question is known by its position in the question list, because question ids repeat in some benchmarks.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava.eval.files import json_lines, read_json, write_json, write_whole

LOCK_PATIENCE_SECONDS = 5.0  # processes of a killed run may need a moment to go


class RunRefused(RuntimeError):
    """The run cannot go on as asked; the message says why and what to do."""


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


def check_settings(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a run with exactly these settings began in ``folder``.

    Raises:
        RunRefused: it began with other settings; the message lists what differs.
    """
    if not (folder / "config.json").is_file():
        return False
    before = read_json(folder / "config.json")["settings"]
    settings = json.loads(json.dumps(settings))
    names = [name for name in sorted({*before, *settings}) if before.get(name) != settings.get(name)]
    if names:
        changes = "; ".join(f"{name}: {before.get(name)!r} then, {settings.get(name)!r} now" for name in names)
        raise RunRefused(
            f"{folder} holds a run with other settings, whose answers must not mix with new ones ({changes}). "
            "Give the old settings, another --tag, or --overwrite to delete the old answers"
        )
    return True


def save_settings(folder: Path, settings: dict[str, Any], record: dict[str, Any]) -> None:
    write_json(folder / "config.json", {"settings": settings, "record": record}, indent=1)


# --- journal -------------------------------------------------------------------------------------------------------


class Journal:
    """Appends lines to a file of its own; a line is there as a whole or, after a crash, cut and then ignored."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = os.fstat(self._file).st_size  # of whole lines; nobody else writes to this file

    def append(self, rows: Sequence[dict]) -> None:
        """Write ``rows``. Raises OSError naming the file (disk full, ...); what was written before stays."""
        data = json_lines(rows).encode()
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


def read_journals(folder: Path) -> dict[int, dict]:
    """Entry of every position written so far; the line on which a process was killed is left out."""
    entries: dict[int, dict] = {}
    for path in sorted((folder / "journal").glob("*.jsonl")):
        data = path.read_bytes()
        for line in data[: data.rfind(b"\n") + 1].splitlines():
            entry = json.loads(line)
            entries.setdefault(entry["position"], entry)
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


def seconds_of(folder: Path) -> float:
    """Wall time of all sessions: of each, the time at which its last process wrote its last line."""
    last: dict[str, float] = {}
    for path in (folder / "journal").glob("*.jsonl"):
        session = path.name.split("_")[0]
        data = path.read_bytes()
        for line in data[: data.rfind(b"\n") + 1].splitlines():
            last[session] = max(last.get(session, 0.0), json.loads(line)["elapsed"])
    return sum(last.values())


# --- completion ----------------------------------------------------------------------------------------------------


def chunk_slices(questions: int, chunks: int) -> list[slice]:
    """Consecutive slices of equal (rounded up) size; the last ones may be shorter or empty."""
    size = -(-questions // chunks)
    return [slice(min(i * size, questions), min((i + 1) * size, questions)) for i in range(chunks)]


def merge_chunks(folder: Path) -> Path:
    """Write ``merge.jsonl`` anew from ``<chunks>_<i>.jsonl`` in ``folder``, in the order of i; returns its path.

    Raises:
        ValueError: a chunk is missing, or there are chunks of several runs; names them.
    """
    found = [path.stem.split("_") for path in folder.glob("*_*.jsonl")]
    counts = {int(parts[0]) for parts in found if len(parts) == 2 and all(part.isdecimal() for part in parts)}
    if len(counts) != 1:
        raise ValueError(f"{folder.absolute()} must hold the chunks <n>_0.jsonl to <n>_<n-1>.jsonl of one n")
    chunks = [folder / f"{n}_{i}.jsonl" for n in counts for i in range(n)]
    missing = [str(path.absolute()) for path in chunks if not path.is_file()]
    if missing:
        raise ValueError(f"cannot merge: {', '.join(missing)} missing")
    texts = [path.read_bytes() for path in chunks]
    write_whole(
        folder / "merge.jsonl", b"".join(text if text.endswith(b"\n") or not text else text + b"\n" for text in texts)
    )
    return folder / "merge.jsonl"


def finish(answers_file: Path, folder: Path, questions: int, chunks: int | None, summary: dict[str, Any]) -> dict:
    """Turn the journals of a complete run into its answer files; returns the summary as written.

    Args:
        chunks: also write ``<chunks>_<i>.jsonl`` beside ``merge.jsonl``; ``None`` for a single file.
    """
    entries = read_journals(folder)
    lost = [position for position in range(questions) if position not in entries]
    if lost:
        raise RunRefused(f"{len(lost)} questions are unanswered, first number {lost[0]}: run again to answer them")
    ordered = [entries[position] for position in range(questions)]
    skipped = [entry for entry in ordered if "skipped" in entry]
    answered = [entry for entry in ordered if "answer" in entry]
    summary = {
        **summary,
        "questions": questions,
        "skipped": len(skipped),
        "wall_seconds": seconds_of(folder),
        "model_seconds": sum(entry["seconds"] for entry in answered),
        "sessions": sessions(folder),
        **mean_tokens(answered),
    }
    if skipped:
        write_whole(folder / "skipped.jsonl", json_lines(skipped))
    for part, piece in enumerate(chunk_slices(questions, chunks or 1)):
        if chunks is not None:
            lines = json_lines(entry["answer"] for entry in ordered[piece] if "answer" in entry)
            write_whole(answers_file.with_name(f"{chunks}_{part}.jsonl"), lines)
    write_json(folder / "summary.json", summary, indent=1)
    write_whole(answers_file, json_lines(entry["answer"] for entry in answered))
    shutil.rmtree(folder / "journal")
    return summary


def mean_tokens(entries: Sequence[dict]) -> dict[str, float]:
    """Visual tokens, their mean over layers, newline tokens and prefill work per question that has a picture."""
    counts = [entry["tokens"] for entry in entries if entry["tokens"] is not None]
    return {
        name: sum(count[name] for count in counts) / len(counts) if counts else 0.0
        for name in ("visual_tokens", "average_tokens", "newline_tokens", "prefill_flops")
    }


def discard(answers_file: Path, folder: Path) -> None:
    """Delete a run's answers, chunks and journals; its lock stays."""
    answers_file.unlink(missing_ok=True)
    if answers_file.name == "merge.jsonl":
        for path in answers_file.parent.glob("*_*.jsonl"):
            path.unlink()
    for name in ("config.json", "summary.json", "skipped.jsonl", "score.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "journal", ignore_errors=True)
