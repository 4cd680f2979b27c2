"""SigLIP's joint space: texts, patches and their cosines as recorded from the full SigLIP."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from llava.checkpoint import CheckpointError
from llava.relevance.siglip import SiglipJointSpace, check_siglip_folder
from records import FEATURES, Records

RECORDS = Records("video/records/siglip_joint")
ENTRY = RECORDS.entries["clipA"]
SIGLIP = "checkpoints/google/siglip-so400m-patch14-384"
COSINE = 1e-5


@pytest.fixture(scope="module")
def space(video):
    return SiglipJointSpace(video / SIGLIP, torch.float32, "cpu")


@pytest.fixture(scope="module")
def pixels(video):
    frames = [
        Image.open(path).resize((384, 384), Image.Resampling.BICUBIC)
        for path in sorted((video / "frames/clipA").iterdir())
    ]
    return torch.stack([torch.tensor(np.asarray(f)).permute(2, 0, 1) / 127.5 - 1 for f in frames])


def recorded(name):
    return RECORDS.tensors[f"clipA.{name}"]


def cosines(embeds, texts):
    """(V, n, e) and (T, e) -> (V, n, T)."""
    return F.normalize(embeds, dim=-1) @ F.normalize(texts, dim=-1).mT


def test_texts_are_cut_padded_and_embedded_as_recorded(space):
    for text, ids in zip(ENTRY["texts"], ENTRY["text_input_ids"], strict=True):
        assert space.segments(text)[0] == ids  # a longer text than fits is cut there, and goes on in a second segment
    embeds, mask = space.text_embeds(ENTRY["texts"])
    assert mask.sum(1).tolist() == [1, 1, 2, 1]
    assert (embeds[:, 0] - recorded("text_embeds_raw.all")).abs().max() < FEATURES["default"]


def test_segments_hold_the_whole_text(space):
    ids = space.tokenizer(ENTRY["texts"][2], add_special_tokens=False).input_ids
    segments = space.segments(ENTRY["texts"][2])
    assert all(len(segment) == 64 and segment[-1] == 1 for segment in segments)
    assert [token for segment in segments for token in segment if token != 1] == ids


def test_patches_of_the_full_tower(space, pixels):
    hidden = space.full_tower()(pixels).last_hidden_state
    RECORDS.check("clipA", "last_hidden_state_post_layernorm", hidden, FEATURES)
    embeds = space.image_embeds_of_pixels(pixels)
    RECORDS.check("clipA", "patch_embeds_full_tower", embeds, FEATURES)
    got = cosines(embeds, recorded("text_embeds_raw.all"))
    assert (got - recorded("patch_text_cosine_full_tower.all")).abs().max() < COSINE


def test_bridge_from_siglips_own_layers_is_the_full_tower(space, pixels):
    tower = space.full_tower()
    hidden = tower.embeddings(pixels)
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    RECORDS.check("clipA", "hidden_before_last_layer", hidden, FEATURES)
    assert torch.allclose(space.image_embeds(hidden), space.image_embeds_of_pixels(pixels), atol=1e-6)


def test_the_head_on_one_token_is_the_head_on_a_picture_of_it(space):
    hidden = torch.randn(2, 5, 48)
    alone = space.last_layer_and_head.head(hidden.flatten(0, 1)[:, None])
    assert torch.allclose(space.token_embeds(hidden).flatten(0, 1), alone, atol=1e-6)


def test_probe_attention_is_the_heads(space):
    hidden = torch.randn(2, 7, 48)
    head = space.last_layer_and_head.head
    _, weights = head.attention(head.probe.expand(2, -1, -1), hidden, hidden, average_attn_weights=False)
    assert torch.allclose(space.probe_attention(hidden), weights[:, :, 0], atol=1e-6)


@pytest.mark.parametrize("name", ["spiece.model", "model.safetensors", "config.json"])
def test_an_incomplete_folder_is_named(video, tmp_path, name):
    folder = shutil.copytree(video / SIGLIP, tmp_path / "siglip")
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace("model.safetensors", "no weights")):
        check_siglip_folder(folder)


def test_a_tower_alone_is_no_joint_space(video):
    with pytest.raises(CheckpointError, match=r"spiece.model; text_config in config.json"):
        check_siglip_folder(video / "checkpoints/llava-video-tiny-qwen2")
