"""The methods of 2025 and 2026 against recorded choices, and their own laws."""

import dataclasses

import pytest
import torch

from llava.pruning import PruningInputs, get_pruner
from records import selection_cases

PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def changed(inputs, **fields):
    return dataclasses.replace(inputs, **fields)


# --- FasterVLM -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, tensors", selection_cases("fastervlm"))
def test_fastervlm_keeps_what_the_published_code_keeps(case, tensors):
    inputs = PruningInputs(torch.zeros(case["B"], case["n"], 1), class_attention=tensors["attention"])
    assert torch.equal(get_pruner("fastervlm", keep_tokens=case["m"]).select(inputs).mask, tensors["mask"])
