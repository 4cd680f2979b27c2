"""``mean_tokens=`` from stored curves: the mean is met on other pictures, and curves of something else are refused."""

import dataclasses
import json

import pytest
import torch

from llava.pruning import PruningInputs, get_pruner, parse_budget
from llava.pruning.auto_budget import AutoBudget, parse_auto
from llava.pruning.budget_curves import Curve, StoredCurves, counts_of, options_of, rule_for_mean

BOUNDS = AutoBudget(floor=2, ceiling=60)
NAMES = ("unexplained", "kept_after", "alone")


def scenes(seed, pictures=300):
    """Pictures of 4 to 27 kinds of tokens."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(4, 28, (pictures, 1), generator=generator)
    centres = torch.randn(pictures, 28, 32, generator=generator)
    kind = (torch.rand(pictures, 80, generator=generator) * kinds).long()
    features = centres.gather(1, kind[:, :, None].expand(-1, -1, 32))
    features = features + 0.3 * torch.randn(features.shape, generator=generator)
    return PruningInputs(features, relevance=torch.rand(pictures, 80, generator=generator))


@pytest.fixture(scope="module", params=["gain", "share"])
def stored(request, tmp_path_factory):
    method = get_pruner("script", keep_tokens=str(BOUNDS), gsp_ratio=0.25)
    details = method.select(scenes(0)).details
    rows = zip(*(details[name].split(1) for name in NAMES), strict=True)
    curves = StoredCurves(
        "script", options_of(method), "a model", str(BOUNDS), request.param, [[Curve(*row, units=1)] for row in rows]
    )
    path = tmp_path_factory.mktemp("curves") / f"{request.param}:1.json"
    curves.save(path)
    return path, curves


def test_what_is_stored_is_what_is_read(stored):
    path, curves = stored
    read = StoredCurves.load(path)
    assert dataclasses.replace(read, pictures=[]) == dataclasses.replace(curves, pictures=[])
    for one, other in zip(read.pictures, curves.pictures, strict=True):
        for name in ("share", "kept", "alone"):
            assert torch.equal(getattr(one[0], name), getattr(other[0], name))


@pytest.mark.parametrize("mean", [16.5])
def test_the_mean_is_met_on_other_pictures(stored, mean):
    path, curves = stored
    pruner = get_pruner("script", keep_tokens=f"auto:mean_tokens={mean}:curves={path}", gsp_ratio=0.25)
    rule = rule_for_mean(curves.pictures, mean, BOUNDS, curves.rule)
    assert pruner.auto == dataclasses.replace(rule, mean_tokens=mean)
    assert float(counts_of(curves.pictures, rule).mean()) == pytest.approx(mean, rel=0.01)
    kept = pruner.select(scenes(1)).eligible.sum(-1)
    assert float(kept.double().mean()) == pytest.approx(mean, rel=0.03)
    assert pruner.auto.tag == f"auto-mean{mean}"


def test_the_method_that_is_made_needs_the_file_no_more(stored):
    """A host, a process or another computer gets the rule itself: the same tokens everywhere."""
    text = f"auto:mean_tokens=20:curves={stored[0]}"
    assert parse_budget(text) == text
    pruner = get_pruner("script", keep_tokens=text, gsp_ratio=0.25)
    assert parse_auto(pruner.keep_tokens).curves is None
    again = get_pruner("script", keep_tokens=pruner.keep_tokens, gsp_ratio=0.25)
    assert again == pruner == dataclasses.replace(pruner)
    unnamed = get_pruner("script", keep_tokens=str(dataclasses.replace(pruner.auto, mean_tokens=None)), gsp_ratio=0.25)
    inputs = scenes(2, 8)
    assert torch.equal(unnamed.select(inputs).mask, pruner.select(inputs).mask)


def test_curves_of_something_else_are_refused(stored, tmp_path):
    path, _ = stored
    budget = f"auto:mean_tokens=20:curves={path}"
    with pytest.raises(ValueError, match=r"made for script with gsp_ratio=0.25 \(model a model\)"):
        get_pruner("script", keep_tokens=budget)
    with pytest.raises(ValueError, match=r"made for script .model a model., not for this method and its options"):
        get_pruner("cdpruner", keep_tokens=budget)
    with pytest.raises(ValueError, match=r"there is no file .*; .*calibrate_budget --mean-tokens 20 .* --store"):
        get_pruner("script", keep_tokens=f"auto:mean_tokens=20:curves={tmp_path / 'none.json'}")
    with pytest.raises(ValueError, match="a mean of 61 tokens cannot be had"):
        get_pruner("script", keep_tokens=f"auto:mean_tokens=61:curves={path}", gsp_ratio=0.25)
    with pytest.raises(ValueError, match="'grid' needs a count or a share"):
        get_pruner("grid", keep_tokens=budget)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "another"}', "\0"])
def test_a_file_without_curves_is_refused(text, tmp_path):
    path = tmp_path / "curves.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"curves\.json holds no curves of llava.eval.calibrate_budget"):
        get_pruner("script", keep_tokens=f"auto:mean_tokens=20:curves={path}")


def test_curves_that_were_made_again_are_read_again(stored, tmp_path):
    path = tmp_path / "curves.json"
    path.write_text(stored[0].read_text())
    budget = f"auto:mean_tokens=20:curves={path}"
    before = get_pruner("script", keep_tokens=budget, gsp_ratio=0.25)
    held = json.loads(path.read_text())
    path.write_text(json.dumps(held | {"pictures": held["pictures"][:40]}))
    assert get_pruner("script", keep_tokens=budget, gsp_ratio=0.25) != before
