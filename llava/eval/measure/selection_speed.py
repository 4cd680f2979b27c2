"""What a selection costs beside the similarity product that every such method needs: time and memory, in one run."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from llava.pruning import PruningInputs, get_pruner, greedy, parse_options, reference
from llava.pruning.functional import cosine_similarity, greedy_map_rank, self_products
from llava.pruning.kernels.captured import CapturedSelection
from llava.serve import flags

JOINT_WIDTH = 768
EPSILON = 1e-6  # of the loops, by default


def make_inputs(views: int, tokens: int, width: int, dtype: torch.dtype, device: str) -> PruningInputs:
    """Smooth random features: neighbours resemble each other, as patches do, so that the graph has edges."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(views, width, 6, 6, generator=generator)
    side = int(tokens**0.5)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").flatten(2).mT
    features = smooth + 0.5 * torch.randn(views, side * side, width, generator=generator)
    return PruningInputs(
        features.to(device, dtype),
        image_embeds=torch.randn(views, side * side, JOINT_WIDTH, generator=generator).to(device),
        text_embeds=torch.randn(1, 1, JOINT_WIDTH, generator=generator).to(device),
    )


def time_rows(rows: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of every row, ``repeats`` times, the rows taken in turn so that they meet the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for repeat in tqdm(range(repeats + 2), desc="timing", leave=False):
        for name, call in rows.items():
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            if repeat >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def extra_memory(call: Callable[[], object], device: str) -> int:
    """Bytes allocated at the highest point of a call beyond those held before it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def describe_machine(device: str) -> dict[str, object]:
    """What a measurement ran on."""
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Time the full product and half of it, cosines, the greedy loop as it runs and as it reads, the whole selection.

    All loops get the selection's own relevance and graph filter.
    """
    dtype = getattr(torch, arguments.dtype)
    inputs = make_inputs(arguments.views, arguments.tokens, arguments.width, dtype, arguments.device)
    pruner = get_pruner(
        "script", **{"keep_tokens": arguments.keep_tokens, **parse_options("script", arguments.pruner_args)}
    )
    working = inputs.features.float()
    similarity = cosine_similarity(inputs.features)
    details = pruner.select(inputs).details
    given = {"relevance": details.get("relevance"), "member": details.get("kept_by_gsp")}

    def product() -> Tensor:
        return torch.bmm(working, working.mT)

    def torch_loop() -> None:
        rank = torch.zeros(similarity.shape[:2], dtype=torch.long, device=similarity.device)
        variance, relevance = similarity.diagonal(dim1=-2, dim2=-1).clone(), given["relevance"]
        if relevance is not None:
            variance *= relevance.square()
        keep, epsilon = arguments.keep_tokens, EPSILON
        greedy.place_by_map(rank, similarity, keep, variance, relevance, given["member"], epsilon, stop=epsilon)

    rows = {
        "product": product,
        "half_product": lambda: self_products(inputs.features),
        "cosine": lambda: cosine_similarity(inputs.features),
        "loop": lambda: greedy_map_rank(similarity, arguments.keep_tokens, **given),
        "torch_loop": torch_loop,
        "plain_loop": lambda: reference.greedy_map_rank(similarity, arguments.keep_tokens, **given),
        "selection": lambda: pruner.select(inputs),
    }
    if arguments.device.startswith("cuda"):
        captured = CapturedSelection(pruner, inputs)
        rows["captured"] = lambda: captured(inputs)
    seconds = time_rows(rows, arguments.repeats, arguments.device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    beside = statistics.median(s - p for s, p in zip(seconds["selection"], seconds["half_product"], strict=True))
    over = {
        name: statistics.median(own / full for own, full in zip(seconds[name], seconds["product"], strict=True))
        for name in ("half_product", "selection")
    }
    speed_up = {
        name: statistics.median(other / own for other, own in zip(seconds[name], seconds["loop"], strict=True))
        for name in ("plain_loop", "torch_loop")
    }
    matrix = 4 * arguments.tokens**2 * arguments.views
    return {
        "views": arguments.views,
        "tokens": arguments.tokens,
        "keep_tokens": arguments.keep_tokens,
        "width": arguments.width,
        "dtype": arguments.dtype,
        "milliseconds": {name: round(value * 1e3, 2) for name, value in medians.items()},
        "spread_ms": {name: [round(min(v) * 1e3, 2), round(max(v) * 1e3, 2)] for name, v in seconds.items()},
        "beside_product_ms": round(beside * 1e3, 2),
        "over_product": {name: round(ratio, 3) for name, ratio in over.items()},
        "loop_speed_up": {name: round(ratio, 2) for name, ratio in speed_up.items()},
        "extra_memory_in_matrices": round(extra_memory(rows["selection"], arguments.device) / matrix, 2),
        **describe_machine(arguments.device),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.selection_speed", description=__doc__)
    parser.add_argument("--views", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=576, help="per view, a square number")
    parser.add_argument("--keep-tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_kernels(parser)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--pruner-args", nargs="+", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        flags.use_kernels(options.kernels, options.device)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    figures = measure(options)
    names = {
        "product": "full product H H^T alone",
        "half_product": "the product as it is made",
        "cosine": "cosine similarity",
        "loop": "greedy loop",
        "torch_loop": "the same by torch alone",
        "plain_loop": "the same as a plain loop",
        "selection": "whole selection",
        "captured": "the same as a CUDA graph",
    }
    for name in figures["milliseconds"]:
        label = names[name]
        low, high = figures["spread_ms"][name]
        print(f"{label:25} {figures['milliseconds'][name]:9.2f} ms  ({low:.2f} to {high:.2f})")
    print(f"{'all but the product':25} {figures['beside_product_ms']:9.2f} ms")
    print(f"{'over the full product':25} {figures['over_product']['half_product']:9.3f} the product as it is made, "
          f"{figures['over_product']['selection']:.3f} the whole selection")  # fmt: skip
    print(f"{'greedy loop against plain':25} {figures['loop_speed_up']['plain_loop']:9.2f} times as fast, "
          f"{figures['loop_speed_up']['torch_loop']:.2f} against torch alone")  # fmt: skip
    print(f"{'peak extra memory':25} {figures['extra_memory_in_matrices']:9.2f} n x n float32 matrices per view")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
