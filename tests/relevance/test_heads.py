"""Weights of heads: the file, what it refuses, and the rule that makes them without labels."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf

from llava.relevance.first_attention import FirstAttention
from llava.relevance.heads import HeadFileError, HeadWeights, head_worth

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def attention(**options) -> FirstAttention:
    return FirstAttention.find(hf.LlamaModel(hf.LlamaConfig(**SIZES | {"num_key_value_heads": 2} | options)))


def fields(**changed) -> dict:
    whole = {"model_type": "llama", "layers": 2, "layer": 0, "heads": 4, "head_dim": 8}
    return {**whole, "weights": [0.0, 0.5, 1.25, 2], "made": "by hand", **changed}


def written(tmp_path, data) -> str:
    path = tmp_path / "heads.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(path)


def test_a_file_gives_the_weights_it_was_written_with(tmp_path):
    read = HeadWeights.read(written(tmp_path, fields()))
    assert HeadWeights.read(written(tmp_path, read.text())) == read
    assert read.for_attention(attention()).tolist() == [0.0, 0.5, 1.25, 2.0]


@pytest.mark.parametrize(
    "data, message",
    [
        ("{", "cannot be read"),
        ([1, 2], "holds list, not model_type, layers"),
        ({"weights": [1]}, "holds weights, not model_type, layers"),
        (fields(weights=[1, 2, 3]), "weights is 3, not a list of one number for each of 4 heads"),
        (fields(weights="abcd"), "weights is 'abcd', not a list"),
        (fields(weights=[1, 2, 3, -0.5]), "the weight of head 3 is -0.5"),
        (fields(weights=[1, float("nan"), 3, 4]), "the weight of head 1 is nan"),
        (fields(weights=[1, 2, True, 4]), "the weight of head 2 is True"),
        (fields(weights=[0, 0, 0, 0]), "all weights are 0"),
        (fields(layers="two"), "layers is 'two', not a whole number"),
    ],
)
def test_a_file_that_is_none_is_refused_with_its_name_and_how_to_make_one(tmp_path, data, message):
    path = written(tmp_path, data)
    with pytest.raises(HeadFileError, match=message) as error:
        HeadWeights.read(path)
    assert path in str(error.value)
    assert "llava.eval.calibrate_heads" in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(HeadFileError, match=r"nowhere\.json cannot be read"):
        HeadWeights.read(tmp_path / "nowhere.json")


def test_a_file_of_another_model_names_heads_and_layers_of_both(tmp_path):
    weights = HeadWeights.read(written(tmp_path, fields()))
    other = attention(num_attention_heads=8, num_hidden_layers=3)
    with pytest.raises(HeadFileError) as error:
        weights.for_attention(other, "mine.json")
    assert "heads=mine.json was made for llama: layer 0 of 2, 4 heads of width 8" in str(error.value)
    assert "here it is layer 0 of 3, 8 heads of width 4" in str(error.value)


def test_a_head_that_looks_where_it_is_asked_to_is_worth_most():
    here, there = torch.zeros(12), torch.zeros(12)
    here[2], there[9] = 1.0, 1.0
    broad, elsewhere = torch.ones(12), torch.ones(12)
    broad[:6], elsewhere[6:] = 2.0, 2.0
    one = torch.stack([here, here, torch.ones(12), broad, torch.zeros(12)])
    other = torch.stack([there, here, torch.ones(12), elsewhere, torch.zeros(12)])
    worth = head_worth(one, other).tolist()
    # Two points on 12 tokens correlate by -1/11 and are as concentrated as can be.
    assert worth[0] == pytest.approx(12 / 11)
    assert worth[1] == pytest.approx(0, abs=1e-6)
    assert worth[2] == worth[4] == 0
    assert 0 < worth[3] < 0.2


def test_the_scale_of_a_map_does_not_count():
    one, other = torch.rand(2, 3, 7), torch.rand(2, 3, 7)
    torch.testing.assert_close(head_worth(5 * one, other / 3), head_worth(one, other))
