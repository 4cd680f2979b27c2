"""The toy's world: scenes and questions are the same on every machine, and what is committed is what is generated."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scenes import make_scene
from world import area_under_curve, patches_of

from llava.model.builder import TOY_FOLDER

SCRIPTS = Path(__file__).parents[2] / "scripts/toy"


@pytest.mark.parametrize("bench, hash_seed", [("pope", "1"), ("vqav2", "2"), ("gqa", "3")])
def test_committed_questions_are_what_the_generator_makes(tmp_path, bench, hash_seed):
    """Under any hash seed: nothing may depend on the order of a set."""
    code = f"import make_data, pathlib; make_data.make_{bench}(pathlib.Path({str(tmp_path)!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, env=environment, check=True)
    made = [path for path in tmp_path.rglob("*.json*") if path.is_file()]
    assert len(made) >= 2
    for path in made:
        committed = TOY_FOLDER / "data/eval" / bench / path.relative_to(tmp_path)
        if path.suffix == ".gz":  # the same text; how it is packed is the compressor's affair
            assert gzip.decompress(path.read_bytes()) == gzip.decompress(committed.read_bytes())
        else:
            assert path.read_text() == committed.read_text()


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
    boxes = json.loads(gzip.decompress((folder / "boxes.json.gz").read_bytes()))
    questions = [json.loads(line) for line in lists[0].read_text().splitlines()]
    assert 200 <= len(questions) <= 600
    for question in questions[::7]:
        assert question["image"] in boxes["images"]
        assert list(folder.rglob(question["image"]))
