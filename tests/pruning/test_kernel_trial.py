"""Kernels that do not work are found on the first use of a device, named once, and left out; all can be compiled."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="there is nothing to try: pip install triton")

from llava.eval.measure import efficiency, selection_speed
from llava.pruning import kernels
from llava.pruning.kernels import greedy, scores

CPU = torch.device("cpu")
COMPILE = Path(__file__).parents[1] / "helpers/compile_kernels.py"
KERNELS = [
    *((greedy, name) for name in ("_loop", "_step")),
    *((scores, name) for name in ("_scale", "_degree", "_count_before", "_mean_cosine", "_min_max", "_compact")),
]

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are interpreted on the CPU where there is no GPU"
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No device was tried. Views are long from 49 tokens on, a program takes more rows: interpreting is slow."""
    monkeypatch.setattr(kernels, "_passed", {})
    monkeypatch.setattr(kernels, "_choice", "auto")
    monkeypatch.setattr(greedy, "ONE_LAUNCH", 48)
    monkeypatch.setattr(scores, "ROWS", 64)


def outcome():
    """Whether the kernels are used for a tensor on a GPU, asked twice, and what was warned of."""
    tensor = SimpleNamespace(is_cuda=True, device=CPU, requires_grad=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = kernels.usable(tensor), kernels.usable(tensor)
    assert first == second
    return first, [str(warning.message) for warning in caught]


@interpreted
def test_kernels_that_work_pass_without_a_word():
    assert outcome() == (True, [])


@interpreted
@pytest.mark.parametrize("module, name", KERNELS, ids=[name for _, name in KERNELS])
def test_a_kernel_that_raises_is_named_and_left_out(monkeypatch, module, name):
    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(module, name, Broken())
    used, (message,) = outcome()
    assert not used
    assert "RuntimeError: Failed to find C compiler." in message
    assert "on cpu" in message


@interpreted
@pytest.mark.parametrize(
    "module, name, function",
    [
        (scores, "stable_rank", "stable_rank"),
        (scores, "first_places", "lowest_ranked"),
        (scores, "min_max", "min_max"),
        (greedy, "place_by_map", "greedy_map_rank"),
        (greedy, "place_by_max_min", "max_min_rank"),
        (greedy, "place_unprojected", "unprojected_rank"),
    ],
)
def test_a_kernel_that_gives_something_else_is_named_and_left_out(monkeypatch, module, name, function):
    real = getattr(module, name)

    def wrong(first, *others):
        result = real(first, *others)
        changed = first if result is None else result  # the loops write into their first argument
        changed[..., :2] = changed[..., :2].flip(-1) + (1 if changed.is_floating_point() else 0)
        return result

    monkeypatch.setattr(module, name, wrong)
    used, (message,) = outcome()
    assert not used
    assert f"{function} differs from what PyTorch computes" in message


def test_the_choice_needs_no_trial(monkeypatch):
    monkeypatch.setattr(kernels, "_trial", None)  # would raise
    kernels.use("torch")
    assert outcome() == (False, [])
    kernels.use("triton")
    assert outcome() == (True, [])
    with pytest.raises(ValueError, match="one of auto, torch, triton, got 'cuda'"):
        kernels.use("cuda")
    monkeypatch.setattr(kernels, "is_installed", lambda: False)
    with pytest.raises(ImportError, match="pip install"):
        kernels.use("triton")


@pytest.mark.parametrize("command", [efficiency, selection_speed])
def test_commands_refuse_kernels_where_there_are_none(command, capsys):
    assert command.main(["--device", "cpu", "--kernels", "triton"]) == 2
    assert "--kernels triton is for CUDA, not for --device cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_every_kernel_compiles_for_every_gpu(tmp_path):
    """Down to machine code, for which no GPU is needed. A process of its own: here the kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = {tuple(line.split()[:2]) for line in done.stdout.splitlines()}
    assert {name for name, _ in compiled} == {name for _, name in KERNELS}
    assert {target for _, target in compiled} == {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
    assert len(compiled) == len(KERNELS) * 7
