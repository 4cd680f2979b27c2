"""The methods of 2025 and 2026 against recorded choices, and their own laws."""

import dataclasses

import pytest
import torch

from llava.pruning import PruningInputs, get_pruner
from llava.pruning.functional import cosine_similarity
from method_inputs import make_inputs
from records import selection_cases

PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def changed(inputs, **fields):
    return dataclasses.replace(inputs, **fields)


# --- SCOPE ---------------------------------------------------------------------------------------------------------


@PRECISIONS
@pytest.mark.parametrize("case, tensors", selection_cases("scope"))
def test_scope_order_is_that_of_the_published_formulas(case, tensors, dtype):
    features = tensors["features"].to(dtype)[None]
    inputs = PruningInputs(features, encoder_features=features, class_attention=tensors["attention"].to(dtype)[None])
    selection = get_pruner("scope", keep_tokens=case["m"], alpha=case["alpha"]).select(inputs)
    assert selection.details["order"][0].argsort()[: case["m"]].tolist() == tensors["order"].tolist()


def test_scope_without_saliency_covers_and_gains_less_with_every_token():
    inputs = make_inputs()
    flat = changed(inputs, class_attention=torch.ones_like(inputs.class_attention))
    pruner = get_pruner("scope", keep_tokens=20, alpha=0.0)
    selection = pruner.select(inputs)
    assert torch.equal(selection.indices, pruner.select(flat).indices)
    similarity = cosine_similarity(inputs.encoder_features).clamp_min(0)
    order = selection.details["order"].argsort(dim=-1)[:, :20]
    reach = similarity.gather(2, order[:, None].expand(-1, 49, -1)).cummax(-1).values.sum(1)  # (B, 20) covered
    gains = torch.cat([reach[:, :1], reach.diff(dim=-1)], dim=-1)
    assert (gains.diff(dim=-1) <= 1e-5).all()
    single = similarity.sum(1)
    assert torch.equal(order[:, 0], single.argmax(-1))


def test_scope_does_not_cover_padding():
    """Three copies of one patch in the padding do not make its like the best to cover."""
    features = torch.eye(4)[[0, 1, 2, 3, 3, 3]][None]
    attention = torch.full((1, 1, 6), 0.1)
    fields = {"encoder_features": features, "class_attention": attention}
    pruner = get_pruner("scope", keep_tokens=1)
    assert pruner.select(PruningInputs(features, **fields)).indices.tolist() == [[3]]
    shown = torch.tensor([[True, True, True, True, False, False]])
    assert pruner.select(PruningInputs(features, valid=shown, **fields)).indices.tolist() == [[0]]


# --- FasterVLM -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, tensors", selection_cases("fastervlm"))
def test_fastervlm_keeps_what_the_published_code_keeps(case, tensors):
    inputs = PruningInputs(torch.zeros(case["B"], case["n"], 1), class_attention=tensors["attention"])
    assert torch.equal(get_pruner("fastervlm", keep_tokens=case["m"]).select(inputs).mask, tensors["mask"])
