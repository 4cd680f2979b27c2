"""The audit: what it says of methods that keep their promises, and of those that do not."""

import json

import pytest
import torch
from convert_to_transformers import convert
from PIL import Image

from llava.eval.audit import __main__ as command
from llava.eval.audit import checks
from llava.eval.audit.library import LibrarySubject
from llava.eval.audit.ours import OurSubject
from llava.eval.audit.pictures import load_pictures, painted
from llava.eval.audit.subject import promised
from llava.integrations.transformers import KeptPicture, selection
from llava.layout.views import padded_square_layout
from llava.model.builder import DEFAULT_CHECKPOINT, TOY_FOLDER
from llava.pruning import Selection, get_pruner
from llava.pruning.base import ViewMethod


@pytest.fixture(scope="module")
def subject():
    return OurSubject(DEFAULT_CHECKPOINT, device="cpu")


@pytest.fixture(scope="module")
def scenes():
    return load_pictures(TOY_FOLDER / "data", 2)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The toy on the library's class."""
    folder = tmp_path_factory.mktemp("converted") / "toy"
    convert(DEFAULT_CHECKPOINT, folder)
    return LibrarySubject(str(folder), "cpu", "auto")


def by_name(findings):
    return {finding.check: finding for finding in findings}


def test_photographs_come_with_licences_and_boxes():
    entries = json.loads((command.PHOTOGRAPHS / "audit.json").read_text())["pictures"]
    assert len(entries) >= 5
    assert all(entry["licence"] for entry in entries)
    for picture in load_pictures(command.PHOTOGRAPHS):
        assert len(picture.questions) == 2
        assert all(question.answers for question in picture.questions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": []}, "cup.png has 0 questions"),
        ({"image": "gone.png"}, "gone.png"),
        ({"image": "../cup.png"}, "outside"),
        ({"box": [0, 0, 9, 5]}, "does not lie in its 8 x 6 pixels"),
        ({"box": [3, 3, 3, 5]}, "does not lie in its 8 x 6 pixels"),
        ({"rephrased": ""}, "lacks rephrased"),
    ],
)
def test_what_is_wrong_in_a_folder_is_named(tmp_path, change, message):
    Image.new("RGB", (8, 6)).save(tmp_path / "cup.png")
    question = {
        "text": "What?",
        "rephrased": change.get("rephrased", "Which?"),
        "boxes": [change.get("box", [0, 0, 8, 6])],
    }
    entry = {"image": "cup.png", "questions": [question, question]} | {
        key: value for key, value in change.items() if key in ("image", "questions")
    }
    (tmp_path / "audit.json").write_text(json.dumps({"pictures": [entry]}))
    with pytest.raises((ValueError, OSError), match=message):
        load_pictures(tmp_path)


def test_an_area_under_the_curve_by_hand():
    scores, positive = torch.tensor([0.9, 0.4, 0.4, 0.1]), torch.tensor([True, True, False, False])
    assert checks.area_under_curve(scores, positive) == (1 + 1 + 0.5 + 1) / 4
    assert checks.area_under_curve(-scores, positive) == 1 - (1 + 1 + 0.5 + 1) / 4


def test_places_are_found_in_order_or_not_at_all():
    whole = torch.arange(12.0).reshape(6, 2)
    assert checks.matched(whole, whole[[0, 2, 5]]) == [0, 2, 5]
    assert checks.matched(whole, whole[[2, 0, 5]]) == [2, 5]
    assert checks.matched(whole, whole[[1]] + 1e-3) == []


def test_answers_are_right_by_whole_words():
    assert checks.is_right("It is Red.", ["red"])
    assert not checks.is_right("It is reddish.", ["red"])
    assert checks.is_right("3", ["3", "three"])


def test_tokens_that_show_the_picture_are_those_that_are_no_padding(subject, scenes):
    """Painting and looking, against the geometry of a padded square."""
    image = scenes[0].image
    assert image.size == (336, 224)
    assert torch.equal(subject.eligible(image), padded_square_layout(image.size, 24).eligible.flatten())
    left, top, right, bottom = scenes[0].questions[0].boxes[0]
    shown = subject.shows(image, scenes[0].questions[0].boxes).reshape(24, 24)
    rows, columns = shown.any(1).nonzero().flatten() * 14 - 56, shown.any(0).nonzero().flatten() * 14
    assert top - 7 <= rows.min() <= top + 7
    assert left - 7 <= columns.min() <= left + 7
    assert (rows.max() + 14 - bottom).abs() <= 7
    assert (columns.max() + 14 - right).abs() <= 7
    assert painted(image, ((0, 0, 2, 2),)).getpixel((1, 1)) == (255, 255, 255)


def test_script_passes_on_the_toy_and_the_release_is_told_its_sign(subject, scenes):
    found = by_name(command.audit(subject, get_pruner("script", keep_tokens=8), scenes, 8))
    assert not [name for name, finding in found.items() if finding.passed is False]
    assert found["finds what is asked"].figures["auc"] > 0.9
    assert found["reads the question"].figures["questions_overlap"] < 0.9
    released = checks.finds_what_is_asked(subject, get_pruner("script_release", keep_tokens=8), scenes)
    assert by_name(released)["SIGN"].passed is False
    assert "THE SIGN OF RELEVANCE IS WRONG HERE" in by_name(released)["SIGN"].text


def test_methods_without_a_question_keep_the_same_tokens(subject, scenes):
    (finding,) = checks.reads_the_question(subject, get_pruner("divprune", keep_tokens=8), scenes)
    assert finding.check == "does not read the question"
    assert finding.passed
    (blind,) = checks.reads_the_question(subject, get_pruner("script", keep_tokens=8, relevance="none"), scenes)
    assert blind.passed


def test_a_method_that_says_it_reads_and_does_not_is_caught(subject, scenes, monkeypatch):
    method = get_pruner("cdpruner", keep_tokens=8)

    def the_first(self, inputs, keep=None):
        keep = self.count(inputs.tokens) if keep is None else keep
        return Selection(torch.stack([view.nonzero().flatten()[:keep] for view in inputs.valid]), inputs.tokens)

    monkeypatch.setattr(ViewMethod, "select", the_first)
    (finding,) = checks.reads_the_question(subject, method, scenes)
    assert finding.check == "reads the question"
    assert finding.passed is False


# --- made tokens are counted by the method's word, not by the host's -----------------------------------------------

MAKERS = [("pool", {}), ("restore", {"method": "divprune"})]


def counted(subject, scenes, name, options):
    method = get_pruner(name, keep_tokens=9, **options)
    return by_name(checks.keeps_count_order_and_text(subject, method, scenes))


@pytest.mark.parametrize("host", ["subject", "library"])
@pytest.mark.parametrize("name, options", MAKERS)
def test_both_hosts_tell_made_tokens_from_kept_ones(request, host, scenes, name, options):
    found = counted(request.getfixturevalue(host), scenes, name, options)
    assert not [title for title, finding in found.items() if finding.passed is False]
    figures = found["count = promised"].figures
    assert (figures["kept"], figures["made"]) == figures["promised"] == ((0, 9) if name == "pool" else (5, 4))
    assert found["order of reading"].figures == {"others": figures["made"]} | {
        "matched": found["order of reading"].figures["matched"]
    }


@pytest.mark.parametrize("name, options", MAKERS)
def test_a_made_token_too_few_is_found(library, scenes, monkeypatch, name, options):
    places = selection.evenly_spaced
    monkeypatch.setattr(selection, "evenly_spaced", lambda columns, count: places(columns, count - 1))
    found = counted(library, scenes, name, options)
    assert found["cache = text + kept"].passed  # cache and prompt are both short of one
    assert found["count = promised"].passed is False
    assert found["order of reading"].passed is False


def test_a_host_that_calls_made_tokens_kept_is_found(library, scenes, monkeypatch):
    monkeypatch.setattr(KeptPicture, "as_they_are", property(lambda self: self.kept))
    monkeypatch.setattr(KeptPicture, "count_made", property(lambda self: 0))
    found = counted(library, scenes, "pool", {})
    assert found["order of reading"].passed  # what is read is right, what is told is not
    assert found["count = promised"].passed is False


def test_kept_tokens_too_few_are_found(library, scenes, monkeypatch):
    choose = selection.Contest
    monkeypatch.setattr(selection, "Contest", lambda *given: choose(*given[:3], given[3] - 1, *given[4:]))
    found = by_name(checks.keeps_count_order_and_text(library, get_pruner("divprune", keep_tokens=9), scenes))
    assert found["cache = text + kept"].passed
    assert found["count = promised"].passed is False


def test_what_a_method_promises():
    views = [torch.ones(16, dtype=torch.bool), torch.arange(16) < 3]
    assert promised(get_pruner("divprune", keep_tokens=4), views) == (4 + 3, 0)
    assert promised(get_pruner("divprune", keep_tokens=4, exclude_padding=False), views) == (8, 0)
    assert promised(get_pruner("divprune", keep_tokens=8, per="picture"), views) == (8, 0)
    assert promised(get_pruner("divprune", keep_tokens=4, scope="global"), views) == (8, 0)
    assert promised(get_pruner("pool", keep_tokens=4), views) == (0, 8)
    assert promised(get_pruner("script", keep_tokens="auto"), views) is None
    assert promised(get_pruner("fastv", keep_tokens=4), views) is None


def test_the_command_writes_what_it_found(tmp_path, capsys):
    report, plot = tmp_path / "a.json", tmp_path / "a.svg"
    arguments = ["--pruner", "divprune", "pool", "--keep-tokens", "8", "--limit", "1", "--device", "cpu"]
    command.main([*arguments, "--json", str(report), "--plot", str(plot)])
    out = capsys.readouterr().out
    assert "| `divprune` | kept | 1.00 |" in out
    written = json.loads(report.read_text())
    assert set(written["methods"]) == {"divprune", "pool"}
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pruner", "scrypt"], "unknown pruner"),
        (["--pictures", "/nowhere"], "no audit.json in /nowhere"),
        (["--model-path", "/nowhere"], "/nowhere"),
        (["--keep-tokens", "0"], "keep_tokens must be"),
    ],
)
def test_bad_input_ends_before_work(capsys, arguments, message):
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err
