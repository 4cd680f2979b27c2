"""Qwen2.5-VL in vLLM: counts, positions warm and cold, and equality with the library's class under the same pruner."""

import numpy as np
import pytest
import torch
from engines import Spy, ask, logprobs, start
from served import Served, chat, filmed, script
from test_serving_llava import make_cold
from tiny_models import make_qwen2_5_vl
from transformers import AutoProcessor

from llava.pruning import get_pruner

KEEP = 16
SIZES = [(280, 168), (168, 280)]  # landscape and portrait: 60 tokens each
ARCHITECTURE = "ScriptQwen2_5_VLForConditionalGeneration"


def prompt_of(question):
    return (
        f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    return folder, make_qwen2_5_vl(folder)


def test_vllms_own_pruning_of_videos_is_refused(qwen):
    with pytest.raises(Exception, match="start the server without the flag"):
        start(qwen[0], ARCHITECTURE, {"keep_tokens": KEEP}, video_pruning_rate=0.5)


@pytest.fixture(scope="module")
def llm(qwen):
    limits = {"image": 2, "video": 1}
    return start(qwen[0], ARCHITECTURE, {"keep_tokens": KEEP, "max_keep_tokens": 29}, limit_mm_per_prompt=limits)


@pytest.fixture(scope="module")
def spy(llm):
    return Spy(llm)


@pytest.mark.parametrize("size", SIZES)
def test_equals_the_transformers_host(llm, spy, qwen, pictures, size):
    folder, model = qwen
    processor = AutoProcessor.from_pretrained(folder)
    picture = pictures[0].resize(size)
    prompt = prompt_of("What is red?")
    make_cold(llm)
    cold = ask(llm, prompt, picture)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    assert len(cold.prompt_token_ids) == inputs["input_ids"].shape[1] - 60 + KEEP
    wanted = {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    with torch.inference_mode(), get_pruner("script", keep_tokens=KEEP)(model, processor):
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False, **wanted)
    new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    theirs = [row[0].log_softmax(-1)[token].item() for row, token in zip(output.logits, new, strict=True)]
    warm = ask(llm, prompt, picture)
    assert warm.num_cached_tokens > 0
    for served in (cold, warm):
        assert list(served.outputs[0].token_ids)[: len(new)] == new
        assert logprobs(served)[: len(new)] == pytest.approx(theirs, abs=5e-4)


def test_two_questions_two_selections_one_pass_of_the_tower(llm, spy, pictures):
    make_cold(llm)
    spy.reset()
    for question in ("What is red?", "Where is the tree?"):
        ask(llm, prompt_of(question), pictures[0].resize(SIZES[0]))
    assert spy.encoded == 1
    assert not torch.equal(*spy.chosen)


def test_budgets_follow_the_picture(llm, pictures):
    texts = len(ask(llm, prompt_of("A?"), pictures[0].resize(SIZES[0])).prompt_token_ids) - KEEP
    small = ask(llm, prompt_of("A?"), pictures[0].resize((112, 112)), image_pruning_rate=0.5)  # 16 tokens
    assert len(small.prompt_token_ids) - texts == 8
    with pytest.raises(ValueError, match="keeps 30 visual tokens of a view of 60, but the server allows 29"):
        ask(llm, prompt_of("A?"), pictures[0].resize(SIZES[0]), image_pruning_rate=0.5)


def test_videos(llm, qwen):
    """Every grid of two frames keeps its own tokens, which stand at their time."""
    folder, model = qwen
    frames = np.random.default_rng(0).integers(0, 255, (6, 140, 112, 3), dtype=np.uint8)
    prompt = chat("<|vision_start|><|video_pad|><|vision_end|>")
    served = Served(llm, model, folder)
    cold, _ = served.equals_the_library(prompt, *filmed(frames), script(KEEP))
    assert cold.prompt_token_ids.count(model.config.video_token_id) == 3 * KEEP
