"""The command that compares what can be chosen on a CPU: every combination once, ratios to the first."""

import json

import pytest
import torch

from llava.eval.measure import cpu_settings
from llava.eval.measure.cpu_settings import Setting, Times, figures_of, main, settings_of


def test_all_combinations_and_the_plainest_one_first():
    settings = settings_of(["float32", "bfloat16"], [1, 2, 2], (False, True))
    assert settings[0] == Setting("float32", 2, compiled=False, pruned=False)
    assert len(settings) == len(set(settings)) == 16


def test_ratios_are_within_a_repeat():
    one, other = Setting("float32", 2, False, False), Setting("bfloat16", 2, False, True)
    found = {one: Times([4.0, 40.0, 4.0], [0.2] * 3), other: Times([1.0, 10.0, 2.0], [0.1] * 3)}
    rows = figures_of(found)
    assert [row["first_token_times_faster"] for row in rows] == [1.0, 4.0]
    assert [row["first_token_ms"] for row in rows] == [4000.0, 2000.0]
    assert rows[1]["further_token_times_faster"] == 2.0


def test_the_command_prints_a_table_and_json(capsys):
    threads = torch.get_num_threads()
    arguments = ["--preset", "toy", "--keep-tokens", "16", "--repeats", "1", "--new-tokens", "2", "--threads", "1"]
    assert main([*arguments, "--no-compile"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 + 4 + 1
    rows = json.loads(out[-1])["rows"]
    assert [(row["dtype"], row["pruned"]) for row in rows] == [
        ("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True),
    ]  # fmt: skip
    assert all(row["first_token_ms"] > 0 for row in rows)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--new-tokens", "1"], "--new-tokens must be at least 2"),
        (["--pruner", "nothing"], "unknown pruner 'nothing'"),
        (["--pruner", "script:tau=9"], "tau must be"),
    ],
)
def test_bad_input_is_answered_before_a_model_is_built(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(cpu_settings, "load_subject", None)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
