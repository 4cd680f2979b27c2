"""The parts of the page that are HTML of our own: the picture box, the preview, what is told meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

import numpy as np
from PIL import Image

from llava.serve.page.user import Bundled, Progress
from llava.serve.viewer.html import data_address

THUMBNAIL, PREVIEW = 96, 400  # pixels of the longer side


def small(picture: Image.Image, side: int) -> str:
    """A picture made smaller, as a data: address."""
    copy = picture.convert("RGB")
    copy.thumbnail((side, side))
    return data_address(np.asarray(copy))


def picture_box(bundled: Iterable[Bundled], most_bytes: int) -> str:
    """Bundled pictures to press, and buttons for a file and the camera."""
    thumbs = "".join(
        f'<button type="button" data-bundled="{escape(one.name)}" aria-pressed="false" title="{escape(one.name)}">'
        f'<img src="{small(one.thumbnail, THUMBNAIL)}" alt="{escape(one.name)}"></button>'
        for one in bundled
    )
    row = f'<div class="thumbs" role="group" aria-label="Bundled pictures">{thumbs}</div>' if thumbs else ""
    return (
        f'<div id="picture-box" data-most="{most_bytes}">{row}<div class="ways">'
        '<button type="button" id="open-file">Open a picture or video</button>'
        '<button type="button" id="open-camera">Camera</button>'
        '<input type="file" id="file" accept="image/*,video/*" hidden aria-label="picture or video"></div>'
        f"<p>Or paste or drop one here; up to {most_bytes / 2**20:g} MiB.</p>"
        '<div id="camera" hidden><video playsinline muted aria-label="camera"></video>'
        '<button type="button" id="take-photo">Take the photo</button> '
        '<button type="button" id="close-camera">Close</button></div>'
        '<p id="box-told" role="status"></p></div>'
    )


def preview(picture: Image.Image, name: str, shown: str) -> str:
    """The picture on the desk and how the model reads it."""
    return f'<img src="{small(picture, PREVIEW)}" alt="{escape(name)}"><p>{escape(name)}: {escape(shown)}</p>'


def told(progress: Progress) -> str:
    """What is going on, for eyes and screen readers."""
    answer = f'<p class="answer">{escape(progress.answer)}</p>' if progress.answer else ""
    return f'<p role="status">{escape(progress.doing)} ...</p>{answer}'


def error(text: str) -> str:
    return f'<p class="error" role="alert">{escape(text)}</p>'


def note(text: str) -> str:
    return f'<p role="status">{escape(text)}</p>'
