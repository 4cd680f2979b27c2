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


# --- VisPruner -----------------------------------------------------------------------------------------------------


@PRECISIONS
@pytest.mark.parametrize("case, tensors", selection_cases("vispruner"))
def test_vispruner_keeps_what_the_published_code_keeps(case, tensors, dtype):
    features = tensors["features"].to(dtype)
    inputs = PruningInputs(features, encoder_features=features, class_attention=tensors["attention"].to(dtype))
    options = {"important": case["important_ratio"], "step": case["step"]}
    selection = get_pruner("vispruner", keep_tokens=case["m"], **options).select(inputs)
    assert torch.equal(selection.mask, tensors["mask"])
    assert [row.nonzero().flatten().tolist() for row in selection.details["important"]] == [
        sorted(row) for row in tensors["important"].tolist()
    ]


@pytest.mark.parametrize("keep", [1, 8, 31])
def test_vispruner_by_attention_alone_is_fastervlm(keep):
    inputs = make_inputs()
    alone = get_pruner("vispruner", keep_tokens=keep, important=1.0).select(inputs)
    assert torch.equal(alone.indices, get_pruner("fastervlm", keep_tokens=keep).select(inputs).indices)


def test_vispruner_by_hand():
    """Patches by falling attention: 0 1 2 3 4. Of the even places 0 is a copy of 3, and 4 is nearly one of 1."""
    features = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0.1]]])
    attention = torch.tensor([[[0.5, 0.4, 0.3, 0.2, 0.1]]])
    inputs = PruningInputs(features, encoder_features=features, class_attention=attention)
    kept = {
        keep: get_pruner("vispruner", keep_tokens=keep, important=0.0, step=1).select(inputs).indices[0].tolist()
        for keep in (4, 3, 2)
    }
    assert kept[4] == [1, 2, 3, 4]  # the list is now 4 2 1 3: even places are 4 and 1, odd ones 2 and 3
    assert kept[3] == [1, 2, 3]  # now 1 2 3: even places are 1 and 3, and neither is like 2; the first goes
    assert kept[2] == [2, 3]


def test_vispruner_compares_no_padding():
    """A view with padding is one of its valid patches alone, whatever the length of the others' lists."""
    valid = torch.ones(3, 49, dtype=torch.bool)
    valid[1, 30:], valid[2, ::7] = False, False
    inputs = make_inputs(valid=valid)
    for keep in (5, 12, 21):
        pruner = get_pruner("vispruner", keep_tokens=keep, step=3)
        together = pruner.select(inputs).mask
        for view in range(3):
            real = valid[view]
            alone = PruningInputs(
                inputs.features[view : view + 1, real],
                encoder_features=inputs.encoder_features[view : view + 1, real],
                class_attention=inputs.class_attention[view : view + 1, :, real],
            )
            assert torch.equal(together[view, real], pruner.select(alone).mask[0])
