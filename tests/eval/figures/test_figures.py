"""The figures' command on tiny checkpoints: what it writes, its numbers by another way, what it refuses first."""

import csv
import io
import shutil

import pytest
import torch
from convert_to_transformers import convert
from PIL import Image

from llava.eval.figures import command, library_source, of_questions, scores, sources
from llava.model.builder import TOY_FOLDER
from llava.pruning import get_pruner, list_pruners
from records import GOLDEN, load_picture

TINY = str(GOLDEN / "checkpoints" / "llava-v1.5-tiny")
TILED = str(GOLDEN / "checkpoints" / "llava-v1.6-vicuna-tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    for letter, name in (("a", "square336.png"), ("b", "small97x61.png")):
        shutil.copy(GOLDEN / "images" / name, place / f"{letter}.png")
    return place


@pytest.fixture(scope="module")
def source():
    return sources.OurSource(command.OurSubject(TINY, device="cpu"))


@pytest.fixture
def draw(folder, source, tmp_path, monkeypatch):
    """Run the command on the tiny checkpoint, loaded once; returns exit code and the rows of the CSV."""
    monkeypatch.setattr(command, "load_source", lambda options: source)

    def draw(name, *more, pictures=folder):
        output = tmp_path / f"{name}.svg"
        code = command.main([name, "--pictures", str(pictures), "--output", str(output), *more])
        if code:
            return code, []
        assert output.read_text().startswith("<?xml")
        return code, list(csv.DictReader(io.StringIO(output.with_suffix(".csv").read_text())))

    return draw


def test_figures_of_tokens(draw, source, capsys):
    assert len(draw("3a", "--count", "1")[1]) == 46  # distances of a grid of 24 x 24
    rows = draw("3b", "--features", "tower", "--count", "1")[1]
    assert "above 0.5" in capsys.readouterr().out
    shares = [float(row["share"]) for row in rows if row["pairs"] == "neighbouring"]
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    rows = draw("9", "--tau", "-1", "2", "--count", "1")[1]
    assert [float(row["share"]) for row in rows] == [1, 0]
    assert draw("6", "--count", "1")[0] == 0
    rows = draw("3c")[1]
    views = {row["view"] for row in rows}
    assert views == {"a.png/0", "b.png/0"}
    small = sum(row["view"].startswith("b") for row in rows)
    assert small < 576  # its padding is left out


def test_entropy_says_how_it_goes_with_the_cosine(draw, capsys):
    rows = draw("3d", "--neighbourhood", "cross", "--bins", "global", "--count", "1")[1]
    assert len(rows) == 576
    assert "rank correlation with the mean cosine" in capsys.readouterr().out


def test_maps_are_what_the_method_scored(draw, source):
    rows = draw("maps", "--count", "2", "--questions", "What?", "--pruners", "script", "--score", "relevance")[1]
    found = source.look(load_picture("square336"), "What?", get_pruner("script", keep_tokens=64))
    own = [float(row["value"]) for row in rows if row["picture"] == "a.png"]
    torch.testing.assert_close(torch.tensor(own), found.scores["relevance"][0].flatten(), atol=1e-5, rtol=1e-4)
    assert min(own) == 0
    assert max(own) == 1


def test_questions_and_methods_side_by_side(draw):
    asked = ("--count", "1", "--questions", "What?", "Where?", "--keep-tokens", "9")
    rows = draw("7", *asked, "--pruners", "script", "uniform", "fastv")[1]
    counts = {}
    for row in rows:
        counts[row["question"], row["method"]] = counts.get((row["question"], row["method"]), 0) + 1
    assert {key: count for key, count in counts.items() if key[1] != "fastv"} == {
        (question, method): 9 for question in ("What?", "Where?") for method in ("script", "uniform")
    }
    rows = draw("8", *asked, "--pruners", "script", "cdpruner:relevance=projector")[1]
    assert len(rows) == 4 * 576


def test_five_maps(draw):
    rows = draw("5", "--count", "1", "--questions", "Is there a dog?")[1]
    names = ["class attention", "divergence", "similarity", "relevance", "variance at selection"]
    assert list(dict.fromkeys(row["map"] for row in rows)) == names
    for name in names:
        values = [float(row["value"]) for row in rows if row["map"] == name]
        assert (min(values), max(values)) == (0, 1)


def test_bad_input_is_named_before_anything_loads(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "load_source", lambda options: pytest.fail("loaded"))
    given = ["--pictures", str(folder), "--output", str(tmp_path / "a.png")]
    asked = ["--questions", "What?", *given]
    for arguments, message in (
        (["3a", *given, "--count", "3"], "has 2 pictures"),
        (["3a", "--pictures", str(tmp_path), "--output", str(tmp_path / "a.png")], "has 0 pictures"),
        (["3a", "--pictures", str(folder), "--output", str(tmp_path / "a.txt")], ".png, .svg"),
        (["3a", "--pictures", str(folder), "--output", str(tmp_path / "no" / "a.png")], "there is no folder"),
        (["8", *asked, "--pruners", "divprune"], "divprune has no score called 'relevance'; it has order"),
        (["maps", *asked, "--pruners", "fastv"], "tells no score of every token"),
        (["maps", *asked, "--pruners", "uniform"], "tells no score of every token"),
        (["maps", *asked, "--pruners", "nonsense"], "unknown pruner"),
        (["maps", *asked, "--hf"], "--hf needs --model-path"),
    ):
        assert command.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_a_checkpoint_without_class_token_is_refused(source, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(type(source.tower), "class_tokens", 0)
    monkeypatch.setattr(source, "look", lambda *_: pytest.fail("looked"))
    monkeypatch.setattr(command, "load_source", lambda options: source)
    given = ["5", "--questions", "What?", "--pictures", str(folder), "--output", str(tmp_path / "a.png")]
    assert command.main(given) == 2
    assert "no class token" in capsys.readouterr().err


def test_every_method_says_its_scores():
    names = {name: scores.names_of(get_pruner(name)) for name in list_pruners()}
    assert names["script"] == ("redundancy", "kept_by_gsp", "relevance", "order")
    assert names["fastervlm"] == ("attention",)
    assert names["fastv"] == names["uniform"] == ()
    assert of_questions.methods_of(["script:tau=0.6"], 8)[0][1].tau == 0.6


def test_views_of_tiles():
    tiled = sources.OurSource(command.OurSubject(TILED, device="cpu"))
    picture = load_picture("square336")
    views = tiled.views(picture)
    assert len(views) > 1
    assert [plane.name for plane in tiled.planes(picture)] == ["overview", "tiles"]
    look = tiled.look(picture, "What?", get_pruner("script", keep_tokens=7))
    assert [int(kept.sum()) for kept in look.kept] == [7] * len(views)
    assert look.scores["redundancy"][0].shape == (24, 24)


def test_a_fixed_grid(tmp_path, folder, capsys):
    """The setting of the paper's LLaVA-NeXT: five views of any picture; refused where nothing is cut into tiles."""
    tiled = sources.OurSource(command.OurSubject(TILED, device="cpu", grid=(672, 672)))
    picture = load_picture("small97x61")
    assert [plane.views for plane in tiled.planes(picture)] == [((0,),), ((1, 2), (3, 4))]
    look = tiled.look(picture, "What?", get_pruner("random", keep_tokens=7, exclude_padding=False))
    assert [int(kept.sum()) for kept in look.kept] == [7] * 5
    given = ["3a", "--pictures", str(folder), "--image-grid", "672x672", "--output", str(tmp_path / "a.png")]
    assert command.main([*given, "--model-path", TINY, "--device", "cpu"]) == 2
    assert "a fixed grid is for checkpoints that cut pictures into tiles" in capsys.readouterr().err
    assert command.main([*given, "--model-path", TINY, "--hf"]) == 2
    assert "--image-grid is for checkpoints of LLaVA's own format" in capsys.readouterr().err


def test_tokens_that_a_method_cannot_choose_have_no_score(source):
    """A row of padding into which the picture's edge bleeds when it is resized."""
    picture = Image.new("RGB", (448, 336), "red")
    (view,) = source.seen(picture)
    look = source.look(picture, "Is it red?", get_pruner("random", keep_tokens=432, exclude_padding=True))
    assert view.shows.sum() == 432
    assert torch.equal(look.kept[0], view.shows)


def test_questions_are_drawn_as_they_are_written(draw):
    asked = ("--questions", "Is it $5 or $x^?", "--pruners", "random", "--count", "1", "--keep-tokens", "9")
    assert len(draw("7", *asked)[1]) == 9


def test_the_librarys_class_is_seen_as_our_own(tmp_path_factory):
    """The toy in both formats: the same tokens, scores and kept tokens, cell by cell."""
    target = tmp_path_factory.mktemp("converted") / "llava-toy-v1.5"
    toy = str(TOY_FOLDER / "llava-toy-v1.5")
    convert(toy, target)
    ours = sources.OurSource(command.OurSubject(toy, device="cpu"))
    clip = str(TOY_FOLDER / "clip-toy-336")
    theirs = library_source.LibrarySource(command.LibrarySubject(str(target), "cpu", "auto", clip))
    picture = load_picture("square336")
    for features in sources.FEATURES:
        own, other = (source.views(picture, features)[0] for source in (ours, theirs))
        torch.testing.assert_close(own.tokens, other.tokens, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(own.colours, other.colours, atol=1e-3, rtol=0)
    method = get_pruner("script", keep_tokens=16)
    own, other = (source.look(picture, "Is there a star?", method) for source in (ours, theirs))
    assert torch.equal(own.kept[0], other.kept[0])
    assert own.scores.keys() == other.scores.keys()
    torch.testing.assert_close(own.scores["relevance"][0], other.scores["relevance"][0], atol=1e-3, rtol=0)
    attentive = get_pruner("fastervlm", keep_tokens=16)
    own, other = (
        source.look(picture, "Is there a star?", attentive).scores["attention"][0] for source in (ours, theirs)
    )
    torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-3)
