"""Run a benchmark of lmms-eval on a model with a pruner inside; a killed run continues where it was.

The harness asks, scores and writes its result file; this names the model's arguments, checks them and the files
before anything heavy starts, and gives every run a folder of its own. EVAL.md tells what each benchmark needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from llava.eval.benchmarks import HARNESS_TASKS, OUTPUT_ROOT, run_tag
from llava.eval.lmms_eval.judge_free import JUDGE_FREE, write_judge_free_task
from llava.eval.lmms_eval.results import newest_results
from llava.eval.runner.loading import Checkpoint
from llava.eval.text import printable
from llava.mm_utils import get_model_name_from_path
from llava.pruning import Pruner, get_pruner, parse_options
from llava.serve import flags

OWN_HOST = "script_llava"
HOSTS = (OWN_HOST, "script_transformers")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.harness", description=__doc__)
    what = parser.add_argument_group("what is asked")
    what.add_argument("--benchmark", choices=sorted(HARNESS_TASKS), help="names the task, and the run's folder")
    what.add_argument("--tasks", metavar="NAMES", help="of lmms-eval, with commas; default: the benchmark's")
    what.add_argument("--include-path", type=Path, metavar="DIR", help="folder of further task files")
    what.add_argument("--output-root", type=Path, default=OUTPUT_ROOT, help="answers and results (%(default)s)")
    what.add_argument("--limit", type=flags.at_least_one, metavar="K", help="only the first K questions of each task")
    model = parser.add_argument_group("who is asked")
    model.add_argument("--model", choices=HOSTS, default=OWN_HOST, help="our own host, or Transformers' classes")
    flags.add_checkpoint(model, default=None, help="folder or hub name of the checkpoint")
    flags.add_template(model)
    flags.add_method(model)
    flags.add_image_grid(model)
    model.add_argument("--seed", type=int, default=0, help="of random methods; another seed is another run")
    flags.add_device(model)
    flags.add_dtype(model)
    model.add_argument(
        "--model-args", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="further model arguments"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--batch-size", type=int, default=1, help="questions at once (%(default)s)")
    how.add_argument("--processes", type=int, help="default: one per visible GPU, or 1")
    how.add_argument("--tag", help="name of the run; default: vtn_<tokens per picture or frame>")
    how.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="at a visual that cannot be read")
    how.add_argument("harness", nargs="*", metavar="-- OPTION", help="further options of python -m lmms_eval")
    return parser.parse_args(arguments)


def require_harness() -> None:
    """Raise ImportError, saying how to install it, where lmms-eval is missing."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise ImportError(
            'lmms-eval is not installed: pip install "script-llava[lmms-eval]" (EVAL.md, section Through lmms-eval, '
            "tells how to do so without a GPU)"
        )


def pruner_options(options: argparse.Namespace) -> list[str]:
    """``--pruner-args``, with the seed of a random method."""
    given = list(options.pruner_args)
    seeded = hasattr(get_pruner(options.pruner, **parse_options(options.pruner, given)), "seed")
    if seeded and options.seed and not any(text.startswith("seed=") for text in given):
        given.append(f"seed={options.seed}")
    return given


def check_model(options: argparse.Namespace) -> tuple[Pruner | None, bool]:
    """The pruner asked for (``None`` for "full"), and whether the checkpoint cuts pictures into tiles.

    Raises:
        ValueError, OSError: options or files that do not fit; before anything is loaded.
    """
    pruner = flags.make_pruner(options.pruner, options.keep_tokens, pruner_options(options))
    if options.model != OWN_HOST:
        if options.conv_mode is not None:
            raise ValueError(f"--conv-mode goes with {OWN_HOST}; {options.model} has its checkpoint's chat template")
        if options.image_grid is not None:
            raise ValueError(f"--image-grid goes with {OWN_HOST}; {options.model} takes --model-args picture_size=WxH")
        return pruner, False
    grid = flags.parse_grid(options.image_grid) if options.image_grid else None
    config = Checkpoint(options.model_path, _model_argument(options, "model_base"), grid=grid).check(pruner)
    return pruner, getattr(config, "image_aspect_ratio", None) == "anyres"


def _model_argument(options: argparse.Namespace, name: str) -> str | None:
    """A further model argument, if it was given; the last one counts."""
    given = dict(pair.split("=", 1) for pair in options.model_args if "=" in pair)
    return given.get(name)


class HarnessRun:
    """A run as asked for: everything checked and named, nothing started yet.

    Raises:
        ValueError, OSError, ImportError: before anything heavy.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.processes = options.processes or max(1, torch.cuda.device_count())
        if min(options.batch_size, self.processes) < 1:
            raise ValueError("--batch-size and --processes start at 1")
        if options.benchmark is None and options.tasks is None:
            raise ValueError(f"give --benchmark ({', '.join(sorted(HARNESS_TASKS))}) or --tasks")
        if options.tag is not None and Path(options.tag).name != options.tag:
            raise ValueError(f"--tag is a name, not a path; got {options.tag!r}")
        self.pruner, tiled = check_model(options)
        if options.include_path is not None and not options.include_path.is_dir():
            raise FileNotFoundError(f"there is no folder {options.include_path} of task files")
        self.tasks = options.tasks or HARNESS_TASKS[options.benchmark].task
        keep = None if self.pruner is None else self.pruner.keep_tokens
        grid = flags.parse_grid(options.image_grid) if options.image_grid else None
        tag = options.tag or run_tag(keep, tiled, options.pruner, options.pruner_args, options.seed, grid)
        if options.limit is not None and options.tag is None:
            tag += f"-first{options.limit}"
        place = options.benchmark or self.tasks.replace(",", "+")
        name = get_model_name_from_path(options.model_path)
        self.folder = options.output_root / place / "answers" / "lmms_eval" / name / f"{tag}.run"
        require_harness()

    def model_arguments(self) -> str:
        """As the harness takes them; its result file holds them, the method and the budget among them."""
        options = self.options
        given = {
            "pretrained": options.model_path,
            "pruner": options.pruner,
            "keep_tokens": options.keep_tokens if self.pruner is None else self.pruner.keep_tokens,
            "pruner_args": " ".join(pruner_options(options)),
            "conv_template": options.conv_mode,
            "image_grid": options.image_grid,
            "dtype": options.dtype,
            "on_error": options.on_error,
            "answers": str(self.folder),
        }
        pairs = [f"{name}={value}" for name, value in given.items() if value not in (None, "")]
        for pair in (*pairs, *options.model_args):
            if "," in pair:
                raise ValueError(f"the harness separates model arguments by commas: {pair!r} has one inside")
        return ",".join([*pairs, *options.model_args])

    def command(self) -> list[str]:
        options = self.options
        launcher = [sys.executable]
        if self.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
        command = [*launcher, "-m", "lmms_eval", "--model", options.model, "--model_args", self.model_arguments()]
        command += ["--tasks", self.tasks, "--batch_size", str(options.batch_size), "--device", options.device]
        command += ["--output_path", str(self.folder), "--log_samples"]
        include = options.include_path
        if include is None and JUDGE_FREE in self.tasks.split(","):
            include = write_judge_free_task(self.folder / "tasks")
        if include is not None:
            command += ["--include_path", str(include)]
        if options.limit is not None:
            command += ["--limit", str(options.limit)]
        return command + options.harness


def execute(run: HarnessRun) -> int:
    """Start the harness; 0 if it has written a result file. It ends with 0 itself when an evaluation fails."""
    command = run.command()
    before = newest_results(run.folder)
    print(shlex.join(command), flush=True)
    code = subprocess.run(command).returncode
    after = newest_results(run.folder)
    if (code == 0 and after is None) or after == before:
        print(f"error: lmms-eval has written no result file into {run.folder}; see above", file=sys.stderr)
        return code or 1
    print(f"results: {after}")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 2 with one line on standard error if the run could not begin."""
    try:
        run = HarnessRun(parse_arguments(arguments))
        run.model_arguments()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return execute(run)


if __name__ == "__main__":
    sys.exit(main())
