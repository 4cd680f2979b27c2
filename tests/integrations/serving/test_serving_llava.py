"""LLaVA-1.5 in vLLM: counts, selections, caches, budgets, and equality with the other hosts."""

import copy
import dataclasses

import pytest
import torch
from engines import Spy, ask, logprobs, model_of, prompt_of, start
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from llava.integrations.vllm.plan import PicturePlan
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import TOY_FOLDER, load_pretrained_model
from llava.pruning import PruningInputs, get_pruner
from llava.relevance.asked import Asked, LanguageSpace
from llava.relevance.first_attention import FirstAttention

KEEP = 64
FIRST = "What colour is the circle?"
NEAR = {"atol": 1e-4, "rtol": 1e-4}
SECOND = "Is the house left of the tree?"


@pytest.fixture(scope="module")
def llm(toy):
    return start(toy("v1.5"), "ScriptLlavaForConditionalGeneration", {"keep_tokens": KEEP})


@pytest.fixture(scope="module")
def spy(llm):
    return Spy(llm)


@pytest.fixture(autouse=True)
def _cold(request, llm, spy):
    """Every test starts with empty caches."""
    make_cold(llm)
    spy.reset()


def make_cold(llm):
    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
    model_of(llm).script_cache.clear()


def text_tokens(llm, prompt):
    return len(llm.get_tokenizer()(prompt).input_ids) - prompt.count("<image>")


def test_the_prompt_has_the_promised_tokens(llm, pictures):
    prompt = prompt_of(FIRST)
    assert len(ask(llm, prompt, pictures[:1]).prompt_token_ids) == KEEP + text_tokens(llm, prompt)
    two = prompt_of(FIRST, images=2)
    assert len(ask(llm, two, pictures[:2]).prompt_token_ids) == 2 * KEEP + text_tokens(llm, two)


def test_two_questions_two_selections_one_pass_of_the_tower(llm, spy, pictures):
    ask(llm, prompt_of(FIRST), pictures[0])
    ask(llm, prompt_of(SECOND), pictures[0])
    assert spy.encoded == 1
    assert len(spy.chosen) == 2
    assert not torch.equal(*spy.chosen)
    again = ask(llm, prompt_of(FIRST), pictures[0])
    assert len(spy.chosen) == 2  # vLLM's own encoder cache
    assert again.num_cached_tokens >= len(again.prompt_token_ids) // 32 * 32 - 32


def test_warm_equals_cold(llm, pictures):
    cold = {}
    for question in (FIRST, SECOND):
        make_cold(llm)
        cold[question] = ask(llm, prompt_of(question), pictures[0])
    for question in (FIRST, SECOND, FIRST):
        warm = ask(llm, prompt_of(question), pictures[0])
        assert warm.outputs[0].token_ids == cold[question].outputs[0].token_ids
        assert logprobs(warm) == pytest.approx(logprobs(cold[question]), abs=1e-4)


def test_without_the_question_in_the_hash_the_first_selection_is_reused(llm, spy, pictures, monkeypatch):
    """The counterfactual: what the checks above would not see is seen here."""

    digest = PicturePlan.digest

    def without_question(plan):
        return digest(dataclasses.replace(plan, query="", query_ids=()))

    cold = ask(llm, prompt_of(SECOND), pictures[0])
    make_cold(llm)
    spy.reset()
    monkeypatch.setattr(PicturePlan, "digest", without_question)
    ask(llm, prompt_of(FIRST), pictures[0])
    stale = ask(llm, prompt_of(SECOND), pictures[0])
    assert len(spy.chosen) == 1
    assert logprobs(stale) != pytest.approx(logprobs(cold), abs=1e-4)


def test_budgets_of_requests(llm, pictures):
    prompt = prompt_of(FIRST)
    text = text_tokens(llm, prompt)
    each = [
        {},
        {"keep_tokens": 16},
        {"image_pruning_rate": 0.95},
        {"image_pruning_rate": 0.999, "min_visual_tokens": 8},
    ]
    together = ask(llm, [prompt] * 4, [pictures[0]] * 4, each=each)
    counts = [len(output.prompt_token_ids) - text for output in together]
    assert counts == [64, 16, 29, 8]
    for options, output in zip(each, together, strict=True):
        alone = ask(llm, prompt, pictures[0], **options)
        assert logprobs(alone) == pytest.approx(logprobs(output), abs=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep_tokens": 65}, "keeps 65 visual tokens of a view of 576, but the server allows 64"),
        ({"image_pruning_rate": 0.5}, "keeps 288 visual tokens"),
        ({"keep_tokens": 0}, "integer at least 1"),
        ({"image_pruning_rate": 1.0}, "share removed"),
        ({"image_pruning_method": "scripts"}, "unknown image_pruning_method 'scripts'"),
        ({"image_pruning_method": "fastv"}, "acts on the decoder"),
        ({"image_pruning_method": "visionzip"}, "methods that can be served: "),
        ({"image_pruning_args": {"gamme": 1}}, "no option 'gamme'; did you mean gamma"),
        ({"image_pruning_args": {"tau": "0.3"}}, "tau must be a finite number"),
        ({"image_pruning_args": {"relevance": "mind"}}, "relevance must be one of auto, clip"),
        ({"query": "Is it \ud83c?"}, "no valid Unicode"),
        ({"query": " ?! "}, "pruner 'script' selects by the question, and prompt 0 asks nothing"),
        ({"do_pad": False}, "no option 'do_pad'"),
        ({"script_plans": {"image": []}}, "no option 'script_plans'"),
        ({"query_scope": "all"}, "image_turn, latest_turn"),
        ({"reuse": "always"}, "reuse must be one of none, picture, auto"),
        ({"reuse_after": 1}, "the server's to set"),
        ({"max_keep_tokens": 576}, "the server's to set"),
    ],
)
def test_bad_requests_are_refused(llm, pictures, options, message):
    with pytest.raises(ValueError, match=message):
        ask(llm, prompt_of(FIRST), pictures[0], **options)


def test_a_prompt_that_asks_nothing_is_refused(llm, pictures):
    with pytest.raises(ValueError, match="asks nothing"):
        ask(llm, prompt_of(""), pictures[0])
    ask(llm, prompt_of(""), pictures[0], image_pruning_method="divprune")


def test_one_uuid_for_two_pictures(llm, spy, pictures, square):
    """What a client calls a picture is not what it is."""

    def ask_as(uuid, question, picture):
        request = {"prompt": prompt_of(question), "multi_modal_data": {"image": [picture]}}
        request["multi_modal_uuids"] = {"image": [uuid]}
        sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=5, ignore_eos=True)
        return llm.generate([request], sampling, use_tqdm=False)[0]

    for picture, question in ((square, FIRST), (pictures[1], FIRST), (pictures[1], SECOND), (square, SECOND)):
        named = ask_as("X", question, picture)
        make_cold(llm)
        assert logprobs(ask(llm, prompt_of(question), picture, tokens=4)) == pytest.approx(logprobs(named), abs=1e-4)
    spy.reset()
    ask_as("Y", FIRST, pictures[2])
    ask_as("Y", SECOND, pictures[2])
    ask_as("Y", FIRST, None)  # by its name alone
    assert (spy.encoded, len(spy.chosen)) == (1, 2)
    by_name = ask_as("Y", "Is there a tree?", None)
    assert (spy.encoded, len(spy.chosen)) == (1, 3)
    alone = ask(llm, prompt_of("Is there a tree?"), pictures[2], tokens=4)
    assert logprobs(by_name) == pytest.approx(logprobs(alone), abs=1e-4)
    with pytest.raises(ValueError, match="Cache miss for image at index 0 but data is not provided"):
        ask_as("Z", FIRST, None)


def test_resets_and_new_weights_forget_features(llm, spy, pictures):
    model, question = model_of(llm), iter(f"What is it, {number}?" for number in range(9))

    def encoded():
        spy.reset()
        ask(llm, prompt_of(next(question)), pictures[0])
        return spy.encoded

    assert [encoded(), encoded()] == [1, 0]
    llm.reset_mm_cache()
    assert [encoded(), encoded()] == [1, 0]
    llm.llm_engine.reset_encoder_cache()
    assert [encoded(), encoded()] == [1, 0]
    before = model.script_cache.size
    assert before > 0
    model.load_weights(iter(()))
    assert [model.script_cache.size, encoded()] == [0, 1]


def test_features_of_another_shape_are_made_anew(llm, spy, pictures):
    model = model_of(llm)
    ask(llm, prompt_of(FIRST), pictures[0])
    for name, found in model.script_cache._pictures.items():
        model.script_cache._pictures[name] = dataclasses.replace(found, features=found.features[:, :100])
    spy.reset()
    ask(llm, prompt_of(SECOND), pictures[0])
    assert spy.encoded == 1


def test_embeddings_are_refused(toy, llm):
    from vllm.multimodal.parse import ImageEmbeddingItems

    from llava.integrations.vllm.processing import refuse_embeddings

    with pytest.raises(ValueError, match="needs pixels, but got image embeddings"):
        refuse_embeddings({"image": ImageEmbeddingItems(torch.zeros(1, 8, 192), 192)})


def test_methods_queries_and_scopes(llm, spy, pictures):
    ask(llm, prompt_of(FIRST), pictures[0], image_pruning_method="divprune")
    ask(llm, prompt_of(SECOND), pictures[0], image_pruning_method="divprune")
    assert len(spy.chosen) == 1  # a method that reads no question shares the picture among questions
    words = {"image_pruning_method": "mmtok"}
    assert len(ask(llm, prompt_of(FIRST), pictures[1], **words).prompt_token_ids) > KEEP
    ask(llm, prompt_of(SECOND), pictures[1], **words)
    assert not torch.equal(*spy.chosen[1:])
    del spy.chosen[1:]
    ask(llm, prompt_of(FIRST), pictures[0])
    ask(llm, prompt_of(SECOND), pictures[0], query=FIRST)
    assert len(spy.chosen) == 2  # the question is what counts, not where it was said
    spy.reset()
    conversation = prompt_of(FIRST) + f" Red.</s>USER: {SECOND} ASSISTANT:"
    ask(llm, conversation, pictures[0])
    assert not spy.chosen  # the picture's own turn asks as before
    ask(llm, conversation, pictures[0], query_scope="latest_turn")
    assert len(spy.chosen) == 1


class Sent:
    """What crosses from the front end to the engine: for each picture of each request whether its pixels do."""

    def __init__(self, llm, monkeypatch):
        processor, engine = llm.llm_engine.renderer.get_mm_processor(), llm.llm_engine.engine_core.engine_core
        self.pixels, self.preprocessed, self.requests = [], 0, []
        call, preprocess = type(processor)._call_hf_processor, engine.preprocess_add_request

        def counted(processor, data, kwargs):
            self.preprocessed += 1
            return call(processor, data, kwargs)

        def noted(request):
            self.pixels += ["pixel_values" in feature.data for feature in request.mm_features]
            self.requests.append(copy.deepcopy(request))
            return preprocess(request)

        monkeypatch.setattr(type(processor), "_call_hf_processor", counted)
        monkeypatch.setattr(engine, "preprocess_add_request", noted)


def test_a_picture_is_preprocessed_and_sent_once_for_all_questions(llm, pictures, monkeypatch):
    prompts = [prompt_of(FIRST), prompt_of(SECOND), prompt_of(FIRST, images=2), prompt_of(FIRST)]
    shown = [pictures[0], pictures[0], pictures[:2], pictures[1]]
    kwargs = [{}, {}, {"keep_tokens": 16}, {"image_pruning_method": "divprune"}]
    cold = []
    for prompt, picture, own in zip(prompts, shown, kwargs, strict=True):
        make_cold(llm)
        cold.append(ask(llm, prompt, picture, **own))
    make_cold(llm)
    sent = Sent(llm, monkeypatch)
    for prompt, picture, own, alone in zip(prompts, shown, kwargs, cold, strict=True):
        warm = ask(llm, prompt, picture, **own)
        assert warm.prompt_token_ids == alone.prompt_token_ids
        assert logprobs(warm) == pytest.approx(logprobs(alone), abs=1e-4)
    assert sent.preprocessed == 2
    assert sent.pixels == [True, False, False, True, False]  # of the third request the first is known


def test_pixels_are_at_hand_when_the_worker_has_dropped_the_features(llm, spy, pictures, monkeypatch):
    cold = ask(llm, prompt_of(SECOND), pictures[0])
    make_cold(llm)
    ask(llm, prompt_of(FIRST), pictures[0])
    sent = Sent(llm, monkeypatch)
    spy.reset()
    model_of(llm).script_cache.clear()
    again = ask(llm, prompt_of(SECOND), pictures[0])
    assert (spy.encoded, sent.preprocessed, sent.pixels) == (1, 0, [False])
    assert logprobs(again) == pytest.approx(logprobs(cold), abs=1e-4)


def test_a_refused_request_leaves_no_picture_that_the_engine_has_not_seen(llm, pictures, monkeypatch):
    sent = Sent(llm, monkeypatch)
    for refused in ({"keep_tokens": 65}, {"image_pruning_rate": 0.5}):
        with pytest.raises(ValueError, match="keep"):
            ask(llm, prompt_of(FIRST), pictures[0], **refused)
    with pytest.raises(VLLMValidationError, match="maximum context length"):
        ask(llm, prompt_of(f"{FIRST} " * 600, images=1), pictures[0])
    assert not sent.pixels
    ask(llm, prompt_of(FIRST), pictures[0])
    assert sent.pixels == [True]


def test_pixels_that_the_engine_has_dropped_are_asked_for(llm, pictures, monkeypatch):
    """Front end and engine apart: vLLM's server refuses the request and drops what the engine says it lacks."""
    from vllm.multimodal.cache import MultiModalCacheMissError

    sent = Sent(llm, monkeypatch)
    cold = ask(llm, prompt_of(SECOND), pictures[0])
    ask(llm, prompt_of(FIRST), pictures[0])
    engine = llm.llm_engine.engine_core.engine_core
    engine.mm_receiver_cache.clear_cache()
    with pytest.raises(MultiModalCacheMissError) as missed:
        engine.preprocess_add_request(sent.requests[1])
    for picture in missed.value.mm_hashes:
        llm.llm_engine.renderer.mm_processor_cache.invalidate(picture)
    assert logprobs(ask(llm, prompt_of(SECOND), pictures[0])) == pytest.approx(logprobs(cold), abs=1e-4)
    assert sent.pixels[-1]


def test_with_reuse_all_questions_share_the_tokens_that_none_of_them_chose(llm, spy, pictures):
    free = ask(llm, prompt_of(FIRST), pictures[0], image_pruning_args={"relevance": "none"})
    first = ask(llm, prompt_of(FIRST), pictures[0], reuse="picture")
    second = ask(llm, prompt_of(SECOND), pictures[0], reuse="picture")
    assert len(spy.chosen) == 1
    assert logprobs(first) == pytest.approx(logprobs(free), abs=1e-4)
    assert second.num_cached_tokens >= KEEP  # the picture is in the prefix cache
    asking = ask(llm, prompt_of(SECOND), pictures[0])  # its own tokens, from an entry of their own
    assert len(spy.chosen) == 2
    assert not torch.equal(*spy.chosen)
    make_cold(llm)
    assert logprobs(ask(llm, prompt_of(SECOND), pictures[0])) == pytest.approx(logprobs(asking), abs=1e-4)


def test_a_picture_that_is_asked_about_often_is_shared(llm, spy, pictures):
    processor = llm.llm_engine.renderer.get_mm_processor()
    processor.script_hot_pictures._asked.clear()
    questions = [f"What is it, {number}?" for number in range(processor.info.script_server.reuse_after + 3)]
    for question in questions:
        ask(llm, prompt_of(question), pictures[1], reuse="auto")
    # its own selection for each of the first questions, one for all others
    assert len(spy.chosen) == processor.info.script_server.reuse_after
    ask(llm, prompt_of(questions[0]), pictures[1], reuse="picture")
    ask(llm, prompt_of(questions[0]), pictures[1])
    assert len(spy.chosen) == processor.info.script_server.reuse_after


@pytest.mark.parametrize("source", ["language", "qk", "words", "projector", "none"])
def test_sources_are_those_of_the_library(llm, spy, toy, square, source):
    """The kept tokens are those that the formulas give on the library's modules."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = toy("v1.5")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    ask(llm, prompt_of(FIRST), square, image_pruning_args={"relevance": source})
    pixels = processor.image_processor(square, return_tensors="pt")["pixel_values"]
    features = next(iter(model_of(llm).script_cache._pictures.values())).features
    with torch.inference_mode():
        torch.testing.assert_close(model.model.get_image_features(pixels).pooler_output[0], features[0], **NEAR)
        decoder = model.model.language_model
        language = LanguageSpace(
            lambda text: processor.tokenizer(text, add_special_tokens=False).input_ids,
            decoder.embed_tokens,
            FirstAttention.find(decoder),
        )
        pruner = get_pruner("script", keep_tokens=KEEP, relevance=source)
        fields = Asked(pruner, [FIRST], language=language).fields(torch.tensor([0]), features)
    assert torch.equal(spy.chosen[0], pruner.select(PruningInputs(features, **fields)).indices[0])


def test_every_question_of_a_batch_selects_as_alone(llm, spy, pictures):
    prompts = [prompt_of(FIRST), prompt_of(SECOND), prompt_of(FIRST)]
    shown = [pictures[0], pictures[0], pictures[1]]
    together = ask(llm, prompts, shown)
    make_cold(llm)
    for prompt, picture, output in zip(prompts, shown, together, strict=True):
        assert logprobs(ask(llm, prompt, picture)) == pytest.approx(logprobs(output), abs=1e-4)


def test_equals_the_llava_host(llm, spy, pictures):
    """The same indices and greedy tokens as our own model, on a padded picture."""
    tokenizer, model, image_processor, _ = load_pretrained_model(str(TOY_FOLDER / "llava-toy-v1.5"), device="cpu")
    pruner = get_pruner("script", keep_tokens=KEEP)
    for picture in pictures[:2]:
        prompt = prompt_of(FIRST)
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
        pixels = process_images([picture], image_processor, model.config)
        prompts = model.embed_prompts(
            ids, images=pixels, image_sizes=[picture.size], pruner=pruner, padding_side="left"
        )
        ours = model.generate(prompts, max_new_tokens=4)[0].tolist()
        spy.reset()
        served = ask(llm, prompt, picture, tokens=4)
        assert torch.equal(spy.chosen[0], prompts.kept[0].sequence)
        assert list(served.outputs[0].token_ids)[: len(ours)] == ours


def test_equals_the_transformers_host(llm, spy, toy, square):
    """The same greedy tokens and logprobs as the library's class with the same pruner attached."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = toy("v1.5")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    prompt = prompt_of(FIRST)
    served = ask(llm, prompt, square)
    inputs = processor(images=square, text=prompt, return_tensors="pt")
    pruner = get_pruner("script", keep_tokens=KEEP)
    with torch.inference_mode(), pruner(model, processor, clip=folder / model.config.mm_vision_tower):
        wanted = {"output_logits": True, "return_dict_in_generate": True}
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False, **wanted)
    new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert list(served.outputs[0].token_ids)[: len(new)] == new
    theirs = [row[0].log_softmax(-1)[token].item() for row, token in zip(output.logits, new, strict=True)]
    assert logprobs(served)[: len(new)] == pytest.approx(theirs, abs=2e-4)
