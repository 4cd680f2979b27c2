"""What the Script paper prints for its averages, and what its own columns give where that differs.

Average accuracy (Acc.) and its share of the unpruned model's (Relative, %), as printed; ``None``: not transcribed.
Tokens count the whole picture. ``recomputed`` is (Acc., Relative) by the paper's columns where the print is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """One row of a table of the paper."""

    table: int
    model: str
    method: str
    tokens: int
    acc: float | None
    relative: float | None
    recomputed: tuple[float | None, float | None] | None = None


V15, NEXT, V15_13B, NEXT_13B = "LLaVA-1.5-7B", "LLaVA-NeXT-7B", "LLaVA-1.5-13B", "LLaVA-NeXT-13B"

PAPER_ROWS = (
    PaperRow(2, V15, "unpruned", 576, 63.47, 100.0),
    PaperRow(2, V15, "SparseVLM", 192, 62.08, 97.82),
    PaperRow(2, V15, "VisionZip", 192, 59.28, 93.40, (61.88, 97.50)),
    PaperRow(2, V15, "TRIM", 192, 59.28, 93.41, (None, 93.40)),
    PaperRow(2, V15, "Script", 192, None, 100.0, (None, 99.96)),
    PaperRow(2, V15, "FastV", 128, 60.13, 94.74),
    PaperRow(2, V15, "Script", 128, 62.51, 98.49, (62.495, 98.47)),
    PaperRow(2, V15, "Script", 64, 61.49, 96.88),
    PaperRow(2, V15, "TRIM", 16, 49.39, 77.82),
    PaperRow(2, V15, "Script", 16, 56.81, 89.51),
    PaperRow(3, NEXT, "unpruned", 2880, 65.43, 100.0, (65.438, None)),
    PaperRow(3, NEXT, "Script", 640, 65.35, 99.88, (65.26, 99.72)),
    PaperRow(3, NEXT, "DivPrune", 320, 62.59, 95.66),
    PaperRow(3, NEXT, "Script", 320, 63.95, 97.78, (None, 97.74)),
    PaperRow(3, NEXT, "Script", 160, 62.80, 95.98),
    PaperRow(8, V15_13B, "unpruned", 576, 66.21, 100.0, (66.18, None)),
    PaperRow(8, V15_13B, "FastV", 128, 63.17, None, (63.08, None)),
    PaperRow(8, V15_13B, "Script", 128, None, 97.64, (None, 97.92)),
    PaperRow(8, V15_13B, "FastV", 64, 55.78, None, (55.74, None)),
    PaperRow(8, V15_13B, "TRIM", 64, 60.73, None, (60.69, None)),
    PaperRow(8, V15_13B, "SparseVLM", 64, 61.62, None, (61.54, None)),
    PaperRow(8, V15_13B, "Script", 64, 64.20, None, (64.18, None)),
    PaperRow(8, V15_13B, "TRIM", 32, 57.79, 86.28, (57.94, 87.28)),
    PaperRow(8, V15_13B, "VisionZip", 32, None, 87.62, (None, 87.31)),
    PaperRow(9, NEXT_13B, "unpruned", 2880, 67.91, 100.0, (67.89, None)),
    PaperRow(9, NEXT_13B, "DivPrune", 640, 66.42, None, (66.44, None)),
    PaperRow(9, NEXT_13B, "SparseVLM", 320, 65.05, None, (65.02, None)),
    PaperRow(9, NEXT_13B, "Script", 320, 66.16, None, (66.15, None)),
)
