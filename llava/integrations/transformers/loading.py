"""Load a model of the Transformers library with its processor, so that a pruner can attach to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from llava.checkpoint import CheckpointError, check_sizes, read_json
from llava.integrations import onevision_1_5
from llava.integrations.transformers.host import find_host

TESTED_WITHOUT_TORCHVISION = "LLaVA and LLaVA-NeXT need none"


def load_transformers_model(
    name: str,
    device: str = "cpu",
    device_map: str | None = None,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    quantization_config: Any = None,
) -> tuple[Any, nn.Module]:
    """Processor and model, ready for inference.

    Args:
        name: folder or hub name.
        device: where the model goes unless ``device_map`` spreads it.

    Raises:
        CheckpointError: no such checkpoint, or a file is missing.
        UnsupportedModelError: a class that a pruner cannot attach to.
        ValueError: a model whose code comes with the checkpoint, one that reads no pictures, sizes that no model has,
            or a processor that does not say how many tokens a picture is.
        ImportError: the processor needs torchvision; says how to install it.
    """
    stored = Path(name) / "config.json"
    if stored.is_file():
        check_format(read_json(stored), stored)
    try:
        config = AutoConfig.from_pretrained(name)
        architecture = (config.architectures or [config.model_type])[0]
        known = any(hasattr(module, architecture) for module in (transformers, onevision_1_5))
        if type(config) not in AutoModelForImageTextToText._model_mapping or not known:
            raise ValueError(
                f"{name} is a {architecture}, which is none of the library's models of pictures and text (a "
                "checkpoint in LLaVA's original format: leave --hf out)"
            )
        processor = AutoProcessor.from_pretrained(name)
        check_processor(processor, config, name)
        model = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            quantization_config=quantization_config,
        )
    except ImportError as error:
        if "torchvision" in str(error).lower():
            raise ImportError(
                f"the processor of {name} has a part for videos, which needs torchvision: "
                f'pip install "script-llava[hf]" ({TESTED_WITHOUT_TORCHVISION})'
            ) from error
        raise
    except OSError as error:
        raise CheckpointError(f"no model of the Transformers library at {name}: {error}") from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{name} brings its own code, which is not run here: take a checkpoint of one of the library's classes"
            ) from error
        raise
    find_host(model)
    if device_map is None and quantization_config is None:
        model.to(device)
    return processor, model.eval()


def check_format(values: dict[str, Any], path: Path) -> None:
    """Refuse a configuration in LLaVA's original format, and sizes that no model has, before anything is built."""
    if "mm_vision_tower" in values and "vision_config" not in values:
        raise ValueError(f"{path.parent} is a checkpoint in LLaVA's original format: leave --hf out")
    check_sizes(values, path)


def check_processor(processor: Any, config: Any, name: str) -> None:
    """Refuse LLaVA's processors of older conversions, which leave the number of a picture's tokens to the model."""
    if getattr(processor, "patch_size", 0) is not None:
        return
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    tower = config.vision_config
    wanted = {
        "patch_size": tower.patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int("clip" in tower.model_type and "siglip" not in tower.model_type),
    }
    raise ValueError(
        f"the processor of {name} does not say patch_size, from which it counts a picture's tokens (an older "
        f"conversion): add {str(wanted)[1:-1]} to its processor_config.json"
    )
