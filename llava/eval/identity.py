"""What an answer depends on beside the question: code, libraries, device, checkpoint; as short strings to compare."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch

import llava
from llava.checkpoint import find_folder, weight_files
from llava.model.builder import read_config
from llava.model.multimodal_encoder.siglip_encoder import folder_at_hand

LIBRARIES = ("torch", "transformers", "accelerate", "pillow", "numpy")
# Of the evaluation, what a question or an answer passes through; reports and scorers change none, but MMBench's says
# which options are shown.
ANSWERING = ("eval/answering.py", "eval/benchmarks.py", "eval/files.py", "eval/run.py", "eval/scorers/mmbench.py")
ANSWERING += ("eval/harness_model.py",)  # through lmms-eval; the same hash, so that both kinds of run share a row
SAMPLE_BYTES = 2**20


def code_version() -> str:
    """Hash of the package's sources that an answer passes through."""
    root = Path(llava.__file__).parent
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if name in ANSWERING or not name.startswith(("eval/", "serve/"))]
    return _digest(part for name in names for part in (name.encode(), (root / name).read_bytes()))


def commit() -> str | None:
    """The git commit of the sources, for the record; ``None`` outside a repository."""
    command = ["git", "-C", str(Path(llava.__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def library_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def device_name(device: str) -> str:
    """What computes: the GPU's name, or the processor's architecture."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()})"


def checkpoint_identity(model_path: str, model_base: str | None = None) -> str:
    """Hash over a checkpoint and its vision tower: small files whole, weight files by size and samples.

    Three samples of a mebibyte tell retrained weights apart in a moment, where a full hash would take minutes.
    """
    folder = find_folder(model_path)
    folders = [folder, *([find_folder(model_base)] if model_base else [])]
    config = read_config(folder, folders[-1])
    if config.mm_vision_tower_type == "siglip":  # its weights are in the checkpoint; the folder serves relevance
        tower = folder_at_hand(config.mm_vision_tower, near=folder)
    else:
        tower = find_folder(config.mm_vision_tower, near=folder)
    folders += [tower] if tower is not None else []
    parts: list[bytes] = []
    for place in folders:
        weights = set(weight_files(place)) if place != folder or model_base is None else set(place.glob("*.bin"))
        for path in sorted({*weights, *place.glob("*.json"), *place.glob("*.model"), *place.glob("*.txt")}):
            parts += [path.name.encode(), _samples(path)]
    return _digest(parts)


def _samples(path: Path) -> bytes:
    size = path.stat().st_size
    if size <= 3 * SAMPLE_BYTES:
        return path.read_bytes()
    with path.open("rb") as file:
        samples = [str(size).encode()]
        for place in (0, size // 2, size - SAMPLE_BYTES):
            file.seek(place)
            samples.append(file.read(SAMPLE_BYTES))
    return b"".join(samples)


def file_identity(path: Path) -> str:
    """Hash of a whole file."""
    return _digest([path.read_bytes()])


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]
