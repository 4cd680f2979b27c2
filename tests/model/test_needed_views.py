"""Tiles that the question does not need: which those are, and that the rest is read as if they had never been cut."""

from dataclasses import replace

import pytest
import torch

from llava.layout.views import NEWLINE, flat_layout, tiled_layout
from llava.mm_utils import process_images
from llava.model.needed_views import encode_needed, layout_of_views, tile_of_patches, votes_for_tiles
from llava.pruning import get_pruner
from prompts import QUESTIONS, V15, V16, answer, ids_of, prompt_of
from records import load_picture


def test_patches_of_the_overview_lie_in_tiles():
    """Of a picture twice as wide as high on 2 x 2 tiles only the middle rows of the canvas show something."""
    assert tile_of_patches((672, 672), (2, 2), 4).reshape(4, 4).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
    assert tile_of_patches((300, 900), (1, 3), 6).reshape(6, 6)[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    wide = tile_of_patches((800, 400), (2, 2), 4).reshape(4, 4)
    assert wide.tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
    narrow = tile_of_patches((672, 336), (3, 1), 4).reshape(4, 4)  # margins left and right
    assert narrow.tolist() == [[0, 1, 1, 2]] * 4


def test_votes_are_of_the_most_relevant_tenth():
    relevance = torch.zeros(40)
    relevance[[3, 11, 12, 39]] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    tile = torch.arange(40) // 10
    assert votes_for_tiles(relevance, tile, 4).tolist() == [0.25, 0.5, 0, 0.25]
    assert votes_for_tiles(torch.ones(40), tile, 4).tolist() == [1, 0, 0, 0]  # ties go to the lowest index


def test_a_layout_of_some_views_is_that_of_the_whole_without_the_others():
    layout = tiled_layout((672, 500), (2, 2), 3, "spatial_unpad")
    assert layout_of_views(layout, range(5)).sequence.tolist() == layout.sequence.tolist()
    some = layout_of_views(layout, [0, 3, 4])
    assert some.eligible.tolist() == layout.eligible[[0, 3, 4]].tolist()
    old = {0: 0, 1: 3, 2: 4}
    numbers = [n if n == NEWLINE else 9 * old[n // 9] + n % 9 for n in some.sequence.tolist()]
    left = [n for n in layout.sequence.tolist() if n == NEWLINE or n // 9 in (0, 3, 4)]
    assert [n for n in numbers if n != NEWLINE] == [n for n in left if n != NEWLINE]
    rows = [row.split() for row in " ".join(map(str, numbers[9:])).split(str(NEWLINE))]
    assert all(rows[:-1])  # no row without a token has kept its newline
    assert rows[-1] == []
    assert layout_of_views(layout, [0]).sequence.tolist() == list(range(9))


@pytest.fixture
def shown(load):
    _, model, processor, _ = load(V16)
    pictures = [load_picture(name) for name in ("land640x480", "square336", "tall300x900")]
    return model.visuals(list(process_images(pictures, processor, model.config)), [one.size for one in pictures])


def test_where_all_are_needed_nothing_changes(load, shown):
    _, model, _, _ = load(V16)
    encoded, needed = encode_needed(model, shown, QUESTIONS, get_pruner("script", relevance="language"), 0.0)
    whole = model.encode_pictures(shown)
    assert needed == [list(range(layout.views)) for layout in whole.layouts]
    torch.testing.assert_close(encoded.features, whole.features)
    for own, other in zip(encoded.layouts + encoded.layouts_with_padding,
                          whole.layouts + whole.layouts_with_padding, strict=True):  # fmt: skip
        assert torch.equal(own.sequence, other.sequence)
        assert torch.equal(own.eligible, other.eligible)


@pytest.mark.parametrize("relevance", ["clip", "language"])
def test_tiles_that_are_not_needed_never_go_through_the_tower(load, shown, monkeypatch, relevance):
    tokenizer, model, _, _ = load(V16)
    tower, seen = model.get_vision_tower(), []
    whole = model.encode_pictures(shown)
    method = get_pruner("script", keep_tokens=8, relevance=relevance)
    observe = tower.observe
    monkeypatch.setattr(tower, "observe", lambda pixels, *rest: seen.append(len(pixels)) or observe(pixels, *rest))
    encoded, needed = encode_needed(model, shown, QUESTIONS, method, 0.25)
    assert seen == [3, sum(map(len, needed)) - 3]
    assert sum(map(len, needed)) < len(whole.features)
    assert all(views[0] == 0 and len(views) >= 2 for views in needed)
    first = 0
    rows = []
    for views, layout in zip(needed, whole.layouts, strict=True):
        rows += [first + view for view in views]
        first += layout.views
    torch.testing.assert_close(encoded.features, whole.features[rows])
    ids, mask = ids_of(tokenizer, *map(prompt_of, QUESTIONS))
    prompts = model.embed_prompts(ids, mask, images=encoded, pruner=method)
    assert [len(kept.sequence) for kept in prompts.kept] == [8 * len(views) for views in needed]
    together = answer(model, ids, mask, images=encoded, pruner=method)
    alone, _ = encode_needed(model, shown.pick([2]), QUESTIONS[2:], method, 0.25)
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[2]))
    assert answer(model, ids, images=alone, pruner=method)[0] == together[2]


def test_what_has_no_tiles_to_leave_out_is_refused(load, shown):
    _, model, _, _ = load(V16)
    script = get_pruner("script", relevance="language")
    for method in (get_pruner("divprune"), replace(script, relevance="none"), get_pruner("sparsevlm")):
        with pytest.raises(ValueError, match=f"pruner '{method.name}' reads no question here"):
            encode_needed(model, shown, QUESTIONS, method, 0.1)
    with pytest.raises(ValueError, match="3 pictures and 1 questions"):
        encode_needed(model, shown, QUESTIONS[:1], script, 0.1)
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        encode_needed(model, shown, QUESTIONS, script, 2)


def test_a_picture_of_one_view_is_read_as_it_is(load):
    _, model, processor, _ = load(V15)
    picture = load_picture("land640x480")
    shown = model.visuals(process_images([picture], processor, model.config), [picture.size])
    encoded, needed = encode_needed(model, shown, QUESTIONS[:1], get_pruner("script", relevance="language"), 0.5)
    whole = model.encode_pictures(shown)
    assert needed == [[0]]
    assert torch.equal(encoded.features, whole.features)
    assert torch.equal(encoded.layouts[0].eligible, whole.layouts[0].eligible)
    assert not torch.equal(whole.layouts[0].eligible, flat_layout(1, whole.features.shape[1]).eligible)
