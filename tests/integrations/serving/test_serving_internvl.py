"""InternVL in vLLM: m tokens of every tile and of the thumbnail, between the marks of the picture."""

import pytest
import torch
from engines import Spy, ask, start
from PIL import Image
from test_serving_llava import make_cold
from tiny_models import make_internvl

KEEP = 4
QUESTION = "What is red?"
PROMPT = f"<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("internvl")
    make_internvl(folder)
    pruning = {"keep_tokens": KEEP, "max_keep_tokens": 16}
    return start(folder, "ScriptInternVLChatModel", pruning, load_format="dummy", trust_remote_code=True)


@pytest.fixture(scope="module")
def spy(llm):
    return Spy(llm)


@pytest.mark.parametrize("size, tiles", [((112, 112), 1), ((224, 112), 3), ((336, 224), 7)])
def test_tokens_per_tile(llm, spy, size, tiles):
    make_cold(llm)
    spy.reset()
    picture = Image.effect_noise(size, 80).convert("RGB")
    tokenizer = llm.get_tokenizer()
    context, opening, closing = tokenizer.convert_tokens_to_ids(["<IMG_CONTEXT>", "<img>", "</img>"])
    for keep in (KEEP, 16):
        ids = ask(llm, PROMPT, picture, tokens=2, keep_tokens=keep).prompt_token_ids
        assert ids.count(context) == keep * tiles
        first = ids.index(opening)
        assert ids[first + 1 + keep * tiles] == closing
    assert spy.encoded == tiles  # the second time the features are at hand
    assert spy.chosen[0].shape == (tiles * KEEP,)
    assert spy.chosen[1] is None


def test_rows_are_those_of_the_selection(llm, spy):
    """What the model gives for a picture is what its own encoder gives at the chosen places."""
    make_cold(llm)
    spy.reset()
    given = []
    embed = spy.model.embed_multimodal

    def noted(**kwargs):
        rows = embed(**kwargs)
        given.append((kwargs["pixel_values_flat"], rows[0]))
        return rows

    spy.model.embed_multimodal = noted
    ask(llm, PROMPT, Image.effect_noise((224, 112), 80).convert("RGB"), tokens=2)
    del spy.model.embed_multimodal
    pixels, rows = given[0]
    with torch.inference_mode():
        features = spy.model.extract_feature(pixels)
    torch.testing.assert_close(rows, features.flatten(0, 1)[spy.chosen[0]])
