"""Finished runs as a study reads them: those of this evaluation, and the benchmarks of lmms-eval's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llava.eval.files import read_json
from llava.eval.lmms_eval.finished_runs import is_harness_run, read_harness_runs
from llava.eval.runner.journal import run_folder

UNPRUNED = "unpruned"


@dataclass
class StudyRun:
    """One finished run as its folder tells it."""

    folder: Path
    settings: dict
    record: dict
    summary: dict
    score: dict | None

    @property
    def name(self) -> str:
        if self.folder.suffix == ".run":
            return self.folder.name.removesuffix(".run")
        pruner = self.settings["pruner"]  # a result file of lmms-eval without a run's folder
        return "full" if pruner is None else f"{pruner['name']}_{pruner['keep_tokens']}"

    @property
    def method(self) -> str:
        return UNPRUNED if self.settings["pruner"] is None else self.settings["pruner"]["name"]

    @property
    def tag(self) -> str:
        """Its name without the seed."""
        return re.sub(r"-seed\d+$", "", self.name)

    @property
    def grid(self) -> tuple[int, int] | None:
        """(width, height) for which every picture was cut; ``None`` where the checkpoint chose."""
        grid = self.settings.get("image_grid")
        return None if grid is None else tuple(grid)

    @property
    def title(self) -> str:
        """Its benchmark and its name, for a sentence."""
        return f"{self.settings['benchmark']} {self.name}"

    @property
    def checkpoint(self) -> tuple[str, str]:
        return self.settings["model"], self.settings["checkpoint"]


def read_run(path: Path) -> StudyRun:
    """A run by its folder or its answers file. Raises ValueError if it is not complete."""
    folder = path if path.suffix == ".run" else run_folder(path)
    if not (folder / "summary.json").is_file():
        raise ValueError(f"{folder} is no complete run: it has no summary.json")
    config = read_json(folder / "config.json")
    score = read_json(folder / "score.json") if (folder / "score.json").is_file() else None
    summary = read_json(folder / "summary.json")
    for name, values, needed in (
        ("config.json", config, ("settings", "record")),
        (
            "config.json, under settings,",
            config.get("settings", {}),
            ("benchmark", "model", "checkpoint", "pruner", "seed", "code"),
        ),
        ("summary.json", summary, ("questions", "skipped", "visual_tokens", "newline_tokens", "wall_seconds")),
        ("score.json", {"score": 0} if score is None else score, ("score",)),
    ):
        missing = [key for key in needed if key not in values]
        if missing:
            raise ValueError(f"{folder}/{name} lacks {', '.join(missing)}: it is not what a run writes")
    return StudyRun(folder, config["settings"], config["record"], summary, score)


def read_runs(path: Path) -> list[StudyRun]:
    """The runs that a path names: one of this evaluation, or the benchmarks of a run of lmms-eval."""
    if is_harness_run(path):
        return [StudyRun(**run) for run in read_harness_runs(path)]
    return [read_run(path)]
