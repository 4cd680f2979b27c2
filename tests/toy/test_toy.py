"""The trained toy: whether the methods choose the right tokens, and what it answers. Seeds are fixed, margins wide."""

import json

import numpy as np
import pytest
import torch
from questions import Question
from results import reading_report
from world import SKILLS, Asked, World, accuracy, area_under_curve, build_world

from llava.model.builder import DEFAULT_CHECKPOINT, TOY_FOLDER, load_pretrained_model
from llava.pruning import get_pruner
from llava.pruning.functional import relevance_scores

SCENES, PER_SKILL = 20, 3
PROMPT = torch.tensor([[1, -200]])


@pytest.fixture(scope="module")
def toy():
    return load_pretrained_model(DEFAULT_CHECKPOINT, device="cpu")


@pytest.fixture(scope="module")
def world(toy):
    return build_world(toy[1], toy[2], SCENES, PER_SKILL, crowded=True)


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
    assert 0.75 <= np.mean(areas) < 0.9  # as noisy as CLIP's: no patch was trained against text


def test_script_keeps_the_asked_object_and_the_wrong_sign_loses_it(toy, world):
    sign = toy[1].relevance_sign
    pruners = {
        "script": get_pruner("script", keep_tokens=8),
        "wrong sign": get_pruner("script", keep_tokens=8, relevance_sign=-sign),
        "without the question": get_pruner("script", keep_tokens=8, relevance="none"),
        "random": get_pruner("random", keep_tokens=8),
    }
    asked = [a for a in world.asked if a.target.any()][::2]
    found = {
        name: np.mean([(kept_mask(toy, world, a, pruner) & a.target).any() for a in asked])
        for name, pruner in pruners.items()
    }
    assert found["script"] >= 0.8
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
    """What is asked about is kept, and by another question as often as not lost."""
    pruner = get_pruner("script", keep_tokens=8)
    by_scene: dict[int, list[Asked]] = {}
    for asked in world.asked:
        if asked.target.any():
            by_scene.setdefault(asked.scene, []).append(asked)
    own, other = [], []
    for questions in by_scene.values():
        questions = questions[::2]
        masks = [kept_mask(toy, world, asked, pruner) for asked in questions]
        own += [(mask & asked.target).any() for mask, asked in zip(masks, questions, strict=True)]
        for asked in questions:
            others = [m for m, o in zip(masks, questions, strict=True) if not (o.target & asked.target).any()]
            other += [(mask & asked.target).any() for mask in others]
    assert len(own) >= 80
    assert np.mean(own) >= 0.95
    assert np.mean(other) <= 0.5


def test_reading_is_told_by_kind():
    """Swapped characters are told from wrong ones, and only questions about text count."""
    truths = [("text", "27"), ("text", "27"), ("text", "STOP"), ("text", "Yes"), ("existence", "Yes")]
    asked = [Asked(Question("?", truth, skill), skill, 0, np.zeros(576, dtype=bool)) for skill, truth in truths]
    report = reading_report(World(None, asked), ["72", "27", "stop", "No", "No"])
    assert report == {"number": [1, 1, 2], "word": [1, 0, 1], "yes or no": [0, 0, 1]}


def test_answers_follow_what_is_kept(toy, world):
    """Right unpruned and by Script; wrong where the object is lost: at random, by the wrong sign, unasked, and by
    relevance without variety.
    """
    tokenizer, model, _, _ = toy
    pruners = {
        "unpruned": None,
        "script, 64": get_pruner("script", keep_tokens=64),
        "script, 16": get_pruner("script", keep_tokens=16),
        "random, 16": get_pruner("random", keep_tokens=16),
        "uniform, 16": get_pruner("uniform", keep_tokens=16),
        "wrong sign, 16": get_pruner("script", keep_tokens=16, relevance_sign=-model.relevance_sign),
        "without the question, 16": get_pruner("script", keep_tokens=16, relevance="none"),
        "relevance alone, 16": get_pruner("script", keep_tokens=16, gsp=False, dpp=False),
        "script, 4": get_pruner("script", keep_tokens=4),
        "without the question, 4": get_pruner("script", keep_tokens=4, relevance="none"),
        "relevance alone, 4": get_pruner("script", keep_tokens=4, gsp=False, dpp=False),
    }
    half = World(world.encoded, world.asked[::2])
    right: dict[str, dict[str, float]] = {}
    for name, pruner in pruners.items():
        answers = accuracy(model, tokenizer, half, pruner, batch=36)
        found = {
            skill: [ok for a, ok in zip(half.asked, answers, strict=True) if a.skill == skill] for skill in SKILLS
        }
        right[name] = {skill: float(np.mean(oks)) for skill, oks in found.items()} | {"all": float(np.mean(answers))}
    for name in ("unpruned", "script, 64", "script, 16", "script, 4"):
        assert right[name]["existence"] >= 0.92, name
        assert right[name]["attribute"] >= 0.95, name
        assert right[name]["text"] >= (0.4 if name == "script, 4" else 0.95), name
    for name in ("random, 16", "uniform, 16", "wrong sign, 16"):
        assert right["script, 16"]["existence"] >= right[name]["existence"] + 0.2, name
        assert right["script, 16"]["attribute"] >= right[name]["attribute"] + 0.4, name
        assert right["script, 16"]["text"] >= right[name]["text"] + 0.8, name
    # To read a sign takes every character: without the question some are lost.
    assert right["script, 16"]["text"] >= right["without the question, 16"]["text"] + 0.4
    assert right["script, 16"]["attribute"] >= right["relevance alone, 16"]["attribute"] + 0.15
    assert right["script, 16"]["all"] >= right["relevance alone, 16"]["all"] + 0.05
    assert right["script, 4"]["existence"] >= right["without the question, 4"]["existence"] + 0.15
    assert right["script, 4"]["attribute"] >= right["without the question, 4"]["attribute"] + 0.3
    assert right["script, 4"]["attribute"] >= right["relevance alone, 4"]["attribute"] + 0.15


def test_toy_checkpoint_is_small_and_in_the_original_format():
    folders = [TOY_FOLDER / name for name in ("clip-toy-336", "llava-toy-v1.5", "llava-toy-v1.6")]
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 12e6
    for folder, aspect_ratio in zip(folders[1:], ("pad", "anyres"), strict=True):
        config = json.loads((folder / "config.json").read_text())
        assert config["image_aspect_ratio"] == aspect_ratio
        assert config["mm_vision_select_layer"] == -2
        assert config["mm_relevance_sign"] == 1


def test_the_next_toy_answers_from_tiles(world):
    """LLaVA-NeXT's way: overview and tiles; 4 tokens of each view are enough for Script, not for the wrong sign."""
    tokenizer, model, processor, _ = load_pretrained_model(str(TOY_FOLDER / "llava-toy-v1.6"), device="cpu")
    tiled = build_world(model, processor, 8, PER_SKILL)
    tiled.asked = [a for a in tiled.asked if a.skill == "attribute"]
    pruners = {
        "unpruned": None,
        "script": get_pruner("script", keep_tokens=4),
        "wrong sign": get_pruner("script", keep_tokens=4, relevance_sign=-model.relevance_sign),
    }
    right = {n: np.mean(accuracy(model, tokenizer, tiled, p, batch=8)) for n, p in pruners.items()}
    assert right["unpruned"] >= 0.75
    assert right["script"] >= 0.75
    assert right["script"] >= right["wrong sign"] + 0.35
