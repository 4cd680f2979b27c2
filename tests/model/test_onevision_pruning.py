"""Pruning the pictures of SigLIP checkpoints: tiles without the shrink, methods before the projector, the tower."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava.checkpoint import CheckpointError
from llava.layout.views import NEWLINE
from llava.mm_utils import parse_pinpoints, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.siglip_encoder import SigLIPVisionTower, tower_config
from llava.pruning import DecoderPruner, get_pruner, list_pruners, pruner_class

PROMPT = "<|im_start|>user\n<image>\nWhat is the colour of the ball?<|im_end|>\n<|im_start|>assistant\n"
CANNOT = {"prunesid", "visionzip"}  # need class_features; see the last test


@pytest.fixture(scope="module")
def loaded(video):
    return load_pretrained_model(str(video / "checkpoints/llava-onevision-tiny-qwen2-ov"), device="cpu")


@pytest.fixture(scope="module")
def ids(loaded):
    return tokenizer_image_token(PROMPT, loaded[0], return_tensors="pt")[None]


@pytest.fixture
def picture(video, loaded, monkeypatch):
    """Pixels and size of a picture of 3 x 2 tiles, whose plane is shrunk to about one tile where nothing is pruned."""
    monkeypatch.setattr(loaded[1].config, "image_aspect_ratio", "anyres_max_1")
    image = Image.open(video / "images/mid900x620.png")
    return process_images([image], loaded[2], loaded[1].config)[0], image.size


def embed(model, ids, picture, **options):
    pixels, size = picture
    with torch.no_grad():
        return model.embed_prompts(ids, images=[pixels], image_sizes=[size], **options)


def test_unpruned_is_shrunk_and_pruned_selects_before_the_shrink(loaded, ids, picture):
    model = loaded[1]
    whole = embed(model, ids, picture).kept[0]
    assert whole.patches < 729 * 2
    pruned = embed(model, ids, picture, pruner=get_pruner("script", keep_tokens=40))
    kept = pruned.kept[0]
    assert kept.per_view() == [40] * 7
    assert pruned.inputs_embeds.shape[1] == ids.shape[1] - 1 + 7 * 40
    assert not (kept.mask() & ~kept.layout.eligible).any()
    features = model.encode_pictures([picture[0]], [picture[1]]).features.flatten(0, 1)
    start = int((ids[0] == -200).nonzero())
    assert torch.equal(pruned.inputs_embeds[0, start : start + 280], features[kept.sequence])


def test_keeping_all_is_the_unpruned_prompt(loaded, ids, picture):
    unpruned = embed(loaded[1], ids, picture).inputs_embeds
    for name in ("script", "divprune", "random", "fastv"):
        assert torch.equal(
            embed(loaded[1], ids, picture, pruner=get_pruner(name, keep_tokens=729)).inputs_embeds, unpruned
        )


@pytest.mark.parametrize("name", [name for name in list_pruners() if name not in CANNOT])
def test_every_method_takes_tiles_and_one_crop(loaded, ids, picture, name):
    inside = issubclass(pruner_class(name), DecoderPruner)
    for pixels, keep in ((picture[0], 150 if inside else 36), (picture[0][:1], 400 if inside else 36)):
        prompts = embed(loaded[1], ids, (pixels, picture[1]), pruner=get_pruner(name, keep_tokens=keep))
        assert prompts.kept[0].is_pruned
        assert prompts.inputs_embeds.isfinite().all()


def test_newlines_of_shrunk_pictures_are_those_of_the_unshrunk_rows(loaded, ids, picture):
    kept = embed(loaded[1], ids, picture, pruner=get_pruner("script", keep_tokens=40, newlines="keep")).kept[0]
    rows = {place for place, number in enumerate(kept.sequence.tolist()) if number == NEWLINE}
    assert len(rows) == kept.newlines > 0
    assert kept.patches == 280


def test_a_method_that_needs_a_class_token_says_so(loaded, ids, picture):
    with pytest.raises(ValueError, match="has no class token"):
        embed(loaded[1], ids, picture, pruner=get_pruner("visionzip", keep_tokens=36))
    pruner = get_pruner("visionzip", keep_tokens=36, class_token=False)
    assert embed(loaded[1], ids, picture, pruner=pruner).kept[0].per_view()[0] == 36


def test_the_probe_stands_for_the_class_token(loaded, picture):
    tower = loaded[1].get_vision_tower()
    seen = tower.observe(picture[0])
    assert seen.class_features is None
    attention = tower.class_attention(seen.layer_input)
    assert torch.allclose(attention.sum(-1), torch.ones(7, 4), atol=1e-5)
    space = tower.joint_space()
    assert torch.allclose(attention, space.probe_attention(space.last_hidden(seen.features)), atol=1e-6)
    received = tower.mean_attention(seen.layer_input)
    assert torch.allclose(received.sum(-1), torch.ones(7, 4), atol=1e-5)


def test_the_tower_needs_no_folder_of_its_own_where_its_size_is_known():
    shapes = {
        "embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        "embeddings.position_embedding.weight": (729, 1152),
        "encoder.layers.0.mlp.fc1.weight": (4304, 1152),
        "encoder.layers.25.mlp.fc1.weight": (4304, 1152),
    }
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = tower_config(tensors, None, removed=0)
    assert (config.num_hidden_layers, config.num_attention_heads, config.image_size) == (26, 16, 384)
    assert (config.hidden_act, config.layer_norm_eps) == ("gelu_pytorch_tanh", 1e-6)
    small = {name: torch.empty(48, *tensor.shape[1:], device="meta") for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=r"width 48 needs the config\.json of its own folder"):
        tower_config(small, None, removed=0)


def test_a_tower_from_siglips_own_folder_loses_its_last_layer(video, loaded, picture):
    tower = SigLIPVisionTower(str(video / "checkpoints/google/siglip-so400m-patch14-384"))
    tower.load_model()
    assert tower.config.num_hidden_layers == 3
    space = loaded[1].get_vision_tower().joint_space()
    embeds = space.image_embeds(tower(picture[0]))
    assert torch.allclose(embeds, space.image_embeds_of_pixels(picture[0]), atol=1e-5)


def test_pinpoints_in_every_notation():
    pairs = [[384, 384], [384, 768], [768, 384], [768, 768]]
    assert parse_pinpoints("(1x1),...,(2x2)", 384) == pairs
    assert parse_pinpoints(str(pairs), 384) == parse_pinpoints(pairs, 384) == pairs
    with pytest.raises(ValueError, match="image_grid_pinpoints must be pairs or a range"):
        parse_pinpoints("six", 384)


def test_half_precision_and_a_saved_copy(video, loaded, ids, picture):
    checkpoint = str(video / "checkpoints/llava-onevision-tiny-qwen2-ov")
    _, half, _, _ = load_pretrained_model(checkpoint, device="cpu", dtype="bfloat16")
    pruner = get_pruner("script", keep_tokens=40)
    assert embed(half, ids, picture, pruner=pruner).inputs_embeds.dtype == torch.bfloat16
    copy = video / "checkpoints/saved-copy"
    loaded[1].save_pretrained(copy)
    loaded[0].save_pretrained(copy)
    _, again, _, _ = load_pretrained_model(str(copy), device="cpu")
    with torch.no_grad():
        again.config.image_aspect_ratio = "anyres_max_1"
        assert torch.equal(embed(again, ids, picture).inputs_embeds, embed(loaded[1], ids, picture).inputs_embeds)


def test_checkpoints_whose_output_matrix_is_the_embedding(video, loaded):
    """The small sizes of the family tie them and store no lm_head; both are cut to the tokenizer's length."""
    folder = shutil.copytree(video / "checkpoints/llava-onevision-tiny-qwen2-ov", video / "checkpoints/tied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _, tied, _, _ = load_pretrained_model(str(folder), device="cpu")
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert tied.lm_head.weight.shape[0] == 379
    assert torch.equal(tied.get_input_embeddings().weight, loaded[1].get_input_embeddings().weight)
