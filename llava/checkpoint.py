"""Reading checkpoints: where the folder is, whether it is whole, and single tensors out of it.

Weights are data: safetensors, or pickles that hold nothing but tensors (``weights_only``).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

WEIGHT_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
DOWNLOAD_PATTERNS = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]


class CheckpointError(OSError):
    """A checkpoint is missing, incomplete or damaged; the message names the file."""


def find_folder(name: str, near: Path | None = None, download: bool = True) -> Path:
    """Folder of a checkpoint: a path, a path relative to the folder ``near`` or its parents, or a name on the hub.

    Args:
        download: False takes from the hub only what was downloaded before.

    Raises:
        CheckpointError: found nowhere; the message lists the places.
    """
    roots = [Path()] if near is None else [Path(), near, *near.resolve().parents[:2]]
    places = [root / name for root in roots]
    for place in places:
        if (place / "config.json").is_file():
            return place
    existing = next((place for place in places if place.exists()), None)
    if existing is not None:
        raise CheckpointError(f"{existing} is not a checkpoint folder: it has no config.json")
    looked = ", ".join(str(place) for place in places)
    if Path(name).is_absolute() or name.count("/") != 1:
        raise CheckpointError(f"no checkpoint at {looked}")
    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOAD_PATTERNS, local_files_only=not download))
    except Exception as error:  # the hub's client raises a different class for each reason
        raise CheckpointError(
            f"no checkpoint at {looked}, and '{name}' cannot be had from the hub: {error}"
        ) from error


def read_json(path: Path) -> dict:
    """Contents of a JSON file. Raises CheckpointError where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"missing file {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"damaged file {path}: {error}") from error


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Weight files of a checkpoint and, where an index tells, the tensors in each.

    Raises:
        CheckpointError: no weights, a shard missing, or a file that breaks off.
    """
    for index in WEIGHT_INDEXES:
        if (folder / index).is_file():
            shards: dict[Path, list[str] | None] = {}
            for tensor, shard in read_json(folder / index)["weight_map"].items():
                shards.setdefault(folder / shard, []).append(tensor)
            break
    else:
        shards = {folder / name: None for name in WEIGHT_FILES if (folder / name).is_file()}
        shards = dict(list(shards.items())[:1])
        if not shards:
            raise CheckpointError(f"no weights in {folder}: expected {' or '.join(WEIGHT_FILES + WEIGHT_INDEXES)}")
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{folder} is incomplete: missing {', '.join(sorted(missing))}")
    for shard in shards:
        _check_whole(shard)
    return shards


def tensor_names(folder: Path) -> set[str]:
    """Names of all tensors of a checkpoint, as its index or its files tell."""
    names: set[str] = set()
    for path, listed in weight_files(folder).items():
        if listed is not None:
            names.update(listed)
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
        else:
            names.update(torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)))
    return names


def _check_whole(path: Path) -> None:
    """Raise CheckpointError if a weight file is cut short, without reading its tensors."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return
        with path.open("rb") as file:
            is_zip_archive = file.read(2) == b"PK"
        if is_zip_archive:
            zipfile.ZipFile(path).close()
        elif path.stat().st_size == 0:
            raise CheckpointError(f"damaged or partial weight file {path}: it is empty")
    except (SafetensorError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"damaged or partial weight file {path}: {error}") from error


def read_tensors(folder: Path, prefixes: Iterable[str]) -> dict[str, Tensor]:
    """Tensors whose names start with one of ``prefixes``, by full name, on the CPU in their stored dtype."""
    prefixes = tuple(prefixes)
    found: dict[str, Tensor] = {}
    for path, names in weight_files(folder).items():
        if names is not None and not any(name.startswith(prefixes) for name in names):
            continue
        found |= read_weight_file(path, prefixes)
    return found


def read_weight_file(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Tensors of one weight file whose names start with one of ``prefixes``, on the CPU in their stored dtype."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefixes)]  # noqa: SIM118 (not a dict)
            return {name: file.get_tensor(name) for name in names}
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    return {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}


def fill_module(model: nn.Module, tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Give a module built on the meta device its tensors, cast to ``dtype``; CheckpointError if one is missing."""
    missing = [name for name in model.state_dict() if name not in tensors]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors of {type(model).__name__}, first {missing[0]}")
    model.load_state_dict({name: tensors[name].to(dtype) for name in model.state_dict()}, assign=True)
    for module in model.modules():
        if hasattr(module, "position_ids"):  # not stored in checkpoints
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
