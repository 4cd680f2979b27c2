"""The method of the paper: recorded reference values, ablations, options and limits."""

import pytest
import torch

from llava.pruning import PruningInputs, get_pruner
from llava.pruning.functional import conditional_kernel, cosine_similarity, greedy_map
from records import selection_cases

CASES = selection_cases("script_reference")


def reference_inputs(tensors, dtype):
    return PruningInputs(tensors["features"].to(dtype)[None], query_embeds=tensors["query"].to(dtype)[None, None])


def reference_pruner(case, **options):
    hyper_parameters = {
        "keep_tokens": case["m"],
        "gsp_ratio": case["p"],
        "tau": case["tau"],
        "gamma": case["gamma"],
        "epsilon": case["epsilon"],
        "relevance": "projector",
    }
    return get_pruner("script", **{**hyper_parameters, **options})


@pytest.mark.parametrize("case, tensors", CASES)
def test_reference_values_in_float64(case, tensors):
    inputs = reference_inputs(tensors, torch.float64)
    selection = reference_pruner(case).select(inputs)
    details = {name: value[0] for name, value in selection.details.items()}
    assert torch.allclose(details["redundancy"], tensors["gsp_score"], rtol=1e-10, atol=0)
    assert details["kept_by_gsp"].nonzero()[:, 0].tolist() == tensors["gsp_kept"].sort().values.tolist()
    assert torch.allclose(details["relevance"], tensors["relevance"], atol=1e-12)
    needed = case["k_needed"]
    order = details["order"].argsort()
    assert order[:needed].tolist() == tensors["dpp_order"][:needed].tolist()
    in_order = [token for token in order.tolist() if details["kept_by_gsp"][token]]
    assert in_order[: case["m"]] == tensors["final_in_order"].tolist()
    assert selection.indices[0].tolist() == tensors["final"].sort().values.tolist()

    kernel = conditional_kernel(cosine_similarity(inputs.features), details["relevance"][None])
    whole_order = greedy_map(kernel, len(tensors["dpp_order"]), epsilon=case["epsilon"])[0]
    assert whole_order.tolist() == tensors["dpp_order"].tolist()


@pytest.mark.parametrize("case, tensors", CASES)
def test_reference_sets_in_float32(case, tensors):
    if case["k_needed"] > case["rank_of_kernel"]:
        pytest.skip("beyond the kernel's rank residuals as small as the stabiliser decide; see the float64 test")
    selection = reference_pruner(case).select(reference_inputs(tensors, torch.float32))
    assert selection.indices[0].tolist() == tensors["final"].sort().values.tolist()


ABLATIONS = {
    "only_gsp": {"relevance": "none", "dpp": False},
    "only_qcrs": {"gsp": False, "dpp": False},
    "only_qcsp": {"gsp": False},
    "gsp_qcrs": {"dpp": False},
}


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("case, tensors", CASES)
def test_ablations(case, tensors, ablation):
    selection = reference_pruner(case, **ABLATIONS[ablation]).select(reference_inputs(tensors, torch.float64))
    assert selection.indices[0].tolist() == tensors[ablation].sort().values.tolist()


def inputs_of(seed=0, views=2, tokens=60, width=80, **fields):
    torch.manual_seed(seed)
    image, text = torch.randn(views, tokens, 12), torch.randn(views, 1, 12)
    return PruningInputs(torch.randn(views, tokens, width), image_embeds=image, text_embeds=text, **fields)


def select(inputs, **options):
    return get_pruner("script", **{"keep_tokens": 12, **options}).select(inputs)


def test_all_parts_off_is_random_and_depends_on_the_seed():
    off = {"gsp": False, "relevance": "none", "dpp": False}
    first, again, other = (select(inputs_of(), seed=seed, **off).indices for seed in (0, 0, 1))
    random = get_pruner("random", keep_tokens=12).select(inputs_of()).indices
    assert torch.equal(first, again)
    assert torch.equal(first, random)
    assert not torch.equal(first, other)


def test_gsp_ratio_zero_is_pure_qcsp_and_its_limit_pure_gsp():
    inputs = inputs_of()
    assert torch.equal(select(inputs, gsp_ratio=0.0).indices, select(inputs, gsp=False).indices)
    all_gsp = select(inputs, gsp_ratio=1 - 12 / 60)
    least = all_gsp.details["redundancy"].argsort(stable=True)[:, :12].sort().values
    assert torch.equal(all_gsp.indices, least)
    assert torch.equal(all_gsp.indices, select(inputs, relevance="none", dpp=False).indices)


def test_every_kept_token_lies_in_the_graph_filter():
    selection = select(inputs_of(tokens=200))
    assert selection.details["kept_by_gsp"].gather(1, selection.indices).all()
    assert selection.details["kept_by_gsp"].sum(-1).tolist() == [100, 100]


def test_constant_relevance_gives_the_diversity_order():
    inputs = inputs_of()
    flat = PruningInputs(inputs.features, relevance=torch.full((2, 60), 0.3))
    assert torch.equal(select(flat).indices, select(inputs, relevance="none").indices)


def test_prefix_property_while_the_filter_stays_the_same():
    inputs = inputs_of(tokens=100, width=120)
    larger = select(inputs, keep_tokens=40).mask
    smaller = select(inputs, keep_tokens=15).mask
    assert (larger | ~smaller).all()


def test_scaling_rows_changes_nothing():
    inputs = inputs_of()
    scaled = PruningInputs(inputs.features * torch.rand(2, 60, 1).add(0.1) * 8, None, inputs.image_embeds * 3,
                           inputs.text_embeds * 0.2)  # fmt: skip
    assert torch.equal(select(scaled).indices, select(inputs).indices)


def test_callers_relevance_wins_and_gets_no_sign():
    inputs = inputs_of()
    scores = torch.rand(2, 60)
    given = PruningInputs(inputs.features, relevance=scores)
    kept = select(given, gsp=False, dpp=False)
    assert torch.equal(kept.indices, scores.argsort(descending=True)[:, :12].sort().values)


def test_sign_comes_from_the_host_unless_given():
    host_says_plus, default = inputs_of(relevance_sign=1), inputs_of()
    plus, minus = select(default, relevance_sign=1).indices, select(default, relevance_sign=-1).indices
    assert torch.equal(select(default).indices, minus)
    assert torch.equal(select(host_says_plus).indices, plus)
    assert not torch.equal(plus, minus)


def test_restrict_lets_discarded_tokens_stop_repelling():
    """A token that the filter discards still repels its neighbours, unless the DPP runs on the kept ones alone."""
    inputs = inputs_of(3, views=1, tokens=80, width=16)
    restricted, default = select(inputs, restrict=True), select(inputs)
    kept_by_gsp = default.details["kept_by_gsp"]
    assert kept_by_gsp.gather(1, restricted.indices).all()
    assert not torch.equal(restricted.indices, default.indices)
    members = kept_by_gsp[0].nonzero()[:, 0]
    relevance = default.details["relevance"][:, members]
    alone = greedy_map(conditional_kernel(cosine_similarity(inputs.features[:, members]), relevance), 12)
    assert torch.equal(members[alone[0]].sort().values, restricted.indices[0])


def test_kernel_exponent_weakens_relevance():
    inputs = inputs_of(tokens=120)
    relevance = select(inputs).details["relevance"]
    means = [
        relevance.gather(1, select(inputs, gsp=False, kernel_exponent=a).indices).mean().item()
        for a in (0.5, 1.0, 4.0)
    ]
    assert means == sorted(means)
    half = select(inputs, gsp=False, kernel_exponent=0.5).indices
    kernel = conditional_kernel(cosine_similarity(inputs.features), relevance.sqrt())
    assert torch.equal(greedy_map(kernel, 12).sort().values, half)


def test_exhaustive_graph_is_another_filter():
    inputs = inputs_of(tokens=90, width=8)
    bipartite, exhaustive = select(inputs), select(inputs, graph="exhaustive")
    assert not torch.equal(bipartite.details["redundancy"], exhaustive.details["redundancy"])
    assert not torch.equal(bipartite.indices, exhaustive.indices)


def test_missing_inputs_are_named():
    with pytest.raises(ValueError, match="'script' needs image_embeds, text_embeds"):
        select(PruningInputs(torch.randn(1, 20, 8)))
    with pytest.raises(ValueError, match="needs query_embeds"):
        select(PruningInputs(torch.randn(1, 20, 8)), relevance="projector")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gsp_ratio": 1.5}, "gsp_ratio must be a finite number between 0 and 1; got 1.5"),
        ({"relevance_sign": 0}, "relevance_sign must be one of -1, 1 or none; got 0"),
        ({"epsilon": 0.0}, "epsilon must be a finite number more than 0; got 0.0"),
        (
            {"relevance": "siglip"},
            "relevance must be one of auto, clip, .*, none; got 'siglip'",
        ),
        ({"graph": "full"}, "graph must be one of bipartite, exhaustive"),
        ({"scope": "frame"}, "scope must be one of view, global"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        get_pruner("script", **options)
