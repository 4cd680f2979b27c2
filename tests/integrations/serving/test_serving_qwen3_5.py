"""Qwen3.5 in vLLM: recurrent layers and attention read the kept tokens, as in the library's class.

vLLM's recurrent layers run on a CPU in bfloat16 only, so answers are compared as far as both ways of rounding agree.
"""

import numpy as np
import pytest
from engines import start
from PIL import Image
from served import Served, chat, script
from tiny_families import make_qwen3_5

KEEP = 12
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_5")
    model = make_qwen3_5(folder)
    pruning = {"keep_tokens": KEEP, "max_keep_tokens": 80}
    llm = start(folder, "ScriptQwen3_5ForConditionalGeneration", pruning, dtype="bfloat16")
    return Served(llm, model.bfloat16(), folder, agreeing=2, tolerance=0.08)


@pytest.fixture(scope="module")
def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (168, 280, 3), dtype=np.uint8))


def test_pictures(served, noise):
    cold, _ = served.equals_the_library(chat(PICTURE), {"image": noise}, {"images": noise}, script(KEEP))
    assert cold.prompt_token_ids.count(served.model.config.image_token_id) == KEEP


def test_all_kept_is_the_model_itself(served, noise):
    served.equals_the_library(chat(PICTURE), {"image": noise}, {"images": noise}, keep_tokens=80)
