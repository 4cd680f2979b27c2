"""Outcomes of classes as the tables of a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.hosts.checks import Outcome
from llava.integrations.transformers.host import SUFFIX

START, END = "<!-- hosts -->", "<!-- /hosts -->"
HEADINGS = {
    "works": "Works",
    "broken": "Attaches, and fails a check",
    "refused": "Refused when attaching",
    "unbuilt": "Cannot be built here",
}


def put_between_marks(page: Path, outcomes: Sequence[Outcome], made: Mapping[str, Any]) -> None:
    """Write the tables between the marks of a page; without outcomes only look for these.

    Raises:
        ValueError: the page has no such marks.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} must have one {START} and one {END}")
    if outcomes:
        before, rest = text.split(START)
        after = rest.split(END)[1]
        page.write_text(f"{before}{START}\n\n{tables(outcomes, made)}\n\n{END}{after}", encoding="utf-8")


def summary(outcomes: Iterable[Outcome]) -> str:
    counts = Counter(outcome.status for outcome in outcomes)
    return ", ".join(f"{counts[status]} {status}" for status in HEADINGS if counts[status])


def tables(outcomes: Sequence[Outcome], made: Mapping[str, Any]) -> str:
    """Markdown: what was run, and one table for each status."""
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    parts = [f"{len(outcomes)} model types: {summary(outcomes)} ({versions})."]
    for status, heading in HEADINGS.items():
        rows = sorted((one for one in outcomes if one.status == status), key=lambda one: one.name.lower())
        if not rows:
            continue
        parts.append(f"## {heading}")
        if status == "works":
            parts.append(
                "\n".join(
                    ["| class (model type) | views | a token is | `auto` takes | beside |", "|---|---|---|---|---|"]
                    + [works_row(one) for one in rows]
                )
            )
        else:
            parts.append("\n".join(["| class (model type) | why |", "|---|---|"] + [reason_row(one) for one in rows]))
    return "\n\n".join(parts)


def works_row(one: Outcome) -> str:
    beside = [f"{one.deep} follows the kept tokens"] if one.deep else []
    beside += ["unpruned, a loss does not reach the tower"] if one.gradients.startswith("none") else []
    return f"| {named(one)} | {one.views} | {one.token} | {one.relevance} | {'; '.join([*beside, *one.notes])} |"


def reason_row(one: Outcome) -> str:
    return f"| {named(one)} | {one.reason.replace('|', '/')} |"


def named(one: Outcome) -> str:
    return f"`{one.name.removesuffix(SUFFIX)}` (`{one.model_type}`)"
