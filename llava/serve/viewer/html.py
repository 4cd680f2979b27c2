"""Comparisons as HTML that needs nothing else: pictures, numbers, style and script are in it.

Without the script the kept patches stand out, and answers, times and overlaps are tables. With it overlays can be
switched, the order of choice played, a patch asked, and PNG and JSON saved.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files

import numpy as np
from PIL import Image
from torch import Tensor

from llava.serve.viewer.look import Comparison, Look, Picture, View, as_dict

QUALITY = 88  # of the JPEG pictures
DIGITS = 3  # of milliseconds and megabytes


def script() -> str:
    """The script that brings fragments to life; of its own, without any library."""
    return _asset("viewer.js")


def style() -> str:
    return _asset("viewer.css")


def _asset(name: str) -> str:
    return (files("llava.serve.viewer") / name).read_text(encoding="utf-8")


def document(title: str, sections: Sequence[tuple[str, Comparison]], introduction: str = "") -> str:
    """A whole page of comparisons under headings, to be opened without a server."""
    parts = [
        f"<section><h2>{escape(heading)}</h2>{fragment(comparison, f'c{number}')}</section>"
        for number, (heading, comparison) in enumerate(sections)
    ]
    intro = f"<p>{escape(introduction)}</p>" if introduction else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style()}</style></head>"
        f'<body class="sv-document"><main><h1>{escape(title)}</h1>{intro}{"".join(parts)}</main>'
        f"<script>{script()}</script></body></html>\n"
    )


def fragment(comparison: Comparison, name: str) -> str:
    """A comparison as an element of a page that has `style` and `script`.

    Args:
        name: of the element, letters and digits, another one for each of a page.
    """
    pictures = _backgrounds(comparison, name)
    columns = "".join(_column(comparison, number, name) for number in range(len(comparison.looks)))
    data = json.dumps(as_dict(comparison), separators=(",", ":"))
    several = len(comparison.looks) > 1
    question = ""
    if "question" not in comparison.varying():
        question = f'<p class="sv-question">{escape(comparison.looks[0].setting.question)}</p>'
    return (
        f'<div class="sv" id="{name}"><style>{pictures}</style>'
        f'{question}<div class="sv-bar" hidden></div>'
        f'<div class="sv-looks" data-count="{len(comparison.looks)}">{columns}</div>'
        f'<p class="sv-cell" role="status" aria-live="polite"></p>'
        f"{_numbers(comparison)}{_overlaps(comparison) if several else ''}"
        f'<p class="sv-fine">{escape(comparison.model)}, {escape(comparison.picture)}</p>'
        f'<div class="sv-data" hidden>{escape(data, quote=False)}</div></div>'
    )


def _backgrounds(comparison: Comparison, name: str) -> str:
    """Each picture once, whatever the number of looks: rules of style for the views that show it."""
    known: dict[bytes, str] = {}
    rules: list[str] = []
    for number, look in enumerate(comparison.looks):
        for selector, view in _views(look, name, number):
            key = view.colours.tobytes()
            if key not in known:
                known[key] = f"--{name}-{len(known)}"
                rules.append(f"#{name}{{{known[key]}:url({data_address(view.colours)})}}")
            rules.append(f"{selector}{{background-image:var({known[key]})}}")
    return "".join(rules)


def _views(look: Look, name: str, number: int) -> list[tuple[str, View]]:
    return [
        (f"#{name}-{number}-{p}-{v}", view)
        for p, picture in enumerate(look.pictures)
        for v, view in enumerate(picture.views)
    ]


def data_address(colours: np.ndarray) -> str:
    """A picture (h, w, 3) uint8 as a data: address."""
    written = io.BytesIO()
    Image.fromarray(colours).save(written, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode()


def _column(comparison: Comparison, number: int, name: str) -> str:
    look, first = comparison.looks[number], comparison.looks[0]
    varying = comparison.varying()
    differs = look.setting.question == first.setting.question and look.answer != first.answer
    heading = look.setting.label()
    question = ""
    if "question" in varying:
        question = f'<p class="sv-question">{escape(look.setting.question)}</p>'
    mark = ' <span class="sv-changed">another answer than the first</span>' if differs else ""
    made = f", and {look.made} made" if look.made else ""
    stopped = ' <span class="sv-changed">stopped</span>' if look.stopped else ""
    notes = "".join(f'<p class="sv-note">{escape(note)}</p>' for note in look.notes)
    if not look.pictures:
        notes += '<p class="sv-note">It is not known which part of the picture a token of this model shows.</p>'
    return (
        f'<article class="sv-look" aria-label="{escape(heading)}"><h3>{escape(heading)}</h3>{question}'
        f'<p class="sv-answer">{escape(look.answer) or "<em>no words</em>"}{mark}{stopped}</p>'
        f'<p class="sv-count">{look.kept} of {look.tokens} visual tokens{made}</p>{notes}'
        + "".join(_picture(picture, f"{name}-{number}-{p}", look) for p, picture in enumerate(look.pictures))
        + "</article>"
    )


def _picture(picture: Picture, name: str, look: Look) -> str:
    views = [_view(view, f"{name}-{number}", look) for number, view in enumerate(picture.views)]
    if picture.grid is not None:
        counts = ", ".join(str(int(view.kept.sum())) for view in picture.views[1:])
        tiles = f'<div class="sv-tiles" style="--columns:{picture.grid[0]}">{"".join(views[1:])}</div>'
        caption = f'<p class="sv-caption" aria-hidden="true">tiles: {counts} tokens kept</p>'
        return f'<div class="sv-anyres">{views[0]}<div>{tiles}{caption}</div></div>'
    if len(views) > 1:
        return f'<div class="sv-strip" tabindex="0" role="group" aria-label="frames">{"".join(views)}</div>'
    return f'<div class="sv-single">{views[0]}</div>'


def _view(view: View, name: str, look: Look) -> str:
    rows, columns = view.kept.shape
    count = int(view.kept.sum())
    words = f"{view.title}: {count} of {rows * columns} tokens kept"
    share = f"{view.covered * 100:g}%"
    dark = "" if look.made and not look.kept else f'<path d="{_dropped(view.kept)}"/>'
    ratio = f"{view.colours.shape[1]}/{view.colours.shape[0]}"
    return (
        f'<figure class="sv-view"><div class="sv-stage" id="{name}" tabindex="0" role="application" '
        f'aria-label="{escape(words)}; arrow keys move from patch to patch" style="aspect-ratio:{ratio}">'
        f'<div class="sv-cover" style="width:{share};height:{share}">'
        f'<svg class="sv-dim" viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" aria-hidden="true">'
        f"{dark}</svg>"
        "</div></div>"
        f"<figcaption>{escape(words)}</figcaption></figure>"
    )


def _dropped(kept: Tensor) -> str:
    """The dropped cells (rows, columns) as a path of runs along the rows."""
    parts = []
    for y, row in enumerate(kept.tolist()):
        x = 0
        while x < len(row):
            end = x
            while end < len(row) and not row[end]:
                end += 1
            if end > x:
                parts.append(f"M{x} {y}h{end - x}v1h-{end - x}z")
            x = max(end, x + 1)
    return "".join(parts)


def _numbers(comparison: Comparison) -> str:
    """A table of the stages' milliseconds, the cache and what the decoder's layers see; a row for each look."""
    names = list(dict.fromkeys(name for look in comparison.looks for name in look.seconds))
    heads = "".join(f'<th scope="col">{escape(name)} (ms)</th>' for name in names)
    rows = []
    for number, look in enumerate(comparison.looks):
        times = "".join(f"<td>{_time(name, look)}</td>" for name in names)
        cache = "not told" if look.cache_bytes is None else f"{look.cache_bytes / 2**20:.{DIGITS}g}"
        mean = sum(look.per_layer) / len(look.per_layer)
        label = escape(_short(comparison, number))
        rows.append(f'<tr><th scope="row">{label}</th>{times}<td>{cache}</td><td>{mean:.4g}</td></tr>')
    kind = "question" if comparison.varying() == ["question"] else "method"
    return (
        '<div class="sv-scroll" tabindex="0" role="group" aria-label="Time and memory"><table>'
        "<caption>Time and memory</caption>"
        f'<thead><tr><th scope="col">{kind}</th>{heads}<th scope="col">cache of the prompt (MiB)</th>'
        '<th scope="col">visual tokens, mean of the layers</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _time(name: str, look: Look) -> str:
    if name not in look.seconds:
        return "none"
    if name == "vision" and not look.seconds[name]:
        return "cached"
    return f"{look.seconds[name] * 1e3:.{DIGITS}g}"


def _overlaps(comparison: Comparison) -> str:
    """A table of the intersection over union of every two kept sets."""
    if not len(comparison.looks[0].mask()):
        return ""
    labels = [escape(_short(comparison, number)) for number in range(len(comparison.looks))]
    heads = "".join(f'<th scope="col">{label}</th>' for label in labels)
    rows = "".join(
        f'<tr><th scope="row">{label}</th>{"".join(f"<td>{value:.0%}</td>" for value in row)}</tr>'
        for label, row in zip(labels, comparison.overlap().tolist(), strict=True)
    )
    return (
        '<div class="sv-scroll" tabindex="0" role="group" aria-label="Overlap"><table>'
        "<caption>Overlap of the kept sets: intersection over union</caption>"
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _short(comparison: Comparison, number: int) -> str:
    setting = comparison.looks[number].setting
    return setting.question if comparison.varying() == ["question"] else setting.label()
