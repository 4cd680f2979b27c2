"""Answers kept on disk as they come: a line each, in a file per process, under settings that may not change.

The harness's own response cache writes a task's answers when the last of them is there; this one loses at most the
batch that a process was at when it was killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

SETTINGS_FILE, SUMMARY_FILE = "settings.json", "summary.json"


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
    """Answers by key; with a folder, also those of earlier runs, and later runs find these.

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
        self._check_settings(json.loads(json.dumps(settings)))
        for path in sorted(folder.glob("answers_*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                self._read(line)
        self._own_file = folder / f"answers_{rank}.jsonl"
        if self._own_file.is_file() and not self._own_file.read_bytes().endswith(b"\n"):
            with self._own_file.open("a", encoding="utf-8") as file:
                file.write("\n")  # behind a line that a kill has torn

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self.folder / SETTINGS_FILE
        if not path.is_file():
            partial = path.with_name(f"{SETTINGS_FILE}.{self.rank}")
            partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, path)
            return
        there = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in {**there, **settings} if there.get(name) != settings.get(name)]
        if differing:
            changes = "; ".join(f"{name}: {there.get(name)!r}, now {settings.get(name)!r}" for name in differing)
            raise ValueError(
                f"{self.folder} holds answers given under other settings ({changes}): name another folder"
            )

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the last line of a process that was killed
            return
        answer = Answer(**entry["answer"])
        if answer.unreadable is None:  # another run may find the file in place
            self.answers[entry["key"]] = answer
            self.places[entry["key"]] = entry["task"], entry["document"]

    def append(self, entries: Sequence[tuple[str, str, int, Answer]]) -> None:
        """Keep answers: (key, task, document, answer)."""
        lines = []
        for key, task, document, answer in entries:
            self.answers[key], self.places[key] = answer, (task, document)
            entry = {"key": key, "task": task, "document": document, "answer": asdict(answer)}
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        if self.folder is not None:
            with self._own_file.open("a", encoding="utf-8") as file:
                file.write("".join(lines))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        if self.folder is not None:
            text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
            partial = self.folder / f"{SUMMARY_FILE}.partial"
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, self.folder / SUMMARY_FILE)


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
