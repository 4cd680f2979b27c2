"""The shared mathematics against recorded values, slow references and its own laws."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.pruning.functional import (
    conditional_kernel,
    cosine_similarity,
    greedy_map,
    greedy_map_rank,
    min_max,
    redundancy_scores,
    relevance_scores,
    self_products,
    stable_rank,
)
from records import selection_cases

seeds = st.integers(0, 2**16)


def features(seed, views, tokens, width, kind="iid"):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(views, tokens, width, generator=generator)
    if kind == "duplicated":
        rows[:, tokens // 2 :] = rows[:, : tokens - tokens // 2]
    if kind == "zero":
        rows[:, :: max(tokens // 3, 1)] = 0
    if kind == "constant":
        rows[:] = rows[:, :1]
    return rows


# --- recorded values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, tensors", selection_cases("fast_map_dpp"))
def test_greedy_map_is_the_official_fast_greedy(case, tensors):
    kernel = tensors["kernel"][None]
    order = greedy_map(kernel, case["max_length"], epsilon=0.0, stop=case["epsilon"])[0]
    returned = case["returned"]
    assert order[:returned].tolist() == tensors["order"].tolist()
    assert len(set(order.tolist())) == case["max_length"]  # filled up where the official routine returns fewer


@pytest.mark.parametrize("case, tensors", selection_cases("map_bruteforce"))
def test_greedy_map_on_enumerated_kernels(case, tensors):
    kernel = tensors["kernel"]
    order = greedy_map(kernel[None], case["k"], epsilon=0.0, stop=1e-10)[0]
    assert order.tolist() == tensors["greedy_order"].tolist()
    best = max(
        itertools.combinations(range(case["n"]), case["k"]),
        key=lambda subset: torch.linalg.det(kernel[list(subset)][:, list(subset)]).item(),
    )
    assert set(best) == set(tensors["exact"].tolist())
    assert torch.linalg.det(kernel[order][:, order]).item() == pytest.approx(case["det_greedy"], rel=1e-9)


@pytest.mark.parametrize("case, tensors", selection_cases("tome"))
def test_even_odd_block_is_tomes(case, tensors):
    """ToMe's bipartite matching looks at the same block of similarities as the redundancy graph."""
    similarity = cosine_similarity(tensors["metric"])
    best = similarity[:, 0::2, 1::2].max(-1)
    rows = slice(1, None) if case["class_token"] else slice(None)
    assert torch.allclose(best.values[:, rows], tensors["node_max"][:, rows], atol=1e-5)
    assert torch.equal(best.indices[:, rows], tensors["node_idx"][:, rows])


# --- cosine similarity ---------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from(["iid", "duplicated", "zero", "constant"]), st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_cosine_ignores_scale_and_keeps_its_range(seed, kind, scale):
    rows = features(seed, 2, 9, 70, kind)
    similarity = cosine_similarity(rows)
    scaled = rows.clone()
    scaled[:, 3] *= scale
    assert torch.allclose(cosine_similarity(scaled), similarity, atol=1e-6)
    assert similarity.abs().max() <= 1 + 1e-6
    zero = (rows == 0).all(-1)
    assert torch.equal(similarity.diagonal(dim1=1, dim2=2), (~zero).float())
    assert (similarity[zero] == 0).all()
    reference = torch.nn.functional.normalize(rows.double(), dim=-1)
    assert torch.allclose(similarity.double(), reference @ reference.mT, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 111, 112, 169, 401, 576])
def test_products_of_rows_with_each_other_are_symmetric_and_tie_where_rows_are_equal(n, dtype):
    rows = features(n, 2, n, 700).to(dtype)
    source = torch.randint(0, n, (n,), generator=torch.Generator().manual_seed(n))
    rows[:, ::3] = rows[:, source[::3]]
    rows = rows[:, source.sort().values]  # more copies, also across the strips
    product = self_products(rows)
    assert torch.equal(product, product.mT)
    assert torch.allclose(product.double(), rows.double() @ rows.double().mT, rtol=1e-5, atol=1e-3)
    same = (rows[:, :, None, :8] == rows[:, None, :, :8]).all(-1).int().argmax(-1)  # the first equal row
    assert torch.equal(product, product.gather(1, same[:, :, None].expand_as(product)))


def test_products_of_rows_with_each_other_have_a_gradient():
    rows = features(0, 1, 120, 5).requires_grad_()
    self_products(rows).square().sum().backward()
    full = rows.detach()
    assert torch.allclose(rows.grad, 4 * (full @ full.mT) @ full, rtol=1e-4, atol=1e-2)


def test_cosine_survives_extreme_rows():
    values = (1e18, 1e-17, 1e-30, 1e38, float("inf"), float("nan"), 0.0, -1.0)
    rows = torch.stack([torch.full((8,), value) for value in values])[None]
    directed = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, -1])
    assert torch.allclose(cosine_similarity(rows)[0], directed[:, None] * directed[None, :], atol=1e-6)
    against_ones = cosine_similarity(rows, torch.ones(1, 1, 8))[0, :, 0]
    assert torch.allclose(against_ones, directed, atol=1e-6)


def test_half_precision_is_computed_in_float32():
    rows = features(1, 2, 20, 700).bfloat16()  # wider than a column block
    assert torch.allclose(cosine_similarity(rows), cosine_similarity(rows.float()), atol=1e-6)
    assert cosine_similarity(rows).dtype == torch.float32


# --- relevance and scaling -----------------------------------------------------------------------------------------


def test_relevance_averages_real_segments_only():
    embeds, texts = features(0, 3, 7, 16), features(1, 3, 4, 16)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    together = relevance_scores(embeds, texts, mask, sign=-1)
    for view, count in enumerate(mask.sum(-1).tolist()):
        alone = -cosine_similarity(embeds[view : view + 1], texts[view : view + 1, :count]).mean(-1)
        assert torch.allclose(together[view], alone[0], atol=1e-6)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_min_max_spans_the_valid_tokens(seed):
    scores = features(seed, 4, 11, 1)[..., 0]
    valid = features(seed + 1, 4, 11, 1)[..., 0] > -0.5
    valid[:, :2] = True
    scaled = min_max(scores, valid)
    for row, mask in zip(scaled, valid, strict=True):
        assert row[mask].min() == 0
        assert row[mask].max() == 1
        assert (row[~mask] == 0).all()


def test_min_max_without_spread_is_all_ones():
    assert (min_max(torch.full((2, 5), 0.3)) == 1).all()
    assert (min_max(torch.full((1, 5), float("nan"))) == 1).all()


# --- redundancy ----------------------------------------------------------------------------------------------------


def slow_redundancy(similarity, tau, gamma, graph):
    n = len(similarity)
    scores = []
    for i in range(n):
        others = [j for j in range(n) if j != i and (graph == "exhaustive" or (i - j) % 2)]
        edges = [similarity[i, j] for j in others if similarity[i, j] >= tau]
        if edges:
            scores.append(len(edges) * torch.exp(gamma * (sum(edges) / len(edges) - tau)))
        else:
            scores.append(sum(similarity[i, j] for j in others) / max(len(others), 1))
    return torch.stack([torch.as_tensor(score, dtype=similarity.dtype) for score in scores])


@given(seeds, st.sampled_from(["bipartite", "exhaustive"]), st.floats(-0.5, 0.9), st.floats(0, 3), st.integers(2, 13))
@settings(max_examples=40, deadline=None)
def test_redundancy_is_what_the_definition_says(seed, graph, tau, gamma, tokens):
    rows = features(seed, 2, tokens, 5).double()
    scores = redundancy_scores(rows, tau, gamma, graph=graph)
    for similarity, ours in zip(cosine_similarity(rows), scores, strict=True):
        assert torch.allclose(ours, slow_redundancy(similarity, tau, gamma, graph), atol=1e-9)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_connected_tokens_rank_above_isolated_ones(seed):
    rows = features(seed, 1, 30, 6)
    similarity = cosine_similarity(rows)[:, 0::2, 1::2]
    connected = torch.zeros(1, 30, dtype=torch.bool)
    connected[:, 0::2], connected[:, 1::2] = (similarity >= 0.5).any(-1), (similarity >= 0.5).any(-2)
    scores = redundancy_scores(rows, 0.5, 1.0)
    assert (scores[connected] >= 1).all()
    assert (scores[~connected] < 0.5).all()
    means = redundancy_scores(rows, 1.1, 1.0)  # no pair reaches the threshold
    assert torch.allclose(means[:, 0::2], similarity.mean(-1), atol=1e-6)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_swapping_even_and_odd_positions_permutes_the_scores(seed):
    rows = features(seed, 1, 24, 6)
    swapped = rows.reshape(1, 12, 2, 6).flip(2).reshape(1, 24, 6)
    expected = redundancy_scores(rows).reshape(1, 12, 2).flip(2).reshape(1, 24)
    assert torch.allclose(redundancy_scores(swapped), expected, atol=1e-5)


def test_invalid_tokens_are_nobodys_neighbours():
    rows = features(0, 1, 20, 4)
    valid = torch.ones(1, 20, dtype=torch.bool)
    valid[:, 12:] = False
    for graph in ("bipartite", "exhaustive"):
        masked = redundancy_scores(rows, 0.2, 1.0, graph=graph, valid=valid)[:, :12]
        assert torch.allclose(masked, redundancy_scores(rows[:, :12], 0.2, 1.0, graph=graph), atol=1e-5)


def test_unknown_graph_is_refused():
    with pytest.raises(ValueError, match="bipartite"):
        redundancy_scores(features(0, 1, 4, 4), graph="complete")


# --- greedy MAP ----------------------------------------------------------------------------------------------------


def slow_greedy(kernel, k):
    """Greedy maximum of det, every determinant computed anew."""
    chosen = []
    for _ in range(k):
        rest = [j for j in range(len(kernel)) if j not in chosen]
        values = [torch.linalg.det(kernel[chosen + [j]][:, chosen + [j]]).item() for j in rest]
        chosen.append(rest[max(range(len(rest)), key=lambda i: values[i])])
    return chosen


@given(seeds, st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_greedy_map_maximises_each_determinant(seed, k):
    kernel = cosine_similarity(features(seed, 2, 10, 12).double()) * 2
    orders = greedy_map(kernel, k, epsilon=0.0, stop=1e-12)
    for order, each in zip(orders, kernel, strict=True):
        assert order.tolist() == slow_greedy(each, k)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_greedy_variances_multiply_to_the_determinant_and_fall(seed):
    kernel = cosine_similarity(features(seed, 1, 12, 16).double())[0]
    order = greedy_map(kernel[None], 8, epsilon=0.0, stop=1e-12)[0].tolist()
    determinants = [torch.linalg.det(kernel[order[:k]][:, order[:k]]).item() for k in range(9)]
    variances = [after / before for before, after in itertools.pairwise(determinants)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(variances))


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_greedy_order_is_a_prefix_of_a_longer_one(seed):
    kernel = cosine_similarity(features(seed, 3, 20, 8))
    longer = greedy_map(kernel, 20)
    for k in (1, 5, 13):
        assert torch.equal(greedy_map(kernel, k), longer[:, :k])


def test_kernel_need_not_be_built():
    rows, relevance = features(3, 4, 30, 40).double(), torch.rand(4, 30).double()
    similarity = cosine_similarity(rows)
    implicit = greedy_map_rank(similarity, 10, relevance=relevance).argsort(-1)[:, :10]
    assert torch.equal(implicit, greedy_map(conditional_kernel(similarity, relevance), 10))


def test_exhausted_rank_is_filled_by_relevance_then_index():
    rows = torch.zeros(1, 6, 4)
    rows[0, :, 0] = 1  # rank one
    relevance = torch.tensor([[0.5, 0.9, 0.7, 0.7, 0.0, 1.0]])
    order = greedy_map_rank(cosine_similarity(rows), 6, relevance=relevance).argsort(-1)[0]
    assert order.tolist() == [5, 1, 2, 3, 0, 4]


def test_equal_variances_go_to_the_lowest_index():
    assert greedy_map(torch.eye(7)[None], 5)[0].tolist() == [0, 1, 2, 3, 4]
    assert stable_rank(torch.tensor([[1.0, 2.0, 1.0, 2.0]]), descending=True).tolist() == [[2, 0, 3, 1]]


def test_views_with_different_ranks_do_not_disturb_each_other():
    low, high = features(0, 1, 40, 3), features(1, 1, 40, 64)
    wide = torch.cat([torch.nn.functional.pad(low, (0, 61)), high])
    together = greedy_map(cosine_similarity(wide), 20)
    for view in range(2):
        assert torch.equal(together[view : view + 1], greedy_map(cosine_similarity(wide[view : view + 1]), 20))


@pytest.mark.parametrize("k", [0, 6])
def test_greedy_length_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match="between 1 and n = 5"):
        greedy_map(torch.eye(5)[None], k)
