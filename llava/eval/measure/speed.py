"""How fast the runner is: one process against two, batch 1 against 8, and its own share of the time.

Runs `llava.eval.run` as a user would, in turn and several times; loading is not counted. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from tqdm import tqdm

from llava.eval.benchmarks import OUTPUT_ROOT
from llava.eval.files import read_json
from llava.serve import flags

WAYS = {  # name: (processes, batch size)
    "one process": (1, 1),
    "two processes": (2, 1),
    "batch 8": (1, 8),
}


def measure(arguments: Sequence[str], processes: int, batch_size: int) -> dict[str, float]:
    """Questions per second of one run, and the share of its time outside the model.

    Raises:
        ValueError: the run failed; what it said is on standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = ["--output-root", folder, "--tag", "speed"]
        way = ["--processes", str(processes), "--batch-size", str(batch_size)]
        command = [sys.executable, "-m", "llava.eval.run", *arguments, *place, *way]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise ValueError(f"the run failed: {result.stderr.strip().splitlines()[-1]}")
        summary = read_json(next(Path(folder).rglob("summary.json")))
    return {
        "rate": summary["questions"] / summary["wall_seconds"],
        "overhead": 1.0 - summary["model_seconds"] / (processes * summary["wall_seconds"]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.speed", description=__doc__)
    flags.add_checkpoint(parser)
    parser.add_argument("--benchmark", default="gqa")
    parser.add_argument("--data-root", default=str(OUTPUT_ROOT))
    parser.add_argument("--keep-tokens", default="full")
    parser.add_argument("--limit", type=flags.at_least_one, default=200, help="questions per run (%(default)s)")
    parser.add_argument("--repeats", type=flags.at_least_one, default=3, help="runs of each way (%(default)s)")
    options = parser.parse_args(arguments)
    base = ["--model-path", options.model_path, "--benchmark", options.benchmark, "--data-root", options.data_root]
    base += ["--keep-tokens", options.keep_tokens, "--limit", str(options.limit)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    turns = [name for _ in range(options.repeats) for name in WAYS]  # in turn, so that a busy moment hits all alike
    try:
        for name in tqdm(turns, unit="run"):
            found[name].append(measure(base, *WAYS[name]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rates = {name: [run["rate"] for run in runs] for name, runs in found.items()}
    for name, values in rates.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        outside = median(run["overhead"] for run in found[name])
        print(f"{name:>14}: {median(values):.2f} questions/s ({spread}), {outside:.1%} of the time outside the model")
    single = median(rates["one process"])
    summary = {
        "two_processes": median(rates["two processes"]) / single,
        "batch_8": median(rates["batch 8"]) / single,
        "overhead": median(run["overhead"] for run in found["one process"]),
        "overhead_two_processes": median(run["overhead"] for run in found["two processes"]),
        "overhead_batch_8": median(run["overhead"] for run in found["batch 8"]),
        "questions_per_second": single,
        "limit": options.limit,
        "repeats": options.repeats,
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
