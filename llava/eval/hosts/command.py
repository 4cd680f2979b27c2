"""Every image-text class of the installed Transformers, sorted: works, is refused, or cannot be built here."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import multiprocessing
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from llava.eval.hosts.checks import Outcome, check_class, class_called
from llava.eval.hosts.table import put_between_marks, summary
from llava.eval.measure.how_made import LIBRARIES, how_made

TIME_LIMIT = 120  # seconds for one class
OURS = {"llavaonevision1_5": "LLaVAOneVision1_5_ForConditionalGeneration"}  # of the library's kind, and not in it


def image_text_classes() -> dict[str, str]:
    """Model type -> class, of all that the installed Transformers lists for pictures and text, and of ours."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    return {model_type: name if isinstance(name, str) else name[0] for model_type, name in NAMES.items()} | OURS


def chosen(names: Sequence[str] | None) -> dict[str, str]:
    """The classes of these names or model types; all of them for ``None``. Raises ValueError for an unknown one."""
    everything = image_text_classes()
    if names is None:
        return everything
    unknown = sorted(set(names) - everything.keys() - set(everything.values()))
    if unknown:
        raise ValueError(
            f"no image-text class of the installed Transformers is called {', '.join(unknown)}; "
            f"there are {', '.join(sorted(set(everything.values())))}"
        )
    return {model_type: name for model_type, name in everything.items() if {model_type, name} & set(names)}


def check_within(model_type: str, name: str, limit: float = TIME_LIMIT) -> Outcome:
    """`check_class` in a process of its own, which may crash or hang."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_check_and_send, args=(model_type, name, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(limit):
            return receiver.recv()
        return Outcome(model_type, name, "broken", f"no answer within {limit:g} seconds")
    except EOFError:
        process.join()
        return Outcome(model_type, name, "broken", f"its process died with exit status {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _check_and_send(model_type: str, name: str, sender: Connection) -> None:
    from transformers.utils import logging as library

    torch.set_num_threads(1)
    library.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sender.send(check_class(model_type, name))


def check_all(classes: dict[str, str], limit: float) -> Iterable[Outcome]:
    """The outcome of each class, as it comes."""
    for name in set(classes.values()):  # once, before the processes part
        class_called(name)
    for number, (model_type, name) in enumerate(classes.items(), 1):
        outcome = check_within(model_type, name, limit)
        reason = f": {outcome.reason}" if outcome.reason else ""
        print(f"[{number}/{len(classes)}] {model_type} ({name}) {outcome.status}{reason}", file=sys.stderr, flush=True)
        yield outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if every class works, is refused or cannot be built; 1 if one attaches and breaks."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m llava.eval.hosts", description=__doc__)
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="class names or model types; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome there")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table between the marks of this page")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, metavar="SECONDS", help="for one class")
    options = parser.parse_args(arguments)
    if options.write is not None and options.classes is not None:
        parser.error("--write is for the table of all classes: leave --classes out")
    try:
        classes = chosen(options.classes)
    except ValueError as error:
        parser.error(str(error))
    towers = ["timm"] if importlib.util.find_spec("timm") else []  # some classes take theirs from there
    made = how_made("python -m llava.eval.hosts", arguments, [*LIBRARIES, *towers])
    if options.write is not None:
        try:
            put_between_marks(options.write, [], made)  # its marks, before the work starts
        except (OSError, ValueError) as error:
            parser.error(str(error))
    outcomes = list(check_all(classes, options.time_limit))
    if options.json is not None:
        content = {"made": made, "classes": [asdict(outcome) for outcome in outcomes]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.write is not None:
        put_between_marks(options.write, outcomes, made)
    print(summary(outcomes))
    return 1 if any(outcome.status == "broken" for outcome in outcomes) else 0
