"""Reading checkpoints: where the folder is, whether it is whole, and single tensors out of it.

Weights are data: safetensors, or pickles that hold nothing but tensors (``weights_only``). What a folder says of
itself is not trusted: indexes name files of the folder alone, sizes have limits, numbers are finite.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# In the order in which the library looks for them: it reads the first that is there, and so must we.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
INDEX = ".index.json"
DOWNLOAD_PATTERNS = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]
SNIFFED_BYTES = 256
SIZES = {  # keys of config.json that are counts, and more than any model has
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 2**16,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "vocab_size": 2**24,
    "mm_hidden_size": 2**20,
    "image_size": 2**14,
    "patch_size": 2**14,
    "projection_dim": 2**20,
    "num_channels": 64,
}


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


def read_json(path: Path) -> dict[str, Any]:
    """Contents of a JSON file with names and values. Raises CheckpointError where it is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"missing file {path}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"damaged file {path}: {pointer_or_page(path) or error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"damaged file {path}: it holds {type(values).__name__}, not names with values")
    return values


def check_sizes(values: dict[str, Any], path: Path) -> None:
    """Refuse counts that no model has, in a configuration and in those nested in it, before anything is built.

    Raises:
        ValueError: not a whole number, not positive, or beyond `SIZES`; gives name and value.
    """
    for name, value in values.items():
        if isinstance(value, dict):
            check_sizes(value, path)
        most = SIZES.get(name)
        if most is None or value is None:
            continue
        for count in value if isinstance(value, list) else [value]:
            if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= most:
                raise ValueError(f"{path} says {name}={value!r:.80}, expected a whole number from 1 to {most}")


def special_tokens(folder: Path) -> set[str]:
    """Tokens that a tokenizer's files add to its vocabulary, without loading it: the marks of chat templates."""
    tokens: set[str] = set()
    for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            continue
        values = read_json(folder / name)
        if name == "added_tokens.json":
            tokens.update(values)
        else:
            added = values.get("added_tokens_decoder" if name == "tokenizer_config.json" else "added_tokens") or []
            entries = added.values() if isinstance(added, dict) else added
            tokens.update(str(entry.get("content")) for entry in entries if isinstance(entry, dict))
    return tokens


# --- weight files --------------------------------------------------------------------------------------------------


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a model's weights, whole or not."""
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Weight files of a checkpoint and, where an index tells, the tensors in each.

    Of several saves in one folder the library reads the first of `WEIGHT_FILES`, and this the same one.

    Raises:
        CheckpointError: no weights, a shard missing or outside the folder, a file that is cut short or something
            else, or two saves of which nothing tells the newer one.
    """
    found = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"no weights in {folder}: expected {' or '.join(WEIGHT_FILES)}")
    shards: dict[Path, list[str] | None] = {folder / found[0]: None}
    if found[0].endswith(INDEX):
        shards = _indexed(folder, found[0])
    elif found[0] + INDEX in found and all(shard.is_file() for shard in _indexed(folder, found[0] + INDEX)):
        raise CheckpointError(
            f"{folder} holds two saves, {found[0]} and the shards of {found[0]}{INDEX}: remove the older one"
        )
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{folder} is incomplete: missing {', '.join(sorted(missing))}")
    for shard in shards:
        check_whole(shard)
    return shards


def _indexed(folder: Path, index: str) -> dict[Path, list[str] | None]:
    """Shards that an index names, and the tensors in each. Raises CheckpointError for names outside ``folder``."""
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"damaged file {folder / index}: it has no weight_map")
    shards: dict[Path, list[str] | None] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not is_inside(shard):
            raise CheckpointError(f"{folder / index} names the file {shard!r:.200}, which is not inside the folder")
        shards.setdefault(folder / shard, []).append(tensor)
    return shards


def is_inside(name: str) -> bool:
    """Whether a relative name leads to somewhere below the folder that it is relative to."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return bool(paths[0].parts) and not any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint, without reading the tensors (of old pickles, with)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        else:
            shapes |= {name: tuple(tensor.shape) for name, tensor in read_pickle(path).items()}
    return shapes


def pointer_or_page(path: Path) -> str | None:
    """What stands where a file should: the pointer that git leaves without LFS, or a web page; ``None`` for others."""
    with path.open("rb") as file:
        head = file.read(SNIFFED_BYTES).lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-LFS pointer, not the file: `git lfs pull` in its folder fetches that"
    if head[:1] == b"<":
        return "it is a web page, not the file: download it again"
    return None


def check_whole(path: Path) -> None:
    """Raise CheckpointError if a weight file is cut short or something else, without reading its tensors."""
    what = pointer_or_page(path)
    if what is not None:
        raise CheckpointError(f"damaged or partial weight file {path}: {what}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return
        with path.open("rb") as file:
            start = file.read(2)
        if start == b"PK":
            zipfile.ZipFile(path).close()
        elif start[:1] != b"\x80":
            why = "it is empty" if not start else f"it begins with {start!r}, as no file of torch.save does"
            raise CheckpointError(f"damaged or partial weight file {path}: {why}")
    except (SafetensorError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"damaged or partial weight file {path}: {error}") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a file written by `torch.save`, mapped from the disk where its format allows.

    Raises:
        CheckpointError: missing, damaged, or with anything but tensors in it.
    """
    if not path.is_file():
        raise CheckpointError(f"missing file {path}")
    check_whole(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # truncated archives and foreign pickles raise classes of their own
        raise CheckpointError(f"damaged file {path}: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"damaged file {path}: it holds something other than tensors by name")
    return state


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
        check_whole(path)
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefixes)]  # noqa: SIM118 (not a dict)
            return {name: file.get_tensor(name) for name in names}
    return {name: tensor for name, tensor in read_pickle(path).items() if name.startswith(prefixes)}


# --- into a model --------------------------------------------------------------------------------------------------


def fill_module(model: nn.Module, tensors: dict[str, Tensor], folder: Path | None, dtype: torch.dtype) -> None:
    """Give a module built on the meta device its tensors, cast to ``dtype``.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or holds NaN or infinities.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(expected, {name: tuple(t.shape) for name, t in tensors.items()}, folder, type(model).__name__)
    model.load_state_dict({name: tensors[name].to(dtype) for name in expected}, assign=True)
    check_finite(model, folder)
    for module in model.modules():
        if hasattr(module, "position_ids"):  # not stored in checkpoints
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]


def check_shapes(
    expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], folder: Path | None, what: str
) -> None:
    """Raise CheckpointError where ``found`` lacks a tensor that is ``expected``, or has it in another shape."""
    missing = sorted(set(expected) - set(found))
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors of {what}, first {missing[0]}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{folder}: {name} has the shape {found[name]}, and {shape} by config.json: weights and configuration "
                "are of different models"
            )


def check_finite(model: nn.Module, folder: Path | None) -> None:
    """Raise CheckpointError if a parameter holds NaN or infinities: such a model answers, and means nothing."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.is_meta or not parameter.numel():
            continue
        if not torch.stack(torch.aminmax(parameter.detach())).isfinite().all():
            raise CheckpointError(
                f"{folder}: {name} holds NaN or infinities in {parameter.dtype}: damaged weights, or a type too narrow"
            )
