"""The Triton kernels against the PyTorch loops: on a GPU where there is one, else interpreted on the CPU."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are not tested: pip install triton")

import triton

from greedy_inputs import KINDS, options_of, rows_of
from llava.pruning import PruningInputs, get_pruner, kernels
from llava.pruning.functional import (
    cosine_similarity,
    greedy_map_rank,
    lowest_ranked,
    max_min_rank,
    min_max,
    redundancy_graph,
    relevance_scores,
    stable_rank,
    unprojected_rank,
)
from llava.pruning.kernels import greedy, scores
from records import selection_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted there: see conftest.py


@triton.jit
def _count(out, n):
    for i in range(0, n):
        triton.language.store(out + i, i)


try:
    _count[(1,)](torch.zeros(3, dtype=torch.int32, device=DEVICE), 3)
except triton.runtime.errors.InterpreterError as error:  # Triton 3.6 and NumPy 2.4, for one
    pytest.skip(f"the kernels are not tested: this Triton's interpreter fails: {error}", allow_module_level=True)


def on_device(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


@pytest.fixture
def both(monkeypatch):
    """Call a function with PyTorch's operations, then with the kernels."""

    def both(call, *values, **options):
        plain = call(*values, **options)
        monkeypatch.setattr(kernels, "usable", lambda tensor: True)
        values = [on_device(value) for value in values]
        options = {name: on_device(value) for name, value in options.items()}
        return plain, call(*values, **options).cpu()

    return both


@pytest.fixture(params=["one launch", "a launch a step"])
def launches(request, monkeypatch):
    if request.param == "a launch a step":
        monkeypatch.setattr(greedy, "ONE_LAUNCH", 0)
        monkeypatch.setattr(greedy, "STEP_BLOCK", 32)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("names", [(), ("relevance", "member", "candidates")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("views, n, k", [(2, 33, 5), (1, 14, 14)])
def test_greedy_map(both, views, n, k, kind, names):
    similarity = cosine_similarity(rows_of(kind, views, n))
    plain, fused = both(greedy_map_rank, similarity, k, **options_of(views, n, n, names))
    assert torch.equal(fused, plain)


@pytest.mark.usefixtures("launches")
def test_a_single_token(both):
    one = torch.ones(2, 1, 1)
    assert both(greedy_map_rank, one, 1)[1].tolist() == [[0], [0]]
    assert both(max_min_rank, 1 - one, 1)[1].tolist() == [[0], [0]]


@pytest.mark.usefixtures("launches")
def test_a_view_that_is_not_a_number_leaves_the_others_alone(both):
    similarity = cosine_similarity(rows_of("iid", 2, 20))
    similarity[1, 4, 4] = torch.nan
    plain, fused = both(greedy_map_rank, similarity, 6)
    assert torch.equal(fused, plain)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_max_min(both, kind, masked):
    distance = 1 - cosine_similarity(rows_of(kind, 2, 33))
    candidates = options_of(2, 33, 33, ("candidates",))["candidates"] if masked else None
    plain, fused = both(max_min_rank, distance, 9, candidates=candidates)
    assert torch.equal(fused, plain)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("kind", KINDS)
def test_unprojected(both, kind):
    options = options_of(2, 33, 33, ("relevance", "candidates"))
    plain, fused = both(unprojected_rank, cosine_similarity(rows_of(kind, 2, 33)), 9, **options)
    assert torch.equal(fused, plain)


@pytest.mark.parametrize("graph", ["bipartite", "exhaustive"])
@pytest.mark.parametrize("kind", ["iid", "one-hot", "zero", "constant"])
@pytest.mark.parametrize("views, n", [(1, 1), (2, 33), (1, 280)])
@pytest.mark.parametrize("masked", [False, True])
def test_redundancy(both, views, n, kind, graph, masked):
    similarity = cosine_similarity(rows_of(kind, views, n))
    valid = options_of(views, n, n, ("candidates",))["candidates"] if masked else None
    given = {"tau": 0.05, "graph": graph, "valid": valid}

    def graph_of(similarity, **given):
        scores, density = redundancy_graph(None, similarity=similarity, **given)
        return torch.cat([scores, density[:, None].to(scores.dtype)], 1)

    plain, fused = both(graph_of, similarity, **given)
    assert torch.allclose(fused, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, at the infinite row
@pytest.mark.parametrize("kind", ["iid", "zero", "constant"])
@pytest.mark.parametrize("n", [1, 33, 300])
def test_cosines(both, kind, n):
    rows = rows_of(kind, 2, n, dtype=torch.float32)
    rows[0, 0] = torch.inf
    plain, fused = both(cosine_similarity, rows)
    assert torch.allclose(fused, plain, atol=1e-6)
    assert torch.equal(fused.diagonal(dim1=1, dim2=2), plain.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("n", [1, 33, 300])
def test_ranks(both, n, descending):
    generator = torch.Generator().manual_seed(n)
    scores = torch.randint(-4, 5, (3, n), generator=generator)
    values = scores.double() / 4
    values[scores == 4], values[scores == -4], values[scores == 0] = torch.nan, -torch.inf, -0.0
    for given in (scores, scores.int(), values, values.float()):
        plain, fused = both(stable_rank, given, descending=descending)
        assert torch.equal(fused, plain)


# --- recorded selections -------------------------------------------------------------------------------------------


@pytest.fixture
def wide(monkeypatch):
    """More tokens per program: the interpreter's time is that of its programs."""
    monkeypatch.setattr(scores, "ROWS", 128)
    monkeypatch.setattr(scores, "COLUMNS", 1024)


def selected(features, pruner, **fields):
    return pruner.select(PruningInputs(features, **fields)).indices


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("case, tensors", selection_cases("script_reference"))
def test_script_selects_what_is_recorded(both, case, tensors):
    beyond_rank = case["k_needed"] > case["rank_of_kernel"]  # there rounding decides in float32
    dtype = torch.float64 if beyond_rank else torch.float32
    names = ("gsp_ratio", "tau", "gamma", "epsilon")
    options = {name: case[key] for name, key in zip(names, ("p", "tau", "gamma", "epsilon"), strict=True)}
    pruner = get_pruner("script", keep_tokens=case["m"], relevance="projector", **options)
    query = tensors["query"].to(dtype)[None, None]
    plain, fused = both(selected, tensors["features"].to(dtype)[None], pruner, query_embeds=query)
    assert torch.equal(fused, plain)
    assert fused[0].tolist() == tensors["final"].sort().values.tolist()


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("case, tensors", selection_cases("cdpruner"))
def test_cdpruner_selects_what_is_recorded(both, case, tensors):
    fields = {"image_embeds": tensors["image_embeds"], "text_embeds": tensors["text_embeds"][None]}
    pruner = get_pruner("cdpruner", keep_tokens=case["m"], scaling="picture")
    pictures = torch.zeros(case["B"], dtype=torch.int64)
    plain, fused = both(selected, tensors["image_features"], pruner, pictures=pictures, **fields)
    assert torch.equal(fused, plain)
    assert torch.equal(fused, tensors["indices"])


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("case, tensors", selection_cases("divprune"))
def test_divprune_selects_what_is_recorded(both, case, tensors):
    plain, fused = both(selected, tensors["features"][None], get_pruner("divprune", keep_tokens=case["max_m"]))
    assert torch.equal(fused, plain)
    assert fused[0].tolist() == tensors["order"].sort().values.tolist()


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("case, tensors", selection_cases("script_official"))
def test_the_released_code_selects_what_is_recorded(both, case, tensors):
    fields = {"image_embeds": tensors["image_embeds"], "text_embeds": tensors["text_embeds"][None]}
    pruner = get_pruner("script_release", keep_tokens=case["m"])
    plain, fused = both(selected, tensors["image_features"], pruner, **fields)
    assert torch.equal(fused, plain)
    assert torch.equal(torch.zeros_like(tensors["final_mask"]).scatter(1, fused, True), tensors["final_mask"])


# --- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_relevance(both, dtype, shared, masked):
    embeds = rows_of("zero", 2, 33, dtype=torch.float64).to(dtype)
    queries = rows_of("iid", 1 if shared else 2, 33, seed=1, dtype=torch.float64)[:, :3].to(dtype)
    mask = torch.tensor([[True, False, True]]).expand(len(queries), -1) if masked else None
    plain, fused = both(relevance_scores, embeds, queries, mask, -1.0)
    assert fused.dtype == plain.dtype
    assert torch.allclose(fused, plain, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "flat", "not a number"])
@pytest.mark.parametrize("masked", [False, True])
def test_min_max(both, kind, masked):
    values = torch.randn(3, 33, generator=torch.Generator().manual_seed(0))
    valid = options_of(3, 33, 33, ("candidates",))["candidates"] if masked else None
    if kind == "flat":
        values[1] = 0.25
    elif kind == "not a number":
        values[1, 4] = torch.nan
    plain, fused = both(min_max, values, valid, offset=1e-6)
    assert torch.allclose(fused, plain, atol=1e-6)


@pytest.mark.parametrize("k", [1, 9, 30])
@pytest.mark.parametrize("masked", [False, True])
def test_lowest_ranked(both, k, masked):
    rank = torch.rand(3, 33, generator=torch.Generator().manual_seed(0)).argsort(-1)
    member = options_of(3, 33, 33, ("member",))["member"] if masked else None
    plain, fused = both(lowest_ranked, rank, k, member)
    assert torch.equal(fused, plain)
