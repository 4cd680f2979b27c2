"""A day on a GPU: its plan and report on a tiny checkpoint, its guesses, and what an interruption leaves."""

import json
import os
import signal
import subprocess
import sys
import time

import gpu_day
import gpu_day_times as times
import pytest
from gpu_day_report import duration
from small_pope import write_pope

from llava.model.builder import TOY_FOLDER
from records import GOLDEN

TINY = GOLDEN / "checkpoints" / "llava-v1.5-tiny"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pope(tmp_path_factory.mktemp("data"))


@pytest.fixture
def day(data, tmp_path, monkeypatch):
    """The day's command on a tiny checkpoint; parts are not run but noted, and end with ``codes``."""
    done, codes = [], {}

    def do(self, part):
        (self.options.out / "logs" / f"{part.name}.log").write_text("said\n")
        if codes.get(part.name) == "interrupted":
            raise KeyboardInterrupt
        done.append(part.name)
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
    assert f"all of benchmark: {duration(5 * 26.0)} left" in printed  # full, and two methods at two budgets
    assert "a guess: as long as in Triton's interpreter" in printed
    assert "unknown  (a guess: no question was measured, and the paper's speed is a GPU's)" in printed
    assert "and 2 parts of unknown length" in printed
    assert "LEFT OUT: gqa on llava-v1.5-tiny" in printed
    assert done == []


def test_guesses_are_made_of_measured_questions(day, tmp_path, capsys):
    command, _, _ = day
    (tmp_path / "out" / "done").mkdir(parents=True)
    (tmp_path / "out" / "done" / "probe-pope-llava-v1.5-tiny.json").write_text('{"question": 0.5, "loading": 1}')
    assert command("--plan", "--limit", "1") == 0
    audit = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("audit-"))
    assert f"{2 * times.AUDIT_ANSWERS} answers of 0.5 s: a question of llava-v1.5-tiny, measured on this" in audit


def test_guesses_by_the_papers_speed():
    paper = times.paper_speed()
    assert paper.seconds == pytest.approx(0.246 + 16 * 0.029)
    assert paper.work == pytest.approx(times.work_of_preset("llava-v1.6-vicuna-7b"), rel=0.01)  # 41.7 TFLOPs
    whole = times.of_efficiency("llava-v1.6-vicuna-7b", 22, 5, paper)
    assert whole.seconds == pytest.approx(22 * 13 * paper.seconds, rel=0.01)
    assert "the paper's 246 ms + 16 x 29 ms" in whole.basis
    assert times.of_efficiency("internvl3-8b", 22, 5, paper).seconds == pytest.approx(22 * 13 * paper.seconds)
    less = times.of_efficiency("mid", 22, 5, paper)
    assert less.seconds < whole.seconds / 20
    assert "scaled to the work of mid" in less.basis


def test_the_day_goes_on_and_reports(day, tmp_path, capsys):
    command, done, codes = day
    codes |= {"audit-llava-v1.5-tiny": 1, "efficiency-toy": 2}  # an audit that found something is done
    assert command() == 1
    assert "failed with exit code 2: efficiency-toy" in capsys.readouterr().out
    assert len(done) == 1 + 1 + 1 + 1 + 5
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| efficiency-toy | 2 | 60 s |" in report
    assert "* left out: gqa" in report
    assert (tmp_path / "out" / "gpu_day.tar.gz").is_file()
    done.clear()
    codes.clear()
    assert command() == 0
    assert done == ["efficiency-toy"]


def test_an_interrupted_day_says_what_is_missing_and_goes_on(day, tmp_path, capsys):
    command, done, codes = day
    codes["kernels"] = "interrupted"
    assert command() == 130
    assert "stopped: the same command goes on" in capsys.readouterr().out
    report = (tmp_path / "out" / "report.md").read_text()
    assert "* not done, but begun: kernels\n* not done: selection-speed\n" in report
    assert "| audit-llava-v1.5-tiny | 0 | 60 s |" in report
    codes.clear()
    assert command() == 0
    assert done[:2] == ["audit-llava-v1.5-tiny", "kernels"]
    assert len(done) == 9


INNER = """
import pathlib, time
here = pathlib.Path({place!r})
(here / "begun").touch()
try:
    time.sleep(60)
except KeyboardInterrupt:
    (here / "inner").write_text("ended")
"""


def test_an_interruption_ends_what_a_part_has_started(tmp_path):
    """A part has processes of its own; the interruption reaches the day alone."""
    inner = INNER.format(place=str(tmp_path))
    part = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {inner!r}]).wait()"
    code = (  # whoever started the tests may have had SIGINT ignored, which processes inherit
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"import interruptible, sys; interruptible.finished([sys.executable, '-c', {part!r}], None, {str(tmp_path)!r})"
    )
    variables = {**os.environ, "PYTHONPATH": str(gpu_day.ROOT / "scripts")}
    day = subprocess.Popen([sys.executable, "-c", code], env=variables, stderr=subprocess.PIPE)
    for _ in range(600):
        if (tmp_path / "begun").exists():
            break
        time.sleep(0.1)
    os.kill(day.pid, signal.SIGINT)
    _, error = day.communicate(timeout=60)
    assert b"KeyboardInterrupt" in error
    assert (tmp_path / "inner").read_text() == "ended"


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
