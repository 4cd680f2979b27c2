"""The trained toy: whether the methods choose the right tokens. Seeds are fixed, margins are wide.

The tower is trained to the end, the language model is not (README, "The toy"): what is held here is the selection, and
of the answers only that they are far from chance.
"""

import json

import numpy as np
import pytest
import torch
from results import Asked, accuracy, area_under_curve, build_world

from llava.model.builder import DEFAULT_CHECKPOINT, TOY_FOLDER, load_pretrained_model
from llava.pruning import get_pruner
from llava.pruning.functional import relevance_scores

SCENES, PER_SKILL = 24, 3
PROMPT = torch.tensor([[1, -200]])


@pytest.fixture(scope="module")
def toy():
    return load_pretrained_model(DEFAULT_CHECKPOINT, device="cpu")


@pytest.fixture(scope="module")
def world(toy):
    return build_world(toy[1], toy[2], SCENES, PER_SKILL)


def kept_mask(toy, world, asked: Asked, pruner) -> np.ndarray:
    """(576,) bool: the tokens kept for a question."""
    shown = world.encoded.pick([asked.scene])
    prompts = toy[1].embed_prompts(PROMPT, images=shown, pruner=pruner, query=asked.question.text)
    return prompts.kept[0].mask()[0].numpy()


def test_relevance_finds_the_asked_object(toy, world):
    model = toy[1]
    tower = model.get_vision_tower()
    asked = [a for a in world.asked if a.target.any()]
    texts, mask = tower.text_embeds([a.question.text for a in asked])
    embeds = world.encoded.image_embeds(tower)
    areas = []
    for row, a in enumerate(asked):
        valid = world.encoded.layouts[a.scene].eligible[0].numpy()
        raw = relevance_scores(embeds[a.scene][None], texts[row][None], mask[row][None], model.relevance_sign)[0]
        areas.append(area_under_curve(raw.numpy()[valid], a.target[valid]))
    assert len(areas) >= 100
    assert np.mean(areas) >= 0.9


def test_script_keeps_the_asked_object_and_the_wrong_sign_loses_it(toy, world):
    sign = toy[1].relevance_sign
    pruners = {
        "script": get_pruner("script", keep_tokens=16),
        "wrong sign": get_pruner("script", keep_tokens=16, relevance_sign=-sign),
        "without the question": get_pruner("script", keep_tokens=16, relevance="none"),
        "random": get_pruner("random", keep_tokens=16),
    }
    asked = [a for a in world.asked if a.target.any()]
    found = {
        name: np.mean([(kept_mask(toy, world, a, pruner) & a.target).any() for a in asked])
        for name, pruner in pruners.items()
    }
    assert found["script"] >= 0.85
    assert found["script"] >= found["without the question"] + 0.1
    assert found["script"] >= found["random"] + 0.3
    assert found["script"] >= found["wrong sign"] + 0.5


def test_the_graph_keeps_what_differs(toy, world):
    """Background tokens repeat each other: the graph filter alone keeps objects more often than chance."""
    pruner = get_pruner("script", keep_tokens=64, relevance="none", dpp=False)
    objects = {}
    for a in world.asked:
        objects.setdefault(a.scene, np.zeros(576, dtype=bool))
        objects[a.scene] |= a.target
    shares, chance = [], []
    for scene, mask in objects.items():
        example = next(a for a in world.asked if a.scene == scene)
        valid = world.encoded.layouts[scene].eligible[0].numpy()
        shares.append(mask[kept_mask(toy, world, example, pruner)].mean())
        chance.append(mask[valid].mean())
    assert np.mean(shares) >= 1.5 * np.mean(chance)


def test_two_questions_about_one_scene_keep_their_own_objects(toy, world):
    """More of a question's kept tokens lie on its own object than of those kept for another question."""
    pruner = get_pruner("script", keep_tokens=16)
    by_scene: dict[int, list[Asked]] = {}
    for asked in world.asked:
        if asked.target.any():
            by_scene.setdefault(asked.scene, []).append(asked)
    own, other = [], []
    for questions in by_scene.values():
        pairs = [(a, b) for a in questions for b in questions if not (a.target & b.target).any()]
        for first, second in pairs[:1]:
            masks = [kept_mask(toy, world, a, pruner) for a in (first, second)]
            own += [(masks[0] & first.target).sum(), (masks[1] & second.target).sum()]
            other += [(masks[1] & first.target).sum(), (masks[0] & second.target).sum()]
    assert len(own) >= 20
    assert np.mean(own) >= np.mean(other) + 1.0


def test_answers_are_far_from_chance_where_the_object_is_kept(toy, world):
    """Colours and shapes: blind guessing gives a tenth of the open questions and half of the yes/no ones."""
    tokenizer, model, _, _ = toy
    world.asked = [a for a in world.asked if a.skill == "attribute"]
    pruners = {"script": get_pruner("script", keep_tokens=16), "random": get_pruner("random", keep_tokens=16)}
    right = {n: np.mean(accuracy(model, tokenizer, world, world.encoded, p, batch=36)) for n, p in pruners.items()}
    assert right["script"] >= 0.45
    assert right["script"] >= right["random"] + 0.1


def test_toy_checkpoint_is_small_and_in_the_original_format():
    folders = [TOY_FOLDER / name for name in ("clip-toy-336", "llava-toy-v1.5")]
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 12 * 2**20
    config = json.loads((TOY_FOLDER / "llava-toy-v1.5/config.json").read_text())
    assert config["image_aspect_ratio"] == "pad"
    assert config["mm_vision_select_layer"] == -2
    assert config["mm_relevance_sign"] == 1
