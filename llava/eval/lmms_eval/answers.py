"""Answers kept on disk as they come: a line each, in a file per process, under settings that may not change.

The harness's own response cache writes a task's answers when the last of them is there; this one loses at most the
batch that a process was at when it was killed. The lines are those of our own runner's journal.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from llava.eval.files import read_json, write_json
from llava.eval.runner.journal import Journal, differences, hold, read_files

SETTINGS_FILE, SUMMARY_FILE = "settings.json", "summary.json"
RUN = "run"  # its identity, among the settings in their file


@dataclass(frozen=True)
class Answer:
    """An answer, and what it cost.

    Args:
        text: cut at the strings that end it.
        cost: numbers of `summarise` (visual_tokens, ...); empty for a prompt without visuals.
        prompt_tokens, new_tokens: length of the prompt with its visual tokens, and of the answer.
        seconds: its share of its batch's time in the model.
        unreadable: why its visual could not be read; such an answer is empty.
    """

    text: str
    cost: Mapping[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    unreadable: str | None = None


class AnswerBook:
    """Answers by key; with a folder, also those of earlier sessions, and later ones find these.

    Args:
        folder: ``None`` keeps answers in memory.
        settings: everything that can change an answer.
        rank: number of this process.

    Raises:
        ValueError: the folder holds answers that were given under other settings; names what differs.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        self.answers: dict[str, Answer] = {}
        self.places: dict[str, tuple[str, int]] = {}  # task and document of each answer
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        run = self._join_run(json.loads(json.dumps(settings)))
        journals = read_files(sorted(folder.glob("answers_*.jsonl")), run, _is_entry)
        if rank == 0:
            journals.report()
        for entry in journals:
            answer = Answer(**entry["answer"])
            if answer.unreadable is None:  # another session may find the file in place
                self.answers[entry["key"]] = answer
                self.places[entry["key"]] = entry["task"], entry["document"]
        self._journal = Journal(folder / f"answers_{rank}.jsonl", run)

    def _join_run(self, settings: dict[str, Any]) -> str:
        """The identity of the run in the folder, which the first of its processes gives it."""
        path = self.folder / SETTINGS_FILE
        with hold(self.folder / "settings.lock"):
            if not path.exists():
                write_json(path, {**settings, RUN: secrets.token_hex(8)}, indent=1)
        there = read_json(path)
        run = there.pop(RUN, None)
        changes = differences(there, settings)
        if changes:
            raise ValueError(
                f"{self.folder} holds answers given under other settings ({changes}): name another folder"
            )
        if run is None:
            raise ValueError(
                f"{self.folder} holds answers of an older version, without checksums: name another folder or delete it"
            )
        return run

    def append(self, entries: Sequence[tuple[str, str, int, Answer]]) -> None:
        """Keep answers: (key, task, document, answer)."""
        rows = []
        for key, task, document, answer in entries:
            self.answers[key], self.places[key] = answer, (task, document)
            rows.append({"key": key, "task": task, "document": document, "answer": asdict(answer)})
        if self.folder is not None:
            self._journal.append(rows)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        if self.folder is not None:
            write_json(self.folder / SUMMARY_FILE, summary, indent=1)


def _is_entry(row: dict) -> bool:
    """Whether a journal's row is one of this book's."""
    answer = row.get("answer")
    named = {"key", "task", "document"} <= row.keys()
    return named and isinstance(answer, dict) and answer.keys() <= {one.name for one in fields(Answer)}


def summarise(answers: Mapping[str, tuple[str, int, Answer]]) -> dict[str, dict[str, Any]]:
    """By task: how many questions, the mean of every cost, seconds, and the questions that were not put.

    Args:
        answers: by key (task, document, answer), of all processes.
    """
    tasks: dict[str, list[tuple[int, Answer]]] = {}
    for task, document, answer in answers.values():
        tasks.setdefault(task, []).append((document, answer))
    summary = {}
    for task, own in tasks.items():
        costs = [answer.cost for _, answer in own if answer.cost]
        unreadable = [
            {"document": document, "reason": answer.unreadable} for document, answer in own if answer.unreadable
        ]
        summary[task] = {
            "questions": len(own) - len(unreadable),
            **{name: fmean(cost[name] for cost in costs) for name in (costs[0] if costs else {})},
            "new_tokens": sum(answer.new_tokens for _, answer in own),
            "model_seconds": sum(answer.seconds for _, answer in own),
            "unreadable": sorted(unreadable, key=lambda item: item["document"]),
        }
    return summary
