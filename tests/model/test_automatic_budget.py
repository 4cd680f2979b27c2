"""``keep_tokens="auto"`` inside the model: every view has its own count, within what the plan reserves."""

import dataclasses

import pytest
import torch

from llava.layout.plan import plan_picture
from llava.mm_utils import process_images
from llava.pruning import get_pruner
from prompts import QUESTIONS, V15, V16, answer, ids_of, prompt_of
from records import load_picture

FINDERS = ["cdpruner", "mmtok", "scope", "script"]
RULES = {"cdpruner": "0.9", "mmtok": "0.6", "scope": "0.9", "script": "0.9"}


def rule(name, **options):
    return get_pruner(name, keep_tokens=f"auto:{RULES[name]}:floor=3:ceiling=120", **options)


def embed(loaded, picture, pruner, checkpoint):
    tokenizer, model, processor, _ = loaded
    shown = load_picture(picture)
    pixels = process_images([shown], processor, model.config)
    pixels = pixels if checkpoint == V15 else list(pixels)
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    with torch.no_grad():
        return model.embed_prompts(ids, images=pixels, image_sizes=[shown.size], pruner=pruner), ids.shape[1]


@pytest.mark.parametrize("checkpoint", [V15, V16])
@pytest.mark.parametrize("name", FINDERS)
def test_each_view_keeps_the_first_tokens_of_its_order(load, checkpoint, name):
    pruner = rule(name)
    prompts, length = embed(load(checkpoint), "land640x480", pruner, checkpoint)
    kept = prompts.kept[0]
    counts = kept.per_view()
    assert all(3 <= count <= 120 for count in counts)
    assert any(3 < count < 120 for count in counts)
    assert len(kept.sequence) == kept.patches == sum(counts) < plan_picture(pruner, kept.layout).count
    assert prompts.inputs_embeds.shape[1] == length - 1 + kept.patches
    for view, count in enumerate(counts):
        fixed = dataclasses.replace(pruner, keep_tokens=count)
        other = embed(load(checkpoint), "land640x480", fixed, checkpoint)[0].kept[0]
        assert torch.equal(other.mask()[view], kept.mask()[view])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FINDERS)
def test_a_batch_of_prompts_of_different_length_equals_its_members(load, side, name):
    tokenizer, model, processor, _ = load(V15)
    pictures = [load_picture(picture) for picture in ("land640x480", "square336", "tall300x900")]
    pixels = process_images(pictures, processor, model.config)
    sizes = [picture.size for picture in pictures]
    ids, mask = ids_of(tokenizer, *map(prompt_of, QUESTIONS), side=side)
    pruner = rule(name)
    together = answer(model, ids, mask, images=pixels, image_sizes=sizes, pruner=pruner)
    with torch.no_grad():
        kept = model.embed_prompts(ids, mask, images=pixels, image_sizes=sizes, pruner=pruner).kept
    assert len({tokens.patches for tokens in kept}) > 1
    for row, question in enumerate(QUESTIONS):
        own, _ = ids_of(tokenizer, prompt_of(question))
        one = {"images": pixels[row : row + 1], "image_sizes": sizes[row : row + 1], "pruner": pruner}
        assert answer(model, own, **one)[0] == together[row]
        with torch.no_grad():
            assert torch.equal(model.embed_prompts(own, **one).kept[0].sequence, kept[row].sequence)


@pytest.mark.parametrize(
    "options", [{"scope": "global"}, {"per": "picture"}, {"scope": "global", "per": "picture"}, {"newlines": "keep"}]
)
def test_over_the_views_of_a_picture(load, options):
    pruner = rule("script", **options)
    kept = embed(load(V16), "tall300x900", pruner, V16)[0].kept[0]
    assert len(kept.per_view()) > 1
    assert 3 <= kept.patches <= plan_picture(pruner, kept.layout).count
    assert len(kept.sequence) == kept.patches + kept.newlines
    assert (kept.newlines > 0) == ("newlines" in options)
    assert not (kept.mask() & ~kept.layout.eligible).any()


def test_several_views_share_a_picture_and_have_the_lower_floor(load):
    """A threshold that the first token of any view passes."""
    pruner = get_pruner("script", keep_tokens="auto:0.001")
    assert embed(load(V15), "square336", pruner, V15)[0].kept[0].per_view() == [16]
    tiles = embed(load(V16), "square336", pruner, V16)[0].kept[0].per_view()
    assert tiles == [4] * len(tiles)
