"""Where the time goes: every method beside the unpruned model and beside the limit, all measured in one run.

    python -m llava.eval.efficiency --preset llava-v1.6-vicuna-7b --keep-tokens 128 64 32     (on a GPU)
    python -m llava.eval.efficiency --preset mid --keep-tokens 64                             (minutes on a laptop)
    python -m llava.eval.efficiency --preset llava-v1.6-vicuna-7b --counts-only               (work and cache alone)

The *limit* is the same pipeline in which the choice of tokens is given and costs nothing: the vision tower sees the
whole picture, the language model gets as many tokens. A method that reaches 95 % of it spends 5 % of the time to the
first token on choosing. *Resized* is the unpruned model on a smaller picture, at the sizes that its own processor
offers (Gemma 4, counts only). Weights are random unless ``--model-path`` names a checkpoint. Last line: one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from llava.eval.measure.efficiency_subject import STAGES, Row, Subject
from llava.eval.measure.efficiency_table import plot, print_table
from llava.eval.measure.efficiency_transformers import TransformersSubject, build_random_transformers
from llava.eval.measure.geometry import GEOMETRIES, build_random
from llava.eval.measure.transformers_counts import TransformersCounts
from llava.eval.measure.transformers_presets import TRANSFORMERS_PRESETS
from llava.layout.visuals import Reading
from llava.mm_utils import view_side
from llava.model.builder import DEFAULT_CHECKPOINT, load_pretrained_model, pick_device
from llava.pruning import Method, get_pruner, list_pruners, parse_budget, parse_options
from llava.serve import flags

AnySubject = Subject | TransformersSubject | TransformersCounts
DTYPES = ("float32", "float16", "bfloat16")
PRESETS = ("toy", *GEOMETRIES, *TRANSFORMERS_PRESETS)


def make_rows(pruners: Sequence[str], budgets: Sequence[int], tokens: int) -> list[Row]:
    """The unpruned model, then for each budget the limit and every method. Raises ValueError for an unknown method."""
    rows = [Row("unpruned", None)]
    for keep in budgets:
        if not 1 <= keep < tokens:
            raise ValueError(f"--keep-tokens must lie between 1 and {tokens - 1} per view, got {keep}")
        rows.append(Row("limit", keep))
        rows += [Row(text, keep, method_of(text, keep)) for text in pruners]
    return rows


def method_of(text: str, keep: int) -> Method:
    """The method that "script" or "script:relevance=language,tau=0.6" names. Raises ValueError."""
    name, _, options = text.partition(":")
    return get_pruner(name, **{"keep_tokens": keep, **parse_options(name, options.split(",") if options else [])})


@contextmanager
def guarded(row: Row) -> Iterator[None]:
    """A measurement; a method that this model cannot host, or that does not fit, keeps its line and says why."""
    try:
        yield
    except torch.OutOfMemoryError:
        row.note = "out of memory"
        torch.cuda.empty_cache()
    except ValueError as error:
        row.note = str(error)


@torch.inference_mode()
def measure(subject: AnySubject, rows: list[Row], repeats: int, warm_up: int, new_tokens: int) -> int:
    """Fill the rows, taken in turn so that all meet the same machine; returns how many repeats were completed.

    Interrupted (Ctrl-C) it keeps what is complete.
    """
    completed = 0
    try:
        for row in tqdm(rows, desc="work and memory", leave=False):
            with guarded(row):
                row.pruner = subject.suited(row.pruner)
                for figures in subject.counts(row):
                    row.figures |= figures
        for repeat in range(warm_up + repeats):
            able = [row for row in rows if not row.note]
            for row in tqdm(able, desc=f"repeat {repeat + 1} of {warm_up + repeats}", leave=False):
                with guarded(row):
                    for stage, seconds in subject.times(row, new_tokens).items():
                        row.seconds[stage].append(seconds)
            if repeat == warm_up - 1:
                for row in rows:
                    row.seconds = {stage: [] for stage in STAGES}
            completed = repeat + 1 - warm_up
    except KeyboardInterrupt:
        print(f"interrupted after {max(completed, 0)} of {repeats} repeats", file=sys.stderr)
        for row in rows:
            row.seconds = {stage: values[: max(completed, 0)] for stage, values in row.seconds.items()}
    return completed


def summary_of(row: Row, limit: Row | None, unpruned: Row) -> dict[str, Any]:
    """A row as the JSON line holds it: medians and spreads in milliseconds, and its shares."""
    found = {"method": row.name, "keep_tokens": row.keep, **row.figures, "note": row.note}
    timed = {stage: values for stage, values in row.seconds.items() if values}
    found["milliseconds"] = {stage: round(statistics.median(v) * 1e3, 3) for stage, v in timed.items()}
    found["spread_ms"] = {stage: [round(min(v) * 1e3, 3), round(max(v) * 1e3, 3)] for stage, v in timed.items()}

    def over(other: Row, stage: str) -> float:
        """How long this row takes as a share of another: the median over repeats of ratios within a repeat."""
        pairs = zip(row.seconds[stage], other.seconds[stage], strict=True)
        return statistics.median(own / others for own, others in pairs)

    if "first token" in timed and not row.note:
        if limit is not None and limit.seconds["first token"]:
            found["share_of_limit"] = round(1 / over(limit, "first token"), 4)
        if unpruned.seconds["first token"]:
            found["faster_first_token"] = round(1 / over(unpruned, "first token"), 3)
            found["faster_prefill"] = round(1 / over(unpruned, "prefill"), 3)
            if found["faster_first_token"] < 0.98:
                grown = {stage: over(unpruned, stage) for stage in ("vision", "prefill")}
                grown["selection"] = 1 + found["milliseconds"]["selection"] / found["milliseconds"]["first token"]
                worst = max(grown, key=grown.get)
                found["note"] = f"slower than unpruned: {worst} {found['milliseconds'][worst]:.1f} ms"
    return found


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.efficiency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="toy", help="geometry; all but the toy with random weights"
    )
    parser.add_argument("--model-path", help="measure a checkpoint instead of a preset")
    parser.add_argument("--keep-tokens", nargs="+", default=["64"], metavar="N", help="budgets per view (64)")
    parser.add_argument(
        "--pruners", nargs="+", default=list_pruners(), metavar="NAME[:KEY=VALUE,...]", help="methods (all)"
    )
    parser.add_argument("--batch-sizes", nargs="+", type=flags.at_least_one, default=[1], metavar="B")
    parser.add_argument(
        "--new-tokens", type=flags.at_least_one, default=16, help="tokens per answer, for the decode column"
    )
    parser.add_argument("--repeats", type=flags.at_least_one, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="repeats that do not count")
    parser.add_argument(
        "--counts-only", action="store_true", help="no times: work and cache, of any size on any machine"
    )
    flags.add_device(parser)
    flags.add_kernels(parser)
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bfloat16, on a CPU float32")
    flags.add_attention(parser)
    flags.add_image_grid(parser)
    parser.add_argument("--compile-tower", action="store_true", help="put the vision tower through torch.compile")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw where the time goes (.svg, .png, .pdf)")
    return parser.parse_args(arguments)


def load_subjects(options: argparse.Namespace) -> Iterator[AnySubject]:
    """The model, with each batch size in turn. With a fixed grid the picture asked about has its size."""
    half = options.counts_only or options.device.startswith("cuda")
    dtype = getattr(torch, ("bfloat16" if half else "float32") if options.dtype == "auto" else options.dtype)
    loaded = {"dtype": dtype, "device": options.device, "attn_implementation": options.attn_implementation}
    if options.model_path is None and options.preset in TRANSFORMERS_PRESETS:
        if options.compile_tower or options.image_grid:
            raise ValueError(f"{options.preset} is a model of Transformers: no --compile-tower, no --image-grid")
        if options.counts_only:
            loaded["device"] = "meta"
        built = build_random_transformers(TRANSFORMERS_PRESETS[options.preset], **loaded)
        if options.counts_only:
            yield TransformersCounts(built)
            return
        yield from (TransformersSubject(built, batch, options.device) for batch in options.batch_sizes)
        return
    if options.model_path or options.preset == "toy":
        _, model, image_processor, _ = load_pretrained_model(options.model_path or DEFAULT_CHECKPOINT, **loaded)
        size, frames = (
            (672, 672) if getattr(model.config, "image_aspect_ratio", None) == "anyres" else (336, 336),
            None,
        )
    else:
        geometry = GEOMETRIES[options.preset]
        decoder = "meta" if options.counts_only else None
        model, image_processor = build_random(geometry, **loaded, decoder_device=decoder)
        size, frames = geometry.picture, geometry.frames
    reading = Reading.of(model.config)
    if options.image_grid:
        size = tuple(flags.parse_grid(options.image_grid))
        if frames is not None:
            raise ValueError(f"--image-grid is for pictures; {options.preset} is measured on a video")
        reading = reading.with_grid(size, view_side(image_processor))
    if options.compile_tower:
        model.get_vision_tower().compile_layers()
    for batch in [1] if options.counts_only else options.batch_sizes:
        yield Subject(model, image_processor, size, batch, options.device, frames, reading)


def measure_all(options: argparse.Namespace, show: bool = True) -> dict[str, Any]:
    """All rows at all batch sizes, as the JSON line holds them.

    Args:
        show: print a table for each batch size.

    Raises:
        ValueError, OSError: options, a method or a checkpoint that do not fit; the first before anything is loaded.
    """
    options.device = pick_device(options.device)
    flags.use_kernels(options.kernels, options.device)
    budgets = [parse_budget(text) for text in options.keep_tokens]
    if any(isinstance(budget, float) for budget in budgets):
        raise ValueError("--keep-tokens takes counts here, not shares")
    make_rows(options.pruners, budgets, sys.maxsize)  # names and counts, before anything is loaded
    batches = []
    for subject in load_subjects(options):
        rows = make_rows(options.pruners, budgets, subject.tokens_per_view)
        rows[1:1] = [Row("resized", tokens) for tokens in subject.own_sizes]
        repeats = 0 if options.counts_only else options.repeats
        warm_up = 0 if options.counts_only else options.warm_up
        completed = measure(subject, rows, repeats, warm_up, options.new_tokens)
        limits = {row.keep: row for row in rows if row.name == "limit"}
        found = [summary_of(row, limits.get(row.keep), rows[0]) for row in rows]
        batches.append({"batch": subject.batch, "repeats": completed, "rows": found})
        if show:
            print_table(found, options.preset if options.model_path is None else None, subject.batch)
    weights = sum(parameter.nbytes for parameter in subject.model.parameters())
    return {
        "preset": options.model_path or options.preset,
        **({"image_grid": options.image_grid} if options.image_grid else {}),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(subject.dtype).removeprefix("torch."),
        "weight_bytes": weights,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "batches": batches,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        found = measure_all(options)
        if options.plot:
            plot(found["batches"][0]["rows"], options.plot)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
