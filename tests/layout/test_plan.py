"""Counts of a picture before anything is computed: with padding, newlines, budgets of several kinds."""

import pytest
import torch

from llava.layout.padding import patches_of_square, patches_of_tiles
from llava.layout.plan import plan_picture
from llava.layout.views import flat_layout, padded_square_layout, slow_fast_layout, tiled_layout
from llava.pruning import get_pruner, list_pruners

SIDE = 6  # 36 patches a view
WIDE = tiled_layout((600, 200), (2, 2), SIDE, "spatial_unpad")
WITH_PADDING = tiled_layout((600, 200), (2, 2), SIDE, "spatial")


def plan(name, layout=WIDE, **options):
    return plan_picture(get_pruner(name, **options), layout, WITH_PADDING, layers=8)


def test_nothing_is_planned_where_nothing_is_pruned():
    for pruner in (None, get_pruner("script", keep_tokens=36), get_pruner("fastv", keep_tokens=99)):
        picture = plan_picture(pruner, WIDE, WITH_PADDING, layers=8)
        assert picture.candidates == ()
        assert picture.count == picture.target == len(WIDE.sequence)
        assert picture.layout is WIDE
        assert picture.per_layer is None


def test_padding_gives_nothing_unless_asked():
    shown = WIDE.eligible.sum(1).tolist()
    assert shown == [36, 12, 12, 12, 12]
    assert plan("script", keep_tokens=20).count == 20 + 4 * 12
    whole = plan("script", keep_tokens=20, exclude_padding=False)
    assert (whole.count, whole.layout) == (100, WITH_PADDING)


@pytest.mark.parametrize("budget", [1, 30, 59, 83, 84, 150])
@pytest.mark.parametrize("scope", ["view", "global"])
def test_a_picture_s_budget_is_met_exactly_where_its_patches_allow(budget, scope):
    picture = plan("script", keep_tokens=budget, per="picture", scope=scope)
    assert picture.count == min(budget, 36 + 4 * 12)
    if scope == "view":
        assert [one.keep for one in picture.candidates] == sorted(
            (one.keep for one in picture.candidates), reverse=True
        )


def test_made_tokens_are_counted_view_by_view():
    picture = plan("trim", keep_tokens=20)
    assert picture.made == (1, 0, 0, 0, 0)  # tiles that show fewer patches than the budget have none to make one of
    assert (picture.kept, picture.count) == (19 + 4 * 12, 20 + 4 * 12)


def test_inside_the_decoder_a_picture_has_what_another_method_would_keep_of_it():
    picture = plan("fastv", keep_tokens=20)
    assert picture.target == plan("script", keep_tokens=20).count
    assert picture.count == len(WIDE.sequence)
    assert picture.choosable is None  # the sequence of an un-padded picture holds nothing else
    square = padded_square_layout((90, 30), SIDE)
    inside = plan_picture(get_pruner("fastv", keep_tokens=9), square, layers=8)
    assert inside.choosable.tolist() == square.eligible[0].tolist()
    assert min(inside.per_layer) < 36


def test_published_divprune_counts_newlines():
    picture = plan("divprune", keep_tokens=0.5, scope="official")
    assert picture.count == picture.kept == round(0.5 * len(WIDE.sequence))
    assert plan("divprune", keep_tokens=36, scope="official").candidates == ()


def test_what_a_method_cannot_read_is_refused():
    with pytest.raises(ValueError, match="slow/fast video"):
        plan_picture(get_pruner("script", keep_tokens=4), slow_fast_layout(4, 6, 3, 2))
    with pytest.raises(ValueError, match=r"'cdpruner' .* compares the views of a picture"):
        plan("cdpruner", keep_tokens=50, per="picture", scaling="picture")


@pytest.mark.parametrize("name", list_pruners())
def test_a_flat_picture_gives_its_budget(name):
    picture = plan_picture(get_pruner(name, keep_tokens=16), flat_layout(2, 64), layers=8)
    assert picture.target == 32
    assert picture.count == (128 if picture.candidates == () else 32)


@pytest.mark.parametrize("size", [(600, 200), (200, 601), (97, 61), (1, 1), (3, 2000)])
@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (3, 1)])
def test_padding_of_tiles_is_what_the_unpadded_plane_leaves_out(size, grid):
    layout = tiled_layout(size, grid, SIDE, "spatial_unpad")
    shown = patches_of_tiles(size, grid, SIDE)
    read = layout.sequence[layout.sequence >= 0]
    assert shown.flatten().nonzero().flatten().tolist() == read.sort().values.tolist()
    assert patches_of_square(size, SIDE).equal(padded_square_layout(size, SIDE).eligible)


def test_a_layout_that_was_first_asked_for_in_inference_mode_serves_training_later():
    with torch.inference_mode():
        layouts = [padded_square_layout((641, 203), 7), tiled_layout((641, 203), (2, 1), 7, "spatial_unpad")]
    for layout in layouts:
        features = torch.ones(layout.eligible.shape, requires_grad=True)
        (features * layout.eligible).sum().backward()
        assert torch.equal(features.grad, layout.eligible.float())
        assert not layout.sequence.is_inference()
