"""The trained toy: answers, and whether the methods choose the right tokens. Seeds are fixed, margins are wide."""

import json

import numpy as np
import pytest
import torch
from results import Asked, World, accuracy, area_under_curve, build_world, patches_of
from scenes import make_scene

from llava.model.builder import DEFAULT_CHECKPOINT, TOY_FOLDER, load_pretrained_model
from llava.pruning import get_pruner
from llava.pruning.functional import relevance_scores

SCENES, PER_SKILL = 24, 3


@pytest.fixture(scope="module")
def toy():
    return load_pretrained_model(DEFAULT_CHECKPOINT, device="cpu")


@pytest.fixture(scope="module")
def world(toy):
    _, model, processor, _ = toy
    whole = build_world(model, processor, SCENES, PER_SKILL)
    return World(whole.pixels, whole.encoded, [asked for asked in whole.asked if asked.skill != "text"])


def right(toy, world, pruner):
    tokenizer, model, _, _ = toy
    return float(np.mean(accuracy(model, tokenizer, world, world.encoded, pruner, batch=36)))


def test_the_toy_answers_and_script_keeps_its_answers(toy, world):
    unpruned = right(toy, world, None)
    assert unpruned >= 0.9
    assert right(toy, world, get_pruner("script", keep_tokens=64)) >= unpruned - 0.08


def test_at_sixteen_tokens_script_beats_random_and_the_wrong_sign_fails(toy, world):
    sign = toy[1].relevance_sign
    script = right(toy, world, get_pruner("script", keep_tokens=16))
    random = right(toy, world, get_pruner("random", keep_tokens=16))
    wrong = right(toy, world, get_pruner("script", keep_tokens=16, relevance_sign=-sign))
    assert script >= random + 0.12
    assert script >= wrong + 0.12


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
    assert np.mean(areas) >= 0.85


def test_two_questions_about_one_scene_keep_their_own_objects(toy, world):
    """Of each question's kept tokens, more lie on its own object than the other question's tokens do."""
    model = toy[1]
    prompt = torch.tensor([[1, -200]])
    pruner = get_pruner("script", keep_tokens=16)
    by_scene: dict[int, list[Asked]] = {}
    for asked in world.asked:
        if asked.target.any():
            by_scene.setdefault(asked.scene, []).append(asked)
    own, other = [], []
    for scene, questions in by_scene.items():
        pairs = [(a, b) for a in questions for b in questions if not (a.target & b.target).any()]
        for first, second in pairs[:1]:
            masks = [
                model.embed_prompts(prompt, images=world.encoded.pick([scene]), pruner=pruner, query=a.question.text)
                .kept[0]
                .mask()[0]
                .numpy()
                for a in (first, second)
            ]
            own += [masks[0][first.target].sum(), masks[1][second.target].sum()]
            other += [masks[1][first.target].sum(), masks[0][second.target].sum()]
    assert len(own) >= 20
    assert np.mean(own) >= np.mean(other) + 1.0
    assert np.mean(np.array(own) > 0) >= 0.85


# --- data ----------------------------------------------------------------------------------------------------------


def test_scenes_are_deterministic_and_splits_differ():
    first, again, other = make_scene("test", 5), make_scene("test", 5), make_scene("train", 5)
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    assert first.layout == again.layout
    assert first.layout != other.layout
    assert 8 <= len(first.layout.objects) <= 16


def test_area_under_curve_counts_ties_half():
    positive = np.array([True, False, False, True])
    assert area_under_curve(np.array([3.0, 1.0, 2.0, 4.0]), positive) == 1.0
    assert area_under_curve(np.array([1.0, 3.0, 4.0, 2.0]), positive) == 0.0
    assert area_under_curve(np.ones(4), positive) == 0.5


def test_patches_of_a_box_on_a_padded_square():
    mask = patches_of([(0, 0, 28, 14)], (336, 168)).reshape(24, 24)
    assert np.argwhere(mask).tolist() == [[6, 0], [6, 1]]


@pytest.mark.parametrize("bench", ["pope", "gqa", "vqav2", "textvqa", "vizwiz"])
def test_committed_questions_match_their_pictures_and_boxes(bench):
    folder = TOY_FOLDER / "data/eval" / bench
    lists = [path for path in folder.glob("*.jsonl") if "test2015" not in path.name]
    boxes = json.loads((folder / "boxes.json").read_text())
    questions = [json.loads(line) for line in lists[0].read_text().splitlines()]
    assert 200 <= len(questions) <= 600
    for question in questions[::7]:
        assert question["image"] in boxes["images"]
        assert list(folder.rglob(question["image"]))


def test_toy_checkpoint_is_small_and_in_the_original_format():
    size = sum(path.stat().st_size for name in ("clip-toy-336", "llava-toy-v1.5", "llava-toy-v1.6")
               for path in (TOY_FOLDER / name).iterdir())  # fmt: skip
    assert size < 12 * 2**20
    config = json.loads((TOY_FOLDER / "llava-toy-v1.5/config.json").read_text())
    assert config["image_aspect_ratio"] == "pad"
    assert config["mm_vision_select_layer"] == -2
