"""Messages that others read: no path of this machine is in them."""

from __future__ import annotations

import re

PATH = re.compile(r"(?<![\w/:.])~?(?:/[\w.@+-]+){2,}/?|[A-Za-z]:(?:\\[\w.@+ -]+)+")


def without_paths(text: str) -> str:
    """A message with the paths of this machine cut to their last part."""
    return PATH.sub(lambda match: re.split(r"[/\\]", match.group().rstrip("/\\"))[-1], text)
