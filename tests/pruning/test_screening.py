"""The greedy order of very many tokens, in rounds and with tokens that are never looked at, is the plain loop's."""

import pytest
import torch

from greedy_inputs import KINDS, options_of, rows_of
from llava.pruning import reference, screening
from llava.pruning.blocks import map_rank_by_rows
from llava.pruning.functional import cosine_similarity

NAMES = [(), ("relevance",), ("member",), ("candidates",), ("relevance", "member", "candidates")]


@pytest.fixture(params=[(256, 256, 1024), (16, 8, 20), (4, 3, 5)], ids=str)
def sizes(request, monkeypatch):
    """Blocks, pools and groups of several sizes: every number of rounds, blocks and groups that a clip may need."""
    for name, size in zip(("ROWS", "POOL", "GROUP"), request.param, strict=True):
        monkeypatch.setattr(screening, name, size)


@pytest.mark.parametrize("names", NAMES, ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k", [(1, 1), (7, 3), (40, 40), (65, 9)])
def test_the_order_is_that_of_the_plain_loop(n, k, kind, names, sizes):
    features = rows_of(kind, 2, n)
    options = options_of(2, n, n, names)
    expected = reference.greedy_map_rank(cosine_similarity(features), k, **options)
    assert torch.equal(map_rank_by_rows(features, k, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_frames_that_resemble_each_other_or_are_the_same(noise, dtype, sizes):
    """Copies of a token tie until one of them is chosen: the first comes first, whatever rounding does."""
    generator = torch.Generator().manual_seed(0)
    frame = torch.randn(1, 30, 64, generator=generator, dtype=dtype)
    features = (frame + noise * torch.randn(8, 30, 64, generator=generator, dtype=dtype)).reshape(1, 240, 64)
    relevance = torch.rand(30, generator=generator, dtype=dtype).repeat(8)[None]
    expected = reference.greedy_map_rank(cosine_similarity(features), 28, relevance=relevance)
    rank = map_rank_by_rows(features, 28, relevance=relevance)
    assert torch.equal(rank.argsort()[:, :28], expected.argsort()[:, :28])
    if not noise:
        assert (rank.argsort()[0, :28] < 30).all()


def test_tokens_that_could_not_be_chosen_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(screening, "POOL", 16)
    monkeypatch.setattr(screening, "GROUP", 16)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(400, 300, generator=generator, dtype=torch.float64)
    weight = torch.rand(400, generator=generator, dtype=torch.float64)
    state = screening.Screened(features, weight, weight.square(), 1e-6)
    order = []
    while len(order) < 60:
        order += state.next_round(60 - len(order), None)
    similarity = cosine_similarity(features[None])
    expected = reference.greedy_map_rank(similarity, 60, relevance=weight[None]).argsort()[0, :60]
    assert order == expected.tolist()
    assert len(state.waiting) >= 200
    kernel = weight[:, None] * similarity[0] * weight
    chosen = kernel[order[:-1]][:, order[:-1]]
    across = kernel[order[:-1]][:, order[-1]]
    smallest = kernel[order[-1], order[-1]] - across @ torch.linalg.solve(chosen, across)  # variances fall in order
    assert weight[state.waiting].square().max() < smallest


def test_half_precision_and_rows_without_a_direction(sizes):
    features = rows_of("iid", 1, 60, dtype=torch.float32).to(torch.bfloat16)
    features[0, 5], features[0, 9] = 0, torch.inf
    relevance = torch.linspace(0.2, 1, 60)[None]
    expected = reference.greedy_map_rank(cosine_similarity(features), 20, relevance=relevance)
    assert torch.equal(map_rank_by_rows(features, 20, relevance=relevance), expected)


def test_relevance_that_is_not_a_number_is_never_chosen():
    features = rows_of("iid", 1, 30, dtype=torch.float32)
    relevance = torch.linspace(0.2, 1, 30)[None]
    relevance[0, 3] = torch.nan
    rank = map_rank_by_rows(features, 10, relevance=relevance)
    assert rank.sort().values[0].tolist() == list(range(30))
    assert 3 not in rank.argsort()[0, :10].tolist()
