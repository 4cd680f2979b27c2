"""Calibrating heads on the toy: the file it writes, what it asks about, and bad input before any model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava.eval.measure import calibrate_heads
from llava.eval.measure.calibrate_heads import Case, Subject, calibrate, main, read_cases
from llava.model.builder import TOY_FOLDER
from llava.relevance.heads import HeadWeights

GQA = TOY_FOLDER / "data" / "eval" / "gqa"


@pytest.fixture
def inputs(tmp_path):
    """Two empty pictures, and files of questions."""
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "questions.txt").write_text("What is it?\n\nWhere is it?\nWho is it?\n")
    rows = [
        ("a.jpg", "Who?"),
        ("a.jpg", "Who?\nAnswer the question using a single word or phrase."),
        ("a.jpg", "Why?"),
    ]
    rows += [("b.png", "Who?"), ("far/c.jpg", "When?"), ("far/c.jpg", "Where?")]
    lines = [json.dumps({"image": image, "text": text, "question_id": 1}) for image, text in rows]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_lines_are_asked_in_pairs_in_turn(inputs):
    cases = read_cases(inputs, inputs / "questions.txt", 50)
    assert [case.picture.name for case in cases] == ["a.jpg", "b.png"]
    assert [case.questions for case in cases] == [("What is it?", "Where is it?"), ("Who is it?", "What is it?")]
    assert read_cases(inputs, inputs / "questions.txt", 1) == cases[:1]


def test_json_lines_give_a_picture_its_own_two_different_questions(inputs):
    assert read_cases(inputs, inputs / "questions.jsonl", 50) == [Case(inputs / "a.jpg", ("Who?", "Why?"))]
    (inputs / "list.txt").write_text(f"{inputs / 'b.png'}\n{inputs / 'a.jpg'}\n")
    assert len(read_cases(inputs / "list.txt", inputs / "questions.txt", 50)) == 2


@pytest.mark.parametrize(
    "pictures, questions, message",
    [
        ("empty", "questions.txt", "holds no picture"),
        ("missing.txt", "questions.txt", "nowhere.jpg is no picture"),
        ("nothing", "questions.txt", "nothing"),
        (".", "one.txt", "holds 1 different questions"),
        (".", "bad.jsonl", "bad.jsonl, line 2: not JSON with"),
        (".", "others.jsonl", "about no picture of"),
    ],
)
def test_bad_input_is_named_before_a_model_is_loaded(inputs, monkeypatch, capsys, pictures, questions, message):
    (inputs / "empty").mkdir()
    (inputs / "missing.txt").write_text("nowhere.jpg\n")
    (inputs / "one.txt").write_text("Who?\nWho?\n")
    (inputs / "bad.jsonl").write_text('{"image": "a.jpg", "text": "Who?"}\n{"image": "a.jpg"}\n')
    (inputs / "others.jsonl").write_text('{"image": "z.jpg", "text": "Who?"}\n')
    monkeypatch.setattr(calibrate_heads, "read_ours", lambda *_: pytest.fail("a model was loaded"))
    out = inputs / "heads.json"
    given = ["--pictures", str(inputs / pictures), "--questions", str(inputs / questions), "--out", str(out)]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_place_that_is_not_there_is_named_before_a_model_is_loaded(inputs, monkeypatch, capsys):
    monkeypatch.setattr(calibrate_heads, "read_ours", lambda *_: pytest.fail("a model was loaded"))
    out = inputs / "nowhere" / "heads.json"
    assert main(["--pictures", str(inputs), "--questions", str(inputs / "questions.txt"), "--out", str(out)]) == 2
    assert f"--out {out}: there is no folder" in capsys.readouterr().err


def test_the_toy_is_calibrated_and_its_file_fits_it_alone(tmp_path, capsys):
    out = tmp_path / "heads.json"
    questions = GQA / "llava_gqa_testdev_balanced.jsonl"
    given = ["--pictures", str(GQA / "data" / "images"), "--questions", str(questions), "--out", str(out)]
    assert main([*given, "--limit", "3", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert "3 pictures are few" in printed.err
    assert "weights of 4 heads of layer 0" in printed.out
    weights = HeadWeights.read(out)
    assert (weights.layers, weights.layer, weights.heads, weights.head_dim) == (8, 0, 4, 32)
    assert sum(weights.weights) == pytest.approx(4, abs=1e-3)
    assert "3 pictures" in weights.made


def test_a_head_that_follows_the_question_gets_all_the_weight_of_one_that_never_does():
    """Head 0 looks at the token that the word names, head 1 at the first token whatever is asked."""
    word = {"one": torch.eye(4)[1], "two": torch.eye(4)[2]}
    same = 9 * torch.eye(4)[:1].expand(1, 1, 4)
    attention = SimpleNamespace(
        **{"layer": 0, "layers": 2, "heads": 2, "head_dim": 4, "scaling": 1.0},
        queries=lambda words: torch.stack([9 * words, same.expand_as(words)], 2),
        keys=lambda tokens: torch.stack([tokens, tokens], 2),
    )
    subject = Subject(
        "made up", attention, lambda text: word[text][None], lambda _: (torch.eye(4)[None], torch.ones(1, 4).bool())
    )
    weights = calibrate(subject, [Case(Path("a"), ("one", "two")), Case(Path("b"), ("two", "one"))], "by hand")
    assert weights.weights == pytest.approx((2.0, 0.0), abs=1e-4)
    with pytest.raises(ValueError, match="no head looks elsewhere"):
        calibrate(subject, [Case(Path("a"), ("one", "one"))], "by hand")
