"""Gemma 3 in vLLM: tokens of a picture and of its crops, and equality with the library's class.

vLLM's attention for CPUs is causal inside pictures too, where the one for GPUs lets a picture's tokens see each other
both ways; so the library is asked without the mask that does that. A GPU's attention has not been run.
"""

import pytest
import torch
from engines import start
from served import Served, script
from tiny_families import make_gemma3

KEEP = 6
PROMPT = "<bos><start_of_turn>user\n<start_of_image>{}<end_of_turn>\n<start_of_turn>model\n"
ASKED = PROMPT.format("What is red?")
CROPS = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 32,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.6,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3")
    model = make_gemma3(folder)
    pruning = {"keep_tokens": KEEP, "max_keep_tokens": 16}
    llm = start(folder, "ScriptGemma3ForConditionalGeneration", pruning, mm_processor_kwargs=CROPS)
    return Served(llm, model, folder, without=("token_type_ids",))


@pytest.mark.parametrize("size, views", [((112, 112), 1), ((280, 112), 4)])
def test_pictures_and_crops(served, pictures, size, views):
    picture = pictures[0].resize(size)
    cold, _ = served.equals_the_library(ASKED, {"image": picture}, {"images": picture, **CROPS}, script(KEEP))
    assert cold.prompt_token_ids.count(served.model.config.image_token_id) == views * KEEP
    assert torch.bincount(served.spy.chosen[0] // 16).tolist() == [KEEP] * views


def test_crops_share_a_budget(served, pictures):
    picture = pictures[0].resize((280, 112))
    budget = {"keep_tokens": 10, "keep_per": "picture"}
    served.equals_the_library(
        ASKED, {"image": picture}, {"images": picture, **CROPS}, script(10, per="picture"), **budget
    )
    assert torch.bincount(served.spy.chosen[0] // 16).tolist() == [3, 3, 2, 2]
    with pytest.raises(ValueError, match="lets the views of this image compete for one budget"):
        served.ask(ASKED, {"image": picture}, image_pruning_args={"scope": "global"})


def test_all_kept_is_the_model_itself(served, pictures):
    picture = pictures[0].resize((280, 112))
    served.equals_the_library(ASKED, {"image": picture}, {"images": picture, **CROPS}, keep_tokens=16)


def test_batches(served, pictures):
    picture, wide = pictures[0].resize((112, 112)), pictures[1].resize((280, 112))
    prompts = [ASKED, PROMPT.format("Where is the tree?"), ASKED]
    served.batch_equals_singles(prompts, [{"image": picture}, {"image": picture}, {"image": wide}])
