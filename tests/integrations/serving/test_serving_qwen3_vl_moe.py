"""Qwen3-VL's mixture of experts in vLLM: equality with the library's class."""

import pytest
from engines import start
from served import Served, chat, script
from tiny_families import make_qwen3_vl_moe

KEEP = 12
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_vl_moe")
    model = make_qwen3_vl_moe(folder)
    return Served(start(folder, "ScriptQwen3VLMoeForConditionalGeneration", {"keep_tokens": KEEP}), model, folder)


def test_pictures(served, pictures):
    picture = pictures[0].resize((280, 168))
    served.equals_the_library(chat(PICTURE), {"image": picture}, {"images": picture}, script(KEEP))
