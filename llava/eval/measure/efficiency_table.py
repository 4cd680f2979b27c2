"""The efficiency table as people read it: one line a method, the paper's figures beside ours, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval.tables.paper import PAPER_EFFICIENCY, PaperEfficiency

STAGE_COLUMNS = ("preprocess", "vision", "text tower", "selection", "prefill", "first token", "decode")
DRAWN = {"vision": "#4477aa", "text tower": "#66ccee", "selection": "#ee6677", "prefill": "#228833"}
HEADER = (
    "method", "visual tokens", "GMACs, formula", "GMACs, counted", *(f"{stage} (ms)" for stage in STAGE_COLUMNS),
    "cache of visual tokens (MB)", "whole cache (MB)", "peak beside weights (MB)", "share of limit",
    "first token, times faster", "prefill, times faster",
)  # fmt: skip


def print_table(rows: Sequence[dict[str, Any]], preset: str | None, batch: int) -> None:
    """Markdown: what was measured, then what the paper prints for the same model and budget, marked as such."""
    print(
        f"\n{preset or 'checkpoint'}, batch {batch}: medians, and the spread of the time to the first token. MACs and"
    )
    print("cache are those of one prompt. What a method does inside the decoder is part of prefill.\n")
    own = [_cells(row) for row in rows]
    filled = [column for column in range(len(HEADER)) if not own or any(line[column] != "-" for line in own)]
    lines = [HEADER, *own, *(_paper_cells(row) for row in PAPER_EFFICIENCY if row.preset == preset)]
    for number, line in enumerate([line[column] for column in filled] for line in lines):
        print(f"| {' | '.join(line)} |")
        if number == 0:
            print(f"|{'---|' * len(line)}")
    for row in rows:
        if row["note"]:
            print(f"\n{_name(row)}: {row['note']}")


def _name(row: dict[str, Any]) -> str:
    return row["method"] if row["keep_tokens"] is None else f"{row['method']} @{row['keep_tokens']}"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(value / scale, form)

    tokens = number(row.get("visual_tokens"), ".0f")
    average = row.get("average_tokens")
    if average is not None and round(average) != row["visual_tokens"]:
        tokens += f" (mean {average:.0f})"
    milliseconds, spread = row["milliseconds"], row["spread_ms"].get("first token")
    forms = {stage: ".2f" if stage in ("selection", "decode") else ".1f" for stage in STAGE_COLUMNS}
    return (
        _name(row),
        tokens,
        number(row.get("formula_macs"), ",.1f", 1e9),
        number(row.get("counted_macs"), ",.1f", 1e9),
        *(
            number(milliseconds.get(stage), form)
            + (f" ({spread[0]:.1f} to {spread[1]:.1f})" if spread and stage == "first token" else "")
            for stage, form in forms.items()
        ),
        number(row.get("visual_cache_bytes"), ",.1f", 2**20),
        number(row.get("cache_bytes"), ",.1f", 2**20),
        number(row.get("extra_memory_bytes"), ",.0f", 2**20),
        number(row.get("share_of_limit"), ".1%"),
        number(row.get("faster_first_token"), ".2f"),
        number(row.get("faster_prefill"), ".2f"),
    )


def _paper_cells(row: PaperEfficiency) -> tuple[str, ...]:
    cells = dict.fromkeys(HEADER, "")
    cells["method"] = f"paper: {row.method}"
    cells["visual tokens"] = str(row.tokens)
    cells["GMACs, formula"] = f"{row.tera_flops * 500:,.0f} (printed: {row.tera_flops} TFLOPs)"
    cells["cache of visual tokens (MB)"] = f"{row.cache_megabytes:g}"
    if row.prefill_milliseconds is not None:
        cells["prefill (ms)"] = f"{row.prefill_milliseconds:g}"
    return tuple(cells.values())


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Stacked bars of the stages before the first token, one bar a row.

    Raises:
        ImportError: matplotlib is missing; says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('--plot needs matplotlib: pip install "script-llava[eval]"') from error
    drawn = [row for row in rows if "prefill" in row["milliseconds"]]
    figure = Figure(figsize=(8, 1 + 0.28 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(drawn)
    for stage, colour in DRAWN.items():
        widths = [row["milliseconds"][stage] for row in drawn]
        axes.barh([_name(row) for row in drawn], widths, left=left, color=colour, label=stage)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, each stage on its own")
    axes.legend()
    figure.savefig(path)
