"""Visuals as one value and one plan per call: budgets of a picture, ways of reading, several pictures of OneVision."""

import dataclasses

import pytest
import torch
from PIL import Image

from llava.layout.visuals import Reading
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.token_selection import gather_inputs
from llava.pruning import get_pruner
from prompts import QUESTIONS, V15, V16, answer, ids_of, prompt_of
from records import load_picture


def embed(model, ids, **options):
    with torch.no_grad():
        return model.embed_prompts(ids, **options)


# --- budgets of a picture ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["script", "divprune", "cdpruner", "random", "uniform", "first"])
@pytest.mark.parametrize("picture", ["land640x480", "wide1000x400", "tall300x900"])
def test_a_budget_per_picture_is_met_and_each_view_selects_its_share(load, pixels_of, name, picture):
    tokenizer, model, _, _ = load(V16)
    pixels, sizes = pixels_of(V16, picture)
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    pruner = get_pruner(name, keep_tokens=130, per="picture")
    encoded = model.encode_pictures(pixels, sizes)
    tokens = embed(model, ids, images=encoded, pruner=pruner).kept[0]
    assert tokens.patches == sum(tokens.per_view()) == 130
    shares = tokens.per_view()
    shown = tokens.layout.eligible.sum(1).tolist()
    assert len(set(shares)) > 1
    assert all(abs(share - 130 * one / sum(shown)) < 1 for share, one in zip(shares, shown, strict=True))
    plan = model.asked(model.plan(encoded, pruner), [QUESTIONS[0]])
    inputs = gather_inputs(model.vision, plan, encoded, [0])
    for view, share in enumerate(shares):  # each view alone, with its share as the budget
        own = inputs.of_views(slice(view, view + 1))
        fields = plan.asked.fields(
            torch.tensor([0]),
            own.features,
            own.valid,
            lambda view=view: encoded.image_embeds(model.get_vision_tower())[view : view + 1],
        )
        alone = plan.method.select(dataclasses.replace(own, **fields), share)
        assert tokens.mask()[view].nonzero().flatten().tolist() == alone.indices[0].tolist()
    if len(tokens.selections) > 1:
        with pytest.raises(ValueError, match="different budgets"):
            _ = tokens.selection
        assert [len(answer.indices) for answer in tokens.selections] == [1] * len(shares)
    assert all(len(value) == len(shares) for value in tokens.details.values())


def test_a_small_picture_is_whole_where_a_large_one_is_pruned(load, pixels_of):
    """576 tokens for a picture: one of a single view keeps all, newline and padding too."""
    tokenizer, model, processor, _ = load(V16)
    crop = processor(images=load_picture("square336"), return_tensors="pt")["pixel_values"]
    (tiles,), (size,) = pixels_of(V16, "land640x480")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0], images=2))
    pruner = get_pruner("script", keep_tokens=576, per="picture")
    kept = embed(model, ids, images=[crop, tiles], image_sizes=[(336, 336), size], pruner=pruner).kept
    assert (len(kept[0].sequence), kept[0].selections) == (577, ())
    assert kept[1].patches == 576


@pytest.mark.parametrize("budget", [3, 40])
def test_a_view_without_a_share_gives_nothing(load, pixels_of, budget):
    tokenizer, model, _, _ = load(V16)
    pixels, sizes = pixels_of(V16, "land640x480")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    tokens = embed(
        model,
        ids,
        images=pixels,
        image_sizes=sizes,
        pruner=get_pruner("script", keep_tokens=budget, per="picture"),
    ).kept[0]
    assert tokens.patches == budget
    assert (0 in tokens.per_view()) is (budget == 3)


def test_a_batch_of_pictures_with_their_own_budgets_equals_its_members(load, pixels_of):
    tokenizer, model, _, _ = load(V16)
    pixels, sizes = pixels_of(V16, "land640x480", "tall300x900", "square336")
    pruner = get_pruner("script", keep_tokens=100, per="picture")
    ids, mask = ids_of(tokenizer, *map(prompt_of, QUESTIONS))
    together = embed(model, ids, attention_mask=mask, images=pixels, image_sizes=sizes, pruner=pruner).kept
    for row, question in enumerate(QUESTIONS):
        own, _ = ids_of(tokenizer, prompt_of(question))
        alone = embed(model, own, images=[pixels[row]], image_sizes=[sizes[row]], pruner=pruner).kept[0]
        assert torch.equal(alone.sequence, together[row].sequence)


# --- visuals as one value ------------------------------------------------------------------------------------------


def test_one_value_is_what_the_parameters_say(load, pixels_of):
    tokenizer, model, _, _ = load(V16)
    pixels, sizes = pixels_of(V16, "land640x480")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    visuals = model.visuals(pixels, sizes)
    options = {"pruner": get_pruner("script", keep_tokens=24)}
    assert answer(model, ids, images=visuals, **options) == answer(
        model, ids, images=pixels, image_sizes=sizes, **options
    )
    model.check_prompt(ids, visuals, **options)
    with pytest.raises(ValueError, match="Visuals hold their own image_sizes"):
        model.generate(ids, images=visuals, image_sizes=sizes)
    with pytest.raises(ValueError, match="a modality is one of image, video; got 'vidoe'"):
        model.generate(ids, images=pixels, image_sizes=sizes, modalities="vidoe")
    with pytest.raises(ValueError, match="a modality is one of image, video; got 'vidoe'"):
        model.encode_pictures(pixels, sizes, "vidoe")


def test_another_grid_for_a_call_leaves_the_configuration_alone(load):
    tokenizer, model, processor, _ = load(V16)
    picture = load_picture("tall300x900")
    own = model.config.to_dict()
    reading = Reading.of(model.config, image_grid_pinpoints=[[672, 672]])
    pixels = process_images([picture], processor, reading)
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    pruner = get_pruner("script", keep_tokens=200, exclude_padding=False)
    visuals = model.visuals(pixels, [picture.size], reading=reading)
    assert embed(model, ids, images=visuals, pruner=pruner).kept[0].per_view() == [200] * 5
    assert model.config.to_dict() == own
    with pytest.raises(ValueError, match="views, got 5"):
        embed(model, ids, images=pixels, image_sizes=[picture.size], pruner=pruner)


def test_a_refused_method_is_refused_before_the_tower_runs(load, pixels_of, monkeypatch):
    tokenizer, model, _, _ = load(V16)
    pixels, sizes = pixels_of(V16, "land640x480")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    monkeypatch.setattr(model.get_vision_tower(), "observe", None)
    pruner = get_pruner("cdpruner", keep_tokens=128, per="picture", scaling="picture")
    with pytest.raises(ValueError, match="compares the views of a picture"):
        embed(model, ids, images=pixels, image_sizes=sizes, pruner=pruner)


# --- several pictures of LLaVA-OneVision ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onevision(video):
    tokenizer, model, processor, _ = load_pretrained_model(
        str(video / "checkpoints/llava-onevision-tiny-qwen2-ov"), device="cpu"
    )
    images = [Image.open(video / "images/mid900x620.png"), load_picture("wide1000x400")]
    prompt = "<|im_start|>user\n<image><image>\nWhat is red?<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer, model, processor, images, tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]


@pytest.mark.parametrize("pruner", [None, get_pruner("script", keep_tokens=200), get_pruner("fastv", keep_tokens=500)])
def test_several_pictures_are_padded_squares_for_whoever_calls(onevision, monkeypatch, pruner):
    _, model, processor, images, ids = onevision
    sizes = [image.size for image in images]
    pixels = process_images(images, processor, model.config)
    assert [view.shape[0] if view.ndim == 4 else 1 for view in pixels] == [1, 1]
    ours = embed(model, ids, images=pixels, image_sizes=sizes, pruner=pruner)
    once = embed(model, ids, images=model.encode_pictures(pixels, sizes), pruner=pruner)
    monkeypatch.setattr(model.config, "image_aspect_ratio", "pad")  # as official scripts do it by hand
    by_hand = process_images(images, processor, model.config)
    official = embed(model, ids, images=by_hand, image_sizes=sizes, pruner=pruner)
    for other in (ours, once):
        assert torch.equal(other.inputs_embeds, official.inputs_embeds)
    padding = ~official.kept[1].layout.eligible
    assert padding.any()
    if pruner is not None and pruner.place != "decoder":
        assert not (ours.kept[1].mask() & padding).any()


def test_a_single_picture_is_tiled_as_before(onevision):
    _, model, processor, images, _ = onevision
    assert all(len(process_images([image], processor, model.config)[0]) > 1 for image in images)


# --- autocast ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relevance", ["clip", "language", "projector"])
@pytest.mark.parametrize("name", ["script", "cdpruner", "trim", "script_release"])
def test_under_autocast_a_call_is_pruned_as_without(load, pixels_of, name, relevance):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "land640x480")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[1]))
    encoded = model.encode_pictures(pixels, sizes)
    pruner = get_pruner(name, keep_tokens=64, relevance=relevance)
    plain = embed(model, ids, images=encoded, pruner=pruner).kept[0]
    with torch.autocast("cpu", torch.bfloat16):
        cast = embed(model, ids, images=encoded, pruner=pruner).kept[0]
        assert answer(model, ids, images=pixels, image_sizes=sizes, pruner=pruner)
    overlap = (plain.mask() & cast.mask()).sum() / plain.mask().sum()
    assert overlap == 1
    assert plain.patches == cast.patches


@pytest.mark.parametrize("name", ["fastv", "dart", "sparsevlm", "pyramiddrop"])
def test_under_autocast_methods_inside_the_decoder_answer(load, pixels_of, name):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "land640x480")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[1]))
    with torch.autocast("cpu", torch.bfloat16):
        assert answer(model, ids, images=pixels, image_sizes=sizes, pruner=get_pruner(name, keep_tokens=400))
