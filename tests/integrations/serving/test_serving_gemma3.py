"""Gemma 3 in vLLM: tokens of a picture and of its crops, and equality with the library's class.

vLLM's attention for CPUs is causal inside pictures too, where the one for GPUs lets a picture's tokens see each other
both ways; so the library is asked without the mask that does that. A GPU's attention has not been run.
"""

import pytest
import torch
from engines import start
from served import Served, script
from tiny_families import make_gemma3

from llava.pruning import get_pruner

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


def test_pictures(served, pictures):
    picture = pictures[0].resize((112, 112))
    cold, _ = served.equals_the_library(ASKED, {"image": picture}, {"images": picture, **CROPS}, script(KEEP))
    assert cold.prompt_token_ids.count(served.model.config.image_token_id) == KEEP


def test_crops_keep_their_own(served, pictures):
    """By a method that reads no question: in the library the words about crops in the prompt are read as one."""
    picture = pictures[0].resize((280, 112))
    pruner = get_pruner("uniform", keep_tokens=KEEP)
    options = {"image_pruning_method": "uniform"}
    cold, _ = served.equals_the_library(ASKED, {"image": picture}, {"images": picture, **CROPS}, pruner, **options)
    assert cold.prompt_token_ids.count(served.model.config.image_token_id) == 4 * KEEP


@pytest.mark.parametrize("keep, counts", [(10, [3, 3, 2, 2]), (3, [1, 1, 1, 0])])
def test_crops_share_a_budget(served, pictures, keep, counts):
    served.spy.reset()
    answer = served.ask(ASKED, {"image": pictures[0].resize((280, 112))}, keep_tokens=keep, keep_per="picture")
    ids, config = answer.prompt_token_ids, served.model.config
    marks = [place for place, token in enumerate(ids) if token == config.boi_token_index]
    assert [ids.index(config.eoi_token_index, place) - place - 1 for place in marks] == counts
    assert torch.bincount(served.spy.chosen[0] // 16, minlength=4).tolist() == counts


def test_crops_that_compete_are_refused(served, pictures):
    with pytest.raises(ValueError, match="lets the views of this image compete for one budget"):
        served.ask(ASKED, {"image": pictures[0].resize((280, 112))}, image_pruning_args={"scope": "global"})


def test_all_kept_is_the_model_itself(served, pictures):
    picture = pictures[0].resize((280, 112))
    served.equals_the_library(ASKED, {"image": picture}, {"images": picture, **CROPS}, keep_tokens=16)


def test_batches(served, pictures):
    picture, wide = pictures[0].resize((112, 112)), pictures[1].resize((280, 112))
    prompts = [ASKED, PROMPT.format("Where is the tree?"), ASKED]
    served.batch_equals_singles(prompts, [{"image": picture}, {"image": picture}, {"image": wide}])
