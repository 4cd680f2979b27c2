"""The Triton kernels against the PyTorch loops: on a GPU where there is one, else interpreted on the CPU."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are not tested: pip install triton")

from test_greedy import KINDS, options_of, rows_of

from llava.pruning import kernels
from llava.pruning.functional import cosine_similarity, greedy_map_rank, max_min_rank, unprojected_rank
from llava.pruning.kernels import greedy as fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted there: see conftest.py


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
        monkeypatch.setattr(fused, "ONE_LAUNCH", 0)
        monkeypatch.setattr(fused, "STEP_BLOCK", 16)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("names", [(), ("relevance",), ("relevance", "member", "candidates")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("views, n, k", [(1, 1, 1), (2, 33, 9), (1, 20, 20)])
def test_greedy_map(both, views, n, k, kind, names):
    similarity = cosine_similarity(rows_of(kind, views, n))
    plain, fused = both(greedy_map_rank, similarity, k, **options_of(views, n, n, names))
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
