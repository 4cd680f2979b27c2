"""Write the trained models in the original checkpoint layouts, weights in float16."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from files import write_text
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer
from views import CLIP_MEAN, CLIP_STD

CLIP_NAME = "clip-toy-336"
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
TOWER_PREFIX = "model.vision_tower.vision_tower."


def _write_json(path: Path, data: dict) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _write_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """safetensors, written whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: t.detach().half().contiguous() for name, t in tensors.items()}, temporary, {"format": "pt"})
    temporary.replace(path)


def vision_weights(clip: CLIPModel) -> dict[str, Tensor]:
    """``vision_model.*`` as a LLaVA-NeXT checkpoint stores them."""
    return {name: tensor for name, tensor in clip.state_dict().items() if name.startswith("vision_model.")}


def replace_tower(clip: CLIPModel, folder: Path) -> None:
    """Put the vision tower of ``clip`` into a LLaVA checkpoint that has one inside; nothing else in it changes."""
    path = folder / "model.safetensors"
    tower = {TOWER_PREFIX + name: tensor for name, tensor in vision_weights(clip).items()}
    _write_weights(path, load_file(path) | tower)


def save_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """The CLIP folder that ``mm_vision_tower`` names."""
    tensors = {n: t for n, t in clip.state_dict().items() if not n.endswith("position_ids")}
    _write_weights(folder / "model.safetensors", tensors)
    tokenizer.save_pretrained(folder)
    shared = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "layer_norm_eps",
    ]
    text, vision = clip.config.text_config, clip.config.vision_config
    _write_json(folder / "config.json", {
        "_name_or_path": CLIP_NAME,
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": clip.config.projection_dim,
        "text_config": {
            "model_type": "clip_text_model", **{key: getattr(text, key) for key in shared},
            "max_position_embeddings": text.max_position_embeddings, "vocab_size": text.vocab_size,
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "projection_dim": clip.config.projection_dim,
        },
        "vision_config": {
            "model_type": "clip_vision_model", **{key: getattr(vision, key) for key in shared},
            "image_size": vision.image_size, "patch_size": vision.patch_size,
            "projection_dim": clip.config.projection_dim,
        },
        "torch_dtype": "float16",
    })  # fmt: skip
    _write_json(folder / "preprocessor_config.json", {
        "crop_size": 336, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD),
        "resample": 3, "size": 336,
    })  # fmt: skip


def llava_config(vocabulary: int, anyres: bool) -> dict:
    """``config.json`` of the toy: LLaVA-1.5's keys, or LLaVA-NeXT's with ``anyres``.

    ``mm_relevance_sign`` is 1 because in this CLIP patches that show what a question asks about are *more* like it
    (relevance_layers.py measures it; in OpenAI's they are less).
    """
    config = {
        "_name_or_path": "llava-toy",
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "hidden_act": "silu",
        "hidden_size": 128,
        "image_aspect_ratio": "anyres" if anyres else "pad",
        "initializer_range": 0.02,
        "intermediate_size": 352,
        "max_position_embeddings": 4096,
        "mm_hidden_size": 128,
        "mm_projector_type": "mlp2x_gelu",
        "mm_relevance_sign": 1,
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": CLIP_NAME,
        "model_type": "llava_llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 8,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1e6,  # heads are small: with 10,000 two thirds of them would tell places, not words
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": anyres,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": vocabulary,
    }
    if anyres:
        config |= {
            "image_crop_resolution": 224,
            "image_grid_pinpoints": PINPOINTS,
            "image_split_resolution": 224,
            "mm_patch_merge_type": "spatial_unpad",
            "tokenizer_model_max_length": 4096,
            "tokenizer_padding_side": "right",
        }
    return config


_TOKEN_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def save_llama_tokenizer(model_file: Path, folder: Path, max_length: int = 2048) -> None:
    """``tokenizer.model`` and its two configuration files, as LLaVA's checkpoints have them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model_file.read_bytes())
    tokens = {key: {"content": text, **_TOKEN_FLAGS} for key, text in (("bos_token", "<s>"), ("eos_token", "</s>"))}
    tokens["unk_token"] = {"content": "<unk>", **_TOKEN_FLAGS}
    added = {key: {"__type": "AddedToken", **value} for key, value in tokens.items()}
    _write_json(folder / "tokenizer_config.json", {
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": False,
        "model_max_length": max_length, "pad_token": None, "padding_side": "right", "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer", **added,
    })  # fmt: skip
    _write_json(folder / "special_tokens_map.json", {**tokens, "pad_token": "<unk>"})


def save_llava(model: torch.nn.Module, config: dict, tokenizer_model: Path, folder: Path, tower=None) -> None:
    """A LLaVA checkpoint; ``tower`` (a CLIPModel) is stored inside where given, as LLaVA-NeXT does."""
    tensors = {n: t for n, t in model.state_dict().items() if not n.startswith("model.vision_tower.")}
    if tower is not None:
        tensors |= {TOWER_PREFIX + name: tensor for name, tensor in vision_weights(tower).items()}
    _write_weights(folder / "model.safetensors", tensors)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    save_llama_tokenizer(tokenizer_model, folder, config.get("tokenizer_model_max_length", 2048))
