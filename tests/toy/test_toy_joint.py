"""CLIP's text side of the toy: what its training touches, what it computes, and what it has learned."""

import json
from collections import Counter

import numpy as np
import pytest
import relevance_layers
import torch
from scenes import SIGN, make_scene
from tower import clip_config, vision_features
from train_joint import JointTraining, class_output, renew_joint_side, scene_caption
from transformers import CLIPModel

JOINT = ("text_model.", "visual_projection.", "text_projection.", "logit_scale", "vision_model.post_layernorm.")


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIPModel(clip_config(40)).eval()


def test_class_token_alone_is_what_the_whole_layer_gives(clip):
    torch.nn.init.normal_(clip.vision_model.encoder.layers[-1].layer_norm1.bias)
    torch.nn.init.normal_(clip.vision_model.encoder.layers[-1].self_attn.v_proj.bias)
    features = 3 * torch.randn(2, 577, 128) + 1
    with torch.no_grad():
        whole = clip.vision_model.encoder.layers[-1](features, None)
        whole = whole[0] if isinstance(whole, tuple) else whole
        torch.testing.assert_close(class_output(clip, features), whole[:, 0], rtol=1e-5, atol=1e-5)


def test_only_what_llava_does_not_read_is_trained(clip):
    last = f"vision_model.encoder.layers.{clip.config.vision_config.num_hidden_layers - 1}."
    pixels, before = torch.randn(1, 3, 336, 336), {name: p.clone() for name, p in clip.state_dict().items()}
    read = vision_features(clip, pixels)
    renew_joint_side(clip, seed=1)
    model = JointTraining(clip)
    tokens = {"input_ids": torch.randint(3, 40, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    loss, found = model.loss(torch.randn(4, 577, 128), tokens)
    loss.backward()
    assert 0 <= found <= 1
    for name, parameter in clip.named_parameters():
        joint = name.startswith((*JOINT, last))
        assert parameter.requires_grad == joint, name
        is_moved = joint and not name.startswith(f"{last}self_attn.k_proj.bias")  # the same for all keys: no effect
        assert (parameter.grad is not None) == is_moved, name
        assert joint or torch.equal(parameter, before[name]), name
    assert torch.equal(vision_features(clip, pixels), read)


def test_captions_name_two_to_five_of_what_can_be_seen():
    layout = make_scene("val", 3, crowded=True).layout
    seen = list(range(0, len(layout.objects), 2))
    shapes = {layout.objects[k].shape for k in seen} | {"object"}
    hidden = {thing.shape for thing in layout.objects} - shapes
    numbers = set()
    for seed in range(60):
        text = scene_caption(layout, seen, np.random.default_rng(seed))
        words = text.replace(",", " ").replace(".", " ").split()
        named = [word for word in words if word in shapes]
        numbers.add(len(named))
        assert not hidden & set(words)
    assert numbers == {2, 3, 4, 5}


def test_crowded_scenes_share_shapes_and_colours():
    for index in range(8):
        things = make_scene("test", index, crowded=True).layout.objects
        assert 20 <= len(things) <= 32
        pairs = [(thing.shape, thing.color) for thing in things if thing.shape != SIGN]
        (flock, number), (_, next_to_it) = Counter(pairs).most_common(2)
        assert 6 <= number <= 9
        assert next_to_it == 1
        edges = {edge for thing in things if (thing.shape, thing.color) == flock for edge in thing.box}
        assert all(edge % 14 == 0 for edge in edges)
        pairs = list(dict.fromkeys(pairs))
        assert max(thing.box[2] - thing.box[0] for thing in things) >= 4 * 14
        by_shape = {shape: [c for s, c in pairs if s == shape] for shape, _ in pairs}
        assert sum(len(colors) >= 2 for colors in by_shape.values()) >= 2
        assert sum(len(colors) == 1 for colors in by_shape.values()) >= 2
    first, again = make_scene("test", 1, crowded=True), make_scene("test", 1, crowded=True)
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))


def test_relevance_by_layer(tmp_path, capsys):
    """Patches were never told what they mean, and yet those of the layer that is read are found, sign +1."""
    relevance_layers.main(["--scenes", "12", "--json", str(tmp_path / "layers.json")])
    report = json.loads((tmp_path / "layers.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    for world, least in zip(relevance_layers.WORLDS, (0.6, 0.85), strict=True):
        layers = report[world]["layers"]
        assert list(layers) == ["0", "1", "2", "3", "4", "5"]
        for skill, cell in layers["4"].items():
            assert cell["auc"] > max(least, layers["1"][skill]["auc"] + 0.05), (world, skill)
