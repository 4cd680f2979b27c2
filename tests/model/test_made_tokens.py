"""Tokens that methods make themselves, inside the model: where they stand, what they are, and what hosts must give."""

import dataclasses

import pytest
import torch
from transformers import CLIPVisionModelWithProjection

from llava.eval.benchmarks import Question
from llava.eval.runner.answering import Answerer
from llava.layout.plan import plan_picture
from llava.layout.views import NEWLINE, flat_layout, kept_places, with_made_tokens
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.encoded_images import EncodedImages
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.pruning import get_pruner
from llava.pruning.functional import cosine_similarity
from llava.serve.token_picture import draw_kept_tokens
from records import GOLDEN, load_picture

V15, V16 = "llava-v1.5-tiny-wide", "llava-v1.6-vicuna-tiny-wide"
PROMPT = "USER: <image>\nIs the red circle next to the blue square? ASSISTANT:"


@pytest.fixture
def embed(load, pixels_of):
    """Embed the prompt with one picture: (model, encoded picture, prompts, visual rows)."""

    def embed(checkpoint, pruner, picture="land640x480", **options):
        tokenizer, model, _, _ = load(checkpoint)
        ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]
        pixels, sizes = pixels_of(checkpoint, picture)
        with torch.no_grad():
            encoded = model.encode_pictures(pixels, sizes)
            prompts = model.embed_prompts(ids, images=encoded, pruner=pruner, **options)
        start = int((ids[0] < 0).nonzero())
        length = len(prompts.kept[0].sequence)
        return model, encoded, prompts, prompts.inputs_embeds[0, start : start + length]

    return embed


# --- the tower's attention -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_beside_the_kernel_is_the_towers_own(pixels_of, implementation):
    """Class row, received attention and keys against a model that gives out all of its attention."""
    folder = GOLDEN / "checkpoints/openai/clip-vit-large-patch14-336"
    pixels, _ = pixels_of(V15, "land640x480", "square336")
    tower = CLIPVisionTower(str(folder))
    tower.load_model(attn_implementation=implementation)
    reference = CLIPVisionModelWithProjection.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    keys = []
    with torch.no_grad():
        layer = reference.vision_model.encoder.layers[-2]
        layer.self_attn.k_proj.register_forward_hook(lambda module, given, output: keys.append(output))
        whole = reference(pixels, output_attentions=True, output_hidden_states=True)
        seen = tower.observe(pixels)
    attention = whole.attentions[-2]  # of the layer whose output is hidden state -2
    assert torch.allclose(seen.features, whole.hidden_states[-2][:, 1:], atol=1e-5)
    assert torch.allclose(seen.class_features, whole.hidden_states[-2][:, 0], atol=1e-5)
    assert torch.allclose(tower.class_attention(seen.layer_input), attention[:, :, 0, 1:], atol=1e-6)
    assert torch.allclose(tower.mean_attention(seen.layer_input), attention.mean(2)[:, :, 1:], atol=1e-6)
    metric = keys[0].unflatten(-1, (tower.config.num_attention_heads, -1)).mean(2)[:, 1:]
    assert torch.allclose(tower.key_metric(seen.layer_input), metric, atol=1e-5)
    assert tower.vision_tower.config._attn_implementation == implementation
    assert not tower.vision_tower.vision_model.encoder.layers[-1]._forward_pre_hooks


def test_attention_is_computed_once_and_only_for_methods_that_ask(embed, monkeypatch):
    calls = []
    for name in ("class_attention", "mean_attention", "key_metric"):
        whole = getattr(CLIPVisionTower, name)
        monkeypatch.setattr(CLIPVisionTower, name, lambda *a, n=name, f=whole: (calls.append(n), f(*a))[1])
    model, encoded, _, _ = embed(V15, get_pruner("script", keep_tokens=8))
    assert not calls
    ids = tokenizer_image_token(PROMPT, model.tokenizer, return_tensors="pt")[None]
    for _ in range(2):
        model.embed_prompts(ids, images=encoded, pruner=get_pruner("visionzip", keep_tokens=8))
    assert sorted(calls) == ["class_attention", "key_metric"]


# --- what is spliced -----------------------------------------------------------------------------------------------


def test_trim_gives_kept_tokens_and_the_mean_of_the_others(embed):
    model, encoded, prompts, rows = embed(V15, get_pruner("trim", keep_tokens=12))
    kept = prompts.kept[0]
    mask = kept.mask()[0]
    assert torch.equal(rows[:-1], encoded.features[0, mask])
    others = encoded.encoder_features[0, ~mask & kept.layout.eligible[0]].mean(0)
    assert torch.allclose(rows[-1], model.vision.project(others), atol=1e-5)
    assert (int(mask.sum()), kept.patches, kept.per_view()) == (11, 12, [12])


def test_visionzip_stands_in_the_published_order(embed):
    """Class token, dominant patches, contextual tokens; with tiles: dominant ones, all class tokens, the rest."""
    model, encoded, prompts, rows = embed(V15, get_pruner("visionzip", keep_tokens=16))
    kept = prompts.kept[0]
    tower = model.get_vision_tower()
    class_row = model.vision.project(encoded.field("class_features", tower)[0])
    contextual = model.vision.project(kept.selection.made[0, 1:])
    expected = torch.cat([class_row[None], encoded.features[0, kept.mask()[0]], contextual])
    assert torch.allclose(rows, expected, atol=1e-5)

    model, encoded, prompts, rows = embed(V16, get_pruner("visionzip", keep_tokens=16))
    kept = prompts.kept[0]
    made = model.vision.project(kept.selection.made)
    mask, order = kept.mask().flatten(), kept.layout.sequence
    tiles = [n for n in order[576:].tolist() if n != NEWLINE and mask[n]]
    flat = encoded.features.flatten(0, 1)
    expected = torch.cat(
        [made[0, :1], flat[:576][mask[:576]], made[0, 1:], flat[tiles], made[1:, 0], made[1:, 1:].flatten(0, 1)]
    )
    assert torch.allclose(rows, expected, atol=1e-5)
    assert kept.per_view() == [16] * 5


def test_made_tokens_follow_their_view_where_views_form_no_grid():
    layout = flat_layout(3, 4)
    numbers = torch.tensor([9, 2, 0, 5])
    places = kept_places(layout, numbers, 4, keep_newlines=False)
    assert with_made_tokens(layout, places, [1, 0, 2], width=2, leading=0).tolist() == [0, 2, 12, 5, 9, 16, 17]
    assert with_made_tokens(layout, places, [2, 1, 2], width=2, leading=1).tolist() == [12, 0, 2, 13, 14, 5, 16, 9, 17]


def test_newlines_and_made_tokens_go_together(embed):
    _, _, dropped, _ = embed(V16, get_pruner("trim", keep_tokens=6))
    model, _, prompts, rows = embed(V16, get_pruner("trim", keep_tokens=6, newlines="keep"))
    kept = prompts.kept[0]
    assert torch.equal(kept.mask(), dropped.kept[0].mask())
    assert kept.newlines > 0
    assert kept.patches == dropped.kept[0].patches == 30
    newline = model.get_model().image_newline
    assert int((rows == newline).all(-1).sum()) == kept.newlines
    assert kept.sequence[kept.sequence != NEWLINE].tolist() == dropped.kept[0].sequence.tolist()
    assert kept.sequence[-4:].tolist() == [5 * 576 + view for view in (1, 2, 3, 4)]


def test_a_downsampled_picture_is_encoded_anew_without_its_border(embed, load, pixels_of):
    model, _, prompts, rows = embed(V15, get_pruner("downsample", keep_tokens=16), "wide1000x400")
    pixels, _ = pixels_of(V15, "wide1000x400")
    shown = prompts.kept[0].layout.eligible.reshape(24, 24).any(1).nonzero().flatten()
    top, bottom = int(shown[0]) * 14, (int(shown[-1]) + 1) * 14
    small = torch.nn.functional.interpolate(pixels[:, :, top:bottom], size=(3 * 14, 5 * 14), mode="area")
    assert torch.allclose(rows, model.encode_images(small, any_size=True)[0], atol=1e-5)
    with pytest.raises(ValueError, match="doesn't match model"):
        model.encode_images(small)
    assert not prompts.kept[0].mask().any()
    _, _, prompts, rows = embed(V15, get_pruner("downsample", keep_tokens=16, exclude_padding=False), "wide1000x400")
    assert prompts.kept[0].patches == 16


@pytest.mark.parametrize("name", ["trim", "visionzip", "pool", "downsample"])
def test_a_view_gives_no_more_than_it_shows(embed, name):
    """240 of 576 patches show the picture: a larger budget takes those, a class token, or the closest grid."""
    _, _, prompts, _ = embed(V15, get_pruner(name, keep_tokens=300), "wide1000x400")
    given = prompts.kept[0].per_view()[0]
    assert given == {"trim": 240, "visionzip": 241, "pool": 300, "downsample": 240}[name]


def test_adaptive_trim_counts_as_many_as_it_finds(embed):
    pruner = get_pruner("trim", keep_tokens=200, adaptive=True)
    for checkpoint in (V15, V16):
        _, _, prompts, rows = embed(checkpoint, pruner)
        kept = prompts.kept[0]
        found = kept.selection.eligible.sum(-1)
        assert kept.per_view() == (found + 1).tolist()
        assert 0 < kept.patches < plan_picture(pruner, kept.layout).count
        assert len(rows) == kept.patches == int(found.sum()) + len(found)


def test_a_picture_of_made_tokens_dims_nothing(load, embed, pixels_of):
    pixels, _ = pixels_of(V15, "land640x480")
    processor = load(V15)[2]
    drawn = {}
    for name in ("pool", "visionzip"):
        _, _, prompts, _ = embed(V15, get_pruner(name, keep_tokens=16))
        drawn[name] = (
            torch.tensor(list(draw_kept_tokens(pixels, prompts.kept, processor, 14).tobytes())).float().mean()
        )
    assert drawn["pool"] > 2 * drawn["visionzip"]


@pytest.mark.parametrize("name", ["trim", "visionzip", "pool", "downsample"])
def test_the_evaluation_counts_made_tokens(load, name):
    tokenizer, model, processor, _ = load(V15)
    pruner = get_pruner(name, keep_tokens=16)
    answerer = Answerer(tokenizer, model, processor, "vicuna_v1", pruner, 2)
    picture = GOLDEN / "images" / "square336.png"
    question = Question(question_id=1, text="What is there?", prompt="What is there?", image=picture)
    cost = answerer.answer([answerer.prepare(0, question)])[0][1]
    assert (cost["visual_tokens"], cost["average_tokens"], cost["newline_tokens"]) == (16, 16, 0)


# --- DivPrune's official scope -------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint, picture", [(V15, "wide1000x400"), (V16, "land640x480"), (V16, "tall300x900")])
@pytest.mark.parametrize("budget", [0.098, 16])
def test_official_divprune_chooses_among_all_that_is_read(embed, checkpoint, picture, budget):
    """Newline tokens and a square's border compete; the answer is the plain greedy max-min on the unpruned rows."""
    _, _, _, unpruned = embed(checkpoint, None, picture)
    pruner = get_pruner("divprune", keep_tokens=budget, scope="official")
    _, encoded, prompts, rows = embed(checkpoint, pruner, picture)
    count = round(budget * len(unpruned)) if budget < 1 else budget * encoded.layouts[0].views
    distance = 1 - cosine_similarity(unpruned[None])[0]
    nearest = distance.clone().fill_diagonal_(torch.inf).amin(0)
    order = [int(nearest.argmax())]
    while len(order) < count:
        order.append(int(distance[order].amin(0).index_fill(0, torch.tensor(order), -torch.inf).argmax()))
    assert torch.equal(rows, unpruned[sorted(order)])
    kept = prompts.kept[0]
    assert len(kept.sequence) == count == plan_picture(pruner, kept.layout).count
    newlines = (kept.layout.sequence[sorted(order)] == NEWLINE).sum()
    assert (kept.newlines, kept.patches) == (newlines, count - newlines)
    assert kept.mask().sum() == kept.patches


# --- hosts that cannot serve a method ------------------------------------------------------------------------------


def test_what_a_checkpoint_cannot_give_is_named(load, embed, monkeypatch):
    tower = load(V15)[1].get_vision_tower()
    with monkeypatch.context() as patch:
        patch.setattr(tower, "select_feature", "cls_patch")
        with pytest.raises(ValueError, match="'visionzip' needs class_attention, class_features, key_metric beside"):
            embed(V15, get_pruner("visionzip", keep_tokens=8))


def test_images_encoded_by_hand_cannot_serve_what_they_do_not_hold(load, embed):
    model, whole, _, _ = embed(V15, None)
    bare = EncodedImages(whole.features, whole.encoder_features, whole.layouts, whole.layouts_with_padding)
    ids = tokenizer_image_token(PROMPT, model.tokenizer, return_tensors="pt")[None]
    assert model.embed_prompts(ids, images=bare, pruner=get_pruner("trim", keep_tokens=8)).kept[0].patches == 8
    for name, field in (("visionzip", "class_attention|class_features|key_metric"), ("downsample", "pixels")):
        with pytest.raises(ValueError, match=f"hold nothing for ({field}): make them with encode_pictures"):
            model.embed_prompts(ids, images=bare, pruner=get_pruner(name, keep_tokens=8))


def test_joined_pictures_are_themselves(load, pixels_of):
    tokenizer, model, _, _ = load(V16)
    pixels, sizes = pixels_of(V16, "land640x480", "tall300x900", "square336")
    together = model.encode_pictures(pixels, sizes)
    apart = EncodedImages.join([model.encode_pictures([p], [size]) for p, size in zip(pixels, sizes, strict=True)])
    ids = tokenizer_image_token("<image><image><image>", tokenizer, return_tensors="pt")[None]
    for name in ("visionzip", "downsample"):
        pruner = dataclasses.replace(get_pruner(name), keep_tokens=9)
        rows = [model.embed_prompts(ids, images=images, pruner=pruner).inputs_embeds for images in (together, apart)]
        assert torch.allclose(*rows, atol=1e-5)


def test_a_view_that_shows_nothing_gives_nothing(load):
    """A wide picture forced into a column of three tiles: the upper and the lower one are all padding."""
    tokenizer, model, processor, _ = load(V16)
    pinpoints, model.config.image_grid_pinpoints = model.config.image_grid_pinpoints, [[336, 1008]]
    try:
        picture = load_picture("wide1000x400")
        pixels = process_images([picture], processor, model.config)
        ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]
        for name in ("trim", "visionzip", "pool", "downsample", "script"):
            kept = model.embed_prompts(
                ids, images=pixels, image_sizes=[picture.size], pruner=get_pruner(name, keep_tokens=9)
            ).kept[0]
            assert kept.layout.eligible.any(-1).tolist() == [True, False, True, False]
            given = kept.per_view()
            assert (given[1], given[3]) == (0, 0)
            assert given[0] > 0
            assert given[2] > 0
    finally:
        model.config.image_grid_pinpoints = pinpoints
