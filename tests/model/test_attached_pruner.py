"""A method that hangs on our LLaVA: every call is pruned, and nothing is left behind."""

import pytest
import torch

from llava.model.multimodal_encoder import clip_encoder
from llava.pruning import get_pruner
from prompts import QUESTIONS, V15, answer, ids_of, prompt_of


@pytest.fixture
def asked(load, pixels_of):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "land640x480", "square336")
    ids, mask = ids_of(tokenizer, *map(prompt_of, QUESTIONS[:2]))
    return model, ids, mask, {"images": pixels, "image_sizes": sizes}


@pytest.mark.parametrize("name", ["script", "visionzip", "fastv"])
def test_every_call_is_pruned_and_afterwards_none(asked, name):
    model, ids, mask, shown = asked
    before = dict(vars(model))
    pruner = get_pruner(name, keep_tokens=400 if name == "fastv" else 24)
    plain, pruned = answer(model, ids, mask, **shown), answer(model, ids, mask, **shown, pruner=pruner)
    with pruner(model) as handle:
        assert handle.kept == []
        assert answer(model, ids, mask, **shown) == pruned
        assert handle.method is pruner
        if name == "fastv":
            assert all(tokens.patches < 576 and tokens.per_layer for tokens in handle.kept)
        else:
            assert [tokens.patches for tokens in handle.kept] == [24, 24]
        with torch.no_grad():
            rows = model(ids, mask, **shown).logits.shape[1]
        assert rows < 576
        assert len(handle.kept) == 2
    assert vars(model).keys() - {"_announcer"} == before.keys() - {"_announcer"}
    assert answer(model, ids, mask, **shown) == plain


def test_a_call_s_own_words_win(asked):
    model, ids, mask, shown = asked
    pruner = get_pruner("script", keep_tokens=24)

    def masks(handle, **options):
        answer(model, ids, mask, **shown, **options)
        return [tokens.mask() for tokens in handle.kept]

    handle = pruner.attach(model, query=QUESTIONS[2])
    try:
        same = masks(handle)
        assert all(map(torch.equal, same, masks(handle, query=[QUESTIONS[2]] * 2)))
        assert not all(map(torch.equal, same, masks(handle, query=QUESTIONS[0])))
        kept = handle.kept
        answer(model, ids, mask, **shown, pruner=get_pruner("first", keep_tokens=8))
        assert handle.kept is kept  # of calls that the handle pruned
        assert model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, **shown)[4].shape[1] < 576
    finally:
        handle.remove()
        handle.remove()
    assert model.attached_pruner is None


def test_a_second_method_and_what_does_not_fit_are_refused(asked, monkeypatch):
    model, *_ = asked
    pruner = get_pruner("script", keep_tokens=24)
    with pruner(model), pytest.raises(RuntimeError, match="attached to this model already"):
        get_pruner("first").attach(model)
    with pytest.raises(TypeError, match="takes processor and query, got positions"):
        pruner.attach(model, positions="packed")
    with pytest.raises(TypeError, match="only a pruning method can be attached"):
        model.attach_pruner("script")
    with monkeypatch.context() as patch:
        patch.setattr(model.get_vision_tower(), "_joint_space", None)
        patch.setattr(clip_encoder, "why_incomplete", lambda folder: "no text tower")
        with pytest.raises(ValueError, match="cannot have relevance=clip: no text tower"):
            get_pruner("script", relevance="clip").attach(model)
        patch.delattr(model.get_model().layers[0], "input_layernorm")
        with pytest.raises(ValueError, match="it lacks input_layernorm"):
            get_pruner("fastv").attach(model)
    assert model.attached_pruner is None


def test_a_processor_brings_the_tokenizer_that_the_model_lacks(asked, load, monkeypatch):
    model, ids, mask, shown = asked
    pruner = get_pruner("script", keep_tokens=24, relevance="language")
    pruned = answer(model, ids, mask, **shown, pruner=pruner)
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(ValueError, match="has no tokenizer"):
        pruner.attach(model)
    with pruner(model, load(V15)[0]):
        assert answer(model, ids, mask, **shown) == pruned
