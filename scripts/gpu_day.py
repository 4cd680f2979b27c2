"""A day on a GPU: what of this repository has never run on one, in one command, and one report to send back.

    bash scripts/gpu_day.sh --ckpt-dir /models --data-root /data/eval --plan        # how long it will take
    bash scripts/gpu_day.sh --ckpt-dir /models --data-root /data/eval               # do it, or go on with it

Parts: audit (does each method keep its promises on these weights), kernels (their tests), selection, efficiency, and a
run of every benchmark with every method at every budget. A part that is done is not done again; one that fails is
reported, and the day goes on. Send back OUT/gpu_day.tar.gz: it holds no answers and no pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llava.eval.benchmarks import BENCHMARKS
from llava.eval.runner import identity, run
from llava.pruning import get_pruner

ROOT = Path(__file__).resolve().parents[1]
PROBE = "gpu-day-probe"
CHECKPOINTS = ("llava-v1.5-7b", "llava-v1.6-vicuna-7b")
METHODS = ("script", "divprune", "visionzip", "trim", "fastv", "sparsevlm")
BUDGETS = {"v1_5": (192, 128, 64, 32, 16), "v1_6": (128, 64, 32)}
GRID = ("--image-grid", "672x672")  # the protocol of the paper's LLaVA-NeXT tables, with padding counted in
PADDING = ("--pruner-args", "exclude_padding=false")
PRESETS = ("mid", "llava-v1.5-7b", "llava-v1.6-vicuna-7b", "llava-video-7b", "qwen2.5-vl-7b", "internvl3-8b")
KERNEL_TESTS = ("test_kernels.py", "test_no_waiting.py", "test_greedy.py", "test_captured.py")
GUESSES = {"audit": 600.0, "kernels": 300.0, "selection": 120.0, "efficiency": 600.0}  # seconds a part, never measured


@dataclass(frozen=True)
class Part:
    """One command of the day.

    Args:
        kind: audit, kernels, selection, efficiency or benchmark.
        expected: seconds.
        told_by: where ``expected`` comes from.
    """

    kind: str
    name: str
    command: tuple[str, ...]
    expected: float
    told_by: str
    variables: tuple[tuple[str, str], ...] = ()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bash scripts/gpu_day.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = (*GUESSES, "benchmark")
    parser.add_argument(
        "--ckpt-dir", type=Path, default=Path("checkpoints"), help="folder of checkpoints (%(default)s)"
    )
    parser.add_argument("--checkpoints", nargs="+", default=list(CHECKPOINTS), help="folders in it, 1.5 and 1.6")
    parser.add_argument("--data-root", type=Path, default=Path("playground/data/eval"), help="as EVAL.md has it")
    parser.add_argument("--output-root", type=Path, default=Path("playground/data/eval"), help="answers and scores")
    parser.add_argument("--out", type=Path, default=Path("playground/data/gpu_day"), help="logs, report (%(default)s)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=int, metavar="N", help="per view; default: those of the paper")
    parser.add_argument("--benchmarks", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), help="of python -m llava.eval.efficiency")
    parser.add_argument("--parts", nargs="+", choices=kinds, default=list(kinds), help="do these alone")
    parser.add_argument(
        "--limit", type=int, metavar="K", help="only the first K questions, pictures of the audit, ..."
    )
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--probe", type=int, default=8, metavar="K", help="questions that measure the time of one (8)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plan", action="store_true", help="say what would be done and how long it takes, and stop")
    return parser.parse_args(arguments)


def family_of(folder: Path) -> str:
    """Whose scripts ask a checkpoint: those of tiles, or those of one square. Raises OSError, ValueError."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "mm_vision_tower" not in config:
        raise ValueError(f"{folder} is no LLaVA in the original format: its config.json names no mm_vision_tower")
    return "v1_6" if config.get("image_aspect_ratio") == "anyres" else "v1_5"


class Day:
    """The parts as asked for. Raises ValueError or OSError for what cannot work, before any of them begins."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        for name in options.methods:
            get_pruner(name)
        self.checkpoints = [options.ckpt_dir / name for name in options.checkpoints]
        missing = [folder for folder in self.checkpoints if not (folder / "config.json").is_file()]
        if missing:
            raise FileNotFoundError(f"no checkpoint at {', '.join(map(str, missing))}: see --ckpt-dir, --checkpoints")
        self.families = {folder: family_of(folder) for folder in self.checkpoints}
        self.left_out: list[str] = []
        for folder in ("logs", "done"):
            (options.out / folder).mkdir(parents=True, exist_ok=True)

    def parts(self) -> list[Part]:
        """All of them, in order; measures first how long a question takes."""
        python, given = sys.executable, self.options
        limit = [] if given.limit is None else ["--limit", str(given.limit)]
        device = ["--device", given.device]
        found = []

        def add(kind: str, name: str, *command: str) -> None:
            if kind in given.parts:
                found.append(Part(kind, name, tuple(command), GUESSES[kind], "a guess: never measured on a GPU"))

        for folder in self.checkpoints:
            report = given.out / f"audit-{folder.name}.json"
            command = [python, "-m", "llava.eval.audit", "--model-path", str(folder), "--pruner", *given.methods]
            add("audit", f"audit-{folder.name}", *command, "--json", str(report), *limit, *device)
        tests = [f"tests/pruning/{name}" for name in KERNEL_TESTS]
        add("kernels", "kernels", python, "-m", "pytest", "-q", *tests)
        few = [] if given.limit is None else ["--views", "1", "--repeats", "2"]
        dtype = ["--dtype", "float16"] if torch.cuda.is_available() else []
        add("selection", "selection-speed", python, "-m", "llava.eval.selection_speed", *device, *dtype, *few)
        if given.device != "cpu":  # minutes there
            add("selection", "selection-scaling", python, "-m", "llava.eval.selection_scaling", *device, *dtype)
        for preset in given.presets:
            command = [python, "-m", "llava.eval.efficiency", "--preset", preset, "--pruners", *given.methods]
            few = [] if given.limit is None else ["--repeats", "1", "--new-tokens", "2", "--keep-tokens", "32"]
            add(
                "efficiency", f"efficiency-{preset}", *command, *device, *(few or ["--keep-tokens", "128", "64", "32"])
            )
        if "benchmark" in given.parts:
            for folder in self.checkpoints:
                found += self.benchmarks(folder)
        return found

    def benchmarks(self, folder: Path) -> list[Part]:
        """The runs of a checkpoint; a benchmark without its files is left out and named."""
        given, family, found = self.options, self.families[folder], []
        grid = GRID if family == "v1_6" else ()
        budgets = given.budgets or BUDGETS[family]
        for name in given.benchmarks:
            try:
                questions = len(self.planned(folder, name, *grid).questions)
                a_question, loading = self.probe(folder, name, *grid)
            except (ValueError, OSError, RuntimeError) as error:
                self.left_out.append(f"{name} on {folder.name}: {error}")
                continue
            told_by = f"at most: {questions} questions of {a_question:.2f} s unpruned, {loading:.0f} s to load"
            variables = {"CKPT_DIR": folder.parent, "CKPT": folder.name, "DATA_DIR": given.data_root}
            variables["PYTHON"] = sys.executable
            for method, budget in [("script", "full"), *((m, b) for m in given.methods for b in budgets)]:
                command = ["bash", f"scripts/{family}/eval/{name}.sh", str(budget), "--pruner", method, *grid]
                command += PADDING if grid and budget != "full" else ()
                command += ["--output-root", str(given.output_root), "--batch-size", str(given.batch_size)]
                command += ["--device", given.device, *([] if given.limit is None else ["--limit", str(given.limit)])]
                label = "full" if budget == "full" else f"{method}-{budget}"
                seconds = questions * a_question + loading
                settings = tuple((key, str(value)) for key, value in variables.items())
                found.append(
                    Part("benchmark", f"{name}-{folder.name}-{label}", tuple(command), seconds, told_by, settings)
                )
        return found

    def planned(self, folder: Path, name: str, *more: str) -> run.Run:
        """A run that nothing is asked of yet: its files are there, and its questions known."""
        given = self.options
        words = ["--benchmark", name, "--model-path", folder, "--data-root", given.data_root, "--score", *more]
        words += ["--output-root", given.output_root, "--device", given.device]
        words += [] if given.limit is None else ["--limit", given.limit]
        return run.Run(run.parse_arguments(list(map(str, words))))

    def probe(self, folder: Path, name: str, *more: str) -> tuple[float, float]:
        """Seconds of a question of this benchmark, unpruned, and seconds until the first. Measured once."""
        given = self.options
        place = given.out / "done" / f"probe-{name}-{folder.name}.json"
        if not place.is_file():
            words = [sys.executable, "-m", "llava.eval.run", "--benchmark", name, "--model-path", folder, *more]
            words += ["--data-root", given.data_root, "--output-root", given.output_root, "--tag", PROBE]
            words += ["--limit", min(given.probe, given.limit or given.probe), "--device", given.device, "--overwrite"]
            start = time.perf_counter()
            done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True)
            seconds = time.perf_counter() - start
            if done.returncode:
                lines = (done.stderr or done.stdout).strip().splitlines()
                raise RuntimeError(f"cannot be asked: {lines[-1] if lines else f'exit code {done.returncode}'}")
            planned = self.planned(folder, name, *more, "--tag", PROBE)
            summary = json.loads((planned.folder / "summary.json").read_text())
            inside = summary["wall_seconds"]
            figures = {"question": inside / max(summary["questions"], 1), "loading": max(seconds - inside, 0.0)}
            place.write_text(json.dumps(figures))
        figures = json.loads(place.read_text())
        return figures["question"], figures["loading"]

    # --- doing it --------------------------------------------------------------------------------------------------

    def record(self, part: Part) -> Path:
        return self.options.out / "done" / f"{part.name}.json"

    def result(self, part: Part) -> dict | None:
        """What came of a part under the same command; ``None`` if it was not done."""
        place = self.record(part)
        found = json.loads(place.read_text()) if place.is_file() else None
        return found if found and found["command"] == list(part.command) else None

    def is_done(self, part: Part) -> bool:
        """Whether it need not be done again: it ended well, or it is an audit that found something."""
        found = self.result(part)
        return found is not None and (found["code"] == 0 or (part.kind == "audit" and found["code"] == 1))

    def do(self, part: Part) -> None:
        start = time.perf_counter()
        variables = {**os.environ, "PYTHONPATH": str(ROOT), **dict(part.variables)}
        with (self.options.out / "logs" / f"{part.name}.log").open("w", encoding="utf-8") as log:
            code = subprocess.run(
                part.command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT
            ).returncode
        seconds = time.perf_counter() - start
        self.record(part).write_text(json.dumps({"command": list(part.command), "code": code, "seconds": seconds}))


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"


def print_plan(day: Day, parts: Sequence[Part]) -> None:
    """How long each part will take, before any begins."""
    kinds = dict.fromkeys(part.kind for part in parts)
    print(f"{'part':<48} expected")
    for part in parts:
        state = "done" if day.is_done(part) else f"{duration(part.expected)}  ({part.told_by})"
        print(f"{part.name:<48} {state}")
    for kind in kinds:
        left = sum(part.expected for part in parts if part.kind == kind and not day.is_done(part))
        print(f"all of {kind}: {duration(left)} left")
    print(f"all: {duration(sum(part.expected for part in parts if not day.is_done(part)))} left")
    for line in day.left_out:
        print(f"LEFT OUT: {line}")


def write_report(day: Day, parts: Sequence[Part]) -> Path:
    """The report, and an archive of it with logs, figures and scores."""
    out = day.options.out
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, no GPU"
    lines = [
        "# A day on a GPU",
        "",
        f"{device}; {platform.platform()}; commit {identity.commit()}; {time.strftime('%d %B %Y')}",
    ]
    versions = ", ".join(f"{name} {version}" for name, version in identity.library_versions().items())
    lines += ["", versions, "", "| part | exit code | took | expected |", "|---|---|---|---|"]
    for part in parts:
        found = day.result(part)
        told = ("not done", "") if found is None else (found["code"], duration(found["seconds"]))
        lines.append(f"| {part.name} | {told[0]} | {told[1]} | {duration(part.expected)} |")
    lines += ["", *(f"* left out: {line}" for line in day.left_out)]
    names = {folder.name for folder in day.checkpoints}
    runs = [
        place
        for place in sorted(day.options.output_root.glob("*/answers/*/*/*.run"))
        if place.parent.name in names and PROBE not in place.name and (place / "summary.json").is_file()
    ]
    if runs:
        command = [sys.executable, "-m", "llava.eval.report", *map(str, runs)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines += ["", "## Benchmarks", "", done.stdout or done.stderr]
    for part in parts:
        log = out / "logs" / f"{part.name}.log"
        if part.kind != "benchmark" or (day.result(part) or {"code": 0})["code"]:
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:] if log.is_file() else []
            lines += ["", f"## {part.name}", "", "```", *(line[-2000:] for line in tail), "```"]
    report = out / "report.md"
    report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with tarfile.open(out / "gpu_day.tar.gz", "w:gz") as archive:
        for place in (report, out / "logs", out / "done", *out.glob("*.json")):
            archive.add(place, place.relative_to(out))
        for place in runs:
            for name in ("config.json", "summary.json", "score.json"):
                if (place / name).is_file():
                    archive.add(place / name, Path("runs") / place.relative_to(day.options.output_root) / name)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the day; 0 if every part ended well, 1 if one failed, 2 for bad input, 130 if Ctrl-C ended it."""
    options = parse_arguments(arguments)
    try:
        day = Day(options)
        print("measuring how long a question takes, once for each benchmark ...", flush=True)
        parts = day.parts()
        if not parts:
            raise ValueError(f"nothing can be done: {'; '.join(day.left_out) or 'no part was named'}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_plan(day, parts)
    if options.plan:
        return 0
    try:
        for number, part in enumerate(parts, start=1):
            if not day.is_done(part):
                print(f"[{number} of {len(parts)}] {part.name}", flush=True)
                day.do(part)
    except KeyboardInterrupt:
        print("stopped: the same command goes on")
        write_report(day, parts)
        return 130
    report = write_report(day, parts)
    failed = [part.name for part in parts if not day.is_done(part)]
    print(f"report: {report}; send back {options.out / 'gpu_day.tar.gz'}")
    print(f"failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
