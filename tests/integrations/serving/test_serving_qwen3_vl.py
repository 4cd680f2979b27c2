"""Qwen3-VL in vLLM: rows of all DeepStack planes, places of pictures and frames; equality with the library's class."""

import numpy as np
import pytest
import torch
from engines import start
from served import Served, chat, filmed, script
from test_serving_llava import make_cold
from tiny_families import make_qwen3_vl

KEEP = 12
SIZES = [(280, 168), (168, 280)]  # landscape and portrait: 60 tokens each
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
FRAMES, TOKENS = 6, 20  # two of them become one of the video's three grids


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_vl")
    model = make_qwen3_vl(folder)
    limits = {"image": 2, "video": 1}
    pruning = {"keep_tokens": KEEP, "max_keep_tokens": 80}
    llm = start(folder, "ScriptQwen3VLForConditionalGeneration", pruning, limit_mm_per_prompt=limits)
    return Served(llm, model, folder)


@pytest.fixture(scope="module")
def clip():
    """Frames of 5 x 4 tokens."""
    return filmed(np.random.default_rng(0).integers(0, 255, (FRAMES, 140, 112, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES)
def test_pictures(served, pictures, size):
    picture = pictures[0].resize(size)
    cold, warm = served.equals_the_library(chat(PICTURE), {"image": picture}, {"images": picture}, script(KEEP))
    assert warm.num_cached_tokens > 0
    assert cold.prompt_token_ids.count(served.model.config.image_token_id) == KEEP


def test_all_kept_is_the_model_itself(served, pictures, clip):
    picture = pictures[0].resize(SIZES[1])
    served.equals_the_library(chat(PICTURE), {"image": picture}, {"images": picture}, keep_tokens=80)
    served.equals_the_library(chat(VIDEO), *clip, keep_tokens=80)


def test_frames_of_a_video(served, clip):
    """Each grid of two frames keeps its own, behind its time."""
    cold, _ = served.equals_the_library(chat(VIDEO), *clip, script(5), keep_tokens=5)
    assert cold.prompt_token_ids.count(served.model.config.video_token_id) == 3 * 5
    assert torch.bincount(served.spy.chosen[0] // TOKENS).tolist() == [5, 5, 5]


def test_frames_share_a_budget(served, clip):
    media, inputs = clip
    budget = {"keep_tokens": 7, "keep_per": "picture"}
    cold, _ = served.equals_the_library(chat(VIDEO), media, inputs, script(7, per="picture"), **budget)
    assert cold.prompt_token_ids.count(served.model.config.video_token_id) == 7
    assert torch.bincount(served.spy.chosen[0] // TOKENS).tolist() == [3, 2, 2]
    with pytest.raises(ValueError, match="lets the views of this video compete for one budget"):
        served.ask(chat(VIDEO), media, image_pruning_args={"scope": "global"})


def test_a_picture_and_a_video_in_one_prompt(served, pictures, clip):
    picture = pictures[0].resize(SIZES[0])
    media, inputs = clip
    both = {"image": picture, **media}, {"images": picture, **inputs}
    served.equals_the_library(chat(PICTURE + VIDEO), *both, script(KEEP))


def test_batches_and_two_questions(served, pictures):
    """Requests of one step bring offsets for each other's places only."""
    picture, other = pictures[0].resize(SIZES[0]), pictures[1].resize(SIZES[1])
    prompts = [chat(PICTURE), chat(PICTURE, "Where is the tree?"), chat(""), chat(PICTURE)]
    served.batch_equals_singles(prompts, [{"image": picture}, {"image": picture}, None, {"image": other}])
    make_cold(served.llm)
    served.spy.reset()
    for prompt in prompts[:2]:
        served.ask(prompt, {"image": picture})
    assert served.spy.encoded == 1
    assert not torch.equal(*served.spy.chosen)
