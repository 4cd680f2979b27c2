"""A trial of the kernels on a device: small inputs with ties, rows of zeros and too few directions, computed twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llava.pruning import functional, kernels

CLOSE = 1e-4  # of scores, which the two sides add up in different orders


def disagreement(device: torch.device) -> str | None:
    """What is wrong with the kernels on a device, by the first function that fails; ``None`` if all agree.

    Ranks and indices must be equal, scores close. Takes milliseconds once the kernels are compiled.
    """
    name = "the first product"
    try:
        with torch.no_grad(), functional.without_autocast():
            for name, compute in computations(device).items():
                with kernels.forced(False):
                    expected = compute()
                with kernels.forced(True):
                    found = compute()
                if not agree(found, expected):
                    return f"{name} differs from what PyTorch computes"
    except Exception as error:  # no compiler, an unknown GPU, a broken Triton: whatever it is, PyTorch can do it
        lines = str(error).strip().splitlines() or [""]
        return f"{name} raises {type(error).__name__}: {lines[0]}"
    return None


def agree(found: Tensor, expected: Tensor) -> bool:
    if expected.is_floating_point():
        return torch.allclose(found, expected, rtol=CLOSE, atol=CLOSE)
    return torch.equal(found, expected)


def computations(device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Every function of `functional` that has a kernel, on given inputs."""
    from llava.pruning.kernels.greedy import ONE_LAUNCH  # imports triton

    rows, relevance, valid = (value.to(device) for value in inputs(2, 33))
    long_rows, long_relevance, _ = (value.to(device) for value in inputs(1, ONE_LAUNCH + 1))
    with kernels.forced(False):
        similarity, long = functional.cosine_similarity(rows), functional.cosine_similarity(long_rows)
        rank = functional.stable_rank(relevance)
    map_rank = partial(functional.greedy_map_rank, stop=1e-2)  # the rank of a view is 6: no rounding reaches this
    unprojected, max_min = functional.unprojected_rank, functional.max_min_rank

    def graph(name: str) -> Tensor:
        return torch.cat([x.flatten() for x in functional.redundancy_graph(
            None, similarity=similarity, graph=name, valid=valid)])  # fmt: skip

    return {
        "cosine_similarity": lambda: functional.cosine_similarity(rows),
        "stable_rank": lambda: functional.stable_rank(relevance, descending=True),
        "lowest_ranked": lambda: functional.lowest_ranked(rank, 9, valid),
        "min_max": lambda: functional.min_max(relevance, valid),
        "relevance_scores": lambda: functional.relevance_scores(rows, rows[:, 1:4], valid[:, 1:4]),
        "redundancy_graph, bipartite": lambda: graph("bipartite"),
        "redundancy_graph, exhaustive": lambda: graph("exhaustive"),
        "greedy_map_rank": lambda: map_rank(similarity, 12, relevance=relevance, member=valid),
        "greedy_map_rank of a long view": lambda: map_rank(long, 8, relevance=long_relevance),
        "max_min_rank": lambda: max_min(1 - similarity, 9, valid),
        "max_min_rank of a long view": lambda: max_min(1 - long, 4),
        "unprojected_rank": lambda: unprojected(similarity, 9, relevance, valid),
        "unprojected_rank of a long view": lambda: unprojected(long, 4, long_relevance),
    }


def inputs(views: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (B, n, 16) of rank 6 with copies and zeros, relevance (B, n) with ties, and a mask (B, n)."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(views, n, 16, generator=generator)
    rows[:, :, 6:] = 0
    relevance = torch.randint(1, 65, (views, n), generator=generator) / 64
    rows[:, 7::3], relevance[:, 7::3] = rows[:, 5:6], relevance[:, 5:6]  # copies of one token
    rows[:, ::8] = 0
    valid = torch.rand(views, n, generator=generator) < 0.7
    return rows, relevance, valid
