"""Checkpoints that are damaged, mixed up or hostile: refused by the name of the file, tensor or key, and at once."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_copies import CLIP, copy_checkpoint, edit, load_cpu
from llava.checkpoint import CheckpointError, is_inside, read_json, weight_files
from llava.model.builder import pick_device, read_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb\nsize 13476\n"
PAGE = "\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>"


@pytest.fixture
def folder(tmp_path):
    return copy_checkpoint("llava-v1.5-tiny", tmp_path)


def change_weights(folder, change):
    """Rewrite pytorch_model.bin with what ``change(state)`` makes of it."""
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(change(state), folder / "pytorch_model.bin")


# --- where files lead ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "a/../../b.bin", "..\\b.bin", "C:\\b.bin", ""])
def test_an_index_names_files_of_its_folder_alone(tmp_path, name):
    (tmp_path / "secret.bin").write_bytes(b"PK")
    folder = tmp_path / "inside"
    folder.mkdir()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match=r"index\.json names the file .*, which is not inside the folder"):
        weight_files(folder)
    assert not is_inside(name)
    assert is_inside("parts/model-1.safetensors")


@pytest.mark.parametrize("text", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{}", "[" * 100000, POINTER])
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        weight_files(tmp_path)


# --- files that are something else ---------------------------------------------------------------------------------


@pytest.mark.parametrize("content, what", [(POINTER, "git-LFS pointer"), (PAGE, "web page")])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "tokenizer.model", "config.json"])
def test_pointers_and_pages_are_told(folder, name, content, what):
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{name}: it is a {what}"):
        load_cpu(folder)


def test_a_pointer_in_the_place_of_safetensors(tmp_path):
    folder = copy_checkpoint("llava-v1.6-vicuna-tiny", tmp_path)
    (folder / "model.safetensors").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: it is a git-LFS pointer"):
        load_cpu(folder)
    other = copy_checkpoint("llava-v1.5-tiny", tmp_path)
    (tmp_path / CLIP / "pytorch_model.bin").write_text(PAGE)
    with pytest.raises(CheckpointError, match=r"openai/.*pytorch_model\.bin: it is a web page"):
        load_cpu(other)


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02}q\x00.", b"\x80\x02K\x01.", b"\x80"])
def test_what_is_no_file_of_tensors_is_named(folder, content):
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin|lacks \d+ tensors"):
        load_cpu(folder)


def test_json_that_is_no_object_is_named(tmp_path):
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match=r"config\.json: it holds list"):
        read_json(tmp_path / "config.json")


# --- weights that do not belong together ---------------------------------------------------------------------------


@pytest.mark.parametrize("with_shard", [False, True])
def test_what_an_older_save_left_is_not_read(tmp_path, with_shard):
    """The library reads model.safetensors first; language model and tower must come from one file."""
    folder = copy_checkpoint("llava-v1.6-vicuna-tiny", tmp_path)
    weights = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "pytorch_model-00001-of-00001.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    if with_shard:
        torch.save({name: tensor * 3 for name, tensor in weights.items()}, folder / "pytorch_model-00001-of-00001.bin")
    model = load_cpu(folder)[1]
    assert torch.equal(model.model.norm.weight, weights["model.norm.weight"].float())
    name = "vision_model.embeddings.class_embedding"
    tower = model.get_vision_tower().vision_tower.state_dict()[name]
    assert torch.equal(tower, weights[f"model.vision_tower.vision_tower.{name}"].float())


def test_two_saves_of_one_kind_are_refused(tmp_path):
    folder = copy_checkpoint("llava-v1.6-vicuna-tiny", tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"two saves, model\.safetensors and the shards of"):
        load_cpu(folder)
    (folder / "model-00001-of-00001.safetensors").unlink()
    load_cpu(folder)


def test_fewer_layers_on_either_side_are_refused(folder):
    edit(folder, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"holds model\.layers\.2\..* no place for"):
        load_cpu(folder)
    edit(folder, num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors of the model, first model\.layers\.3\."):
        load_cpu(folder)


def test_a_configuration_of_another_width_is_refused(folder):
    edit(folder, intermediate_size=180)
    with pytest.raises(
        CheckpointError, match=r"mlp\.\w+\.weight has the shape \(.*172.*\), and \(.*180.*\) by config"
    ):
        load_cpu(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.mm_projector.2.bias", "lm_head.weight"])
def test_weights_that_are_no_numbers_are_refused(folder, name, value):
    def spoil(state):
        state[name].view(-1)[7] = value
        return state

    change_weights(folder, spoil)
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinities"):
        load_cpu(folder)


def test_a_tower_of_no_numbers_is_refused(tmp_path):
    folder = copy_checkpoint("llava-v1.5-tiny", tmp_path)
    file = tmp_path / CLIP / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    state["vision_model.embeddings.class_embedding"][0] = torch.nan
    torch.save(state, file)
    with pytest.raises(CheckpointError, match="class_embedding holds NaN"):
        load_cpu(folder)


# --- configurations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 1000000},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": "many"},
        {"num_hidden_layers": 2.5},
        {"num_attention_heads": 0},
        {"hidden_size": "64"},
        {"hidden_size": True},
        {"vocab_size": 10**12},
        {"intermediate_size": -172},
        {"mm_hidden_size": [48, "x"]},
        {"mm_projector_type": "mlp999999999x_gelu"},
        {"mm_projector_type": "mlp0x_gelu"},
        {"mm_projector_type": 7},
        {"mm_vision_select_layer": "-2"},
        {"mm_vision_tower": ["clip"]},
        {"mm_use_im_start_end": "false"},
        {"s2": True},
        {"mm_resampler_type": "perceiver"},
        {"image_aspect_ratio": "highres"},
        {"image_aspect_ratio": "crop_split"},
        {"image_aspect_ratio": "padd"},
        {"image_grid_pinpoints": "(1x1),...,(99999x99999)", "image_aspect_ratio": "anyres"},
        {"rms_norm_eps": "small"},
    ],
    ids=str,
)
def test_values_that_no_model_has_are_refused_at_once(folder, values):
    edit(folder, **values)
    start = time.monotonic()
    with pytest.raises((ValueError, CheckpointError), match=next(iter(values))):
        load_cpu(folder)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("part", ["vision_config", "text_config"])
def test_sizes_of_the_tower_are_checked_too(tmp_path, part):
    folder = copy_checkpoint("llava-v1.5-tiny", tmp_path)
    settings = json.loads((tmp_path / CLIP / "config.json").read_text())
    settings.setdefault(part, {})["num_hidden_layers"] = 10**6
    (tmp_path / CLIP / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ValueError, match=r"openai/.*config\.json says num_hidden_layers=1000000, expected .* 1 to 1024"
    ):
        load_cpu(folder)


def test_an_encoder_of_another_kind_is_refused(tmp_path):
    folder = copy_checkpoint("llava-v1.5-tiny", tmp_path)
    edit(tmp_path / CLIP, model_type="dinov2")
    with pytest.raises(ValueError, match=r"type 'dinov2'; known are clip and siglip"):
        load_cpu(folder)


def test_the_librarys_own_format_is_told(tmp_path):
    settings = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"own format \(LlavaForConditionalGeneration\): add --hf"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["mps", "xpu", "gpu", "cuda:x", "", "cuda:99", "meta"])
def test_devices_that_cannot_be_used_are_one_line(name):
    with pytest.raises(ValueError, match=r"device must be auto, cpu, cuda|torch sees"):
        pick_device(name)


def test_a_projector_beside_whole_weights_is_not_taken_for_one_alone(tmp_path):
    folder = copy_checkpoint("llava-v1.5-tiny", tmp_path)
    base = shutil.copytree(folder, tmp_path / "base")
    torch.save({"model.mm_projector.0.bias": torch.zeros(64)}, folder / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"holds whole weights, which need no model_base"):
        load_cpu(folder, model_base=str(base))


def test_marks_that_were_never_trained_are_refused(folder):
    edit(folder, mm_use_im_start_end=True)
    with pytest.raises(CheckpointError, match=r"mm_use_im_start_end, but the vocabulary of 384 rows has none"):
        load_cpu(folder)
