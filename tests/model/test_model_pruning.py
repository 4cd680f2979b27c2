"""Pruning inside the model: the count is a promise, padding never wins, batches and caches change nothing."""

import dataclasses

import pytest
import torch

from llava.layout.plan import plan_picture
from llava.layout.views import NEWLINE, kept_sequence, padded_square_layout, tiled_layout
from llava.mm_utils import anyres_grid, process_images
from llava.model.encoded_images import EncodedImages
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.pruning import get_pruner
from method_inputs import BEFORE_DECODER
from prompts import QUESTIONS, V15, V16, answer, ids_of, prompt_of
from records import GOLDEN, load_picture


@pytest.mark.parametrize("checkpoint", [V15, V16])
@pytest.mark.parametrize("name", BEFORE_DECODER)
def test_keeping_all_equals_unpruned_bit_for_bit(load, pixels_of, checkpoint, name):
    tokenizer, model, _, _ = load(checkpoint)
    pixels, sizes = pixels_of(checkpoint, "land640x480")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    with torch.no_grad():
        plain = model(ids, images=pixels, image_sizes=sizes).logits
        for budget in (576, 9999):
            pruned = model(ids, images=pixels, image_sizes=sizes, pruner=get_pruner(name, keep_tokens=budget)).logits
            assert torch.equal(plain, pruned)


@pytest.mark.parametrize("checkpoint", [V15, V16])
@pytest.mark.parametrize("name", BEFORE_DECODER)
@pytest.mark.parametrize("picture", ["square336", "wide1000x400", "small97x61"])
def test_the_count_is_kept_in_every_view(load, pixels_of, checkpoint, name, picture):
    tokenizer, model, _, _ = load(checkpoint)
    pixels, sizes = pixels_of(checkpoint, picture)
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    views = 1 if checkpoint == V15 else pixels.shape[1]
    for budget, count in ((16, 16), (0.05, 29)):
        pruner = get_pruner(name, keep_tokens=budget)
        with torch.no_grad():
            prompts = model.embed_prompts(ids, images=pixels, image_sizes=sizes, pruner=pruner)
        kept = prompts.kept[0]
        if name in ("pool", "downsample"):  # the grid that is closest
            assert all(abs(given - count) <= 3 for given in kept.per_view())
        else:
            assert kept.per_view() == [count] * views
        assert kept.newlines == 0
        assert len(kept.sequence) == kept.patches == sum(kept.per_view()) == plan_picture(pruner, kept.layout).count
        assert prompts.inputs_embeds.shape[1] == ids.shape[1] - 1 + kept.patches
        assert not (kept.mask() & ~kept.layout.eligible).any()
        assert int(kept.mask().sum()) == (kept.sequence < kept.layout.eligible.numel()).sum()


def test_kept_tokens_are_the_features_in_reading_order(load, pixels_of):
    tokenizer, model, _, _ = load(V16)
    pixels, sizes = pixels_of(V16, "land640x480")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    with torch.no_grad():
        encoded = model.encode_pictures(pixels, sizes)
        prompts = model.embed_prompts(ids, images=encoded, pruner=get_pruner("script", keep_tokens=40))
        plain = model.embed_prompts(ids, images=encoded).inputs_embeds[0]
    start = int((ids[0] < 0).nonzero())
    kept = prompts.kept[0]
    visual = prompts.inputs_embeds[0, start : start + kept.patches]
    assert torch.equal(visual, encoded.features.flatten(0, 1)[kept.sequence])
    # the same rows stand in the same order in the unpruned prompt
    order = kept.layout.sequence.tolist()
    places = [order.index(number) for number in kept.sequence.tolist()]
    assert places == sorted(places)
    assert torch.equal(plain[start + torch.tensor(places)], visual)


@pytest.mark.parametrize("checkpoint", [V15, V16])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BEFORE_DECODER)
def test_a_batch_equals_its_members(load, checkpoint, side, name):
    """Prompts of different length, one with two pictures and one without any, in one batch and alone."""
    tokenizer, model, processor, _ = load(checkpoint)
    prompts = [prompt_of(QUESTIONS[0]), prompt_of(QUESTIONS[1], images=2), prompt_of("Hello?", images=0)]
    pictures = [load_picture(picture) for picture in ("land640x480", "square336", "tall300x900")]
    pixels = list(process_images(pictures, processor, model.config))
    pixels = torch.stack(pixels) if checkpoint == V15 else pixels
    sizes = [picture.size for picture in pictures]
    pruner = get_pruner(name, keep_tokens=24)
    ids, mask = ids_of(tokenizer, *prompts, side=side)
    encoded = model.encode_pictures(pixels, sizes)
    together = answer(model, ids, mask, images=pixels, image_sizes=sizes, pruner=pruner)
    assert answer(model, ids, mask, images=encoded, pruner=pruner) == together
    assert answer(model, ids, mask, images=encoded, pruner=pruner) == together  # what the first call left behind
    for row, (first, last) in enumerate([(0, 1), (1, 3), (3, 3)]):
        own, _ = ids_of(tokenizer, prompts[row])
        images = pixels[first:last] if last > first else None
        alone = answer(model, own, images=images, image_sizes=sizes[first:last], pruner=pruner)
        assert together[row] == alone[0]
        if last > first:
            assert answer(model, own, images=encoded.pick(range(first, last)), pruner=pruner)[0] == together[row]


def test_sampling_ids_seed_random_methods(load, pixels_of):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "square336", "square336")
    ids, mask = ids_of(tokenizer, prompt_of(QUESTIONS[0]), prompt_of(QUESTIONS[0]))
    pruner = get_pruner("random", keep_tokens=24)

    def masks(sample_ids):
        with torch.no_grad():
            kept = model.embed_prompts(
                ids, mask, images=pixels, image_sizes=sizes, pruner=pruner, sample_ids=sample_ids
            ).kept
        return [tokens.mask() for tokens in kept]

    assert torch.equal(*masks([5, 5]))
    assert not torch.equal(*masks([5, 6]))
    assert torch.equal(masks([5, 6])[1], masks([6, 5])[0])


@pytest.mark.parametrize("checkpoint", [V15, V16])
def test_another_question_selects_other_tokens_from_cached_features(load, pixels_of, checkpoint, monkeypatch):
    tokenizer, model, _, _ = load(checkpoint)
    pixels, sizes = pixels_of(checkpoint, "land640x480")
    pruner = get_pruner("script", keep_tokens=32)
    fresh, cached, masks = [], [], []
    ids = [ids_of(tokenizer, prompt_of(question))[0] for question in QUESTIONS[:2]]
    for row in ids:
        fresh.append(answer(model, row, images=pixels, image_sizes=sizes, pruner=pruner))
    encoded = model.encode_pictures(pixels, sizes)
    assert isinstance(encoded, EncodedImages)
    monkeypatch.setattr(model.get_vision_tower(), "observe", None)  # the tower must not run again
    for row in ids:
        cached.append(answer(model, row, images=encoded, pruner=pruner))
        masks.append(model.embed_prompts(row, images=encoded, pruner=pruner).kept[0].mask())
    assert fresh == cached
    assert not torch.equal(*masks)


@pytest.mark.parametrize("checkpoint", [V15, V16])
def test_pictures_picked_from_many_are_themselves(load, pixels_of, checkpoint):
    tokenizer, model, _, _ = load(checkpoint)
    pixels, sizes = pixels_of(checkpoint, "land640x480", "square336", "tall300x900")
    encoded = model.encode_pictures(pixels, sizes)
    encoded.image_embeds(model.get_vision_tower())
    ids, mask = ids_of(tokenizer, *(prompt_of(question) for question in QUESTIONS))
    pruner = get_pruner("script", keep_tokens=12)
    together = answer(model, ids, mask, images=encoded.pick([2, 0, 2]), pruner=pruner)
    for row, picture in enumerate([2, 0, 2]):
        alone = encoded.pick([picture])
        own, _ = ids_of(tokenizer, prompt_of(QUESTIONS[row]))
        assert answer(model, own, images=alone, pruner=pruner)[0] == together[row]


def test_query_overrides_the_prompt(load, pixels_of):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "land640x480")
    encoded = model.encode_pictures(pixels, sizes)
    pruner = get_pruner("script", keep_tokens=32)
    first, second = (ids_of(tokenizer, prompt_of(question))[0] for question in QUESTIONS[:2])

    def mask(ids, **options):
        return model.embed_prompts(ids, images=encoded, pruner=pruner, **options).kept[0].mask()

    assert torch.equal(mask(first, query=QUESTIONS[1]), mask(second))
    assert torch.equal(mask(first, query=[QUESTIONS[1]]), mask(second))
    suffix = "\nAnswer the question using a single word or phrase."
    assert torch.equal(mask(first, query=QUESTIONS[1] + suffix), mask(second))
    assert torch.equal(mask(ids_of(tokenizer, prompt_of(QUESTIONS[1] + suffix))[0]), mask(second))
    with pytest.raises(ValueError, match="1 prompts but 2 queries"):
        mask(first, query=["a", "b"])


def test_long_questions_count_with_all_their_segments(load, pixels_of):
    _, model, _, _ = load(V15)
    tower = model.get_vision_tower()
    words = "Is there a red circle beside the blue square, or a dog on the car? "
    embeds, mask = tower.text_embeds([words, words * 8])
    assert mask.sum(-1).tolist()[0] == 1
    assert mask.sum(-1).tolist()[1] > 1
    pieces = tower.joint_space().segments(words * 8)
    first, last = tower.joint_space().tokenizer.bos_token_id, tower.joint_space().tokenizer.eos_token_id
    assert all(piece[0] == first and piece[-1] == last and len(piece) <= 77 for piece in pieces)
    alone, _ = tower.text_embeds([words])
    assert torch.allclose(embeds[0, :1], alone[0], atol=1e-5)  # padding beside longer texts changes nothing


@pytest.mark.parametrize("checkpoint", [V15, V16])
def test_projector_relevance_needs_no_text_tower(load, pixels_of, checkpoint, monkeypatch):
    tokenizer, model, _, _ = load(checkpoint)
    pixels, sizes = pixels_of(checkpoint, "land640x480")
    monkeypatch.setattr(model.get_vision_tower(), "joint_space", None)
    ids, mask = ids_of(tokenizer, *(prompt_of(question) for question in QUESTIONS[:2]))
    images = torch.cat([pixels, pixels])
    pruner = get_pruner("script", keep_tokens=20, relevance="projector")
    kept = model.embed_prompts(ids, mask, images=images, image_sizes=sizes * 2, pruner=pruner).kept
    assert not torch.equal(kept[0].mask(), kept[1].mask())
    relevance = kept[1].selection.details["relevance"]
    embed = model.get_input_embeddings()
    query = embed(torch.tensor(tokenizer(QUESTIONS[1], add_special_tokens=False).input_ids)).mean(0)
    features = model.encode_pictures(pixels, sizes).features
    cosine = torch.cosine_similarity(features, query, dim=-1).masked_fill(~kept[1].layout.eligible, torch.nan)
    lowest = cosine.nan_to_num(9).amin(-1, keepdim=True)
    highest = cosine.nan_to_num(-9).amax(-1, keepdim=True)
    assert torch.allclose(relevance, ((cosine - lowest) / (highest - lowest)).nan_to_num(0), atol=1e-4)


# --- padding, newlines, scope --------------------------------------------------------------------------------------


def test_padding_of_a_square_is_not_eligible_unless_asked(load, pixels_of):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "wide1000x400")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    layout = padded_square_layout((1000, 400), 24)
    rows = layout.eligible.reshape(24, 24).any(1).nonzero().flatten()
    assert (rows.min(), rows.max()) == (7, 16)
    for exclude, budget in ((True, 200), (False, 500)):
        pruner = get_pruner("random", keep_tokens=budget, exclude_padding=exclude)
        mask = model.embed_prompts(ids, images=pixels, image_sizes=sizes, pruner=pruner).kept[0].mask()
        assert bool((mask & ~layout.eligible).any()) is not exclude
        assert int(mask.sum()) == budget


def test_too_few_eligible_patches_are_all_kept(load, pixels_of):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "wide1000x400")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    kept = model.embed_prompts(
        ids, images=pixels, image_sizes=sizes, pruner=get_pruner("script", keep_tokens=300)
    ).kept[0]
    assert torch.equal(kept.mask(), kept.layout.eligible)
    assert kept.patches == 240


@pytest.mark.parametrize("picture", ["land640x480", "tall300x900"])
def test_newlines_are_kept_for_rows_that_still_have_tokens(load, pixels_of, picture):
    tokenizer, model, _, _ = load(V16)
    pixels, sizes = pixels_of(V16, picture)
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    dropped, kept = (
        model.embed_prompts(
            ids, images=pixels, image_sizes=sizes, pruner=get_pruner("script", keep_tokens=6, newlines=newlines)
        )
        for newlines in ("drop", "keep")
    )
    tokens = kept.kept[0]
    assert torch.equal(tokens.mask(), dropped.kept[0].mask())
    unpruned = tokens.layout.sequence.tolist()
    left, expected, row = set(tokens.sequence.tolist()), [], []
    for number in unpruned[576:]:
        if number == NEWLINE:
            expected += [*row, NEWLINE] if row else []
            row = []
        elif number in left:
            row.append(number)
    assert tokens.sequence[tokens.sequence != NEWLINE].tolist()[:6] == [n for n in unpruned[:576] if n in left]
    assert tokens.sequence.tolist()[6:] == expected
    assert 0 < tokens.newlines < tokens.patches
    newline = model.get_model().image_newline
    assert int((kept.inputs_embeds[0] == newline).all(-1).sum()) == tokens.newlines
    assert kept.inputs_embeds.shape[1] == dropped.inputs_embeds.shape[1] + tokens.newlines


def test_a_single_crop_keeps_its_newline_only_on_request(load):
    tokenizer, model, processor, _ = load(V16)
    picture = load_picture("land640x480")
    crop = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    for newlines, count in (("drop", 0), ("keep", 1)):
        pruner = get_pruner("uniform", keep_tokens=10, newlines=newlines)
        kept = model.embed_prompts(ids, images=[crop], image_sizes=[picture.size], pruner=pruner).kept[0]
        assert (kept.patches, kept.newlines) == (10, count)


def test_global_scope_deals_one_budget_over_all_views(load, pixels_of):
    tokenizer, model, _, _ = load(V16)
    pixels, sizes = pixels_of(V16, "land640x480")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    kept = model.embed_prompts(
        ids, images=pixels, image_sizes=sizes, pruner=get_pruner("script", keep_tokens=16, scope="global")
    ).kept[0]
    assert kept.patches == 80
    assert sum(kept.per_view()) == 80
    assert len(set(kept.per_view())) > 1
    assert not (kept.mask() & ~kept.layout.eligible).any()
    assert kept.selection.tokens == 5 * 576


def test_published_setting_is_reachable(load):
    """Every picture as 2 x 2 tiles, padding eligible, no newlines: exactly five times the count."""
    tokenizer, model, processor, _ = load(V16)
    picture = load_picture("tall300x900")
    pinpoints = model.config.image_grid_pinpoints
    model.config.image_grid_pinpoints = [[672, 672]]
    try:
        pixels = process_images([picture], processor, model.config)
        ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
        kept = model.embed_prompts(
            ids,
            images=pixels,
            image_sizes=[picture.size],
            pruner=get_pruner("script", keep_tokens=200, exclude_padding=False),
        ).kept[0]
    finally:
        model.config.image_grid_pinpoints = pinpoints
    assert kept.per_view() == [200] * 5
    assert kept.layout.eligible.all()


@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 2000), (640, 480)])
def test_extreme_pictures_lose_no_view_order(size):
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    layout = tiled_layout(size, anyres_grid(size, pinpoints, 336), 24, "spatial_unpad")
    patches = layout.sequence[layout.sequence != NEWLINE]
    assert len(patches.unique()) == len(patches) == int(layout.eligible.sum())
    kept = kept_sequence(layout, patches[torch.randperm(len(patches))], len(patches), keep_newlines=True)
    assert torch.equal(kept[kept != NEWLINE], patches)
    assert padded_square_layout(size, 24).eligible.any()


# --- library behaviour ---------------------------------------------------------------------------------------------


def test_beams_sampling_and_cacheless_generation_work_on_a_pruned_prompt(load, pixels_of):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "land640x480")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    options = {"images": pixels, "image_sizes": sizes, "pruner": get_pruner("script", keep_tokens=24)}
    greedy = answer(model, ids, **options)
    assert answer(model, ids, use_cache=False, **options) == greedy
    assert len(answer(model, ids, num_beams=3, num_return_sequences=2, **options)) == 2
    assert len(answer(model, ids, do_sample=True, num_return_sequences=3, **options)) == 3


def test_cached_decoding_equals_one_forward(load, pixels_of):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "land640x480")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    pruner = get_pruner("script", keep_tokens=24)
    tokens = answer(model, ids, images=pixels, image_sizes=sizes, pruner=pruner)[0]
    with torch.no_grad():
        prompts = model.embed_prompts(ids, images=pixels, image_sizes=sizes, pruner=pruner)
        written = model.get_input_embeddings()(torch.tensor([tokens]))
        logits = model(inputs_embeds=torch.cat([prompts.inputs_embeds, written], dim=1)).logits[0]
    start = prompts.inputs_embeds.shape[1] - 1
    assert logits[start : start + len(tokens)].argmax(-1).tolist() == tokens


def test_loss_skips_visual_tokens_and_reaches_the_projector(load, pixels_of):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "square336")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    output = model(ids, images=pixels, image_sizes=sizes, labels=ids)
    labels = model.embed_prompts(ids, labels=ids, images=pixels, image_sizes=sizes).labels
    picked = labels[0, 1:] != -100
    logp = output.logits[0, :-1][picked].log_softmax(-1)
    assert int(picked.sum()) == ids.shape[1] - 2
    assert torch.allclose(output.loss, -logp.gather(1, labels[0, 1:][picked][:, None]).mean(), atol=1e-5)
    output.loss.backward()
    assert model.get_model().mm_projector[0].weight.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("checkpoint", [V15, V16])
def test_bfloat16_stays_near_float32(load, pixels_of, checkpoint):
    """Four fifths of the kept tokens are the same, and unpruned logits move by less than a tenth of their spread."""
    tokenizer, model, _, _ = load(checkpoint)
    pixels, sizes = pixels_of(checkpoint, "land640x480")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    pruner = get_pruner("script", keep_tokens=64)
    with torch.no_grad():
        exact = model.embed_prompts(ids, images=pixels, image_sizes=sizes, pruner=pruner)
        plain = model(ids, images=pixels, image_sizes=sizes).logits[:, -1]
        model.bfloat16()
        try:
            half = model.embed_prompts(ids, images=pixels, image_sizes=sizes, pruner=pruner)
            plain_half = model(ids, images=pixels, image_sizes=sizes).logits[:, -1].float()
        finally:
            model.float()
            load.cache_clear()  # the weights have lost their last bits
    overlap = (exact.kept[0].mask() & half.kept[0].mask()).sum() / exact.kept[0].patches
    assert overlap >= 0.8
    assert (plain - plain_half).square().mean().sqrt() < 0.1 * plain.std()


def test_llavas_own_entry_point_returns_what_it_was_given(load, pixels_of):
    """Mask and positions come back only where they went in, or where rows of different length were padded."""
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "square336", "land640x480")
    ids, mask = ids_of(tokenizer, *(prompt_of(question) for question in QUESTIONS[:2]), side="right")
    prepare = model.prepare_inputs_labels_for_multimodal
    own, count = ids[:1, : int(mask[0].sum())], int(mask[0].sum()) - 1 + 576
    none, positions, one_mask, past, embeds, labels = prepare(own, None, None, None, None, pixels[:1], sizes[:1])
    assert none is positions is one_mask is past is labels is None
    assert embeds.shape == (1, count, 192)
    _, positions, both_mask, _, embeds, labels = prepare(ids, mask, mask, None, ids, pixels, sizes)
    assert both_mask.dtype == mask.dtype
    assert both_mask.sum(-1).tolist() == (mask.sum(-1) - 1 + 576).tolist()
    assert positions.shape == labels.shape == embeds.shape[:2]
    pruned = prepare(ids, None, mask, None, None, pixels, sizes, pruner=get_pruner("script", keep_tokens=8))
    assert pruned[2].sum(-1).tolist() == (mask.sum(-1) - 1 + 8).tolist()


# --- images and placeholders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("placeholders, images", [(1, 0), (0, 1), (2, 1), (1, 2)])
def test_images_and_placeholders_must_match(load, pixels_of, placeholders, images):
    tokenizer, model, _, _ = load(V15)
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0], placeholders), prompt_of(QUESTIONS[0], placeholders))
    pixels, sizes = pixels_of(V15, *["square336"] * 5)
    count = images * 2 + (placeholders == 0)  # one picture per text-only row is LLaVA's own habit and allowed
    with pytest.raises(ValueError, match=f"have {placeholders * 2} <image> placeholders, but {count} images"):
        model.generate(ids, images=pixels[:count] if count else None, image_sizes=sizes[:count], max_new_tokens=1)


def test_prompt_over_the_context_is_refused_before_the_tower_runs(load, pixels_of, monkeypatch):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, *["square336"] * 8)
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0], images=8))
    with monkeypatch.context() as patch:
        patch.setattr(model.get_vision_tower(), "observe", None)
        with pytest.raises(ValueError, match="longer than the model's context of 4096"):
            model.generate(ids, images=pixels, image_sizes=sizes, max_new_tokens=1)
        with pytest.raises(ValueError, match="longer than the model's context of 4096"):
            model.check_prompt(ids, pixels, sizes)
    pruner = get_pruner("script", keep_tokens=64)
    assert answer(model, ids, images=pixels, image_sizes=sizes, pruner=pruner)


def test_tiles_need_image_sizes(load, pixels_of):
    tokenizer, model, _, _ = load(V16)
    pixels, _ = pixels_of(V16, "square336")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    with pytest.raises(ValueError, match="tiled images need image_sizes"):
        model.generate(ids, images=pixels, max_new_tokens=1)
    with pytest.raises(ValueError, match="1 + 2 x 2 views, got 3".replace("+", r"\+")):
        model.generate(ids, images=pixels, image_sizes=[(640, 480)], max_new_tokens=1)


def test_without_a_tokenizer_the_query_must_be_given(load, pixels_of, monkeypatch):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "square336")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    monkeypatch.setattr(model, "tokenizer", None)
    pruner = get_pruner("script", keep_tokens=8)
    with pytest.raises(ValueError, match="pass query="):
        model.generate(ids, images=pixels, image_sizes=sizes, pruner=pruner, max_new_tokens=1)
    assert model.generate(
        ids, images=pixels, image_sizes=sizes, pruner=pruner, query="a dog", max_new_tokens=1, min_new_tokens=1
    ).shape == (1, 1)


def test_the_last_encoder_layer_is_not_there(load):
    for checkpoint in (V15, V16):
        tower = load(checkpoint)[1].get_vision_tower()
        assert len(tower.vision_tower.vision_model.encoder.layers) == 2  # of three
        assert not any("text" in name for name, _ in load(checkpoint)[1].named_parameters())


# --- what serving engines build on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["script", "visionzip"])
def test_a_static_cache_gives_the_same_answer(load, pixels_of, name):
    """After the selection nothing is left whose shape the data decide, so fixed buffers serve."""
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "land640x480", "square336")
    ids, mask = ids_of(tokenizer, *map(prompt_of, QUESTIONS[:2]))
    asked = {"images": pixels, "image_sizes": sizes, "pruner": get_pruner(name, keep_tokens=48)}
    assert answer(model, ids, mask, **asked) == answer(model, ids, mask, **asked, cache_implementation="static")


def test_the_compiled_tower_sees_the_same(pixels_of):
    """Traced as torch.compile does it, without the compiler behind: one graph, and bit for bit the tower's values."""
    pixels, _ = pixels_of(V15, "land640x480", "square336")
    tower = CLIPVisionTower(str(GOLDEN / "checkpoints/openai/clip-vit-large-patch14-336"))
    tower.load_model()
    with torch.no_grad():
        plain = tower.observe(pixels)
        tower.compile_layers(backend="eager", fullgraph=True)
        compiled = tower.observe(pixels)
    for field in dataclasses.fields(plain):
        assert torch.equal(getattr(plain, field.name), getattr(compiled, field.name))
