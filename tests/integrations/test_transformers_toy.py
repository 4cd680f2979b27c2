"""The trained toy in the library's own format: the same tokens and the same answers as in our own host."""

import numpy as np
import pytest
import torch
from convert_to_transformers import convert
from PIL import Image
from questions import color_of, existence, shape_of
from scenes import make_scene, scene_rng
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava.conversation import conv_templates
from llava.eval.measure.calibrate_budget import curves_of
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import TOY_FOLDER, load_pretrained_model
from llava.pruning import PruningInputs, get_pruner
from llava.pruning.budget_curves import StoredCurves, options_of
from llava.pruning.script import Script
from llava.relevance.first_attention import FirstAttention
from llava.relevance.language import language_relevance, word_distribution

CLIP = str(TOY_FOLDER / "clip-toy-336")
SCENES = TOY_FOLDER / "data/eval/MME/MME_Benchmark_release_version"
SYSTEM = conv_templates["vicuna_v1"].system
SHORT = "Answer the question using a single word or phrase."


def load_both(name, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / name
    convert(str(TOY_FOLDER / name), target)
    ours = load_pretrained_model(str(TOY_FOLDER / name), device="cpu")[:3]
    model = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float32).eval()
    return ours, (AutoProcessor.from_pretrained(target), model)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return load_both("llava-toy-v1.5", tmp_path_factory)


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    return load_both("llava-toy-v1.6", tmp_path_factory)


def asked(count, square=None):
    """(picture, question) pairs about pictures of the toy's world; ``square``: cut to squares of this side."""
    found = []
    for number, text in enumerate(sorted(SCENES.glob("color/*.txt"))[:count]):
        picture = Image.open(text.with_suffix(".png")).convert("RGB")
        if square:
            picture = picture.crop((0, 0, min(picture.size), min(picture.size))).resize((square, square))
        question = text.read_text().splitlines()[number % 2].split("\t")[0].removesuffix(" Please answer yes or no.")
        found.append((picture, question))
    return found


def prompt_of(question):
    return f"{SYSTEM} USER: <image>\n{question}\n{SHORT} ASSISTANT:"


def our_answer(ours, picture, question, pruner):
    tokenizer, model, image_processor = ours
    ids = tokenizer_image_token(prompt_of(question), tokenizer, return_tensors="pt")[None]
    pixels = process_images([picture], image_processor, model.config)
    prompt = model.embed_prompts(ids, images=pixels, image_sizes=[picture.size], pruner=pruner, padding_side="left")
    answer = model.generate(prompt, max_new_tokens=6, do_sample=False)
    return prompt.kept[0], prompt.inputs_embeds, tokenizer.decode(answer[0], skip_special_tokens=True)


METHODS = ["script", "cdpruner", "divprune", "pool", "trim", "visionzip", "fastv"]


@pytest.mark.parametrize("name", METHODS)
def test_same_tokens_and_answers_at_64(single, name):
    """Padding of a picture that is no square is not known to the library's model: there it counts like anything."""
    ours, (processor, model) = single
    nominal = {"budget": "nominal"} if name == "fastv" else {}
    pruner = get_pruner(name, keep_tokens=64, exclude_padding=False, **nominal)
    options = {"clip": CLIP} if "image_embeds" in pruner.needs else {}
    pairs = asked(6)
    alone, entered = [], []
    watch = model.model.language_model.register_forward_hook(
        lambda module, given, named, output: entered.append(named["inputs_embeds"]), with_kwargs=True
    )
    with torch.inference_mode(), pruner(model, processor, **options) as handle:
        for picture, question in pairs:
            kept, prompt, expected = our_answer(ours, picture, question, pruner)
            inputs = processor(images=picture, text=prompt_of(question), return_tensors="pt")
            entered.clear()
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            alone.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
            read = next(embeds for embeds in entered if embeds.shape == prompt.shape)
            torch.testing.assert_close(read, prompt, rtol=0, atol=1e-4)
            if kept.made is None:
                assert handle.kept[0].kept.nonzero().flatten().tolist() == kept.sequence.tolist()
            assert handle.kept[0].per_view == kept.per_view()
            assert alone[-1].strip() == expected.strip()
        watch.remove()
        prompts = [prompt_of(question) for _, question in pairs]
        inputs = processor(images=[picture for picture, _ in pairs], text=prompts, padding=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    together = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [answer.strip() for answer in together] == [answer.strip() for answer in alone]
    assert len(set(together)) > 1 or name in ("pool", "fastv")


@pytest.mark.parametrize("name", ["script", "cdpruner", "scope"])
def test_a_budget_that_finds_itself_finds_the_same(single, name):
    """Prompts of one batch get different lengths, and each the tokens and the answer that it has alone and with us."""
    ours, (processor, model) = single
    rule = "auto:0.98:floor=2:ceiling=100" if name != "scope" else "auto:0.93:floor=2:ceiling=100"
    pruner = get_pruner(name, keep_tokens=rule, exclude_padding=False)
    options = {"clip": CLIP} if "image_embeds" in pruner.needs else {}
    pairs = asked(5)
    with torch.inference_mode(), pruner(model, processor, **options) as handle:
        prompts = [prompt_of(question) for _, question in pairs]
        inputs = processor(images=[picture for picture, _ in pairs], text=prompts, padding=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        together = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        kept_together = [one.kept.nonzero().flatten().tolist() for one in handle.kept]
        for number, (picture, question) in enumerate(pairs):
            kept, _, expected = our_answer(ours, picture, question, pruner)
            inputs = processor(images=picture, text=prompt_of(question), return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            alone = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert handle.kept[0].kept.nonzero().flatten().tolist() == kept.sequence.tolist() == kept_together[number]
            assert alone.strip() == expected.strip() == together[number].strip()
    counts = [len(tokens) for tokens in kept_together]
    assert all(2 <= count <= 100 for count in counts)
    assert len(set(counts)) > 1


def test_a_mean_budget_is_the_same_rule(single, tmp_path):
    """Curves made with our model give both hosts the same tokens, about as many on average as asked for."""
    ours, (processor, model) = single
    bounds = get_pruner("script", keep_tokens="auto:floor=2:ceiling=100", exclude_padding=False)
    curves = [curves_of(bounds, our_answer(ours, *pair, bounds)[0]) for pair in asked(4)]
    path = tmp_path / "curves.json"
    StoredCurves("script", options_of(bounds), "toy", bounds.keep_tokens, "gain", curves).save(path)
    pruner = get_pruner("script", keep_tokens=f"auto:mean_tokens=40:curves={path}", exclude_padding=False)
    counts = []
    for picture, question in asked(4):
        inputs = processor(images=picture, text=prompt_of(question), return_tensors="pt")
        with torch.inference_mode(), pruner(model, processor, clip=CLIP) as handle:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
        found = handle.kept[0].kept.nonzero().flatten().tolist()
        assert found == our_answer(ours, picture, question, pruner)[0].sequence.tolist()
        counts.append(len(found))
    assert sum(counts) / len(counts) == pytest.approx(40, rel=0.03)
    assert len(set(counts)) > 1


def test_same_tokens_and_answers_on_tiles(tiled):
    """Three views of a square picture; each token is found again by its place in the unpruned sequence.

    Both towers round in their own way, which may swap one of two tokens that are equally good.
    """
    ours, (processor, model) = tiled
    pruner = get_pruner("script", keep_tokens=64)
    for picture, question in asked(2, square=336):
        inputs = processor(images=picture, text=prompt_of(question), return_tensors="pt")
        with torch.inference_mode(), pruner(model, processor, clip=CLIP) as handle:
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            kept, _, expected = our_answer(ours, picture, question, pruner)
        place = {number: index for index, number in enumerate(kept.layout.sequence.tolist())}
        found = set(handle.kept[0].kept.nonzero().flatten().tolist())
        assert len(found - {place[number] for number in kept.sequence.tolist()}) <= 1
        assert handle.kept[0].per_view == kept.per_view() == [64] * len(kept.per_view())
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.strip() == expected.strip()


def test_the_question_is_read_from_the_prompt(single):
    """Two questions about one picture, as the processor writes them, keep what they keep when they are told."""
    _, (processor, model) = single
    (picture, first), (_, second) = asked(2)
    inputs = processor(
        images=[picture, picture], text=[prompt_of(first), prompt_of(second)], padding=True, return_tensors="pt"
    )
    with torch.inference_mode(), get_pruner("script", keep_tokens=16)(model, processor, clip=CLIP) as handle:
        model.generate(**inputs, max_new_tokens=1)
        read = [one.kept for one in handle.kept]
        model.generate(**inputs, max_new_tokens=1, query=[first, second])
        told = [one.kept for one in handle.kept]
    assert all(torch.equal(one, other) for one, other in zip(read, told, strict=True))
    assert not torch.equal(read[0], read[1])


# --- the README's two lines, without clip= -------------------------------------------------------------------------


def scenes_and_targets(count):
    """(picture, question, (576,) bool: patches of the asked object) of scenes that nobody has seen."""
    found = []
    for number in range(count):
        scene = make_scene("test", 400_000 + number)
        rng = scene_rng("test", 400_000 + number, purpose=9)
        for maker in (color_of, shape_of, existence):
            question = maker(scene.layout, rng)
            objects = [] if question is None else question.targets(scene.layout)
            if objects:
                boxes = [scene.layout.objects[number].box for number in objects]
                found.append((scene.image, question.text, patches_in(boxes, scene.image.size)))
    return found


def patches_in(boxes, size):
    """Patches of the padded square whose centres lie in one of the boxes."""
    side = max(size)
    centre = (np.arange(24) + 0.5) * side / 24
    x, y = centre - (side - size[0]) // 2, centre - (side - size[1]) // 2
    inside = [((y >= t) & (y < b))[:, None] & ((x >= left) & (x < r))[None] for left, t, r, b in boxes]
    return np.any(inside, axis=0).ravel()


def area_under_curve(scores, wanted):
    """How often a wanted patch scores higher than another; half a point where they are equal."""
    mine, others = scores[wanted][:, None], scores[~wanted][None]
    return float(((mine > others) + 0.5 * (mine == others)).mean())


@pytest.fixture
def selections(monkeypatch):
    """What Script is given at each selection."""
    given, choose = [], Script.choose

    def spy(self, inputs, keep):
        given.append(inputs)
        return choose(self, inputs, keep)

    monkeypatch.setattr(Script, "choose", spy)
    return given


def test_the_two_lines_find_the_asked_object(single, selections):
    """At least .9 of the area under the curve, by the source that is taken by itself and by the one that is named."""
    _, (processor, model) = single
    areas = {"auto": [], "projector": []}
    for source, found in areas.items():
        with torch.inference_mode(), get_pruner("script", keep_tokens=8, relevance=source)(model, processor) as handle:
            for picture, question, wanted in scenes_and_targets(20):
                inputs = processor(images=picture, text=prompt_of(question), return_tensors="pt")
                selections.clear()
                model(**inputs)
                given = selections[0]
                scores = handle.method.__class__(keep_tokens=8, relevance=handle.relevance.source).raw_relevance(given)
                found.append(area_under_curve(scores[0].numpy(), wanted))
        assert handle.kept[0].relevance is handle.relevance
        assert handle.relevance.source == {"auto": "language"}.get(source, source)
    assert len(areas["auto"]) > 40
    assert np.mean(areas["auto"]) >= 0.9
    assert np.mean(areas["projector"]) >= 0.9


@pytest.mark.parametrize("source", ["language", "words", "qk"])
def test_language_relevance_is_computed_on_what_the_decoder_receives(single, source):
    """By the functions of the formula, on features and embeddings that are taken from the unpruned model by hand."""
    _, (processor, model) = single
    method = get_pruner("script", keep_tokens=16, relevance=source)
    attention = FirstAttention.find(model.model.language_model)
    for picture, question, _ in scenes_and_targets(2):
        inputs = processor(images=picture, text=prompt_of(question), return_tensors="pt")
        with torch.inference_mode():
            tokens = torch.stack(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
            ids = processor.tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids
            words = model.get_input_embeddings()(ids)
            relevance = language_relevance(
                None if source == "qk" else word_distribution(words, tokens),
                None if source == "words" else attention.distribution(words, tokens),
            )
            expected = method.select(PruningInputs(tokens, relevance=relevance)).indices[0]
            with method(model, processor) as handle:
                model(**inputs)
        assert handle.kept[0].kept.nonzero().flatten().tolist() == expected.tolist()
