"""Reading and comparing recorded values; the storage format is described in golden/README.md."""

import atexit
import json
import lzma
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save_file

GOLDEN = Path(__file__).parents[1] / "golden"
PICTURES = ("square336", "land640x480", "tall300x900", "wide1000x400", "odd501x333", "small97x61")
FEATURES = {"default": 1e-4, "rowdot": 5e-4}
LOGITS = {"default": 5e-4, "rowdot": 5e-4}
PIXELS = {"default": 1e-6, "rowmean": 1e-6}


def golden_bytes(path):
    """Contents of a golden file; most that would take much room are stored as ``<path>.xz``."""
    packed = path.with_name(path.name + ".xz")
    return path.read_bytes() if path.is_file() else lzma.decompress(packed.read_bytes())


def load_tensors(path):
    """Tensors of a golden safetensors file, by name."""
    return load(golden_bytes(path))


def unpack(folder, target):
    """Copy a golden folder whose large files are compressed to where a loader finds them as they were."""
    shutil.copytree(folder, target)
    for packed in target.rglob("*.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    return target


@cache
def golden_scorers():
    """Folder of the recorded scores, unpacked."""
    place = Path(tempfile.mkdtemp(prefix="golden-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return unpack(GOLDEN / "scorers", place / "scorers")


@cache
def golden_checkpoint(name):
    """Folder of a golden checkpoint; of one that is stored as its index alone, a temporary copy with its shards.

    The weights are those of the checkpoint that has them whole: two copies of the same random numbers would be the
    largest thing in this repository.
    """
    folder = GOLDEN / "checkpoints" / name
    if not name.endswith("-sharded"):
        return folder
    place = Path(tempfile.mkdtemp(prefix="golden-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    (place / "openai").symlink_to(GOLDEN / "checkpoints/openai")  # where the tower's relative name points
    sharded = shutil.copytree(folder, place / name)
    whole = GOLDEN / "checkpoints" / name.removesuffix("-sharded")
    index = next(sharded.glob("*.index.json"))
    in_pickles = index.name.startswith("pytorch_model.bin")
    file = "pytorch_model.bin" if in_pickles else "model.safetensors"
    weights = torch.load(whole / file, weights_only=True) if in_pickles else load((whole / file).read_bytes())
    shards = {}
    for tensor, shard in json.loads(index.read_text())["weight_map"].items():
        shards.setdefault(shard, {})[tensor] = weights[tensor].clone()
    for shard, tensors in shards.items():
        if in_pickles:
            torch.save(tensors, sharded / shard)
        else:
            save_file(tensors, sharded / shard, metadata={"format": "pt"})
    return sharded


def load_picture(name):
    """A golden picture by name."""
    return Image.open(GOLDEN / "images" / f"{name}.png")


def selection_cases(method):
    """(case, tensors) of every recorded selection of a method, as parameters of a test."""
    cases = json.loads((GOLDEN / "selection" / method / "cases.json").read_text())["cases"]
    return [pytest.param(case, load_tensors(GOLDEN / "selection" / case["file"]), id=case["case"]) for case in cases]


class Records:
    """The cases of one topic: entries by name, and their tensors."""

    def __init__(self, topic):
        self.entries = json.loads(golden_bytes(GOLDEN / f"{topic}.json"))
        self.tensors = load_tensors(GOLDEN / f"{topic}.safetensors")

    def cases(self):
        return [name for name in self.entries if not name.startswith("_")]

    def parts(self, case, name):
        prefix = f"{case}.{name}"
        exact = {"all": self.tensors[prefix]} if prefix in self.tensors else {}
        return exact | {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + ".")}

    def check(self, case, name, value, tolerance):
        """Assert that a tensor equals the recorded one, in every way in which it was recorded."""
        value = value.detach().float().cpu()
        entry = self.entries[case].get(name)
        if isinstance(entry, dict) and "shape" in entry:
            assert list(value.shape) == entry["shape"], f"{case}.{name}: shape {tuple(value.shape)}"
        parts = self.parts(case, name)
        assert parts, f"{case}.{name} is not recorded"
        for part, want in parts.items():
            got = _part(value, part, len(want))
            limit = tolerance.get(part, tolerance["default"])
            worst = (got.reshape(want.shape).double() - want.double()).abs().max().item()
            assert worst <= limit, f"{case}.{name}.{part}: off by {worst:.2e}, allowed {limit:.0e}"


def _part(value, part, length):
    flat = value.flatten()
    match part:
        case "all":
            return value
        case "head":
            return flat[:length]
        case "tail":
            return flat[-length:]
        case "sub":
            return flat[(torch.arange(length) * (flat.numel() - 1)) // (length - 1)]
        case "rowdot":
            return value.double() @ torch.cos(torch.arange(1, value.shape[-1] + 1, dtype=torch.float64))
        case "rowmean":
            return value.double().mean(-1)
    raise AssertionError(f"unknown part {part}")
