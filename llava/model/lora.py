"""LoRA adapters, as LLaVA's training writes them, merged into the base model once and for all.

    W <- W + scale * B A,   scale = alpha / r, or alpha / sqrt(r) for rank-stabilised adapters

A: (r, in), B: (out, r) (Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732). The tensors that were
trained whole (projector, newline) are in ``non_lora_trainables.bin``.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.checkpoint import CheckpointError, read_json, read_pickle, read_weight_file

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TRAINABLES = "non_lora_trainables.bin"
WRAPPER = "base_model.model."  # what PEFT puts before the names of the model that it wraps
PLAIN = {  # settings under which an adapter is the product above and nothing else
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "init_lora_weights": (True, False, "gaussian", "eva"),  # others change the base's weights as well
    "trainable_token_indices": (),
    "target_parameters": (),
    "layer_replication": (),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "megatron_config": (),
}


def has_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() or any((folder / name).is_file() for name in ADAPTER_FILES)


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings of an adapter and its tensors, named as in the model (``model.layers.0.self_attn.q_proj.lora_A``).

    Raises:
        CheckpointError: a file is missing or damaged.
        ValueError: a kind of adapter that is not the plain product; names the setting.
    """
    settings = read_json(folder / ADAPTER_CONFIG)
    for name, plain in PLAIN.items():
        value = settings.get(name)
        if (value or name == "peft_type") and value not in plain:
            raise ValueError(
                f"{folder / ADAPTER_CONFIG} has {name}={value!r:.80}, which is not merged here: merge the LoRA "
                "adapter with PEFT (merge_and_unload) and load what that saves"
            )
    for name in ("lora_alpha", *(settings.get("alpha_pattern") or {})):
        alpha = (settings.get("alpha_pattern") or {}).get(name, settings.get("lora_alpha"))
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"{folder / ADAPTER_CONFIG} has the alpha {alpha!r:.80}, expected a number")
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"a LoRA adapter without weights: missing file {folder / ADAPTER_FILES[0]}")
    tensors = {name.removeprefix(WRAPPER): tensor for name, tensor in read_weight_file(file).items()}
    return settings, {name.removesuffix(".weight") if ".lora_" in name else name: t for name, t in tensors.items()}


def read_trainables(folder: Path) -> dict[str, Tensor]:
    """What was trained whole beside the adapter, by its name in the model; nothing where there is no such file."""
    if not (folder / TRAINABLES).is_file():
        return {}
    tensors = {}
    for name, tensor in read_pickle(folder / TRAINABLES).items():
        name = name.removeprefix("base_model.")
        tensors[name.removeprefix("model.") if name.startswith("model.model.") else name] = tensor
    return tensors


@torch.no_grad()
def merge_adapter(model: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    """Add an adapter's product to the weights of ``model``, computed in float32; whole tensors in it replace theirs.

    Raises:
        CheckpointError: a half of a pair is missing, or nothing in the model has its name and shape.
    """
    parameters = dict(model.named_parameters())
    stems = sorted({name.rpartition(".")[0] for name in tensors if name.endswith((".lora_A", ".lora_B"))})
    whole = sorted(name for name in tensors if not name.endswith((".lora_A", ".lora_B")))
    for name in whole:
        if name not in parameters or parameters[name].shape != tensors[name].shape:
            raise CheckpointError(f"the LoRA adapter of {folder} holds {name}, which is no weight of this model")
        parameters[name].copy_(tensors[name])
    if not stems:
        raise CheckpointError(f"the LoRA adapter of {folder} holds no pair of lora_A and lora_B")
    for stem in stems:
        down, up = (tensors.get(f"{stem}.lora_{half}") for half in "AB")
        weight = parameters.get(f"{stem}.weight")
        fits = down is not None and up is not None and weight is not None and down.ndim == up.ndim == weight.ndim == 2
        if not fits or (up.shape[0], down.shape[1]) != weight.shape or up.shape[1] != down.shape[0]:
            raise CheckpointError(f"the LoRA adapter of {folder} does not fit {stem}.weight of this model")
        product = up.to(weight.device, torch.float32) @ down.to(weight.device, torch.float32)
        weight.copy_(weight.float() + scale_of(settings, stem, down.shape[0]) * product)


def scale_of(settings: dict[str, Any], stem: str, rank: int) -> float:
    """Factor of one module's product; ``alpha_pattern`` has some modules' own alpha, by regular expression."""
    alpha = settings["lora_alpha"]
    for pattern, own in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", stem):
            alpha = own
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
