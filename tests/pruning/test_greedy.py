"""The fast greedy loops against the plain ones of `llava.pruning.reference`, and what both promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greedy_inputs import KINDS, options_of, rows_of
from llava.pruning import functional, greedy, greedy_numpy, ranks, reference
from llava.pruning.functional import cosine_similarity, greedy_map_rank, max_min_rank, unprojected_rank


@pytest.fixture(autouse=True, scope="module", params=[greedy_numpy, greedy], ids=["numpy", "torch"])
def loops(request):
    """All tests with the loops for a CPU, and with those for other devices, which run on a CPU as well."""
    patch = pytest.MonkeyPatch()
    patch.setattr(ranks, "_loops", lambda tensor: request.param)
    yield
    patch.undo()


@pytest.mark.parametrize(
    "names", [(), ("relevance",), ("member",), ("candidates",), ("relevance", "member", "candidates")]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("views, n, k", [(1, 1, 1), (1, 7, 3), (3, 40, 40), (2, 65, 9), (17, 33, 12)])
def test_greedy_map_is_the_plain_loop(views, n, k, kind, names):
    similarity = cosine_similarity(rows_of(kind, views, n))
    options = options_of(views, n, n, names)
    expected = reference.greedy_map_rank(similarity, k, **options)
    assert torch.equal(greedy_map_rank(similarity, k, **options), expected)
    assert torch.equal(expected.sort(-1).values, torch.arange(n).expand(views, -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("views, n, k", [(1, 1, 1), (1, 7, 3), (3, 40, 39), (2, 65, 9), (17, 33, 12)])
@pytest.mark.parametrize("masked", [False, True])
def test_max_min_is_the_plain_loop(views, n, k, kind, masked):
    distance = 1 - cosine_similarity(rows_of(kind, views, n))
    candidates = options_of(views, n, n, ("candidates",))["candidates"] if masked else None
    expected = reference.max_min_rank(distance, k, candidates)
    assert torch.equal(max_min_rank(distance, k, candidates), expected)
    assert torch.equal(expected.sort(-1).values, torch.arange(n).expand(views, -1))


def test_both_loops_agree_at_the_sizes_of_models():
    for views, n, k in ((5, 576, 64), (64, 169, 32)):
        similarity = cosine_similarity(rows_of("iid", views, n, dtype=torch.float32))
        options = options_of(views, n, 0, ("relevance", "member"))
        options["relevance"] = options["relevance"].float() + torch.linspace(0, 1e-3, n)
        assert torch.equal(
            greedy_map_rank(similarity, k, **options), reference.greedy_map_rank(similarity, k, **options)
        )


@given(st.integers(0, 2**16), st.integers(2, 90), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=40, deadline=None)
def test_of_exact_duplicates_the_first_comes_first(seed, n, dtype):
    """Whatever rounding does to a token it does to its duplicates: they tie until one is chosen."""
    rows = rows_of("iid", 2, n, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(0, n, (n,), generator=generator)
    similarity = cosine_similarity(rows)[:, owner][:, :, owner].contiguous()  # equal rows and columns, to the bit
    relevance = torch.rand(2, n, generator=generator, dtype=dtype)[:, owner]
    twins = (owner[:, None] == owner[None, :]) & (torch.arange(n)[:, None] < torch.arange(n)[None, :])
    for rank in (greedy_map_rank(similarity, n, relevance=relevance), max_min_rank(1 - similarity, n)):
        assert (rank[:, :, None] < rank[:, None, :])[:, twins].all()


def test_a_view_that_is_not_a_number_leaves_the_others_alone():
    similarity = cosine_similarity(rows_of("iid", 3, 30, dtype=torch.float32))
    expected = greedy_map_rank(similarity, 12)
    similarity[1, 4, 4] = torch.nan
    rank = greedy_map_rank(similarity, 12)
    assert torch.equal(rank[[0, 2]], expected[[0, 2]])
    assert rank[1].sort().values.tolist() == list(range(30))


def test_the_basis_grows_beyond_what_was_expected():
    """Few members far down the order: many more steps than twice k."""
    similarity = cosine_similarity(rows_of("iid", 2, 120))
    relevance = torch.linspace(1, 0.1, 120).double().expand(2, -1)
    member = torch.arange(120) >= 110
    options = {"relevance": relevance, "member": member.expand(2, -1)}
    assert torch.equal(greedy_map_rank(similarity, 4, **options), reference.greedy_map_rank(similarity, 4, **options))


def test_ranks_are_taken_of_tensors_that_need_a_gradient():
    similarity = cosine_similarity(rows_of("iid", 2, 20)).requires_grad_()
    assert not greedy_map_rank(similarity, 5).requires_grad
    assert not max_min_rank(1 - similarity, 5).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_unprojected_choices_by_hand(kind):
    """Of each view alone: v_i falls by (L_ij / (sqrt(v_j) + epsilon))^2 at every choice j."""
    similarity, n, k = cosine_similarity(rows_of(kind, 3, 30)), 30, 12
    relevance = options_of(3, n, 0, ("relevance",))["relevance"]
    rank = unprojected_rank(similarity, k, relevance)
    for view in range(3):
        kernel = functional.conditional_kernel(similarity, relevance)[view]
        left, chosen = kernel.diagonal().clone(), []
        for _ in range(k):
            j = int(left.argmax())
            chosen.append(j)
            left = left - (kernel[j] / (left[j].clamp_min(0).sqrt() + 1e-6)).square() * (left[j] > 0)
            left[j] = -torch.inf
        assert rank[view].argsort()[:k].tolist() == chosen
