"""What an answer depends on beside the question: code, libraries, device, checkpoint; as short strings to compare.

Code is what runs for this answer: the model's, the prompt's and the decoding's, and the one method's. Another method,
a benchmark's scorer or a report can change none of these answers, and editing them leaves a run as it was.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

import llava
from llava.checkpoint import find_folder, weight_files
from llava.eval.benchmarks.question import Question
from llava.eval.runner.imports import PACKAGE, reached, source_of
from llava.model.builder import read_config
from llava.model.multimodal_encoder.siglip_encoder import folder_at_hand
from llava.pruning import Pruner

LIBRARIES = ("torch", "transformers", "accelerate", "pillow", "numpy")
ANSWERING = ("llava.eval.runner.answering", "llava.model.builder")
OTHER_HOSTS = ("llava.integrations",)  # reached from a method's `attach`, which our own host does not call
TRANSFORMERS_HOST = "llava.integrations.transformers"
SAMPLE_BYTES = 2**20


def code_of(pruner: Pruner | type[Pruner] | None) -> dict[str, str | None]:
    """The code behind an answer: "code" of our host, the same for all methods, and "method_code" of the method."""
    return {"code": _sources(answering_modules()), "method_code": None if pruner is None else method_code(pruner)}


def answering_modules() -> set[str]:
    """The modules that an answer passes through, whatever the method."""
    return reached(ANSWERING, OTHER_HOSTS)


def method_code(pruner: Pruner | type[Pruner]) -> str:
    """Hash of a method's file and of what it alone imports; of a wrapper, also of the method inside."""
    inner = getattr(pruner, "inner", None)
    if inner is not None and not isinstance(pruner, type):
        return _digest([method_code(type(pruner)).encode(), method_code(inner).encode()])
    cls = pruner if isinstance(pruner, type) else type(pruner)
    if cls.__module__.split(".")[0] != PACKAGE:  # a user's own, registered from outside
        return _digest([Path(inspect.getsourcefile(cls)).read_bytes()])
    return _sources(reached([cls.__module__], OTHER_HOSTS) - answering_modules())


def transformers_code(module: str) -> str:
    """Hash of what answers on the Transformers library's classes: our host for them, and the module that drives it."""
    return _sources(reached([module, TRANSFORMERS_HOST], ("llava.model", "llava.serve", "llava.eval.runner")))


def surface_code(module: str) -> str:
    """Hash of who asks, beyond what answers: compared before a run continues, and no matter for a table."""
    return _sources(reached([module], OTHER_HOSTS) - answering_modules())


def _sources(modules: Iterable[str]) -> str:
    files = ((name, source_of(name)) for name in sorted(modules))
    return _digest(part for name, file in files for part in (name.encode(), file.read_bytes()))


def questions_identity(questions: Sequence[Question], folder: Path | None) -> str:
    """Hash of all that is asked, pictures by their names in ``folder``."""
    asked = []
    for question in questions:
        fields = asdict(question)
        if question.image is not None:
            fields["image"] = question.image.relative_to(folder or "").as_posix()
        asked.append(json.dumps(fields, sort_keys=True).encode())
    return _digest(asked)


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
        only_added = place == folder and model_base is not None  # a projector or an adapter, without an index
        weights = {*place.glob("*.bin"), *place.glob("*.safetensors")} if only_added else set(weight_files(place))
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


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]
