"""Which picture a question was asked about: enough to notice that its file is another one later."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def stamp(path: Path) -> dict[str, Any]:
    """File, size, time of change, and digest of a picture. Raises OSError."""
    status = path.stat()
    return {"file": str(path), "size": status.st_size, "changed": status.st_mtime_ns, "digest": _digest(path)}


def changed(stamps: Sequence[Mapping[str, Any]]) -> list[str]:
    """The files that hold another picture than when they were stamped. One that is missing is none.

    A file's contents are read only where size or time differ, which takes moments for any number of pictures.
    """
    found = []
    for one in {stamp["file"]: stamp for stamp in stamps}.values():
        path = Path(one["file"])
        if not path.is_file():
            continue
        status = path.stat()
        same = (status.st_size, status.st_mtime_ns) == (one["size"], one["changed"])
        if not same and _digest(path) != one["digest"]:
            found.append(one["file"])
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
