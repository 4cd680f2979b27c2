"""Figures of benchmark runs: a sweep on a tiny checkpoint, bars and radar from given scores."""

import csv
from types import SimpleNamespace

import pytest
from small_pope import write_pope

from llava.eval.figures import command, of_runs
from llava.eval.runner import run
from records import GOLDEN

TINY = GOLDEN / "checkpoints" / "llava-v1.5-tiny"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pope(tmp_path_factory.mktemp("data"))


def rows_of(path):
    with path.with_suffix(".csv").open() as file:
        return list(csv.DictReader(file))


def test_a_sweep(data, tmp_path, capsys, monkeypatch):
    output = tmp_path / "a.png"
    given = ["sweep", "--option", "tau", "--values", "0.3", "0.9", "--output", str(output), "--keep-tokens", "5"]
    given += ["--model-path", str(TINY), "--data-root", str(data), "--output-root", str(tmp_path), "--device", "cpu"]
    given += ["--batch-size", "12"]
    assert command.main(given) == 0
    rows = rows_of(output)
    assert [row["value"] for row in rows] == ["0.3", "0.9", "unpruned"]
    assert all(float(row["low"]) <= float(row["score"]) <= float(row["high"]) for row in rows)
    monkeypatch.setattr(run.Run, "load", lambda *_: pytest.fail("asked again"))
    assert command.main(given) == 0  # goes on where it was: nothing is left
    capsys.readouterr()
    given[given.index("tau")] = "nonsense"
    assert command.main(given) == 2
    assert "script has no option 'nonsense'" in capsys.readouterr().err


def test_radar_and_bars(tmp_path, capsys, monkeypatch):
    scores = {"unpruned": {"pope": 80.0, "gqa": 50.0, "sqa": 60.0}, "random": {"pope": 40.0, "gqa": 25.0, "sqa": 30.0}}

    class Asked(of_runs.Study):
        def plan(self, benchmarks, specs):
            self.keys = [(name, spec) for name in benchmarks for spec in specs]

        def ask_all(self):
            found = ({"score": scores[spec.label][name]} if name != "vqav2" else None for name, spec in self.keys)
            return {key: SimpleNamespace(score=score) for key, score in zip(self.keys, found, strict=True)}

    monkeypatch.setattr(of_runs, "Study", Asked)
    output = tmp_path / "b.svg"
    given = ["2b", "--pruners", "random", "--output", str(output), "--benchmarks", "pope", "gqa", "vqav2"]
    assert command.main(given) == 2
    printed = capsys.readouterr()
    assert "only a server or a judge scores them: VQAv2" in printed.out
    assert "a radar needs three benchmarks" in printed.err
    assert command.main([*given, "sqa"]) == 0
    assert [float(row["percent_of_unpruned"]) for row in rows_of(output)] == [100, 100, 100, 50, 50, 50]
    heads = ["method", "prefill, ms", "POPE F1"]
    monkeypatch.setattr(of_runs, "table_6", lambda options: (heads, [["a", "–", "80.00 [79, 81]"]], ["a note"]))
    assert command.main(["2a", "--output", str(tmp_path / "a.svg")]) == 0
    assert rows_of(tmp_path / "a.svg")[0]["POPE F1"] == "80.00 [79, 81]"
