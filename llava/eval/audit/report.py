"""The findings of an audit: on the screen, as JSON, as a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.audit.checks import Finding
from llava.pruning import Method

PROMISES = (
    "keep all = unpruned", "cache = text + kept", "order of reading", "positions", "deep features", "batch = singles",
)  # fmt: skip
MARKS = {True: "ok  ", False: "FAIL", None: "-   "}


def print_findings(method: Method, findings: Sequence[Finding]) -> None:
    """One line per check."""
    print(f"\n{method.name}")
    for finding in findings:
        print(f"  {MARKS[finding.passed]} {finding.check}: {finding.text}")


def method_table(results: Mapping[str, Sequence[Finding]]) -> str:
    """Markdown: a row for each method, the figures that methods differ in."""
    columns = ("overlap, two questions", "AUC, asked", "AUC, asked against the other", "lift", "right answers")
    header = f"| method | promises | {' | '.join(columns)} |"
    lines = [header, "|---|---|---|---|---|---|---|"]
    for name, findings in results.items():
        refusal = next((finding.text for finding in findings if finding.check == "runs here"), None)
        if refusal is not None:
            lines.append(f"| `{name}` | {refusal.partition('. ')[0]} | | | | | |")
            continue
        figures = {key: value for finding in findings for key, value in finding.figures.items()}
        broken = [finding.check for finding in findings if finding.check in PROMISES and finding.passed is False]
        cells = ["kept" if not broken else f"**{', '.join(broken)}**"]
        cells += [
            f"{figures[key]:.2f}" if key in figures else "-" for key in ("questions_overlap", "auc", "pair", "lift")
        ]
        lines.append(f"| `{name}` | {' | '.join([*cells, format(figures['pruned'], '.2f')])} |")
    return "\n".join(lines)


def source_table(sources: Mapping[str, Any]) -> str:
    """Sources of relevance by falling area, and the option that takes the best."""
    lines = ["\nsource of relevance (area under the ROC curve on the boxes; 0.5 is chance)"]
    measured = {name: found for name, found in sources.items() if "auc" in found}
    for name, found in sorted(measured.items(), key=lambda item: -item[1]["auc"]):
        line = f"  {name:10} {found['auc']:.3f} +- {found['error']:.3f}; with another question {found['other']:.3f}"
        lines.append(line + (f", asked thing against the other {found['pair']:.3f}" if "pair" in found else ""))
    lines += [f"  {name:10} {found['refused']}" for name, found in sources.items() if "refused" in found]
    if measured:
        best = max(measured, key=lambda name: measured[name]["auc"])
        lines.append(f"use it: --pruner-args relevance={best}    (in Python: relevance={best!r})")
    return "\n".join(lines)


def write_json(file: Path, report: Mapping[str, Any], results: Mapping[str, Sequence[Finding]]) -> None:
    """Everything that was found."""
    methods = {name: [dataclasses.asdict(finding) for finding in findings] for name, findings in results.items()}
    file.write_text(json.dumps({**report, "methods": methods}, indent=1) + "\n", encoding="utf-8")


def write_plot(file: Path, report: Mapping[str, Any], results: Mapping[str, Sequence[Finding]]) -> None:
    """Two panels: overlap of kept sets for two questions, and the area under the ROC curve, by method."""
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError('--plot needs matplotlib: pip install -e ".[eval]"') from error
    figure, panels = plt.subplots(1, 2, figsize=(10, 0.4 * len(results) + 1.5), sharey=True, layout="constrained")
    names = list(results)[::-1]
    for panel, key, title, chance in (
        (
            panels[0],
            "questions_overlap",
            "overlap of kept sets for two questions (1: the question plays no part)",
            None,
        ),
        (panels[1], "auc", "relevance on what is asked about (AUC)", 0.5),
    ):
        for row, name in enumerate(names):
            figures = next((f.figures for f in results[name] if key in f.figures), None)
            if figures is not None and isinstance(figures[key], float):
                panel.barh(row, figures[key], color="#4477aa")
                panel.text(figures[key] + 0.01, row, f"{figures[key]:.2f}", va="center", fontsize=8)
        panel.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1.1), title=title)
        panel.title.set_fontsize(9)
        if chance is not None:
            panel.axvline(chance, color="black", linewidth=0.8, linestyle=":")
    figure.suptitle(f"{report['model']}, {report['keep_tokens']} tokens per view", fontsize=9)
    figure.savefig(file)
    plt.close(figure)
