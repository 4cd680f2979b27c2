"""Loading: every layout of the original format, and a clear word when a file is missing, cut short or foreign."""

import pickle
import shutil

import pytest
import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from checkpoint_copies import CHECKPOINTS, CLIP, copy_checkpoint, edit, load_cpu
from llava.checkpoint import CheckpointError, find_folder
from llava.model import builder, checkpoint_files
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.pruning import get_pruner
from llava.relevance.policy import settle


@pytest.fixture
def copy(tmp_path):
    """A writable copy of a checkpoint, with CLIP where its relative name points."""
    return lambda name: copy_checkpoint(name, tmp_path)


@pytest.mark.parametrize(
    "whole, sharded",
    [
        ("llava-v1.5-tiny", "llava-v1.5-tiny-sharded"),
        ("llava-v1.6-vicuna-tiny", "llava-v1.6-vicuna-tiny-sharded"),
    ],
)
def test_shards_hold_the_same_weights(load, whole, sharded):
    first, second = (load(name)[1].state_dict() for name in (whole, sharded))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_vision_weights_in_the_checkpoint_win(load):
    inside, outside = (load(name)[1].get_vision_tower() for name in ("llava-v1.6-vicuna-tiny", "llava-v1.5-tiny"))
    name = "vision_model.embeddings.class_embedding"
    assert not torch.equal(inside.vision_tower.state_dict()[name], outside.vision_tower.state_dict()[name])


def test_checkpoint_with_its_own_vision_weights_needs_no_clip_weights(copy):
    folder = copy("llava-v1.6-vicuna-tiny")
    (folder.parent / CLIP / "pytorch_model.bin").unlink()
    _, model, _, _ = load_cpu(folder, pruner=get_pruner("script"))  # reads the question elsewhere
    assert "lacks: " in model.get_vision_tower().why_no_joint_space()
    assert settle(get_pruner("script"), model.relevance_offer())[1].source == "language"
    with pytest.raises(CheckpointError, match=r"needs CLIP's text tower, but .* lacks: .*relevance=language needs no"):
        load_cpu(folder, pruner=get_pruner("script", relevance="clip"))


def test_text_tower_without_tokenizer_is_named(copy):
    folder = copy("llava-v1.5-tiny")
    for name in ("tokenizer.json", "merges.txt"):
        (folder.parent / CLIP / name).unlink()
    load_cpu(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json \(or vocab\.json and merges\.txt\)"):
        load_cpu(folder, pruner=get_pruner("script", relevance="clip"))


def test_what_is_saved_can_be_loaded_again(load, tmp_path):
    model = load("llava-v1.6-vicuna-tiny")[1]
    shutil.copytree(CHECKPOINTS / CLIP, tmp_path / CLIP)
    model.save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(CHECKPOINTS / "llava-v1.6-vicuna-tiny" / name, tmp_path / "saved" / name)
    again = load_cpu(tmp_path / "saved")[1].state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    assert any(name.startswith("model.vision_tower.vision_tower.vision_model.") for name in again)


def test_projector_alone_on_a_language_model(copy, load):
    folder = copy("llava-v1.5-tiny")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    projector = folder.parent / "projector"
    projector.mkdir()
    shutil.copy(folder / "config.json", projector)
    with pytest.raises(CheckpointError, match=r"missing file .*mm_projector\.bin"):
        load_cpu(projector, model_base=str(folder))
    torch.save({k: v for k, v in state.items() if "mm_projector" in k}, projector / "mm_projector.bin")
    torch.save({k: v for k, v in state.items() if "mm_projector" not in k}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"lacks 4 tensors of the model, first model\.mm_projector\.0\.bias"):
        load_cpu(folder)
    model = load_cpu(projector, model_base=str(folder))[1]
    expected = load("llava-v1.5-tiny")[1].state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "pytorch_model.bin"])
def test_missing_file_is_named(copy, name):
    folder = copy("llava-v1.5-tiny")
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_cpu(folder)


@pytest.mark.parametrize(
    "checkpoint, shard",
    [
        ("llava-v1.5-tiny-sharded", "pytorch_model-00002-of-00002.bin"),
        ("llava-v1.6-vicuna-tiny-sharded", "model-00003-of-00003.safetensors"),
    ],
)
def test_missing_or_partial_shard_is_named(copy, checkpoint, shard):
    folder = copy(checkpoint)
    data = (folder / shard).read_bytes()
    (folder / shard).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=f"damaged or partial weight file .*{shard}"):
        load_cpu(folder)
    (folder / shard).unlink()
    with pytest.raises(CheckpointError, match=f"is incomplete: missing {shard}"):
        load_cpu(folder)


def test_missing_tower_lists_where_it_was_sought(copy):
    folder = copy("llava-v1.5-tiny")
    edit(folder, mm_vision_tower="openai/clip-gone")
    with pytest.raises(CheckpointError, match=r"no checkpoint at openai/clip-gone, .*/openai/clip-gone, .*hub"):
        load_cpu(folder)
    shutil.rmtree(folder.parent / CLIP)
    (folder.parent / CLIP).mkdir()
    edit(folder, mm_vision_tower=CLIP)
    with pytest.raises(CheckpointError, match=r"is not a checkpoint folder: it has no config\.json"):
        load_cpu(folder)


def test_nothing_there():
    with pytest.raises(CheckpointError, match=r"no checkpoint at /nowhere/llava-v1\.5-7b"):
        find_folder("/nowhere/llava-v1.5-7b")


def test_missing_toy_says_how_to_rebuild_it_or_where_it_is(monkeypatch, tmp_path):
    toy = tmp_path / "playground" / "toy"
    monkeypatch.setattr(checkpoint_files, "TOY_FOLDER", toy)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .* comes with a checkout of the repository"):
        load_cpu(toy / "llava-toy-v1.5")
    with pytest.raises(CheckpointError, match="comes with a checkout of the repository"):
        builder.find_template(str(toy / "llava-toy-v1.5"))
    (tmp_path / "scripts" / "toy").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*`python scripts/toy/train\.py` rebuilds the toy"):
        load_cpu(toy / "llava-toy-v1.5")


@pytest.mark.parametrize("values", [{"model_type": "llava_mpt"}, {"model_type": "llama"}])
def test_foreign_model_is_refused_by_its_type(copy, values):
    folder = copy("llava-v1.5-tiny")
    edit(folder, **values)
    with pytest.raises(ValueError, match=f"model_type '{values['model_type']}', expected one of llava, llava_llama"):
        load_cpu(folder)


def test_code_in_a_pickle_is_never_run(copy, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    folder = copy("llava-v1.5-tiny")
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"weight": Payload()}, file)
    with pytest.raises(Exception, match=r"(?i)weights_only|unpickl|unsupported|pickle"):
        load_cpu(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"dtype": "int8"}, ValueError, "dtype must be auto, float32, float16 or bfloat16"),
        ({"load_4bit": True, "load_8bit": True}, ValueError, "exclude each other"),
        ({"attn_implementation": "flash_attention_2"}, ImportError, "(?i)flash"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        load_cpu(CHECKPOINTS / "llava-v1.5-tiny", **options)


def test_quantisation_leaves_projector_tower_and_head_alone(monkeypatch, load):
    """By the library's own rule, which matches names from their start, on the names that our modules have."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *arguments: object())
    names = [name for name, module in load("llava-v1.5-tiny")[1].named_modules() if isinstance(module, nn.Linear)]
    for settings in (builder._quantization(True, False), builder._quantization(False, True)):
        quantised = {name for name in names if should_convert_module(name, settings.llm_int8_skip_modules)}
        assert quantised == {name for name in names if name.startswith("model.layers.")}


def test_quantisation_says_what_to_install():
    with pytest.raises(ImportError, match="pip install"):
        load_cpu(CHECKPOINTS / "llava-v1.5-tiny", load_4bit=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="torch sees no GPU"):
        load_pretrained_model(str(CHECKPOINTS / "llava-v1.5-tiny"), device="cuda")


def test_device_map_places_the_model_with_accelerate(load, pixels_of):
    pixels, sizes = pixels_of("llava-v1.5-tiny", "square336")
    mapped = load_cpu(CHECKPOINTS / "llava-v1.5-tiny", device_map={"": "cpu"})[1]
    ids = torch.tensor([[1, -200, 300, 301]])
    options = {
        "images": pixels,
        "image_sizes": sizes,
        "max_new_tokens": 4,
        "pruner": get_pruner("script"),
        "query": "a",
    }
    assert torch.equal(mapped.generate(ids, **options), load("llava-v1.5-tiny")[1].generate(ids, **options))
    assert isinstance(mapped, LlavaLlamaForCausalLM)


def test_no_warning_about_weights(capfd, caplog):
    load_cpu(CHECKPOINTS / "llava-v1.6-vicuna-tiny")
    printed = capfd.readouterr().err + caplog.text
    assert "UNEXPECTED" not in printed
    assert "MISSING" not in printed
    assert "torchvision" not in printed
