"""What the files of a checkpoint say before anything is loaded: family, template, whether all is there and fits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.checkpoint import (
    CheckpointError,
    check_shapes,
    check_sizes,
    find_folder,
    has_weights,
    pointer_or_page,
    read_json,
    read_pickle,
    special_tokens,
    tensor_shapes,
    weight_files,
)
from llava.conversation import template_for
from llava.mm_utils import get_model_name_from_path, parse_pinpoints
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
from llava.model.lora import ADAPTER_CONFIG, has_adapter, read_trainables
from llava.model.multimodal_encoder.builder import tower_type
from llava.model.multimodal_encoder.siglip_encoder import folder_at_hand
from llava.model.multimodal_projector.builder import projector_depth
from llava.pruning import Pruner
from llava.pruning.question_reader import QuestionReader
from llava.relevance.clip import check_joint_space
from llava.relevance.siglip import check_siglip_folder

AnyLlavaConfig = LlavaConfig | LlavaMistralConfig | LlavaQwenConfig


# By `architectures`: OneVision's checkpoints call their model_type "llava", which is also what those of 2023 say.
TOY_FOLDER = Path(__file__).resolve().parents[2] / "playground" / "toy"
DEFAULT_CHECKPOINT = str(TOY_FOLDER / "llava-toy-v1.5")  # small and trained: answers on a laptop in seconds
FAMILIES = {
    LlavaConfig: LlavaLlamaForCausalLM,
    LlavaMistralConfig: LlavaMistralForCausalLM,
    LlavaQwenConfig: LlavaQwenForCausalLM,
}


CONFIG_OF = {model.__name__: config for config, model in FAMILIES.items()}


MODEL_TYPES = {"llava": LlavaConfig} | {config.model_type: config for config in FAMILIES}


TOWER_PREFIX = "model.vision_tower.vision_tower."


NOT_LOADED_HERE = re.compile(r"model\.vision_tower\.|.*rotary_emb\.inv_freq$")  # the tower is loaded apart


PROJECTOR_FILE = "mm_projector.bin"


TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt")


ASPECT_RATIOS = re.compile(r"square|pad|anyres(_max_\d{1,4})?")


FLAGS = ("mm_use_im_start_end", "mm_use_im_patch_token", "add_faster_video", "tie_word_embeddings")


UNKNOWN_PARTS = {  # of LLaVA's and its descendants' configurations: what is not built here
    "s2": "several scales of a picture (S2)",
    "mm_resampler_type": "a resampler between tower and projector",
}


@contextmanager
def saying_where_the_toy_is(model_path: str) -> Iterator[None]:
    """Add to errors about the toy, the default checkpoint, how it is come by."""
    try:
        yield
    except CheckpointError as error:
        if TOY_FOLDER not in Path(model_path).resolve().parents:
            raise
        hint = (
            "The toy is no part of the installed package: it comes with a checkout of the repository, in "
            "playground/toy; give that or another checkpoint (--model-path)"
        )
        if (TOY_FOLDER.parents[1] / "scripts" / "toy").is_dir():
            hint = f"`python scripts/toy/train.py` rebuilds the toy in {TOY_FOLDER}"
        raise CheckpointError(f"{error}. {hint}") from error


def find_checkpoint(model_path: str, model_base: str | None = None) -> tuple[Path, Path, AnyLlavaConfig]:
    """Folder of a checkpoint, folder of its language model's weights, and configuration; see `load_pretrained_model`.

    Raises:
        CheckpointError: a folder or file is missing; or weights, base and adapter do not go together.
        ValueError: a checkpoint of another kind.
    """
    with saying_where_the_toy_is(model_path):
        folder = find_folder(model_path)
    if model_base is None and has_adapter(folder):
        whole = ""
        if has_weights(folder):
            whole = f", or remove {ADAPTER_CONFIG} and the adapter if they are merged into the weights beside them"
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise CheckpointError(
            f"{folder} holds a LoRA adapter: give the language model that it was trained on as model_base "
            f"(--model-base; the adapter names {base}){whole}"
        )
    if model_base is not None and has_weights(folder):
        raise CheckpointError(
            f"{folder} holds whole weights, which need no model_base (--model-base): that is for a folder with only "
            f"{PROJECTOR_FILE} or a LoRA adapter"
        )
    base_folder = folder if model_base is None else find_folder(model_base)
    if base_folder != folder and has_adapter(base_folder):
        raise CheckpointError(f"{base_folder}, given as model_base, is itself a LoRA adapter or holds one: merge that")
    return folder, base_folder, read_config(folder, base_folder)


def find_template(model_path: str, model_base: str | None = None, model_name: str | None = None) -> str:
    """Name of the conversation template of a checkpoint, by its family and its tokenizer's files before its name.

    Raises:
        CheckpointError, ValueError: as `find_checkpoint`; or a name that the files contradict.
    """
    _, base_folder, config = find_checkpoint(model_path, model_base)
    settings = base_folder / "tokenizer_config.json"
    chat = read_json(settings).get("chat_template") if settings.is_file() else None
    name = model_name or get_model_name_from_path(str(model_path))
    return template_for(name, config.model_type, special_tokens(base_folder), chat if isinstance(chat, str) else "")


def context_length(config: AnyLlavaConfig) -> int:
    """What LLaVA's loaders of the two families tell of a checkpoint that does not say ``max_sequence_length``."""
    fallback = config.max_position_embeddings if isinstance(config, LlavaQwenConfig) else 2048
    return getattr(config, "max_sequence_length", fallback)


def read_config(folder: Path, base_folder: Path | None = None) -> AnyLlavaConfig:
    """Configuration of a checkpoint, by its ``architectures`` or else its ``model_type``.

    Args:
        base_folder: where the weights are, if not in ``folder``: they tell the kind of the vision tower.

    Raises:
        ValueError: a model of another family or with parts that are not built here, or a value that none has.
    """
    path = folder / "config.json"
    values = read_json(path)
    model_type, architecture = values.get("model_type"), _first(values.get("architectures"))
    family = CONFIG_OF.get(architecture, MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None)
    if family is None or model_type not in MODEL_TYPES or "mm_vision_tower" not in values:
        hint = ""
        if "vision_config" in values or "text_config" in values:
            hint = f"; it is a model of the Transformers library's own format ({architecture}): add --hf"
        raise ValueError(
            f"{folder} is no LLaVA checkpoint in the original format: model_type {model_type!r}, expected one of "
            f"{', '.join(MODEL_TYPES)} with mm_vision_tower{hint}"
        )
    check_sizes(values, path)
    check_parts(values, path)
    values["model_type"] = family.model_type
    base_folder = base_folder or folder
    weights = []
    if has_weights(base_folder):  # not so of a projector alone, before its base is known
        weights = [name for name in tensor_shapes(base_folder) if name.startswith(TOWER_PREFIX)]
    if base_folder != folder:
        weights += [name for name in read_trainables(folder) if name.startswith(TOWER_PREFIX)]
    if not weights:
        check_sizes(*_tower_config(values["mm_vision_tower"], folder))
    values["mm_vision_tower_type"] = tower_type(values["mm_vision_tower"], folder, weights)
    if family is LlavaQwenConfig:
        values["rope_scaling"] = None  # as the published loader does
    try:
        return family.from_dict(values)
    except Exception as error:  # the library has a class of its own for each kind of bad value
        raise ValueError(f"{path} is no configuration of {family.__name__}: {error}") from error


def _first(names: Any) -> str | None:
    return str(names[0]) if isinstance(names, list) and names else None


def _tower_config(name: str, near: Path) -> tuple[dict[str, Any], Path]:
    path = find_folder(name, near) / "config.json"
    return read_json(path), path


def check_parts(values: dict[str, Any], path: Path) -> None:
    """Refuse what a configuration asks for and this code does not build, by the name of its key.

    Raises:
        ValueError: names key and value, and what is possible.
    """
    for name, what in UNKNOWN_PARTS.items():
        if values.get(name):
            raise ValueError(f"{path} says {name}={values[name]!r:.80}: {what} is not built here")
    for name in FLAGS:
        if not isinstance(values.get(name, False), bool | None):
            raise ValueError(f"{path} says {name}={values[name]!r:.80}, expected true or false")
    if not isinstance(values["mm_vision_tower"], str):
        raise ValueError(f"{path} says mm_vision_tower={values['mm_vision_tower']!r:.80}, expected a name")
    aspect_ratio = values.get("image_aspect_ratio")
    if aspect_ratio is not None and not (isinstance(aspect_ratio, str) and ASPECT_RATIOS.fullmatch(aspect_ratio)):
        raise ValueError(
            f"{path} says image_aspect_ratio={aspect_ratio!r:.80}, which is not built here; known are square, pad, "
            "anyres and anyres_max_<tiles>"
        )
    if str(aspect_ratio).startswith("anyres"):
        if values.get("image_grid_pinpoints") is None:
            raise ValueError(f"{path} says image_aspect_ratio={aspect_ratio!r} and lacks image_grid_pinpoints")
        parse_pinpoints(values["image_grid_pinpoints"], side=336)
    layer = values.get("mm_vision_select_layer", -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ValueError(f"{path} says mm_vision_select_layer={layer!r:.80}, expected a whole number")
    projector_depth(values.get("mm_projector_type", "linear"))


def check_files(
    folder: Path,
    base_folder: Path,
    config: AnyLlavaConfig,
    pruner: Pruner | None = None,
    joint_folder: Path | None = None,
) -> None:
    """Raise CheckpointError if a file that loading will need is missing, before anything large is read."""
    has = {name for name in TOKENIZER_FILES if (base_folder / name).is_file()}
    if not has & {"tokenizer.model", "tokenizer.json"} and not {"vocab.json", "merges.txt"} <= has:
        raise CheckpointError(f"missing file {base_folder / TOKENIZER_FILES[isinstance(config, LlavaQwenConfig)]}")
    for name in sorted(has):
        what = pointer_or_page(base_folder / name)
        if what is not None:
            raise CheckpointError(f"damaged file {base_folder / name}: {what}")
    weight_files(base_folder)
    if base_folder != folder and not has_adapter(folder) and not (folder / PROJECTOR_FILE).is_file():
        raise CheckpointError(f"missing file {folder / PROJECTOR_FILE}")
    if config.mm_vision_tower_type == "siglip":
        named = joint_folder is not None
        joint_folder = joint_folder or folder_at_hand(config.mm_vision_tower, near=folder)
        if joint_folder is not None and (named or insists_on_clip(pruner)):
            check_siglip_folder(joint_folder)
        return
    tower_folder = find_folder(config.mm_vision_tower, near=folder)
    if not (tower_folder / "preprocessor_config.json").is_file():
        raise CheckpointError(f"missing file {tower_folder / 'preprocessor_config.json'}")
    if insists_on_clip(pruner):
        check_joint_space(tower_folder)


def read_added(folder: Path, base_folder: Path) -> dict[str, Tensor]:
    """Tensors that a folder beside its language model adds to it or replaces: projector, newline, perhaps a tower.

    Raises:
        CheckpointError: a file is damaged, or the two that may hold a projector disagree.
    """
    if base_folder == folder:
        return {}
    added = read_trainables(folder) if has_adapter(folder) else {}
    if (folder / PROJECTOR_FILE).is_file():
        for name, tensor in read_pickle(folder / PROJECTOR_FILE).items():
            if name in added and not torch.equal(added[name], tensor):
                raise CheckpointError(
                    f"{folder} holds two different tensors {name}: one in {PROJECTOR_FILE}, one beside the LoRA "
                    f"adapter; remove {PROJECTOR_FILE} if that is of an earlier stage of training"
                )
            added[name] = tensor
    return added


def check_weights(base_folder: Path, config: AnyLlavaConfig, added: dict[str, Tensor]) -> None:
    """Compare what weights there are with what the configuration builds, before anything large is read.

    Args:
        added: tensors from elsewhere, which replace those of ``base_folder``.

    Raises:
        CheckpointError: tensors are missing, of another shape, or of layers that the configuration does not have.
    """
    if getattr(config, "quantization_config", None) is not None:
        return  # stored under the names and shapes of the library that quantised them
    with torch.device("meta"):
        model = FAMILIES[type(config)](config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    foreign = sorted(name for name in added if name not in expected and not name.startswith(TOWER_PREFIX))
    if foreign:
        raise CheckpointError(f"{PROJECTOR_FILE} or trainables hold {foreign[0]}, which this model does not have")
    found = tensor_shapes(base_folder) | {name: tuple(tensor.shape) for name, tensor in added.items()}
    check_shapes(expected, found, base_folder, "the model")
    surplus = [name for name in found if name not in expected and not NOT_LOADED_HERE.match(name)]
    surplus = sorted(name for name in surplus if name.startswith(("model.layers.", "model.mm_projector.")))
    if surplus:
        raise CheckpointError(
            f"{base_folder} holds {surplus[0]} and {len(surplus) - 1} more tensors that config.json "
            f"(num_hidden_layers={config.num_hidden_layers}, mm_projector_type="
            f"{getattr(config, 'mm_projector_type', 'linear')}) has no place for"
        )


def insists_on_clip(pruner: Pruner | None) -> bool:
    """Whether a method cannot do without the joint space: "auto" reads the question elsewhere where it is missing."""
    return isinstance(pruner, QuestionReader) and pruner.relevance == "clip"
