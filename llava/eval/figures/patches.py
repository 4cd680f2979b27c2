"""What the paper's figures measure on the tokens of a view: pure functions on a grid of rows x columns tokens.

``grid`` is (r, c, d), ``shows`` (r, c) bool, False at tokens that show only padding: they take no part.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 20  # of Eq. 2
NEIGHBOURHOODS = {
    "square": [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)],
    "cross": [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)],
}


def unit(grid: Tensor) -> Tensor:
    """Tokens of length 1, float32."""
    return torch.nn.functional.normalize(grid.float(), dim=-1)


def cosines_and_hops(grid: Tensor, shows: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and Manhattan distance of every pair of tokens, each pair once: (pairs,) twice."""
    rows, columns = shows.nonzero(as_tuple=True)
    tokens = unit(grid)[rows, columns]
    first, second = torch.triu_indices(len(tokens), len(tokens), 1)
    hops = (rows[first] - rows[second]).abs() + (columns[first] - columns[second]).abs()
    return (tokens @ tokens.T)[first, second], hops


def profile(grid: Tensor, shows: Tensor) -> tuple[Tensor, Tensor]:
    """Figure 3a: sum of the cosines at each Manhattan distance D, and number of pairs; (r + c - 1,) each, D from 0."""
    cosines, hops = cosines_and_hops(grid, shows)
    length = sum(grid.shape[:2]) - 1
    return torch.bincount(hops, cosines.double(), length), torch.bincount(hops, minlength=length)


def near_and_far(grid: Tensor, shows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Figure 3b: cosines of all pairs at distance 1, and of as many random pairs that lie farther apart."""
    cosines, hops = cosines_and_hops(grid, shows)
    near, far = cosines[hops == 1], cosines[hops > 1]
    return near, far[torch.randperm(len(far), generator=generator)[: len(near)]]


def _shifted(grid: Tensor, shows: Tensor, offset: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The neighbour of every token at an offset (rows, columns), and whether there is one."""
    (r, c), (y, x) = shows.shape, offset
    there = torch.zeros_like(shows)
    moved = torch.zeros_like(grid)
    to = slice(max(0, -y), min(r, r - y)), slice(max(0, -x), min(c, c - x))
    come = slice(max(0, y), min(r, r + y)), slice(max(0, x), min(c, c + x))
    moved[to], there[to] = grid[come], shows[come]
    return moved, there & shows


def neighbour_cosine(grid: Tensor, shows: Tensor) -> Tensor:
    """Figures 3c and 9: mean cosine of every token with its 8 neighbours that exist; (r, c), NaN without any."""
    tokens = unit(grid)
    total, count = torch.zeros(shows.shape), torch.zeros(shows.shape)
    for offset in NEIGHBOURHOODS["square"]:
        if offset != (0, 0):
            moved, there = _shifted(tokens, shows, offset)
            total += torch.where(there, (tokens * moved).sum(-1), 0.0)
            count += there
    return torch.where(count > 0, total / count.clamp_min(1), torch.nan)


def neighbourhood_projections(grid: Tensor, shows: Tensor, neighbourhood: str) -> tuple[Tensor, Tensor]:
    """Every token's neighbourhood on its first principal component: (r, c, k), and which of the k exist.

    By the centred Gram matrix G of the k vectors: its first eigenvector times the root of its eigenvalue.
    """
    parts = [_shifted(grid.float(), shows, offset) for offset in NEIGHBOURHOODS[neighbourhood]]
    vectors = torch.stack([part for part, _ in parts], dim=2)  # (r, c, k, d)
    there = torch.stack([exists for _, exists in parts], dim=2)
    weight = there.float()[..., None]
    mean = (vectors * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp_min(1)
    centred = (vectors - mean) * weight
    values, directions = torch.linalg.eigh(centred @ centred.mT)
    return directions[..., -1] * values[..., -1:].clamp_min(0).sqrt(), there


def entropy_map(grid: Tensor, shows: Tensor, neighbourhood: str = "square", span: str = "own") -> Tensor:
    """Figure 3d, Eq. 2: H = - sum p ln p over 20 bins of equal width, p = share + 1e-8; (r, c), NaN at padding.

    Args:
        neighbourhood: "square", the 3 x 3 tokens around and the token itself, or "cross", those at L1 distance <= 1.
        span: of the bins. "own": each neighbourhood's own range, which makes H blind to how far its tokens spread;
            "global": the largest range of the view, laid around each neighbourhood's middle.
    """
    projections, there = neighbourhood_projections(grid, shows, neighbourhood)
    low = projections.masked_fill(~there, torch.inf).amin(-1, keepdim=True)
    high = projections.masked_fill(~there, -torch.inf).amax(-1, keepdim=True)
    width = (high - low).masked_fill(~shows[..., None], 0)
    if span == "global":
        middle = (low + high) / 2
        width = width.amax().expand_as(width)
        low = middle - width * (1 + 1 / BINS) / 2  # the middle lies inside a bin, not between two
    place = ((projections - low) / width.clamp_min(1e-12) * BINS).nan_to_num().floor().clamp(0, BINS - 1).long()
    counts = torch.zeros(*shows.shape, BINS).scatter_add_(2, place, there.float())
    p = counts / counts.sum(-1, keepdim=True).clamp_min(1) + 1e-8
    return torch.where(shows, -(p * p.log()).sum(-1), torch.nan)


def ranks(values: Tensor) -> Tensor:
    """Ranks (n,) of values (n,), equal ones at the mean of their places; float64."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return ((last - counts + last - 1) / 2)[inverse]


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's correlation of two maps over the places where both have a number; NaN where one is constant."""
    both = ~(first.isnan() | second.isnan())
    a, b = (ranks(values[both]) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def bounds(rho: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Figure 6: (1 + rho)^(k-1), and (1 + (k-1) rho)(1 - rho)^(k-1), the determinant where all k cosines are rho."""
    return (1 + rho) ** (k - 1), (1 + (k - 1) * rho) * (1 - rho) ** (k - 1)


def random_determinants(grid: Tensor, shows: Tensor, k: int, sets: int, generator: torch.Generator) -> Tensor:
    """Random sets of k tokens: mean cosine and determinant of their matrix of cosines, (sets, 2).

    Raises:
        ValueError: fewer than k tokens.
    """
    tokens = unit(grid)[shows]
    if len(tokens) < k:
        raise ValueError(f"sets of {k} tokens cannot be drawn from {len(tokens)}")
    chosen = torch.stack([torch.randperm(len(tokens), generator=generator)[:k] for _ in range(sets)])
    cosines = (tokens[chosen] @ tokens[chosen].mT).double()
    mean = (cosines.sum((-1, -2)) - k) / (k * (k - 1))
    return torch.stack([mean, torch.linalg.det(cosines)], dim=-1)


def farthest_cosine(grid: Tensor, shows: Tensor) -> Tensor:
    """Figure 5's divergence: 1 - the largest cosine with another token, DivPrune's first score; (r, c)."""
    tokens = unit(grid)[shows]
    cosines = (tokens @ tokens.T).fill_diagonal_(-1)
    found = torch.full(shows.shape, torch.nan)
    found[shows] = 1 - cosines.amax(-1)
    return found


def variance_at_selection(cosines: Tensor, relevance: Tensor, keep: int, epsilon: float = 1e-6) -> Tensor:
    """Figure 5's QCSP: each token's conditional variance when it was chosen, or after ``keep`` choices if it was not.

    Greedy MAP of L = diag(r) S diag(r) (Eq. 11) over all tokens, cosines (n, n) and relevance (n,); (n,) float64.
    """
    kernel = (relevance[:, None] * cosines * relevance).double()
    variance, found = kernel.diagonal().clone(), torch.full((len(kernel),), torch.nan, dtype=torch.float64)
    basis = kernel.new_zeros(0, len(kernel))
    for _ in range(min(keep, len(kernel))):
        j = int(variance.masked_fill(~found.isnan(), -torch.inf).argmax())
        if variance[j] <= epsilon:
            break
        row = (kernel[j] - basis[:, j] @ basis) / (variance[j] + epsilon).sqrt()
        found[j] = variance[j]
        basis = torch.cat([basis, row[None]])
        variance = variance - row.square()
    return torch.where(found.isnan(), variance.clamp_min(0), found)


def scaled(values: Tensor) -> Tensor:
    """A map between 0 and 1; 0 where it is constant; NaN stays."""
    real = values[~values.isnan()]
    low, high = (real.min(), real.max()) if len(real) else (0.0, 0.0)
    return (values - low) / max(float(high - low), 1e-12)
