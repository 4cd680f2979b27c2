"""Run a command that ends, with all that it started, when we are interrupted."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

GRACE = 20.0  # seconds that an interrupted command has to write down what it has


def finished(command: Sequence[str], log: TextIO, folder: Path, variables: Mapping[str, str] | None = None) -> int:
    """Run a command to its end; its exit code. Interrupted, all that it started is interrupted before we are.

    Args:
        log: what it prints.
        folder: where it runs, and where Python finds the package.
        variables: of its environment, beside our own.

    Raises:
        KeyboardInterrupt: Ctrl-C, or SIGTERM.
    """
    environment = {**os.environ, "PYTHONPATH": str(folder), **(variables or {})}
    options: dict[str, Any] = {"cwd": folder, "env": environment, "stdout": log, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            end_group(process)
            raise


def end_group(process: subprocess.Popen) -> None:
    """Interrupt a process and all that it started; what is left of them after `GRACE` seconds is killed."""
    deadline = time.monotonic() + GRACE
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        while time.monotonic() < deadline:
            process.poll()
            os.killpg(process.pid, 0)  # raises where none is left
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
