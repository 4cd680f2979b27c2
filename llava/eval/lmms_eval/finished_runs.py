"""Runs of lmms-eval in the shape of our own: a benchmark each, with settings, costs and score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.eval.files import read_json
from llava.eval.lmms_eval.answers import SETTINGS_FILE, SUMMARY_FILE
from llava.eval.lmms_eval.results import RESULTS, HarnessScore, harness_arguments, newest_results, read_scores
from llava.mm_utils import get_model_name_from_path

COSTS = ("visual_tokens", "average_tokens", "newline_tokens", "prefill_flops")


def is_harness_run(path: Path) -> bool:
    """Whether a path is a result file of the harness, or a run's folder with one."""
    return path.name.endswith(RESULTS) or (path.is_dir() and newest_results(path) is not None)


def read_harness_runs(path: Path) -> list[dict[str, Any]]:
    """The benchmarks of a result file, or of the latest one in a folder: folder, settings, record, summary, score.

    The budget and the method come from the run's settings, or, of a run without a folder of answers, from the model
    arguments in the result file; the tokens are measured ones in both.

    Raises:
        ValueError: no benchmark of the file has a column in our tables.
    """
    results_file = path if path.is_file() else newest_results(path)
    results = read_json(results_file)
    found = read_scores(results_file)
    if not found:
        names = ", ".join(results.get("results", {})) or "none"
        raise ValueError(f"{results_file} has no benchmark of our tables; its tasks: {names}")
    folder = next((place for place in results_file.parents if (place / SETTINGS_FILE).is_file()), None)
    if folder is not None and folder.suffix == ".run":
        settings, tasks = read_json(folder / SETTINGS_FILE), read_json(folder / SUMMARY_FILE)
    else:
        settings, tasks, folder = _settings_from(results), {}, results_file.parent
    runs = []
    for score in found:
        own = [tasks[name] for name in score.tasks if name in tasks]
        runs.append(
            {
                "folder": folder,
                "settings": {**settings, "benchmark": score.benchmark, "seed": _seed(settings)},
                "record": {"results": str(results_file), "lmms_eval": results.get("lmms_eval_version")},
                "summary": _summary(own) if own else _summary_from(results, score),
                "score": {
                    "score": score.scores[score.benchmark],
                    "columns": score.scores,
                    "items": score.items,
                    "own_scorer": score.own,
                    "unchecked": score.unchecked,
                },
            }
        )
    return runs


def _seed(settings: dict[str, Any]) -> int:
    return (settings["pruner"] or {}).get("seed", 0)


def _summary(tasks: list[dict[str, Any]]) -> dict[str, float]:
    """Costs of a benchmark's tasks together, each weighted by its questions."""
    questions = sum(task["questions"] for task in tasks)
    costs = {
        name: sum(task[name] * task["questions"] for task in tasks if name in task) / max(questions, 1)
        for name in COSTS
        if any(name in task for task in tasks)
    }
    return {
        "visual_tokens": 0.0,
        "newline_tokens": 0.0,
        **costs,
        "questions": questions,
        "skipped": 0,
        "unreadable": sum(len(task["unreadable"]) for task in tasks),
        "wall_seconds": sum(task["model_seconds"] for task in tasks),
    }


def _settings_from(results: dict[str, Any]) -> dict[str, Any]:
    """What a result file alone says of a run."""
    given = harness_arguments(results)
    keep = given.get("keep_tokens", "full")
    pruner = None if keep == "full" else {"name": given.get("pruner", "script"), "keep_tokens": keep}
    return {
        "model": get_model_name_from_path(given.get("pretrained", results["config"].get("model", ""))),
        "checkpoint": given.get("pretrained", ""),
        "pruner": pruner,
        "code": f"lmms-eval {results.get('lmms_eval_version')}, {results['config'].get('model')}",
    }


def _summary_from(results: dict[str, Any], score: HarnessScore) -> dict[str, float]:
    measured = results.get("throughput", {})
    costs = {name: measured[f"avg_{name}"] for name in COSTS if f"avg_{name}" in measured}
    return {
        "visual_tokens": 0.0,
        "newline_tokens": 0.0,
        **costs,
        "questions": score.questions,
        "skipped": 0,
        "unreadable": int(measured.get("avg_unreadable_questions", 0)),
        "wall_seconds": measured.get("total_elapsed_time", 0.0),
    }
