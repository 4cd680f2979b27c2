"""How time and memory of Script's selection grow with the tokens of a view, the tokens kept, and the views.

One number is varied at a time around a middle point. Times are medians of rounds in which all points of an axis take
turns. An exponent is the slope of a straight line through the logarithms: time ~ n ** exponent. ``--clip-tokens`` also
times the greedy order of all tokens of a long clip, at its fastest, beside the plain loop. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy
import torch

from llava.eval.measure.clip_scaling import check_keep, clip_table, clips, measure_clip
from llava.eval.measure.selection_speed import describe_machine, extra_memory, make_inputs, time_rows
from llava.pruning import get_pruner
from llava.pruning.functional import cosine_similarity, greedy_map_rank

MIDDLE = {"n": 576, "m": 64, "B": 1}
AXES = {
    "n": (256, 400, 576, 1024, 1600, 2304),
    "m": (16, 32, 64, 128, 256),
    "B": (1, 2, 4, 8, 16, 32),
}
NAMES = {"n": "tokens of a view", "m": "tokens kept", "B": "views"}
PARTS = {"similarity": "similarity", "loop": "greedy loop", "selection": "whole selection"}


def measure_axis(axis: str, width: int, dtype: torch.dtype, device: str, repeats: int) -> list[dict[str, float]]:
    """Milliseconds of each part and extra memory in MiB at every point of an axis."""
    rows, selections = {}, {}
    for value in AXES[axis]:
        point = MIDDLE | {axis: value}
        inputs = make_inputs(point["B"], point["n"], width, dtype, device)
        pruner = get_pruner("script", keep_tokens=point["m"])
        details = pruner.select(inputs).details
        given = {"relevance": details["relevance"], "member": details["kept_by_gsp"]}
        similarity = cosine_similarity(inputs.features)
        selections[value] = lambda pruner=pruner, inputs=inputs: pruner.select(inputs)
        rows[value, "similarity"] = lambda inputs=inputs: cosine_similarity(inputs.features)
        rows[value, "loop"] = lambda s=similarity, m=point["m"], given=given: greedy_map_rank(s, m, **given)
        rows[value, "selection"] = selections[value]
    seconds = time_rows(rows, repeats, device)
    return [
        {axis: value}
        | {part: round(median(seconds[value, part]) * 1e3, 3) for part in PARTS}
        | {"memory_mib": round(extra_memory(selections[value], device) / 2**20, 3)}
        for value in AXES[axis]
    ]


def exponent(points: Sequence[dict[str, float]], axis: str, column: str) -> float:
    """Slope of log(column) over log(axis)."""
    across, up = (numpy.log([point[name] for point in points]) for name in (axis, column))
    return round(float(numpy.polyfit(across, up, 1)[0]), 2)


def table(axis: str, points: Sequence[dict[str, float]], exponents: dict[str, float]) -> str:
    fixed = ", ".join(f"{name} = {value}" for name, value in MIDDLE.items() if name != axis)
    head = [axis, *PARTS.values(), "extra memory"]
    lines = [f"{NAMES[axis]}: milliseconds and MiB at {fixed}", "  ".join(f"{cell:>15}" for cell in head)]
    for point in points:
        lines.append("  ".join(f"{point[name]:>15}" for name in (axis, *PARTS, "memory_mib")))
    lines.append("  ".join(f"{cell:>15}" for cell in ("exponent", *exponents.values())))
    return "\n".join(lines)


def plot(path: Path, figures: dict[str, dict]) -> None:
    """The three axes side by side, both scales logarithmic. Raises ImportError with what to install."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('--plot needs matplotlib: pip install "script-llava[eval]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.fonttype"] = "none"
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.4), sharey=True, layout="constrained")
    for panel, (axis, found) in zip(panels, figures.items(), strict=True):
        for part, label in PARTS.items():
            x, y = ([point[name] for point in found["points"]] for name in (axis, part))
            panel.loglog(x, y, marker="o", markersize=4, label=f"{label}: {axis}^{found['exponents'][part]:.2f}")
        panel.set_xticks(AXES[axis], [str(value) for value in AXES[axis]])
        panel.minorticks_off()
        panel.set_xlabel(f"{axis}, {NAMES[axis]}")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("milliseconds")
    figure.savefig(path)
    pyplot.close(figure)


def measure_clips(options: argparse.Namespace) -> dict[str, object]:
    """Measure and print the clips; what they are and what was found."""
    tokens, width = options.clip_tokens, options.clip_width
    found = {}
    for name, case in clips(tokens, width, getattr(torch, options.dtype), options.device).items():
        found[name] = measure_clip(case, options.clip_keep, options.clip_repeats, options.device)
        print(clip_table(name, tokens, width, found[name]), end="\n\n", flush=True)
    return {"clip": {"tokens": tokens, "width": width, "cases": found}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.selection_scaling", description=__doc__)
    parser.add_argument("--width", type=int, default=1024, help="of the features (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw, as SVG, PNG or PDF")
    parser.add_argument("--axes", nargs="*", choices=list(AXES), default=list(AXES), help="default: all of them")
    parser.add_argument("--clip-tokens", type=int, metavar="N", help="also a clip of N tokens, as 64 x 169 = 10816")
    parser.add_argument("--clip-keep", type=int, nargs="+", default=[256, 512, 1024, 2048], metavar="K")
    parser.add_argument("--clip-width", type=int, default=3584, help="of its features (%(default)s)")
    parser.add_argument("--clip-repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.clip_tokens is not None:
        try:
            check_keep(options.clip_keep, options.clip_tokens)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    if options.plot and set(options.axes) != set(AXES):
        print("error: --plot draws all axes, give no --axes", file=sys.stderr)
        return 2
    figures = {}
    for axis in options.axes:
        points = measure_axis(axis, options.width, getattr(torch, options.dtype), options.device, options.repeats)
        exponents = {column: exponent(points, axis, column) for column in (*PARTS, "memory_mib")}
        figures[axis] = {"points": points, "exponents": exponents}
        print(table(axis, points, exponents), end="\n\n")
    if options.plot:
        try:
            plot(options.plot, figures)
        except (ImportError, OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    setting = {"width": options.width, "dtype": options.dtype, "middle": MIDDLE}
    of_clips = measure_clips(options) if options.clip_tokens is not None else {}
    print(json.dumps(setting | {"axes": figures} | of_clips | describe_machine(options.device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
