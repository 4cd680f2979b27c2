"""The table of hosts: classes are sorted by checks that notice what is broken, and the page says what they found."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from llava.eval.hosts import command, table
from llava.eval.hosts.checks import Outcome, check_class
from llava.eval.hosts.command import check_within, image_text_classes, main
from llava.integrations.transformers import TESTED_CLASSES, short_prompt
from llava.integrations.transformers.boundary import Plan
from llava.integrations.transformers.host import SUFFIX, Host

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hosts.md"
CLASSES = image_text_classes()
WORK = [
    *("aria", "ernie4_5_vl_moe", "fuyu", "gemma3", "gemma4", "granite_docling", "idefics3", "inkling_mm_model"),
    *("internvl", "llava", "llava_next", "mistral3", "molmo2", "qwen3_5", "qwen3_vl"),
]
REFUSED = {"granite4_vision": "deepstack_features", "mllama": "cross_attention", "florence2": "encoder-decoder"}
BEFORE_5_23 = Version(transformers.__version__) < Version("5.23")


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def outcome_of(model_type):
    if model_type not in CLASSES:
        pytest.skip(f"Transformers {transformers.__version__} has no {model_type}")
    return check_class(model_type, CLASSES[model_type])


@pytest.mark.parametrize("model_type", WORK)
def test_a_class_works(model_type):
    outcome = outcome_of(model_type)
    assert outcome.status != "broken", outcome.failed
    if not BEFORE_5_23:
        assert outcome.status == "works", outcome.reason
        assert outcome.name in TESTED_CLASSES


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_class_is_refused_with_a_sentence(model_type):
    outcome = outcome_of(model_type)
    if BEFORE_5_23 and outcome.status == "unbuilt":
        pytest.skip(outcome.reason)
    assert outcome.status == "refused"
    assert REFUSED[model_type] in outcome.reason
    assert outcome.name not in TESTED_CLASSES


# --- the checks notice ---------------------------------------------------------------------------------------------


def broken_by(monkeypatch, owner, name, change, model_type):
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *rest: change(original, self, *rest))
    outcome = outcome_of(model_type)
    assert outcome.status == "broken"
    return " ".join(outcome.failed)


def test_deep_features_of_other_tokens_are_noticed(monkeypatch):
    def shifted(give, plan, arguments, *rest):
        give(plan, arguments, *rest)
        arguments["deepstack_visual_embeds"] = [one.roll(1, 0) for one in arguments["deepstack_visual_embeds"]]

    assert "deepstack_visual_embeds is not that of the kept tokens" in broken_by(
        monkeypatch, Plan, "_give_deepstack", shifted, "qwen3_vl"
    )


def test_means_that_are_not_made_of_deep_features_are_noticed(monkeypatch):
    monkeypatch.setattr(short_prompt, "with_made_features", lambda plane, _: plane)
    outcome = outcome_of("qwen3_vl")
    assert outcome.status == "broken"
    assert "deep features are not the means" in " ".join(outcome.failed)


def test_a_class_that_is_never_pruned_is_noticed(monkeypatch):
    failed = broken_by(monkeypatch, Host, "shows_pictures", lambda *_: False, "llava")
    assert "the cache holds text and kept tokens: 0 pictures were found of 3" in failed


def test_positions_that_forget_the_cache_are_noticed(monkeypatch):
    def forgetful(apply, plan, module, positional, arguments):
        positional, arguments = apply(plan, module, positional, arguments)
        arguments["position_ids"] = torch.zeros_like(arguments["position_ids"])
        return positional, arguments

    failed = broken_by(monkeypatch, Plan, "apply", forgetful, "llava")
    assert "keeping everything is the unpruned model: logits differ" in failed


# --- the command ---------------------------------------------------------------------------------------------------


def test_a_crash_or_a_hang_of_one_class_does_not_end_the_run(monkeypatch):
    import os
    import time

    monkeypatch.setattr(command, "check_class", lambda *_: os._exit(7))
    assert check_within("llava", CLASSES["llava"]).reason == "its process died with exit status 7"
    monkeypatch.setattr(command, "check_class", lambda *_: time.sleep(60))
    assert check_within("llava", CLASSES["llava"], limit=0.5).reason == "no answer within 0.5 seconds"


def test_the_command_on_two_classes(tmp_path, capsys):
    file = tmp_path / "hosts.json"
    assert main(["--classes", "LlavaForConditionalGeneration", "blip", "--json", str(file)]) == 0
    outcomes = {one["model_type"]: one for one in json.loads(file.read_text())["classes"]}
    assert outcomes["llava"]["status"] == "works"
    assert outcomes["blip"]["status"] == "refused"
    assert capsys.readouterr().out == "1 works, 1 refused\n"


@pytest.mark.nightly
@pytest.mark.skipif(BEFORE_5_23, reason="docs/hosts.md is of a newer Transformers")
def test_every_class_is_what_the_page_says(tmp_path):
    """All classes, some minutes; those that cannot be built here need what the page names (timm)."""
    file = tmp_path / "hosts.json"
    assert main(["--json", str(file)]) == 0
    found = {one["model_type"]: one["status"] for one in json.loads(file.read_text())["classes"]}
    works, _, refused = PAGE.read_text().partition("## Refused")
    told = {
        model_type: status
        for status, part in (("works", works), ("refused", refused))
        for model_type in re.findall(r"^\| `\w+` \(`([^`]+)`\) \|", part, re.MULTILINE)
    }
    assert told.keys() == found.keys()
    for model_type, status in found.items():
        assert status in ("unbuilt", told[model_type]), model_type


def test_names_and_marks_are_checked_before_the_work(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--classes", "Lava"])
    assert "is called Lava; there are" in capsys.readouterr().err
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        main(["--write", str(page)])
    assert "must have one <!-- hosts -->" in capsys.readouterr().err


def test_a_broken_class_is_told_and_fails(monkeypatch, tmp_path):
    broken = Outcome("llava", CLASSES["llava"], "broken", "a | b", failed=["a | b"])
    monkeypatch.setattr(command, "check_within", lambda *_: broken)
    assert main(["--classes", "llava"]) == 1
    assert "## Attaches, and fails a check" in table.tables([broken], {"versions": {}})
    assert "a / b |" in table.tables([broken], {"versions": {}})


def rows(heading):
    text = PAGE.read_text(encoding="utf-8").split(table.START)[1].split(table.END)[0]
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \(`([\w.-]+)`\)", part, re.MULTILINE))


def test_the_list_of_tested_classes_is_the_page():
    page = {name if name in TESTED_CLASSES else f"{name}{SUFFIX}" for name in rows("Works")}  # not all have the suffix
    assert page == set(TESTED_CLASSES)
    assert table.HEADINGS["broken"] not in PAGE.read_text(encoding="utf-8")


@pytest.mark.nightly
def test_no_class_of_the_library_attaches_and_breaks(tmp_path):
    file = tmp_path / "hosts.json"
    assert main(["--json", str(file)]) == 0
    outcomes = json.loads(file.read_text())["classes"]
    if not BEFORE_5_23:
        unsettled = {one["name"] for one in outcomes if one["status"] == "unbuilt"}  # those with towers of timm
        assert {one["name"] for one in outcomes if one["status"] == "works"} >= set(TESTED_CLASSES) - unsettled
