"""LoRA adapters as LLaVA writes them: merged to W + alpha / r B A, or refused by name."""

import json
import math
import shutil

import pytest
import torch

from checkpoint_copies import copy_checkpoint, edit, load_cpu
from llava.checkpoint import CheckpointError

STEM = "model.layers.1.mlp.up_proj"
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["up_proj"], "bias": "none"}


@pytest.fixture
def trained(tmp_path):
    """(adapter's folder, base's folder, A, B): a base without projector, which was trained whole beside A and B."""
    base = copy_checkpoint("llava-v1.5-tiny", tmp_path, "base")
    state = torch.load(base / "pytorch_model.bin", weights_only=True)
    projector = {name: tensor for name, tensor in state.items() if "mm_projector" in name}
    torch.save({name: t for name, t in state.items() if name not in projector}, base / "pytorch_model.bin")
    folder = tmp_path / "llava-v1.5-lora"
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS))
    out, into = state[f"{STEM}.weight"].shape
    down, up = torch.randn(2, into), torch.randn(out, 2)
    pair = {f"base_model.model.{STEM}.lora_{half}.weight": tensor for half, tensor in (("A", down), ("B", up))}
    torch.save(pair, folder / "adapter_model.bin")
    torch.save({f"base_model.model.{name}": t for name, t in projector.items()}, folder / "non_lora_trainables.bin")
    return folder, base, down, up


def weights_of(folder, base):
    return load_cpu(folder, model_base=str(base))[1].state_dict()


@pytest.mark.parametrize(
    "values, scale",
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / math.sqrt(2)),
        ({"alpha_pattern": {r"layers\.1\.mlp\.up_proj": 10}}, 5.0),
        ({"alpha_pattern": {"down_proj": 10}, "r": 64}, 3.0),  # the rank is that of the tensors
    ],
    ids=str,
)
def test_the_product_is_added_and_nothing_else_changes(trained, load, values, scale):
    folder, base, down, up = trained
    edit(folder, "adapter_config.json", **values)
    merged, plain = weights_of(folder, base), load("llava-v1.5-tiny")[1].state_dict()
    changed = {name for name in plain if not torch.equal(merged[name], plain[name])}
    assert changed == {f"{STEM}.weight"}
    by_hand = torch.einsum("or,ri->oi", up.double(), down.double()) * scale
    assert torch.allclose(merged[f"{STEM}.weight"].double(), plain[f"{STEM}.weight"].double() + by_hand, atol=1e-4)


def test_without_a_base_it_says_what_is_needed(trained):
    folder, base, *_ = trained
    with pytest.raises(CheckpointError, match=r"holds a LoRA adapter: give the language model .*--model-base"):
        load_cpu(folder)
    for name in ("adapter_config.json", "adapter_model.bin"):
        shutil.copy(folder / name, base)
    with pytest.raises(CheckpointError, match=r"LoRA adapter.*or remove adapter_config\.json"):
        load_cpu(base)
    with pytest.raises(CheckpointError, match="is itself a LoRA adapter or holds one"):
        load_cpu(folder, model_base=str(base))


def test_a_projector_of_an_earlier_stage_is_not_taken_in_silence(trained):
    folder, base, *_ = trained
    state = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    same = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    torch.save(same, folder / "mm_projector.bin")
    weights_of(folder, base)
    torch.save({name: tensor + 1 for name, tensor in same.items()}, folder / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"holds two different tensors model\.mm_projector"):
        weights_of(folder, base)


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True},
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"bias": "lora_only"},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa"},
        {"target_parameters": ["mlp.experts"]},
        {"lora_alpha": "six"},
        {"lora_alpha": float("nan")},
    ],
    ids=str,
)
def test_other_kinds_are_refused_by_the_setting(trained, values):
    folder, base, *_ = trained
    edit(folder, "adapter_config.json", **values)
    name = next(iter(values)).removeprefix("lora_")
    with pytest.raises(ValueError, match=rf"adapter_config\.json has .*{name}"):
        weights_of(folder, base)


def test_tensors_that_fit_nothing_are_named(trained):
    folder, base, down, up = trained
    for pair, message in (
        ({f"{STEM}.lora_A.weight": down}, "does not fit model.layers.1.mlp.up_proj"),
        (
            {"model.layers.9.mlp.up_proj.lora_A.weight": down, "model.layers.9.mlp.up_proj.lora_B.weight": up},
            "layers.9",
        ),
        ({f"{STEM}.lora_A.weight": down.T, f"{STEM}.lora_B.weight": up}, "does not fit"),
        ({f"{STEM}.lora_A.weight": down, f"{STEM}.lora_B.weight": up, "model.other.bias": up}, "model.other.bias"),
        ({}, "no pair"),
    ):
        torch.save({f"base_model.model.{name}": tensor for name, tensor in pair.items()}, folder / "adapter_model.bin")
        with pytest.raises(CheckpointError, match=f"the LoRA adapter of .*{message}"):
            weights_of(folder, base)


def test_it_is_not_merged_into_quantised_weights(trained, monkeypatch):
    folder, base, *_ = trained
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *arguments: object())
    with pytest.raises(ValueError, match="LoRA adapter cannot be merged into quantised weights"):
        load_cpu(folder, model_base=str(base), load_8bit=True)
