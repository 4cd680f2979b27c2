"""``script-llava COMMAND ...``: one name for the commands that are otherwise run as ``python -m llava...``."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from llava import __version__
from llava.terminal import printable

COMMANDS = {
    "chat": ("llava.serve.cli", "ask a checkpoint about pictures or a video, once or in a chat"),
    "page": ("llava.serve.page", "a page in the browser: ask, and see which tokens were kept"),
    "gallery": ("llava.serve.gallery", "comparisons of kept tokens as one HTML file"),
    "eval": ("llava.eval.run", "ask the questions of a benchmark, or a list of your own, and write the answers"),
    "score": ("llava.eval.score", "score the answers to a benchmark"),
    "report": ("llava.eval.report", "a table of runs"),
    "harness": ("llava.eval.harness", "benchmarks through lmms-eval"),
    "efficiency": ("llava.eval.efficiency", "time, memory and work of every part, by budget"),
    "selection-speed": ("llava.eval.selection_speed", "time of the selections alone"),
    "serving-load": ("llava.eval.serving_load", "requests per second of a server, unpruned and pruned"),
    "audit": ("llava.eval.audit", "does a method read the question and keep its promises, on your checkpoint"),
    "calibrate-heads": (
        "llava.eval.calibrate_heads",
        "weights of attention heads for relevance, without labels",
    ),
    "calibrate-budget": ("llava.eval.calibrate_budget", "which keep_tokens=auto keeps so many tokens on average"),
    "redundancy": ("llava.eval.redundancy", "how well cheaper estimates of redundancy agree with comparing all pairs"),
}


def usage() -> str:
    """What there is, one line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what} (python -m {module})" for name, (module, what) in COMMANDS.items()]
    return "\n".join(
        ["usage: script-llava COMMAND [options]", "", *lines, "", "script-llava COMMAND --help: its options"]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the module of a command as ``python -m`` does; the exit status is the module's.

    Returns:
        0 after help or version, 2 with a line on standard error for an unknown command.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"script-llava {__version__}")
        return 0
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: unknown command {printable(name)}; commands: {known}", file=sys.stderr)
        return 2
    sys.argv = [f"script-llava {name}", *arguments[1:]]
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
