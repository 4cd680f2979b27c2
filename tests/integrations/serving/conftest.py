"""Checkpoints for the engines: the trained toy, converted; and pictures."""

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]
MME = ROOT / "playground/toy/data/eval/MME/MME_Benchmark_release_version"


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Folder of a toy in the library's format, by its version: "v1.5" or "v1.6"."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from convert_to_transformers import convert

    made = {}

    def toy(version):
        if version not in made:
            made[version] = tmp_path_factory.mktemp("toy") / f"llava-toy-{version}"
            convert(str(ROOT / f"playground/toy/llava-toy-{version}"), made[version])
        return made[version]

    return toy


@pytest.fixture(scope="session")
def pictures():
    """Pictures of the toy's world."""
    return [Image.open(path).convert("RGB") for path in sorted((MME / "position").glob("*.png"))[:4]]


@pytest.fixture(scope="session")
def square(pictures):
    """A picture without padding."""
    return pictures[0].resize((336, 336))


@pytest.fixture(scope="session", autouse=True)
def _offline():
    os.environ["HF_HUB_OFFLINE"] = "1"
