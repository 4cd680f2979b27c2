"""What a CUDA graph asks of a selection: no number decides a shape or a branch; and the graph, if there is a GPU."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the kernels are not tested: pip install triton")

from llava.pruning import PruningInputs, get_pruner, kernels
from llava.pruning.kernels import greedy, scores
from llava.pruning.kernels.captured import CapturedSelection
from method_inputs import inputs_for

REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero", "bincount")
METHODS = ["script", "cdpruner", "divprune", "trim", "script_release", "fastervlm"]


class NothingIsLookedAt(TorchDispatchMode):
    """Refuses operations whose result the CPU must wait for, or whose shape depends on numbers; notes all shapes."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name().split("::")[1].split(".")[0]
        if name in REFUSED:
            raise AssertionError(f"{name} would wait for the GPU")
        output = function(*arguments, **(keywords or {}))
        for value in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(value, torch.Tensor):
                self.shapes.append(tuple(value.shape))
        return output


def shapes_of(pruner, inputs, monkeypatch):
    """Shapes of all that a selection computes outside of its kernels, and how many of those it launches."""
    launched = []
    for module in (greedy, scores):
        for name in [name for name in vars(module) if name.startswith("_") and hasattr(vars(module)[name], "fn")]:
            monkeypatch.setattr(module, name, NoLaunch(launched))
    monkeypatch.setattr(kernels, "usable", lambda tensor: True)
    with NothingIsLookedAt() as seen:
        pruner.choose(inputs, 9)
    return seen.shapes, len(launched)


class NoLaunch:
    """In place of a kernel: notes that it would be launched."""

    fn = None  # told by this from other names of a module

    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched.append(grid)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_no_number_decides_what_is_computed(name, padded, monkeypatch):
    pruner = get_pruner(name, keep_tokens=9)
    shapes = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        inputs = inputs_for(name)
        valid = torch.rand(inputs.views, inputs.tokens) < 0.5 + 0.2 * seed if padded else None
        inputs = dataclasses.replace(inputs, features=torch.randn_like(inputs.features), valid=valid)
        shapes.append(shapes_of(pruner, inputs, monkeypatch))
    assert shapes[0] == shapes[1]
    assert shapes[0][0]


@pytest.mark.parametrize("name", ["script", "cdpruner", "divprune", "trim"])
def test_a_batch_is_as_many_launches_as_a_view(name, monkeypatch):
    pruner = get_pruner(name, keep_tokens=9)
    inputs = inputs_for(name)
    many = shapes_of(pruner, inputs, monkeypatch)[1]
    one = shapes_of(pruner, inputs.of_views(slice(0, 1)), monkeypatch)[1]
    assert inputs.views > 1
    assert 1 <= one == many <= 12


def test_what_cannot_be_captured_is_refused():
    inputs = PruningInputs(torch.randn(1, 16, 8), relevance=torch.rand(1, 16))
    with pytest.raises(ValueError, match="needs inputs on CUDA, got cpu"):
        CapturedSelection(get_pruner("script", keep_tokens=4), inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph takes a GPU")
@pytest.mark.parametrize("name", METHODS)
def test_a_replay_is_a_selection(name):
    pruner = get_pruner(name, keep_tokens=9)

    def on_gpu(seed):
        torch.manual_seed(seed)
        inputs = inputs_for(name)
        inputs = dataclasses.replace(inputs, features=torch.randn_like(inputs.features))
        moved = {name: value.cuda() for name, value in vars(inputs).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(inputs, **moved)

    first = on_gpu(0)
    width = first.features.shape[-1]
    captured = CapturedSelection(
        pruner, first, then=lambda s: first.features.gather(1, s.indices[..., None].expand(-1, -1, width))
    )
    for seed in (1, 2):
        inputs = on_gpu(seed)
        selection, gathered = captured(inputs)
        assert torch.equal(selection.indices, pruner.select(inputs).indices)
        assert gathered.shape == (inputs.views, 9, width)
    with pytest.raises(ValueError, match="fields, shapes and dtypes"):
        captured(inputs.of_views(slice(0, 1)))
    with pytest.raises(ValueError, match="finds its count itself"):
        CapturedSelection(get_pruner("script", keep_tokens="auto"), first)
