"""Several processes for one run: started here on one machine, or by ``accelerate launch`` on one or more."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
from accelerate import PartialState

DEATH_SIGNAL_OPTION = 1  # PR_SET_PDEATHSIG of Linux
SYSTEM = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: a fork must not load libraries
PATIENCE = timedelta(days=30)  # ranks end hours apart; a barrier must not give up on them


def is_launched() -> bool:
    """Whether a launcher started this process and told it its rank (the protocol of torchrun and accelerate)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join_processes(device: str) -> PartialState:
    """This process's place among its siblings; gloo, because nothing but barriers passes between them."""
    state = (
        PartialState(cpu=device == "cpu", backend="gloo", timeout=PATIENCE)
        if is_launched()
        else PartialState(cpu=device == "cpu")
    )
    if is_launched():
        die_with_parent()
    return state


def barrier(state: PartialState) -> None:
    """Wait for all processes of the run."""
    if state.num_processes > 1:
        torch.distributed.barrier()


def die_with_parent() -> None:
    """Have the system kill this process when its launcher dies, even by kill -9: no orphan writes on."""
    if SYSTEM is not None:
        SYSTEM.prctl(DEATH_SIGNAL_OPTION, signal.SIGKILL)


def run_processes(module: str, arguments: Sequence[str], processes: int) -> int:
    """Start ``processes`` copies of ``python -m module arguments`` on this machine; the first failure ends all.

    Returns:
        0, or the exit code of the first that failed; of one that a signal ended, 128 and the signal's number, as
        shells have it, after a line on standard error that names both.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // processes)
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["OMP_NUM_THREADS"] = threads  # together they have no more threads than there are cores
    running: list[subprocess.Popen] = []
    try:
        for rank in range(processes):
            place = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            command = [sys.executable, "-m", module, *arguments]
            # Bound to this process before the program starts: loading libraries takes seconds, in which it may die.
            running.append(subprocess.Popen(command, env={**os.environ, **place}, preexec_fn=die_with_parent))
        while any(process.poll() is None for process in running):
            failed = _first_failure(running)
            if failed is not None:
                return failed
            time.sleep(0.1)
        return _first_failure(running) or 0
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
        for process in running:
            process.wait()


def _first_failure(running: Sequence[subprocess.Popen]) -> int | None:
    """Exit code of the first process that has failed; says which one if it could not say so itself."""
    for rank, process in enumerate(running):
        code = process.poll()
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            print(
                f"error: process {rank} of {len(running)} was ended by signal {-code} ({name}); its answers so far "
                "are kept, run again to go on",
                file=sys.stderr,
            )
            return 128 - code
        if code:
            return code
    return None
