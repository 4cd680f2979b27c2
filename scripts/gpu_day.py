"""A day on a GPU: what of this repository has never run on one, in one command, and one report to send back.

    bash scripts/gpu_day.sh --ckpt-dir /models --data-root /data/eval --plan        # how long it will take
    bash scripts/gpu_day.sh --ckpt-dir /models --data-root /data/eval               # do it, or go on with it

Parts: audit (does each method keep its promises on these weights), kernels (their tests), selection, efficiency, and a
run of every benchmark with every method at every budget. A part that is done is not done again; one that fails is
reported, and the day goes on. Ctrl-C ends the part under way and writes the report, which says what is missing; the
same command goes on (a benchmark with the next question, another part from its beginning). Send back
OUT/gpu_day.tar.gz: it holds no answers and no pictures.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_day_report import PROBE, missing, print_plan, write_report
from gpu_day_times import (
    Guess,
    Speed,
    measured_speed,
    of_audit,
    of_efficiency,
    of_interpreted,
    paper_speed,
    work_of,
)
from interruptible import finished

from llava.eval.audit.__main__ import PHOTOGRAPHS
from llava.eval.audit.pictures import load_pictures
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.runner import run
from llava.model.builder import pick_device
from llava.pruning import get_pruner

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("audit", "kernels", "selection", "efficiency", "benchmark")
CHECKPOINTS = ("llava-v1.5-7b", "llava-v1.6-vicuna-7b")
METHODS = ("script", "divprune", "visionzip", "trim", "fastv", "sparsevlm")
BUDGETS = {"v1_5": (192, 128, 64, 32, 16), "v1_6": (128, 64, 32)}
GRID = ("--image-grid", "672x672")  # the protocol of the paper's LLaVA-NeXT tables, with padding counted in
PADDING = ("--pruner-args", "exclude_padding=false")
PRESETS = ("mid", "llava-v1.5-7b", "llava-v1.6-vicuna-7b", "llava-video-7b", "qwen2.5-vl-7b", "internvl3-8b")
KERNEL_TESTS = ("test_kernels.py", "test_no_waiting.py", "test_greedy.py", "test_captured.py")
PRESET_BUDGETS, PRESET_REPEATS = ("128", "64", "32"), 5


@dataclass(frozen=True)
class Part:
    """One command of the day.

    Args:
        kind: audit, kernels, selection, efficiency or benchmark.
        expected: seconds; ``None`` where there is nothing to guess from.
        told_by: where ``expected`` comes from.
        variables: of its environment, beside our own.
    """

    kind: str
    name: str
    command: tuple[str, ...]
    expected: float | None
    told_by: str
    variables: tuple[tuple[str, str], ...] = ()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bash scripts/gpu_day.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    parser.add_argument("--parts", nargs="+", choices=KINDS, default=list(KINDS), help="do these alone")
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
        absent = [str(folder) for folder in self.checkpoints if not (folder / "config.json").is_file()]
        if absent:
            raise FileNotFoundError(f"no checkpoint at {', '.join(absent)}: see --ckpt-dir, --checkpoints")
        self.families = {folder: family_of(folder) for folder in self.checkpoints}
        self.on_gpu = pick_device(options.device) != "cpu"
        self.left_out: list[str] = []
        for folder in ("logs", "done"):
            (options.out / folder).mkdir(parents=True, exist_ok=True)

    def parts(self) -> list[Part]:
        """All of them, in order; measures first how long a question takes."""
        asked = []
        if "benchmark" in self.options.parts:
            asked = [part for folder in self.checkpoints for part in self.benchmarks(folder)]
        return [*self.audits(), *self.kernels(), *self.efficiencies(), *asked]

    def guessed(self, kind: str, name: str, command: Sequence[str], guess: Guess) -> list[Part]:
        """A part whose time is a guess; none if it was not asked for."""
        if kind not in self.options.parts:
            return []
        return [Part(kind, name, tuple(command), guess.seconds, f"a guess: {guess.basis}")]

    def speed(self, folder: Path) -> Speed | None:
        """Of an unpruned answer: as its questions were measured, or as the paper prints; ``None`` on a CPU then."""
        probes = sorted((self.options.out / "done").glob(f"probe-*-{folder.name}.json"))
        if probes:
            questions = [json.loads(place.read_text())["question"] for place in probes]
            return measured_speed(folder, self.families[folder], questions)
        if not self.on_gpu:
            return None
        return paper_speed().scaled(work_of(folder, self.families[folder]), folder.name)

    def audits(self) -> list[Part]:
        given, found = self.options, []
        limit = [] if given.limit is None else ["--limit", str(given.limit)]
        pictures = len(load_pictures(PHOTOGRAPHS, given.limit))
        for folder in self.checkpoints:
            report = given.out / f"audit-{folder.name}.json"
            command = [sys.executable, "-m", "llava.eval.audit", "--model-path", str(folder), "--pictures"]
            command += [str(PHOTOGRAPHS), "--pruner", *given.methods, "--json", str(report), *limit]
            guess = of_audit(len(given.methods), pictures, self.speed(folder))
            found += self.guessed("audit", f"audit-{folder.name}", [*command, "--device", given.device], guess)
        return found

    def kernels(self) -> list[Part]:
        """The kernels' tests, and what a selection takes."""
        python, device = sys.executable, ["--device", self.options.device]
        tests = [f"tests/pruning/{name}" for name in KERNEL_TESTS]
        found = self.guessed("kernels", "kernels", [python, "-m", "pytest", "-q", *tests], of_interpreted("kernels"))
        few = [] if self.options.limit is None else ["--views", "1", "--repeats", "2"]
        dtype = ["--dtype", "float16"] if self.on_gpu else []
        for name in ("speed", "scaling") if self.on_gpu else ("speed",):  # on a CPU the other takes minutes
            more = few if name == "speed" else []
            command = [python, "-m", f"llava.eval.selection_{name}", *device, *dtype, *more]
            found += self.guessed("selection", f"selection-{name}", command, of_interpreted("selection"))
        return found

    def efficiencies(self) -> list[Part]:
        given, found = self.options, []
        repeats = PRESET_REPEATS if given.limit is None else 1
        budgets = PRESET_BUDGETS if given.limit is None else ("32",)
        rows = 1 + len(budgets) * (1 + len(given.methods))
        speeds = [speed for speed in map(self.speed, self.checkpoints) if speed is not None]
        speed = max(speeds, key=lambda one: one.work, default=None)
        for preset in given.presets:
            command = [sys.executable, "-m", "llava.eval.efficiency", "--preset", preset, "--pruners", *given.methods]
            command += ["--keep-tokens", *budgets, "--repeats", str(repeats), "--device", given.device]
            command += [] if given.limit is None else ["--new-tokens", "2"]
            guess = of_efficiency(preset, rows, repeats, speed)
            found += self.guessed("efficiency", f"efficiency-{preset}", command, guess)
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
            log = given.out / "logs" / f"probe-{name}-{folder.name}.log"
            with log.open("w", encoding="utf-8") as file:
                code = finished(list(map(str, words)), file, ROOT)
            seconds = time.perf_counter() - start
            if code:
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                raise RuntimeError(f"cannot be asked: {lines[-1] if lines else f'exit code {code}'}")
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
        with (self.options.out / "logs" / f"{part.name}.log").open("w", encoding="utf-8") as log:
            code = finished(part.command, log, ROOT, dict(part.variables))
        seconds = time.perf_counter() - start
        self.record(part).write_text(json.dumps({"command": list(part.command), "code": code, "seconds": seconds}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the day; 0 if every part ended well, 1 if one failed, 2 for bad input, 130 if it was interrupted."""
    options = parse_arguments(arguments)
    parts: list[Part] = []
    try:
        day = Day(options)
        if "benchmark" in options.parts:
            print("measuring how long a question takes, once for each benchmark ...", flush=True)
        parts = day.parts()
        if not parts:
            raise ValueError(f"nothing can be done: {'; '.join(day.left_out) or 'no part was named'}")
        print_plan(day, parts)
        if options.plan:
            return 0
        for number, part in enumerate(parts, start=1):
            if not day.is_done(part):
                print(f"[{number} of {len(parts)}] {part.name}", flush=True)
                day.do(part)
    except KeyboardInterrupt:
        told = f"; so far: {write_report(day, parts)}" if parts else ""
        print(f"stopped: the same command goes on{told}")
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = write_report(day, parts)
    print(f"report: {report}; send back {options.out / 'gpu_day.tar.gz'}")
    for line in missing(day, parts) or ["nothing is missing"]:
        print(line)
    return 0 if all(map(day.is_done, parts)) else 1


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the last two: of a batch system, a lost connection
        if ending != signal.SIGHUP or signal.getsignal(ending) is not signal.SIG_IGN:  # nohup
            signal.signal(ending, signal.default_int_handler)
    sys.exit(main())
