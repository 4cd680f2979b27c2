"""The rule for an asked mean: it is met on pictures that it was not set on, and what cannot be met is said."""

from __future__ import annotations

import re

import pytest
import torch

from llava.eval.measure import calibrate_budget
from llava.eval.measure.calibrate_budget import main
from llava.model.builder import TOY_FOLDER
from llava.pruning import PruningInputs, get_pruner
from llava.pruning.auto_budget import AutoBudget, parse_auto
from llava.pruning.budget_curves import Curve, counts_of, rule_for_mean

POPE = TOY_FOLDER / "data" / "eval" / "pope"
BOUNDS = AutoBudget(floor=2, ceiling=60)


def selection_of(rule, pictures=240):
    """Scenes of 4 to 27 kinds of tokens."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(4, 28, (pictures, 1), generator=generator)
    centres = torch.randn(pictures, 28, 32, generator=generator)
    kind = (torch.rand(pictures, 80, generator=generator) * kinds).long()
    features = centres.gather(1, kind[:, :, None].expand(-1, -1, 32))
    features = features + 0.3 * torch.randn(features.shape, generator=generator)
    relevance = torch.rand(pictures, 80, generator=generator)
    return get_pruner("cdpruner", keep_tokens=str(rule)).select(PruningInputs(features, relevance=relevance))


def pictures_of(selection):
    names = ("unexplained", "kept_after", "alone")
    rows = zip(*(selection.details[name].split(1) for name in names), strict=True)
    return [[Curve(*row, units=1)] for row in rows]


@pytest.mark.parametrize("by", ["share", "gain"])
@pytest.mark.parametrize("mean", [12, 20, 32])
def test_the_mean_is_met_on_pictures_that_the_rule_was_not_set_on(by, mean):
    pictures = pictures_of(selection_of(BOUNDS))
    rule = rule_for_mean(pictures[:120], mean, BOUNDS, by)
    assert (rule.gain is None) == (by == "share")
    assert (rule.floor, rule.ceiling) == (2, 60)
    assert float(counts_of(pictures[:120], rule).mean()) == pytest.approx(mean, rel=0.01)
    assert float(counts_of(pictures[120:], rule).mean()) == pytest.approx(mean, rel=0.03)


def test_curves_tell_what_a_selection_by_the_rule_keeps():
    pictures = pictures_of(selection_of(BOUNDS))
    for by in ("share", "gain"):
        rule = rule_for_mean(pictures, 20, BOUNDS, by)
        assert counts_of(pictures, rule).tolist() == selection_of(rule).eligible.sum(-1).tolist()


def test_a_mean_out_of_reach_is_refused():
    pictures = pictures_of(selection_of(AutoBudget(floor=10, ceiling=40), pictures=8))
    for mean in (9, 41):
        with pytest.raises(ValueError, match=rf"a mean of {mean} tokens cannot be had: .* keep 1\d\.\d to 40\.0"):
            rule_for_mean(pictures, mean, AutoBudget(floor=10, ceiling=40), "share")


@pytest.mark.parametrize("options", [[], ["--rule", "share", "--pruner", "scope"]])
def test_the_command_prints_a_budget_and_stores_its_curves(capsys, tmp_path, options):
    path = tmp_path / "curves.json"
    given = ["--mean-tokens", "30", "--floor", "2", "--limit", "6", "--device", "cpu", *options]
    given += ["--pictures", str(POPE / "val2014"), "--questions", str(POPE / "llava_pope_test.jsonl")]
    assert main([*given, "--store", str(path)]) == 0
    out, err = capsys.readouterr()
    mean, halves, budget = out.splitlines()
    counted = float(re.match(r"6 pictures, two questions each: ([\d.]+) tokens of each view", mean)[1])
    assert counted == pytest.approx(30, abs=0.5)
    assert re.match(r"set on one half of them, the rule keeps [\d.]+ and [\d.]+ of the other", halves)
    assert (parse_auto(budget).gain is None) == bool(options)
    assert parse_auto(budget).floor == 2
    assert "6 pictures are few" in err
    name = "scope" if options else "script"
    assert get_pruner(name, keep_tokens=f"auto:mean_tokens=30:curves={path}").keep_tokens == budget


@pytest.mark.parametrize(
    "options, message",
    [
        (["--mean-tokens", "0"], "--mean-tokens must be more than 0"),
        (["--mean-tokens", "nan"], "--mean-tokens must be more than 0"),
        (["--mean-tokens", "8", "--limit", "0"], "--limit must be at least 1"),
        (["--mean-tokens", "8", "--pruner", "random"], "'random' needs a count or a share"),
        (["--mean-tokens", "8", "--ceiling", "many"], "is written auto"),
        (["--mean-tokens", "8", "--floor", "9", "--ceiling", "8"], "floor is at most ceiling"),
        (["--mean-tokens", "8", "--pictures", "/nowhere"], "/nowhere"),
        (["--mean-tokens", "8", "--store", "/nowhere/curves.json"], "there is no folder /nowhere"),
    ],
)
def test_bad_input_is_answered_before_a_model_is_loaded(capsys, monkeypatch, options, message):
    monkeypatch.setattr(calibrate_budget, "load_pretrained_model", None)
    given = ["--pictures", str(POPE / "val2014"), "--questions", str(POPE / "llava_pope_test.jsonl"), *options]
    assert main(given) == 2
    assert message in capsys.readouterr().err
