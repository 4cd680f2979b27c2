"""InternVL 3.5 in vLLM: m tokens of every tile and of the thumbnail, or of every frame, between their marks."""

import numpy as np
import pytest
import torch
from engines import Spy, ask, start
from PIL import Image
from test_serving_llava import make_cold
from tiny_models import make_internvl
from vllm import SamplingParams

KEEP = 4
QUESTION = "What is red?"
PROMPT = f"<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("internvl")
    make_internvl(folder)
    pruning = {"keep_tokens": KEEP, "max_keep_tokens": 16}
    options = {"load_format": "dummy", "trust_remote_code": True, "limit_mm_per_prompt": {"image": 2, "video": 1}}
    return start(folder, "ScriptInternVLChatModel", pruning, **options)


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


@pytest.mark.parametrize("keep", [10, 28, 1])
def test_a_budget_for_the_picture(llm, spy, keep):
    """InternVL3's published budgets are for a picture: its tiles share them."""
    make_cold(llm)
    spy.reset()
    context = llm.get_tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>")
    picture = Image.effect_noise((336, 224), 80).convert("RGB")
    ids = ask(llm, PROMPT, picture, tokens=2, keep_tokens=keep, keep_per="picture").prompt_token_ids
    assert ids.count(context) == len(spy.chosen[0]) == keep
    shares = [int((spy.chosen[0] // 16 == tile).sum()) for tile in range(7)]
    assert shares == [keep // 7 + (tile < keep % 7) for tile in range(7)]


def slow_mass(model, words, tokens):
    """The formula word by word and head by head, on what the decoder's modules do to a unit matrix."""
    config, layer = model.config.get_text_config(), model.language_model.model.layers[0]
    heads, keys, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    weight, _ = layer.self_attn.qkv_proj(torch.eye(config.hidden_size))

    def norm(row, own):
        return row / (row.square().mean() + config.rms_norm_eps).sqrt() * own.weight

    def projected(row):
        return norm(row, layer.input_layernorm) @ weight

    mass = torch.zeros(len(tokens))
    for head in range(heads):
        key = heads * width + head // (heads // keys) * width
        own_keys = [norm(projected(row)[key : key + width], layer.self_attn.k_norm) for row in tokens]
        looked = []
        for word in words:
            query = norm(projected(word)[head * width : (head + 1) * width], layer.self_attn.q_norm)
            looked.append(torch.stack([query @ own / width**0.5 for own in own_keys]).softmax(0))
        mass += torch.stack(looked).amax(0)
    return mass


def test_the_first_attention_of_a_qwen3_is_read(llm, spy):
    """With its norms of queries and keys, in vLLM's fused modules."""
    ask(llm, PROMPT, Image.effect_noise((112, 112), 80).convert("RGB"), tokens=2)
    language = spy.model.script_selector.language
    generator = torch.Generator().manual_seed(0)
    words, tokens = torch.randn(3, 128, generator=generator), torch.randn(9, 128, generator=generator)
    with torch.inference_mode():
        found = language.attention.mass(words[None], tokens[None])[0]
        torch.testing.assert_close(found, slow_mass(spy.model, words, tokens), atol=2e-5, rtol=2e-4)


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


def ask_about_video(llm, frames, **options):
    request = {"prompt": PROMPT.replace("<image>", "<video>"), "multi_modal_data": {"video": frames}}
    sampling = SamplingParams(temperature=0, max_tokens=2)
    return llm.generate([{**request, "mm_processor_kwargs": options or None}], sampling, use_tqdm=False)[0]


@pytest.mark.parametrize(
    "options, counts", [({}, [4] * 5), ({"keep_tokens": 12, "keep_per": "picture"}, [3, 3, 2, 2, 2])]
)
def test_every_frame_of_a_video_keeps_its_own(llm, spy, options, counts):
    """Between the marks of each frame stand as many tokens as are chosen of it."""
    make_cold(llm)
    spy.reset()
    frames = np.random.default_rng(0).integers(0, 255, (5, 112, 112, 3), dtype=np.uint8)
    ids = ask_about_video(llm, frames, **options).prompt_token_ids
    context, opening, closing = llm.get_tokenizer().convert_tokens_to_ids(["<|video_pad|>", "<img>", "</img>"])
    openings = [place for place, token in enumerate(ids) if token == opening]
    assert [ids.index(closing, place) - place - 1 for place in openings] == counts
    assert ids.count(context) == sum(counts)
    assert torch.bincount(spy.chosen[0] // 16, minlength=5).tolist() == counts
    assert spy.encoded == 5


def test_frames_that_compete_are_refused(llm):
    """How many of each are kept would be known only when they are chosen; the prompt is laid out before."""
    frames = np.zeros((3, 112, 112, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="lets the views of this video compete for one budget, but this model writes"):
        ask_about_video(llm, frames, image_pruning_args={"scope": "global"})
