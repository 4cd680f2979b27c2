"""Where the time goes: every method beside the unpruned model and beside the limit, all measured in one run.

    python -m llava.eval.efficiency --preset llava-v1.6-vicuna-7b --keep-tokens 128 64 32     (on a GPU)
    python -m llava.eval.efficiency --preset mid --keep-tokens 64                             (minutes on a laptop)
    python -m llava.eval.efficiency --preset llava-v1.6-vicuna-7b --counts-only               (work and cache alone)

The *limit* is the same pipeline in which the choice of tokens is given and costs nothing: the vision tower sees the
whole picture, the language model gets as many tokens. A method that reaches 95 % of it spends 5 % of the time to the
first token on choosing. Weights are random unless ``--model-path`` names a checkpoint. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.cost import count_macs, prefill_flops
from llava.eval.efficiency_table import plot, print_table
from llava.eval.geometry import GEOMETRIES, build_random
from llava.eval.selection_speed import extra_memory, synchronise
from llava.mm_utils import process_images
from llava.model.builder import DEFAULT_CHECKPOINT, load_pretrained_model
from llava.model.encoded_images import EncodedImages
from llava.model.llava_arch import EmbeddedPrompts
from llava.model.questions import Questions
from llava.model.token_selection import select_tokens
from llava.pruning import Pruner, get_pruner, list_pruners, parse_budget

STAGES = ("preprocess", "vision", "text tower", "selection", "prefill", "first token", "decode")
PRESETS = ("toy", *GEOMETRIES)
QUESTION = "What color is the star?"
TEXT_BEFORE, TEXT_AFTER = 35, 20  # LLaVA's system prompt, and a question of usual length


@dataclass
class Row:
    """A line of the table: a way to give the language model its visual tokens.

    Args:
        name: of the method, "unpruned" or "limit".
        keep: tokens per view; ``None`` for all.
        pruner: ``None`` for the unpruned model and the limit.
        seconds: by stage, one entry per repeat.
        note: why a figure is missing.
    """

    name: str
    keep: int | None
    pruner: Pruner | None = None
    seconds: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    figures: dict[str, Any] = field(default_factory=dict)
    note: str = ""


class Clock(BaseStreamer):
    """Notes when `generate` hands out each token."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        synchronise(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Subject:
    """The model under measurement, with a picture and a prompt for each of ``batch`` rows.

    Every method is a stage of the pipeline on its own; `answer` is all of it as a user runs it.
    """

    def __init__(self, model: Any, image_processor: Any, size: tuple[int, int], batch: int, device: str) -> None:
        self.model, self.image_processor, self.batch, self.device = model, image_processor, batch, device
        self.dtype = next(model.parameters()).dtype
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (size[1] // 8, size[0] // 8, 3), generator=generator, dtype=torch.uint8)
        picture = Image.fromarray(noise.numpy()).resize(size, Image.BICUBIC)
        self.pictures, self.sizes = [picture] * batch, [picture.size] * batch
        text = torch.randint(3, 700, (TEXT_BEFORE + TEXT_AFTER,), generator=generator)
        ids = torch.cat([text[:TEXT_BEFORE], torch.tensor([IMAGE_TOKEN_INDEX]), text[TEXT_BEFORE:]])
        self.ids = ids.expand(batch, -1)
        self.queries = [QUESTION] * batch
        self.chosen: Tensor | None = None
        self.pixels = self.preprocess().to(device, self.dtype)

    def preprocess(self) -> Tensor:
        """Pictures -> pixels (batch, views or nothing, 3, s, s) float32."""
        return process_images(self.pictures, self.image_processor, self.model.config)

    def encode(self) -> EncodedImages:
        """Pixels -> projected features, the tower and the projector."""
        return self.model.encode_pictures(self.pixels, self.sizes)

    def read_question(self, row: Row) -> Questions:
        """The text tower, where the method asks for it."""
        return Questions(self.model, row.pruner, self.queries)

    def select(self, row: Row, encoded: EncodedImages, questions: Questions) -> list[Tensor]:
        """Features -> the kept ones in reading order, picture by picture."""
        if row.name == "limit":
            return [self.given(row, encoded)]
        kept = select_tokens(self.model, row.pruner, encoded, questions)
        return self.model.gather_tokens(encoded, kept)

    def given(self, row: Row, encoded: EncodedImages) -> Tensor:
        """The limit's tokens (batch, t, d): the first of each view, by numbers that lie on the device already."""
        views, tokens, width = encoded.features.shape
        if self.chosen is None or self.chosen.numel() != views * row.keep:
            first = torch.arange(views)[:, None] * tokens + torch.arange(row.keep)
            self.chosen = first.flatten().to(self.device)
        return encoded.features.flatten(0, 1)[self.chosen].reshape(self.batch, -1, width)

    def embed(self, row: Row, images: Tensor | EncodedImages) -> EmbeddedPrompts | Tensor:
        """The prompts with the visual tokens in their place; embeddings (batch, T, d) alone for the limit."""
        if row.name != "limit":
            asked = {"images": images, "image_sizes": self.sizes, "pruner": row.pruner, "query": self.queries}
            return self.model.embed_prompts(self.ids, **asked, padding_side="left")
        encoded = images if isinstance(images, EncodedImages) else self.encode()
        before, after = (
            self.model.get_input_embeddings()(ids.to(self.device))
            for ids in (self.ids[:, :TEXT_BEFORE], self.ids[:, TEXT_BEFORE + 1 :])
        )
        return torch.cat([before, self.given(row, encoded), after], dim=1)

    def prefill(self, prompts: EmbeddedPrompts | Tensor) -> Any:
        """One pass of the language model over the prompts: its output, with the cache."""
        pruning = None if isinstance(prompts, Tensor) else prompts.decoder_pruning(self.model.get_model())
        embeds = prompts if isinstance(prompts, Tensor) else prompts.inputs_embeds
        with nullcontext() if pruning is None else pruning.attached():
            decoder_device = self.model.lm_head.weight.device  # "meta" where operations are only counted
            return self.model(inputs_embeds=embeds.to(decoder_device), use_cache=True, logits_to_keep=1)

    def answer(self, row: Row, new_tokens: int) -> list[float]:
        """Pixels to ``new_tokens`` tokens, as a user gets them: seconds until each."""
        clock = Clock(self.device)
        synchronise(self.device)
        start = time.perf_counter()
        prompts = self.embed(row, self.pixels)
        if isinstance(prompts, Tensor):
            given = {"inputs_embeds": prompts, "attention_mask": prompts.new_ones(prompts.shape[:2], dtype=torch.long)}
        else:
            given = {"inputs": prompts}
        self.model.generate(**given, max_new_tokens=new_tokens, min_new_tokens=new_tokens, streamer=clock)
        return [moment - start for moment in clock.times[-new_tokens:]]


def measure_times(subject: Subject, row: Row, new_tokens: int) -> None:
    """Add one repeat of every stage to ``row.seconds``."""

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        synchronise(subject.device)
        start = time.perf_counter()
        yield
        synchronise(subject.device)
        row.seconds[stage].append(time.perf_counter() - start)

    with timed("preprocess"):
        subject.preprocess()
    with timed("vision"):
        encoded = subject.encode()
    with timed("text tower"):
        questions = subject.read_question(row)
    with timed("selection"):
        subject.select(row, encoded, questions)
    prompts = subject.embed(row, encoded)
    with timed("prefill"):
        output = subject.prefill(prompts)
    del output, prompts, encoded
    moments = subject.answer(row, new_tokens)
    row.seconds["first token"].append(moments[0])
    row.seconds["decode"].append((moments[-1] - moments[0]) / max(1, len(moments) - 1))


def measure_counts(subject: Subject, row: Row, encoded: EncodedImages, vision_macs: int) -> None:
    """Put into ``row.figures`` what does not depend on the clock: tokens, work, cache, and memory."""
    config = subject.model.config
    prompts = subject.embed(row, encoded)
    if isinstance(prompts, Tensor):
        per_layer = [prompts.shape[1] - TEXT_BEFORE - TEXT_AFTER] * config.num_hidden_layers
    else:
        tokens = prompts.kept[0]
        per_layer = tokens.per_layer or [len(tokens.sequence)] * config.num_hidden_layers
    value_bytes = subject.model.lm_head.weight.element_size()
    key_width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    row.figures |= {
        "visual_tokens": per_layer[-1],
        "average_tokens": statistics.fmean(per_layer),
        "formula_macs": prefill_flops(per_layer, config.hidden_size, config.intermediate_size),
        "visual_cache_bytes": 2 * sum(per_layer) * key_width * value_bytes,
    }
    cache = subject.prefill(prompts).past_key_values
    macs = vision_macs + count_macs(lambda: subject.prefill(subject.embed(row, encoded)))
    row.figures |= {
        "counted_macs": macs / subject.batch,
        "cache_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // subject.batch,
    }
    del prompts, cache
    if subject.model.lm_head.weight.device.type != "meta":
        row.figures["extra_memory_bytes"] = extra_memory(
            lambda: subject.prefill(subject.embed(row, subject.pixels)), subject.device
        )


def make_rows(pruners: Sequence[str], budgets: Sequence[int], tokens: int) -> list[Row]:
    """The unpruned model, then for each budget the limit and every method. Raises ValueError for an unknown method."""
    rows = [Row("unpruned", None)]
    for keep in budgets:
        if not 1 <= keep < tokens:
            raise ValueError(f"--keep-tokens must lie between 1 and {tokens - 1} per view, got {keep}")
        rows.append(Row("limit", keep))
        rows += [Row(name, keep, get_pruner(name, keep_tokens=keep)) for name in pruners]
    return rows


def guarded(row: Row, call: Callable[[], None]) -> None:
    """Run a measurement; a method that this model cannot host, or that does not fit, keeps its line and says why."""
    if row.note:
        return
    try:
        call()
    except torch.OutOfMemoryError:
        row.note = "out of memory"
        torch.cuda.empty_cache()
    except ValueError as error:
        row.note = str(error)


@torch.inference_mode()
def measure(subject: Subject, rows: list[Row], repeats: int, warm_up: int, new_tokens: int) -> int:
    """Fill the rows, taken in turn so that all meet the same machine; returns how many repeats were completed.

    Interrupted (Ctrl-C) it keeps what is complete.
    """
    completed = 0
    try:
        encoded = subject.encode()
        vision_macs = count_macs(subject.encode)
        for row in tqdm(rows, desc="work and memory", leave=False):
            guarded(row, lambda row=row: measure_counts(subject, row, encoded, vision_macs))
        for repeat in range(warm_up + repeats):
            for row in tqdm(rows, desc=f"repeat {repeat + 1} of {warm_up + repeats}", leave=False):
                guarded(row, lambda row=row: measure_times(subject, row, new_tokens))
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

    if "first token" in timed:
        if limit is not None and limit.seconds["first token"]:
            found["share_of_limit"] = round(1 / over(limit, "first token"), 4)
        if unpruned.seconds["first token"]:
            found["faster_first_token"] = round(1 / over(unpruned, "first token"), 3)
            found["faster_prefill"] = round(1 / over(unpruned, "prefill"), 3)
            if not row.note and found["faster_first_token"] < 0.98:
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
    parser.add_argument("--pruners", nargs="+", default=list_pruners(), metavar="NAME", help="methods (all)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1], metavar="B")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens per answer, for the decode column")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="repeats that do not count")
    parser.add_argument(
        "--counts-only", action="store_true", help="no times: work and cache, of any size on any machine"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="default: bfloat16, on a CPU float32"
    )
    parser.add_argument("--attn-implementation", help="sdpa, eager, flash_attention_2, ...")
    parser.add_argument("--compile-tower", action="store_true", help="put the vision tower through torch.compile")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw where the time goes (.svg, .png, .pdf)")
    return parser.parse_args(arguments)


def load_subjects(options: argparse.Namespace) -> Iterator[Subject]:
    """The model, with each batch size in turn."""
    half = options.counts_only or options.device.startswith("cuda")
    dtype = getattr(torch, options.dtype or ("bfloat16" if half else "float32"))
    loaded = {"dtype": dtype, "device": options.device, "attn_implementation": options.attn_implementation}
    if options.model_path or options.preset == "toy":
        _, model, image_processor, _ = load_pretrained_model(options.model_path or DEFAULT_CHECKPOINT, **loaded)
        size = (672, 672) if getattr(model.config, "image_aspect_ratio", None) == "anyres" else (336, 336)
    else:
        geometry = GEOMETRIES[options.preset]
        decoder = "meta" if options.counts_only else None
        model, image_processor = build_random(geometry, **loaded, decoder_device=decoder)
        size = geometry.picture
    if options.compile_tower:
        model.get_vision_tower().compile_layers()
    for batch in [1] if options.counts_only else options.batch_sizes:
        yield Subject(model, image_processor, size, batch, options.device)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        budgets = [parse_budget(text) for text in options.keep_tokens]
        if any(isinstance(budget, float) for budget in budgets):
            raise ValueError("--keep-tokens takes counts here, not shares")
        make_rows(options.pruners, budgets, 576)
        subjects = load_subjects(options)
        batches = []
        for subject in subjects:
            rows = make_rows(options.pruners, budgets, subject.model.get_vision_tower().num_patches)
            repeats = 0 if options.counts_only else options.repeats
            warm_up = 0 if options.counts_only else options.warm_up
            completed = measure(subject, rows, repeats, warm_up, options.new_tokens)
            limits = {row.keep: row for row in rows if row.name == "limit"}
            found = [summary_of(row, limits.get(row.keep), rows[0]) for row in rows]
            batches.append({"batch": subject.batch, "repeats": completed, "rows": found})
            print_table(found, options.preset if options.model_path is None else None, subject.batch)
        if options.plot:
            plot(batches[0]["rows"], options.plot)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({
        "preset": options.model_path or options.preset,
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(subject.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "batches": batches,
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
