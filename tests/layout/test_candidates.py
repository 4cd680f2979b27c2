"""Budgets: what competes with what, and counts that add up to what was asked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.layout.candidates import candidates_of, check_together, dealt, is_identity
from llava.pruning import get_pruner

TILES = [256] * 5  # InternVL: four tiles and a thumbnail


def keeps(name, views, length=None, eligible=None, **options):
    return [one.keep for one in candidates_of(get_pruner(name, **options), views, length, eligible)]


def test_the_published_budgets_of_internvl_can_be_said():
    """256 and 128 of 1,280 tokens over five tiles: no whole number per tile."""
    assert keeps("script", TILES, keep_tokens=256, per="picture") == [52, 51, 51, 51, 51]
    assert keeps("script", TILES, keep_tokens=128, per="picture") == [26, 26, 26, 25, 25]
    assert keeps("script", TILES, keep_tokens=256, per="picture", scope="global") == [256]
    assert keeps("script", TILES, keep_tokens=0.1, per="picture", scope="global") == [128]


def test_a_budget_per_view_is_the_same_for_every_view_and_adds_up_where_they_compete():
    assert keeps("script", TILES, keep_tokens=32) == [32] * 5
    assert keeps("script", TILES, keep_tokens=32, scope="global") == [160]
    assert keeps("script", [100, 50], keep_tokens=0.5) == [50, 25]
    assert keeps("script", [100, 10], keep_tokens=64) == [64, 10]


def test_divprune_as_published_counts_the_whole_sequence():
    assert keeps("divprune", [576] * 5, 2928, keep_tokens=64, scope="official") == [320]
    assert keeps("divprune", [576] * 5, 2928, keep_tokens=0.1, scope="official") == [293]  # 292.8, half to even
    (one,) = candidates_of(get_pruner("divprune", keep_tokens=64, scope="official"), [576], 600)
    assert (one.tokens, one.sequence) == (600, True)


def test_inside_the_decoder_a_picture_has_the_budget_of_its_views():
    (one,) = candidates_of(get_pruner("fastv", keep_tokens=64), TILES)
    assert (one.keep, one.tokens) == (320, 1280)


def test_padding_takes_no_share_of_a_picture():
    assert keeps("script", [100, 100], eligible=[100, 20], keep_tokens=60, per="picture") == [50, 10]
    assert keeps("script", [100, 100], eligible=[100, 20], keep_tokens=150, per="picture") == [100, 20]
    assert keeps("script", [100, 100], eligible=[100, 0], keep_tokens=7, per="picture") == [7, 0]


@given(st.integers(0, 400), st.lists(st.integers(0, 60), min_size=1, max_size=9))
def test_shares_add_up_and_follow_the_weights(budget, weights):
    shares = dealt(budget, weights)
    assert sum(shares) == min(budget, sum(weights))
    for share, weight in zip(shares, weights, strict=True):
        assert 0 <= share <= weight
        assert abs(share - min(budget, sum(weights)) * weight / max(sum(weights), 1)) < 1


@pytest.mark.parametrize("scope", ["view", "global"])
@pytest.mark.parametrize("per", ["view", "picture"])
def test_a_budget_of_all_is_no_pruning(scope, per):
    whole = 256 if per == "view" else 1280
    assert is_identity(get_pruner("script", keep_tokens=whole, scope=scope, per=per), TILES)
    assert not is_identity(get_pruner("script", keep_tokens=whole - 1, scope=scope, per=per), TILES)
    assert is_identity(None, TILES)


def test_views_that_are_compared_must_be_alike():
    pruner = get_pruner("cdpruner", keep_tokens=32, scaling="picture")
    check_together(pruner, candidates_of(pruner, TILES))
    with pytest.raises(ValueError, match=r"'cdpruner' .* keep 32 of 100, 32 of 256"):
        check_together(pruner, candidates_of(pruner, [256, 100]))
    uneven = get_pruner("cdpruner", keep_tokens=256, scaling="picture", per="picture")
    with pytest.raises(ValueError, match="keep 51 of 256, 52 of 256"):
        check_together(uneven, candidates_of(uneven, TILES))
