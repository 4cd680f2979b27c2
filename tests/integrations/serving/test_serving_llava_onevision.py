"""LLaVA-OneVision in vLLM: pictures by the view, videos by the frame, and equality with the library's class."""

import numpy as np
import pytest
import torch
from engines import Spy, logprobs, start
from PIL import Image
from test_serving_llava import make_cold
from tiny_models import make_llava_onevision
from transformers import AutoProcessor
from vllm import SamplingParams

KEEP = 3
QUESTION = "What is red?"


@pytest.fixture(scope="module")
def onevision(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onevision")
    return folder, make_llava_onevision(folder)


@pytest.fixture(scope="module")
def llm(onevision):
    limits = {"image": 2, "video": 1}
    pruning = {"keep_tokens": KEEP}
    name = "ScriptLlavaOnevisionForConditionalGeneration"
    return start(onevision[0], name, pruning, limit_mm_per_prompt=limits, max_model_len=1024)


@pytest.fixture(scope="module")
def spy(llm):
    return Spy(llm)


def prompt_of(mark):
    return f"<|im_start|>user {mark}\n{QUESTION}<|im_end|><|im_start|>assistant\n"


def ask(llm, prompt, data):
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=5, ignore_eos=True)
    return llm.generate([{"prompt": prompt, "multi_modal_data": data}], sampling, use_tqdm=False)[0]


def reference(model, processor, prompt, inputs, rows):
    """Greedy tokens and logprobs of the library's class on the rows that are kept in place of the placeholders."""
    ids = processor.tokenizer(prompt, return_tensors="pt").input_ids
    embeds = model.get_input_embeddings()(ids)
    place = int((ids[0] == model.config.image_token_index).nonzero()) if "<image>" in prompt else None
    if place is None:
        place = int((ids[0] == model.config.video_token_index).nonzero())
    joined = torch.cat([embeds[:, :place], rows[None], embeds[:, place + 1 :]], dim=1)
    tokens, logits = [], []
    for _ in range(6):
        output = model.model.language_model(inputs_embeds=joined).last_hidden_state[:, -1]
        row = model.lm_head(output)[0].log_softmax(-1)
        tokens.append(int(row.argmax()))
        logits.append(row[tokens[-1]].item())
        joined = torch.cat([joined, model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))], dim=1)
    return tokens, logits


@pytest.mark.parametrize("size, views", [((112, 112), 5), ((112, 56), 3), ((100, 30), 3)])
@torch.inference_mode()
def test_pictures(llm, spy, onevision, pictures, size, views):
    folder, model = onevision
    processor = AutoProcessor.from_pretrained(folder)
    make_cold(llm)
    spy.reset()
    picture = pictures[0].resize(size)
    prompt = prompt_of("<image>")
    served = ask(llm, prompt, {"image": picture})
    text = len(processor.tokenizer(prompt).input_ids) - 1
    assert len(served.prompt_token_ids) == text + views * KEEP
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    tower = model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True).hidden_states[-1]
    features = model.model.multi_modal_projector(tower)
    numbers = spy.chosen[0].tolist()
    assert [sum(number // 16 == view for number in numbers) for view in range(views)] == [KEEP] * views
    columns = 2 if size[0] == 112 or size[0] == 100 else 1

    def reading(number):  # the overview, then the plane of tiles row by row
        view, patch = divmod(number, 16)
        if view == 0:
            return (0, patch, 0)
        tile = view - 1
        return (1, tile // columns * 4 + patch // 4, tile % columns * 4 + patch % 4)

    rows = features.flatten(0, 1)[sorted(numbers, key=reading)]
    tokens, theirs = reference(model, processor, prompt, inputs, rows)
    assert list(served.outputs[0].token_ids) == tokens
    assert logprobs(served) == pytest.approx(theirs, abs=5e-4)


def test_videos_by_the_frame(llm, spy, onevision):
    folder, _ = onevision
    processor = AutoProcessor.from_pretrained(folder)
    make_cold(llm)
    spy.reset()
    frames = np.random.default_rng(0).integers(0, 255, (5, 56, 56, 3), dtype=np.uint8)
    prompt = prompt_of("<video>")
    served = ask(llm, prompt, {"video": frames})
    text = len(processor.tokenizer(prompt).input_ids) - 1
    assert len(served.prompt_token_ids) == text + 5 * KEEP + 1
    assert spy.chosen[0].shape == (5 * KEEP,)
    other = ask(llm, prompt.replace("red", "blue"), {"video": frames})
    assert spy.encoded == 5
    assert len(spy.chosen) == 2
    assert len(other.prompt_token_ids) == text + 5 * KEEP + 2


def test_a_picture_and_a_video_in_one_prompt(llm, onevision):
    folder, _ = onevision
    processor = AutoProcessor.from_pretrained(folder)
    frames = np.zeros((2, 56, 56, 3), dtype=np.uint8)
    prompt = prompt_of("<image>\n<video>")
    served = ask(llm, prompt, {"image": Image.new("RGB", (112, 112), "red"), "video": frames})
    text = len(processor.tokenizer(prompt).input_ids) - 2
    assert len(served.prompt_token_ids) == text + 5 * KEEP + 2 * KEEP + 1
