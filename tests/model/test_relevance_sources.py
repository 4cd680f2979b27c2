"""Where our LLaVA reads the question: every source, its choice, and what is said and refused."""

import dataclasses
import logging

import pytest
import torch

from llava.model.multimodal_encoder import clip_encoder
from llava.pruning import get_pruner
from llava.relevance.first_attention import FirstAttention
from llava.relevance.language import language_relevance, word_distribution
from llava.relevance.policy import Announcer
from prompts import QUESTIONS, V15, V16, ids_of, prompt_of

READERS = ("script", "cdpruner", "trim", "script_release")
SOURCES = ("clip", "language", "qk", "words", "projector")


@pytest.fixture
def host(load, pixels_of, monkeypatch):
    """(model, token ids, encoded picture) of a checkpoint, with nothing announced yet."""

    def host(checkpoint, question=QUESTIONS[1], picture="land640x480"):
        tokenizer, model, _, _ = load(checkpoint)
        monkeypatch.setattr(model, "_announcer", Announcer(), raising=False)
        pixels, sizes = pixels_of(checkpoint, picture)
        return model, ids_of(tokenizer, prompt_of(question))[0], model.encode_pictures(pixels, sizes)

    return host


def without_text_tower(model, monkeypatch):
    monkeypatch.setattr(model.get_vision_tower(), "_joint_space", None)
    monkeypatch.setattr(clip_encoder, "why_incomplete", lambda folder: "its folder has no text tower")


def kept(model, ids, encoded, pruner, **options):
    with torch.no_grad():
        return model.embed_prompts(ids, images=encoded, pruner=pruner, **options).kept[0]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", READERS)
def test_every_method_reads_the_question_from_every_source(host, name, source):
    model, ids, encoded = host(V15)
    pruner = get_pruner(name, keep_tokens=24, relevance=source)
    tokens = kept(model, ids, encoded, pruner)
    assert tokens.relevance.source == source
    assert tokens.patches == 24
    raw = kept(model, ids, encoded, pruner, query="A dog beside the car").details.get("relevance")
    if raw is not None:
        assert not torch.equal(raw, tokens.details["relevance"])


@pytest.mark.parametrize("checkpoint", [V15, V16])
@pytest.mark.parametrize("source", ["language", "qk", "words"])
def test_the_language_sources_are_the_decoder_s_own(host, checkpoint, source):
    model, ids, encoded = host(checkpoint)
    tokens = kept(model, ids, encoded, get_pruner("script", keep_tokens=24, relevance=source))
    words = model.get_input_embeddings()(
        torch.tensor(model.tokenizer(QUESTIONS[1], add_special_tokens=False).input_ids)
    )[None].detach()
    valid = encoded.layouts[0].eligible
    attention = FirstAttention.find(model.get_model())
    parts = {
        "words": lambda: word_distribution(words, encoded.features, valid=valid),
        "qk": lambda: attention.distribution(words, encoded.features, valid=valid),
    }
    raw = language_relevance(*(parts[part]() if source in (part, "language") else None for part in parts), valid=valid)
    lowest = raw.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    highest = raw.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    scaled = ((raw - lowest) / (highest - lowest)).masked_fill(~valid, 0)
    assert torch.allclose(tokens.details["relevance"], scaled, atol=1e-4)


def test_joined_views_are_looked_at_as_one(host):
    """One distribution over the tokens of all views: no view's own."""
    model, ids, encoded = host(V16)
    pruner = get_pruner("script", keep_tokens=24, relevance="words", scope="global")
    tokens = kept(model, ids, encoded, pruner)
    words = model.get_input_embeddings()(
        torch.tensor(model.tokenizer(QUESTIONS[1], add_special_tokens=False).input_ids)
    )[None].detach()
    joined, valid = encoded.features.flatten(0, 1)[None], encoded.layouts[0].eligible.reshape(1, -1)
    raw = language_relevance(word_distribution(words, joined, valid=valid), None, valid)[valid]
    scaled = (raw - raw.min()) / (raw.max() - raw.min())
    assert torch.allclose(tokens.details["relevance"][valid], scaled, atol=1e-4)


def test_auto_takes_clip_in_silence_and_the_language_model_aloud(host, monkeypatch, caplog):
    model, ids, encoded = host(V15)
    pruner = get_pruner("script", keep_tokens=24)
    with caplog.at_level(logging.INFO):
        whole = kept(model, ids, encoded, pruner)
    assert str(whole.relevance) == "relevance=clip: read in the joint space of the vision tower's CLIP"
    assert [record.levelname for record in caplog.records if "reads the question" in record.message] == ["INFO"]
    caplog.clear()
    without_text_tower(model, monkeypatch)
    for _ in range(2):
        tokens = kept(model, ids, encoded, pruner)
    assert tokens.relevance.source == "language"
    told = [record for record in caplog.records if "reads the question" in record.message]
    assert [record.levelname for record in told] == ["WARNING"]
    assert "its folder has no text tower" in told[0].message
    assert torch.equal(
        tokens.sequence, kept(model, ids, encoded, dataclasses.replace(pruner, relevance="language")).sequence
    )


def test_a_source_that_cannot_be_had_is_refused_before_the_tower_runs(host, pixels_of, monkeypatch, caplog):
    model, ids, _ = host(V15)
    pixels, sizes = pixels_of(V15, "land640x480")
    without_text_tower(model, monkeypatch)
    monkeypatch.setattr(model.get_vision_tower(), "observe", None)
    pruner = get_pruner("script", keep_tokens=24, relevance="clip")
    with pytest.raises(
        ValueError, match=r"no text tower\. Instead, here work relevance=language, qk, words, projector"
    ):
        model.embed_prompts(ids, images=pixels, image_sizes=sizes, pruner=pruner)
    assert "reads the question" not in caplog.text


def test_a_decoder_whose_attention_cannot_be_read_gives_its_words(host, monkeypatch):
    model, ids, encoded = host(V15)
    without_text_tower(model, monkeypatch)
    for layer in model.get_model().layers:
        monkeypatch.setattr(layer.self_attn, "key_multiplier", 2.0, raising=False)
    tokens = kept(model, ids, encoded, get_pruner("script", keep_tokens=24))
    assert "embeddings alone, because the first attention of LlavaLlamaModel cannot be read" in str(tokens.relevance)
    with pytest.raises(ValueError, match=r"cannot have relevance=qk: .*key_multiplier"):
        kept(model, ids, encoded, get_pruner("script", keep_tokens=24, relevance="qk"))


@pytest.mark.parametrize("name", READERS)
def test_a_question_without_words_is_an_error_for_those_who_read_it(host, name):
    model, ids, encoded = host(V15, question="")
    pruner = get_pruner(name, keep_tokens=24)
    with pytest.raises(ValueError, match=f"'{name}' selects by the question, and prompt 0 asks nothing"):
        kept(model, ids, encoded, pruner)
    with pytest.raises(ValueError, match="prompt 0 asks nothing"):
        kept(model, ids, encoded, pruner, query="Answer the question using a single word or phrase.")
    assert kept(model, ids, encoded, dataclasses.replace(pruner, relevance="none")).relevance is None
    assert kept(model, ids, encoded, dataclasses.replace(pruner, keep_tokens=576)).selections == ()


def test_the_row_that_asks_nothing_is_named_and_rows_without_pictures_may_be_silent(load, pixels_of):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "square336")
    ids, mask = ids_of(tokenizer, prompt_of("", images=0), prompt_of(QUESTIONS[0]))
    pruner = get_pruner("script", keep_tokens=8)
    assert model.embed_prompts(ids, mask, images=pixels, image_sizes=sizes, pruner=pruner).kept[0].patches == 8
    ids, mask = ids_of(tokenizer, prompt_of(QUESTIONS[0], images=0), prompt_of(""))
    with pytest.raises(ValueError, match="prompt 1 asks nothing"):
        model.embed_prompts(ids, mask, images=pixels, image_sizes=sizes, pruner=pruner)


@pytest.mark.parametrize("question", ["### Task\nWhat color is the star?", 'Who said "Human: stop" or USER: hello?'])
def test_marks_of_templates_inside_a_question_cut_nothing(host, question):
    model, ids, encoded = host(V15, question=question)
    pruner = get_pruner("script", keep_tokens=24, relevance="words")
    assert torch.equal(
        kept(model, ids, encoded, pruner).details["relevance"],
        kept(model, ids, encoded, pruner, query=question).details["relevance"],
    )


def test_without_a_tokenizer_only_the_joint_space_reads_a_given_question(host, monkeypatch):
    model, ids, encoded = host(V15)
    monkeypatch.setattr(model, "tokenizer", None)
    assert kept(model, ids, encoded, get_pruner("script", keep_tokens=8), query="a dog").relevance.source == "clip"
    with pytest.raises(ValueError, match=r"relevance=words: the model has no tokenizer: .*Instead, .* relevance=clip"):
        kept(model, ids, encoded, get_pruner("script", keep_tokens=8, relevance="words"), query="a dog")
    with pytest.raises(TypeError, match="query must be text"):
        kept(model, ids, encoded, get_pruner("script", keep_tokens=8), query=[None])
