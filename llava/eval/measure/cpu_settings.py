"""What a person should choose on a CPU: number format, threads, torch.compile, pruned or not, all in one run.

    python -m llava.eval.cpu_settings --preset mid --keep-tokens 64

Every combination answers the same question about the same picture. Combinations take turns, so that all meet the same
machine; a ratio is the median over repeats of ratios within a repeat, to the first row: float32, all threads, not
compiled, unpruned. ``compile`` puts the vision tower through torch.compile, whose compilation does not count. Weights
are random, sizes are real. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from llava.eval.measure.efficiency import method_of
from llava.eval.measure.efficiency_subject import Row, Subject
from llava.eval.measure.geometry import GEOMETRIES, build_random
from llava.eval.measure.selection_speed import describe_machine
from llava.model.builder import DEFAULT_CHECKPOINT, load_pretrained_model
from llava.serve import flags

PRESETS = ("toy", *(name for name, geometry in GEOMETRIES.items() if geometry.frames is None))
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Setting:
    """A combination of choices."""

    dtype: str
    threads: int
    compiled: bool
    pruned: bool


@dataclass
class Times:
    """Seconds of a setting, one entry a repeat."""

    first_token: list[float] = field(default_factory=list)
    further_token: list[float] = field(default_factory=list)


def settings_of(dtypes: Sequence[str], threads: Sequence[int], compiled: Sequence[bool]) -> list[Setting]:
    """All combinations, unpruned and pruned; most threads first."""
    found = product(dtypes, sorted(set(threads), reverse=True), compiled, (False, True))
    return [Setting(*choices) for choices in found]


def load_subject(preset: str, dtype: str, compiled: bool) -> Subject:
    """A model in a number format, its tower compiled or not."""
    if preset == "toy":
        _, model, processor, _ = load_pretrained_model(DEFAULT_CHECKPOINT, device="cpu", dtype=getattr(torch, dtype))
        size = (336, 336)
    else:
        geometry = GEOMETRIES[preset]
        model, processor = build_random(geometry, getattr(torch, dtype), "cpu")
        size = geometry.picture
    if compiled:
        model.get_vision_tower().compile_layers()
    return Subject(model, processor, size, 1, "cpu")


@torch.inference_mode()
def measure(
    subjects: dict[tuple[str, bool], Subject], settings: Sequence[Setting], row: Row, repeats: int, new_tokens: int
) -> dict[Setting, Times]:
    """Seconds of every setting, taken in turn; the first turn, in which towers are compiled, does not count."""
    found = {setting: Times() for setting in settings}
    unpruned = Row("unpruned", None)
    for repeat in range(repeats + 1):
        turns = tqdm(settings, desc=f"repeat {repeat} of {repeats}", leave=False, disable=None)
        for setting in turns:
            torch.set_num_threads(setting.threads)
            subject = subjects[setting.dtype, setting.compiled]
            moments = subject.answer(row if setting.pruned else unpruned, new_tokens)
            if repeat:
                found[setting].first_token.append(moments[0])
                found[setting].further_token.append((moments[-1] - moments[0]) / (len(moments) - 1))
    return found


def figures_of(found: dict[Setting, Times]) -> list[dict[str, Any]]:
    """Rows of the table: medians in milliseconds, and how many times faster than the first row."""
    first = next(iter(found.values()))
    rows = []
    for setting, times in found.items():
        figures: dict[str, Any] = asdict(setting)
        for name in ("first_token", "further_token"):
            own, others = getattr(times, name), getattr(first, name)
            figures[f"{name}_ms"] = round(statistics.median(own) * 1e3, 1)
            ratios = [other / value for other, value in zip(others, own, strict=True)]
            figures[f"{name}_times_faster"] = round(statistics.median(ratios), 2)
        rows.append(figures)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| numbers | threads | compiled | tokens | first token, ms | times faster | further, ms | times faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["dtype"],
            row["threads"],
            "yes" if row["compiled"] else "no",
            "pruned" if row["pruned"] else "all",
        ]
        cells += [f"{row['first_token_ms']:,.0f}", f"{row['first_token_times_faster']:.2f}"]
        cells += [f"{row['further_token_ms']:.1f}", f"{row['further_token_times_faster']:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.cpu_settings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=PRESETS, default="mid", help="sizes of the model (%(default)s)")
    parser.add_argument("--keep-tokens", type=flags.at_least_one, default=64, metavar="N", help="per view")
    parser.add_argument("--pruner", default=flags.DEFAULT_METHOD, metavar="NAME[:KEY=VALUE,...]")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--threads", nargs="+", type=flags.at_least_one, default=[1, torch.get_num_threads()], help="one, and all"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it needs a C++ compiler")
    parser.add_argument("--repeats", type=flags.at_least_one, default=5)
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens of an answer, from 2")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 with one line on standard error."""
    options = parse_arguments(arguments)
    before = torch.get_num_threads()
    try:
        if options.new_tokens < 2:
            raise ValueError(f"--new-tokens must be at least 2, got {options.new_tokens}")
        row = Row(options.pruner, options.keep_tokens, method_of(options.pruner, options.keep_tokens))
        kinds = (False,) if options.no_compile else (False, True)
        subjects = {
            (dtype, compiled): load_subject(options.preset, dtype, compiled)
            for dtype, compiled in product(dict.fromkeys(options.dtypes), kinds)
        }
        subject = next(iter(subjects.values()))
        if options.keep_tokens >= subject.tokens_per_view:
            raise ValueError(f"--keep-tokens must lie below the {subject.tokens_per_view} tokens of a view")
        row.pruner = subject.suited(row.pruner)
        settings = settings_of(list(dict.fromkeys(options.dtypes)), options.threads, kinds)
        rows = figures_of(measure(subjects, settings, row, options.repeats, options.new_tokens))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)
    print(table(rows))
    given = {"preset": options.preset, "keep_tokens": options.keep_tokens, "pruner": options.pruner}
    machine = {name: value for name, value in describe_machine("cpu").items() if name != "threads"}
    print(json.dumps(given | {"repeats": options.repeats, "rows": rows, "date": time.strftime("%Y-%m-%d")} | machine))
    return 0
