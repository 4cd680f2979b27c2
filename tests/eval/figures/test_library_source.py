"""Classes of the library as figures see them: which cell of which view a token is, tile order, shapes, padding."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from convert_to_transformers import convert
from PIL import Image, ImageDraw

from llava.eval.audit.library import LibrarySubject
from llava.eval.figures import command, library_source, sources
from llava.integrations.transformers.host import find_host
from llava.model.builder import TOY_FOLDER
from llava.pruning import get_pruner
from picture_processors import PROCESSORS
from transformers_families import family


def source_of(name):
    subject = object.__new__(LibrarySubject)
    subject.processor, subject.model = PROCESSORS[name](), family(name).model
    subject.host, subject.spaces = find_host(subject.model), {"clip": None, "siglip": None}
    return library_source.LibrarySource(subject)


def noise(width, height):
    data = np.random.default_rng(0).integers(90, 160, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(data)


def changed_cell(source, picture, plane, row, column, rows, columns):
    """The cell of a plane whose token changes most when the picture is painted white in one cell of rows x columns."""
    painted, (width, height) = picture.copy(), (picture.width / columns, picture.height / rows)
    box = (column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1)
    ImageDraw.Draw(painted).rectangle(box, fill="white")
    before, after = ([view.tokens for view in source.views(one)] for one in (picture, painted))
    change = plane.joined([(a - b).norm(dim=-1) for a, b in zip(before, after, strict=True)])
    assert change.shape == (rows, columns)
    return divmod(int(change.argmax()), columns)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_one_grid_as_wide_and_high_as_the_picture(name):
    source, picture = source_of(name), noise(72, 40)
    (view,) = source.views(picture)
    assert view.tokens.shape[:2] == view.shows.shape == (5, 9)
    assert view.colours.shape == (40, 72, 3)
    torch.testing.assert_close(view.colours, torch.from_numpy(np.asarray(picture)) / 255, atol=1e-6, rtol=0)
    (plane,) = source.planes(picture)
    assert plane.name == ""
    for place in ((0, 8), (3, 1), (4, 5)):
        assert changed_cell(source, picture, plane, *place, 5, 9) == place
    look = source.look(picture, "w9 w8", get_pruner("script", keep_tokens=11, relevance="none"))
    assert look.kept[0].shape == (5, 9)
    assert int(look.kept[0].sum()) == 11
    assert not look.scores["redundancy"][0].isnan().any()


def test_tiles_that_come_before_their_overview():
    """InternVL: six tiles, three beside each other, in a picture half as high as wide."""
    source, picture = source_of("internvl"), noise(84, 56)
    views, planes = source.views(picture), source.planes(picture)
    assert [view.tokens.shape[:2] for view in views] == [(2, 2)] * 7
    assert [(plane.name, plane.views) for plane in planes] == [
        ("overview", ((0,),)),
        ("tiles", ((1, 2, 3), (4, 5, 6))),
    ]
    whole = planes[1].joined([view.colours for view in views])
    assert whole.shape == (56, 84, 3)
    torch.testing.assert_close(whole, torch.from_numpy(np.asarray(picture)) / 255, atol=0.01, rtol=0)
    for place in ((0, 5), (2, 1), (3, 4)):
        assert changed_cell(source, picture, planes[1], *place, 4, 6) == place
    look = source.look(picture, "w9 w8", get_pruner("random", keep_tokens=3))
    assert [int(kept.sum()) for kept in look.kept] == [3] * 7


def test_a_picture_of_one_tile_has_no_overview():
    source = source_of("internvl")
    assert [plane.name for plane in source.planes(noise(28, 28))] == [""]


@pytest.mark.parametrize("per, counts", [("view", [2] * 5), ("picture", [2, 3, 3, 3, 2])])
def test_the_budget_of_internvl3_in_the_papers_table_10(per, counts):
    """Four tiles and an overview: 13 tokens of a picture are dealt in whole numbers that add up to them."""
    source, picture = source_of("internvl"), noise(56, 56)
    method = get_pruner("random", keep_tokens=13 if per == "picture" else 2, per=per)
    kept = [int(one.sum()) for one in source.look(picture, "w9", method).kept]
    assert kept == counts


def test_views_that_the_model_packed_otherwise_are_refused(monkeypatch):
    source = source_of("internvl")
    real = library_source.seen_views

    def swapped(*given):
        first, second, *rest = real(*given)
        return [
            replace(first, tokens=torch.cat([first.tokens[:1], second.tokens[1:]])),
            replace(second, tokens=torch.cat([second.tokens[:1], first.tokens[1:]])),
            *rest,
        ]

    monkeypatch.setattr(library_source, "seen_views", swapped)
    with pytest.raises(ValueError, match="it is not known where the visual tokens of InternVL"):
        source.seen(noise(56, 56))


# --- LLaVA-NeXT: the toy in both formats ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def next_toys(tmp_path_factory):
    toy, target = str(TOY_FOLDER / "llava-toy-v1.6"), tmp_path_factory.mktemp("converted") / "llava-toy-v1.6"
    convert(toy, target)
    clip = str(TOY_FOLDER / "clip-toy-336")
    ours = sources.OurSource(command.OurSubject(toy, device="cpu"))
    return ours, library_source.LibrarySource(LibrarySubject(str(target), "cpu", "auto", clip))


@pytest.fixture(scope="module")
def scene():
    """Nearly twice as wide as high: two tiles beside each other, with padding above and below."""
    folder = TOY_FOLDER / "data/eval/MME/MME_Benchmark_release_version/count"
    with Image.open(sorted(folder.glob("*.png"))[0]) as picture:
        return picture.convert("RGB").resize((600, 270))


def test_tiles_of_llava_next_are_seen_as_our_own(next_toys, scene):
    ours, theirs = next_toys
    assert ours.planes(scene) == theirs.planes(scene)
    assert [plane.views for plane in theirs.planes(scene)] == [((0,),), ((1, 2),)]
    for own, other in zip(ours.views(scene), theirs.views(scene), strict=True):
        assert own.shows.any()
        assert torch.equal(own.shows, other.shows)
        torch.testing.assert_close(own.tokens[own.shows], other.tokens[own.shows], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(own.colours, other.colours, atol=0.005, rtol=0)
    assert 0 < int(theirs.views(scene)[1].shows.sum()) < 576
    for features in sources.FEATURES:
        own, other = (source.views(scene, features)[2] for source in (ours, theirs))
        torch.testing.assert_close(own.tokens[own.shows], other.tokens[own.shows], atol=1e-3, rtol=1e-3)


def test_maps_of_llava_next_lie_where_our_own_do(next_toys, scene):
    method = get_pruner("script", keep_tokens=16)
    own, other = (source.look(scene, "Is there a star?", method) for source in next_toys)
    for mine, their, view in zip(own.kept, other.kept, next_toys[0].views(scene), strict=True):
        assert int(their.sum()) == 16
        assert not bool((their & ~view.shows).any())
        assert int((mine & their).sum()) >= 14  # rounding may settle a close choice otherwise
    for mine, their in zip(own.scores["relevance"], other.scores["relevance"], strict=True):
        there = ~mine.isnan() & ~their.isnan()
        assert there.any()
