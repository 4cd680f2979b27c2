"""Pictures and videos as one value: what is checked, and how several in a prompt are read."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from llava.layout.tiles import parse_pinpoints, reads_as_squares
from llava.layout.visuals import Reading, Visuals, modality_list

ONEVISION = Reading(image_aspect_ratio="anyres_max_9", mm_patch_merge_type="spatial_unpad")


@pytest.mark.parametrize("word", ["vidoe", "Video", "text", "", None, 3])
def test_an_unknown_modality_is_refused(word):
    with pytest.raises(ValueError, match=f"a modality is one of image, video; got {word!r}"):
        modality_list([word], 2)


def test_a_single_modality_holds_for_all():
    assert modality_list("video", 3) == modality_list(["video"], 3) == ["video"] * 3
    assert modality_list(None, 2) == ["image"] * 2
    with pytest.raises(ValueError, match="3 images and videos, but 2 modalities"):
        modality_list(["image", "video"], 3)


def test_a_reading_has_the_configuration_s_keys_and_leaves_it_alone():
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=[[1, 2]], hidden_size=4)
    reading = Reading.of(config, image_grid_pinpoints=[[3, 4]])
    assert (reading.image_aspect_ratio, reading.image_grid_pinpoints) == ("anyres", [[3, 4]])
    assert config.image_grid_pinpoints == [[1, 2]]
    assert Reading.of(reading) == reading
    with pytest.raises(TypeError, match="mm_pool_mode"):
        Reading.of(config, mm_pool_mode="max")


def test_the_rule_of_several_pictures_is_onevision_s():
    assert [reads_as_squares("anyres_max_9", count) for count in (0, 1, 2, 5)] == [False, False, True, True]
    assert not any(reads_as_squares(ratio, 3) for ratio in ("anyres", "pad", None))
    assert ONEVISION.for_pictures(2) == dataclasses.replace(ONEVISION, image_aspect_ratio="pad")
    assert ONEVISION.for_pictures(1) is ONEVISION


def test_pictures_are_read_by_the_prompt_that_they_are_in():
    squares = [torch.zeros(1, 3, 4, 4)] * 4
    visuals = Visuals.of(squares, [(8, 4)] * 4, ["image", "image", "image", "video"], ONEVISION)
    found = [one.reading.image_aspect_ratio for one in visuals.in_prompts([[0], [1, 2, 3]]).each]
    assert found == ["anyres_max_9", "pad", "pad", "anyres_max_9"]
    with_video = [one.reading.image_aspect_ratio for one in visuals.in_prompts([[0, 3]]).each]
    assert with_video[0] == "anyres_max_9"  # a video is no second picture
    tiles = Visuals.of([torch.zeros(5, 3, 4, 4)] * 2, [(8, 4)] * 2, None, ONEVISION)
    assert tiles.in_prompts([[0, 1]]) == tiles


def test_numbers_must_agree():
    with pytest.raises(ValueError, match="2 images but 1 image_sizes"):
        Visuals.of(torch.zeros(2, 3, 4, 4), [(1, 1)], None, ONEVISION)


def test_videos_that_are_pooled_in_different_ways_are_apart():
    one, other = Reading(mm_spatial_pool_mode="max"), Reading(mm_spatial_pool_mode="average")
    videos = [Visuals.of([torch.zeros(2, 3, 4, 4)], None, "video", reading).each[0] for reading in (one, other, one)]
    picture = Visuals.of([torch.zeros(1, 3, 4, 4)], None, "image", one).each[0]
    assert Visuals((*videos, picture)).groups() == [[0, 2], [1], [3]]


def test_pinpoints_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"must be pairs or a range .*, got None"):
        parse_pinpoints(None, 336)
