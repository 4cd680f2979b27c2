"""Features and options on which the greedy loops must agree exactly."""

import torch

KINDS = ("iid", "one-hot", "zero", "low rank", "constant")


def rows_of(kind, views, n, seed=0, dtype=torch.float64):
    """Features whose products are exact where ranks depend on ties: one-hot rows, zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(views, n, n + 8, generator=generator, dtype=dtype)
    if kind == "one-hot":  # groups of exact duplicates, orthogonal to each other
        owner = torch.randint(0, max(n // 3, 1), (views, n), generator=generator)
        rows = torch.nn.functional.one_hot(owner, n).to(dtype)
    elif kind == "zero":
        rows[:, :: max(n // 4, 1)] = 0
    elif kind == "low rank":
        rows[:, :, max(n // 3, 1) :] = 0
    elif kind == "constant":
        rows = torch.zeros(views, n, 4, dtype=dtype)
        rows[..., 0] = 1
    return rows


def options_of(views, n, seed, names):
    generator = torch.Generator().manual_seed(seed + 1)
    relevance = torch.randint(0, 65, (views, n), generator=generator).double() / 64  # squares are exact, some equal
    masks = {name: torch.rand(views, n, generator=generator) < 0.6 for name in ("member", "candidates")}
    return {name: value for name, value in {"relevance": relevance, **masks}.items() if name in names}
