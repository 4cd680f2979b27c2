"""What stands in a file of measurements beside its figures, so that they can be made again."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
LIBRARIES = ("torch", "transformers", "numpy")


def how_made(command: str, arguments: Sequence[str], libraries: Sequence[str] = LIBRARIES) -> dict[str, object]:
    """Command, machine, versions and date.

    Args:
        command: how the program is started, without its arguments.
        libraries: distributions whose versions count.
    """
    return {
        "command": " ".join([command, *arguments]),
        "machine": processor_name(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "date": datetime.date.today().isoformat(),
    }


def processor_name() -> str:
    """Cores and name of the processor, as Linux tells them; its architecture elsewhere."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)}-core {names[0]}" if names else platform.machine()
