"""Methods of other papers against recorded choices of their published code, and their own laws."""

import dataclasses

import pytest
import torch

from llava.layout.views import kept_places, tiled_layout, with_made_tokens
from llava.pruning import PruningInputs, get_pruner
from llava.pruning.functional import conditional_kernel, cosine_similarity
from records import Records, selection_cases

SCRIPT_SELECTOR = Records("records/script/selector_only")


# --- DivPrune ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case, tensors", selection_cases("divprune"))
def test_divprune_order_is_the_published_one(case, tensors, dtype):
    inputs = PruningInputs(tensors["features"].to(dtype)[None])
    for budget in case["budgets"]:
        selection = get_pruner("divprune", keep_tokens=budget).select(inputs)
        assert selection.details["order"][0].argsort()[:budget].tolist() == tensors["order"][:budget].tolist()
        assert selection.indices[0].tolist() == tensors["order"][:budget].sort().values.tolist()


@pytest.mark.parametrize(
    "share, length, count", [(0.098, 576, 56), (0.25, 2, 1), (0.5, 5, 2), (0.5, 7, 4), (0.5, 3, 2)]
)
def test_divprunes_official_share_rounds_half_to_even(share, length, count):
    assert get_pruner("divprune", keep_tokens=share, scope="official").count(length) == count


def test_the_official_scope_is_divprunes_alone():
    with pytest.raises(ValueError, match="scope must be one of view, global; got 'official'"):
        get_pruner("cdpruner", scope="official")


# --- CDPruner ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, tensors", selection_cases("cdpruner"))
def test_cdpruner_order_is_the_published_one(case, tensors):
    inputs = PruningInputs(
        tensors["image_features"],
        image_embeds=tensors["image_embeds"],
        text_embeds=tensors["text_embeds"][None],
        pictures=torch.zeros(case["B"], dtype=torch.int64),
    )
    selection = get_pruner("cdpruner", keep_tokens=case["m"], scaling="picture").select(inputs)
    relevance = selection.details["relevance"]
    assert torch.allclose(relevance, tensors["relevance"], atol=1e-5)
    assert selection.details["order"].argsort()[:, : case["m"]].tolist() == tensors["order"].tolist()
    assert torch.equal(selection.indices, tensors["indices"])
    if "kernel" in tensors:
        kernel = conditional_kernel(cosine_similarity(inputs.features), relevance)
        assert torch.allclose(kernel, tensors["kernel"], atol=1e-5)


def test_cdpruner_scales_within_the_pictures_it_is_told():
    torch.manual_seed(0)
    fields = {"image_embeds": torch.randn(4, 30, 8), "text_embeds": torch.randn(1, 1, 8)}
    inputs = PruningInputs(torch.randn(4, 30, 12), pictures=torch.tensor([1, 0, 1, 0]), **fields)
    pruner = get_pruner("cdpruner", keep_tokens=5, scaling="picture")
    scaled = pruner.select(inputs).details["relevance"]
    for picture in ([1, 3], [0, 2]):
        part = scaled[picture]
        assert part.min() < 1e-5
        assert part.max() == pytest.approx(1, abs=1e-5)
        alone = PruningInputs(
            inputs.features[picture],
            image_embeds=inputs.image_embeds[picture],
            text_embeds=inputs.text_embeds,
            pictures=torch.zeros(2, dtype=torch.int64),
        )
        assert torch.equal(pruner.select(alone).details["relevance"], part)


def test_cdpruners_theta_weighs_relevance():
    torch.manual_seed(0)
    inputs = PruningInputs(torch.randn(1, 60, 80), relevance=torch.rand(1, 60))
    most_relevant = set(inputs.relevance[0].topk(10).indices.tolist())
    shares = [
        len(
            most_relevant & set(get_pruner("cdpruner", keep_tokens=10, theta=theta).select(inputs).indices[0].tolist())
        )
        for theta in (0.01, 0.2, 0.9)
    ]
    assert shares[0] < shares[1] < shares[2] == 10
    with pytest.raises(ValueError, match="theta must be a finite number between 0 and 1, both excluded or none"):
        get_pruner("cdpruner", theta=1.0)


# --- TRIM ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, tensors", selection_cases("trim"))
def test_trim_keeps_what_the_published_code_keeps(case, tensors):
    embeds = tensors["patch_embeds"]
    inputs = PruningInputs(
        embeds,
        encoder_features=embeds,
        image_embeds=embeds,
        text_embeds=tensors["text_embeds"][:, None],
        pictures=torch.zeros(case["B"], dtype=torch.int64),
    )
    adaptive = case["mode"] == "iqr"
    budget = case["n"] - 1 if adaptive else case["total_tokens"]
    selection = get_pruner("trim", keep_tokens=budget, adaptive=adaptive).select(inputs)
    assert torch.allclose(selection.details["relevance"], tensors["scores"], atol=1e-6)
    expected = torch.zeros(case["B"], case["n"], dtype=torch.bool).scatter_(1, tensors["kept"], True)
    assert torch.equal(selection.mask, expected)
    assert torch.allclose(selection.made[:, 0], tensors["aggregated"], atol=2e-3)


def test_trims_mean_is_that_of_valid_patches_alone_and_zero_without_any():
    torch.manual_seed(0)
    features = torch.randn(2, 9, 4)
    valid = torch.tensor([[True] * 6 + [False] * 3, [True] * 2 + [False] * 7])
    inputs = PruningInputs(features, encoder_features=features, relevance=torch.rand(2, 9), valid=valid)
    pruner = get_pruner("trim", keep_tokens=4)
    selection = pruner.select(inputs)
    others = valid[0] & ~selection.mask[0]
    assert torch.allclose(selection.made[0, 0], features[0, others].mean(0))
    assert not selection.made[1].any()
    assert [part.tolist() for part in pruner.kept_and_made(4, valid)] == [[3, 2], [1, 0]]


# --- VisionZip -----------------------------------------------------------------------------------------------------


def visionzip_case(case, tensors, **options):
    inputs = PruningInputs(
        tensors["hidden_states"][:, 1:],
        encoder_features=tensors["hidden_states"][:, 1:],
        class_features=tensors["hidden_states"][:, 0],
        class_attention=tensors["cls_attention"],
        key_metric=tensors["key_metric"][:, 1:],
    )
    budget = 1 + case["dominant_patches"] + case["contextual"]
    pruner = get_pruner("visionzip", keep_tokens=budget, contextual=case["contextual"], **options)
    return inputs, pruner.select(inputs)


VISIONZIP = [case for case in selection_cases("visionzip") if "order" not in case.id]


@pytest.mark.parametrize("case, tensors", [case for case in VISIONZIP if "ties" not in case.id])
def test_visionzip_output_is_the_published_one(case, tensors):
    inputs, selection = visionzip_case(case, tensors)
    assert torch.equal(selection.indices, tensors["dominant_ids"].sort().values)
    kept = selection.gather(inputs.encoder_features)
    output = torch.cat([selection.made[:, : selection.leading], kept, selection.made[:, selection.leading :]], dim=1)
    assert torch.allclose(output, tensors["output"], atol=1e-5)
    _, averaged = visionzip_case(case, tensors, mean=True)
    assert torch.equal(averaged.indices, selection.indices)
    for slot, target in enumerate(tensors["context_target_ids"][0].tolist()):
        joined = tensors["merged_ids"][0][tensors["merged_to"][0] == slot].tolist()
        group = inputs.encoder_features[0, [target, *joined]]
        assert torch.allclose(averaged.made[0, 1 + slot], group.mean(0), atol=1e-5)


@pytest.mark.parametrize("case, tensors", [case for case in VISIONZIP if "ties" in case.id])
def test_visionzip_takes_the_lowest_of_tied_patches(case, tensors):
    _, selection = visionzip_case(case, tensors)
    above = tensors["strictly_above_cut"].tolist()
    lowest = sorted(tensors["tied_at_cut"].tolist())[: case["dominant_patches"] - len(above)]
    assert selection.indices[0].tolist() == sorted(above + lowest)


@pytest.mark.parametrize("case, tensors", [case for case in selection_cases("visionzip") if "order" in case.id])
def test_visionzips_tiles_stand_as_published(case, tensors):
    """Dominant patches in raster order of the 2 x 2 grid, then class tokens, then contextual tokens."""
    layout = tiled_layout((672, 672), (2, 2), 24, "spatial")
    dominant = tensors["keep_idx_with_cls"][:, 1:].sort().values - 1
    numbers = (dominant + 576 * torch.arange(1, 5)[:, None]).flatten()
    width = 1 + case["contextual"]
    places = kept_places(layout, numbers, len(numbers), keep_newlines=False)
    sequence = with_made_tokens(layout, places, [0, *[width] * 4], width, leading=1)
    tokens = tensors["tile_tokens"]  # class token, dominant patches, contextual tokens of each tile
    table = torch.full((layout.eligible.numel() + 5 * width, tokens.shape[-1]), torch.nan)
    table[numbers] = tokens[:, 1 : 1 + dominant.shape[1]].flatten(0, 1)
    made = torch.cat([tokens[:, :1], tokens[:, 1 + dominant.shape[1] :]], dim=1)
    table[layout.eligible.numel() + width :] = made.flatten(0, 1)
    assert torch.equal(table[sequence], tensors["restored"])


@pytest.mark.parametrize(
    "budget, dominant, contextual", [(192, 162, 30), (128, 108, 20), (64, 54, 10), (32, 27, 5), (16, 14, 2)]
)
def test_visionzips_budget_splits_as_published(budget, dominant, contextual):
    pruner = get_pruner("visionzip", keep_tokens=budget)
    assert pruner.count_made(budget) == 1 + contextual
    assert budget - contextual == dominant


def test_visionzip_without_a_class_token_ranks_by_mean_attention():
    torch.manual_seed(0)
    inputs = PruningInputs(
        torch.randn(1, 40, 6),
        encoder_features=torch.randn(1, 40, 6),
        key_metric=torch.randn(1, 40, 4),
        mean_attention=torch.rand(1, 2, 40),
    )
    selection = get_pruner("visionzip", keep_tokens=20, class_token=False).select(inputs)
    assert (selection.made.shape[1], selection.leading) == (3, 0)
    best = inputs.mean_attention.sum(1)[0].topk(17).indices.sort().values
    assert torch.equal(selection.indices[0], best)
    with pytest.raises(ValueError, match="'visionzip' needs class_attention, class_features, which this host did not"):
        get_pruner("visionzip", keep_tokens=20).select(inputs)


# --- Script's released code ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, tensors", selection_cases("script_official"))
def test_script_release_is_the_released_code(case, tensors):
    inputs = PruningInputs(
        tensors["image_features"], image_embeds=tensors["image_embeds"], text_embeds=tensors["text_embeds"][None]
    )
    pruner = get_pruner("script_release", keep_tokens=case["m"])
    selection = pruner.select(inputs)
    assert torch.allclose(selection.details["relevance"], tensors["relevance"], atol=1e-5)
    assert torch.equal(selection.details["kept_by_gsp"], tensors["gsp_mask"])
    assert torch.equal(selection.mask, tensors["final_mask"])
    assert torch.equal(selection.mask, tensors["residual_mask"])
    paper = get_pruner("script", keep_tokens=case["m"]).select(inputs)
    assert not torch.equal(paper.mask, selection.mask)
    without_graph = dataclasses.replace(pruner, tau=0.9, minimum_degree=50)
    assert torch.equal(without_graph.select(inputs).mask, selection.mask)  # the graph has no influence


@pytest.mark.parametrize("case", SCRIPT_SELECTOR.cases())
def test_script_release_on_questions_in_pieces_and_beyond_the_residuals(case):
    tensors = {name: SCRIPT_SELECTOR.parts(case, name)["all"] for name in ("relevance", "gsp_scores", "mask_gsp")}
    inputs = {
        name: SCRIPT_SELECTOR.tensors[f"{case}.in.{name}"]
        for name in ("projected_features", "image_embeds", "text_embeds")
    }
    entry = SCRIPT_SELECTOR.entries[case]
    selection = get_pruner("script_release", keep_tokens=entry["keep"]).select(
        PruningInputs(
            inputs["projected_features"], image_embeds=inputs["image_embeds"], text_embeds=inputs["text_embeds"][None]
        )
    )
    assert torch.allclose(selection.details["relevance"], tensors["relevance"], atol=1e-4)
    assert torch.allclose(selection.details["redundancy"], tensors["gsp_scores"], rtol=1e-5)
    assert torch.equal(selection.details["kept_by_gsp"], tensors["mask_gsp"].bool())
    assert selection.indices.tolist() == entry["mask_indices"]
    order = SCRIPT_SELECTOR.parts(case, "pick_order_dpp")["all"].T
    assert selection.details["order"].argsort()[:, : entry["keep"]].tolist() == order.tolist()
