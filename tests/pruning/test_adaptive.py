"""The share that the kept tokens cannot express, and the counts that follow from it."""

import pytest
import torch

from llava.pruning.adaptive import count_at_gain, count_at_share, residual_share
from llava.pruning.functional import conditional_kernel, cosine_similarity, greedy_map_rank
from records import selection_cases


def scene(views=3, tokens=60, kinds=12):
    """Tokens of some kinds, with noise; the more kinds, the more tokens it takes."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(views, kinds, 40, generator=generator)
    kind = torch.randint(kinds, (views, tokens), generator=generator)
    features = centres.gather(1, kind[:, :, None].expand(-1, -1, 40))
    features = features + 0.3 * torch.randn(views, tokens, 40, generator=generator)
    return cosine_similarity(features.double()), torch.rand(views, tokens, generator=generator).double()


def curve(similarity, relevance, steps):
    rank = greedy_map_rank(similarity, steps, relevance=relevance, epsilon=0.0, stop=1e-10)
    order = rank.argsort(dim=-1)[:, :steps]
    return order, residual_share(similarity, order, relevance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case, tensors", selection_cases("dpp_auto"))
def test_curves_and_counts_are_the_recorded_ones(case, tensors, dtype, tolerance):
    similarity = cosine_similarity(tensors["features"].to(dtype)[None])
    order, share = curve(similarity, tensors["relevance"].to(dtype)[None], case["steps"])
    assert order[0].tolist() == tensors["order"].tolist()
    assert torch.allclose(share[0].double(), tensors["residual_share"], rtol=0, atol=tolerance)
    bounds = case["floor"], case["ceiling"]
    at_share = {text: int(count_at_share(share, 1 - float(text), *bounds)) for text in case["k_at_epsilon"]}
    at_gain = {text: int(count_at_gain(share, float(text), *bounds, case["window"])) for text in case["k_at_eta"]}
    assert (at_share, at_gain) == (case["k_at_epsilon"], case["k_at_eta"])


def test_the_share_is_the_trace_that_the_nystrom_approximation_lacks():
    similarity, relevance = scene()
    order, share = curve(similarity, relevance, 20)
    kernel = conditional_kernel(similarity, relevance)
    for view in range(3):
        for k in (1, 7, 20):
            chosen = order[view, :k]
            rows = kernel[view, chosen]
            approximation = rows.T @ torch.linalg.solve(rows[:, chosen], rows)
            lacking = 1 - approximation.trace() / kernel[view].trace()
            assert share[view, k] == pytest.approx(lacking.item(), abs=1e-9)
    assert (share.diff(dim=-1) <= 0).all()


def test_scale_does_not_count_and_a_view_alone_has_its_curve():
    similarity, relevance = scene()
    order, share = curve(similarity, relevance, 20)
    assert torch.allclose(residual_share(similarity, order, 7 * relevance), share)
    for view in range(3):
        alone = curve(similarity[view : view + 1], relevance[view : view + 1], 20)[1]
        assert torch.allclose(alone[0], share[view])


def test_tokens_that_take_no_part_do_not_count():
    similarity, relevance = scene()
    shown = torch.ones(3, 60, dtype=torch.bool)
    shown[:, 45:] = False
    order, share = curve(similarity[:, :45, :45], relevance[:, :45], 20)
    assert torch.allclose(residual_share(similarity, order, relevance, shown), share)


def test_counts_follow_their_thresholds_within_floor_and_ceiling():
    share = curve(*scene(), 50)[1]
    qualities = torch.stack([count_at_share(share, q / 20, 4, 40) for q in range(1, 20)])
    gains = torch.stack([count_at_gain(share, eta, 4, 40) for eta in (1e-4, 1e-3, 3e-3, 1e-2, 1e-1)])
    assert (qualities.diff(dim=0) >= 0).all()
    assert (gains.diff(dim=0) <= 0).all()
    for counts in (qualities, gains):
        assert counts.unique().numel() > 3
        assert (counts >= 4).all()
        assert (counts <= 40).all()
    assert count_at_share(share, 0.9, 16, 16).tolist() == count_at_gain(share, 1e-3, 16, 16).tolist() == [16] * 3


def test_a_crowded_scene_needs_more_than_an_empty_one():
    few, many = (curve(*scene(kinds=kinds), 50)[1] for kinds in (4, 24))
    assert (count_at_share(few, 0.8, 1, 50) < count_at_share(many, 0.8, 1, 50)).all()


def test_a_rank_that_is_used_up_explains_everything():
    similarity = torch.ones(1, 5, 5)
    share = residual_share(similarity, torch.arange(5)[None])
    assert share.tolist() == [[1.0, 0, 0, 0, 0, 0]]
    assert count_at_share(share, 0.99, 1, 5).tolist() == [1]
    assert residual_share(similarity, torch.arange(5)[None], torch.zeros(1, 5)).tolist() == [[1.0, 0, 0, 0, 0, 0]]
