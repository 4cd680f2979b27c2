"""Towers that are known by their shape, and spaces whose files are on this machine."""

import shutil

import pytest
import transformers as hf

from llava.model.builder import TOY_FOLDER
from llava.relevance import known
from llava.relevance.known import folder_at_hand, known_joint_space

CLIP, SIGLIP = "openai/clip-vit-large-patch14-336", "google/siglip-so400m-patch14-384"


@pytest.mark.parametrize(
    ("kind", "width", "layers", "side", "name"),
    [
        (hf.CLIPVisionConfig, 1024, 24, 336, CLIP),  # llava-hf/llava-1.5-7b-hf
        (hf.SiglipVisionConfig, 1152, 26, 384, SIGLIP),  # llava-hf/llava-onevision-qwen2-7b-ov-hf
        (hf.SiglipVisionConfig, 1152, 27, 384, SIGLIP),
        (hf.SiglipVisionConfig, 1152, 27, 224, None),  # google/paligemma-3b-pt-224
        (hf.CLIPVisionConfig, 1024, 24, 224, None),
        (hf.CLIPVisionConfig, 1024, 12, 336, None),
        (hf.SiglipVisionConfig, 1024, 24, 336, None),
    ],
)
def test_shapes(kind, width, layers, side, name):
    config = kind(hidden_size=width, num_hidden_layers=layers, image_size=side, patch_size=14, num_attention_heads=16)
    assert known_joint_space(config) == name


def test_towers_of_other_kinds_are_not_known():
    assert known_joint_space(None) is None
    assert known_joint_space(hf.Qwen2_5_VLConfig().vision_config) is None


def test_files_are_looked_for_on_this_machine_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    real = known.find_folder
    monkeypatch.setattr(
        known, "find_folder", lambda name, download: asked.append(download) or real(name, download=download)
    )
    assert folder_at_hand(CLIP) is None
    folder = tmp_path / CLIP
    shutil.copytree(TOY_FOLDER / "clip-toy-336", folder)
    assert folder_at_hand(CLIP).resolve() == folder
    (folder / "vocab.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    assert folder_at_hand(CLIP) is None  # a folder without the text tower's files is none
    assert asked == [False] * 3
