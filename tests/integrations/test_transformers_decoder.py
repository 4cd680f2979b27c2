"""Methods inside the decoder on hosts of the library: the same choices as by hand, and refusals with a reason."""

import pytest
import torch
import transformers as hf

from llava.decoder.attachment import pruning_decoder
from llava.decoder.stages import PictureSpan, PromptRow
from llava.pruning import get_pruner, list_pruners, pruner_class
from transformers_families import IMAGE, TEXT, Family, built, clip, family, pixels

METHODS = [name for name in list_pruners() if pruner_class(name).place == "decoder"]


@pytest.fixture(scope="module")
def host():
    """A LLaVA whose decoder is deep enough for cuts."""
    text = hf.LlamaConfig(**TEXT | {"num_hidden_layers": 4})
    config = hf.LlavaConfig(vision_config=clip(), text_config=text, image_token_id=IMAGE)
    model = built(hf.LlavaForConditionalGeneration, config)
    return Family("llava", model, {"pixel_values": pixels(3, 3, 28, 28)}, [16] * 3)


def greedy(model, arguments, **options):
    with torch.no_grad():
        return model.generate(**arguments, **{"max_new_tokens": 5, "do_sample": False, **options})


def pruner_of(name, keep=8):
    return get_pruner(name, keep_tokens=keep, budget="nominal")


@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_mechanism_attached_by_hand(host, name):
    """The embedded prompt of the unpruned call, through the decoder with the mechanism of our own host on it."""
    decoder = host.model.model.language_model
    seen = {}
    watch = decoder.register_forward_pre_hook(lambda module, given, named: seen.update(named), with_kwargs=True)
    arguments = host.single(1)
    with torch.no_grad():
        host.model(**arguments)
        watch.remove()
        length = arguments["input_ids"].shape[1]
        rows = [PromptRow(0, length, (PictureSpan(3, 16, 8), PictureSpan(19, 16, 8)))]
        with pruning_decoder(decoder, pruner_of(name), rows) as pruning:
            hidden = decoder(inputs_embeds=seen["inputs_embeds"], attention_mask=arguments["attention_mask"])[0]
        with pruner_of(name)(host.model) as handle:
            found = host.model(**arguments).logits
    torch.testing.assert_close(found, host.model.lm_head(hidden), rtol=1e-4, atol=1e-4)
    kept = [one.kept.nonzero().flatten().tolist() for one in handle.kept]
    assert kept == [places.tolist() for places in pruning.kept_places()]
    assert all(0 < len(places) < 16 for places in kept)


@pytest.mark.parametrize("name", METHODS)
def test_generation_batches_and_the_way_back(host, name):
    unpruned = greedy(host.model, host.batch())
    width = unpruned.shape[1] - 5
    with pruner_of(name)(host.model):
        output = greedy(host.model, host.batch())
        assert torch.equal(output[:, :width], host.batch()["input_ids"])
        assert torch.equal(greedy(host.model, host.batch(), use_cache=False), output)
        for row in range(2):
            assert torch.equal(greedy(host.model, host.single(row))[0, -5:], output[row, -5:])
        text = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        assert greedy(host.model, text).shape == (1, 8)
        with pytest.raises(ValueError, match="labels with pruner"):
            host.model(**host.batch(), labels=host.batch()["input_ids"])
        assert torch.equal(greedy(host.model, host.batch()), output)
    with get_pruner(name, keep_tokens=500)(host.model):
        assert torch.equal(greedy(host.model, host.batch()), unpruned)
    assert torch.equal(greedy(host.model, host.batch()), unpruned)


@pytest.mark.parametrize("name", ["llava_next", "internvl", "llava_onevision", "mistral3", "idefics3"])
def test_other_families_with_a_llama_style_decoder(name):
    host = family(name)
    with pruner_of("fastv", keep=2)(host.model) as handle:
        output = greedy(host.model, host.batch())
        assert torch.equal(greedy(host.model, host.batch(), use_cache=False), output)
    for one in handle.kept:
        assert int(one.kept.sum()) == 2 * one.picture.count
        assert one.per_layer == (len(one.picture.columns), 2 * one.picture.count)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen2_5_vl", "several axes"),
        ("qwen3_vl", "several axes"),
        ("gemma3", "q_norm|full attention"),
        ("aya_vision", "full attention in all layers"),
    ],
)
def test_decoders_that_cannot_be_cut_are_refused(name, reason):
    host = family(name)
    with pytest.raises(ValueError, match=f"'fastv' acts inside the decoder, which it cannot do in .*({reason})"):
        pruner_of("fastv").attach(host.model)
    assert "generate" not in host.model.__dict__
