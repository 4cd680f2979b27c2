"""How well cheaper estimators of redundancy agree with comparing all pairs, and what they cost.

The paper's first table also has an accuracy: ``python -m llava.eval.tables 1``.

Sets of size K drawn at random agree by about (K/n) / (2 - K/n), so both the kept and the discarded sets are reported.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llava.eval.measure.selection_speed import time_rows
from llava.mm_utils import load_image, process_images
from llava.model.builder import TOY_FOLDER, load_pretrained_model, pick_device
from llava.pruning.redundancy import ESTIMATORS, compared_pairs, intersection_over_union, least_redundant
from llava.serve import flags

PICTURES = TOY_FOLDER / "data" / "eval" / "pope" / "val2014"
SUFFIXES = {".jpg", ".jpeg", ".png"}
PRINTED = {"exhaustive": (1.00, 100), "bipartite": (0.93, 35), "random": (0.52, 34)}  # IOU@K, K not told, and time


def find_pictures(folder: Path, limit: int) -> list[Path]:
    """The first pictures of a folder by name. Raises FileNotFoundError if there are none."""
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)[:limit]
    if not found:
        raise FileNotFoundError(f"no picture ({', '.join(sorted(SUFFIXES))}) in {folder}")
    return found


def read_features(model_path: str, pictures: Sequence[Path], device: str) -> Tensor:
    """Projected tokens (views, n, d) of the pictures, padding included, as LLaVA-1.5 reads them."""
    _, model, processor, _ = load_pretrained_model(model_path, device=device)
    parts = []
    for picture in pictures:
        pixels = process_images([load_image(picture)], processor, model.config)[0]
        with torch.inference_mode():
            parts.append(model.encode_images(pixels if pixels.ndim == 4 else pixels[None]).float())
    return torch.cat(parts)


def measure(features: Tensor, keep: int, tau: float, gamma: float, repeats: int) -> list[dict[str, object]]:
    """A row per estimator: pairs, agreement with the exhaustive one (mean over views), milliseconds per view."""
    chosen = {name: least_redundant(features, name, keep, tau, gamma) for name in ESTIMATORS}
    view = features[:1]
    calls = {name: lambda name=name: least_redundant(view, name, keep, tau, gamma) for name in ESTIMATORS}
    seconds = time_rows(calls, repeats, features.device.type)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    whole = chosen["exhaustive"]
    return [
        {
            "estimator": name,
            "pairs": compared_pairs(name, features.shape[1]),
            "iou_kept": round(intersection_over_union(chosen[name], whole).mean().item(), 3),
            "iou_discarded": round(intersection_over_union(~chosen[name], ~whole).mean().item(), 3),
            "milliseconds": round(1e3 * medians[name], 3),
            "spread_ms": [round(1e3 * min(seconds[name]), 3), round(1e3 * max(seconds[name]), 3)],
            "time": round(100 * medians[name] / medians["exhaustive"], 1),
        }
        for name in ESTIMATORS
    ]


def table(rows: Sequence[dict[str, object]]) -> str:
    """The rows as a Markdown table, what the paper prints beside them."""
    lines = [
        "| estimator | pairs | IoU kept | IoU discarded | paper: IoU | ms per view | time | paper: time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["spread_ms"]
        iou, time = PRINTED[row["estimator"]]
        lines.append(
            f"| {row['estimator']} | {row['pairs']} | {row['iou_kept']:.2f} | {row['iou_discarded']:.2f} | "
            f"{iou:.2f} | {row['milliseconds']:.2f} ({low:.2f} to {high:.2f}) | {row['time']:.0f} | {time} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 2 with one line on standard error if it could not."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.redundancy", description=__doc__)
    flags.add_checkpoint(parser)
    parser.add_argument("--image-folder", type=Path, default=PICTURES, help="pictures; default: the toy's POPE")
    parser.add_argument(
        "--limit", type=flags.at_least_one, default=32, metavar="K", help="only the first K pictures (%(default)s)"
    )
    parser.add_argument("--share", type=float, default=0.1, help="of the tokens that is kept (%(default)s)")
    parser.add_argument("--tau", type=float, default=0.5, help="edge threshold (%(default)s)")
    parser.add_argument("--gamma", type=float, default=1.0, help="weight of edge strength (%(default)s)")
    parser.add_argument("--repeats", type=flags.at_least_one, default=15, help="of every timing (%(default)s)")
    flags.add_device(parser)
    options = parser.parse_args(arguments)
    try:
        if not 0 < options.share < 1:
            raise ValueError(f"--share must lie between 0 and 1, got {options.share}")
        pictures = find_pictures(options.image_folder, options.limit)
        features = read_features(options.model_path, pictures, pick_device(options.device))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tokens = features.shape[1]
    keep = max(1, round(options.share * tokens))
    rows = measure(features, keep, options.tau, options.gamma, options.repeats)
    expected = [size / tokens / (2 - size / tokens) for size in (keep, tokens - keep)]
    print(f"{keep} of {tokens} tokens kept, {len(features)} views, tau={options.tau:g}, gamma={options.gamma:g}")
    print(table(rows))
    print(f"two random sets would agree by {expected[0]:.2f} (kept) and {expected[1]:.2f} (discarded)")
    setting = {
        "model": options.model_path,
        "views": len(features),
        "tokens": tokens,
        "width": features.shape[2],
        "keep": keep,
        "tau": options.tau,
        "gamma": options.gamma,
        "device": f"{platform.machine()} CPU" if features.device.type == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps({**setting, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
