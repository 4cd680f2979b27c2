"""What a day on a GPU prints and sends back: its plan, what is missing, the report and the archive."""

from __future__ import annotations

import platform
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llava.eval.runner import identity

if TYPE_CHECKING:
    from gpu_day import Day, Part

PROBE = "gpu-day-probe"  # tag of the runs that measure how long a question takes
TAIL = 40  # lines of a log that the report shows


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"


def total(parts: Sequence[Part]) -> str:
    """How long parts take together, and of how many it is not known."""
    known = [part.expected for part in parts if part.expected is not None]
    more = len(parts) - len(known)
    return duration(sum(known)) + (f" and {more} parts of unknown length" if more else "")


def print_plan(day: Day, parts: Sequence[Part]) -> None:
    """How long each part will take and who says so, before any begins."""
    print(f"{'part':<48} expected")
    for part in parts:
        state = "done" if day.is_done(part) else f"{duration(part.expected)}  ({part.told_by})"
        print(f"{part.name:<48} {state}")
    left = [part for part in parts if not day.is_done(part)]
    for kind in dict.fromkeys(part.kind for part in parts):
        print(f"all of {kind}: {total([part for part in left if part.kind == kind])} left")
    print(f"all: {total(left)} left")
    for line in day.left_out:
        print(f"LEFT OUT: {line}")


def missing(day: Day, parts: Sequence[Part]) -> list[str]:
    """What the report lacks, a line each: left out, not done, or failed."""
    lines = [f"left out: {line}" for line in day.left_out]
    for part in parts:
        found = day.result(part)
        if found is None:
            began = (day.options.out / "logs" / f"{part.name}.log").is_file()
            lines.append(f"not done{', but begun' if began else ''}: {part.name}")
        elif not day.is_done(part):
            lines.append(f"failed with exit code {found['code']}: {part.name}")
    return lines


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
    lacks = missing(day, parts)
    lines += ["", versions, "", "## Missing", "", *(f"* {line}" for line in lacks or ["nothing"])]
    lines += ["", "## Parts", "", "| part | exit code | took | expected | from |", "|---|---|---|---|---|"]
    for part in parts:
        found = day.result(part)
        code, took = ("not done", "") if found is None else (found["code"], duration(found["seconds"]))
        lines.append(f"| {part.name} | {code} | {took} | {duration(part.expected)} | {part.told_by} |")
    runs = runs_of(day)
    if runs:
        command = [sys.executable, "-m", "llava.eval.report", *map(str, runs)]
        done = subprocess.run(command, capture_output=True, text=True)
        lines += ["", "## Benchmarks", "", done.stdout or done.stderr]
    for part in parts:
        log = out / "logs" / f"{part.name}.log"
        if log.is_file() and (part.kind != "benchmark" or not day.is_done(part)):
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
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


def runs_of(day: Day) -> list[Path]:
    """The finished runs of the day's checkpoints."""
    names = {folder.name for folder in day.checkpoints}
    return [
        place
        for place in sorted(day.options.output_root.glob("*/answers/*/*/*.run"))
        if place.parent.name in names and PROBE not in place.name and (place / "summary.json").is_file()
    ]
