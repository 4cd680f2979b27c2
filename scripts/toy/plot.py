"""The training logs as one small SVG: held-out accuracies over the steps of each stage."""

from __future__ import annotations

import csv
from pathlib import Path

from files import write_text

STAGES = {
    "tower": ("val_shape", "val_color", "val_word", "val_tens", "val_units", "val_auc"),
    "joint": ("found", "val_found", "val_auc"),
    "llava-toy-v1.5": ("val_existence", "val_attribute", "val_text", "val_relation", "val_unpruned"),
    "llava-toy-v1.6": ("val_existence", "val_attribute", "val_text", "val_relation", "val_unpruned"),
}
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
WIDTH, HEIGHT, MARGIN = 300, 200, 40


def _panel(rows: list[dict[str, str]], keys: tuple[str, ...], left: int, title: str) -> list[str]:
    last = max((int(row["step"]) for row in rows), default=1)
    bottom = MARGIN + HEIGHT
    parts = [
        f'<rect x="{left}" y="{MARGIN}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>',
        f'<text x="{left}" y="{MARGIN - 10}" font-weight="bold">{title}</text>',
        f'<text x="{left + WIDTH}" y="{bottom + 15}" text-anchor="end">{last} steps</text>',
    ]
    for level in (0, 0.5, 1):
        parts.append(f'<text x="{left - 5}" y="{bottom - level * HEIGHT + 4}" text-anchor="end">{level:g}</text>')
    for number, (key, color) in enumerate(zip(keys, COLORS, strict=False)):
        points = [(int(row["step"]) / last, float(row[key])) for row in rows if row.get(key)]
        line = " ".join(f"{left + x * WIDTH:.1f},{bottom - y * HEIGHT:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        x, y = left + 8 + 100 * (number % 3), bottom + 32 + 15 * (number // 3)
        parts.append(f'<text x="{x}" y="{y}" fill="{color}">{key.removeprefix("val_")}</text>')
    return parts


def plot_log(folder: Path) -> None:
    """Read ``training-<stage>.csv`` in ``folder`` and write ``training.svg`` beside them."""
    parts, stages = [], list(STAGES.items())
    for number, (stage, keys) in enumerate(stages):
        path = folder / f"training-{stage}.csv"
        if path.exists():
            rows = list(csv.DictReader(path.open(encoding="utf-8")))
            parts += _panel(rows, keys, MARGIN + number * (WIDTH + MARGIN), f"{stage}, held-out scenes")
    width, height = MARGIN + len(stages) * (WIDTH + MARGIN), HEIGHT + 2 * MARGIN + 40
    size = f'width="{width}" height="{height}" font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect width="100%" height="100%" fill="white"/>'
    write_text(folder / "training.svg", "\n".join((head, *parts, "</svg>")) + "\n")
