"""Tables from one command: intervals by another way, one-sided tests, rows from runs, what is refused first."""

import json

import numpy as np
import pytest
from small_pope import write_pope

from llava.eval.benchmarks import mme, pope
from llava.eval.measure import redundancy
from llava.eval.tables import command, of_the_paper
from llava.eval.tables.resampling import Resampled, paired
from llava.eval.tables.significance import compare
from llava.eval.tables.study import Spec, parse_spec
from records import GOLDEN

TINY = str(GOLDEN / "checkpoints" / "llava-v1.5-tiny")


def pope_score(seed, count=40):
    """POPE's scorer on drawn answers: its result, questions and labels."""
    drawn = np.random.default_rng(seed)
    answers, questions, labels = [], [], {name: [] for name in pope.CATEGORIES}
    for number in range(3 * count):
        category = pope.CATEGORIES[number % 3]
        text, image = f"Is there a {number}?", f"{number}.png"
        truth, said = drawn.choice(["yes", "no"], 2)
        questions.append({"question_id": number, "image": image, "text": text, "category": category})
        labels[category].append({"image": image, "text": text, "label": truth})
        answers.append({"question_id": number, "text": said})
    return pope.score(answers, questions, labels), answers, questions, labels


def test_pope_resampled_is_pope_scored_again():
    """Weights 0, 1, 2 of an answer: the scorer's own F1 over answers left out and doubled."""
    score, answers, questions, labels = pope_score(0)
    found = Resampled("pope", score)
    weights = {part: np.ones((1, len(names))) for part, names in found.parts.items()}
    kept = pope.CATEGORIES[0]
    left_out = found.parts[kept][:7]
    weights[kept][0, :7] = 0
    lost = set(left_out)
    fewer = pope.score(
        [answer for answer in answers if str(answer["question_id"]) not in lost],
        [question for question in questions if str(question["question_id"]) not in lost],
        labels,
    )
    assert found.scores(weights)[0] == pytest.approx(fewer["score"])
    assert found.scores({part: 2 * w for part, w in weights.items()})[0] == pytest.approx(fewer["score"])


def test_a_category_of_pope_that_was_not_asked_does_not_count():
    score, answers, questions, labels = pope_score(0)
    first = pope.CATEGORIES[0]
    own = [question for question in questions if question["category"] == first]
    ids = {question["question_id"] for question in own}
    limited = pope.score([answer for answer in answers if answer["question_id"] in ids], own, labels)
    assert limited["score"] == pytest.approx(100 * score["categories"][first]["f1"])
    found = Resampled("pope", limited)
    assert list(found.parts) == [first]
    low, high = found.interval()
    assert low < limited["score"] < high


def test_mme_resampled_keeps_an_images_two_questions_together():
    rows = {
        "color": [
            (f"{i}.jpg", q, "Yes", answer)
            for i, pair in enumerate(("yy", "yn", "nn"))
            for q, answer in zip(("a", "b"), ({"y": "Yes", "n": "No"}[letter] for letter in pair), strict=True)
        ],
    }
    found = Resampled("mme", mme.score(rows))
    assert found.parts == {"color": ["0.jpg", "1.jpg", "2.jpg"]}
    ones = np.ones((1, 3))
    assert found.scores({"color": ones})[0] == pytest.approx(100 * (0.5 + 1 / 3))
    assert found.scores({"color": np.array([[2, 1, 0]])})[0] == pytest.approx(100 * (2.5 / 3 + 2 / 3))


def test_intervals():
    items = {str(number): float(number % 4 > 0) for number in range(400)}
    found = Resampled("gqa", {"score": 75.0, "items": items})
    low, high = found.interval()
    spread = 100 * (0.75 * 0.25 / 400) ** 0.5
    assert low == pytest.approx(75 - 1.96 * spread, abs=1)
    assert high == pytest.approx(75 + 1.96 * spread, abs=1)
    with pytest.raises(ValueError, match="not what its items give"):
        Resampled("gqa", {"score": 74.0, "items": items})
    with pytest.raises(ValueError, match="same questions"):
        paired(found, Resampled("gqa", {"score": 100.0, "items": {"x": 1.0}}), 3)


def test_one_sided_tests_reach_the_least_p():
    pytest.importorskip("scipy")
    better = [float(number) for number in range(1, 21)]
    found = compare(better, [0.0] * 20, "greater")
    assert found.wilcoxon == pytest.approx(2**-20)
    assert compare([0.0] * 20, better, "greater").wilcoxon == pytest.approx(1)
    assert compare(better, [0.0] * 20).wilcoxon == pytest.approx(2**-19)


def test_which_methods_draw():
    assert parse_spec("random").is_random
    assert of_the_paper.PARTS[0].is_random
    assert not any(spec.is_random for spec in of_the_paper.PARTS[1:])
    assert not parse_spec("divprune").is_random
    assert not Spec("unpruned").is_random
    with pytest.raises(ValueError, match="no option"):
        parse_spec("divprune:x=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pope(tmp_path_factory.mktemp("data"))


def given(data, out):
    roots = ["--model-path", TINY, "--data-root", str(data), "--output-root", str(out), "--device", "cpu"]
    return [*roots, "--batch-size", "12"]


def test_tables_1_and_11_and_going_on(data, tmp_path, capsys, monkeypatch):
    pytest.importorskip("scipy")
    first = ["1", *given(data, tmp_path), "--count", "1", "--repeats", "1", "--json", str(tmp_path / "1.json")]
    assert command.main(first) == 0
    printed = capsys.readouterr().out
    assert "58 of 576 tokens kept" in printed
    rows = json.loads((tmp_path / "1.json").read_text())["rows"]
    assert [row[0] for row in rows] == ["exhaustive", "bipartite", "random"]
    assert [row[1] for row in rows] == ["100.0", "50.1", "0.0"]
    monkeypatch.setattr(redundancy, "read_features", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr("llava.eval.runner.run.Run.load", lambda *_: pytest.fail("asked again"))
    assert command.main(first) == 0
    assert capsys.readouterr().out == printed
    again = ["11", *given(data, tmp_path), "--keep-tokens", "0.1", "--benchmark", "pope", "--resample", "--runs", "6"]
    exhaustive = "script:relevance=none,dpp=false,graph=exhaustive,tau=0.5,gamma=1"
    assert command.main([*again, "--pruners", exhaustive, "random"]) == 0  # both were asked for Table 1
    printed = capsys.readouterr().out
    assert "least Wilcoxon p is 2^-6" in printed
    assert "resamples of the items of one run" in printed


def test_equal_runs_are_said_to_be_equal(data, tmp_path, capsys):
    pytest.importorskip("scipy")
    arguments = ["11", *given(data, tmp_path), "--keep-tokens", "4", "--benchmark", "pope", "--runs", "2"]
    assert command.main([*arguments, "--pruners", "random", "uniform"]) == 0
    printed = capsys.readouterr().out
    assert "uniform is deterministic" in printed
    assert "random is deterministic" not in printed
    assert len(list(tmp_path.glob("pope/answers/*/*/*.run"))) == 3  # two seeds of one, one run of the other


def test_bad_input_comes_before_any_run(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llava.eval.runner.run.Run.load", lambda *_: pytest.fail("asked"))
    for arguments, message in (
        (["1", *given(data, tmp_path), "--count", "2"], "has 1 pictures, not 2"),
        (["5", *given(data, tmp_path)], "MME"),
        (["6", *given(data, tmp_path), "--pruners", "nonsense"], "unknown pruner"),
        (["11", *given(data, tmp_path), "--runs", "1"], "--runs must be at least 2"),
        (["11", *given(data, tmp_path), "--image-grid", "672x672", "--benchmark", "pope"], "cut pictures into tiles"),
    ):
        assert command.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.run"))
