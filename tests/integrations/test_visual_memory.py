"""A second question about the same pictures: the vision tower does not run again, and nothing else changes."""

import copy

import pytest
import torch

from llava.integrations.transformers import VisualMemory
from llava.integrations.transformers.host import find_host
from llava.pruning import get_pruner
from transformers_families import MAKERS, family

IMAGE_FAMILIES = sorted(name for name in MAKERS if hasattr(find_host(family(name).model).base, "get_image_features"))


def outcome(model, arguments, memory=None):
    with torch.inference_mode(), get_pruner("divprune", keep_tokens=3)(model, memory=memory) as handle:
        output = model.generate(**arguments, max_new_tokens=3, do_sample=False)
    return output.tolist(), [one.kept.tolist() for one in handle.kept]


@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_the_tower_runs_once_for_a_picture(name, monkeypatch):
    one = family(name)
    base, runs = find_host(one.model).base, []
    compute = base.get_image_features
    monkeypatch.setattr(base, "get_image_features", lambda *given, **named: runs.append(1) or compute(*given, **named))
    first, second = (one.prompts([[text, "image", 5]], [0]) for text in (3, 6))
    other = {name: -value if name.startswith("pixel_values") else value for name, value in second.items()}
    wanted = [outcome(one.model, arguments) for arguments in (first, second, other)]
    runs.clear()
    memory = VisualMemory()
    assert outcome(one.model, first, memory) == wanted[0]
    assert not memory.reused
    before = len(runs)
    assert outcome(one.model, second, memory) == wanted[1]
    assert memory.reused
    assert len(runs) == before
    assert outcome(one.model, other, memory) == wanted[2]
    assert not memory.reused
    assert len(runs) > before


def test_what_nobody_watched_is_computed_again():
    """A method that reads the encoder needs what entered the projector, which the one before did not look at."""
    model = family("llava").model
    arguments = family("llava").single(0)
    memory, kept = VisualMemory(), []
    for name, reused in (("divprune", False), ("fastervlm", False), ("fastervlm", True), ("divprune", True)):
        with torch.inference_mode(), get_pruner(name, keep_tokens=3)(model, memory=memory) as handle:
            model(**arguments)
        assert memory.reused == reused
        kept.append(handle.kept[0].kept.tolist())
    assert kept[0] == kept[3]
    assert kept[1] == kept[2]


def test_what_would_be_stale_is_computed_again():
    """A buffer that is filled anew, another model with the same pictures, a call that wants gradients."""
    model, arguments = family("llava").model, family("llava").single(0)
    memory, method = VisualMemory(), get_pruner("divprune", keep_tokens=3)

    def reused(model, arguments):
        with method(model, memory=memory):
            model(**arguments)
        return memory.reused

    with torch.no_grad():
        pixels = arguments["pixel_values"]
        first = pixels.clone()
        assert [reused(model, arguments), reused(model, arguments)] == [False, True]
        pixels.neg_()
        assert not reused(model, arguments)
        pixels.copy_(first)
        assert not reused(model, arguments)
        other = copy.deepcopy(model)
        assert [reused(other, arguments), reused(model, arguments), reused(model, arguments)] == [False, False, True]
    other.requires_grad_(True)
    for _ in range(2):  # a graph that was gone through is gone
        with method(other, memory=memory):
            other(**arguments).logits.sum().backward()
        assert not memory.reused
