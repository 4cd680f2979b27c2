"""What selects on foreign hosts: the question in the language model's space, or in the tower's own joint space."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

from llava.checkpoint import find_folder
from llava.integrations.transformers import relevance as host_relevance
from llava.integrations.transformers.capture import capture_prompt
from llava.integrations.transformers.host import find_host
from llava.integrations.transformers.joint_space import HostJointSpace
from llava.integrations.transformers.pictures import find_pictures
from llava.integrations.transformers.relevance import HostRelevance
from llava.model.builder import TOY_FOLDER
from llava.pruning import PruningInputs, get_pruner, list_pruners, pruner_class
from llava.relevance import known
from llava.relevance.asked import LanguageSpace
from llava.relevance.clip import ClipJointSpace
from llava.relevance.first_attention import FirstAttention
from llava.relevance.language import language_relevance, word_distribution
from llava.relevance.policy import Announcer
from llava.relevance.siglip import SiglipJointSpace
from transformers_families import IMAGE, MAKERS, TEXT, VIDEO, Family, built, family, pixels, word_tokenizer

TOY_CLIP = TOY_FOLDER / "clip-toy-336"
ON_ALL_HOSTS = [
    name
    for name in list_pruners()
    if pruner_class(name).place == "projected"
    and pruner_class(name)().needs <= {"image_embeds", "text_embeds", "relevance"}
]

IN_DECODERS = [name for name in list_pruners() if pruner_class(name).place == "decoder"]


@pytest.fixture(scope="module")
def words():
    return word_tokenizer()


def kept(handle):
    return [one.picture.columns[one.kept].tolist() for one in handle.kept]


def same_picture(host, questions):
    """One image in several rows, each with a question of its own: (4,) token ids."""
    rows = len(questions)
    arguments = host.prompts([[2, "image", 4]] * rows, [0] * rows)
    arguments["input_ids"][:, -4:] = torch.tensor(questions)
    return arguments


# --- the language model's space ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_two_questions_on_one_picture_get_tokens_of_their_own(name, words):
    host = family(name)
    questions = [[10, 20, 30, 40], [51, 61, 71, 83], [12, 22, 32, 42], [55, 66, 77, 88]]
    texts = [" ".join(f"w{token}" for token in question) for question in questions]
    together = same_picture(host, questions)
    pruner = get_pruner("script", keep_tokens=1, gsp=False, dpp=False)
    with torch.no_grad(), pruner(host.model, words) as handle:
        host.model(**together)
        found = kept(handle)
        host.model(**together, query=texts)
        assert kept(handle) == found
        pictures = len(found) // len(questions)
        by_row = [found[pictures * row : pictures * (row + 1)] for row in range(len(questions))]
        for row, own in enumerate(by_row):
            alone = {
                key: value[row : row + 1]
                for key, value in together.items()
                if key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
            }
            host.model(**alone | host.pick([0], [1]))
            assert kept(handle) == own
        host.model(**together, query=texts[0])
        assert kept(handle) == by_row[0] * len(questions)
    assert any(own != by_row[0] for own in by_row)


def captured_by(host, arguments):
    """What the language model of an unpruned model receives."""
    received = {}
    language_model = getattr(host.model.model, "language_model", None) or host.model.model.text_model
    watch = language_model.register_forward_pre_hook(
        lambda module, positional, named: received.update(named), with_kwargs=True
    )
    with torch.no_grad():
        host.model(**arguments)
    watch.remove()
    return received


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_words_are_embedded_as_the_language_model_receives_them(name, words):
    """Gemma scales its embeddings in their own module, others in the language model: whatever stands at its door."""
    host = family(name)
    arguments = host.batch()
    received = captured_by(host, arguments)["inputs_embeds"]
    reader = HostRelevance(find_host(host.model), get_pruner("script"), words, None, None)
    text = arguments["attention_mask"].bool() & (arguments["input_ids"] != IMAGE)
    assert torch.equal(reader._embedded(arguments["input_ids"])[text], received[text])
    with torch.no_grad():
        embeds, mask = LanguageSpace(reader._token_ids, reader._embedded).embed(["w10 w20", "w45"])
        table = reader._embedded(torch.tensor([[10, 20], [45, 0]]))
    assert torch.equal(embeds[mask], table[mask])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava"])
def test_language_relevance_by_hand(name, words):
    """On tokens and words as the unpruned model's decoder receives them."""
    host = family(name)
    received = captured_by(host, host.batch())["inputs_embeds"]
    method = get_pruner("script", keep_tokens=3)
    attention = FirstAttention.find(host.model.model.language_model)
    asked = host.model.get_input_embeddings()(torch.tensor([[10, 20]]))
    with torch.no_grad(), method(host.model, words, query="w10 w20") as handle:
        host.model(**host.batch())
        for one in handle.kept:
            tokens = received[one.picture.row, one.picture.columns][None]
            relevance = language_relevance(word_distribution(asked, tokens), attention.distribution(asked, tokens))
            inputs = PruningInputs(tokens, relevance=relevance)
            expected = get_pruner("script", keep_tokens=3, relevance="language").select(inputs)
            assert one.kept.nonzero().flatten().tolist() == expected.indices[0].tolist()


def test_projector_relevance_is_the_cosine_with_the_mean_embedding(words):
    host = family("qwen2_5_vl")
    received = captured_by(host, host.batch())["inputs_embeds"]
    table = host.model.get_input_embeddings().weight
    method = get_pruner("script", keep_tokens=3, relevance="projector")
    with torch.no_grad(), method(host.model, words, query="w10 w20") as handle:
        host.model(**host.batch())
    for one in handle.kept:
        features = received[one.picture.row, one.picture.columns][None]
        cosine = F.cosine_similarity(features, table[[10, 20]].mean(0), dim=-1)
        expected = method.select(PruningInputs(features, relevance=cosine))
        assert one.kept.nonzero().flatten().tolist() == expected.indices[0].tolist()


def test_the_sign_can_be_turned_round(words):
    host = family("llava")
    answers = {}
    for sign in (None, 1, -1):
        pruner = get_pruner("script", keep_tokens=4, relevance="projector", relevance_sign=sign, gsp=False, dpp=False)
        with torch.no_grad(), pruner(host.model, words, query="w10 w20") as handle:
            host.model(**host.single(0))
        answers[sign] = set(kept(handle)[0])
    assert answers[None] == answers[1]
    assert not answers[1] & answers[-1]


def test_a_first_attention_that_cannot_be_read_leaves_the_words(words, caplog, monkeypatch):
    """Said once, in the log and by the handle, whatever number of times the pruner is attached."""
    monkeypatch.setattr(host_relevance, "announcer", Announcer())
    model = copy.deepcopy(family("llava").model)
    for layer in model.model.language_model.layers:
        layer.self_attn.query = layer.self_attn.__dict__["_modules"].pop("q_proj")
    host = find_host(model)
    with caplog.at_level("WARNING", logger="llava.relevance.policy"):
        for _ in range(2):
            reader = HostRelevance(host, get_pruner("script", keep_tokens=3), words, None, None)
    assert reader.choice.source == "language"
    assert "embeddings alone" in reader.choice.reason
    assert "neither q_proj and k_proj" in reader.choice.reason
    assert [str(reader.choice) in record.message for record in caplog.records] == [True]
    with pytest.raises(ValueError, match=r"cannot have relevance=qk.*work relevance=language, words, projector"):
        HostRelevance(host, get_pruner("script", relevance="qk"), words, None, None)


def test_one_budget_for_a_picture_of_two_tiles(words):
    """InternVL's tiles share the budget of their picture; all of it is the unpruned model, bit for bit."""
    host = family("internvl")
    with torch.no_grad():
        expected = host.model(**host.batch()).logits
        for scope in ("view", "global"):
            with get_pruner("script", keep_tokens=5, per="picture", scope=scope)(host.model, words) as handle:
                host.model(**host.batch())
            assert [sum(one.per_view) for one in handle.kept] == [5, 5, 5]
            assert all(len(one.per_view) == 2 for one in handle.kept)
            if scope == "view":
                assert {tuple(one.per_view) for one in handle.kept} == {(3, 2)}
        with get_pruner("script", keep_tokens=1, per="picture")(host.model, words) as handle:
            host.model(**host.batch())
        assert {tuple(one.per_view) for one in handle.kept} == {(1, 0)}  # one tile has no share
        with get_pruner("script", keep_tokens=8, per="picture")(host.model, words):
            found = host.model(**host.batch()).logits
    real = host.batch()["attention_mask"].bool()
    assert torch.equal(found[real], expected[real])


@pytest.mark.parametrize("name", ON_ALL_HOSTS)
@pytest.mark.parametrize("host", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
def test_every_method_that_reads_projected_features(name, host, words):
    """Counts as promised, and a row alone is the row in its batch; square layouts where a method asks for them."""
    host = family(host)
    pruner = get_pruner(name, keep_tokens=2)
    if name in ("grid", "pool") and host.name in ("llava_next", "qwen2_5_vl"):
        with pytest.raises(ValueError, match="square"), pruner(host.model, words) as handle:
            host.model(**host.batch())
        return
    with torch.no_grad(), pruner(host.model, words) as handle:
        output = host.model.generate(**host.batch(), max_new_tokens=3)
        found = kept(handle)
        assert {count for one in handle.kept for count in one.per_view} == {2}
        for row in range(2):
            alone = host.model.generate(**host.single(row), max_new_tokens=3)
            assert torch.equal(alone[0, -3:], output[row, -3:])
    assert len(found) == 3


def test_pooled_tokens_take_the_places_of_others():
    host = family("llava")
    language_model = host.model.model.language_model
    seen = []
    arguments = host.single(0)
    watch = language_model.register_forward_hook(
        lambda module, positional, named, output: seen.append(named["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        host.model(**arguments)
        with get_pruner("pool", keep_tokens=4)(host.model):
            host.model(**arguments)
    watch.remove()
    whole, pooled = seen[0][0], seen[-1][0]
    visual = arguments["input_ids"][0] == IMAGE
    expected = whole[visual].unflatten(0, (2, 2, 2, 2)).mean((1, 3)).flatten(0, 1)
    assert torch.allclose(pooled[4:8], expected, atol=1e-6)
    assert torch.equal(torch.cat([pooled[:4], pooled[8:]]), whole[~visual])


@pytest.mark.parametrize("name", sorted(set(list_pruners()) - set(ON_ALL_HOSTS) - set(IN_DECODERS)))
def test_methods_that_need_more_say_where_they_act(name, words):
    for host in ("qwen2_5_vl", "llava_next", "llava_onevision", "internvl", "paligemma"):
        with pytest.raises(ValueError, match=f"'{name}' acts on .* in {type(family(host).model).__name__}: "):
            get_pruner(name).attach(family(host).model, words)
    if pruner_class(name).place == "encoder" and pruner_class(name).makes_tokens:
        with pytest.raises(ValueError, match="makes tokens, which have no position"):
            get_pruner(name).attach(family("llava").model, words, positions="original")


# --- joint spaces --------------------------------------------------------------------------------------------------


def llava_like_the_toy():
    """A LLaVA whose tower has the shape of the toy's CLIP."""
    vision = hf.CLIPVisionConfig.from_pretrained(TOY_CLIP)
    config = hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE)
    return built(hf.LlavaForConditionalGeneration, config)


def test_clip_relevance_is_read_in_clips_space(words):
    model = llava_like_the_toy()
    host = Family("llava", model, {"pixel_values": pixels(3, 3, 336, 336)}, [576] * 3)
    space = ClipJointSpace.load(find_folder(str(TOY_CLIP)), torch.float32, "cpu")
    questions = ["What color is the star?", "Is there a cup?"]
    with torch.no_grad():
        hidden = model.model.vision_tower(host.images["pixel_values"], output_hidden_states=True).hidden_states[-2]
        image = space.image_embeds(hidden[:, 1:])
        features = torch.stack(model.model.get_image_features(host.images["pixel_values"]).pooler_output)
    text, mask = space.text_embeds(questions)
    rows = [0, 1, 1]
    expected = get_pruner("script", keep_tokens=20).select(
        PruningInputs(features, image_embeds=image, text_embeds=text[rows], text_mask=mask[rows], relevance_sign=-1)
    )
    with torch.no_grad(), get_pruner("script", keep_tokens=20)(model, words, clip=str(TOY_CLIP)) as handle:
        model(**host.batch(), query=questions)
    found = [one.kept.nonzero().flatten().tolist() for one in handle.kept]
    assert found == expected.indices.tolist()


def test_a_tower_known_by_its_shape_is_read_in_its_own_space(words, monkeypatch):
    """`clip` without being named, where the files are at hand; `language`, and why, where they are not."""
    model = llava_like_the_toy()
    host = Family("llava", model, {"pixel_values": pixels(3, 3, 336, 336)}, [576] * 3)
    shape = known.KnownTower("clip_vision_model", 128, (model.config.vision_config.num_hidden_layers,), 336, 14)
    found = {}
    for name, options in (("nobody/has-this-clip", {}), (str(TOY_CLIP), {}), ("named", {"clip": str(TOY_CLIP)})):
        monkeypatch.setattr(known, "KNOWN_TOWERS", {name: shape})
        with torch.no_grad(), get_pruner("script", keep_tokens=20)(model, words, query="w1 w2", **options) as handle:
            model(**host.single(0))
        found[name] = (handle.relevance.source, kept(handle))
        if name == "nobody/has-this-clip":
            assert "has the shape of nobody/has-this-clip, whose files are not on this machine" in str(
                handle.relevance
            )
    assert found[str(TOY_CLIP)] == found["named"]
    assert found["named"][0] == "clip"
    assert found["nobody/has-this-clip"][0] == "language"
    with pytest.raises(
        ValueError, match=r"cannot have relevance=clip: .*work relevance=language, qk, words, projector"
    ):
        get_pruner("script", relevance="clip").attach(family("llava").model, words)


def test_a_projector_that_joins_patches_has_no_joint_space(words):
    """Aya's makes one token of four patches: refused when named, passed over when it would be found by itself."""
    model = family("aya_vision").model
    with pytest.raises(ValueError, match="makes 4 tokens of 16 patches"):
        HostJointSpace._check_projector(SimpleNamespace(host=find_host(model)), model.config.vision_config)


def test_clip_relevance_of_pooled_frames(words):
    """LLaVA-NeXT-Video pools frames before its projector: a token stands in CLIP's space where its mean patch does."""
    config = hf.LlavaNextVideoConfig(
        vision_config=hf.CLIPVisionConfig.from_pretrained(TOY_CLIP),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    model = built(hf.LlavaNextVideoForConditionalGeneration, config)
    frames = pixels(1, 2, 3, 336, 336)
    line = [1, *[VIDEO] * 2 * 144, 5, 6]
    arguments = {
        "input_ids": torch.tensor([line]),
        "attention_mask": torch.ones(1, len(line), dtype=torch.long),
        "pixel_values_videos": frames,
    }
    with torch.no_grad(), get_pruner("script", keep_tokens=9)(model, words, clip=str(TOY_CLIP)) as handle:
        model(**arguments, query="What is red?")
        hidden = model.model.vision_tower(frames[0], output_hidden_states=True).hidden_states[-2][:, 1:]
        pooled = model.model.vision_resampler(hidden)
        features = model.model.multi_modal_projector(pooled)
    space = ClipJointSpace.load(find_folder(str(TOY_CLIP)), torch.float32, "cpu")
    found = handle.kept[0].kept.nonzero().flatten()
    expected = one_question(space, space.image_embeds(pooled), features)
    assert [found[:9].tolist(), (found[9:] - 144).tolist()] == expected


@pytest.fixture(scope="module")
def siglip(video):
    return video / "checkpoints/google/siglip-so400m-patch14-384"


def one_question(space, embeds, features):
    """What `script` keeps of views (V, n, d) for a question, by a joint space."""
    text, mask = space.text_embeds(["What is red?"])
    inputs = PruningInputs(
        features, image_embeds=embeds, text_embeds=text, text_mask=mask, relevance_sign=space.relevance_sign
    )
    return get_pruner("script", keep_tokens=9).select(inputs).indices.tolist()


def test_siglip_relevance_of_images_and_pooled_frames(siglip, words):
    """LLaVA-OneVision reads the last layer but one; two images of a row are one view each, frames are pooled."""
    vision = hf.SiglipVisionConfig.from_pretrained(siglip)
    vision.num_hidden_layers -= 1
    config = hf.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = built(hf.LlavaOnevisionForConditionalGeneration, config)
    images, frames = pixels(2, 3, 384, 384), pixels(1, 2, 3, 384, 384)
    line = [1, *[IMAGE] * 2 * 730, *[VIDEO] * (2 * 196 + 1), 5, 6]
    arguments = {
        "input_ids": torch.tensor([line]),
        "attention_mask": torch.ones(1, len(line), dtype=torch.long),
        "pixel_values": images[:, None],
        "image_sizes": torch.tensor([[384, 384]] * 2),
        "batch_num_images": torch.tensor([2]),
        "pixel_values_videos": frames,
    }
    with torch.no_grad(), get_pruner("script", keep_tokens=9)(model, words, siglip=str(siglip)) as handle:
        model(**arguments, query="What is red?")
    space = SiglipJointSpace(siglip, torch.float32, "cpu")
    with torch.no_grad():
        hidden = model.model.vision_tower(images, output_hidden_states=True).hidden_states[-1]
        features = model.model.multi_modal_projector(hidden)
        expected = one_question(space, space.image_embeds(hidden), features)
        hidden = model.model.vision_tower(frames[0], output_hidden_states=True).hidden_states[-1]
        features = model.model.apply_pooling(model.model.multi_modal_projector(hidden))
        of_frames = one_question(space, model.model.apply_pooling(space.image_embeds(hidden)), features)
    first, second, video = (one.kept.nonzero().flatten() for one in handle.kept)
    assert [first.tolist(), second.tolist()] == expected
    assert [video[:9].tolist(), (video[9:] - 196).tolist()] == of_frames


def test_siglip_relevance_of_a_whole_tower(siglip, words):
    """PaliGemma reads the tower's end, after its last norm."""
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig.from_pretrained(siglip, vision_use_head=False),
        text_config=hf.GemmaConfig(**TEXT | {"head_dim": 8}),
        image_token_id=IMAGE,
        projection_dim=32,
    )
    model = built(hf.PaliGemmaForConditionalGeneration, config)
    image = pixels(1, 3, 384, 384)
    line = [*[IMAGE] * 729, 1, 5, 6]
    arguments = {
        "input_ids": torch.tensor([line]),
        "attention_mask": torch.ones(1, len(line), dtype=torch.long),
        "token_type_ids": torch.zeros(1, len(line), dtype=torch.long),
        "pixel_values": image,
    }
    with torch.no_grad(), get_pruner("script", keep_tokens=9)(model, words, siglip=str(siglip)) as handle:
        model(**arguments, query="What is red?")
        hidden = model.model.vision_tower(image).last_hidden_state
        features = model.model.multi_modal_projector(hidden)
    space = SiglipJointSpace(siglip, torch.float32, "cpu")
    expected = one_question(space, space.token_embeds(hidden), features)
    assert [handle.kept[0].kept.nonzero().flatten().tolist()] == expected


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_packing_is_the_models_own(name):
    """Replayed on the features themselves it gives the features again, newlines aside."""
    host = family(name)
    find = find_host(host.model)
    arguments = host.batch()
    capture = capture_prompt(find, arguments, observe_projector=True)
    projected = host.model.model.multi_modal_projector(capture.projector_inputs[0])
    tiles = projected.split([tiles for tiles, _ in capture.packing.tiles])
    packed = capture.packing.replay(tiles)
    pictures = find_pictures(find, capture, arguments["input_ids"])
    newlines = 0
    for own, theirs, picture in zip(packed, capture.features["image"], pictures, strict=True):
        is_newline = picture.views == -1
        newlines += int(is_newline.sum())
        assert torch.allclose(own[~is_newline], theirs[~is_newline], atol=1e-6)
        assert bool((own[is_newline] == 0).all())
        assert torch.equal(theirs[is_newline], host.model.model.image_newline.expand(int(is_newline.sum()), -1))
    assert newlines > 0


def test_a_resized_grid_still_has_its_tiles():
    """LLaVA-OneVision shrinks grids of many tiles; each token then belongs to the tile that it shows most of."""
    host = family("llava_onevision")
    host.model.model.config.vision_aspect_ratio = "anyres_max_1"
    try:
        images = {name: value[2:] for name, value in host.images.items()}
        count = len(host.model.model.get_image_features(**images).pooler_output[0])
        arguments = {"input_ids": torch.tensor([[1, *[IMAGE] * count, 5, 6]])} | images
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
        with torch.no_grad(), get_pruner("divprune", keep_tokens=2)(host.model) as handle:
            host.model(**arguments)
    finally:
        host.model.model.config.vision_aspect_ratio = "anyres_max_9"
    views = handle.kept[0].picture.views
    assert count < 16 + 8 * 9
    assert torch.bincount(views[views >= 0]).tolist() == [16, 4, 4, 4, 4]
    assert handle.kept[0].per_view == [2] * 5


def test_kept_newlines_are_those_of_rows_with_a_token():
    host = family("llava_next")
    with torch.no_grad(), get_pruner("first", keep_tokens=2, newlines="keep")(host.model) as handle:
        host.model(**host.batch())
    for one in handle.kept:
        views, width = one.picture.views, None
        ends = (views == -1).nonzero().flatten().tolist()
        start = 16
        for end in ends:
            assert bool(one.kept[end]) == bool(one.kept[start:end].any())
            start, width = end + 1, end
        assert width is not None
        assert 0 < one.separators < len(ends)


def test_row_breaks_inside_an_image_are_separators():
    """Pixtral writes a text token after every row of patches; they go with their row."""
    host = family("mistral3")
    line = [1, 5, *[*[IMAGE] * 4, 9] * 3, *[IMAGE] * 4, 8, 6, 7]
    arguments = {
        "input_ids": torch.tensor([line]),
        "attention_mask": torch.ones(1, len(line), dtype=torch.long),
    } | host.pick([0], [1])
    shown = {}
    for newlines in ("drop", "keep"):
        with torch.no_grad(), get_pruner("first", keep_tokens=5, newlines=newlines)(host.model) as handle:
            length = host.model(**arguments).logits.shape[1]
        shown[newlines] = (length, handle.kept[0].per_view, handle.kept[0].separators)
    assert shown == {"drop": (2 + 5 + 3, [5], 0), "keep": (2 + 5 + 2 + 3, [5], 2)}


def test_joint_spaces_are_refused_where_they_do_not_fit(words):
    refused = [
        ("llava", {"clip": str(TOY_CLIP)}, "is not this model's vision tower: hidden_size is 128 there and 24 here"),
        ("qwen2_5_vl", {"clip": str(TOY_CLIP)}, "the vision tower of Qwen2_5_VL.* is a qwen2_5_vl.*Leave clip= out"),
        ("llava", {"clip": "a", "siglip": "b"}, "not both"),
    ]
    for name, options, message in refused:
        with pytest.raises(ValueError, match=message):
            get_pruner("script").attach(family(name).model, words, **options)
    with pytest.raises(ValueError, match="reads no joint space"):
        get_pruner("divprune").attach(family("llava").model, words, clip=str(TOY_CLIP))
    with pytest.raises(ValueError, match="reads no joint space"):
        get_pruner("script", relevance="words").attach(family("llava").model, words, clip=str(TOY_CLIP))
    with pytest.raises(OSError, match="no checkpoint at"):
        get_pruner("script").attach(llava_like_the_toy(), words, clip="no/where/clip")
