"""Figures of benchmark runs: a sweep on a tiny checkpoint, bars and radar from given scores, a day on a GPU."""

import csv
import json
from types import SimpleNamespace

import gpu_day
import pytest
from small_pope import write_pope

from llava.eval.figures import command, of_runs
from llava.eval.runner import run
from llava.model.builder import TOY_FOLDER
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


# --- a day on a GPU ------------------------------------------------------------------------------------------------


@pytest.fixture
def day(data, tmp_path, monkeypatch):
    """The day's command on a tiny checkpoint; parts are not run but noted, and end with ``codes``."""
    done, codes = [], {}

    def do(self, part):
        done.append(part.name)
        (self.options.out / "logs" / f"{part.name}.log").write_text("said\n")
        code = codes.get(part.name, 0)
        self.record(part).write_text(json.dumps({"command": list(part.command), "code": code, "seconds": 60.0}))

    monkeypatch.setattr(gpu_day.Day, "do", do)
    monkeypatch.setattr(gpu_day.Day, "probe", lambda *_: (0.5, 20.0))
    given = ["--ckpt-dir", str(TINY.parent), "--checkpoints", TINY.name, "--data-root", str(data), "--out"]
    given += [str(tmp_path / "out"), "--output-root", str(tmp_path / "runs"), "--methods", "script", "random"]
    given += ["--budgets", "16", "8", "--benchmarks", "pope", "gqa", "--presets", "toy", "--device", "cpu"]
    return lambda *more: gpu_day.main([*given, *more]), done, codes


def test_the_plan_says_how_long_and_what_is_left_out(day, capsys):
    command, done, _ = day
    assert command("--plan") == 0
    printed = capsys.readouterr().out
    assert "12 questions of 0.50 s unpruned, 20 s to load" in printed
    assert f"all of benchmark: {gpu_day.duration(5 * 26.0)} left" in printed  # full, and two methods at two budgets
    assert "a guess: never measured on a GPU" in printed
    assert "LEFT OUT: gqa on llava-v1.5-tiny" in printed
    assert done == []


def test_the_day_goes_on_and_reports(day, tmp_path, capsys):
    command, done, codes = day
    codes |= {"audit-llava-v1.5-tiny": 1, "efficiency-toy": 2}  # an audit that found something is done
    assert command() == 1
    assert "failed: efficiency-toy" in capsys.readouterr().out
    assert len(done) == 1 + 1 + 1 + 1 + 5
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| efficiency-toy | 2 | 1.0 min |" in report
    assert "left out: gqa" in report
    assert (tmp_path / "out" / "gpu_day.tar.gz").is_file()
    done.clear()
    codes.clear()
    assert command() == 0
    assert done == ["efficiency-toy"]


def test_a_missing_checkpoint_is_named_first(day, capsys):
    command, done, _ = day
    assert command("--checkpoints", "nothing") == 2
    assert "no checkpoint at" in capsys.readouterr().err
    assert command("--methods", "nonsense") == 2
    assert done == []


def test_whose_scripts_ask_a_checkpoint():
    assert gpu_day.family_of(TOY_FOLDER / "llava-toy-v1.5") == "v1_5"
    assert gpu_day.family_of(TOY_FOLDER / "llava-toy-v1.6") == "v1_6"
    with pytest.raises(ValueError, match="no LLaVA in the original format"):
        gpu_day.family_of(TOY_FOLDER / "clip-toy-336")
