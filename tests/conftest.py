"""Shared fixtures: no test talks to the network, tiny checkpoints are loaded once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from functools import cache

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which transformers may do

from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from records import GOLDEN, golden_checkpoint, load_picture, unpack

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # each worker has a core of its own


def pytest_collection_modifyitems(config, items):
    """Leave the tests out that take many minutes, unless ``-m`` names them."""
    if "nightly" not in config.option.markexpr:
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item not in nightly]


@cache
def load_checkpoint(name):
    tokenizer, model, processor, context = load_pretrained_model(str(golden_checkpoint(name)), device="cpu")
    return tokenizer, model, processor, context


@pytest.fixture(scope="session")
def load():
    """Load a golden checkpoint by name, once per session: (tokenizer, model, image processor, context length)."""
    return load_checkpoint


@pytest.fixture(scope="session")
def pixels_of():
    """Preprocess golden pictures for a checkpoint: (pixels, image sizes)."""

    def pixels_of(checkpoint, *names):
        _, model, processor, _ = load_checkpoint(checkpoint)
        pictures = [load_picture(name) for name in names]
        return process_images(pictures, processor, model.config), [picture.size for picture in pictures]

    return pixels_of


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    """The recorded data of LLaVA-Video and LLaVA-OneVision, unpacked: a folder."""
    return unpack(GOLDEN / "video", tmp_path_factory.mktemp("golden") / "video")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
