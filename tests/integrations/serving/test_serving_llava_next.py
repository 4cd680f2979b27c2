"""LLaVA-NeXT in vLLM: m tokens a view whatever the grid, and equality with our own model."""

import pytest
import torch
from engines import Spy, ask, prompt_of, start
from PIL import Image

from llava.integrations.vllm.llava_next import tile_grid
from llava.layout.candidates import dealt
from llava.layout.padding import patches_of_tiles
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import TOY_FOLDER, load_pretrained_model
from llava.pruning import get_pruner

KEEP = 32
QUESTION = "What colour is the circle?"


@pytest.fixture(scope="module")
def llm(toy):
    return start(toy("v1.6"), "ScriptLlavaNextForConditionalGeneration", {"keep_tokens": KEEP, "max_keep_tokens": 576})


@pytest.fixture(scope="module")
def spy(llm):
    return Spy(llm)


def visual(llm, output, prompt):
    text = len(llm.get_tokenizer()(prompt).input_ids) - prompt.count("<image>")
    return len(output.prompt_token_ids) - text


@pytest.mark.parametrize("size, views", [((336, 336), 3), ((640, 480), 5), ((900, 300), 4), ((300, 900), 4)])
def test_tokens_per_view(llm, size, views):
    prompt = prompt_of(QUESTION)
    assert visual(llm, ask(llm, prompt, Image.new("RGB", size, "red")), prompt) == KEEP * views


def test_pictures_of_different_grids_in_one_batch(llm, pictures):
    sizes = [(336, 336), (640, 480), (900, 300)]
    shown = [pictures[0].resize(size) for size in sizes]
    prompt = prompt_of(QUESTION, images=3)
    output = ask(llm, prompt, shown)
    assert visual(llm, output, prompt) == KEEP * (3 + 5 + 4)


@pytest.mark.parametrize("size", [(336, 336), (900, 300), (400, 20), (3, 700)])
def test_a_budget_for_the_picture(llm, spy, size):
    """Views share it by the patches that show no padding, and the prompt has as many as the model gives."""
    prompt = prompt_of(QUESTION)
    spy.reset()
    output = ask(llm, prompt, Image.effect_noise(size, 80).convert("RGB"), keep_tokens=70, keep_per="picture")
    assert visual(llm, output, prompt) == len(spy.chosen[0]) == 70
    columns, rows = tile_grid(size, spy.model.config)
    patches = patches_of_tiles(size, (columns, rows), 24)
    assert bool(patches.flatten()[spy.chosen[0]].all())
    shares = [int((spy.chosen[0] // 576 == view).sum()) for view in range(1 + columns * rows)]
    assert shares == dealt(70, patches.sum(-1).tolist())


@pytest.mark.parametrize("size", [None, (640, 480)])
def test_equals_the_llava_host(llm, spy, pictures, size):
    """Indices and greedy tokens of our own model, letterboxed tiles included; and unpruned, the same answer."""
    tokenizer, model, image_processor, _ = load_pretrained_model(str(TOY_FOLDER / "llava-toy-v1.6"), device="cpu")
    picture = pictures[1] if size is None else pictures[1].resize(size)
    prompt = prompt_of(QUESTION)
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    pixels = process_images([picture], image_processor, model.config)
    few = 16  # of each view: later choices among its even background hang on the last digit of a float
    for keep in (few, 576):
        pruner = get_pruner("script", keep_tokens=keep)
        prompts = model.embed_prompts(
            ids, images=pixels, image_sizes=[picture.size], pruner=pruner, padding_side="left"
        )
        ours = model.generate(prompts, max_new_tokens=4)[0].tolist()
        spy.reset()
        served = ask(llm, prompt, picture, tokens=4, keep_tokens=keep)
        assert list(served.outputs[0].token_ids)[: len(ours)] == ours
        if keep == few:
            chosen = torch.zeros(len(pixels[0]) * 576, dtype=torch.bool).scatter_(0, spy.chosen[0], True)
            assert torch.equal(chosen.view(-1, 576), prompts.kept[0].mask())
        else:
            assert visual(llm, served, prompt) == len(prompts.kept[0].sequence)
