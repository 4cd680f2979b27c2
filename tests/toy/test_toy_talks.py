"""What the language model of the toy is trained on: crowded scenes, questions about several things, legible signs."""

import numpy as np
import pytest
from anyres import view_maps
from conversations import ViewMap, choose_patches, most_forced
from formats import checklist, wrong_text
from questions import background_of, most_of, which_shapes
from scenes import CHARACTERS, SIGN, THINGS, make_scene, scene_rng
from train_language import answerable
from views import IGNORE, padded_view, patch_labels, patch_objects


def map_of(scene) -> tuple[ViewMap, np.ndarray]:
    view = padded_view(scene)
    owner = patch_objects(view.instances, len(scene.layout.objects))
    labels = patch_labels(owner, view.letters, scene.layout)
    return ViewMap(owner, labels[3] != IGNORE), labels


@pytest.mark.parametrize("crowded", [False, True])
def test_a_signs_characters_stand_one_to_a_patch_in_their_order(crowded):
    read = 0
    for index in range(6):
        scene = make_scene("val", index, crowded=crowded)
        view, labels = map_of(scene)
        for number, thing in enumerate(scene.layout.objects):
            patches = view.characters(number)
            written = sorted((labels[4, patch], CHARACTERS[labels[3, patch]]) for patch in patches)
            assert "".join(character for _, character in written) == (thing.text or "")
            assert [position for position, _ in written] == list(range(len(written)))
            assert list(np.diff(patches)) == [1] * max(0, len(patches) - 1)
            read += thing.shape == SIGN
    assert read >= 6


def test_what_is_asked_about_can_be_told_from_the_patches_chosen():
    rng = np.random.default_rng(0)
    for index in range(6):
        view, _ = map_of(make_scene("val", index, crowded=True))
        objects = [number for number in np.unique(view.owner) if number >= 0]
        targets = rng.choice(objects, 5, replace=False).tolist()
        patches = choose_patches(view, targets, 32, rng)
        assert len(patches) == len(set(patches)) == 32
        assert np.all(np.diff(patches) > 0)
        assert view.needed(targets) <= most_forced(32)
        assert set(targets) <= view.legible(patches)


def test_a_sign_is_not_legible_without_one_of_its_characters():
    view = ViewMap(np.array([0, 0, 0, 1, 1, -1]), np.array([False, True, True, False, False, False]))
    assert view.legible(np.array([1, 2, 3])) == {0, 1}
    assert view.legible(np.array([0, 1, 4])) == {1}
    assert view.legible(np.array([0, 2, 5])) == set()
    assert view.needed([0, 1, 7]) == 3


def test_questions_are_asked_together_only_if_their_things_fit():
    scene = make_scene("val", 1, crowded=True)
    view, _ = map_of(scene)
    rng = scene_rng("val", 1, 3)
    questions = list({(q := which_shapes(scene.layout, rng)).text: q for _ in range(40)}.values())
    assert len(questions) >= 2
    every, targets = answerable(questions, scene.layout, [view], None)
    assert every == questions
    few, some = answerable(questions, scene.layout, [view], 4)
    assert few[0] == questions[0]
    assert set(some) < set(targets)
    assert view.needed(some) <= max(most_forced(4), view.needed(questions[0].targets(scene.layout)))


def test_a_checklist_tells_what_signs_say():
    layout, rng = make_scene("val", 1, crowded=True).layout, np.random.default_rng(1)
    written = {(thing.color, thing.text) for thing in layout.objects if thing.text}
    everything = set(range(len(layout.objects)))
    told = {"Yes": set(), "No": set()}
    for line in ", ".join(checklist(layout, everything, 12, rng) for _ in range(20)).split(", "):
        *words, answer = line.split()
        if len(words) == 3:
            color, shape, text = words
            assert shape == SIGN
            told[answer].add((color, text))
    assert told["Yes"] == written
    assert not told["No"] & written
    assert {color for color, _ in told["No"]} <= {color for color, _ in written}
    assert {wrong_text("47", rng) for _ in range(60)} > {"74"}
    assert all(wrong_text("33", rng) != "33" for _ in range(60))


def test_what_is_asked_about_several_things_and_about_the_whole():
    seen = 0
    for index in range(8):
        layout, rng = make_scene("test", index, crowded=True).layout, scene_rng("test", index, 4)
        question = which_shapes(layout, rng)
        color = question.asked[0].color
        shapes = question.answer.split(", ")
        assert 2 <= len(shapes) <= 3
        assert shapes == sorted({t.shape for t in layout.objects if t.color == color}, key=THINGS.index)
        assert background_of(layout, rng).answer == layout.background
        most = most_of(layout, rng)
        if most is not None:
            count = {shape: sum(t.shape == shape for t in layout.objects) for shape in THINGS}
            assert count.pop(most.answer) >= max(count.values()) + 2
            seen += 1
    assert seen >= 4


def test_a_tile_shows_the_same_signs_as_the_overview():
    scene = make_scene("val", 1, crowded=True)
    overview, *tiles = view_maps(scene)
    signs = [number for number, thing in enumerate(scene.layout.objects) if thing.shape == SIGN]
    for number in signs:
        whole = len(overview.characters(number))
        assert whole == len(scene.layout.objects[number].text)
        assert sum(len(tile.characters(number)) for tile in tiles) == whole
