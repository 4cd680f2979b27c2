"""The flags that commands share: the same names, defaults and refusals everywhere."""

import argparse

import pytest

from llava.eval.lmms_eval import launcher
from llava.eval.measure import efficiency
from llava.eval.runner import run
from llava.pruning import get_pruner
from llava.serve import cli, flags


def test_commands_agree_on_what_they_share():
    given = ["--pruner", "divprune", "--keep-tokens", "0.25", "--pruner-args", "a=b", "c=d", "--device", "cuda:1"]
    given += ["--dtype", "float16", "--model-path", "X", "--conv-mode", "plain"]
    parsed = [command.parse_arguments(given) for command in (run, cli, launcher)]
    names = ("pruner", "keep_tokens", "pruner_args", "device", "dtype", "model_path", "conv_mode")
    assert len({str([getattr(one, name) for name in names]) for one in parsed}) == 1
    defaults = [command.parse_arguments([]) for command in (run, cli)]
    shared = (*names, "model_base", "attn_implementation")
    assert len({str([getattr(one, name) for name in shared]) for one in defaults}) == 1
    assert efficiency.parse_arguments([]).device == "auto"


def test_the_harness_needs_a_checkpoint(capsys):
    with pytest.raises(SystemExit):
        launcher.parse_arguments([])
    assert "--model-path" in capsys.readouterr().err


def test_a_method_is_checked_also_where_nothing_is_pruned():
    assert flags.make_pruner("script", "full", []) is None
    with pytest.raises(ValueError, match="unknown pruner 'x'"):
        flags.make_pruner("x", "full", [])
    with pytest.raises(ValueError, match="no option colour"):
        flags.make_pruner("script", "full", ["colour=1"])
    assert flags.make_pruner("script", "auto", []).keep_tokens == "auto:0.95"
    with pytest.raises(ValueError, match="'divprune' needs a count or a share"):
        flags.make_pruner("divprune", "auto", [])
    assert flags.make_pruner("script", "0.5", ["tau=0.3"]) == get_pruner("script", keep_tokens=0.5, tau=0.3)


def test_a_seed_is_for_methods_of_chance_and_an_option_wins():
    assert flags.make_pruner("random", "4", [], seed=3).seed == 3
    assert flags.make_pruner("random", "4", ["seed=5"], seed=3).seed == 5
    assert flags.make_pruner("divprune", "4", [], seed=3) == get_pruner("divprune", keep_tokens=4)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", ""])
def test_counts_begin_at_one(text):
    assert flags.at_least_one("7") == 7
    with pytest.raises(argparse.ArgumentTypeError, match="from 1"):
        flags.at_least_one(text)
