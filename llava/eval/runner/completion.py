"""The end of a run: its journals become answer files, which are known again later; or all of it is deleted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval.files import encoded, json_lines, read_json, read_whole_lines, write_json, write_whole
from llava.eval.runner import pictures
from llava.eval.runner.journal import (
    RunRefused,
    by_position,
    checksum_of,
    read_journals,
    seconds_of,
    sessions,
)


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


def finish(
    answers_file: Path, folder: Path, run: str, questions: int, chunks: int | None, summary: dict[str, Any]
) -> dict:
    """Turn the journals of a complete run into its answer files; returns the summary as written.

    Args:
        run: the run's identity.
        chunks: also write ``<chunks>_<i>.jsonl`` beside ``merge.jsonl``; ``None`` for a single file.
    """
    journals = read_journals(folder, run)
    entries = by_position(journals)
    lost = [position for position in range(questions) if position not in entries]
    if lost:
        raise RunRefused(f"{len(lost)} questions are unanswered, first number {lost[0]}: run again to answer them")
    ordered = [entries[position] for position in range(questions)]
    skipped = [entry for entry in ordered if "skipped" in entry]
    answered = [entry for entry in ordered if "answer" in entry]
    text = json_lines(entry["answer"] for entry in answered)
    summary = {
        **summary,
        "questions": questions,
        "skipped": len(skipped),
        "wall_seconds": seconds_of(journals),
        "model_seconds": sum(entry["seconds"] for entry in answered),
        "sessions": sessions(folder),
        **mean_tokens(answered),
        "answers": {"lines": len(answered), "checksum": checksum_of(encoded(text))},
    }
    if skipped:
        write_whole(folder / "skipped.jsonl", json_lines(skipped))
    for part, piece in enumerate(chunk_slices(questions, chunks or 1)):
        if chunks is not None:
            lines = json_lines(entry["answer"] for entry in ordered[piece] if "answer" in entry)
            write_whole(answers_file.with_name(f"{chunks}_{part}.jsonl"), lines)
    shown = {entry["picture"]["file"]: entry["picture"] for entry in answered if entry.get("picture")}
    write_whole(folder / "pictures.jsonl", json_lines(shown.values()))
    write_json(folder / "summary.json", summary, indent=1)
    write_whole(answers_file, text)
    shutil.rmtree(folder / "journal")
    return summary


def check_complete(answers_file: Path, folder: Path) -> None:
    """Check that the answers of a complete run are those it wrote, about the pictures that are there.

    Raises:
        RunRefused: the file was cut or changed since, or a picture was; says which.
    """
    summary = read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    if "answers" not in summary:
        raise RunRefused(f"{folder} does not tell what {answers_file} should hold: --overwrite asks again")
    data = answers_file.read_bytes()
    if checksum_of(data) != summary["answers"]["checksum"]:
        raise RunRefused(
            f"{answers_file} is not what the run wrote: {data.count(bytes([10]))} lines where it wrote "
            f"{summary['answers']['lines']}, or changed ones; --overwrite asks again"
        )
    if (folder / "pictures.jsonl").is_file():
        check_pictures(read_whole_lines(folder / "pictures.jsonl"))


def check_pictures(seen: Sequence[dict]) -> None:
    """Raise RunRefused if a picture that was asked about is another one now."""
    changed = pictures.changed(seen)
    if changed:
        raise RunRefused(
            f"{len(changed)} pictures are not those that answers were given about, first {changed[0]}: put the old "
            "ones back, or --overwrite asks again"
        )


def mean_tokens(entries: Sequence[dict]) -> dict[str, float]:
    """Visual tokens, their mean over layers, newline tokens and prefill work per question that has a picture."""
    counts = [entry["tokens"] for entry in entries if entry["tokens"] is not None]
    return {
        name: sum(count[name] for count in counts) / len(counts) if counts else 0.0
        for name in ("visual_tokens", "average_tokens", "newline_tokens", "prefill_flops")
    }


def discard(answers_file: Path, folder: Path) -> None:
    """Delete a run's journal, answers and chunks, its settings last; its lock is kept.

    A kill in between leaves settings under which nothing is left to adopt: the journal goes in one step.
    """
    gone = folder / "journal.deleted"
    shutil.rmtree(gone, ignore_errors=True)
    if (folder / "journal").exists():
        os.replace(folder / "journal", gone)
        shutil.rmtree(gone)
    answers_file.unlink(missing_ok=True)
    if answers_file.name == "merge.jsonl":
        for path in answers_file.parent.glob("*_*.jsonl"):
            path.unlink()
    for name in ("summary.json", "skipped.jsonl", "pictures.jsonl", "score.json", "config.json"):
        (folder / name).unlink(missing_ok=True)
