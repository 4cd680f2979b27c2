"""How the greedy order of a long clip's tokens grows with the tokens kept, as it runs and as a plain loop, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log

import torch
from torch import Tensor
from tqdm import tqdm

from llava.eval.measure.selection_speed import synchronise
from llava.pruning import reference
from llava.pruning.blocks import map_rank_by_rows

FRAME = 169  # tokens
MEMBERS = 0.5  # share of the tokens that a graph filter leaves
Case = tuple[Tensor, Tensor, Tensor | None]  # features (1, n, d), relevance (1, n), member (1, n) or None


def clips(tokens: int, width: int, dtype: torch.dtype, device: str) -> dict[str, Case]:
    """Random tokens, random tokens of which half may be kept, and frames that are nearly the same."""
    generator = torch.Generator().manual_seed(0)
    apart = torch.randn(1, tokens, width, generator=generator)
    frame = torch.randn(FRAME, width, generator=generator)
    alike = frame.repeat(-(-tokens // FRAME), 1)[:tokens] + 0.05 * torch.randn(tokens, width, generator=generator)
    relevance = torch.rand(1, tokens, generator=generator).to(device)
    member = (torch.rand(1, tokens, generator=generator) < MEMBERS).to(device)
    apart, alike = apart.to(device, dtype), alike[None].to(device, dtype)
    return {
        "random tokens": (apart, relevance, None),
        "random tokens, half of them may be kept": (apart, relevance, member),
        "frames nearly the same": (alike, relevance, None),
    }


def best_of(rows: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Seconds of every row at its fastest, the rows taken in turn: a run takes seconds and meets the whole machine."""
    seconds = dict.fromkeys(rows, float("inf"))
    for _ in tqdm(range(repeats), desc="timing a clip", leave=False, disable=None):
        for name, call in rows.items():
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def measure_clip(case: Case, keep: Sequence[int], repeats: int, device: str) -> dict[str, object]:
    """Seconds of both at every number of kept tokens, exponents of time in it, and whether the tokens are the same."""
    features, relevance, member = case
    points = []
    for k in keep:
        ranks: dict[str, Tensor] = {}

        def plain(k: int = k, ranks: dict = ranks) -> None:
            own = None if member is None else member[0]
            ranks["plain_loop"] = reference.map_rank_by_rows(features[0], k, relevance[0], own, None, 1e-6)

        def screened(k: int = k, ranks: dict = ranks) -> None:
            ranks["loop"] = map_rank_by_rows(features, k, relevance=relevance, member=member)[0]

        seconds = best_of({"plain_loop": plain, "loop": screened}, repeats, device)
        orders = [rank.argsort()[:k] for rank in ranks.values()]
        same = float((orders[0] == orders[1]).float().mean())
        points.append({"k": k} | {name: round(value, 3) for name, value in seconds.items()} | {"same_place": same})
    exponents = {
        name: round(log(points[-1][name] / points[0][name]) / log(keep[-1] / keep[0]), 2)
        for name in ("plain_loop", "loop")
    }
    return {"points": points, "exponents": exponents}


def clip_table(name: str, tokens: int, width: int, found: dict[str, object]) -> str:
    head = ["k", "plain loop", "greedy loop", "plain / greedy", "same place"]
    lines = [f"a clip of {tokens} tokens of width {width}, {name}: seconds for the first k"]
    lines.append("  ".join(f"{cell:>15}" for cell in head))
    for point in found["points"]:
        cells = [point["k"], point["plain_loop"], point["loop"], f"{point['plain_loop'] / point['loop']:.2f}"]
        lines.append("  ".join(f"{cell:>15}" for cell in [*cells, f"{point['same_place']:.2%}"]))
    lines.append("  ".join(f"{cell:>15}" for cell in ("exponent", *found["exponents"].values())))
    return "\n".join(lines)


def check_keep(keep: Sequence[int], tokens: int) -> None:
    """Raise ValueError unless there are two rising counts or more, within the clip."""
    if len(keep) < 2 or any(one >= other for one, other in pairwise(keep)) or not 1 <= keep[0] <= keep[-1] <= tokens:
        raise ValueError(f"--clip-keep must be two or more rising counts from 1 to {tokens}, got {list(keep)}")
