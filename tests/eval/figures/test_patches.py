"""The figures' mathematics: by hand, by a second way, and where a claim is known to be false."""

import itertools
import math

import pytest
import torch

from llava.eval.figures import patches
from llava.pruning.reference import greedy_map_rank


def grid_of(rows, columns, width=5, seed=0):
    return torch.randn(rows, columns, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def view():
    shows = torch.ones(5, 4, dtype=torch.bool)
    shows[0] = False  # padding
    return grid_of(5, 4), shows


def test_cosines_by_distance(view):
    grid, shows = view
    total, count = patches.profile(grid, shows)
    sums, pairs = {}, {}
    places = [tuple(place) for place in shows.nonzero().tolist()]
    for a, b in itertools.combinations(places, 2):
        distance = abs(a[0] - b[0]) + abs(a[1] - b[1])
        sums[distance] = sums.get(distance, 0.0) + float(torch.cosine_similarity(grid[a], grid[b], dim=0))
        pairs[distance] = pairs.get(distance, 0) + 1
    assert {d: int(n) for d, n in enumerate(count) if n} == pairs
    for distance, value in sums.items():
        assert float(total[distance]) == pytest.approx(value, abs=1e-5)


def test_near_and_far_pairs_are_equally_many(view):
    near, far = patches.near_and_far(*view, torch.Generator().manual_seed(0))
    assert len(near) == len(far) == 4 * 3 + 3 * 4  # of the four rows that show something


def test_neighbours_at_borders_and_beside_padding(view):
    grid, shows = view
    found = patches.neighbour_cosine(grid, shows)
    assert bool(found[0].isnan().all())
    around = [(1, 1), (2, 0), (2, 1)]  # of the corner below the padding
    expected = sum(float(torch.cosine_similarity(grid[1, 0], grid[place], dim=0)) for place in around) / 3
    assert float(found[1, 0]) == pytest.approx(expected, abs=1e-6)


def test_projections_are_those_of_a_principal_component(view):
    grid, shows = view
    projections, there = patches.neighbourhood_projections(grid, shows, "square")
    for place in ((2, 1), (1, 0), (4, 3)):
        y, x = place
        inside = [
            grid[y + dy, x + dx]
            for dy, dx in patches.NEIGHBOURHOODS["square"]
            if 0 <= y + dy < 5 and 0 <= x + dx < 4 and shows[y + dy, x + dx]
        ]
        vectors = torch.stack(inside)
        centred = vectors - vectors.mean(0)
        expected = centred @ torch.linalg.svd(centred).Vh[0]
        own = projections[y, x][there[y, x]]
        own = own if own @ expected > 0 else -own
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=0)


def test_entropy():
    grid, shows = grid_of(6, 6), torch.ones(6, 6, dtype=torch.bool)
    found = patches.entropy_map(grid, shows)
    assert float(found.max()) <= math.log(9) + 1e-4
    assert float(found.min()) > 0
    flat = patches.entropy_map(torch.ones(6, 6, 3), shows)
    assert float(flat.abs().max()) < 1e-5  # all in one bin
    # Bins over a neighbourhood's own range do not see how far its tokens spread; global ones do.
    quiet = grid.clone()
    quiet[:, :3] *= 1e-3
    own, across = (patches.entropy_map(quiet, shows, span=span) for span in ("own", "global"))
    torch.testing.assert_close(own[2, 1], found[2, 1], atol=1e-4, rtol=0)
    assert float(across[2, 1]) < 1e-5 < float(across[2, 4])


def test_rank_correlation_with_ties():
    scipy = pytest.importorskip("scipy.stats")
    first, second = torch.tensor([1.0, 2, 2, 5, torch.nan, 4]), torch.tensor([3.0, 1, 4, 4, 2, 0])
    expected = scipy.spearmanr([1, 2, 2, 5, 4], [3, 1, 4, 4, 0]).statistic
    assert patches.rank_correlation(first, second) == pytest.approx(expected)


def test_the_second_curve_of_figure_6_is_a_determinant():
    rho = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    _, equal = patches.bounds(rho, 5)
    for r, value in zip(rho, equal, strict=True):
        matrix = torch.full((5, 5), float(r), dtype=torch.float64).fill_diagonal_(1)
        assert float(torch.linalg.det(matrix)) == pytest.approx(float(value))
    sets = patches.random_determinants(grid_of(4, 4, 8), torch.ones(4, 4, dtype=torch.bool), 5, 7, torch.Generator())
    assert sets.shape == (7, 2)
    assert bool((sets[:, 1] <= 1).all())
    with pytest.raises(ValueError, match="sets of 5 tokens"):
        patches.random_determinants(grid_of(2, 2), torch.ones(2, 2, dtype=torch.bool), 5, 1, torch.Generator())


def test_variances_are_those_of_the_greedy_order():
    tokens = patches.unit(grid_of(1, 12, 6)[0])
    cosines, relevance = tokens @ tokens.T, torch.rand(12, generator=torch.Generator().manual_seed(1))
    found = patches.variance_at_selection(cosines, relevance, 4, epsilon=1e-12)
    rank = greedy_map_rank(cosines[None].double(), 4, relevance=relevance[None].double(), epsilon=1e-12)[0]
    kernel = (relevance[:, None] * cosines * relevance).double()
    order = rank.argsort()[:4].tolist()
    for step, token in enumerate(order):
        before, after = order[:step], order[: step + 1]
        gain = torch.linalg.det(kernel[after][:, after])
        gain = gain / torch.linalg.det(kernel[before][:, before]) if before else gain
        assert float(found[token]) == pytest.approx(float(gain), abs=1e-9)
    assert bool((found >= 0).all())


def test_the_map_set_has_not_the_least_mean_similarity():
    """Theorem 1 of the paper's appendix, refuted as docs/paper.md does."""
    for seed in range(20):
        tokens = patches.unit(torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)))
        cosines = {s: tokens[list(s)] @ tokens[list(s)].T for s in itertools.combinations(range(8), 3)}
        best = max(cosines, key=lambda s: torch.linalg.det(cosines[s]))
        assert cosines[best].sum() > min(c.sum() for c in cosines.values()) + 1e-6


def test_scaled():
    values = torch.tensor([2.0, torch.nan, 4.0])
    torch.testing.assert_close(patches.scaled(values), torch.tensor([0.0, torch.nan, 1.0]), equal_nan=True)
    assert patches.scaled(torch.ones(3)).tolist() == [0, 0, 0]
